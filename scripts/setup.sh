#!/usr/bin/env bash
# Installs what the tests, the demo and the lab use on Debian. Silent and
# without effect where everything is there already.
#
#   scripts/setup.sh              everything
#   scripts/setup.sh ip nft ...   only what has these commands
#   scripts/setup.sh miniupnpd    what `make bench` compares with; never
#                                 installed unless it is named
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

# command  Debian package that has it, "named" if only on demand
needs='
gcc        gcc
git        git
make       make
ip         iproute2
nft        nftables
conntrack  conntrack
sysctl     procps
nfcapd     nfdump
tshark     tshark
shellcheck shellcheck
miniupnpd  miniupnpd-nftables named
'

say() { printf 'setup: %s\n' "$*" >&2; }

if ! command -v go >/dev/null; then
	say "Go is missing. Install Go 1.26 or later from https://go.dev/dl/ and put it on PATH."
	exit 1
fi

packages=()
while read -r command package when; do
	[[ -n $command && ($# == 0 && $when != named || " $* " == *" $command "*) ]] || continue
	command -v "$command" >/dev/null || packages+=("$package")
done <<<"$needs"
[[ ${#packages[@]} -gt 0 ]] || exit 0

if ! command -v apt-get >/dev/null; then
	say "these programs are missing: ${packages[*]}. This is not Debian; install them by this system's means."
	exit 1
fi
if [[ $(id -u) != 0 ]]; then
	say "these Debian packages are missing: ${packages[*]}. Run this once: sudo scripts/setup.sh"
	exit 1
fi

say "installing ${packages[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
apt() { apt-get -qq -o DPkg::Lock::Timeout=300 "$@" >>"$log" 2>&1 </dev/null; }
# The package lists of a new machine may be old or absent: fetch them, but let
# the installation decide whether that mattered.
apt update || true
if ! apt install -y --no-install-recommends "${packages[@]}"; then
	tail -n 20 "$log" >&2
	say "apt-get could not install ${packages[*]}; its last words are above."
	exit 1
fi
