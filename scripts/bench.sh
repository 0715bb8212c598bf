#!/usr/bin/env bash
# Measures what README's "What it costs" says, in network namespaces, with the
# real daemon: six to twelve minutes on two cores, on which nothing else should
# run. The figures go to docs/bench.jsonl and from there into README.md.
#
#   scripts/bench.sh                         up to 100,000 mappings
#   PCPD_BENCH=full scripts/bench.sh         up to 1,000,000, with --durability relaxed
#   PCPD_BENCH_ONLY=Lone scripts/bench.sh    one benchmark, into build/ only
#
# The comparison with miniupnpd needs it: scripts/setup.sh miniupnpd
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"
only=${PCPD_BENCH_ONLY:-}

scripts/setup.sh ip nft conntrack
mkdir -p build
out=$PWD/build/bench.jsonl
: >"$out"
export PCPD_BENCH_OUT=$out PCPD_REQUIRE_NETNS=1

note() { printf '{"name":"machine/%s","text":"%s"}\n' "$1" "$2" >>"$out"; }
note date "$(date +%Y-%m-%d)"
note kernel "Linux $(uname -r | sed 's/[^0-9.].*//')"
note cpu "$(nproc) cores of $(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -n 1)"
note commit "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"

read -r load _ </proc/loadavg
note load "load $load before it"
printf 'load before the run: %s (should be near 0)\n' "$load"

begun=$SECONDS
budget=15m
[[ ${PCPD_BENCH:-} != full ]] || budget=30m
status=0
go test -run '^$' -bench "^Benchmark(${only:-Requests|Packets|Miniupnpd|Filters|Storm|Lone})\$" \
	-benchtime 1x -timeout "$budget" ./netns_test || status=$?
printf '\nmeasured in %d s: %s\n\n' $((SECONDS - begun)) "$out"

# What a run that failed or took too long has measured is shown, but not kept.
go run ./internal/benchtable "$out"
[[ $status == 0 ]] || exit "$status"
if [[ -z $only ]]; then
	cp "$out" docs/bench.jsonl
	go run ./internal/benchtable docs/bench.jsonl README.md
fi
