#!/bin/bash
# tests/fs/fsx.c on coffer mounts: both profiles, every block size, side by side; afterwards the volumes are whole.
# fsx.sh [SECONDS [SEED]]
source "$(dirname "$0")/../docker/lib.sh"
seconds=${1:-50}
seed=${2:-$RANDOM}
fixture none

kinds=("general 4k" "general 16k" "database 8k")
pids=()
for i in "${!kinds[@]}"; do
    read -r profile block <<<"${kinds[i]}"
    mkdir "$T/mnt$i"
    coffer volume create "fsx$i" --size 1G --block "$block" --profile "$profile" --allow uid:0 >/dev/null || fail "volume create"
    coffer mount "fsx$i" "$T/mnt$i" >/dev/null || fail "mount"
    "$BUILD/tests/fs/fsx" "$T/mnt$i/f" --ops 0 --seconds "$seconds" --seed $((seed + i)) >"$T/out$i" 2>&1 &
    pids+=($!)
done
for i in "${!kinds[@]}"; do
    wait "${pids[i]}" || { cat "$T/out$i"; fail "${kinds[i]}"; }
    step "${kinds[i]}: $(tail -n 1 "$T/out$i")"
    coffer umount "$T/mnt$i" >/dev/null || fail "umount"
    coffer volume check "fsx$i" --data >"$T/out" || fail "volume check: $(head -n 3 "$T/out")"
done
