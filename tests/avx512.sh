#!/usr/bin/env bash
# Runs the codecs' tests on an emulated processor that has AVX-512: tests/avx512.sh TESTS, a static binary of `cargo test`.
# Boots a Linux kernel of this machine in Bochs, with the binary and a shell as all its files; fails where a test does.
set -euo pipefail
tests=$(realpath "${1:?expected the path of a static test binary}")
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT

mkdir -p root/dev root/proc root/tmp iso
cp "$tests" root/tests
cp "$(command -v busybox)" root/busybox
strip root/tests
# Bochs rounds ties wrong in vcvtps2ph, so each path is compared with the one before it, which shares that.
cat >root/init <<'END'
#!/busybox sh
/busybox mount -t devtmpfs dev /dev && /busybox mount -t proc proc /proc
STRATAKV_CODEC_ISA=avx512 /tests --test-threads=1 codec --skip within_half_a_step && echo "all is well"
/busybox sleep 1
/busybox reboot -f
END
chmod +x root/init
(cd root && find . | cpio --quiet -o -H newc | gzip -1 >../iso/initrd)
# Wide registers: without what guards against flaws of real processors, and without xsaves and xsavec, whose sizes differ in Bochs.
kernels=(/boot/vmlinuz-*)
cp "${kernels[-1]}" iso/linux
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 iso
echo 'DEFAULT linux initrd=initrd console=ttyS0 quiet panic=-1 reboot=t,force random.trust_cpu=on mitigations=off noxsaves clearcpuid=xsavec' >iso/isolinux.cfg
xorriso -as mkisofs -quiet -o boot.iso -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table iso \
  2>xorriso.log || { cat xorriso.log && exit 1; }

cat >bochsrc <<'END'
config_interface: textconfig
display_library: term
cpu: model=corei7_skylake_x, ips=100000000, reset_on_triple_fault=0
memory: guest=1024, host=1024
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=console
log: bochs.log
panic: action=fatal
END
printf 'continue\nquit\n' >commands
# It draws a screen: it wants a terminal.
TERM=xterm timeout 1200 script -qec 'bochs -q -f bochsrc -rc commands' /dev/null </dev/null >screen 2>&1 || true
cat console 2>/dev/null || cat screen
grep -q '^all is well' console
