#!/usr/bin/env bash
# Runs the data path's tests on the kernels of Debian 12 and of its backports
# (6.1 and 6.12), in QEMU without hardware virtualisation, so that it works
# wherever a container does. As root on Debian; downloads about 60 MB.
#
#   scripts/kernels.sh                    both kernels
#   scripts/kernels.sh bookworm           one of bookworm, bookworm-backports
#   PCPD_PACKAGES="./nat" PCPD_RUN=TestMapUDP scripts/kernels.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin" DEBIAN_FRONTEND=noninteractive

suites=("$@")
[[ ${#suites[@]} -gt 0 ]] || suites=(bookworm bookworm-backports)
packages=${PCPD_PACKAGES:-./internal/nft ./internal/ct ./firewall ./nat ./netns_test}
run=${PCPD_RUN:-.}
# Of the daemon's tests those that send packets; emulated, all would take hours.
daemon=${PCPD_RUN:-TestNAT444|TestFirewall|TestFilter|TestRestart|TestForeignUntouched|TestForeignFlush|TestPool|TestWildcards|TestAddressChange}
work=$PWD/build/kernels
mkdir -p "$work"

scripts/setup.sh
for command in qemu-system-x86_64 busybox cpio depmod xz; do
	command -v "$command" >/dev/null && continue
	echo "kernels: installing QEMU and what builds a guest" >&2
	apt-get -qq update
	apt-get -qq install -y --no-install-recommends qemu-system-x86 busybox-static cpio kmod xz-utils >/dev/null
	break
done

# kernel SUITE: downloads the suite's cloud kernel into $work/SUITE.
kernel() {
	local dir=$work/$1 name options
	[[ ! -e $dir/version ]] || return 0
	mkdir -p "$dir/lists/partial" "$dir/root"
	echo "deb http://deb.debian.org/debian $1 main" >"$dir/list"
	options=(-qq -o "Dir::Etc::SourceList=$dir/list" -o Dir::Etc::SourceParts=/dev/null
		-o "Dir::State::Lists=$dir/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
	apt-get "${options[@]}" update
	name=$(apt-cache "${options[@]}" show linux-image-cloud-amd64 | grep -om1 'linux-image-[0-9][^ ,]*cloud-amd64')
	(cd "$dir" && apt-get "${options[@]}" -o APT::Sandbox::User=root download "$name")
	dpkg -x "$dir/$name"_*.deb "$dir/root"
	find "$dir/root/lib/modules" -name '*.ko.xz' -exec xz -d {} +
	depmod -b "$dir/root" "${name#linux-image-}"
	echo "${name#linux-image-}" >"$dir/version"
}

# guest SUITE: makes the initial file system of a guest that runs the tests.
guest() {
	local dir=$work/$1 root=$work/$1/guest version program
	version=$(cat "$dir/version")
	rm -rf "$root"
	mkdir -p "$root"/{bin,sbin,usr/bin,usr/sbin,proc,sys,dev,run,tmp,var/lib,etc,tests,lib/modules/"$version"/kernel}
	for program in bash nft conntrack ip sysctl sleep unshare nsenter ping tc getent; do
		program=$(command -v "$program") || continue
		cp -L "$program" "$root/usr/bin/"
		ldd "$program" 2>/dev/null | grep -o '/[^ ]*' | while read -r library; do
			mkdir -p "$root$(dirname "$library")"
			cp -Ln "$library" "$root$library"
		done
	done
	cp "$(command -v busybox)" "$root/bin/busybox"
	cp -r /usr/lib/x86_64-linux-gnu/xtables "$root/usr/lib/x86_64-linux-gnu/" 2>/dev/null || true
	echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
	echo 'root:x:0:' >"$root/etc/group"
	cp /etc/protocols /etc/services "$root/etc/" 2>/dev/null || true
	cp -r "$dir/root/lib/modules/$version/kernel/net" "$root/lib/modules/$version/kernel/"
	mkdir -p "$root/lib/modules/$version/kernel/drivers/net"
	cp "$dir/root/lib/modules/$version/kernel/drivers/net/veth.ko" "$root/lib/modules/$version/kernel/drivers/net/"
	(cd "$dir/root" && find "lib/modules/$version/kernel/lib" "lib/modules/$version/kernel/crypto" \
		-name '*.ko' -exec cp --parents -t "$root" {} +)
	depmod -b "$root" "$version" 2>/dev/null
	local package
	for package in $packages; do
		mkdir -p "$root/tests/$package"
		CGO_ENABLED=0 go test -c -o "$root/tests/$package/test" "$package"
		[[ ! -d $package/testdata ]] || cp -r "$package/testdata" "$root/tests/$package/"
	done
	CGO_ENABLED=0 go build -o "$root/usr/bin/" ./cmd/pcpd ./cmd/pcpctl
	cat >"$root/init" <<-END
		#!/bin/busybox sh
		/bin/busybox --install -s /bin
		export PATH=/usr/bin:/usr/sbin:/bin:/sbin HOME=/ PCPD_REQUIRE_NETNS=1 PCPD_PROGRAMS=/usr/bin
		mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
		mount -t tmpfs run /run; mount -t tmpfs tmp /tmp
		echo /bin/modprobe >/proc/sys/kernel/modprobe
		modprobe -a veth nf_tables nf_conntrack nf_conntrack_netlink nft_chain_nat nft_nat nft_ct nft_hash nft_numgen \\
			nft_reject_inet nft_limit nft_connlimit nft_log nfnetlink_log nft_masq nft_redir nft_compat xt_mark ip_tables nf_log_syslog bridge br_netfilter sctp 2>/dev/null
		ip link set lo up
		echo "guest: Linux \$(uname -r)"
		status=0
		for package in $packages; do
			run='$run'
			[ "\$package" != ./netns_test ] || run='$daemon'
			cd "/tests/\$package" && ./test -test.run "\$run" -test.timeout 30m -test.count ${PCPD_COUNT:-1} -test.v=${PCPD_VERBOSE:-false} || status=1
		done
		echo "guest: status \$status"
		poweroff -f
	END
	chmod +x "$root/init"
	(cd "$root" && find . | cpio -o -H newc --quiet | gzip -1) >"$dir/initrd.gz"
}

failed=()
for suite in "${suites[@]}"; do
	printf '\n== the kernel of %s\n' "$suite"
	kernel "$suite"
	guest "$suite"
	qemu-system-x86_64 -accel tcg,thread=multi -cpu max,cx16=off -smp "${PCPD_SMP:-2}" -m 3072 -nic none -nographic -no-reboot \
		-kernel "$work/$suite/root/boot/vmlinuz-$(cat "$work/$suite/version")" -initrd "$work/$suite/initrd.gz" \
		-append "console=ttyS0 panic=-1 quiet mitigations=off" </dev/null | tee "$work/$suite/log"
	grep -q '^guest: status 0' "$work/$suite/log" || failed+=("$suite")
done
if [[ ${#failed[@]} -gt 0 ]]; then
	printf '\nFAILED on the kernel of: %s\n' "${failed[*]}" >&2
	exit 1
fi
printf '\nEverything passed on the kernels of: %s\n' "${suites[*]}"
