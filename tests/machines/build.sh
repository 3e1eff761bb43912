#!/bin/sh
# Builds what the labs with a real hypervisor boot: Xen, a Debian dom0 for it, and a guest made of busybox.
#
#   sh build.sh DIRECTORY
#
# That takes root, a Debian with its package archive, mmdebstrap, busybox-static, cpio, kmod and e2fsprogs, a minute
# and half a gigabyte.  In the directory are then: xen, the kernel (vmlinuz, and vmlinux, for which Xen needn't take the
# time to decompress it), dom0.initrd and dom0.disk, guest.initrd, and an SSH key that dom0 knows.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "$1"
depends() { apt-cache depends "$1" | sed -n "s/^ *Depends: \($2[^ ]*\)$/\1/p" | head -n 1; }

# The packages whose files are taken apart; apt's own user downloads them.
mkdir debs && chmod 777 debs
hypervisor=$(depends xen-system-amd64 xen-hypervisor-)
(cd debs && apt-get -qq download "$hypervisor" "$(depends linux-image-amd64 linux-image-)")
for deb in debs/*.deb; do dpkg -x "$deb" boot; done
gunzip -c boot/boot/xen-*-amd64.gz >xen
cp boot/boot/vmlinuz-* vmlinuz
python3 -c 'import lzma, sys
image = sys.stdin.buffer.read()
sys.stdout.buffer.write(lzma.LZMADecompressor().decompress(image[image.index(b"\xfd7zXZ\0"):]))' <vmlinuz >vmlinux
kernel=$(ls boot/lib/modules)

# dom0: its root file system, in which only the kernel modules are that it needs.
ssh-keygen -q -t ed25519 -N '' -C lab -f key
sources=$(ls /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources 2>/dev/null || :)
utilities=xen-utils-$(echo "$hypervisor" | sed 's/xen-hypervisor-\([0-9.]*\)-.*/\1/')
include=openssh-server,$utilities,xen-utils-common,tcpdump,iproute2,bridge-utils,ethtool,kmod,procps,mount,busybox-static
# shellcheck disable=SC2086
mmdebstrap --variant=apt --mode=root --quiet --include="$include,openvswitch-switch,iputils-ping,python3-minimal" \
    --aptopt='APT::Install-Recommends "false"' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    "$(. /etc/os-release && echo "$VERSION_CODENAME")" dom0 $sources
modules=dom0/lib/modules/$kernel
for part in net drivers/net drivers/xen drivers/block drivers/virtio fs/ext4 fs/jbd2 fs/mbcache.ko lib crypto \
    arch/x86/crypto; do
    mkdir -p "$(dirname "$modules/kernel/$part")"
    cp -r "boot/lib/modules/$kernel/kernel/$part" "$modules/kernel/$part"
done
find "$modules/kernel/drivers/net/ethernet" -mindepth 1 -maxdepth 1 ! -name intel -exec rm -rf {} +
rm -rf "$modules/kernel/drivers/net/wireless" "$modules/kernel/net/mac80211" "$modules/kernel/net/wireless"
cp "boot/lib/modules/$kernel"/modules.builtin* "boot/lib/modules/$kernel/modules.order" "$modules/"
depmod -b dom0 "$kernel"
install -D -m 600 key.pub dom0/root/.ssh/authorized_keys
install -m 755 "$here/dom0.rc" dom0/etc/rc.dom0
install -m 755 "$here/xe" dom0/usr/bin/xe
chroot dom0 ovsdb-tool create /etc/openvswitch/conf.db
ln -sf /bin/busybox dom0/sbin/init
printf '::sysinit:/etc/rc.dom0\n::ctrlaltdel:/bin/busybox poweroff -f\n' >dom0/etc/inittab
echo dom0 >dom0/etc/hostname
echo '127.0.0.1 localhost dom0' >dom0/etc/hosts
rm -rf dom0/var/cache/apt/archives/*.deb dom0/var/lib/apt/lists/*

# initrd NAME MODULE...: busybox, the script NAME.init, and the modules with what they need.
initrd() {
    name=$1
    shift
    for directory in bin dev proc sys root modules; do mkdir -p "$name.files/$directory"; done
    cp /bin/busybox "$name.files/bin/"
    install -m 755 "$here/$name.init" "$name.files/init"
    for module in "$@"; do modprobe -d "$PWD/dom0" -S "$kernel" --show-depends "$module"; done |
        awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | { n=100; while read -r file; do
            n=$((n + 1))
            cp "$file" "$name.files/modules/$n-${file##*/}"
        done; }
    (cd "$name.files" && find . | cpio -o -H newc --quiet | gzip -1) >"$name.initrd"
}
initrd dom0 virtio_blk virtio_pci ext4
initrd guest xen-netfront virtio_pci virtio_net e1000

mkdir -p dom0/guest
cp vmlinux guest.initrd dom0/guest/
truncate -s 1200M dom0.disk
mke2fs -q -t ext4 -O ^has_journal -E lazy_itable_init=1 -d dom0 dom0.disk
rm -rf debs boot dom0 dom0.files guest.files
