#!/usr/bin/env bash
# Every check of the project, as continuous integration runs it: format, vet,
# shell scripts, all tests under the race detector with real packets in
# network namespaces, and a short run of each fuzz target. As root nothing may
# be skipped. Without root, where user namespaces are allowed, the few tests
# that need a second user are.
#
#   PCPD_FUZZ=20000x  how long each fuzz target runs (go test -fuzztime; 0 for none)
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"
export PCPD_REQUIRE_NETNS=1
fuzz=${PCPD_FUZZ:-20000x}

step() { printf '\n== %s\n' "$*"; }
fail() {
	printf '\nFAILED: %s\n' "$*" >&2
	exit 1
}

scripts/setup.sh || fail "something that the tests need is missing; the line above says what."

step "format, vet, shell scripts"
unformatted=$(gofmt -l .)
[[ -z $unformatted ]] || fail "not formatted by gofmt: ${unformatted//$'\n'/ }"
go vet ./... || fail "go vet found something."
shellcheck -x scripts/*.sh scripts/lab .ci/run || fail "shellcheck found something in a script."

step "builds for a router of 32 bits and big-endian, too"
CGO_ENABLED=0 GOARCH=mips go build -o /dev/null ./cmd/... || fail "it does not build for mips."

step "all tests, race detector on"
mkdir -p build
skips=(-no-skips)
[[ $(id -u) == 0 ]] || skips=()
go test -race -timeout 15m -json ./... | go run ./internal/testreport "${skips[@]}" build/summary.txt ||
	fail "a test failed or was skipped; it is shown above."

if [[ $fuzz != 0 ]]; then
	step "each fuzz target, $fuzz"
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
fi

printf '\nEverything passed: format, vet, scripts, tests with real packets, fuzzing.\n'
cat build/summary.txt
