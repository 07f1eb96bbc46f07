#!/bin/bash
# tests/fs/posix.c on a coffer mount: with the profile general (writeback cache), then with database (write-through) and
# 16 KiB blocks; afterwards `coffer volume check` is clean. Arguments are passed on: posix.sh [--long] [GROUP]...
source "$(dirname "$0")/../docker/lib.sh"
fixture none

# Whom posix becomes; the mount decides by the caller's real uid.
rules=()
for uid in 0 65534 65533 1234; do rules+=(--allow "uid:$uid"); done
mkdir "$T/mnt"
failed=
for kind in "general 4k" "database 16k"; do
    read -r profile block <<<"$kind"
    coffer volume create "$profile" --size 4G --block "$block" --profile "$profile" "${rules[@]}" >/dev/null || fail "volume create"
    coffer mount "$profile" "$T/mnt" >/dev/null || fail "mount"
    step "profile $profile, blocks of $block"
    "$BUILD/tests/fs/posix" "$T/mnt" "$@" || failed=1
    server_pid "$profile" | grep -q . || fail "coffer-fs died"
    [ -z "$(ls -A "$T/mnt")" ] || fail "something is left: $(ls -A "$T/mnt")"
    coffer umount "$T/mnt" >/dev/null || fail "umount"
    coffer volume check "$profile" --data >"$T/out" || fail "volume check: $(head -n 3 "$T/out")"
done
[ -z "$failed" ] || fail "checks of posix failed"
