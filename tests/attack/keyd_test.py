#!/usr/bin/env python3
"""Drives a real coffer-keyd over its sockets, as cofferd, as the engine's broker and as coffer-fs would, with real
processes in real cgroups: who gets a key, who does not, and when a grant ends.

usage: keyd_test.py BUILD    (root; prints "N passed, N failed", exit 1 on a failure)
"""
import array
import ctypes as C
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

# --- include/coffer/agent.h ---

(REPLY, STATUS, INIT, UNLOCK, LOCK, VOLUME_ADD, VOLUME_GET, VOLUME_LIST, VOLUME_STATE, VOLUME_SIZE, VOLUME_RM, RULE_ADD,
 RULE_RM, RULE_GET, BIND, ENGINE, WHY, NOTE, BROKER, FACTS, FS_AUTH, FS_LOCKED, FS_GRANT_END, FS_LOCK, ACCEPT_ROLLBACK,
 FS_SEEN, FS_GRANT, FS_UNLOCKED, FS_RENEW) = range(1, 30)
WANT_KEY, PROBE, WRITE, MAINTENANCE = 1, 2, 4, 8
DENY, ALLOW, PLACEHOLDER = 0, 1, 2
NEW, FRESH, USED = 0, 1, 2
EPERM, ENOENT, ESRCH, EACCES, EBUSY, EEXIST, EINVAL, ETIMEDOUT, ENOKEY = 1, 2, 3, 13, 16, 17, 22, 110, 126


def struct_of(name, *fields):
    return type(name, (C.Structure,), {"_fields_": list(fields)})


NAME = C.c_char * 129
RES = C.c_uint8 * 3
Reply = struct_of("Reply", ("err", C.c_int32), ("text", C.c_char * 512))
Name = struct_of("Name", ("name", NAME))
Index = struct_of("Index", ("name", NAME), ("index", C.c_uint32))
Status = struct_of("Status", ("initialised", C.c_uint8), ("unlocked", C.c_uint8), ("reserved", C.c_uint8 * 2),
                   ("slots", C.c_uint32), ("volumes", C.c_uint32), ("channels", C.c_uint32), ("grants", C.c_uint32),
                   ("driver", C.c_char * 64))
Slot = struct_of("Slot", ("kind", C.c_uint32), ("reserved", C.c_uint32))
Params = struct_of("Params", ("id", C.c_uint8 * 16), ("block_size", C.c_uint32), ("profile", C.c_uint32),
                   ("size_limit", C.c_uint64), ("log_segment", C.c_uint64), ("root_mode", C.c_uint32),
                   ("root_uid", C.c_uint32), ("root_gid", C.c_uint32))
Volume = struct_of("Volume", ("name", NAME), ("reserved", RES), ("state", C.c_uint32), ("created_ns", C.c_int64),
                   ("params", Params), ("strict", C.c_uint32), ("attached", C.c_uint32))
State = struct_of("State", ("name", NAME), ("reserved", RES), ("state", C.c_uint32))
Rule = struct_of("Rule", ("name", NAME), ("deny", C.c_uint8), ("reserved", C.c_uint8 * 2), ("index", C.c_uint32),
                 ("rule", C.c_char * 512))
Bind = struct_of("Bind", ("name", NAME), ("reserved", RES), ("purpose", C.c_uint32), ("mount_id", C.c_uint64))
Engine = struct_of("Engine", ("name", NAME), ("reserved", RES), ("kind", C.c_uint32), ("tgid", C.c_int32),
                   ("pad", C.c_uint32), ("mount_ref", C.c_uint64))
Why = struct_of("Why", ("name", NAME), ("reserved", RES), ("pid", C.c_int32), ("write", C.c_uint32))
Note = struct_of("Note", ("name", NAME), ("reserved", RES), ("event", C.c_char * 32), ("text", C.c_char * 512))
FactsAsk = struct_of("FactsAsk", ("container", C.c_char * 65), ("reserved", RES), ("tid", C.c_int32))
Facts = struct_of("Facts", ("err", C.c_int32), ("source", C.c_uint32), ("host_pid_ns", C.c_uint8),
                  ("host_mnt_ns", C.c_uint8), ("reserved", C.c_uint8 * 2), ("driver", C.c_char * 64))
Auth = struct_of("Auth", ("tid", C.c_int32), ("flags", C.c_uint32), ("uid", C.c_uint32), ("opcode", C.c_uint32))
Seen = struct_of("Seen", ("branch", C.c_uint8 * 16), ("generation", C.c_uint64), ("mac", C.c_uint8 * 16))
Verdict = struct_of("Verdict", ("err", C.c_int32), ("kind", C.c_uint32), ("grant", C.c_uint64),
                    ("read_only", C.c_uint8), ("cacheable", C.c_uint8), ("has_key", C.c_uint8),
                    ("reserved", C.c_uint8 * 5), ("key", C.c_uint8 * 32), ("params", Params), ("strict", C.c_uint32),
                    ("accept", C.c_uint32), ("seen", Seen))
SeenDone = struct_of("SeenDone", ("err", C.c_int32), ("reserved", C.c_uint32))
Grant = struct_of("Grant", ("grant", C.c_uint64))
Renew = struct_of("Renew", ("grant", C.c_uint64), ("pidfd_ino", C.c_uint64), ("tid", C.c_int32), ("write", C.c_uint32))


class Closed(Exception):
    pass


class Chan:
    """One packet connection."""

    def __init__(self, sock):
        self.sock = sock
        self.id = 0
        self.early = []
        self.unlocked = 0  # as the agent has said by itself: which agent it is

    def send(self, kind, body=b"", fds=(), id=None, length=None, flags=0):
        if id is None:
            self.id += 1
            id = self.id
        body = bytes(body)
        head = struct.pack("=HHIQ", kind, flags, len(body) if length is None else length, id)
        anc = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.sock.sendmsg([head, body], anc)
        except (BrokenPipeError, ConnectionResetError):
            raise Closed()
        return id

    def recv(self, timeout=20.0):
        self.sock.settimeout(timeout)
        try:
            data, anc, flags, _ = self.sock.recvmsg(65536, 1024)
        except ConnectionResetError:
            raise Closed()
        if not data:
            raise Closed()
        kind, _, length, id = struct.unpack("=HHIQ", data[:16])
        assert length == len(data) - 16, "a packet with a wrong length"
        if kind == FS_UNLOCKED:
            self.unlocked, = struct.unpack("=Q", data[16:])
            return self.recv(timeout)
        fds = array.array("i")
        for level, typ, d in anc:
            if level == socket.SOL_SOCKET and typ == socket.SCM_RIGHTS:
                fds.frombytes(d[:len(d) - len(d) % 4])
        return kind, id, data[16:], list(fds)

    def call(self, kind, body=b"", fds=(), timeout=20.0):
        id = self.send(kind, body, fds)
        while True:
            k, i, data, got = self.recv(timeout)
            if i == id:
                return k, data, got
            self.early.append((k, data))

    def event(self, timeout=5.0):
        """The next packet that nobody asked for: (type, body), or None."""
        if self.early:
            return self.early.pop(0)
        try:
            k, _, data, _ = self.recv(timeout)
        except TimeoutError:
            return None
        return k, data

    def closed(self, timeout=3.0):
        try:
            while True:
                self.recv(timeout)
        except Closed:
            return True
        except TimeoutError:
            return False

    def close(self):
        self.sock.close()


# --- checks ---

passed = failed = 0


def check(ok, what):
    global passed, failed
    if ok:
        passed += 1
    else:
        failed += 1
        print("FAILED: %s" % what, flush=True)


# --- cgroups and the processes in them ---

def hierarchies():
    """Directories of up to three hierarchies that cgroups can be made in: v1 pids, v1 name=systemd, v2."""
    out = []
    for line in open("/proc/self/mountinfo"):
        left, right = line.split(" - ")
        fields, (kind, _, options) = left.split(), right.split()
        if fields[3] != "/" or not fields[4].startswith("/sys/fs/cgroup"):
            continue
        if kind == "cgroup2" or (kind == "cgroup" and {"pids", "name=systemd"} & set(options.split(","))):
            out.append(fields[4])
    return out


class Cgroups:
    def __init__(self):
        self.roots = hierarchies()
        self.top = "coffer-test-%d" % os.getpid()
        self.made = []
        self.procs = []

    def make(self, path, roots=None):
        for root in roots or self.roots:
            full = root
            for part in (self.top + "/" + path).split("/"):
                full += "/" + part
                if not os.path.isdir(full):
                    os.mkdir(full)
                    self.made.append(full)

    def enter(self, pid, path, roots=None):
        for root in roots or self.roots:
            with open("%s/%s/%s/cgroup.procs" % (root, self.top, path), "w") as f:
                f.write(str(pid))

    def remove(self, path):
        for root in self.roots:
            full = "%s/%s/%s" % (root, self.top, path)
            for _ in range(100):
                try:
                    os.rmdir(full)
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.02)

    def spawn(self, path=None, pid_ns=True, uid=0, threads=False, split=None):
        """A process that sleeps, in the cgroup path of every hierarchy. Returns its pid here."""
        sleeper = ["sleep", "600"]
        if threads:
            sleeper = [sys.executable, "-c", "import threading,time\n"
                       "for i in range(3): threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
                       "time.sleep(600)"]
        if uid:
            sleeper = ["setpriv", "--reuid", str(uid), "--clear-groups"] + sleeper
        if pid_ns:
            sleeper = ["unshare", "--fork", "--pid", "--kill-child"] + sleeper
        p = subprocess.Popen(sleeper, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.procs.append(p)
        pid = p.pid
        if pid_ns:
            pid = None
            for _ in range(200):
                kids = open("/proc/%d/task/%d/children" % (p.pid, p.pid)).read().split()
                if kids:
                    pid = int(kids[0])
                    break
                time.sleep(0.01)
        for _ in range(200):
            comm = open("/proc/%d/comm" % pid).read().strip()
            n = len(os.listdir("/proc/%d/task" % pid))
            if comm.startswith("python" if threads else "sleep") and (not threads or n == 4):
                break
            time.sleep(0.01)
        if split:
            for root, where in split:
                self.enter(pid, where, [root])
        elif path:
            self.enter(pid, path)
        return pid

    def kill(self, pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        for p in self.procs:
            p.poll()

    def clean(self):
        for p in self.procs:
            try:
                kids = open("/proc/%d/task/%d/children" % (p.pid, p.pid)).read().split()
            except OSError:
                kids = []
            for k in kids:
                self.kill(int(k))
            p.kill()
            p.wait()
        for full in reversed(self.made):
            for _ in range(100):
                try:
                    os.rmdir(full)
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.02)
            else:
                print("left behind: %s" % full)


# --- the broker: what the engine says ---

class Engine_:
    def __init__(self, chan):
        self.chan = chan
        self.known = {}
        self.host_ns = (0, 0)
        self.mode = "answer"
        self.asked = []
        chan.call(BROKER)
        threading.Thread(target=self.serve, daemon=True).start()

    def add(self, id, name, volume="vol", driver="coffer", labels=None, image="img:1", source=1):
        mount = {"Name": volume, "Driver": driver, "Type": "volume"}
        if source == 1:
            doc = {"ID": id, "Name": "/" + name, "Image": "sha256:" + "1" * 64,
                   "Config": {"Image": image, "Labels": labels or {}}, "MountPoints": {"/data": mount}}
        else:
            doc = [{"Id": id, "Names": ["/" + name], "Image": image, "ImageID": "sha256:" + "1" * 64,
                    "Labels": labels or {}, "Mounts": [mount]}]
        self.known[id] = (source, json.dumps(doc).encode())

    def serve(self):
        while True:
            try:
                kind, id, data, _ = self.chan.recv(None)
            except (Closed, OSError):
                return
            ask = FactsAsk.from_buffer_copy(data)
            cid = ask.container.decode()
            self.asked.append(cid)
            if self.mode == "hang":
                continue
            f = Facts(driver=b"coffer", host_pid_ns=self.host_ns[0], host_mnt_ns=self.host_ns[1])
            fds = []
            if self.mode == "error":
                f.err = -5
            elif cid not in self.known:
                f.err = -ENOENT
            else:
                f.source, doc = self.known[cid]
                fd = os.memfd_create("facts")
                os.write(fd, doc)
                fds = [fd]
            try:
                self.chan.send(FACTS, f, fds, id=id)
            except Closed:
                return
            for fd in fds:
                os.close(fd)


# --- the daemon ---

class Keyd:
    def __init__(self, build):
        self.dir = tempfile.mkdtemp(prefix="coffer-keyd-test-")
        os.chmod(self.dir, 0o755)
        self.state = self.dir + "/keystore"
        os.mkdir(self.state, 0o700)
        try:
            import pwd
            self.uid = pwd.getpwnam("coffer-keyd").pw_uid
        except KeyError:
            self.uid = 65534
        os.chown(self.state, self.uid, self.uid)
        self.binary = build + "/coffer-keyd"
        self.path = self.dir + "/keyd.sock"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(self.path)
        os.chmod(self.path, 0o666)  # so that the hanging up on other users is what is tested
        self.listener.listen(64)
        self.pid = 0

    def start(self):
        libc = C.CDLL(None, use_errno=True)
        exe = os.open(self.binary, os.O_RDONLY)
        state = os.open(self.state, os.O_RDONLY | os.O_DIRECTORY)
        self.log = open(self.dir + "/log", "ab")
        pid = os.fork()
        if pid == 0:
            try:
                hi = [os.dup2(fd, 200 + i) for i, fd in enumerate((self.listener.fileno(), state, exe))]
                os.dup2(self.log.fileno(), 2)
                os.dup2(hi[0], 3, inheritable=True)
                os.dup2(hi[1], 4, inheritable=True)
                os.dup2(hi[2], 5, inheritable=False)
                os.closerange(6, 512)
                os.setgroups([])
                os.setresgid(self.uid, self.uid, self.uid)
                os.setresuid(self.uid, self.uid, self.uid)
                libc.prctl(38, 1, 0, 0, 0)
                os.execve(5, ["coffer-keyd", "--driver", "coffer"], {"PATH": "/usr/bin:/bin"})
            finally:
                os._exit(127)
        os.close(exe)
        os.close(state)
        self.pid = pid

    def connect(self):
        s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        s.settimeout(10)
        s.connect(self.path)
        return Chan(s)

    def call(self, kind, body=b"", fds=(), timeout=90.0):
        c = self.connect()
        try:
            return c.call(kind, body, fds, timeout)
        finally:
            c.close()

    def err(self, kind, body=b"", fds=(), timeout=90.0):
        k, data, _ = self.call(kind, body, fds, timeout)
        return Reply.from_buffer_copy(data).err if k == REPLY else 0

    def text(self, kind, body=b""):
        k, data, _ = self.call(kind, body)
        return Reply.from_buffer_copy(data).text.decode()

    def status(self):
        return Status.from_buffer_copy(self.call(STATUS)[1])

    def secret(self, kind, slot, secret, out=False, hold=False):
        r, w = os.pipe()
        os.write(w, secret)
        fds = [r]
        rest = b""
        if out:
            orr, ow = os.pipe()
            fds.append(ow)
        c = self.connect()
        id = c.send(kind, Slot(kind=slot), fds)
        os.close(r)
        if out:
            os.close(ow)
        if not hold:
            os.close(w)
        k, i, data, _ = c.recv(90)
        assert i == id and k == REPLY
        if hold:
            os.close(w)
        if out:
            rest = os.read(orr, 8192)
            os.close(orr)
        c.close()
        return Reply.from_buffer_copy(data).err, rest

    def add_volume(self, name, attached=1, state=FRESH):
        p = Params(block_size=4096, size_limit=1 << 30, root_mode=0o755)
        e = self.err(VOLUME_ADD, Volume(name=name.encode(), params=p, attached=attached))
        if e == 0 and state:
            e = self.err(VOLUME_STATE, State(name=name.encode(), state=state))
        return e

    def rule(self, kind, name, rule, deny=0):
        return self.err(kind, Rule(name=name.encode(), rule=rule.encode(), deny=deny))

    def bind(self, name, purpose=0):
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        e = self.err(BIND, Bind(name=name.encode(), purpose=purpose, mount_id=7), [theirs.fileno()])
        theirs.close()
        assert e == 0, "bind: %d" % e
        return Chan(mine)

    def audit(self):
        try:
            return open(self.state + "/audit.log", "rb").read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""

    def alive(self):
        return os.waitpid(self.pid, os.WNOHANG) == (0, 0)

    def clean(self):
        if self.pid:
            try:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
            except (ProcessLookupError, ChildProcessError):
                pass
        self.listener.close()
        shutil.rmtree(self.dir)


def auth(chan, tid, flags=0, uid=0, timeout=20.0):
    kind, data, fds = chan.call(FS_AUTH, Auth(tid=tid, flags=flags, uid=uid, opcode=14), timeout=timeout)
    assert kind == FS_AUTH
    v = Verdict.from_buffer_copy(data)
    v.fds = len(fds)
    for fd in fds:
        os.close(fd)
    return v


def allowed(v):
    return v.err == 0 and v.kind == ALLOW and v.grant != 0


def denied(v, err=EACCES):
    return v.err == -err and v.kind == DENY and not v.has_key and v.grant == 0 and not any(v.key)


# --- the tests ---

A, B, X = "a" * 64, "b" * 64, "c" * 64
PASS = b"correct horse"


def test_start(k):
    st = k.status()
    check(st.initialised == 0 and st.unlocked == 0 and st.driver == b"coffer", "an empty keystore is neither there nor unlocked")
    check(k.secret(UNLOCK, 1, PASS)[0] == -ENOENT, "there is nothing to unlock")
    check(k.secret(INIT, 1, b"\n", out=True)[0] == -EINVAL, "an empty passphrase is refused")
    check(k.secret(INIT, 3, PASS, out=True)[0] == -EINVAL, "a recovery key is not made from one")
    err, recovery = k.secret(INIT, 1, PASS + b"\n", out=True)
    check(err == 0 and len(recovery) > 0, "init makes the keystore and shows the recovery key")
    st = k.status()
    check(st.initialised == 1 and st.unlocked == 1, "init leaves it unlocked")
    check(k.secret(INIT, 1, PASS, out=True)[0] == -EEXIST, "a keystore is not made twice")
    check(k.err(LOCK) == 0 and k.status().unlocked == 0, "lock")
    check(k.secret(UNLOCK, 1, b"wrong")[0] < 0 and k.status().unlocked == 0, "a wrong passphrase does not unlock")
    check(k.secret(UNLOCK, 2, PASS)[0] < 0 and k.status().unlocked == 0, "a passphrase is no key file")
    check(k.secret(UNLOCK, 1, PASS + b"\n\n")[0] < 0, "only one newline is taken off")
    check(k.secret(UNLOCK, 1, b"x" * 5000)[0] == -7, "a secret that is too long is refused")
    t = time.time()
    check(k.secret(UNLOCK, 1, b"half", hold=True)[0] == -ETIMEDOUT and 4 < time.time() - t < 9, "a pipe that hangs is given up")
    check(k.secret(UNLOCK, 1, PASS + b"\n")[0] == 0 and k.status().unlocked == 1, "unlock with the newline that a terminal adds")
    check(k.err(LOCK) == 0 and k.secret(UNLOCK, 3, recovery)[0] == 0 and k.status().unlocked == 1, "unlock with the recovery key")
    return recovery


def test_cage(k):
    """seccomp on the agent and on its helper, no capability, not dumpable."""
    def field(pid, name):
        return [l.split()[1] for l in open("/proc/%d/status" % pid) if l.startswith(name + ":")][0]

    helper = int(open("/proc/%d/task/%d/children" % (k.pid, k.pid)).read().split()[0])
    sanitized = b"__asan_init" in open(k.binary, "rb").read()
    for pid, what in ((k.pid, "the agent"), (helper, "its helper")):
        check(field(pid, "Seccomp") == "2" or sanitized, "%s filters system calls" % what)
        check(int(field(pid, "CapEff"), 16) == 0 and field(pid, "NoNewPrivs") == "1", "%s has no privilege" % what)
        check(os.stat("/proc/%d/mem" % pid).st_uid == 0, "%s is not dumpable" % what)
    left = sorted(os.readlink("/proc/%d/fd/%s" % (helper, f)).split(":")[0] for f in os.listdir("/proc/%d/fd" % helper))
    check(len(left) == 2 and "socket" in left and k.state not in left, "the helper has its log and its socket: %s" % left)


def test_volumes(k):
    check(k.add_volume("vol") == 0, "a volume is added")
    check(k.add_volume("vol") == -EEXIST, "not twice")
    check(k.err(VOLUME_ADD, Volume(name=b"../x", params=Params(block_size=4096, size_limit=1 << 30))) == -EINVAL, "a bad name")
    check(k.err(VOLUME_ADD, Volume(name=b"y", params=Params(block_size=5000, size_limit=1 << 30))) == -EINVAL, "a bad block size")
    kind, data, _ = k.call(VOLUME_GET, Name(name=b"vol"))
    v = Volume.from_buffer_copy(data)
    check(kind == VOLUME_GET and v.state == FRESH and any(v.params.id) and v.created_ns > 0, "get gives id, state and time")
    check(k.call(VOLUME_LIST, Index(index=0))[0] == VOLUME_LIST - 1 and k.err(VOLUME_LIST, Index(index=1)) == -ENOENT, "list")
    check(k.err(VOLUME_GET, Name(name=b"none")) == -ENOENT, "get of none")
    check(k.rule(RULE_ADD, "vol", "nonsense:x") == -EINVAL, "an unknown selector is refused when given")
    check(k.text(RULE_ADD, Rule(name=b"vol", rule=b"nonsense:x")) != "", "... with a reason")
    check(k.rule(RULE_ADD, "vol", "attached") == 0 and k.rule(RULE_ADD, "vol", "attached") == -EEXIST, "a rule, not twice")
    kind, data, _ = k.call(RULE_GET, Index(name=b"vol", index=0))
    check(kind == RULE_GET and Rule.from_buffer_copy(data).rule == b"attached", "the rule is there")
    check(k.err(RULE_GET, Index(name=b"vol", index=1)) == -ENOENT, "past the end")
    check(k.rule(RULE_RM, "vol", "uid:7") == -ENOENT and k.rule(RULE_RM, "vol", "attached") == 0, "a rule is removed")
    check(k.err(NOTE, Note(name=b"vol", event=b"mount", text=b"a \x01 note")) == 0 and "mount" in k.audit(), "a note is in the log")


def test_malformed(k):
    def breach(what, kind, body, fds=(), **kw):
        c = k.connect()
        try:
            c.send(kind, body, fds, **kw)
            ok = c.closed()
        except Closed:
            ok = True
        c.close()
        check(ok, "the connection ends: %s" % what)

    full = b"x" * 129
    breach("unknown type", 99, b"")
    breach("type 0", 0, b"")
    breach("a broker's packet on a control connection", FACTS, Facts())
    breach("a volume's packet on a control connection", FS_AUTH, Auth())
    breach("flags", STATUS, b"", flags=1)
    breach("length too small", STATUS, b"x", length=0)
    breach("length too big", STATUS, b"", length=9)
    breach("a body where there is none", STATUS, b"x")
    breach("huge", NOTE, b"x" * 60000)
    for what, kind, cls in (("get", VOLUME_GET, Name), ("add", VOLUME_ADD, Volume), ("state", VOLUME_STATE, State),
                            ("rm", VOLUME_RM, Name), ("rule add", RULE_ADD, Rule), ("rule rm", RULE_RM, Rule),
                            ("rule get", RULE_GET, Index), ("list", VOLUME_LIST, Index), ("why", WHY, Why),
                            ("note", NOTE, Note), ("engine", ENGINE, Engine)):
        size = C.sizeof(cls)
        breach(what + " without NUL", kind, full + bytes(size - 129))
        breach(what + " short", kind, bytes(size - 1))
        breach(what + " long", kind, bytes(size + 1))
        breach(what + " empty", kind, b"")
    one = (1, 0, 0)
    breach("add reserved", VOLUME_ADD, Volume(name=b"z", reserved=RES(*one)))
    breach("state reserved", VOLUME_STATE, State(name=b"z", reserved=RES(*one)))
    breach("rule reserved", RULE_ADD, Rule(name=b"z", reserved=(C.c_uint8 * 2)(1, 0)))
    breach("rule deny", RULE_ADD, Rule(name=b"z", deny=2))
    breach("rule without NUL", RULE_ADD, Rule(name=b"z", rule=b"u" * 512))
    breach("why reserved", WHY, Why(name=b"z", reserved=RES(*one)))
    breach("why write", WHY, Why(name=b"z", write=2))
    breach("note reserved", NOTE, Note(name=b"z", reserved=RES(*one)))
    breach("note event", NOTE, Note(name=b"z", event=b"e" * 32))
    breach("note text", NOTE, Note(name=b"z", text=b"e" * 512))
    breach("engine reserved", ENGINE, Engine(name=b"z", reserved=RES(*one)))
    breach("engine pad", ENGINE, Engine(name=b"z", pad=1))
    breach("engine begin without pidfd", ENGINE, Engine(name=b"z", tgid=1))
    breach("unlock without pipe", UNLOCK, Slot(kind=1))
    breach("init with one pipe", INIT, Slot(kind=1), [0])
    breach("unlock with two", UNLOCK, Slot(kind=1), [0, 0])
    breach("unlock reserved", UNLOCK, Slot(kind=1, reserved=1), [0])
    breach("bind without socket", BIND, Bind(name=b"vol"))
    breach("bind reserved", BIND, Bind(name=b"vol", reserved=RES(*one)), [0])
    breach("status with a descriptor", STATUS, b"", [0])
    breach("nine descriptors", BIND, Bind(name=b"vol"), [0] * 9)
    check(k.err(BIND, Bind(name=b"vol"), [0]) < 0, "bind of what is no socket")
    r, w = os.pipe()
    check(k.err(BIND, Bind(name=b"vol"), [r]) < 0, "bind of a pipe")
    check(k.err(BIND, Bind(name=b"vol", purpose=3), [r]) < 0, "bind for no purpose")
    with open("/etc/hostname") as f:
        check(k.err(UNLOCK, Slot(kind=1), [f.fileno()]) == -EINVAL, "a secret from a file")
    check(k.err(UNLOCK, Slot(kind=9), [r]) == -EINVAL, "a slot of no kind")
    check(k.err(ENGINE, Engine(name=b"vol", kind=7)) == -EINVAL, "an engine event of no kind")
    check(k.err(ENGINE, Engine(name=b"vol", kind=1, mount_ref=99)) == -ENOENT, "the end of no mount")
    check(k.err(WHY, Why(name=b"vol", pid=-1)) == -EINVAL, "why of no process")
    os.close(r)
    os.close(w)

    def volume_breach(what, kind, body, fds=()):
        c = k.bind("vol")
        try:
            c.send(kind, body, fds)
            ok = c.closed()
        except Closed:
            ok = True
        c.close()
        check(ok, "the channel ends: %s" % what)

    volume_breach("a control request", STATUS, b"")
    volume_breach("lock by a server", LOCK, b"")
    volume_breach("auth short", FS_AUTH, bytes(15))
    volume_breach("auth flags", FS_AUTH, Auth(tid=1, flags=32))
    volume_breach("auth with a descriptor", FS_AUTH, Auth(tid=1), [0])
    volume_breach("locked with a body", FS_LOCKED, b"x")
    volume_breach("renewal of no grant", FS_RENEW, Renew(tid=os.getpid()))
    volume_breach("renewal of the placeholder", FS_RENEW, Renew(grant=2**64 - 1, tid=os.getpid()))
    volume_breach("renewal, write neither", FS_RENEW, Renew(grant=1, tid=os.getpid(), write=2))
    c = k.connect()
    c.call(BROKER)
    c.send(FACTS, Facts(err=1), id=5)
    check(c.closed(), "the broker's connection ends: an error that is none")
    c.close()
    check(k.alive() and k.status().unlocked == 1, "the agent has survived it")


def test_other_user(k):
    pid = os.fork()
    if pid == 0:
        os.setresuid(65533, 65533, 65533)
        try:
            c = k.connect()
            c.send(STATUS)
            c.recv(3)
            os._exit(1)
        except Closed:
            os._exit(0)
        except BaseException:
            os._exit(2)
    check(os.waitpid(pid, 0)[1] == 0, "a peer that is not root is hung up on")


def test_containers(k, cg, eng):
    cg.make("docker/" + A)
    cg.make("docker/" + B)
    eng.add(A, "db")
    eng.add(B, "web", volume="other")
    a, b = cg.spawn("docker/" + A, threads=True), cg.spawn("docker/" + B)
    vol = k.bind("vol")

    v = auth(vol, a, WANT_KEY)
    check(allowed(v) and v.has_key and any(v.key), "the container that has the volume gets the key")
    check(v.cacheable and v.fds == 1, "... and the answer may be kept for its thread")
    check(v.params.block_size == 4096, "... with the volume's parameters")
    check(Volume.from_buffer_copy(k.call(VOLUME_GET, Name(name=b"vol"))[1]).state == USED, "the volume is used now")
    check('release' in k.audit() and A[:12] in k.audit(), "the release is in the log")
    n = len(eng.asked)
    tids = [int(t) for t in os.listdir("/proc/%d/task" % a)]
    vs = [auth(vol, t) for t in tids]
    check(len(tids) == 4 and all(allowed(w) and w.grant == v.grant and not w.has_key for w in vs), "its threads share the grant")
    check(len(eng.asked) == n, "... without asking the engine again")
    vol2 = k.bind("vol")
    check(auth(vol2, a, WANT_KEY).grant == v.grant and len(eng.asked) == n, "a new server gets the live grant")
    vol2.close()

    log = len(k.audit())
    check(denied(auth(vol, b, PROBE)), "the other container's stat of the root is refused")
    check(len(k.audit()) == log, "... and not logged")
    check(denied(auth(vol, b, WANT_KEY)), "the other container is refused")
    tail = k.audit()[log:]
    check("refuse" in tail and "web" in tail, "... and that is in the log")
    lines = k.audit().count("\n")
    check(all(denied(auth(vol, b)) for _ in range(200)), "two hundred more")
    check(k.audit().count("\n") <= lines + 1, "... are counted, not written one by one")
    host = cg.spawn(None, pid_ns=False)
    check(denied(auth(vol, host, WANT_KEY)), "a host shell of root's is refused")
    check(denied(auth(vol, 0)) and denied(auth(vol, -4)), "pid 0 and less are refused")
    check(denied(auth(vol, 4194303)), "a process that is not there is refused")
    check(denied(auth(vol, 0, MAINTENANCE | WANT_KEY)), "a serving channel gets no key for maintenance")

    cg.make("docker/%s/%s" % (B, A))
    spoof = cg.spawn("docker/%s/%s" % (B, A))
    check(denied(auth(vol, spoof, WANT_KEY)), "a child cgroup named after the other container is refused")
    cg.make("docker/%s/docker-%s.scope" % (B, A))
    spoof2 = cg.spawn("docker/%s/docker-%s.scope" % (B, A))
    check(denied(auth(vol, spoof2, WANT_KEY)), "... in the systemd form, too")
    cg.make("docker/%s/%s" % (A, B))
    inner = cg.spawn("docker/%s/%s" % (A, B))
    check(denied(auth(vol, inner, WANT_KEY)), "... and below the allowed one")
    cg.make("docker/%s/init" % A)
    sub = cg.spawn("docker/%s/init" % A)
    check(allowed(auth(vol, sub)), "a child cgroup of the container's own belongs to it")
    cg.make("docker/%s/docker/%s" % (A, X))
    dind = cg.spawn("docker/%s/docker/%s" % (A, X))
    check(allowed(auth(vol, dind)), "a container in the container belongs to the outer one")
    cg.make("docker/" + X)
    unknown = cg.spawn("docker/" + X)
    check(denied(auth(vol, unknown)), "a container that the engine does not know is refused")
    if len(cg.roots) > 1:
        mixed = cg.spawn(split=[(r, "docker/" + (B if i == 0 else A)) for i, r in enumerate(cg.roots)])
        check(denied(auth(vol, mixed, WANT_KEY)), "hierarchies that name different containers are refused")

    eng.host_ns = (1, 1)
    hosty = cg.spawn("docker/" + A, pid_ns=False)
    check(denied(auth(vol, hosty, WANT_KEY)), "a process of the host's namespaces in the container's cgroup is refused")
    eng.host_ns = (1, 0)
    check(allowed(auth(vol, hosty)), "--pid=host alone is not")
    eng.host_ns = (0, 0)

    why = k.call(WHY, Why(name=b"vol", pid=b))[1]
    check(Reply.from_buffer_copy(why).err == -EACCES and b"web" in Reply.from_buffer_copy(why).text, "why: refused, and who")
    g, log = k.status().grants, len(k.audit())
    check(k.err(WHY, Why(name=b"vol", pid=a, write=1)) == 0, "why: allowed")
    check(k.status().grants == g and len(k.audit()) == log, "why changes nothing")
    return vol, a


def drain(chan, timeout=0.3):
    out = []
    while True:
        e = chan.event(timeout)
        if e is None:
            return out
        out.append(e)


def test_grant_end(k, cg, vol):
    """All processes of the container end and its cgroup is removed."""
    grants = k.status().grants
    check(grants >= 1, "there are live grants")
    for root in cg.roots:
        for base, _, _ in os.walk("%s/%s/docker/%s" % (root, cg.top, A)):
            for pid in open(base + "/cgroup.procs").read().split():
                cg.kill(int(pid))
    time.sleep(0.1)
    t = time.time()
    for sub in ("/docker/" + X, "/docker", "/" + B, "/init", ""):
        cg.remove("docker/" + A + sub)
    first = vol.event()
    check(first is not None and first[0] == FS_GRANT_END, "the grant ends with its cgroup")
    check(time.time() - t < 1.5, "... at once, not at the next slow look")
    second = vol.event()
    check(second is not None and second[0] == FS_LOCK, "the last grant's end locks the volume")
    vol.send(FS_LOCKED, id=0)
    check(k.status().grants == 0, "no grant is left")
    check(drain(vol) == [], "... and nothing more is said")


def test_rebirth(k, cg, eng, vol):
    cg.make("docker/" + A)
    a = cg.spawn("docker/" + A)
    n = len(eng.asked)
    v = auth(vol, a, WANT_KEY)
    check(allowed(v) and v.has_key and len(eng.asked) == n + 1, "the same name with another inode is asked about anew")
    return a, v.grant


def test_rules(k, cg, eng, vol, a, grant):
    check(k.rule(RULE_ADD, "vol", "container:db") == 0 and drain(vol) == [], "a rule that still allows ends nothing")
    check(k.rule(RULE_ADD, "vol", "label:tier=data") == 0 and drain(vol) == [], "... nor one that asks for a new label")
    check(k.rule(RULE_RM, "vol", "label:tier=data") == 0 and drain(vol) == [], "... nor its removal")
    check(k.rule(RULE_ADD, "vol", "container:nobody") == 0 and k.rule(RULE_RM, "vol", "container:db") == 0, "its rule goes")
    e = drain(vol)
    check([x[0] for x in e] == [FS_GRANT_END, FS_LOCK] and Grant.from_buffer_copy(e[0][1]).grant == grant,
          "removing the rule ends the grant and locks")
    vol.send(FS_LOCKED, id=0)
    check(denied(auth(vol, a, WANT_KEY)), "... and the container is refused")
    check(k.rule(RULE_RM, "vol", "container:nobody") == 0 and allowed(auth(vol, a)), "without rules, attached is enough")
    check(k.rule(RULE_ADD, "vol", "container:db", deny=1) == 0, "a deny rule")
    check([x[0] for x in drain(vol)] == [FS_GRANT_END, FS_LOCK] and denied(auth(vol, a)), "deny wins at once")
    vol.send(FS_LOCKED, id=0)
    check(k.rule(RULE_RM, "vol", "container:db", deny=1) == 0, "the deny rule goes")
    check(k.rule(RULE_ADD, "vol", "container:db,ro") == 0, "a read-only rule")
    v = auth(vol, a, WANT_KEY)
    check(allowed(v) and v.read_only == 1, "read-only is granted")
    check(denied(auth(vol, a, WRITE)), "... and writing is refused")
    check(k.err(WHY, Why(name=b"vol", pid=a, write=1)) == -EACCES, "... as why says")
    check(k.rule(RULE_RM, "vol", "container:db,ro") == 0, "the read-only rule goes")
    drain(vol)
    check(allowed(auth(vol, a, WRITE)), "... and writing is allowed")
    eng.add(A, "db", labels={"tier": "data"})
    check(k.rule(RULE_ADD, "vol", "label:tier=data") == 0 and drain(vol) == [], "a label that it has keeps the grant")
    check(k.rule(RULE_ADD, "vol", "label:tier=data", deny=1) == 0, "... and one that denies")
    check([x[0] for x in drain(vol)] == [FS_GRANT_END, FS_LOCK], "... ends it")
    vol.send(FS_LOCKED, id=0)
    for deny in (0, 1):
        k.rule(RULE_RM, "vol", "label:tier=data", deny=deny)


def test_engine_says(k, cg, eng, vol, a):
    """What the engine says, wrongly, late or not at all."""
    good = eng.known[A]
    drain(vol)
    k.rule(RULE_ADD, "vol", "attached", deny=1)
    k.rule(RULE_RM, "vol", "attached", deny=1)
    drain(vol)
    vol.send(FS_LOCKED, id=0)
    bad = {"not JSON": b"{", "another container's": good[1].replace(A.encode(), B.encode()), "empty": b"",
           "a key twice": b'{"ID":"x",' + good[1][1:], "too big": b" " * (1 << 20) + good[1],
           "deep": b"[" * 100000}
    for what, doc in bad.items():
        eng.known[A] = (1, doc)
        check(denied(auth(vol, a, WANT_KEY)), "facts are refused: %s" % what)
    eng.known[A] = (2, good[1])
    check(denied(auth(vol, a)), "facts of the wrong source are refused")
    eng.add(A, "db", source=2)
    check(allowed(auth(vol, a, WANT_KEY)), "facts of the API are taken")
    k.rule(RULE_ADD, "vol", "attached", deny=1)
    k.rule(RULE_RM, "vol", "attached", deny=1)
    drain(vol)
    vol.send(FS_LOCKED, id=0)
    eng.known[A] = good
    eng.mode = "error"
    check(denied(auth(vol, a)), "an engine that fails: refused")
    eng.mode = "hang"
    t = time.time()
    id = vol.send(FS_AUTH, Auth(tid=a, flags=WANT_KEY))
    more = vol.send(FS_AUTH, Auth(tid=a, flags=WANT_KEY))
    s = time.time()
    check(k.status().unlocked == 1 and time.time() - s < 1, "the agent answers others meanwhile")
    got = {}
    while len(got) < 2:
        kind, i, data, _ = vol.recv(15)
        got[i] = Verdict.from_buffer_copy(data)
    check(denied(got[id]) and denied(got[more]) and 5 < time.time() - t < 12, "an engine that hangs: refused within 10 s")
    eng.mode = "answer"
    ids = [vol.send(FS_AUTH, Auth(tid=a, flags=WANT_KEY)) for _ in range(50)]
    n = len(eng.asked)
    vs = []
    while len(vs) < len(ids):
        kind, i, data, _ = vol.recv(15)
        if kind == FS_AUTH:
            vs.append(Verdict.from_buffer_copy(data))
    check(all(allowed(v) for v in vs) and len({v.grant for v in vs}) == 1, "fifty at a time share one grant")
    check(len(eng.asked) <= n + 1, "... and one question")
    eng.chan.sock.shutdown(socket.SHUT_RDWR)
    time.sleep(0.2)
    check(allowed(auth(vol, a)), "without cofferd a live grant goes on")
    cg.make("docker/" + B)
    b = cg.spawn("docker/" + B)
    check(denied(auth(vol, b)), "... and nobody new gets in")


def pidfd_ino(pid):
    fd = os.pidfd_open(pid)
    ino = os.fstat(fd).st_ino
    os.close(fd)
    return ino


def renew(chan, grant, tid, ino, write=1):
    kind, data, fds = chan.call(FS_RENEW, Renew(grant=grant, pidfd_ino=ino, tid=tid, write=write))
    assert kind == FS_AUTH
    for fd in fds:
        os.close(fd)
    return Verdict.from_buffer_copy(data)


def test_renew(k, vol, user, user2, other, grant):
    """A grant of an agent that has ended, by its number and a thread that had it."""
    check(vol.unlocked != 0, "the agent says that it is open, and which it is")
    v = renew(vol, 4711, user, pidfd_ino(user))
    check(allowed(v) and v.grant == 4711 and not v.has_key, "a thread that is allowed gets the grant of that number")
    check(denied(renew(vol, 4711, user2, pidfd_ino(user2))), "... once")
    check(denied(renew(vol, grant, user2, pidfd_ino(user2))), "nor is a number given that is another grant's")
    check(denied(renew(vol, 4712, user2, pidfd_ino(user))), "another thread with the number of the one that had it gets none")
    check(denied(renew(vol, 4713, other, pidfd_ino(other))), "a thread that no rule allows gets none")
    check(denied(renew(vol, 4714, 0, 1)), "nor does nobody")
    check(auth(vol, user2).grant in (grant, 4711), "who asks without a number gets one of those that live")


def test_local(k, cg):
    check(k.add_volume("local", attached=0) == 0 and k.rule(RULE_ADD, "local", "uid:1234") == 0, "a local volume")
    vol = k.bind("local")
    user = cg.spawn(None, pid_ns=False, uid=1234)
    other = cg.spawn(None, pid_ns=False, uid=1235)
    inns = cg.spawn(None, pid_ns=True, uid=1234)
    v = auth(vol, user, WANT_KEY)
    check(allowed(v) and v.has_key, "the rule's user gets the key")
    user2 = cg.spawn(None, pid_ns=False, uid=1234)
    check(auth(vol, user2).grant == v.grant, "... once for all its processes")
    check(denied(auth(vol, other)), "another user does not")
    check(denied(auth(vol, inns)), "nor the same number in another pid namespace")
    cg.make("x/" + X)
    shaped = cg.spawn("x/" + X, pid_ns=False, uid=1234)
    check(denied(auth(vol, shaped)), "nor in a cgroup shaped like a container")
    test_renew(k, vol, user, user2, other, v.grant)
    check(Volume.from_buffer_copy(k.call(VOLUME_GET, Name(name=b"local"))[1]).state == USED, "a local user uses it")
    dockerd = cg.spawn(None, pid_ns=False)
    pidfd = os.pidfd_open(dockerd)
    check(k.err(ENGINE, Engine(name=b"local", tgid=dockerd, mount_ref=3), [pidfd]) == 0, "the engine mounts it")
    v = auth(vol, dockerd, WANT_KEY)
    check(v.kind == PLACEHOLDER and not v.has_key, "... and may not read what the user wrote")
    check(k.err(ENGINE, Engine(name=b"local", kind=1, mount_ref=3)) == 0, "... and unmounts it")
    cg.kill(dockerd)
    os.close(pidfd)
    check(k.err(VOLUME_RM, Name(name=b"local")) == -EBUSY, "a mounted volume is not removed")
    vol.close()
    time.sleep(0.1)
    check(k.err(VOLUME_RM, Name(name=b"local")) == 0 and k.err(VOLUME_GET, Name(name=b"local")) == -ENOENT, "an unmounted one is")


def test_engine_fill(k, cg):
    check(k.add_volume("fill") == 0, "a fresh volume")
    eng = Engine_(k.connect())
    vol = k.bind("fill")
    dockerd = cg.spawn(None, pid_ns=False, threads=True)
    pidfd = os.pidfd_open(dockerd)
    tid = max(int(t) for t in os.listdir("/proc/%d/task" % dockerd))
    check(denied(auth(vol, tid)), "the engine outside its mount is refused as anybody")
    check(k.err(ENGINE, Engine(name=b"fill", tgid=dockerd, mount_ref=5), [pidfd]) == 0, "the engine mounts")
    log = len(k.audit())
    v = auth(vol, tid, WANT_KEY | WRITE)
    check(allowed(v) and v.has_key, "the engine may fill a fresh volume")
    check("fill" in k.audit()[log:], "... which is in the log")
    check(k.err(ENGINE, Engine(name=b"fill", kind=1, mount_ref=6)) == -ENOENT, "an end of another mount ends nothing")
    check(k.err(ENGINE, Engine(name=b"fill", kind=1, mount_ref=5)) == 0, "the engine unmounts")
    check([x[0] for x in drain(vol)] == [FS_GRANT_END, FS_LOCK], "... which ends its grant and locks")
    vol.send(FS_LOCKED, id=0)
    v = auth(vol, tid, WANT_KEY)
    check(v.err == 0 and v.kind == PLACEHOLDER and not v.has_key and v.grant == 0 and not v.cacheable, "after that: the placeholder")
    check(k.err(ENGINE, Engine(name=b"fill", tgid=dockerd, mount_ref=7), [pidfd]) == 0 and allowed(auth(vol, tid)), "it mounts again and may")
    cg.make("docker/" + X)
    eng.add(X, "first", volume="fill")
    c = cg.spawn("docker/" + X)
    v = auth(vol, c, WANT_KEY)
    check(allowed(v) and [x[0] for x in drain(vol)] == [FS_GRANT_END], "the first container ends the fill")
    check(auth(vol, dockerd, WANT_KEY).kind == PLACEHOLDER, "... and the engine sees the placeholder")
    cg.kill(dockerd)
    os.close(pidfd)
    m = k.bind("fill", purpose=1)
    v = auth(m, 0, WANT_KEY | MAINTENANCE)
    check(v.err == 0 and v.kind == ALLOW and v.has_key and v.grant == 0, "maintenance gets the key")
    check(denied(auth(m, 0, WANT_KEY | MAINTENANCE)), "... once")
    m2 = k.bind("fill", purpose=2)
    check(denied(auth(m2, c, WANT_KEY)), "a channel for maintenance serves nobody")
    m.close()
    m2.close()
    return vol, c


def test_cgroup_rule(k, cg):
    check(k.add_volume("unit", attached=0) == 0, "a volume of a service")
    for rule in ("cgroup:/%s/svc" % cg.top, "unit:db.service", "attached,unit:db.service"):
        e = k.rule(RULE_ADD, "unit", rule)
        check(e == -EINVAL, "%s is refused as long as it cannot be enforced, not taken and ignored" % rule)
    vol = k.bind("unit")
    cg.make("svc/one")
    p = cg.spawn("svc/one", pid_ns=False)
    check(denied(auth(vol, p, WANT_KEY)), "... and nobody is let in by it")
    cg.kill(p)
    vol.close()


def seen(generation, branch=1, mac=1):
    return Seen(branch=(C.c_uint8 * 16)(branch), generation=generation, mac=(C.c_uint8 * 16)(mac))


def tell(chan, s):
    kind, data, _ = chan.call(FS_SEEN, s)
    assert kind == FS_SEEN
    return SeenDone.from_buffer_copy(data).err


def test_generations(k, cg):
    """What the agent remembers of a volume, and that a lying server can change it only forward, and only its own."""
    ESTALE = 116
    check(k.add_volume("gen") == 0 and k.add_volume("gen2") == 0, "two volumes")
    vol, other = k.bind("gen"), k.bind("gen2")

    def remembered(name):
        m = k.bind(name, purpose=2)
        v = auth(m, 0, WANT_KEY | MAINTENANCE)
        m.close()
        return v.seen.generation, v.seen.branch[0], v.seen.mac[0], v.accept

    check(remembered("gen") == (0, 0, 0, 0), "nothing is remembered of a new volume")
    check(tell(vol, seen(5)) == 0 and remembered("gen") == (5, 1, 1, 0), "the first checkpoint is taken as it is")
    check(tell(vol, seen(5)) == 0, "the same one again is no error")
    for s, what in ((seen(4), "an older one"), (seen(5, mac=2), "another one of the same age"),
                    (seen(9, branch=2), "one of another branch"), (seen(1 << 63, branch=2), "... however new")):
        check(tell(vol, s) == -ESTALE and remembered("gen") == (5, 1, 1, 0), "%s is not taken" % what)
    check(tell(vol, seen(8)) == 0 and remembered("gen") == (8, 1, 1, 0), "a newer one is")
    check(remembered("gen2") == (0, 0, 0, 0), "... for this volume only")
    c = k.connect()
    c.send(FS_SEEN, seen(9))
    try:
        c.recv(5)
        check(False, "a control connection cannot tell checkpoints")
    except Closed:
        check(True, "")
    check(k.err(ACCEPT_ROLLBACK, Name(name=b"nobody")) == -ENOENT, "no such volume")
    check(k.err(ACCEPT_ROLLBACK, Name(name=b"gen")) == 0 and "accept-rollback" in k.audit(), "the operator accepts")
    check(remembered("gen") == (8, 1, 1, 1), "... which the next opening is told")
    check(tell(vol, seen(7)) == -ESTALE, "the old branch does not go back even so")
    check(tell(vol, seen(3, branch=2)) == 0 and remembered("gen") == (3, 2, 1, 0), "a new branch ends the acceptance")
    check(tell(vol, seen(4, branch=3)) == -ESTALE, "... once")
    # restart: locked, what comes meanwhile is kept and counts from the unlocking on
    os.kill(k.pid, signal.SIGKILL)
    os.waitpid(k.pid, 0)
    vol.close()
    other.close()
    k.start()
    vol = k.bind("gen")
    check(tell(vol, seen(6, branch=2)) == -ENOKEY, "a locked agent says that it is")
    check(k.secret(UNLOCK, 1, PASS)[0] == 0 and remembered("gen") == (6, 2, 1, 0), "... and remembers after the unlocking")
    # the last checkpoint of a lock
    chan = k.connect()
    chan.send(LOCK)
    check(vol.event()[0] == FS_LOCK and k.status().unlocked == 0, "locking")
    check(tell(vol, seen(7, branch=2)) == 0, "the last checkpoint is remembered while locking")
    vol.send(FS_LOCKED, id=0)
    chan.recv(5)
    check(tell(vol, seen(8, branch=2)) == -ENOKEY, "... and after that none")
    vol.close()
    path = k.state + "/generations"
    whole = open(path, "rb").read()
    for at in (0, 8, 12, 16, 41, 48, 80, len(whole) - 1, -1):
        with open(path, "wb") as f:
            f.write(whole[:-1] if at < 0 else whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        check(k.secret(UNLOCK, 1, PASS)[0] < 0 and k.status().unlocked == 0, "changed at %d: stays locked" % at)
    with open(path, "wb") as f:
        f.write(whole)
    check(k.secret(UNLOCK, 1, PASS)[0] == 0 and remembered("gen") == (7, 2, 1, 0), "whole again: opens")
    check(k.err(VOLUME_RM, Name(name=b"gen")) == 0 and k.add_volume("gen") == 0, "removed and made anew")
    check(remembered("gen") == (0, 0, 0, 0), "a new volume of the name has no past")


def test_lock(k, vol, c):
    check(allowed(auth(vol, c, WANT_KEY)), "before the lock: allowed")
    chan = k.connect()
    id = chan.send(LOCK)
    e = [vol.event(), vol.event()]
    check([x[0] for x in e] == [FS_GRANT_END, FS_LOCK], "lock takes grant and key back")
    check(select.select([chan.sock], [], [], 0.5)[0] == [], "lock waits for the server")
    check(k.status().unlocked == 0, "the agent is locked at once")
    vol.send(FS_LOCKED, id=0)
    kind, i, data, _ = chan.recv(5)
    check(i == id and Reply.from_buffer_copy(data).err == 0, "lock is done when the server has wiped")
    check(denied(auth(vol, c, WANT_KEY), ENOKEY), "a locked keystore decides nothing")
    check(k.err(WHY, Why(name=b"fill", pid=c)) == -ENOKEY, "... nor why")
    check(k.err(VOLUME_GET, Name(name=b"fill")) == -ENOKEY and k.rule(RULE_ADD, "fill", "attached") == -ENOKEY, "... nor shows or changes")
    check(k.secret(UNLOCK, 1, PASS)[0] == 0, "unlock")
    eng = Engine_(k.connect())
    eng.add(X, "first", volume="fill")
    check(allowed(auth(vol, c, WANT_KEY)), "after unlock: allowed again")
    return eng


def test_crash_and_restart(k, vol, c):
    check(len(vol.early) == 0, "nothing is pending")
    os.kill(k.pid, signal.SIGTERM)
    e = drain(vol, 1)
    check([x[0] for x in e] == [FS_GRANT_END, FS_LOCK], "SIGTERM takes everything back")
    vol.send(FS_LOCKED, id=0)
    check(os.waitpid(k.pid, 0)[1] == 0, "... and ends cleanly")
    k.start()
    check(k.status().initialised == 1 and k.status().unlocked == 0, "a new agent finds the keystore, locked")
    vol = k.bind("fill")
    check(denied(auth(vol, c), ENOKEY), "... and decides nothing")
    check(k.secret(UNLOCK, 1, PASS)[0] == 0 and k.err(VOLUME_GET, Name(name=b"fill")) == 0, "... until it is unlocked")
    eng = Engine_(k.connect())
    eng.add(X, "first", volume="fill")
    check(allowed(auth(vol, c, WANT_KEY)), "... and then the container goes on")


def main():
    if len(sys.argv) != 2 or os.geteuid() != 0:
        sys.stderr.write(__doc__)
        return 2
    k, cg = Keyd(sys.argv[1]), Cgroups()
    try:
        check(len(cg.roots) > 0, "this host has a cgroup hierarchy")
        k.start()
        test_start(k)
        test_cage(k)
        test_volumes(k)
        test_malformed(k)
        test_other_user(k)
        eng = Engine_(k.connect())
        vol, _ = test_containers(k, cg, eng)
        test_grant_end(k, cg, vol)
        a, grant = test_rebirth(k, cg, eng, vol)
        test_rules(k, cg, eng, vol, a, grant)
        test_engine_says(k, cg, eng, vol, a)
        test_local(k, cg)
        fill, c = test_engine_fill(k, cg)
        test_cgroup_rule(k, cg)
        vol.close()
        eng = test_lock(k, fill, c)
        test_crash_and_restart(k, fill, c)
        test_generations(k, cg)
        check(k.alive(), "the agent is alive at the end")
    except BaseException as e:
        import traceback
        traceback.print_exc()
        check(False, "the test itself: %r" % e)
    finally:
        log = [l for l in open(k.dir + "/log") if "breaks the protocol" not in l]
        sys.stdout.write("".join("  log: " + l for l in log) if failed else "")
        cg.clean()
        k.clean()
    print("%d passed, %d failed" % (passed, failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
