#!/bin/bash
# coffer-fs is killed in the middle of a write load, several times: the load goes on (tests/fs/takeover.sh looks closer); after a
# new mount nothing that fsync acknowledged is lost, nothing is torn, and `coffer volume check` is clean. Then the same to the agent
# and to cofferd.
source "$(dirname "$0")/lib.sh"
fixture none
here=$(dirname "$0")

vol=kill${DRIVER##*-}
coffer volume create "$vol" --size 2G --allow uid:0 >/dev/null
mkdir "$T/mnt"
acks=()
for round in 1 2 3 4 5; do
    coffer mount "$vol" "$T/mnt" >/dev/null || fail "mount, round $round"
    for a in "${acks[@]}"; do python3 "$here/writer.py" check "$T/mnt" "$a" >"$T/out" || fail "after round $((round - 1)): $(cat "$T/out")"; done
    acks+=("$T/acks$round")
    python3 "$here/writer.py" write "$T/mnt" "$T/acks$round" 12 2>/dev/null &
    writer=$!
    lines() { [ "$(wc -l <"$T/acks$round")" -gt 300 ]; }
    wait_for 60 lines
    sleep "1.$RANDOM"
    pid=$(server_pid "$vol")
    [ -n "$pid" ] || fail "no coffer-fs serves $vol"
    kill -9 "$pid"
    lines=$(wc -l <"$T/acks$round")
    goes_on() { [ "$(wc -l <"$T/acks$round")" -gt $((lines + 300)) ]; }
    wait_for 30 goes_on
    wait $writer || fail "the writer, round $round"
    coffer umount "$T/mnt" >/dev/null || fail "umount, round $round"
    coffer volume check "$vol" >"$T/out" || fail "volume check after round $round: $(head -n 5 "$T/out")"
done
coffer mount "$vol" "$T/mnt" >/dev/null
for a in "${acks[@]}"; do
    python3 "$here/writer.py" check "$T/mnt" "$a" >"$T/out" || fail "at the end: $(cat "$T/out")"
    step "$(tail -n 1 "$T/out")"
done

step "kill -9 of the agent under load"
python3 "$here/writer.py" write "$T/mnt" "$T/acks-agent" 12 2>/dev/null &
writer=$!
sleep 2
kill -9 "$(agent_pid)"
unlocked() { coffer unlock --key-file "$T/key"; }
wait_for 30 unlocked
wait $writer || true
usable() { ls "$T/mnt"; }
wait_for 20 usable
python3 "$here/writer.py" check "$T/mnt" "$T/acks-agent" >"$T/out" || fail "after the agent's death: $(cat "$T/out")"

step "kill -9 of cofferd under load"
python3 "$here/writer.py" write "$T/mnt" "$T/acks-cofferd" 10 2>/dev/null &
writer=$!
sleep 2
pid=$(cofferd_pid)
kill -9 "$pid"
wait_for 10 test ! -d "/proc/$pid"
cofferd_start
coffer status --json | grep -q '"unlocked":true' || coffer unlock --key-file "$T/key" >/dev/null
wait $writer || true
if ! ls "$T/mnt" >/dev/null 2>&1; then
    coffer umount "$T/mnt" >/dev/null 2>&1 || umount -l "$T/mnt" 2>/dev/null || true
    coffer mount "$vol" "$T/mnt" >/dev/null || fail "mount after cofferd's death"
fi
for a in "${acks[@]}" "$T/acks-agent" "$T/acks-cofferd"; do
    python3 "$here/writer.py" check "$T/mnt" "$a" >"$T/out" || fail "after cofferd's death: $(cat "$T/out")"
done
coffer umount "$T/mnt" >/dev/null || fail "umount at the end"
coffer volume check "$vol" --data >"$T/out" || fail "volume check at the end: $(head -n 5 "$T/out")"
