#!/usr/bin/env bash
# Shows what pcpd does, with real packets, and leaves nothing behind: a router
# between an inside and an outside host (network namespaces of this machine,
# drawn in scripts/lab), the daemon on the router, a mapping asked for by the
# inside host, and a stranger outside who uses it. Needs root or user
# namespaces; nothing outside the demo's own namespaces is touched.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"

scripts/setup.sh ip nft sysctl

if [[ $(id -u) != 0 ]]; then
	unshare --user --map-root-user --net --mount true 2>/dev/null || {
		echo "demo: this system lets only root make network namespaces: sudo make demo" >&2
		exit 1
	}
	# shellcheck disable=SC2016 # $0 and $@ are the inner shell's
	exec unshare --user --map-root-user --net --mount bash -c \
		'mount -t tmpfs tmpfs /run && mount -t sysfs sysfs /sys && exec "$0" "$@"' "scripts/demo.sh" "$@"
fi

export PCPD_LAB=demo-$$
dir=$(mktemp -d)
socket=$dir/control.sock
jobs=() # process ids of what runs in the background
result="The demo did not finish; what went wrong is above."

finish() {
	local status=$?
	trap - EXIT INT TERM HUP
	{ kill "${jobs[@]}" && wait; } 2>/dev/null
	[[ $status == 0 ]] || { [[ -s $dir/pcpd.log ]] && echo "The daemon's log:" && tail -n 20 "$dir/pcpd.log"; } >&2
	scripts/lab down || status=1
	rm -rf "$dir"
	printf '\n%s The lab is removed again.\n' "$result"
	exit "$status"
}
trap finish EXIT
trap 'result="Interrupted."; exit 130' INT TERM HUP

step() { printf '\n-- %s\n' "$*"; }
# on HOST COMMAND...: what a person on that host would type, shown and run
on() {
	local host=$1 program=$2
	shift 2
	printf '%-8s$ %s %s\n' "$host" "${program##*/}" "$*"
	scripts/lab shell "$host" "$program" "$@"
}
# admin ARGS...: pcpctl on the router, with the demo's own control socket
admin() {
	printf '%-8s$ pcpctl %s\n' router "$*"
	scripts/lab shell router "$dir/pcpctl" "$@" --control "$socket"
}
# expect answer|silence PROTOCOL ADDR:PORT: the outside host calls
expect() {
	local wanted=$1 reply
	shift
	printf '%-8s$ connect to %s by %s: ' outside "$2" "$1"
	if reply=$(scripts/lab shell outside "$dir/labtool" ask "$1" "$2" 2>/dev/null); then
		echo "\"$reply\""
		[[ $wanted == answer ]] || { echo "There should have been no answer." >&2 && return 1; }
	else
		echo "no answer"
		[[ $wanted == silence ]] || { echo "There should have been an answer." >&2 && return 1; }
	fi
}
# wait_for WHAT COMMAND...: up to ten seconds
wait_for() {
	local what=$1 deadline=$((SECONDS + 10))
	shift
	until "$@" >/dev/null 2>&1; do
		((SECONDS < deadline)) || { echo "$what did not happen within ten seconds." >&2 && return 1; }
		sleep 0.05
	done
}

step "Building pcpd and pcpctl"
CGO_ENABLED=0 go build -buildvcs=false -o "$dir/" ./cmd/pcpd ./cmd/pcpctl ./internal/nstest/cmd/labtool

step "A router between an inside host (192.168.1.10) and an outside host (203.0.113.100)"
scripts/lab up
for address in 192.168.1.10:8080 '[2001:db8:1::10]:8080'; do
	scripts/lab shell inside "$dir/labtool" serve "$address" >>"$dir/serve.log" 2>&1 &
	jobs+=($!)
done
both_serve() { [[ $(grep -c '^serving' "$dir/serve.log") == 2 ]]; }
wait_for "The inside host's service" both_serve
echo "The inside host serves port 8080. The router's one IPv4 address is 203.0.113.2."

step "The daemon starts on the router"
printf '%-8s$ pcpd --internal lan0 --external wan0\n' router
scripts/lab shell router "$dir/pcpd" --internal lan0 --external wan0 \
	--state "$dir/state" --control "$socket" >"$dir/pcpd.log" 2>&1 &
daemon=$!
jobs+=("$daemon")
wait_for "The daemon's start" scripts/lab shell router "$dir/pcpctl" stats --control "$socket"
expect silence tcp 203.0.113.2:8080
expect silence tcp '[2001:db8:1::10]:8080'

step "The inside host asks for mappings"
on inside "$dir/pcpctl" map --protocol tcp --internal-port 8080 --external-port 8080 --prefer-failure --lifetime 600
on inside "$dir/pcpctl" map --server 192.168.1.1 --protocol udp --internal-port 8080 --external-port 8080 --prefer-failure --lifetime 600

step "Now a stranger outside gets through, and no further than that"
expect answer tcp 203.0.113.2:8080
expect answer udp 203.0.113.2:8080
expect answer tcp '[2001:db8:1::10]:8080'
expect silence udp '[2001:db8:1::10]:8080'

step "What the daemon knows"
admin list

step "What the kernel has been told, in the table inet pcpd"
scripts/lab shell router nft list table inet pcpd >"$dir/table"
awk '
	$1 == "map" || $1 == "set" { name = $2 }
	/elements = \{/ { inside = 1 }
	inside { line = $0; sub(/.*elements = \{ */, "", line); sub(/ *\}.*/, "", line); gsub(/^[ \t]+/, "", line)
		if (line != "" && name ~ /^(dnat4|snat4|pin6)$/) printf "  %-6s %s\n", name, line }
	/\}/ { inside = 0 }
' "$dir/table"
cat <<'END'

  dnat4  packets to the external address and port go to the internal ones
  snat4  the same socket, when it speaks first, shows its external address and port
  pin6   an IPv6 socket that may be reached: nothing is translated, a hole is opened
END

step "The administrator removes one of them"
admin delete tcp 192.168.1.10:8080
expect silence tcp 203.0.113.2:8080
expect answer udp 203.0.113.2:8080

step "The daemon's objects are removed from the router"
kill -TERM "$daemon" # scripts/lab and ip have become the daemon, by exec
wait "$daemon"
on router "$dir/pcpd" cleanup
if scripts/lab shell router nft list table inet pcpd >/dev/null 2>&1; then
	echo "The table is still there." >&2
	exit 1
fi

result="The demo succeeded: a stranger reached the inside host through a mapping it asked for, over TCP, UDP and IPv6, and only there."
