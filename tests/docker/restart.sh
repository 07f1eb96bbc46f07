#!/bin/bash
# dockerd is restarted under a `--restart always` container whose working directory is on the volume: it comes up again
# by itself, although dockerd answers no API call while it restores containers. The same after a kill -9 of dockerd.
source "$(dirname "$0")/lib.sh"
fixture

volume data
run init -v data:/data coffer-test sh -c 'mkdir -p /data/work; echo 0 >/data/work/starts'
run_bg always --restart always -v data:/data -w /data/work coffer-test \
    sh -c 'echo $(($(cat starts) + 1)) >starts.new && sync && mv starts.new starts; exec sleep 100000'
starts() { docker exec always cat /data/work/starts 2>/dev/null; }
is_running() { [ "$(docker inspect -f '{{.State.Running}}' always 2>/dev/null)" = true ] && [ "$(starts)" = "$1" ]; }
wait_for 20 is_running 1

step "dockerd stopped and started"
engine_kill_pid "$(engine_pid "$T/engine")"
engine_start "$T/engine" || fail "dockerd did not start again"
wait_for 60 is_running 2
run check -v data:/data coffer-test cat /data/work/starts >/dev/null || fail "another container"

step "dockerd killed and started"
pid=$(engine_pid "$T/engine")
kill -9 "$pid"
wait_for 10 test ! -d "/proc/$pid"
engine_start "$T/engine" || fail "dockerd did not start again after kill -9"
restarted() { [ "$(docker inspect -f '{{.State.Running}}' always 2>/dev/null)" = true ] && [ "$(starts)" -ge 2 ]; }
wait_for 60 restarted

step "cofferd restarted under a running container"
coffer volume ls >/dev/null
pid=$(cofferd_pid)
kill "$pid"
wait_for 20 test ! -d "/proc/$pid"
cofferd_start
coffer status --json | grep -q '"unlocked":true' || coffer unlock --key-file "$T/key" >/dev/null
docker volume inspect data >/dev/null || fail "docker does not know the volume any more"
usable() { run again -v data:/data coffer-test cat /data/work/starts; }
wait_for 30 usable
