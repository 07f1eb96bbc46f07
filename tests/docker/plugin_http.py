#!/usr/bin/env python3
"""Talks to the volume plugin's socket as container engines do, and as they do not (DESIGN section 8).

    python3 tests/docker/plugin_http.py [TEST]...       as root; BUILD names the directory of the programs

Starts a cofferd of its own below a temporary directory. Each test is a function test_*; the last line is
"N passed, N failed", and the exit status is 1 if one failed.
"""
import concurrent.futures, contextlib, http.client, json, os, random, re, shutil, signal, socket, subprocess, sys, \
    tempfile, threading, time, traceback

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.path.abspath(os.environ.get("BUILD") or os.path.join(TOP, "build"))
PODMAN_ID = "2f73349cfc4630255319c6c8dfc1b46a8996ace9d14d8e07563b165915918ec2"
SOON = 0.5  # seconds: what "at once" means on a machine that has other work, too
ROOT = ""


# --- cofferd ---

def coffer(*args, ok=True, stdin=None):
    r = subprocess.run([BUILD + "/coffer", "--root", ROOT, *args], input=stdin, stdout=subprocess.PIPE,
                       stderr=subprocess.PIPE, timeout=120)
    if ok and r.returncode:
        raise AssertionError("coffer %s: %s" % (" ".join(args), r.stderr.decode(errors="replace").strip()))
    return r


def up():
    coffer("up", "--engine-root", ROOT + "/no-engine", "--engine-socket", ROOT + "/no-engine.sock")


def processes(*words):
    """pids whose command line begins with these words."""
    found = []
    for p in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open("/proc/%s/cmdline" % p, "rb") as f:
                cmd = f.read().split(b"\0")[:-1]
            if cmd[:len(words)] == [w.encode() for w in words]:
                found.append(int(p))
    return found


def cofferd_pid():
    return processes("cofferd", "--root", ROOT)[0]


def parent(pid):
    with open("/proc/%d/stat" % pid) as f:
        return int(f.read().rsplit(")", 1)[1].split()[1])


def keyd_pid():
    with open(ROOT + "/cofferd.json") as f:
        return json.load(f)["keyd"]["pid"]


def ended(pid):
    try:
        with open("/proc/%d/stat" % pid) as f:
            return f.read().rsplit(")", 1)[1].split()[0] in "ZX"
    except OSError:
        return True


def kill(pid, sig):
    os.kill(pid, sig)
    if sig in (signal.SIGKILL, signal.SIGTERM):
        wait_for(lambda: ended(pid), "the end of %d" % pid)


def wait_for(what, name, seconds=20):
    end = time.time() + seconds
    while time.time() < end:
        if what():
            return
        time.sleep(0.05)
    raise AssertionError("waited in vain for " + name)


def mounted(name):
    with open("/proc/self/mountinfo") as f:
        return any(line.split()[4] == ROOT + "/run/mnt/" + name for line in f)


def inspect(name):
    return json.loads(coffer("volume", "inspect", name, "--json").stdout)["volume"]


@contextlib.contextmanager
def agent_stopped():
    """What every Mount needs does not answer."""
    pid = keyd_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# --- the socket ---

class Plugin(http.client.HTTPConnection):
    def __init__(self, timeout=60):
        super().__init__("plugin", timeout=timeout)

    def connect(self):
        self.sock = raw(self.timeout)


def raw(timeout=10):
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(timeout)
    s.connect(ROOT + "/run/plugin.sock")
    return s


def request(path, body=None, conn=None, method="POST", headers={}):
    """Status and answer. body: bytes as they are, anything else as JSON."""
    c = conn or Plugin()
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    c.request(method, path, body=body, headers={"Content-Type": "application/json", **headers})
    r = c.getresponse()
    text = r.read()
    if not conn:
        c.close()
    try:
        return r.status, json.loads(text)
    except ValueError:
        return r.status, text


def call(what, body=None, **more):
    return request("/VolumeDriver." + what, body, **more)


def good(what, body=None, **more):
    status, answer = call(what, body, **more)
    assert status == 200 and not answer.get("Err"), "%s %.200r: %d %.300r" % (what, body, status, answer)
    return answer


def is_error(status, answer):
    """As engines understand it: status 500 and {"Err": "one line"}."""
    return status == 500 and isinstance(answer, dict) and isinstance(answer.get("Err"), str) and answer["Err"] and \
        "\n" not in answer["Err"] and len(answer["Err"]) < 1000


def refused(what, body, pattern=".", **more):
    status, answer = call(what, body, **more)
    assert is_error(status, answer), "%s %.200r: %d %.300r" % (what, body, status, answer)
    assert re.search(pattern, answer["Err"], re.I), "%s %.200r: another reason: %s" % (what, body, answer["Err"])


def names():
    return [v["Name"] for v in good("List")["Volumes"]]


def directories():
    return sorted(os.listdir(ROOT + "/volumes"))


def create(name, **opts):
    good("Create", {"Name": name, "Opts": {"size": "64M", **opts}})


def alive():
    t = time.time()
    status, _ = request("/Plugin.Activate", b"")
    assert status == 200 and time.time() - t < SOON, "the plugin does not answer any more"


def exchange(data, half_close=True, timeout=10):
    """Raw bytes; what comes back until the connection's end, or b"" when it was just closed."""
    s = raw(timeout)
    out = b""
    with contextlib.suppress(OSError):
        s.sendall(data)
        if half_close:
            s.shutdown(socket.SHUT_WR)
        while True:
            b = s.recv(65536)
            if not b:
                break
            out += b
    s.close()
    return out


# --- the calls ---

def test_activate():
    for body in (None, b"", b"{}", {}, b"rubbish", b"\xff" * 100):
        status, answer = request("/Plugin.Activate", body)
        assert status == 200 and answer["Implements"] == ["VolumeDriver"], answer
        assert good("Capabilities", body)["Capabilities"] == {"Scope": "local"}
        assert isinstance(good("List", body)["Volumes"], list)


def test_unknown_paths():
    for path in ("/", "/VolumeDriver.Nonsense", "/VolumeDriver.", "/VolumeDriver.Get/", "/volumedriver.get", "/Plugin",
                 "//VolumeDriver.Get", "/VolumeDriver.Get/../VolumeDriver.List", "/%00", "/" + "x" * 3000):
        status, answer = request(path, {"Name": "x"})
        assert status == 404 and isinstance(answer, dict) and answer.get("Err"), "%s: %d %r" % (path, status, answer)
    alive()


def test_get_list_path():
    before = time.time()
    create("described", allow="container:web;label:a=b,ro", uid="7", gid="8", mode="0711")
    for v in (good("Get", {"Name": "described"})["Volume"],
              [v for v in good("List")["Volumes"] if v["Name"] == "described"][0]):
        assert v["Mountpoint"] == ROOT + "/run/mnt/described", v
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", v["CreatedAt"]), v["CreatedAt"]
        made = time.mktime(time.strptime(v["CreatedAt"], "%Y-%m-%dT%H:%M:%SZ")) - time.timezone
        assert before - 2 <= made <= time.time() + 1, v["CreatedAt"]
        s = v["Status"]
        assert s["state"] == "locked" and s["size"] == 64 << 20 and "xchacha20" in s["cipher"], s
        assert [r["rule"] for r in s["rules"]] == ["container:web", "label:a=b,ro"], s
    assert good("Path", {"Name": "described"})["Mountpoint"] == ROOT + "/run/mnt/described"
    assert not mounted("described")
    for what in ("Get", "Path", "Mount", "Remove"):
        refused(what, {"Name": "no-such", "ID": "x"}, "no such volume")
    good("Remove", {"Name": "described"})
    refused("Get", {"Name": "described"}, "no such volume")
    refused("Remove", {"Name": "described"}, "no such volume")


def test_create_idempotent():
    n = len(directories())
    opts = {"size": "64M", "block": "8k", "profile": "database", "allow": "container:a;image:b", "mode": "750"}
    for again in (opts, opts, dict(reversed(list(opts.items()))), {**opts, "size": "67108864"},
                  {**opts, "mode": "0750", "allow": "image:b;container:a"}):
        good("Create", {"Name": "same", "Opts": again})
    for other in ({**opts, "size": "65M"}, {**opts, "block": "4k"}, {**opts, "profile": "general"}, {**opts, "uid": "1"},
                  {**opts, "allow": "container:a"}, {**opts, "strict": "true"}, {k: opts[k] for k in opts if k != "mode"}):
        refused("Create", {"Name": "same", "Opts": other}, "exists already with other options")
    assert len(directories()) == n + 1
    # An engine asks again after a connection broke; then all at once.
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for f in [pool.submit(create, "together") for _ in range(8)]:
            f.result()
    assert len(directories()) == n + 2 and names().count("together") == 1
    for name in ("same", "together"):
        good("Remove", {"Name": name})
    for opts in (None, {}, "absent"):
        body = {"Name": "plain"} if opts == "absent" else {"Name": "plain", "Opts": opts}
        good("Create", body)
    good("Remove", {"Name": "plain"})
    assert len(directories()) == n


def test_options():
    before = names(), directories()
    for bad in ({"size": "0"}, {"size": "x"}, {"size": "-1"}, {"size": ""}, {"size": "1K"}, {"size": "17T"}, {"size": 1},
                {"size": "99999999999999999999"}, {"size": "1G2"}, {"block": "5k"}, {"block": "64k"}, {"block": ""},
                {"profile": "fast"}, {"profile": ""}, {"uid": "-1"}, {"uid": "4294967295"}, {"uid": "root"}, {"gid": "1x"},
                {"mode": "888"}, {"mode": "17777"}, {"mode": "rwx"}, {"strict": "maybe"}, {"allow": ""}, {"allow": ";"},
                {"allow": "colour:blue"}, {"allow": "container:"}, {"deny": "ro"}, {"allow": "uid:x"}, {"nonsense": "1"},
                {"SIZE": "1G"}, {"": "x"}, {"allow": "label:" + "x" * 600}, {"allow": ";".join("uid:%d" % i for i in range(40))},
                {"size": None}, {"size": ["1G"]}, {"size": {"a": "b"}}, {"strict": True}, {"o" * 60000: "x"},
                {"size": "1\n"}, {"allow": "container:a\nb"}):
        refused("Create", {"Name": "bad", "Opts": bad})
    for bad in ([], "size=1G", 1, True):
        refused("Create", {"Name": "bad", "Opts": bad})
    assert (names(), directories()) == before


# --- names and rubbish ---

BAD_NAMES = ["", ".", "..", "../x", "a/b", "/abs", ".hidden", "-x", "_x", "a b", "a\tb", "a\nb", "a\\b", "a:b", "a%2fb", "*",
             "$(x)", "ä", "\u202e", "\ud83d\ude00", "a\u0000b", "\u0000", "x" * 129, "x" * 65536, "a" * 200000]


def test_names():
    before = names(), directories()
    longest = "L" + "o" * 126 + "g"
    for name in ("a", "0", "A.b_c-D", longest):
        create(name)
        assert good("Get", {"Name": name})["Volume"]["Name"] == name
        good("Remove", {"Name": name})
    for name in BAD_NAMES:
        for what in ("Create", "Get", "Mount", "Path", "Remove"):
            refused(what, {"Name": name, "ID": "1"})
        status, answer = call("Unmount", {"Name": name, "ID": "1"})
        assert (status == 200 and not answer["Err"]) or is_error(status, answer), answer
    for text in (b'{"Name":"a\xff"}', b'{"Name":"\xc0\xaf"}', b'{"Name":"\xed\xa0\x80"}', b'{"Name":"a\0b"}', b'{"Name":"\\ud800"}'):
        for what in ("Create", "Get", "Mount", "Path", "Remove"):
            refused(what, text)
    for name in (None, 1, [], {}, True, 1.5):
        for what in ("Create", "Get", "Mount", "Path", "Remove", "Unmount"):
            refused(what, {"Name": name, "ID": "1"})
    assert (names(), directories()) == before
    assert sorted(os.listdir(ROOT + "/run/mnt")) == []


RUBBISH = [b"{", b"[]", b"null", b"1", b'"Name"', b"{}", b'{"Name"}', b'{"Name":"x"', b'{"Name":"x"}}', b'{"Name":"x"} {}',
           b'{"Name":"x","Name":"y"}', b"\0", b"\xff\xfe", b"[" * 100000, b'{"a":' * 50000, b'{"Name":"x","Opts":' + b"[" * 1000,
           b'{"Name":"' + b"x" * 300000, b"<xml/>", b"Name=x", b'{"Name":"\\u12"}', b"{'Name':'x'}", b'{"Name":NaN}']


def test_rubbish_bodies():
    before = names(), directories()
    for what in ("Create", "Remove", "Mount", "Unmount", "Path", "Get"):
        for body in [b"", None] + RUBBISH:
            refused(what, body)
    rnd = random.Random(1)
    base = json.dumps({"Name": "fuzz", "ID": "1", "Opts": {"size": "64M"}}).encode()
    for _ in range(300):
        b = bytearray(base)
        for _ in range(rnd.randint(1, 4)):
            at = rnd.randrange(len(b))
            if rnd.random() < 0.5:
                b[at] = rnd.randrange(256)
            else:
                del b[at:at + rnd.randint(1, 5)]
        what = rnd.choice(("Get", "Mount", "Path"))
        status, answer = call(what, bytes(b))
        assert is_error(status, answer), "%s %r: %d %r" % (what, bytes(b), status, answer)
    assert (names(), directories()) == before


def test_oversize():
    for n in (1 << 20, (1 << 20) + 1, 8 << 20):
        status, answer = 0, None
        with contextlib.suppress(OSError, http.client.HTTPException):
            status, answer = call("Create", b'{"Name":"' + b"x" * n + b'"}')
        assert status == 0 or is_error(status, answer), (n, status, answer)
        alive()
    # A length that is announced and never sent holds nothing up.
    socks = []
    for _ in range(20):
        s = raw()
        s.sendall(b"POST /VolumeDriver.Create HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000000\r\n\r\n{")
        socks.append(s)
    alive()
    for s in socks:
        s.close()
    with open("/proc/%d/status" % cofferd_pid()) as f:
        kb = int(re.search(r"VmRSS:\s*(\d+)", f.read()).group(1))
    assert kb < 200 << 10, "cofferd has %d KiB" % kb


def test_broken_http():
    before = names(), directories()
    body = b'{"Name":"broken","Opts":{"size":"64M"}}'
    head = b"POST /VolumeDriver.Create HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    broken = [b"", b"\r\n\r\n", b"\0" * 100, b"GET", b"POST /VolumeDriver.Create", b"POST /VolumeDriver.Create HTTP/1.1\r\n",
              b"POST /VolumeDriver.Create HTTP/1.1\r\nHost: x\r\n", head % len(body) + body[:10], head % (len(body) + 1) + body,
              head % 10 + body[:5], b"POST /VolumeDriver.Create HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
              b"POST /VolumeDriver.Create HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n" + body,
              b"POST /VolumeDriver.Create HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n" + body,
              b"POST /VolumeDriver.Create HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n" + body,
              b"POST /VolumeDriver.Create HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + body,
              b"POST /VolumeDriver.Create HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" + body,
              b"POST /VolumeDriver.Create HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n27\r\n" + body[:20],
              b"POST /VolumeDriver.Create HTTP/1.1\r\n" + b"X: y\r\n" * 20000 + b"\r\n" + body,
              b"POST /VolumeDriver.Create HTTP/1.1\r\nX: " + b"y" * 200000 + b"\r\n\r\n",
              b"P" * 100000, b"POST /" + b"a" * 100000 + b" HTTP/1.1\r\n\r\n"]
    rnd = random.Random(2)
    broken += [bytes(rnd.randrange(256) for _ in range(rnd.randint(1, 400))) for _ in range(50)]
    for data in broken:
        for half in (True, False):
            out = exchange(data, half, 0.3)
            assert not re.match(rb"HTTP/1\.. 200", out), "%r was answered with %r" % (data[:120], out[:200])
    # Hung up at each byte.
    whole = head % len(body) + body
    for n in range(0, len(whole), 5):
        s = raw()
        s.sendall(whole[:n])
        s.close()
    alive()
    assert (names(), directories()) == before


def test_http_forms():
    """Any Host, Accept and Content-Type, chunks, HTTP/1.0, no Host at all."""
    for headers in ({"Host": ""}, {"Host": "%2Frun%2Fdocker%2Fplugins%2Fcoffer.sock"}, {"Host": "a/b c"}, {"Host": "x:99999"},
                    {"Host": "x" * 300}, {"Accept": ""}, {"Accept": "text/html"}, {"Accept": "application/vnd.docker.plugins.v1.2+json"},
                    {"Content-Type": ""}, {"Content-Type": "text/plain; charset=latin1"}, {"Content-Type": "multipart/form-data"},
                    {"Accept-Encoding": "gzip"}, {"User-Agent": "Go-http-client/1.1"}, {"Connection": "close"}, {"Expect": "100-continue"},
                    {"Authorization": "Basic eDp5"}, {"X-Forwarded-For": "::1"}):
        status, answer = call("List", {}, headers=headers)
        assert status == 200 and answer["Err"] == "", (headers, status, answer)
    for method in ("POST", "GET", "PUT"):
        assert call("List", None, method=method)[0] == 200, method
    body = b'{"Name":"no-such"}'
    for form in (b"POST /VolumeDriver.Get HTTP/1.1\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body,
                 b"POST /VolumeDriver.Get HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
                 b"POST /VolumeDriver.Get?x=y HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
                 b"POST /VolumeDriver.Get HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
                 b"8\r\n" + body[:8] + b"\r\n%x\r\n" % (len(body) - 8) + body[8:] + b"\r\n0\r\n\r\n"):
        out = exchange(form)
        assert b" 500 " in out.split(b"\r\n")[0] and b"no such volume: no-such" in out, out


def test_keep_alive():
    c = Plugin()
    c.connect()
    sock = c.sock
    for i in range(200):
        if i % 3 == 0:
            refused("Get", {"Name": "no-such"}, conn=c)  # an error does not end the connection
        else:
            good("List", conn=c)
        assert c.sock is sock, "the connection was closed after request %d" % i
    c.close()
    # Two requests sent at once on one connection.
    one = b"POST /VolumeDriver.List HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
    out = exchange(one + one.replace(b"Host", b"Connection: close\r\nHost"))
    assert out.count(b"200 OK") == 2, out


def test_slow_clients():
    body = b'{"Name":"no-such"}'
    data = b"POST /VolumeDriver.Get HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    idle = [raw() for _ in range(100)]
    for s in idle[:50]:
        s.sendall(data[:60])
    s = raw()
    for i in range(len(data)):
        s.sendall(data[i:i + 1])
        time.sleep(0.01)
        if i % 40 == 0:
            alive()
    out = b""
    while True:
        b = s.recv(65536)
        if not b:
            break
        out += b
    assert b"no such volume" in out, out
    for x in idle:
        x.close()
    # One that does not read its answers.
    deaf = raw()
    deaf.settimeout(0.5)
    with contextlib.suppress(OSError):
        for _ in range(2000):
            deaf.sendall(b"POST /VolumeDriver.List HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}" * 20)
    alive()
    deaf.close()


# --- mounting ---

def test_half_open():
    """As many connections as there may be, which say nothing or half a request, do not keep others out for long; one
    that has asked and is answered may idle."""
    idle = Plugin()
    assert request("/Plugin.Activate", b"", conn=idle)[0] == 200
    half = []
    end = time.time() + 5
    while len(half) < 511 and time.time() < end:  # the socket's queue is short: some have to try again
        with contextlib.suppress(OSError):
            s = raw(1)
            half.append(s)
            if len(half) % 2:
                s.send(b"POST /VolumeDriver.List HTTP/1.1\r\nContent-Length: 20\r\n\r\n{")
    assert len(half) > 400, len(half)
    t = time.time()
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException, AssertionError):
            alive()
            break
        assert time.time() - t < 25, "others are kept out"
        time.sleep(0.5)
    wait_for(lambda: all(closed(s) for s in half), "the end of half-open connections", 25)
    assert request("/Plugin.Activate", b"", conn=idle)[0] == 200
    for s in half:
        s.close()


def closed(s):
    s.settimeout(0)
    try:
        return s.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def mount(name, mount_id, **more):
    return good("Mount", {"Name": name, "ID": mount_id}, **more)["Mountpoint"]


def unmount(name, mount_id):
    good("Unmount", {"Name": name, "ID": mount_id})


def test_mount():
    create("m")
    assert mount("m", "id-1") == ROOT + "/run/mnt/m" and mounted("m")
    v = inspect("m")
    assert v["mounted"] and not v["unlocked"] and v["holders"] == 1, v
    refused("Remove", {"Name": "m"}, "in use")
    mount("m", "id-2")
    unmount("m", "no-such-id")
    unmount("m", "id-1")
    assert mounted("m") and inspect("m")["holders"] == 1
    unmount("m", "id-1")  # again
    assert mounted("m")
    unmount("m", "id-2")
    assert not mounted("m") and not os.path.exists(ROOT + "/run/mnt/m") and inspect("m")["holders"] == 0
    assert not processes("coffer-fs", "serve", "m"), "coffer-fs lives on"
    unmount("m", "id-2")
    unmount("no-such-volume", "id-2")
    # The same ID twice (docker cp into a running container): counted.
    mount("m", "id-3")
    mount("m", "id-3")
    unmount("m", "id-3")
    assert mounted("m")
    unmount("m", "id-3")
    assert not mounted("m")
    for bad in ({"Name": "m"}, {"Name": "m", "ID": None}, {"Name": "m", "ID": 1}, {"Name": "m", "ID": "x" * 65536},
                {"Name": "m", "ID": "a\u0000b"}, {"ID": "x"}):
        refused("Mount", bad)
    assert not mounted("m")
    # Opaque: any text is an ID.
    for mount_id in ("", "/", "../..", "ä\U0001f600", "a b\n\"'", "x" * 1024):
        mount("m", mount_id)
        assert mounted("m")
        unmount("m", mount_id)
        assert not mounted("m"), mount_id
    # All at once.
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: mount("m", "p%d" % i), range(16)))
        assert mounted("m") and inspect("m")["holders"] == 16
        list(pool.map(lambda i: unmount("m", "p%d" % i), range(16)))
    assert not mounted("m")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: (mount("m", "q%d" % i), unmount("m", "q%d" % i)), range(24)))
    assert not mounted("m") and inspect("m")["holders"] == 0
    good("Remove", {"Name": "m"})
    assert not names().count("m")


def test_mount_and_away():
    """A client that ends as soon as it has its answer (Podman) keeps its mount, in whatever pieces it asked."""
    create("away")
    body = json.dumps({"Name": "away", "ID": "a"}).encode()
    head = b"POST /VolumeDriver.Mount HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    for n in range(60):
        s = raw()
        for piece in ([head + body], [head, body], [head[:30], head[30:] + body[:5], body[5:]])[n % 3]:
            s.sendall(piece)
        out = b""
        while b"}" not in out:
            out += s.recv(65536)
        s.close()
        assert b" 200 " in out and out.endswith(b"}"), out
    time.sleep(0.3)
    assert inspect("away")["holders"] == 60
    for n in range(60):
        assert mounted("away")
        unmount("away", "a")
    assert not mounted("away")
    good("Remove", {"Name": "away"})


def in_process(fn):
    """Runs fn in a process of its own, which is dead afterwards: another engine."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            fn()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0, "a process of the test failed"


def test_dead_engines():
    create("dead")
    # dockerd was killed: no Unmount came, and the same ID is mounted again by the next one.
    for _ in range(3):
        in_process(lambda: mount("dead", "container-1"))
    mount("dead", "container-1")
    assert inspect("dead")["holders"] == 1
    unmount("dead", "container-1")
    assert not mounted("dead")
    # Podman: each command is a process, all with one ID; each counts.
    for n in range(3):
        in_process(lambda: mount("dead", PODMAN_ID))
        assert inspect("dead")["holders"] == n + 1
    for n in range(2, -1, -1):
        in_process(lambda: unmount("dead", PODMAN_ID))
        assert mounted("dead") == (n > 0)
    good("Remove", {"Name": "dead"})


def test_answers_while_mount_hangs():
    create("hang")
    create("idle")
    mount("idle", "i")
    result, slowest = [], 0.0
    with agent_stopped():
        t = threading.Thread(target=lambda: result.append(call("Mount", {"Name": "hang", "ID": "h"})))
        t.start()
        time.sleep(0.3)
        for _ in range(30):
            for what, body in (("Get", {"Name": "hang"}), ("Path", {"Name": "hang"}), ("List", {}), ("Get", {"Name": "idle"}),
                               ("Capabilities", {})):
                start = time.time()
                good(what, body)
                slowest = max(slowest, time.time() - start)
        assert not result, "the Mount did not hang: %r" % result
    assert slowest < SOON, "the slowest answer took %.3f s" % slowest
    t.join(30)
    assert result and result[0][0] == 200, result
    unmount("hang", "h")
    # The engine itself hangs up after a time; the Mount ends by itself, with an error.
    with agent_stopped():
        start = time.time()
        refused("Mount", {"Name": "hang", "ID": "h2"})
        assert time.time() - start < 40
    unmount("idle", "i")
    for name in ("hang", "idle"):
        assert not mounted(name)
        good("Remove", {"Name": name})


def test_hang_up_during_mount():
    create("rolled")
    data = json.dumps({"Name": "rolled", "ID": "gone"}).encode()
    data = b"POST /VolumeDriver.Mount HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data
    for shut in (True, False):
        with agent_stopped():
            s = raw()
            s.sendall(data)
            time.sleep(0.3)
            if shut:
                s.shutdown(socket.SHUT_RDWR)
            s.close()
        wait_for(lambda: inspect("rolled")["holders"] == 0 and not mounted("rolled"), "the roll-back")
        time.sleep(0.5)
        assert inspect("rolled")["holders"] == 0 and not mounted("rolled")
    # One that another holds stays.
    mount("rolled", "other")
    with agent_stopped():
        s = raw()
        s.sendall(data)
        time.sleep(0.3)
        s.close()
    time.sleep(1)
    wait_for(lambda: inspect("rolled")["holders"] == 1, "the roll-back")
    assert mounted("rolled")
    unmount("rolled", "other")
    assert not mounted("rolled")
    good("Remove", {"Name": "rolled"})


def test_locked():
    create("closed")
    coffer("lock")
    refused("Mount", {"Name": "closed", "ID": "1"}, "locked.*coffer unlock")
    refused("Create", {"Name": "new"}, "locked.*coffer unlock")
    refused("Remove", {"Name": "closed"}, "locked.*coffer unlock")
    assert good("Get", {"Name": "closed"})["Volume"]["Status"]["state"] == "locked"
    assert "closed" in names() and not mounted("closed")
    unmount("closed", "1")
    coffer("unlock", "--key-file", ROOT + "/key")
    # The agent dies: still known, refused, and good again after an unlock.
    kill(keyd_pid(), signal.SIGKILL)
    good("Get", {"Name": "closed"})
    wait_for(lambda: b'"agent":true' in coffer("status", "--json").stdout, "the agent")
    refused("Mount", {"Name": "closed", "ID": "1"}, "locked.*coffer unlock")
    coffer("unlock", "--key-file", ROOT + "/key")
    mount("closed", "1")
    unmount("closed", "1")
    good("Remove", {"Name": "closed"})


def test_server_dies():
    create("served")
    mount("served", "1")
    pid = processes("coffer-fs", "serve", "served")[0]
    kill(pid, signal.SIGKILL)
    wait_for(lambda: [p for p in processes("coffer-fs", "serve", "served") if p != pid] and mounted("served"), "another server")
    assert inspect("served")["holders"] == 1
    unmount("served", "1")
    assert not mounted("served")
    good("Remove", {"Name": "served"})


def test_restart():
    opts = {"size": "64M", "block": "8k", "allow": "container:a"}
    good("Create", {"Name": "kept", "Opts": opts})
    create("kept-too")
    mount("kept", "x")
    mount("kept", "y")
    mount("kept", "y")
    known = good("List")["Volumes"]
    for sig in (signal.SIGKILL, signal.SIGTERM):
        kill(cofferd_pid(), sig)
        with open(ROOT + "/cofferd.json") as f:
            json.load(f)
        up()
        again = good("List")["Volumes"]
        for v in known + again:
            v["Status"].pop("state")
        assert again == known, (known, again)
        known = good("List")["Volumes"]
        assert mounted("kept") and inspect("kept")["holders"] == 3, inspect("kept")
        good("Create", {"Name": "kept", "Opts": opts})
        refused("Create", {"Name": "kept", "Opts": {**opts, "block": "4k"}}, "other options")
        refused("Remove", {"Name": "kept"}, "in use")
    mount("kept", "z")
    for mount_id in ("x", "y", "y", "z"):
        assert mounted("kept")
        unmount("kept", mount_id)
    assert not mounted("kept")
    wait_for(lambda: not processes("coffer-fs", "serve", "kept"), "the server's end")
    mount("kept", "x")
    unmount("kept", "x")
    coffer("volume", "check", "kept")
    # Killed in the middle of many changes.
    for n in range(4):
        done = []

        def churn():
            with contextlib.suppress(Exception):
                for i in range(100):
                    create("churn%d-%d" % (n, i))
                    done.append("churn%d-%d" % (n, i))
        t = threading.Thread(target=churn)
        t.start()
        time.sleep(0.2 + 0.13 * n)
        kill(cofferd_pid(), signal.SIGKILL)
        t.join()
        up()
        there = names()
        assert set(done) <= set(there), "a volume is lost: %r, %r" % (done, there)
        # Docker repeats what broke off: then it is whole.
        create("churn%d-%d" % (n, len(done)))
        for name in names():
            if name.startswith("churn"):
                coffer("volume", "check", name)
                good("Remove", {"Name": name})
    for name in ("kept", "kept-too"):
        good("Remove", {"Name": name})
    assert directories() == [], directories()


# --- running them ---

def start():
    global ROOT
    ROOT = os.path.realpath(tempfile.mkdtemp(prefix="coffer-http.", dir="/tmp"))
    with open(ROOT + "/key", "wb") as f:
        os.fchmod(f.fileno(), 0o600)
        f.write(os.urandom(64))
    up()
    coffer("init", "--key-file", ROOT + "/key")


def stop():
    with contextlib.suppress(Exception):
        os.kill(keyd_pid(), signal.SIGCONT)
    coffer("down", "--force", ok=False)
    for p in processes("cofferd", "--root", ROOT):
        os.kill(p, signal.SIGKILL)
    with open("/proc/self/mountinfo") as f:
        points = [line.split()[4] for line in f]
    for p in reversed([p for p in points if p.startswith(ROOT + "/")]):
        subprocess.run(["umount", "-l", p])
    shutil.rmtree(ROOT)


def main():
    tests = [(n, f) for n, f in globals().items() if n.startswith("test_")]
    if len(sys.argv) > 1:
        tests = [(n, f) for n, f in tests if n in sys.argv[1:] or n[5:] in sys.argv[1:]]
    if os.geteuid() != 0:
        sys.exit("plugin_http.py: root is needed")
    failed = 0
    start()
    try:
        for name, fn in tests:
            t = time.time()
            try:
                fn()
                print("ok %s (%.1f s)" % (name[5:], time.time() - t), flush=True)
            except Exception as e:
                failed += 1
                where = traceback.extract_tb(e.__traceback__)
                print("FAIL %s, line %s: %s: %.1000s" % (name[5:], ", ".join(str(f.lineno) for f in where),
                                                       type(e).__name__, e), flush=True)
                with contextlib.suppress(Exception):  # the next ones find an empty table
                    for v in names():
                        coffer("volume", "rm", v, ok=False)
        if failed:
            with open(ROOT + "/cofferd.log") as f:
                print("--- end of cofferd.log\n" + "".join(f.readlines()[-25:]))
    finally:
        stop()
    print("%d passed, %d failed" % (len(tests) - failed, failed))
    return 1 if failed or not tests else 0


if __name__ == "__main__":
    sys.exit(main())
