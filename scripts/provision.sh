#!/usr/bin/env bash
# Sets up one guest of the Vagrantfile: provision.sh router|client|outside.
# Runs as root inside the guest, as often as you like. The binaries are in
# /tmp. Interfaces are found by their addresses, as boxes name them
# differently.
set -euo pipefail

role=${1:-}
case $role in
router | client | outside) ;;
*)
	echo "usage: provision.sh router|client|outside" >&2
	exit 2
	;;
esac

interface_of() { # ADDRESS
	local ifname
	ifname=$(ip -o -4 addr show | awk -v a="$1" 'index($4, a "/") == 1 { print $2 }')
	[[ -n $ifname ]] || {
		echo "provision: no interface has the address $1" >&2
		exit 1
	}
	echo "$ifname"
}

# In one move, so that a running daemon keeps its file.
for binary in pcpd pcpctl; do
	[[ ! -e /tmp/$binary ]] || install -m 755 "/tmp/$binary" "/usr/local/bin/$binary.new"
	[[ ! -e /usr/local/bin/$binary.new ]] || mv "/usr/local/bin/$binary.new" "/usr/local/bin/$binary"
done

export DEBIAN_FRONTEND=noninteractive
if ! command -v nft >/dev/null || ! command -v conntrack >/dev/null; then
	apt-get -qq update
	apt-get -qq install -y --no-install-recommends nftables conntrack iproute2 netcat-openbsd
fi

case $role in
router)
	modprobe -a nf_tables nf_conntrack nft_nat 2>/dev/null || true
	printf 'net.ipv4.ip_forward = 1\nnet.ipv6.conf.all.forwarding = 1\n' >/etc/sysctl.d/60-pcpd.conf
	sysctl -q -p /etc/sysctl.d/60-pcpd.conf
	lan=$(interface_of 192.168.56.2)
	wan=$(interface_of 192.168.57.2)
	ip -6 addr replace 2001:db8:1::1/64 dev "$lan" nodad
	ip -6 addr replace 2001:db8:ffff::2/64 dev "$wan" nodad
	cat >/etc/systemd/system/pcpd.service <<-END
		[Unit]
		Description=Port Control Protocol server
		After=network-online.target
		Wants=network-online.target

		[Service]
		ExecStart=/usr/local/bin/pcpd --internal $lan --external $wan
		Restart=on-failure
		StateDirectory=pcpd
		StateDirectoryMode=0700
		RuntimeDirectory=pcpd
		AmbientCapabilities=CAP_NET_ADMIN
		CapabilityBoundingSet=CAP_NET_ADMIN
		ProtectSystem=strict
		ProtectHome=yes
		PrivateTmp=yes
		NoNewPrivileges=yes

		[Install]
		WantedBy=multi-user.target
	END
	systemctl daemon-reload
	systemctl enable pcpd
	systemctl restart pcpd
	;;
client)
	ip route replace 192.168.57.0/24 via 192.168.56.2
	lan=$(interface_of 192.168.56.10)
	ip -6 addr replace 2001:db8:1::10/64 dev "$lan" nodad
	ip -6 route replace 2001:db8:ffff::/64 via 2001:db8:1::1
	;;
outside)
	wan=$(interface_of 192.168.57.100)
	ip -6 addr replace 2001:db8:ffff::100/64 dev "$wan" nodad
	ip -6 route replace 2001:db8:1::/64 via 2001:db8:ffff::2
	;;
esac
echo "provision: $role is ready"
