# Sourced by demo.sh and run.sh, in the project's directory: installs what is missing.
#   prepare SYSTEM EXTRAS
# SYSTEM is what beside Python is installed (as root, with apt-get): "lab", "tests" (the lab, and what the tests compare
# with) or "nothing"; EXTRAS are netweaver's, or empty.
# Afterwards .venv/bin/python has netweaver's dependencies.

prepare() {
    packages=
    python3 -c 'import ensurepip, venv' 2>/dev/null || packages="python3 python3-venv"
    if [ "$1" != nothing ]; then
        command -v ip >/dev/null || packages="$packages iproute2"
        command -v tcpdump >/dev/null || [ -x /usr/sbin/tcpdump ] || packages="$packages tcpdump"
        command -v hping3 >/dev/null || [ -x /usr/sbin/hping3 ] || packages="$packages hping3"
        command -v ping >/dev/null || packages="$packages iputils-ping"
        [ -x /usr/sbin/sshd ] && command -v ssh-keygen >/dev/null || packages="$packages openssh-server openssh-client"
    fi
    if [ "$1" = tests ]; then
        command -v sudo >/dev/null || packages="$packages sudo"
        command -v iperf3 >/dev/null || packages="$packages iperf3"
        command -v mmdebstrap >/dev/null || packages="$packages mmdebstrap busybox-static cpio kmod e2fsprogs"
        command -v qemu-system-x86_64 >/dev/null || packages="$packages qemu-system-x86 ipxe-qemu"
        command -v ovs-vswitchd >/dev/null || packages="$packages openvswitch-switch"
        [ -x /usr/sbin/libvirtd ] && command -v virsh >/dev/null || packages="$packages libvirt-daemon-system
            libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients"
        command -v tshark >/dev/null || packages="$packages tshark"
        command -v nft >/dev/null || [ -x /usr/sbin/nft ] || packages="$packages nftables"
        command -v tcsh >/dev/null || packages="$packages tcsh"
        command -v fish >/dev/null || packages="$packages fish"
        command -v editcap >/dev/null || packages="$packages wireshark-common"
        command -v prometheus-node-exporter >/dev/null || packages="$packages prometheus-node-exporter"
    fi
    if [ -n "$packages" ]; then
        if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
            echo "netweaver: error: please install:$packages" >&2
            return 1
        fi
        echo "Installing: $packages" >&2
        (
            # The lab starts the sshd that it needs; the machine itself gets no new service.
            if [ ! -e /usr/sbin/policy-rc.d ]; then
                trap 'rm -f /usr/sbin/policy-rc.d' EXIT
                printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
                chmod 755 /usr/sbin/policy-rc.d
            fi
            export DEBIAN_FRONTEND=noninteractive
            apt-get -qq update && apt-get -qq install -y --no-install-recommends $packages
        ) >&2 || return 1
    fi
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "netweaver: error: Python 3.10 or later is needed, and python3 is $(python3 --version)" >&2
        return 1
    }
    [ -x .venv/bin/python ] || python3 -m venv .venv >&2 || return 1
    wanted="$2 $(cksum <pyproject.toml)"
    if [ "$(cat .venv/prepared 2>/dev/null)" != "$wanted" ]; then
        .venv/bin/python -m pip install -q --disable-pip-version-check -e ".${2:+[$2]}" >&2 || return 1
        echo "$wanted" >.venv/prepared
    fi
}
