#!/bin/bash
# overlayfs whose upper and work directories lie on a coffer volume: copy-up, whiteouts, opaque directories, renames, also
# after a new mount; then a container engine whose whole data root is on one.
source "$(dirname "$0")/../docker/lib.sh"
fixture none

test_cleanup() { umount "$T/merged" 2>/dev/null; }

mkdir "$T/v" "$T/lower" "$T/merged"
mkdir -p "$T/lower/dir/sub" "$T/lower/gone"
echo lower >"$T/lower/file"
echo lower >"$T/lower/dir/a"
echo lower >"$T/lower/dir/sub/b"
echo lower >"$T/lower/gone/c"
ln "$T/lower/file" "$T/lower/hard"
setfattr -n user.k -v value "$T/lower/file"

overlay() {
    mount -t overlay overlay -o "lowerdir=$T/lower,upperdir=$T/v/upper,workdir=$T/v/work${1:-}" "$T/merged" || fail "mount -t overlay: $(dmesg | tail -n 3)"
}

look() {
    expect "lower
upper" "$(cat "$T/merged/file")" "a file copied up"
    expect value "$(getfattr --only-values -n user.k "$T/merged/file" 2>/dev/null)" "its attribute"
    [ ! -e "$T/merged/dir/a" ] || fail "a removed file is there"
    [ -c "$T/v/upper/dir/a" ] || fail "no whiteout for it"
    expect "new" "$(ls "$T/merged/gone")" "a directory made anew"
    expect y "$(getfattr --only-values -n trusted.overlay.opaque "$T/v/upper/gone" 2>/dev/null)" "opaque"
    expect lower "$(cat "$T/merged/dir/sub2")" "a renamed file"
    [ ! -e "$T/merged/dir/sub/b" ] || fail "its old name is there"
    expect "first second" "$(cat "$T/merged/x" "$T/merged/y" | tr '\n' ' ' | sed 's/ $//')" "exchanged files"
}

step "overlayfs"
coffer volume create over --size 512M --allow uid:0 >/dev/null
coffer mount over "$T/v" >/dev/null || fail "mount"
mkdir "$T/v/upper" "$T/v/work"
overlay
dmesg | tail -n 20 | grep -iE 'overlayfs: upper fs (does not support|needs)' && fail "overlayfs goes on with less"
echo upper >>"$T/merged/file"
rm "$T/merged/dir/a"
rm -r "$T/merged/gone"
mkdir "$T/merged/gone"
touch "$T/merged/gone/new"
mv "$T/merged/dir/sub/b" "$T/merged/dir/sub2" # renames with a whiteout
echo second >"$T/merged/x"
echo first >"$T/merged/y"
python3 - "$T/merged" <<'PY' || fail "rename or O_TMPFILE in the overlay"
import ctypes, os, sys
os.chdir(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
assert libc.renameat2(-100, b"x", -100, b"y", 2) == 0, os.strerror(ctypes.get_errno())
fd = os.open(".", os.O_TMPFILE | os.O_RDWR)
os.write(fd, b"tmp")
assert libc.linkat(-100, b"/proc/self/fd/%d" % fd, -100, b"tmpfile", 0x400) == 0, os.strerror(ctypes.get_errno())
assert open("tmpfile").read() == "tmp"
PY
look
umount "$T/merged"
coffer umount "$T/v" >/dev/null || fail "umount"
coffer volume check over --data >"$T/out" || fail "volume check: $(head -n 3 "$T/out")"
coffer mount over "$T/v" >/dev/null || fail "mount"
mkdir "$T/v/work2"
overlay 2
look
umount "$T/merged"
coffer umount "$T/v" >/dev/null || fail "umount"

step "an engine on a volume"
mkdir -p "$T/engine/root"
# What runs in the container is not of uid 0 outside all containers: a container reads its own root from the volume.
coffer volume create engine --size 2G --allow uid:0 --allow container:one >/dev/null
coffer mount engine "$T/engine/root" >/dev/null || fail "mount"
engine_start "$T/engine" || fail "dockerd did not start: $(tail -n 3 "$T/engine/dockerd.log")"
step "its storage driver: $(docker info --format '{{.Driver}}' 2>/dev/null)"
rootfs_base "$T/image"
image_import "$T/image" coffer-test || fail "docker import"
expect "made inside" "$(run one coffer-test sh -c 'echo made inside >/etc/file && mv /etc/file /etc/file2 && rm -r /tmp && mkdir /tmp && cat /etc/file2')" "a container on it"
