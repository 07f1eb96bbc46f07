#!/bin/bash
# Containers do not notice that the server of their volume is killed: what they have open, and what they write, goes on.
source "$(dirname "$0")/lib.sh"
fixture
volume data size=128M
run_bg writer -v data:/v coffer-test sh -c 'exec 3>>/v/log; i=0; while [ ! -e /v/stop ]; do i=$((i + 1)); echo $i >&3 || exit 1;
    echo $i >/v/tmp || exit 1; mv /v/tmp /v/last || exit 1; done; echo done $i'
last() { docker exec writer cat /v/last; }
wait_for 20 last
for i in 1 2 3; do
    pid=$(server_pid data)
    [ -n "$pid" ] || fail "no server at kill $i"
    before=$(last)
    kill -9 "$pid"
    goes_on() { [ "$(last)" -gt $((before + 20)) ]; }
    wait_for 20 goes_on
    sleep 3
done
docker exec writer touch /v/stop
expect 0 "$(docker wait writer)" "the container's exit status ($(docker logs writer 2>&1 | tail -n 3))"
n=$(docker logs writer | sed 's/done //')
docker rm writer >/dev/null
expect "$n" "$(run check -v data:/v coffer-test wc -l /v/log | awk '{print $1}')" "lines in the log"
expect "$n" "$(run check -v data:/v coffer-test cat /v/last)" "the last name"
step "$n rounds, 3 kills"
