#!/bin/bash
# tests/fs/posix.c on a coffer mount: with the profile general (writeback cache), then with database (write-through) and
# 16 KiB blocks; afterwards `coffer volume check` is clean. Arguments are passed on: posix.sh [--long] [GROUP]...
source "$(dirname "$0")/../docker/lib.sh"
fixture none

# What this version does not do (README, State). It must say so, which is looked at below.
missing=(whiteout)
args=("$@")
for g in "${missing[@]}"; do args+=(--except "$g"); done

# Whom posix becomes; the mount decides by the caller's real uid.
rules=()
for uid in 0 65534 65533 1234; do rules+=(--allow "uid:$uid"); done
mkdir "$T/mnt"
failed=
for kind in "general 4k" "database 16k"; do
    read -r profile block <<<"$kind"
    coffer volume create "$profile" --size 4G --block "$block" --profile "$profile" "${rules[@]}" >/dev/null || fail "volume create"
    coffer mount "$profile" "$T/mnt" >/dev/null || fail "mount"
    step "profile $profile, blocks of $block; not in this version: ${missing[*]}"
    "$BUILD/tests/fs/posix" "$T/mnt" "${args[@]}" || failed=1
    server_pid "$profile" | grep -q . || fail "coffer-fs died"
    [ -z "$(ls -A "$T/mnt")" ] || fail "something is left: $(ls -A "$T/mnt")"
    python3 - "$T/mnt" <<'PY' || fail "what is not done in this version is not refused as it should be"
import ctypes, errno, os, sys
os.chdir(sys.argv[1])
open("f", "w").close()
libc = ctypes.CDLL(None, use_errno=True)
assert libc.renameat2(-100, b"f", -100, b"g", 4) < 0 and ctypes.get_errno() == errno.EINVAL, "RENAME_WHITEOUT"
assert os.listdir(".") == ["f"]
os.unlink("f")
PY
    coffer umount "$T/mnt" >/dev/null || fail "umount"
    coffer volume check "$profile" --data >"$T/out" || fail "volume check: $(head -n 3 "$T/out")"
done
[ -z "$failed" ] || fail "checks of posix failed"
