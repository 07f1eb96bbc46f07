#!/bin/bash
# stress-ng's operations on files, each verifying what it did, and programs with fast timers (tests/fs/signals.c), on a volume
# of each profile, while their servers are killed every 5 s; afterwards the volumes are whole. stress.sh [SECONDS]
source "$(dirname "$0")/../docker/lib.sh"
seconds=${1:-40}
fixture none
stressors=(hdd iomix seek fallocate fpunch copy-file dir dirdeep dirmany dentry rename link symlink chmod chown xattr mknod
    utime filename flock lockf)
args=()
for s in "${stressors[@]}"; do args+=("--$s" 1); done

pids=() names=()
# background NAME COMMAND...
background() {
    local name=$1
    shift
    "$@" >"$T/out-$name" 2>&1 &
    pids+=($!) names+=("$name")
}
for profile in general database; do
    mkdir "$T/$profile"
    coffer volume create "$profile" --size 2G --profile "$profile" --allow uid:0 >/dev/null || fail "volume create"
    coffer mount "$profile" "$T/$profile" >/dev/null || fail "mount"
    mkdir "$T/$profile/stress" "$T/$profile/signals"
    background "$profile-stress" stress-ng --temp-path "$T/$profile/stress" --timeout "${seconds}s" --verify --no-rand-seed \
        --hdd-bytes 16M --iomix-bytes 16M --seek-size 16M --fallocate-bytes 32M --copy-file-bytes 128M --filename-opts posix \
        --metrics-brief "${args[@]}"
    for k in 1 2 3 4 5 6; do background "$profile-signals-$k" "$BUILD/tests/fs/signals" "$T/$profile/signals" "$seconds"; done
done
kills=0
end=$((SECONDS + seconds - 5))
while sleep 5 && [ $SECONDS -lt $end ]; do
    for profile in general database; do
        pid=$(server_pid "$profile")
        [ -n "$pid" ] && kill -9 "$pid" && kills=$((kills + 1))
    done
done
for i in "${!pids[@]}"; do
    wait "${pids[i]}" || { tail -n 30 "$T/out-${names[i]}"; fail "${names[i]}"; }
    case ${names[i]} in
    *-signals-1) step "${names[i]%-*}: $(tail -n 1 "$T/out-${names[i]}")" ;;
    *-stress) grep -E ' (hdd|dir|rename|filename) ' "$T/out-${names[i]}" | grep metr || true ;;
    esac
done
step "$kills servers killed"
[ $kills -ge 4 ] || fail "only $kills servers were killed"
for profile in general database; do
    coffer umount "$T/$profile" >/dev/null || fail "umount"
    coffer volume check "$profile" --data >"$T/out" || fail "volume check: $(head -n 3 "$T/out")"
done
