#!/usr/bin/env bash
# Runs each fuzz target of the project, to find what its seeds do not. A
# finding is left under the package's testdata/fuzz: mend the cause and commit
# the file, then every test run checks it.
#
#   PCPD_FUZZ=1000000x  how long each target runs (go test -fuzztime)
set -euo pipefail
cd "$(dirname "$0")/.."
fuzz=${PCPD_FUZZ:-1000000x}

fail() {
	printf '\nFAILED: %s\n' "$*" >&2
	exit 1
}

mkdir -p build
# `go test -list` prints the names of a package's targets before its "ok".
go test -list '^Fuzz' ./... >build/fuzz.txt || fail "a package does not build for fuzzing."
targets=()
while read -r first package _; do
	case $first in
	Fuzz*) targets+=("$first") ;;
	ok)
		for target in "${targets[@]}"; do
			printf '%s ' "$target"
			go test -run '^$' -fuzz "^$target\$" -fuzztime "$fuzz" "$package" >build/fuzz.log 2>&1 </dev/null ||
				{ cat build/fuzz.log && fail "fuzz target $target of $package; the input is under its testdata/fuzz."; }
			tail -n 1 build/fuzz.log
		done
		targets=()
		;;
	esac
done <build/fuzz.txt
printf '\nNo fuzz target found anything in %s.\n' "$fuzz"
