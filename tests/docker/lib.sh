# lib.sh - the fixture of the tests with containers: one cofferd, one engine, everything below one temporary directory.
# Sourced. A test calls `fixture` first; everything is taken away by a trap. A test ends with exit 0, or at the first
# failure with a line "FAILED: ...".
# shellcheck shell=bash

source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib.sh"
shopt -s lastpipe

T=          # the temporary directory
DRIVER=     # the volume driver's name at the engine
PASSPHRASE="correct horse battery staple"

fail() {
    printf 'FAILED: %s\n' "$*" >&2
    exit 1
}
step() { printf -- '- %s\n' "$*"; }

docker() { command docker -H "unix://$T/engine/docker.sock" "$@"; }
coffer() { "$BUILD/coffer" --root "$T/c" "$@"; }

# fixture [none]: cofferd with a keystore and, but for "none", an engine with the image coffer-test.
fixture() {
    need_root
    ensure_users >/dev/null
    T=$(mktemp -d /tmp/coffer-test.XXXXXX)
    DRIVER=coffer-test-${T##*.}
    DRIVER=${DRIVER,,}
    trap fixture_end EXIT
    trap 'exit 1' INT TERM HUP
    head -c 64 /dev/urandom >"$T/key"
    chmod 600 "$T/key"
    cofferd_start
    coffer init --key-file "$T/key" >"$T/recovery" || fail "coffer init"
    [ "${1:-}" = none ] && return 0
    engine_start "$T/engine" || { tail -n 5 "$T/engine/dockerd.log" >&2; fail "dockerd did not start"; }
    rootfs_base "$T/image"
    image_import "$T/image" coffer-test || fail "docker import"
}

cofferd_start() {
    coffer up --plugin-socket "/run/docker/plugins/$DRIVER.sock" --engine-root "$T/engine/root" \
        --engine-socket "$T/engine/docker.sock" >/dev/null || fail "coffer up"
}

cofferd_pid() { pgrep -f "^cofferd --root $T/c( |$)" | head -n 1 || true; }
# server_pid VOLUME: the coffer-fs that serves it. (Another test's volume may have the same name: ours has files of ours.)
server_pid() {
    local pid
    for pid in $(pgrep -f "^coffer-fs serve $1( |\$)"); do
        # Not through a pipe: a find that is hung up on would count as a failure.
        if [ -n "$(find "/proc/$pid/fd" -lname "$T/*" -print -quit 2>/dev/null)" ]; then
            echo "$pid"
            return 0
        fi
    done
}
agent_pid() { pgrep -P "$(cofferd_pid)" -x coffer-keyd | head -n 1 || true; }

fixture_end() {
    local status=$? ids
    set +e
    trap - EXIT
    if [ $status != 0 ]; then
        for f in "$T/c/cofferd.log" "$T/engine/dockerd.log"; do
            [ -s "$f" ] && { echo "--- end of ${f##*/}"; tail -n 25 "$f" | cut -c 1-400; }
        done
        coffer audit --json 2>/dev/null | tail -n 8 | cut -c 1-400
    fi
    jobs -p | xargs -r kill 2>/dev/null
    if [ -S "$T/engine/docker.sock" ]; then
        ids=$(docker ps -aq 2>/dev/null)
        [ -n "$ids" ] && timeout 60 "$(command -v docker)" -H "unix://$T/engine/docker.sock" rm -f $ids >/dev/null 2>&1
    fi
    declare -F test_cleanup >/dev/null && test_cleanup
    [ -d "$T/engine" ] && engine_stop "$T/engine"
    timeout 60 "$BUILD/coffer" --root "$T/c" down --force >/dev/null 2>&1
    for pid in $(cofferd_pid) $(pgrep -f '^coffer-(keyd|fs) '); do
        # Ours is what has a file of ours open.
        find "/proc/$pid/fd" -lname "$T/*" 2>/dev/null | grep -q . && kill -9 "$pid"
    done
    unmount_below "$T"
    rm -f "/run/docker/plugins/$DRIVER.sock"
    rm -rf --one-file-system "$T"
    exit $status
}

# run NAME ARG...: docker run without a network, in the foreground, removed afterwards.
run() {
    local name=$1
    shift
    docker run --rm --name "$name" --network none "$@"
}
# run_bg NAME ARG...: the same detached and kept.
run_bg() {
    local name=$1
    shift
    docker run -d --name "$name" --network none "$@" >/dev/null
}

# volume NAME [OPT...]: a volume made through the engine.
volume() {
    local name=$1 o args=()
    shift
    for o in "$@"; do args+=(-o "$o"); done
    docker volume create -d "$DRIVER" "${args[@]}" "$name" >/dev/null || fail "docker volume create $name"
}

# wait_for SECONDS COMMAND...: until it succeeds.
wait_for() {
    local n=$(($1 * 10))
    shift
    for ((; n > 0; n--)); do
        "$@" >/dev/null 2>&1 && return 0
        sleep 0.1
    done
    fail "waited in vain for: $*"
}

# expect WANT GOT WHAT
expect() { [ "$1" = "$2" ] || fail "$3: have \"$2\", expect \"$1\""; }

# refused PATTERN COMMAND...: the command must fail, and what it prints on stderr must match.
refused() {
    local pattern=$1 out
    shift
    if out=$("$@" 2>&1 >/dev/null); then fail "this was not refused: $*"; fi
    grep -qiE -- "$pattern" <<<"$out" || fail "refused with another reason: $*: $out"
}

# one_line STATUS PATTERN COMMAND...: the command ends with that status and says exactly one matching line on stderr.
one_line() {
    local want=$1 pattern=$2 out status=0
    shift 2
    out=$("$@" 2>&1 >/dev/null) || status=$?
    expect "$want" "$status" "exit status of: $* ($out)"
    expect 1 "$(grep -c '' <<<"$out")" "number of lines on stderr of: $*"
    grep -qiE -- "$pattern" <<<"$out" || fail "unexpected message of: $*: $out"
}

# audited PATTERN WHAT: the audit log has a record that matches.
audited() {
    grep -qE -- "$1" <<<"$(coffer audit --json)" || fail "not in the audit log: ${2:-$1}"
}
