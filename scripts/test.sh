#!/usr/bin/env bash
# Every check of the project, as continuous integration runs it: format, vet,
# shell scripts, and all tests under the race detector with real packets in
# network namespaces, the seeds and past findings of each fuzz target among
# them. As root nothing may be skipped. Without root, where user namespaces are
# allowed, the few tests that need a second user are. scripts/fuzz.sh looks for
# new findings: what it does differs from run to run, so it judges no commit.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"
export PCPD_REQUIRE_NETNS=1

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

printf '\nEverything passed: format, vet, scripts, tests with real packets.\n'
cat build/summary.txt
