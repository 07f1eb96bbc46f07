"""A service manager with a store of descriptors, as systemd's: python3 fdstore.py SOCKET COMMAND... starts COMMAND with
NOTIFY_SOCKET, keeps what it stores, and starts it again with that when a signal has ended it. Ends with COMMAND's other end."""
import array
import os
import socket
import sys

path, argv = sys.argv[1], sys.argv[2:]
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sock.bind(path)
sock.settimeout(0.05)
store = {}


def start():
    pid = os.fork()
    if pid:
        return pid
    names = list(store)
    high = [os.dup(store[n]) for n in names]
    high = [os.dup2(fd, 200 + i) for i, fd in enumerate(high)]
    for i, fd in enumerate(high):
        os.dup2(fd, 3 + i)  # inheritable
    os.closerange(3 + len(names), 1000)
    env = dict(os.environ, NOTIFY_SOCKET=path)
    if names:
        env.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(names)), LISTEN_FDNAMES=":".join(names))
    os.setsid()
    os.execve(argv[0], ["cofferd", *argv[1:]], env)


pid = start()
while True:
    try:
        data, anc, _, _ = sock.recvmsg(4096, 1024)
        fields = dict(line.split("=", 1) for line in data.decode().split("\n"))
        fds = array.array("i")
        for _, _, d in anc:
            fds.frombytes(d)
        if "FDSTORE" in fields:
            store[fields["FDNAME"]] = fds[0]
        elif "FDSTOREREMOVE" in fields and fields["FDNAME"] in store:
            os.close(store.pop(fields["FDNAME"]))
        print(" ".join(data.decode().split()), "->", " ".join(sorted(store)) or "nothing", flush=True)
    except TimeoutError:
        pass
    done, status = os.waitpid(pid, os.WNOHANG)
    if done and os.WIFSIGNALED(status):
        pid = start()
    elif done:
        sys.exit(os.waitstatus_to_exitcode(status))
