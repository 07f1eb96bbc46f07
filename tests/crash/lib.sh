# lib.sh - a volume on a disk whose power can be cut, for the tests of databases: lossyfs below, the real coffer-fs on it.
# Sourced by bash scripts. Root.
# shellcheck shell=bash
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib.sh"

step() { printf '   %s\n' "$*"; }
fail() {
    printf 'FAILED: %s\n' "$*"
    exit 1
}

# control PATTERN COMMAND...: the command, on a disk that lies about flushes (lossyfs --lie), must fail with a line that matches:
# what it looks for would be found.
control() {
    local pattern=$1 out
    shift
    out=$(LIE=400 "$@" 2>&1) && fail "the disk lies, and nothing was missed: $out"
    grep -qE "^FAILED: .*($pattern)" <<<"$out" || fail "on a disk that lies: $out"
    step "on a disk that lies: $(grep -m 1 "^FAILED: " <<<"$out" | cut -d " " -f 2-)"
    exit 0
}

# power_fixture USER: the directory T, taken away at the end with all that runs in it.
power_fixture() {
    T=$(mktemp -d /tmp/coffer-test.XXXXXX)
    chmod 755 "$T"
    mkdir "$T/disk" "$T/volume" "$T/mnt"
    cd "$T" # the databases' users may be there
    database='' lossy='' mount_pid=''
    trap power_end EXIT
    trap 'exit 1' TERM INT
}

power_end() {
    local status=$?
    set +e
    [ -z "$database" ] || kill_session "$database"
    [ -z "$mount_pid" ] || kill -9 "$mount_pid" 2>/dev/null
    [ -z "$lossy" ] || kill -9 "$lossy" 2>/dev/null
    unmount_below "$T"
    if [ $status = 0 ] || [ -z "${KEEP:-}" ]; then rm -rf "$T"; else echo "kept: $T"; fi
    exit $status
}

# own_session COMMAND...: starts it in a session of its own; its number is $!.
own_session() {
    setsid "$@" </dev/null &
    disown
}

# Kills a session's processes, and waits until they are gone.
kill_session() {
    pkill -KILL -s "$1" 2>/dev/null || true
    for _ in $(seq 100); do
        pgrep -s "$1" >/dev/null || return 0
        sleep 0.1
    done
}

# wait_gone PID: one that was told to end.
wait_gone() {
    for _ in $(seq 600); do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 0.1
    done
    fail "process $1 does not end"
}

random_seconds() { awk -v m="$1" -v s="$RANDOM$RANDOM" 'BEGIN {srand(s); printf "%.2f", 0.5 + rand() * (m - 0.5)}'; }

# The line "mounted" in a file, from a process.
wait_mounted() {
    for _ in $(seq 300); do
        if grep -q mounted "$2" 2>/dev/null; then return 0; fi
        kill -0 "$1" 2>/dev/null || break
        sleep 0.1
    done
    fail "not mounted: $(cat "$2" "$2.err" 2>/dev/null)"
}

# power_on [MOUNTVOL OPTION...]: the disk, and the volume on it at T/mnt. Damage that it reports is a failure.
power_on() {
    rm -f "$T/lossy.out" "$T/mount.out"
    "$BUILD/tests/crash/lossyfs" "$T/disk" "$T/volume" --sync-us $((500 + RANDOM % 12000)) --lie "${LIE:-0}" >"$T/lossy.out" 2>"$T/lossy.out.err" &
    lossy=$!
    wait_mounted $lossy "$T/lossy.out"
    mkfifo "$T/orders.$lossy"
    "$BUILD/tests/fs/mountvol" "$T/volume" "$T/mnt" --key "$T/key" --database "$@" \
        <>"$T/orders.$lossy" >"$T/mount.out" 2>"$T/mount.out.err" &
    mount_pid=$!
    wait_mounted $mount_pid "$T/mount.out"
    stat "$T/mnt/." >/dev/null || fail "the volume does not open: $(cat "$T/mount.out.err")"
    [ ! -s "$T/mount.out.err" ] || fail "the volume opens with complaints: $(cat "$T/mount.out.err")"
}

# The power goes. What is left of the disk is in T/disk, a line about it in T/cut.
power_cut() {
    kill -USR1 "$lossy"
    wait "$lossy" 2>/dev/null || true
    lossy=''
    tail -n 1 "$T/lossy.out" >"$T/cut"
    grep -q ^cut: "$T/cut" || fail "the cut: $(cat "$T/lossy.out" "$T/lossy.out.err")"
}

# What was in memory is gone.
power_off() {
    pkill -KILL -P "$mount_pid" 2>/dev/null || true
    wait "$mount_pid" 2>/dev/null || true
    mount_pid=''
    unmount_below "$T"
}

# The check of the volume, with all content. Unmounts.
volume_clean() {
    echo check >"$T/orders.$lossy"
    for _ in $(seq 600); do
        if tail -n 1 "$T/mount.out" | grep -q '^-\?[0-9]\+$' || ! kill -0 "$mount_pid" 2>/dev/null; then break; fi
        sleep 0.1
    done
    [ "$(tail -n 1 "$T/mount.out")" = 0 ] || fail "check: $(tail -n 5 "$T/mount.out" "$T/mount.out.err")"
    kill "$mount_pid"
    wait "$mount_pid" 2>/dev/null || true
    mount_pid=''
    kill "$lossy"
    wait "$lossy" 2>/dev/null || true
    lossy=''
}
