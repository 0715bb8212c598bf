#!/usr/bin/env bash
# Checks the Vagrantfile with vagrant itself, which it installs on Debian when
# it is missing (about 70 packages, so this is not part of `make test`). No
# box is fetched and no machine is started.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v vagrant >/dev/null; then
	if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
		echo "vagrant-validate: vagrant is missing; on Debian: sudo apt-get install vagrant vagrant-libvirt" >&2
		exit 1
	fi
	export DEBIAN_FRONTEND=noninteractive
	apt-get -qq update >/dev/null || true
	apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends vagrant vagrant-libvirt >/dev/null
fi

home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
# The file provisioner's sources are the built binaries; vagrant wants to see them.
[[ -e bin/pcpd && -e bin/pcpctl ]] || make -s build
VAGRANT_HOME=$home VAGRANT_CHECKPOINT_DISABLE=1 VAGRANT_DOTFILE_PATH=$home/dot vagrant validate
bash -n scripts/provision.sh
echo "The Vagrantfile is valid."
