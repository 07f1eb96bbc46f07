#!/bin/bash
# A container goes on with what it has open although the agent and the server of its volume are killed, in either order, once the
# keystore is unlocked again: the new agent asks the engine about it anew. A container whose rule is gone does not.
source "$(dirname "$0")/lib.sh"
fixture
volume data size=128M
run_bg writer -v data:/v coffer-test sh -c 'exec 3>>/v/log 4>>/v/beat; touch /v/ready; i=0; while [ $i -lt 100000 ]; do i=$((i + 1));
    echo $i >&3 || exit 1; if [ -e /tmp/stop ]; then echo done $i; exit 0; fi; sleep 0.02; done'
ready() { docker exec writer test -e /v/ready; }
wait_for 20 ready
lines() { run check -v data:/v coffer-test wc -l /v/log | awk '{print $1}'; }
gone() { ! kill -0 "$1" 2>/dev/null; }
unlocked() { coffer unlock --key-file "$T/key"; }
next() { local now; now=$(server_pid data); [ -n "$now" ] && [ "$now" != "$pid" ]; }
agent_up() { local now; now=$(agent_pid); [ -n "$now" ] && [ "$now" != "$agent" ] && coffer status --json | grep -q '"agent": *true'; }
running() { [ "$(docker inspect -f '{{.State.Running}}' writer)" = true ]; }

for order in "agent server" "server agent" "both"; do
    step "$order"
    pid=$(server_pid data) agent=$(agent_pid)
    case $order in
    "agent server")
        kill -9 "$agent"
        wait_for 20 agent_up
        wait_for 30 unlocked
        sleep 1
        kill -9 "$pid"
        ;;
    "server agent")
        kill -9 "$pid"
        wait_for 20 next
        sleep 0.5
        kill -9 "$agent"
        wait_for 20 agent_up
        wait_for 30 unlocked
        ;;
    both)
        kill -9 "$agent" "$pid"
        wait_for 20 agent_up
        wait_for 30 unlocked
        ;;
    esac
    wait_for 20 next
    before=$(lines)
    grown() { [ "$(lines)" -gt $((before + 20)) ]; }
    wait_for 20 grown
    running || fail "the container ended: $(docker logs writer 2>&1 | tail -n 3)"
done
audited '"event":"renew".*"volume":"data"'
docker exec writer touch /tmp/stop
expect 0 "$(docker wait writer)" "the container's exit status ($(docker logs writer 2>&1 | tail -n 3))"
n=$(docker logs writer | sed 's/done //')
docker rm writer >/dev/null
expect "$n" "$(lines)" "lines in the log"
step "$n lines"
