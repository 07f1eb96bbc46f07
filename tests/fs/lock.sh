#!/bin/bash
# A mount that is locked and unlocked under load (tests/fs/lockstress.c): every lock is done in a bounded time, nothing that
# fsync acknowledged is lost, and the volume is whole afterwards. lock.sh [SECONDS]
source "$(dirname "$0")/../docker/lib.sh"
seconds=${1:-20}
fixture none
mkdir "$T/mnt"

# now: milliseconds
now() { echo $(($(date +%s%N) / 1000000)); }

for profile in general database; do
    coffer volume create "$profile" --size 2G --profile "$profile" --allow uid:0 >/dev/null || fail "volume create"
    coffer mount "$profile" "$T/mnt" >/dev/null || fail "mount"
    "$BUILD/tests/fs/lockstress" "$T/mnt" "$seconds" >"$T/out" &
    load=$!
    end=$((SECONDS + seconds - 4)) times=()
    while [ $SECONDS -lt $end ]; do
        sleep "0.$((RANDOM % 10))"
        start=$(now)
        coffer lock >/dev/null || fail "lock"
        times+=($(($(now) - start)))
        expect false "$(coffer status --json | grep -o '"unlocked": *[a-z]*' | head -n 1 | grep -o '[a-z]*$')" "unlocked"
        ls "$T/mnt" >/dev/null 2>&1 && fail "a locked volume is listed"
        coffer unlock --key-file "$T/key" >/dev/null || fail "unlock"
    done
    wait $load || fail "$profile: $(tail -n 5 "$T/out")"
    mapfile -t times < <(printf '%s\n' "${times[@]}" | sort -n)
    step "$profile: ${#times[@]} locks, median ${times[${#times[@]} / 2]} ms, longest ${times[-1]} ms; $(tail -n 1 "$T/out")"
    [ "${times[-1]}" -lt 5000 ] || fail "a lock took ${times[-1]} ms"
    coffer umount "$T/mnt" >/dev/null || fail "umount"
    coffer volume check "$profile" --data >"$T/out" || fail "volume check: $(head -n 3 "$T/out")"
done
