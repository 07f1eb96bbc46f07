#!/bin/bash
# The server of a mount is changed as an upgrade does it (coffer volume restart-server), under a load of names, appends and
# fsynced counters: for whoever uses the mount that is a short pause. No error, nothing lost, nothing done twice. Nothing
# is replayed either: the old one closes the volume. A server that cannot be started changes nothing.
source "$(dirname "$0")/../docker/lib.sh"
fixture none
here=$(dirname "$0")
ROUNDS=${ROUNDS:-6}

for profile in general database; do
    v=$profile
    coffer volume create "$v" --size 512M --profile "$profile" --allow uid:0 >/dev/null
    mkdir "$T/$v"
    one_line 1 "not mounted" coffer volume restart-server "$v"
    coffer mount "$v" "$T/$v" >/dev/null || fail "mount"
    dev=$(stat -c %d "$T/$v")
    step "$profile: $ROUNDS changes of the server under load"
    python3 "$here/takeover.py" "$T/$v" $((ROUNDS * 60)) >"$T/out" 2>&1 &
    load=$!
    ms=()
    for ((i = 1; i <= ROUNDS; i++)); do
        sleep "0.$((RANDOM % 900 + 100))"
        kill -0 $load 2>/dev/null || fail "the load ended at change $i: $(cat "$T/out")"
        pid=$(server_pid "$v")
        coffer volume restart-server "$v" --json >"$T/answer" || fail "restart-server $i"
        now=$(server_pid "$v")
        [ -n "$now" ] && [ "$now" != "$pid" ] || fail "the same server after change $i"
        ms+=("$(grep -o '"ms": *[0-9]*' "$T/answer" | grep -o '[0-9]*')")
    done
    kill $load # it ends after its round
    wait $load || fail "$(cat "$T/out")"
    mapfile -t ms < <(printf '%s\n' "${ms[@]}" | sort -n)
    step "$(cat "$T/out"); a change takes $((ms[ROUNDS / 2])) ms (median), ${ms[-1]} ms (longest)"
    expect "$dev" "$(stat -c %d "$T/$v")" "the mount is another one"
done
expect 0 "$(coffer audit --json | grep -c '"server-died"')" "deaths in the audit log"
expect $((2 * ROUNDS)) "$(coffer audit --json | grep -c '"server-restarted"')" "changes in the audit log"
grep -qE 'ends without|did not end' "$T/c/cofferd.log" && fail "a server did not close its volume: $(grep -E 'ends without|did not end' "$T/c/cofferd.log")"

step "all at once, and two at a time"
one_line 1 "no such volume" coffer volume restart-server nothing
one_line 2 "name, or --all" coffer volume restart-server
coffer volume restart-server --all >"$T/out" || fail "restart-server --all"
expect 2 "$(grep -c 'has followed' "$T/out")" "servers changed"
coffer volume restart-server general >"$T/out1" 2>&1 & first=$!
coffer volume restart-server general >"$T/out2" 2>&1 & second=$!
n=0
wait $first || n=$((n + 1))
wait $second || n=$((n + 1))
[ $n = 0 ] || { expect 1 $n "refused"; grep -q 'being restarted already' "$T/out1" "$T/out2" || fail "$(cat "$T/out1" "$T/out2")"; }

step "a file without a name lives on; a server that does not start changes nothing"
exec 9<>"$T/general/gone" && rm "$T/general/gone" && echo kept >&9
coffer volume restart-server general >/dev/null || fail "restart-server"
expect kept "$(cat "/proc/$$/fd/9")" "a file without a name"
pid=$(server_pid general)
mkdir "$T/bin"
cp "$BUILD/coffer" "$BUILD/cofferd" "$BUILD/coffer-keyd" "$BUILD/coffer-fs" "$T/bin/"
old=$BUILD
BUILD=$T/bin
kill "$(cofferd_pid)"
gone() { [ -z "$(cofferd_pid)" ]; }
wait_for 10 gone
cofferd_start
printf '#!/bin/false\n' >"$T/bin/coffer-fs"
one_line 1 "did not start" coffer volume restart-server general
expect "$pid" "$(server_pid general)" "the server"
expect kept "$(cat "/proc/$$/fd/9")" "a file without a name, afterwards"
cp "$old/coffer-fs" "$T/bin/coffer-fs.new" && mv "$T/bin/coffer-fs.new" "$T/bin/coffer-fs"
coffer volume restart-server general >/dev/null || fail "restart-server with the new program"
expect kept "$(cat "/proc/$$/fd/9")" "a file without a name, at the end"
exec 9>&-
coffer lock >/dev/null || fail "lock"
one_line 1 "locked" coffer volume restart-server general
coffer unlock --key-file "$T/key" >/dev/null || fail "unlock"
for v in general database; do
    coffer umount "$T/$v" >/dev/null || fail "umount"
    coffer volume check "$v" --data >"$T/out" || fail "check: $(head -n 5 "$T/out")"
done
