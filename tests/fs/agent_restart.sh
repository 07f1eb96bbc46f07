#!/bin/bash
# The agent is killed, and coffer-fs too, in every order, under a process that works with what it has open. Grants end with the
# agent; the next one, once it is unlocked, decides anew upon threads that were given them, and the handles go on. A server that
# takes over waits for the unlocking, but not longer than --takeover-timeout: then there is an error, not a hang.
source "$(dirname "$0")/../docker/lib.sh"
fixture none
coffer volume create t --size 512M --allow uid:0 >/dev/null
mkdir "$T/m"
coffer mount t "$T/m" >/dev/null || fail "mount"
gone() { ! kill -0 "$1" 2>/dev/null; }
kill_now() {
    kill -9 "$@"
    for p in "$@"; do wait_for 10 gone "$p"; done
}
unlocked() { coffer unlock --key-file "$T/key"; }
next() { local now; now=$(server_pid t); [ -n "$now" ] && [ "$now" != "$pid" ]; }
agent_up() { local now; now=$(agent_pid); [ -n "$now" ] && [ "$now" != "$agent" ] && coffer status --json | grep -q '"agent": *true'; }

work_start() {
    rm -f "$T/stop" "$T/out"
    python3 "$(dirname "$0")/held.py" "$T/m" "$T/stop" >"$T/out" 2>&1 &
    work=$!
    ready() { grep -q ready "$T/out"; }
    wait_for 10 ready
    sleep 0.5
    pid=$(server_pid t)
    agent=$(agent_pid)
}
work_end() {
    sleep 1
    touch "$T/stop"
    wait $work || fail "$(tail -n 1 "$T/out")"
    step "$(tail -n 1 "$T/out")"
}

step "the agent, unlock, the server"
work_start
kill_now "$agent"
wait_for 20 agent_up
sleep 1
wait_for 30 unlocked
sleep 0.5
kill_now "$pid"
wait_for 20 next
work_end
audited '"event":"renew"'

step "the agent, the server, unlock 3 s later"
work_start
kill_now "$agent"
wait_for 20 agent_up
kill_now "$pid"
wait_for 20 next
sleep 3
wait_for 30 unlocked
work_end

step "both at once, unlock"
work_start
kill_now "$agent" "$pid"
wait_for 20 agent_up
wait_for 30 unlocked
wait_for 20 next
work_end

step "the server is changed, then the agent, unlock, the server"
work_start
coffer volume restart-server t >/dev/null || fail "restart-server"
pid=$(server_pid t)
kill_now "$agent"
wait_for 20 agent_up
wait_for 30 unlocked
sleep 0.5
kill_now "$pid"
wait_for 20 next
work_end

step "the agent twice, and the server twice after that"
work_start
for i in 1 2; do
    kill_now "$agent"
    wait_for 20 agent_up
    wait_for 30 unlocked
    agent=$(agent_pid)
    sleep 0.5
done
for i in 1 2; do
    kill_now "$pid"
    wait_for 20 next
    pid=$(server_pid t)
    sleep 0.5
done
work_end

step "what was taken back is not given again: a rule that denies, then both die"
work_start
coffer policy deny t uid:0 >/dev/null || fail "policy deny"
broken_off() { gone $work; }
wait_for 10 broken_off
wait $work && fail "no error after a rule denies"
grep -q 'round.*Key has been revoked' "$T/out" || fail "after a rule denies: $(tail -n 1 "$T/out")"
coffer policy remove t deny uid:0 >/dev/null || fail "policy remove"
work_start
kill_now "$agent"
wait_for 20 agent_up
wait_for 30 unlocked
coffer policy deny t uid:0 >/dev/null || fail "policy deny"
kill_now "$pid"
wait_for 20 next
wait $work && fail "no error after a rule denies what the new agent has not given"
coffer policy remove t deny uid:0 >/dev/null || fail "policy remove"

step "nobody unlocks: an error after the time that is given for a takeover"
coffer umount "$T/m" >/dev/null || fail "umount"
kill "$(cofferd_pid)"
ended() { [ -z "$(cofferd_pid)" ]; }
wait_for 10 ended
(setsid bash -c "exec -a cofferd '$BUILD/cofferd' --root '$T/c' --takeover-timeout 4" >>"$T/c/cofferd.log" 2>&1 </dev/null &)
up() { coffer status; }
wait_for 10 up
wait_for 10 unlocked
coffer mount t "$T/m" >/dev/null || fail "mount"
head -c 100000 /dev/zero >"$T/m/read"
exec 7<"$T/m/read"
cat "$T/m/read" >/dev/null
cached() { python3 "$(dirname "$0")/cached.py" 7 100000; }
expect 25 "$(cached)" "pages in the cache"
work_start
for agent in $(pgrep -f '^coffer-keyd '); do # not this cofferd's child
    if [ -n "$(find "/proc/$agent/fd" -lname "$T/*" -print -quit 2>/dev/null)" ]; then break; fi
done
kill_now "$agent" "$pid"
start=$SECONDS
status=0
wait $work || status=$?
expect 1 $status "work on a volume whose key is gone"
step "$(tail -n 1 "$T/out") after $((SECONDS - start)) s"
[ $((SECONDS - start)) -lt 12 ] || fail "that took too long"
none() { [ "$(cached)" = 0 ]; }
wait_for 5 none # of a volume that has no key any more
exec 7<&-
up() { coffer status --json | grep -q '"agent": *true'; }
wait_for 20 up
wait_for 30 unlocked
usable() { [ "$(cat "$T/m/named")" = named ]; }
wait_for 10 usable
coffer umount "$T/m" >/dev/null || fail "umount"
coffer volume check t --data >"$T/out" || fail "check at the end: $(head -n 5 "$T/out")"
