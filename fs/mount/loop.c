/*
 * loop.c - reads requests from the device and hands them to libfuse.
 *
 * A fixed number of threads, one of which leads (lead.c): it reads, spinning for SPIN_NS after a request before it sleeps,
 * since falling asleep and being woken costs more than most requests (DESIGN section 5). What seldom waits it serves itself.
 *
 * Invariants:
 *  1. A request's bytes stay in its thread's `in` until it is answered; the answer is made in `out`.
 *  2. What libfuse 3.14 does not know is translated before it sees the request (TMPFILE is a CREATE with a flag), and after it
 *     has answered (INIT): with FUSE_HANDLE_KILLPRIV_V2 the kernel no longer asks for security.capability before every
 *     write, and tells when set-id bits are to end.
 */
#include "mount.h"

#include "coffer/store.h"
#include "lead.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#define THREADS     8
#define IN_BYTES    (MOUNT_IO_MAX + 65536)
#define SPIN_NS     40000
#define INIT_WAIT_S 10

/* The kernel's protocol (linux/fuse.h), as far as it is looked at here. */
struct in_header {
    uint32_t len, opcode;
    uint64_t unique, nodeid;
    uint32_t uid, gid, pid;
    uint16_t total_extlen, padding;
};
_Static_assert(sizeof(struct in_header) == 40, "fuse_in_header");

struct in_read {
    uint64_t fh, offset;
    uint32_t size;
};

struct in_write {
    uint64_t fh, offset;
    uint32_t size, write_flags;
};

struct in_setattr {
    uint32_t valid;
};

struct in_open {
    uint32_t flags, open_flags;
};

#define OPCODE_SETATTR 4
#define OPCODE_OPEN    14
#define OPCODE_READ    15
#define OPCODE_WRITE   16
#define OPCODE_INIT    26
#define OPCODE_CREATE  35
#define OPCODE_TMPFILE 51
#define WRITE_KILL     (1u << 2)
#define SETATTR_KILL   (1u << 11)
#define OPEN_KILL      (1u << 0)
#define INIT_KILLPRIV  (1u << 28)
#define INIT2_RESEND   (1u << 7) /* FUSE_HAS_RESEND: it can send requests again, and marks them with ... */
#define UNIQUE_RESENT  (1ull << 63)
#define UNIQUE_INIT    (UNIQUE_RESENT - 2) /* no request's: they are counted up from 2 */
#define NOTIFY_RESEND  7

static struct fuse_session *session;
static void (*on_end)(void);
static atomic_bool ended, stopping;
static atomic_uint running; /* threads */
static int wake_fd = -1;    /* readable when stopping */
static _Thread_local struct loop_request request;
static bool killpriv;
static struct server_init init; /* as the kernel sent it, with the flags of the answer */

struct loop_request *loop_request(void)
{
    return &request;
}

bool loop_kills_suidgid(void)
{
    return killpriv;
}

struct fuse_session *loop_session(void)
{
    char *argv[] = {"coffer-fs", NULL};
    struct fuse_args args = FUSE_ARGS_INIT(1, argv);

    if (!session) {
        session = fuse_session_new(&args, &adapter_ops, sizeof(adapter_ops), NULL);
        fuse_opt_free_args(&args);
    }
    return session;
}

static void translate(uint8_t *in, size_t n)
{
    struct in_header h;
    union {
        struct in_write write;
        struct in_setattr setattr;
        struct in_open open;
        struct server_init init; /* the answer begins the same */
    } u = {0};

    memcpy(&h, in, sizeof(h));
    memcpy(&u, in + sizeof(h), MIN(n - sizeof(h), sizeof(u)));
    request.opcode = h.opcode;
    request.resent = h.unique & UNIQUE_RESENT;
    vol_request(h.unique & ~UNIQUE_RESENT);
    request.kill_suidgid = false;
    request.tmpfile = false;
    switch (h.opcode) {
    case OPCODE_TMPFILE:
        request.tmpfile = true;
        h.opcode = OPCODE_CREATE;
        memcpy(in, &h, sizeof(h));
        break;
    case OPCODE_WRITE:
        request.kill_suidgid = u.write.write_flags & WRITE_KILL;
        break;
    case OPCODE_SETATTR:
        request.kill_suidgid = u.setattr.valid & SETATTR_KILL;
        break;
    case OPCODE_OPEN:
        request.kill_suidgid = u.open.open_flags & OPEN_KILL;
        break;
    case OPCODE_INIT:
        killpriv = u.init.flags & INIT_KILLPRIV;
        init = u.init;
        break;
    }
}

/* Every answer and notification passes here. */
static ssize_t send_answer(int fd, struct iovec *iov, int count, void *userdata)
{
    (void)userdata;
    if (request.opcode == OPCODE_INIT && count == 2 && iov[1].iov_len >= sizeof(uint32_t) * 4) {
        uint8_t *at = (uint8_t *)iov[1].iov_base + offsetof(struct server_init, flags);

        memcpy(&init.flags, at, sizeof(init.flags));
        init.flags |= killpriv ? INIT_KILLPRIV : 0;
        memcpy(at, &init.flags, sizeof(init.flags));
        if (mount_config.takeover) /* nobody has asked */
            return (ssize_t)(iov[0].iov_len + iov[1].iov_len);
    }
    return writev(fd, iov, count);
}

static ssize_t no_read(int fd, void *buf, size_t n, void *userdata)
{
    (void)fd, (void)buf, (void)n, (void)userdata;
    errno = EIO; /* libfuse is handed what we read */
    return -1;
}

/* Reads one request. Its length; 0: there is none; -errno: the mount is gone. */
static ssize_t read_one(uint8_t *in)
{
    ssize_t n = read(SERVER_FD_FUSE, in, IN_BYTES);

    if (n < 0)
        return errno == EAGAIN || errno == EINTR || errno == ENOENT ? 0 : -errno;
    if ((size_t)n < sizeof(struct in_header))
        return n == 0 ? -ENODEV : -EIO;
    translate(in, (size_t)n);
    return n;
}

static void process(uint8_t *in, size_t n)
{
    struct fuse_buf buf = {.mem = in, .size = n};

    fuse_session_process_buf(session, &buf);
}

/* The leader's wait: spins for a while after a request, then sleeps. */
static ssize_t next_request(uint8_t *in, bool spin)
{
    int64_t until = mono_ns() + (spin ? SPIN_NS : 0);
    ssize_t n;

    for (;;) {
        struct pollfd p[2] = {{.fd = SERVER_FD_FUSE, .events = POLLIN}, {.fd = wake_fd, .events = POLLIN}};

        n = atomic_load(&stopping) ? -ESHUTDOWN : atomic_load(&ended) ? -ENODEV : read_one(in);
        if (n != 0)
            return n;
        if (mono_ns() < until)
            sched_yield(); /* to whom the disk has answered: it would wait for our slice to end */
        else if (poll(p, 2, -1) < 0 && errno != EINTR)
            return -errno;
    }
}

/* FORGET, READ, WRITE, STATFS, RELEASE, FLUSH, RELEASEDIR, INTERRUPT, BATCH_FORGET: decided when the handle was opened, or the
 * kernel's own. */
#define BY_HANDLE (BIT(2) | BIT(15) | BIT(16) | BIT(17) | BIT(18) | BIT(25) | BIT(29) | BIT(36) | BIT(42))
/* FSYNC, FSYNCDIR, FALLOCATE, COPY_FILE_RANGE, SYNCFS: they wait for the disk. */
#define BLOCKING  (BIT(20) | BIT(30) | BIT(43) | BIT(47) | BIT(50))
#define BIT(n)    (1ull << (n))

/* A small write goes into memory, a small read comes from there or the lead is passed on; large ones are for two cores. */
#define SMALL_WRITE (40u << 10)
#define SMALL_READ  (32u << 10)

static _Thread_local unsigned thread;

static void pass_lead(void)
{
    lead_pass(thread);
}

static bool served_by_leader(const uint8_t *in, size_t n)
{
    struct in_header h;
    struct in_read r;

    memcpy(&h, in, sizeof(h));
    if (h.opcode == OPCODE_READ && n >= sizeof(h) + sizeof(r)) {
        memcpy(&r, in + sizeof(h), sizeof(r));
        if (r.size > SMALL_READ)
            return false;
    }
    if (h.opcode >= 64 || (BLOCKING & BIT(h.opcode)) || n > SMALL_WRITE)
        return false;
    return adapter_ready((pid_t)h.pid, h.uid, BY_HANDLE & BIT(h.opcode));
}

static void *serve(void *arg)
{
    unsigned self = (unsigned)(uintptr_t)arg;
    uint8_t *in = NULL;
    ssize_t n = 0;

    request.out = NULL;
    thread = self;
    if (posix_memalign((void **)&in, 4096, IN_BYTES) || posix_memalign((void **)&request.out, 4096, MOUNT_IO_MAX))
        abort();
    while (n >= 0) {
        bool lead = true;

        lead_wait(self);
        for (bool spin = false; lead; spin = true) {
            n = next_request(in, spin);
            lead = n > 0 && served_by_leader(in, (size_t)n);
            if (lead) {
                lead_serving();
                store_before_wait = pass_lead;
                process(in, (size_t)n);
                store_before_wait = NULL;
                lead = lead_served(self);
                n = 0;
            }
        }
        lead_pass(self);
        if (n > 0)
            process(in, (size_t)n);
        if (n >= 0 && fuse_session_exited(session))
            n = -ENODEV;
    }
    free(in);
    free(request.out);
    if (n != -ESHUTDOWN && !atomic_exchange(&ended, true))
        on_end();
    running--;
    return NULL;
}

/* The mount's first request is FUSE_INIT: answered before anything else is read. A later server is told what it was. */
static ssize_t read_init(uint8_t *in)
{
    struct in_header h = {.len = sizeof(h) + sizeof(init), .opcode = OPCODE_INIT, .unique = UNIQUE_INIT};
    struct pollfd p = {.fd = SERVER_FD_FUSE, .events = POLLIN};

    if (!mount_config.takeover)
        return poll(&p, 1, INIT_WAIT_S * 1000) == 1 ? read_one(in) : -ETIMEDOUT;
    memcpy(in, &h, sizeof(h));
    memcpy(in + sizeof(h), &mount_config.init, sizeof(init));
    translate(in, h.len);
    return h.len;
}

int loop_init(struct fuse_session *se, const struct server_init **ret_init)
{
    static const struct fuse_custom_io io = {.writev = send_answer, .read = no_read};
    uint8_t *in = NULL;
    ssize_t n;
    int rc;

    rc = fuse_session_custom_io(se, &io, SERVER_FD_FUSE);
    if (rc != 0)
        return rc < 0 ? rc : -EINVAL;
    fcntl(SERVER_FD_FUSE, F_SETFL, fcntl(SERVER_FD_FUSE, F_GETFL) | O_NONBLOCK);
    if (posix_memalign((void **)&in, 4096, IN_BYTES))
        abort();
    n = read_init(in);
    if (n > 0)
        process(in, (size_t)n);
    free(in);
    vol_request(0);
    *ret_init = init.flags2 & INIT2_RESEND ? &init : NULL;
    return n > 0 ? 0 : n < 0 ? (int)n : -EAGAIN;
}

int loop_resend(void)
{
    const struct out_header {
        uint32_t len;
        int32_t error;
        uint64_t unique;
    } h = {.len = sizeof(h), .error = NOTIFY_RESEND};

    return write(SERVER_FD_FUSE, &h, sizeof(h)) == sizeof(h) ? 0 : -errno;
}

int loop_start(void (*end)(void))
{
    int rc;

    on_end = end;
    wake_fd = eventfd(0, EFD_CLOEXEC);
    rc = wake_fd < 0 ? -errno : lead_start();
    for (unsigned i = 0; i < THREADS && rc == 0; i++) {
        pthread_t t;

        running++;
        rc = -pthread_create(&t, NULL, serve, (void *)(uintptr_t)(i + 1));
        if (rc == 0)
            pthread_detach(t);
    }
    return rc;
}

bool loop_serves(void)
{
    return running > 0;
}

int loop_stop(int ms)
{
    const struct timespec look = {.tv_nsec = 1000000};
    int64_t end = mono_ns() + (int64_t)ms * 1000000;
    const uint64_t one = 1;

    stopping = true;
    if (wake_fd >= 0)
        (void)!write(wake_fd, &one, sizeof(one));
    while (running && mono_ns() < end)
        nanosleep(&look, NULL);
    return running ? -ETIMEDOUT : 0;
}
