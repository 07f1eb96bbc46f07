#!/bin/bash
# What can end while the server of a mount is changed (coffer volume restart-server) is killed at every step of it, under load:
# the old server, the next one, cofferd, the agent. For whoever uses the mount that is a pause: no error, nothing lost, nothing
# done twice, the same mount; and no server is left over that nobody knows.
source "$(dirname "$0")/../docker/lib.sh"
fixture none
ROUNDS=${ROUNDS:-3}
coffer volume create t --size 512M --allow uid:0 >/dev/null
mkdir "$T/m"
coffer mount t "$T/m" >/dev/null || fail "mount"
dev=$(stat -c %d "$T/m")
gone() { ! kill -0 "$1" 2>/dev/null; }
servers() {
    local pid
    for pid in $(pgrep -f "^coffer-fs serve t( |\$)"); do
        if [ -n "$(find "/proc/$pid/fd" -lname "$T/*" -print -quit 2>/dev/null)" ]; then echo "$pid"; fi
    done
}
two() { [ "$(servers | wc -l)" = 2 ]; }
one() { [ "$(servers | wc -l)" = 1 ]; }
load() {
    rm -rf "${T:?}/m/load" && mkdir "$T/m/load"
    python3 "$(dirname "$0")/takeover.py" "$T/m/load" "$1" >"$T/out" 2>&1 &
    load=$!
}
loaded() {
    wait $load || fail "$1: $(cat "$T/out")"
    step "$1: $(cat "$T/out")"
    expect "$dev" "$(stat -c %d "$T/m")" "the mount is another one"
}
# The old one stands still, so that the change stands still in the midst.
midst() {
    old=$(servers)
    kill -STOP "$old"
    coffer volume restart-server t >"$T/change" 2>&1 &
    change=$!
    wait_for 10 two
    sleep 1 # the next one stands ready, the old one has its order
    cofferd=$(cofferd_pid)
}

step "cofferd is killed in the midst; the old server ends before there is a new cofferd"
load 8
midst
kill -9 "$cofferd"
wait_for 10 gone "$cofferd"
kill -CONT "$old"
wait_for 10 gone "$old"
wait $change && fail "restart-server did not notice"
cofferd_start
wait_for 10 one
loaded "the next one is found"

step "cofferd is killed in the midst; the old server ends afterwards"
load 8
midst
kill -9 "$cofferd"
wait_for 10 gone "$cofferd"
cofferd_start
kill -CONT "$old"
wait_for 10 gone "$old"
wait_for 10 one
loaded "another one is started"

step "each is killed at some moment, until the load ends"
agent_up() { coffer status --json | grep -q '"agent": *true'; }
unlocked() { coffer unlock --key-file "$T/key"; }
round() {
    local victim= all
    coffer volume restart-server t >"$T/change" 2>&1 &
    change=$!
    sleep "0.0$((RANDOM % 90 + 10))"
    case $1 in
    cofferd) victim=$(cofferd_pid) ;;
    agent) victim=$(agent_pid) ;;
    *)
        mapfile -t all < <(servers)
        # None is seen where one has just gone and the next one is not exec'd yet.
        if [ "$1" = old ] || [ ${#all[@]} = 0 ]; then victim=${all[0]:-}; else victim=${all[-1]}; fi
        ;;
    esac
    [ -z "$victim" ] || kill -9 "$victim" 2>/dev/null || true
    wait $change || true
    if [ "$1" = cofferd ]; then cofferd_start; fi
    if [ "$1" = agent ]; then
        wait_for 20 agent_up
        wait_for 20 unlocked
    fi
    wait_for 20 one
    sleep 3 # five deaths in ten seconds are given up
}
for who in old next cofferd agent; do
    load $((ROUNDS * 4))
    for ((i = 0; i < ROUNDS; i++)); do
        kill -0 $load 2>/dev/null || break
        round $who
    done
    loaded "$who: $i times"
done
coffer umount "$T/m" >/dev/null || fail "umount"
coffer volume check t --data >"$T/out" || fail "check: $(head -n 5 "$T/out")"
expect 0 "$(servers | wc -l)" "servers that are left over"
