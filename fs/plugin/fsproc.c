/*
 * fsproc.c - see fsproc.h. Owns each coffer-fs process: its pidfd, its control channel, and our end of its life.
 *
 *   STARTING --ready--> SERVING --stop--> STOPPING --exited--> GONE
 *       |                  |                                     ^
 *       +--failed/exited---+--exited (owner->died)---------------+
 *
 * The table `steps` is this drawing. Invariants:
 *  1. Only the process's own thread reads its channel, reaps it and moves its state; others ask through p->want and wait
 *     on p->changed.
 *  2. GONE is final: the process has been reaped (or, adopted, has been seen to end), or it was killed and a thread of it
 *     hangs in the kernel for good, in a notification: that waits for a lock whose holder waits for an answer, which the next
 *     server will give. Such a process does nothing any more (spawn_only_writes), but keeps its files open, with the lock
 *     on `log`: so that is taken from it here, by a descriptor of the same open file.
 *  3. The owner is called by that thread, without p->lock. Until a server is handed over, its owner is `nobody`.
 */
#include "fsproc.h"

#include "agent_client.h"
#include "spawn.h"
#include "fs/base/msg.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define READY_MS         10000
#define LOOK_MS          2000  /* between looks at whether it hangs */
#define KILL_MS          10000 /* until what was killed has ended */
#define REFRESH_MIN_MS   500
#define CLOSED_MS        1000 /* between the end of its channel and its own */
#define GONE_MS          250  /* between looks whether who asked is still there */
#define DAMAGE_BURST     20 /* reports (damage, notes) taken in DAMAGE_PERIOD_MS; the rest is dropped: the log is no sink */
#define DAMAGE_PERIOD_MS 60000

enum fsproc_state { FS_STARTING, FS_SERVING, FS_STOPPING, FS_GONE, FS_STATES };
enum fsproc_event { EV_READY, EV_FAILED, EV_STOP, EV_EXITED, FS_EVENTS };

struct task {
    const struct fsproc_sink *sink;
    uint64_t id; /* 0: any */
    int lines;
    bool done;
    int result;
};

struct fsproc {
    char name[ENTRY_NAME_MAX];
    struct process process;
    int pidfd, ctl, kick; /* ctl -1: adopted, and it kept no channel */
    bool ours;            /* a child: to be reaped */
    int64_t damage_since; /* mono_ns; of the process's thread */
    int damages;
    pthread_mutex_t lock; /* what follows */
    pthread_cond_t changed;
    unsigned refs;
    enum fsproc_state state;
    int exit_status;
    int log_fd; /* its `log`, the same open file, or -1 */
    const struct fsproc_owner *owner;
    void *ctx;
    char failed[AGENT_TEXT_MAX]; /* what SERVER_FAILED said */
    bool has_init;
    struct server_init init;
    bool want_stat;
    int64_t asked_stat; /* mono_ns */
    uint64_t stats_seen;
    struct server_stat stat;
    struct task *task; /* under way */
    bool telling;      /* somebody is in its sink */
    uint64_t next_id;
    uint64_t agent_generation;
};

/* --- the owner of a server that nobody has been handed yet --- */

static void nobody_free(void *ctx)
{
    (void)ctx;
}

static void nobody_event(void *ctx, struct fsproc *p)
{
    (void)ctx;
    (void)p;
}

static void nobody_died(void *ctx, struct fsproc *p, const char *how)
{
    (void)ctx;
    (void)p;
    (void)how;
}

static void nobody_unlocked(void *ctx, bool unlocked)
{
    (void)ctx;
    (void)unlocked;
}

static const struct fsproc_owner nobody = {NULL, nobody_died, nobody_event, nobody_event, nobody_unlocked, nobody_free};

/* --- states --- */

static const struct {
    enum fsproc_state next;
    bool died; /* tell the owner */
} steps[FS_STATES][FS_EVENTS] = {
    [FS_STARTING] = {[EV_READY] = {FS_SERVING, false},
                     [EV_FAILED] = {FS_STARTING, false},
                     [EV_STOP] = {FS_STOPPING, false},
                     [EV_EXITED] = {FS_GONE, false}},
    [FS_SERVING] = {[EV_READY] = {FS_SERVING, false},
                    [EV_FAILED] = {FS_SERVING, false},
                    [EV_STOP] = {FS_STOPPING, false},
                    [EV_EXITED] = {FS_GONE, true}},
    [FS_STOPPING] = {[EV_READY] = {FS_STOPPING, false},
                     [EV_FAILED] = {FS_STOPPING, false},
                     [EV_STOP] = {FS_STOPPING, false},
                     [EV_EXITED] = {FS_GONE, false}},
    [FS_GONE] = {[EV_READY] = {FS_GONE, false},
                 [EV_FAILED] = {FS_GONE, false},
                 [EV_STOP] = {FS_GONE, false},
                 [EV_EXITED] = {FS_GONE, false}},
};

/* Who is to be told, as of now. */
struct listener {
    const struct fsproc_owner *owner;
    void *ctx;
    bool died;
};

static struct listener step(struct fsproc *p, enum fsproc_event event)
{
    struct listener l;

    pthread_mutex_lock(&p->lock);
    l = (struct listener){p->owner, p->ctx, steps[p->state][event].died};
    p->state = steps[p->state][event].next;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
    return l;
}

static struct listener listener(struct fsproc *p)
{
    struct listener l;

    pthread_mutex_lock(&p->lock);
    l = (struct listener){p->owner, p->ctx, false};
    pthread_mutex_unlock(&p->lock);
    return l;
}

/* Waits for p->changed until end (mono_ns); p->lock held. False at the end of time. */
static bool wait_changed(struct fsproc *p, int64_t end)
{
    struct timespec ts = {end / 1000000000, end % 1000000000};

    return pthread_cond_clockwait(&p->changed, &p->lock, CLOCK_MONOTONIC, &ts) != ETIMEDOUT;
}

/* --- life --- */

static struct fsproc *fsproc_new(const char *name, const struct fsproc_owner *owner, void *ctx)
{
    struct fsproc *p = xcalloc(1, sizeof(*p));

    snprintf(p->name, sizeof(p->name), "%s", name);
    p->pidfd = p->ctl = p->log_fd = -1;
    p->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    p->owner = owner;
    p->ctx = ctx;
    p->refs = 1;
    p->next_id = 1;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->changed, NULL);
    return p;
}

struct fsproc *fsproc_ref(struct fsproc *p)
{
    pthread_mutex_lock(&p->lock);
    p->refs++;
    pthread_mutex_unlock(&p->lock);
    return p;
}

void fsproc_unref(struct fsproc *p)
{
    unsigned left;

    if (!p)
        return;
    pthread_mutex_lock(&p->lock);
    left = --p->refs;
    pthread_mutex_unlock(&p->lock);
    if (left)
        return;
    close_quiet(p->pidfd);
    close_quiet(p->ctl);
    close_quiet(p->log_fd);
    close_quiet(p->kick);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->changed);
    free(p);
}

bool fsproc_has_channel(const struct fsproc *p)
{
    return p->ctl >= 0;
}

struct process fsproc_process(const struct fsproc *p)
{
    return p->process;
}

bool fsproc_init(struct fsproc *p, struct server_init *ret)
{
    bool has;

    pthread_mutex_lock(&p->lock);
    has = p->has_init;
    *ret = p->init;
    pthread_mutex_unlock(&p->lock);
    return has;
}

static void kick(struct fsproc *p)
{
    uint64_t one = 1;

    (void)!write(p->kick, &one, sizeof(one));
}

/* --- messages from coffer-fs --- */

/* The text of a struct agent_reply from a process that may have been taken over: checked, one printable line. */
static bool take_text(const struct agent_reply *r, uint32_t len, char out[AGENT_TEXT_MAX])
{
    if (len != sizeof(*r) || !memchr(r->text, 0, sizeof(r->text)))
        return false;
    escape_text(r->text, out, AGENT_TEXT_MAX);
    return true;
}

/* Not too many at a time, of what goes to the audit log. */
static bool may_report(struct fsproc *p)
{
    if (mono_ns() - p->damage_since > (int64_t)DAMAGE_PERIOD_MS * 1000000) {
        p->damage_since = mono_ns();
        p->damages = 0;
    }
    return ++p->damages <= DAMAGE_BURST;
}

static void take_damage(struct fsproc *p, const char *text)
{
    if (!may_report(p))
        return;
    log_err("volume %s: damaged: %s; run coffer volume check %.*s", p->name, text, (int)strcspn(p->name, "@"), p->name);
    agent_note(p->name, "damage", text);
}

static void take_task_end(struct fsproc *p, uint64_t id, int result)
{
    pthread_mutex_lock(&p->lock);
    if (p->task && p->task->id == id) {
        p->task->result = result;
        p->task->done = true;
        p->task = NULL;
        pthread_cond_broadcast(&p->changed);
    }
    pthread_mutex_unlock(&p->lock);
}

/* The task with this id, or the run: it and its sink live on until told(), without p->lock, which nobody shall wait for as
 * long as a reader of lines takes. */
static struct task *tell(struct fsproc *p, uint64_t id)
{
    struct task *t;

    pthread_mutex_lock(&p->lock);
    t = p->task && (p->task->id == id || p->task->id == 0) ? p->task : NULL;
    p->telling = t != NULL;
    pthread_mutex_unlock(&p->lock);
    return t;
}

static void told(struct fsproc *p)
{
    pthread_mutex_lock(&p->lock);
    p->telling = false;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
}

static void take_line(struct fsproc *p, uint64_t id, const char *text)
{
    struct task *t = tell(p, id);

    if (!t)
        return;
    t->lines++;
    if (t->sink->line)
        t->sink->line(t->sink->ctx, text);
    told(p);
}

static void take_progress(struct fsproc *p, uint64_t id, const struct server_progress *at)
{
    struct task *t = tell(p, id);

    if (!t)
        return;
    if (t->sink->progress)
        t->sink->progress(t->sink->ctx, at->done, at->total);
    told(p);
}

static void take_stat(struct fsproc *p, const struct server_stat *st)
{
    struct listener l;

    pthread_mutex_lock(&p->lock);
    p->stat = *st;
    p->stats_seen++;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
    l = listener(p);
    l.owner->unlocked(l.ctx, st->unlocked);
}

/* Takes one message. False when the channel is at its end or says what it must not. */
static bool take_message(struct fsproc *p)
{
    union {
        struct agent_reply reply;
        struct server_stat stat;
        struct server_progress progress;
        struct server_init init;
    } body;
    char text[AGENT_TEXT_MAX];
    struct msg_head head;
    int rc = msg_recv(p->ctl, &head, &body, sizeof(body), NULL, NULL, 0);

    if (rc == -ETIMEDOUT || rc == -EAGAIN)
        return true;
    if (rc < 0)
        return false;
    if (head.type == SERVER_READY && (head.len == 0 || head.len == sizeof(body.init))) {
        pthread_mutex_lock(&p->lock);
        p->has_init = head.len != 0;
        if (p->has_init)
            p->init = body.init;
        pthread_mutex_unlock(&p->lock);
        step(p, EV_READY);
    } else if (head.type == SERVER_STAT && head.len == sizeof(body.stat)) {
        take_stat(p, &body.stat);
    } else if (head.type == SERVER_PROGRESS && head.len == sizeof(body.progress)) {
        take_progress(p, head.id, &body.progress);
    } else if (!take_text(&body.reply, head.len, text)) {
        return false;
    } else if (head.type == SERVER_FAILED) {
        pthread_mutex_lock(&p->lock);
        memcpy(p->failed, text, sizeof(p->failed));
        pthread_mutex_unlock(&p->lock);
        step(p, EV_FAILED);
    } else if (head.type == SERVER_DAMAGE) {
        take_damage(p, text);
    } else if (head.type == SERVER_NOTE) {
        if (may_report(p))
            agent_note(p->name, "scrub", text);
    } else if (head.type == SERVER_LINE) {
        take_line(p, head.id, text);
    } else if (head.type == SERVER_REPLY) {
        take_task_end(p, head.id, body.reply.err);
    } else {
        return false;
    }
    return true;
}

/* --- the thread --- */

static void send_wanted(struct fsproc *p)
{
    struct msg_head head = {.type = SERVER_STAT};
    uint64_t n;

    (void)!read(p->kick, &n, sizeof(n));
    pthread_mutex_lock(&p->lock);
    if (p->want_stat && p->ctl >= 0) {
        head.id = p->next_id++;
        p->asked_stat = mono_ns();
        msg_send(p->ctl, &head, NULL, NULL, 0);
    }
    p->want_stat = false;
    pthread_mutex_unlock(&p->lock);
}

/* The open file, and so the lock, is ours as well as its: it must not outlive it. */
static void unlock_log(struct fsproc *p)
{
    struct flock fl = {.l_type = F_UNLCK, .l_whence = SEEK_SET};

    pthread_mutex_lock(&p->lock);
    if (p->log_fd >= 0)
        fcntl(p->log_fd, F_OFD_SETLK, &fl);
    close_quiet(p->log_fd);
    p->log_fd = -1;
    pthread_mutex_unlock(&p->lock);
}

/* It has ended, or hangs: reads what it said last, reaps it, and says how it went. */
static void bury(struct fsproc *p, bool hangs, char *how, size_t n)
{
    while (p->ctl >= 0) {
        struct pollfd f = {.fd = p->ctl, .events = POLLIN};

        if (poll(&f, 1, 0) <= 0 || !take_message(p))
            break;
    }
    p->exit_status = p->ours && !hangs ? spawn_reap(p->pidfd) : 0;
    unlock_log(p);
    if (hangs)
        snprintf(how, n, "killed; a thread of it waits in the kernel for an answer of the next one");
    else if (!p->ours)
        snprintf(how, n, "it ended (an earlier cofferd started it: its status is not known)");
    else if (p->exit_status > 128)
        snprintf(how, n, "killed by signal %d", p->exit_status - 128);
    else
        snprintf(how, n, "exit status %d%s%s", p->exit_status, p->failed[0] ? ": " : "", p->failed);
    pthread_mutex_lock(&p->lock);
    if (p->task) {
        p->task->result = -ECONNRESET;
        p->task->done = true;
        p->task = NULL;
    }
    pthread_mutex_unlock(&p->lock);
}

static void *watch(void *arg)
{
    struct fsproc *p = arg;
    bool channel = p->ctl >= 0;
    struct listener l;
    int64_t ticked = mono_ns();
    char how[AGENT_TEXT_MAX + 64];
    bool hangs = false;

    while (!hangs) {
        struct pollfd f[3] = {{.fd = p->pidfd, .events = POLLIN},
                              {.fd = p->kick, .events = POLLIN},
                              {.fd = channel ? p->ctl : -1, .events = POLLIN}};
        int r = poll(f, 3, LOOK_MS);

        if (r < 0)
            continue;
        if (r == 0)
            hangs = spawn_only_writes(&p->process, SERVER_FD_FUSE);
        if (f[2].revents && !take_message(p)) {
            channel = false;
            /* One that ends closes it first. */
            if (spawn_wait_end(p->pidfd, CLOSED_MS) < 0)
                log_err("volume %s: coffer-fs closed its control channel", p->name);
        }
        if (f[1].revents)
            send_wanted(p);
        if (f[0].revents)
            break;
        if (mono_ns() - ticked > (int64_t)FSPROC_TICK_MS * 1000000) {
            l = listener(p);
            l.owner->tick(l.ctx, p);
            ticked = mono_ns();
        }
    }
    bury(p, hangs, how, sizeof(how));
    l = step(p, EV_EXITED);
    if (l.died)
        l.owner->died(l.ctx, p, how);
    else
        l.owner->ended(l.ctx, p);
    l.owner->free(l.ctx);
    if (hangs && spawn_wait_end(p->pidfd, -1) == 0 && p->ours)
        spawn_reap(p->pidfd);
    fsproc_unref(p);
    return NULL;
}

/* --- starting --- */

static void log_missing_privilege(void)
{
    static bool said;

    if (!said && access("/proc/self/oom_score_adj", W_OK) == 0) {
        FILE *f = fopen("/proc/self/status", "re");
        unsigned long long caps = 0;
        char line[256];

        while (f && fgets(line, sizeof(line), f)) {
            if (sscanf(line, "CapEff: %llx", &caps) == 1)
                break;
        }
        if (f)
            fclose(f);
        if (!(caps >> 24 & 1)) /* CAP_SYS_RESOURCE */
            log_info("without CAP_SYS_RESOURCE, coffer-fs cannot be kept from the OOM killer (goes on)");
    }
    said = true;
}

/* known, ctx: as struct spawn has them. */
static int start_process(const char *const *argv, const int *fds, int nfds,
                         void (*known)(void *ctx, const struct process *p), void *ctx, struct process *ret,
                         int *ret_pidfd, struct why *why)
{
    struct spawn s = {.program = "coffer-fs",
                      .argv = argv,
                      .nfds = nfds,
                      .uid = plugin_config.fs_uid,
                      .gid = plugin_config.fs_gid,
                      .io_flusher = true,
                      .known = known,
                      .ctx = ctx};
    int rc;

    memcpy(s.fds, fds, sizeof(int) * (size_t)nfds);
    log_missing_privilege();
    rc = spawn_start(&s, ret, ret_pidfd);
    return rc < 0 ? why_set(why, rc, "cannot start coffer-fs: %s", strerror(-rc)) : 0;
}

/* Starts the process's own thread, which has a reference. */
static int start_watch(struct fsproc *p)
{
    int rc;

    pthread_mutex_lock(&p->lock); /* the thread cannot give its reference back before it has it */
    rc = thread_start(watch, p);
    if (rc == 0)
        p->refs++;
    pthread_mutex_unlock(&p->lock);
    return rc;
}

/* Waits until it serves, and hands it to owner; or until it has ended. */
static int wait_ready(struct fsproc *p, const struct fsproc_owner *owner, void *ctx, struct why *why)
{
    int64_t end = mono_ns() + (int64_t)READY_MS * 1000000;
    int rc = 0;

    pthread_mutex_lock(&p->lock);
    while (p->state == FS_STARTING && wait_changed(p, end))
        ;
    if (p->state == FS_STARTING)
        rc = why_set(why, -ETIMEDOUT, "coffer-fs was not ready within %d s", READY_MS / 1000);
    else if (p->state != FS_SERVING)
        rc = why_set(why, -EIO, "coffer-fs did not start: %s",
                     p->failed[0] ? p->failed : "see cofferd's log for its last words");
    if (rc == 0) {
        p->owner = owner;
        p->ctx = ctx;
    }
    pthread_mutex_unlock(&p->lock);
    return rc;
}

/* Our end does not block: a server that does not read must not hold us up. */
static void take_channel(struct fsproc *p, int fd)
{
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    p->ctl = fd;
    p->ours = true;
}

int fsproc_start(const char *name, bool database, bool strict, const struct fsproc_fds *fds,
                 const struct fsproc_owner *owner, void *ctx, struct fsproc **ret, struct why *why)
{
    const char *argv[16] = {"coffer-fs", "serve", name, NULL};
    char init[2 * sizeof(struct server_init) + 1], mount_id[17], patience[12];
    int pair[2], n = 3, rc;
    struct fsproc *p;

    if (database) {
        argv[n++] = "--profile";
        argv[n++] = "database";
    }
    if (strict)
        argv[n++] = "--strict";
    if (fds->snapshot) {
        argv[n++] = "--snapshot";
        argv[n++] = fds->snapshot;
    }
    snprintf(mount_id, sizeof(mount_id), "%llx", (unsigned long long)fds->mount_id);
    argv[n++] = "--mount-id";
    argv[n++] = mount_id;
    if (fds->takeover) {
        hex_encode((const uint8_t *)fds->takeover, sizeof(*fds->takeover), init);
        snprintf(patience, sizeof(patience), "%d", fds->patience_ms);
        argv[n++] = "--takeover";
        argv[n++] = init;
        argv[n++] = "--patience";
        argv[n++] = patience;
    }
    argv[n] = NULL;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return why_set(why, -errno, "socketpair: %s", strerror(errno));
    p = fsproc_new(name, &nobody, NULL);
    take_channel(p, pair[0]);
    p->agent_generation = fds->agent_generation;
    p->log_fd = fcntl(fds->log, F_DUPFD_CLOEXEC, 3);
    rc = start_process(argv, (const int[]){pair[1], fds->agent, fds->data, fds->log, fds->fuse, fds->page, pair[0]}, 7,
                       fds->takeover ? owner->started : NULL, ctx, &p->process, &p->pidfd, why);
    close_quiet(pair[1]);
    if (rc < 0) {
        fsproc_unref(p);
        return rc;
    }
    rc = start_watch(p);
    if (rc < 0) {
        spawn_signal(p->pidfd, SIGKILL);
        spawn_wait_end(p->pidfd, -1);
        spawn_reap(p->pidfd);
        fsproc_unref(p);
        return why_set(why, rc, "cannot start a thread: %s", strerror(-rc));
    }
    rc = wait_ready(p, owner, ctx, why);
    if (rc < 0) {
        fsproc_expect_end(p);
        /* Nothing was served and nothing opened yet: it may be killed. */
        spawn_signal(p->pidfd, SIGKILL);
        fsproc_wait_end(p, -1);
        fsproc_unref(p);
        return rc;
    }
    *ret = p;
    return 0;
}

/* Our end of its channel, which it keeps for us; -1: there is none. */
static int fetch_channel(int pidfd)
{
    int fd = spawn_fetch_fd(pidfd, SERVER_FD_PEER), type = 0, domain = 0;
    socklen_t n = sizeof(type), m = sizeof(domain);

    if (fd >= 0 && getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &n) == 0 && type == SOCK_SEQPACKET &&
        getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &m) == 0 && domain == AF_UNIX) {
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
        return fd;
    }
    log_info("a server of before cannot be spoken to: %s", fd < 0 ? strerror(-fd) : "it kept something else");
    close_quiet(fd);
    return -1;
}

/* Its `log`: the open file that carries the lock. What it has at that number may be anything. -1: it is not the volume's. */
static int fetch_log(int pidfd, int log)
{
    int fd = log < 0 ? -1 : spawn_fetch_fd(pidfd, SERVER_FD_LOG);
    struct stat have, want;

    if (fd >= 0 && fstat(fd, &have) == 0 && fstat(log, &want) == 0 && have.st_dev == want.st_dev &&
        have.st_ino == want.st_ino)
        return fd;
    close_quiet(fd);
    return -1;
}

int fsproc_adopt(const char *name, const struct process *process, int log, const struct fsproc_owner *owner, void *ctx,
                 struct fsproc **ret)
{
    struct fsproc *p = fsproc_new(name, owner, ctx);
    int rc;

    p->process = *process;
    p->pidfd = process_pidfd(process);
    p->state = FS_SERVING;
    p->next_id = (uint64_t)mono_ns(); /* late answers to the last cofferd are nobody's */
    rc = p->pidfd < 0 ? -ESRCH : 0;
    if (rc == 0) {
        p->ctl = fetch_channel(p->pidfd);
        p->log_fd = fetch_log(p->pidfd, log);
    }
    if (rc == 0)
        rc = start_watch(p);
    if (rc < 0)
        fsproc_unref(p);
    else
        *ret = p;
    return rc;
}

/* --- requests of other threads --- */

void fsproc_expect_end(struct fsproc *p)
{
    step(p, EV_STOP);
}

/* An order without a body. 0 or -errno. */
static int order(struct fsproc *p, enum server_type type)
{
    struct msg_head head = {.type = type};

    pthread_mutex_lock(&p->lock);
    head.id = p->next_id++;
    pthread_mutex_unlock(&p->lock);
    return p->ctl < 0 ? -ENOTCONN : msg_send(p->ctl, &head, NULL, NULL, 0);
}

void fsproc_stop(struct fsproc *p)
{
    fsproc_expect_end(p);
    if (order(p, SERVER_STOP) < 0)
        spawn_signal(p->pidfd, SIGTERM);
}

int fsproc_fetch(struct fsproc *p, enum server_fd fd)
{
    return spawn_fetch_fd(p->pidfd, fd);
}

int fsproc_log(struct fsproc *p)
{
    int fd;

    pthread_mutex_lock(&p->lock);
    fd = p->log_fd < 0 ? -1 : fcntl(p->log_fd, F_DUPFD_CLOEXEC, 3);
    pthread_mutex_unlock(&p->lock);
    return fd;
}

int fsproc_go(struct fsproc *p)
{
    return order(p, SERVER_GO);
}

int fsproc_hand_over(struct fsproc *p, int ms)
{
    int rc;

    fsproc_expect_end(p);
    rc = order(p, SERVER_HANDOVER);
    if (rc == 0)
        rc = fsproc_wait_end(p, ms);
    if (rc == 0)
        return 0;
    fsproc_kill(p);
    return -ETIMEDOUT;
}

void fsproc_kill(struct fsproc *p)
{
    spawn_signal(p->pidfd, SIGKILL);
    fsproc_wait_end(p, KILL_MS);
}

bool fsproc_busy(struct fsproc *p)
{
    bool busy;

    pthread_mutex_lock(&p->lock);
    busy = p->task != NULL;
    pthread_mutex_unlock(&p->lock);
    return busy;
}

int fsproc_wait_end(struct fsproc *p, int ms)
{
    int64_t end = ms < 0 ? INT64_MAX : mono_ns() + (int64_t)ms * 1000000;
    bool gone;

    pthread_mutex_lock(&p->lock);
    while (p->state != FS_GONE && wait_changed(p, end))
        ;
    gone = p->state == FS_GONE;
    pthread_mutex_unlock(&p->lock);
    return gone ? 0 : -ETIMEDOUT;
}

int fsproc_stat(struct fsproc *p, int ms, struct server_stat *ret)
{
    int64_t end = mono_ns() + (int64_t)ms * 1000000;
    uint64_t seen;
    int rc = 0;

    if (p->ctl < 0)
        return -ENOTCONN;
    pthread_mutex_lock(&p->lock);
    seen = p->stats_seen;
    p->want_stat = true;
    kick(p);
    while (p->stats_seen == seen && p->state == FS_SERVING && wait_changed(p, end))
        ;
    if (p->stats_seen == seen)
        rc = -ETIMEDOUT;
    else
        *ret = p->stat;
    pthread_mutex_unlock(&p->lock);
    return rc;
}

void fsproc_refresh(struct fsproc *p)
{
    if (p->ctl < 0)
        return;
    pthread_mutex_lock(&p->lock);
    if (mono_ns() - p->asked_stat > (int64_t)REFRESH_MIN_MS * 1000000) {
        p->want_stat = true;
        kick(p);
    }
    pthread_mutex_unlock(&p->lock);
}

static int task_failed(uint32_t kind, int rc, struct why *why)
{
    switch (rc) {
    case -ENOKEY:
        return why_set(why, rc, "the keystore is locked: run coffer unlock");
    case -ECANCELED:
        return why_set(why, rc, "broken off: the volume was locked or unmounted meanwhile");
    case -EBUSY:
        return why_set(why, rc, "broken off: something else is under way on this volume, or it is too full: try again");
    case -EALREADY:
        return why_set(why, rc, "a scrub of this volume is running: coffer volume inspect shows how far it is");
    case -ENOSPC:
        return why_set(why, rc,
                       kind == TASK_RESIZE   ? "more than that is in use"
                       : kind == TASK_EXPORT ? "there is no room where the export goes: it is not whole"
                                             : "the volume is full: remove something");
    case -ECONNRESET:
        return why_set(why, rc, "broken off: the volume's server died; another follows: try again");
    default:
        return why_set(why, rc, "it could not be done: %s", strerror(-rc));
    }
}

int fsproc_task(struct fsproc *p, const struct server_task *task, const int *fds, int nfds,
                const struct fsproc_sink *sink, struct why *why)
{
    struct msg_head head = {.type = SERVER_TASK, .len = sizeof(*task)};
    struct task t = {.sink = sink};
    bool stopped = false;
    int rc;

    if (p->ctl < 0)
        return why_set(why, -ENOTCONN, "the volume's server was started by an earlier cofferd: unmount it first");
    pthread_mutex_lock(&p->lock);
    if (p->task || p->state != FS_SERVING) {
        pthread_mutex_unlock(&p->lock);
        return why_set(why, -EBUSY, "something else is under way on this volume, or it is being unmounted");
    }
    t.id = head.id = p->next_id++;
    p->task = &t; // cppcheck-suppress autoVariables
    rc = msg_send(p->ctl, &head, task, fds, nfds);
    if (rc < 0)
        p->task = NULL;
    while ((rc == 0 && !t.done) || p->telling) {
        (void)wait_changed(p, mono_ns() + (int64_t)GONE_MS * 1000000);
        if (sink->gone && !t.done && !stopped && sink->gone(sink->ctx)) {
            head = (struct msg_head){.type = SERVER_TASK_STOP, .id = t.id};
            stopped = msg_send(p->ctl, &head, NULL, NULL, 0) == 0;
        }
    }
    pthread_mutex_unlock(&p->lock);
    if (rc == 0)
        rc = t.result;
    if (rc < 0 && (task->name[0] || task->since[0]) && server_snapshot_error(rc) &&
        !(task->kind == TASK_EXPORT && rc == -ENOSPC)) /* where it goes to is full */
        return why_set(why, rc, "%s", server_snapshot_error(rc));
    return rc < 0 ? task_failed(task->kind, rc, why) : rc;
}

int fsproc_renew_agent(struct fsproc *p, const char *name, uint64_t generation)
{
    struct msg_head head = {.type = SERVER_AGENT};
    struct why why;
    int fd, rc;
    bool has;

    pthread_mutex_lock(&p->lock);
    has = p->agent_generation == generation || p->state != FS_SERVING;
    head.id = p->next_id++;
    pthread_mutex_unlock(&p->lock);
    if (has || p->ctl < 0)
        return 0;
    rc = agent_bind(name, AGENT_PURPOSE_SERVE, &fd, &why);
    if (rc < 0)
        return rc;
    rc = msg_send(p->ctl, &head, NULL, &fd, 1);
    close_quiet(fd);
    if (rc == 0) {
        pthread_mutex_lock(&p->lock);
        p->agent_generation = generation;
        pthread_mutex_unlock(&p->lock);
    }
    return rc;
}

/* --- runs to the end --- */

int fsproc_run(const char *verb, const char *name, const char *const *options, const int *fds, int nfds,
               const struct fsproc_sink *sink, struct why *why)
{
    static const struct fsproc_sink none;
    const char *argv[3 + FSPROC_OPTIONS_MAX + 1] = {"coffer-fs", verb, name};
    int pair[2], all[SPAWN_FDS_MAX], rc;
    struct task t = {.sink = sink ? sink : &none};
    struct fsproc *p = fsproc_new(name, &nobody, NULL);
    char how[AGENT_TEXT_MAX + 64];

    for (int i = 0; options && options[i] && i < FSPROC_OPTIONS_MAX; i++)
        argv[3 + i] = options[i];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) {
        rc = why_set(why, -errno, "socketpair: %s", strerror(errno));
        goto out;
    }
    take_channel(p, pair[0]);
    all[0] = pair[1];
    memcpy(all + 1, fds, sizeof(int) * (size_t)nfds);
    rc = start_process(argv, all, nfds + 1, NULL, NULL, &p->process, &p->pidfd, why);
    close_quiet(pair[1]);
    if (rc < 0)
        goto out;
    p->task = &t;
    for (bool channel = true;;) {
        struct pollfd f[2] = {{.fd = p->pidfd, .events = POLLIN}, {.fd = channel ? p->ctl : -1, .events = POLLIN}};

        if (poll(f, 2, GONE_MS) < 0)
            continue;
        if (t.sink->gone && t.sink->gone(t.sink->ctx))
            spawn_signal(p->pidfd, SIGKILL); /* the same as a crash, which it is made for */
        if (f[1].revents)
            channel = take_message(p);
        else if (f[0].revents)
            break;
    }
    bury(p, false, how, sizeof(how));
    rc = p->exit_status;
    if (rc == 3)
        rc = MAX(t.lines, 1);
    else if (rc != 0)
        rc = why_set(why, -EIO, "coffer-fs %s: %s", verb, p->failed[0] ? p->failed : how);
out:
    fsproc_unref(p);
    return rc;
}
