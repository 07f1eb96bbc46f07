/*
 * channel.c - the two sockets of coffer-fs: the agent's channel (coffer/agent.h) and cofferd's (coffer/server.h).
 *
 * Owns both descriptors, the thread that reads the agent's, and the requests that wait for a verdict.
 *
 * Invariants:
 *  1. The agent's messages take effect in their order: a grant is referred to when its verdict is read, so that the
 *     order that ends it, read later, finds it.
 *  2. Key bytes stand only in guarded memory (the receive buffer, the waiter's key) and are wiped as soon as passed on.
 *  3. No wait is longer than MOUNT_WAIT_MS, and none outlives an interrupt by more than SLICE_MS. When the agent dies,
 *     waiters stay and ask the next one, if it comes in that time.
 *  4. Sending never blocks: an agent that does not read is as good as dead to the one request.
 */
#include "mount.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fs/base/msg.h"

#define SLICE_MS          50 /* between looks at an interrupt */
#define READ_MS           (3600 * 1000)
#define CONTROL_MS        5000
#define DAMAGE_PER_SECOND 20

struct waiter {
    struct waiter *next;
    uint64_t id;
    bool sent, done;
    int err;
    int pidfd;
    struct auth auth;
    const struct agent_renew *renew; /* this is what is asked; or NULL */
    struct key *key;                 /* where a key may go; NULL: none was asked for */
    bool has_key;
    struct channel_volume volume;
};

static pthread_mutex_t agent_lock = PTHREAD_MUTEX_INITIALIZER; /* all below */
static pthread_cond_t agent_cond;                              /* a verdict, a new channel (monotonic clock) */
static int agent_fd = -1;                                      /* -1: none alive */
static int agent_next = -1;                                    /* handed over by cofferd, not yet taken up */
static uint64_t agent_epoch;
static uint64_t agent_last_id;
static struct waiter *waiters;
static struct volume_seen seen_last; /* the newest checkpoint, generation 0: none yet */
static uint64_t seen_id;             /* of the message that told it */
static bool seen_sent, seen_done;
static bool agent_unlocked; /* as the agent of agent_fd has said */
static bool agent_locks;    /* it has ordered to lock since it said so last, or since it is there */
static unsigned agent_lock_orders;

static void (*agent_on_lock)(void), (*agent_on_unlocked)(void);

/* --- the verdict that comes in; agent_lock held --- */

static bool verdict_ok(const struct agent_verdict *v, int nfds)
{
    return v->kind <= AGENT_PLACEHOLDER && v->read_only <= 1 && v->cacheable <= 1 && v->has_key <= 1 &&
           sodium_is_zero(v->reserved, sizeof(v->reserved)) && v->accept_rollback <= 1 && v->err <= 0 &&
           nfds == (v->cacheable ? 1 : 0);
}

static void waiter_finish(struct waiter *w, const struct agent_verdict *v, int pidfd)
{
    w->done = true;
    w->err = v->err == -ENOKEY ? -ENOKEY : v->err < 0 || v->kind == AGENT_DENY ? -EACCES : 0;
    if (w->err < 0) {
        close_quiet(pidfd);
        return;
    }
    w->auth = (struct auth){.kind = v->kind, .read_only = v->read_only};
    if (v->kind == AGENT_ALLOW)
        w->auth.grant = auth_grant_ref(agent_epoch, v->grant);
    w->volume = (struct channel_volume){v->params, v->seen, v->accept_rollback};
    w->pidfd = pidfd;
    if (v->has_key && w->key) {
        memcpy(w->key->b, v->key, KEY_BYTES);
        w->has_key = true;
    }
}

static int take_verdict(const struct msg_head *head, const struct agent_verdict *v, const int *fds, int nfds)
{
    struct waiter *w = waiters;

    if (!verdict_ok(v, nfds))
        return -EPROTO;
    while (w && !(w->id == head->id && w->sent && !w->done))
        w = w->next;
    if (!w) { /* gave up meanwhile */
        if (nfds)
            close_quiet(fds[0]);
        return 0;
    }
    waiter_finish(w, v, nfds ? fds[0] : -1);
    pthread_cond_broadcast(&agent_cond);
    return 0;
}

/* --- the newest checkpoint, for the agent to remember; agent_lock held --- */

static void send_seen(void)
{
    struct msg_head head = {.type = AGENT_FS_SEEN, .len = sizeof(seen_last)};

    seen_id = head.id = ++agent_last_id;
    seen_sent = msg_send(agent_fd, &head, &seen_last, NULL, 0) == 0;
}

static int take_seen(const struct msg_head *head, const struct agent_seen_done *done)
{
    if (done->reserved || done->err > 0)
        return -EPROTO;
    if (head->id != seen_id || !seen_sent)
        return 0; /* of an older one */
    if (done->err < 0 && done->err != -ENOKEY)
        log_err("volume %s: the key agent does not remember generation %llu: %s", mount_config.name,
                (unsigned long long)seen_last.generation, strerror(-done->err));
    seen_done = true;
    pthread_cond_broadcast(&agent_cond);
    return 0;
}

static void take_unlocked(const struct agent_unlocked *u)
{
    auth_agent_is(u->agent);
    agent_unlocked = true;
    agent_locks = false;
    pthread_cond_broadcast(&agent_cond);
}

/* The keystore may be open nevertheless: it was the last grant of the volume. */
static void take_lock(void)
{
    agent_unlocked = false;
    agent_locks = true;
    agent_lock_orders++;
    pthread_cond_broadcast(&agent_cond);
}

/* --- the thread that reads --- */

struct agent_message {
    struct msg_head head;
    union {
        struct agent_verdict verdict;
        struct agent_grant grant;
        struct agent_seen_done seen;
        struct agent_unlocked unlocked;
    } body;
    int fds[MSG_FDS_MAX];
    int nfds;
};

static int handle_message(struct agent_message *m)
{
    size_t want = m->head.type == AGENT_FS_AUTH        ? sizeof(m->body.verdict)
                  : m->head.type == AGENT_FS_GRANT_END ? sizeof(m->body.grant)
                  : m->head.type == AGENT_FS_GRANT     ? sizeof(m->body.grant)
                  : m->head.type == AGENT_FS_SEEN      ? sizeof(m->body.seen)
                  : m->head.type == AGENT_FS_UNLOCKED  ? sizeof(m->body.unlocked)
                                                       : 0;
    int rc = -EPROTO;

    if (m->head.len == want && (m->head.type == AGENT_FS_AUTH || m->nfds == 0)) {
        pthread_mutex_lock(&agent_lock);
        if (m->head.type == AGENT_FS_AUTH)
            rc = take_verdict(&m->head, &m->body.verdict, m->fds, m->nfds);
        else if (m->head.type == AGENT_FS_GRANT_END)
            auth_end_grant(m->body.grant.grant);
        else if (m->head.type == AGENT_FS_GRANT)
            auth_grant_resumed(agent_epoch, m->body.grant.grant);
        else if (m->head.type == AGENT_FS_SEEN)
            rc = take_seen(&m->head, &m->body.seen);
        else if (m->head.type == AGENT_FS_UNLOCKED)
            take_unlocked(&m->body.unlocked);
        else if (m->head.type == AGENT_FS_LOCK)
            take_lock();
        pthread_mutex_unlock(&agent_lock);
        if (m->head.type == AGENT_FS_GRANT_END || m->head.type == AGENT_FS_GRANT || m->head.type == AGENT_FS_LOCK ||
            m->head.type == AGENT_FS_UNLOCKED)
            rc = 0;
        if (m->head.type == AGENT_FS_UNLOCKED)
            agent_on_unlocked();
        if (m->head.type == AGENT_FS_LOCK) {
            auth_end_all(); /* here, so that a grant that comes next lives */
            agent_on_lock();
        }
    }
    for (int i = 0; i < m->nfds && rc < 0; i++)
        close_quiet(m->fds[i]);
    return rc;
}

static void agent_died(int rc)
{
    if (rc == -ECONNRESET)
        log_info("volume %s: the key agent is gone; what is open goes on", mount_config.name);
    else
        log_err("volume %s: key agent: %s; channel closed", mount_config.name, strerror(-rc));
    pthread_mutex_lock(&agent_lock);
    close_quiet(agent_fd);
    agent_fd = -1;
    agent_unlocked = agent_locks = false;
    for (struct waiter *w = waiters; w; w = w->next)
        w->sent = w->done; /* to be asked of the next one */
    seen_sent = seen_done;
    pthread_cond_broadcast(&agent_cond);
    pthread_mutex_unlock(&agent_lock);
}

static int agent_take_up_next(void)
{
    int fd;

    pthread_mutex_lock(&agent_lock);
    while (agent_next < 0)
        pthread_cond_wait(&agent_cond, &agent_lock);
    agent_epoch++;
    auth_new_agent(agent_epoch);
    fd = agent_fd = agent_next;
    agent_next = -1;
    if (seen_last.generation && !seen_done)
        send_seen();
    pthread_cond_broadcast(&agent_cond);
    pthread_mutex_unlock(&agent_lock);
    return fd;
}

static void *agent_thread(void *arg)
{
    struct agent_message *m = arg;
    int fd, rc;

    for (;;) {
        fd = agent_take_up_next();
        do {
            rc = msg_recv(fd, &m->head, &m->body, sizeof(m->body), m->fds, &m->nfds, READ_MS);
            if (rc == 0)
                rc = handle_message(m);
            else if (rc == -ETIMEDOUT || rc == -EAGAIN)
                rc = 0;
            sodium_memzero(&m->body, sizeof(m->body));
        } while (rc == 0);
        agent_died(rc);
    }
    return NULL;
}

static void set_nonblock(int fd)
{
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

int channel_start(void (*on_lock)(void), void (*on_unlocked)(void))
{
    struct agent_message *m = secmem_alloc(sizeof(*m));
    pthread_condattr_t attr;
    pthread_t t;
    int rc;

    if (!m)
        return -errno;
    agent_on_lock = on_lock;
    agent_on_unlocked = on_unlocked;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&agent_cond, &attr);
    pthread_condattr_destroy(&attr);
    set_nonblock(SERVER_FD_CONTROL);
    set_nonblock(SERVER_FD_AGENT);
    agent_next = SERVER_FD_AGENT;
    rc = pthread_create(&t, NULL, agent_thread, m);
    if (rc)
        return -rc;
    pthread_detach(t);
    return 0;
}

void channel_renew(int fd_take)
{
    set_nonblock(fd_take);
    pthread_mutex_lock(&agent_lock);
    close_quiet(agent_next);
    agent_next = fd_take;
    if (agent_fd >= 0)
        shutdown(agent_fd, SHUT_RDWR); /* its reader finds the end and takes up the next */
    pthread_cond_broadcast(&agent_cond);
    pthread_mutex_unlock(&agent_lock);
}

void channel_locked(void)
{
    struct msg_head head = {.type = AGENT_FS_LOCKED};

    pthread_mutex_lock(&agent_lock);
    head.id = ++agent_last_id;
    if (agent_fd >= 0)
        msg_send(agent_fd, &head, NULL, NULL, 0);
    pthread_mutex_unlock(&agent_lock);
}

/* --- asking --- */

static void send_ask(struct waiter *w, const struct agent_auth *ask)
{
    struct msg_head head = {.type = AGENT_FS_AUTH, .len = sizeof(*ask)};

    if (w->renew)
        head = (struct msg_head){.type = AGENT_FS_RENEW, .len = sizeof(*w->renew)};
    w->id = head.id = ++agent_last_id;
    w->sent = msg_send(agent_fd, &head, w->renew ? (const void *)w->renew : ask, NULL, 0) == 0;
}

static void wait_slice(void)
{
    int64_t t = mono_ns() + (int64_t)SLICE_MS * 1000000;
    struct timespec ts = {t / 1000000000, t % 1000000000};

    pthread_cond_timedwait(&agent_cond, &agent_lock, &ts);
}

/* agent_lock held. Until the verdict is there. */
static int ask_and_wait(fuse_req_t req, struct waiter *w, const struct agent_auth *ask)
{
    int64_t since = mono_ns(), end = since + (int64_t)MOUNT_WAIT_MS * 1000000;

    for (;;) {
        if (!w->sent && agent_fd >= 0)
            send_ask(w, ask);
        if (!w->sent && (ask->flags & AGENT_AUTH_PROBE))
            return -EACCES; /* the made-up root will do; a container's start does not hang on it */
        if (!w->done)
            wait_slice();
        if (w->done)
            return w->err;
        if (mono_ns() > end)
            return -EACCES;
        if (mount_interrupted(req, since))
            return -EINTR;
    }
}

static int ask_as(fuse_req_t req, const struct agent_auth *ask, const struct agent_renew *renew, struct auth *ret,
                  struct key **ret_key, struct channel_volume *ret_volume)
{
    struct waiter w = {.pidfd = -1, .renew = renew, .auth = {.kind = AGENT_DENY}}, **p;
    int rc;

    if (ask->flags & AGENT_AUTH_WANT_KEY) {
        w.key = key_new();
        if (!w.key)
            return -ENOMEM;
    }
    pthread_mutex_lock(&agent_lock);
    w.next = waiters;
    waiters = &w;
    rc = ask_and_wait(req, &w, ask);
    for (p = &waiters; *p != &w; p = &(*p)->next)
        ;
    *p = w.next;
    pthread_mutex_unlock(&agent_lock);
    if (rc == 0 && w.pidfd >= 0 && !renew) {
        auth_remember(ask->tid, ask->uid, &w.auth, w.pidfd);
        w.pidfd = -1;
    }
    close_quiet(w.pidfd);
    if (rc == 0 && w.has_key) {
        *ret_key = w.key;
        w.key = NULL;
    }
    key_free(&w.key);
    if (rc < 0) {
        auth_put(&w.auth);
        return rc;
    }
    if (ret_volume)
        *ret_volume = w.volume;
    *ret = w.auth;
    return 0;
}

int channel_ask(fuse_req_t req, const struct agent_auth *ask, struct auth *ret, struct key **ret_key,
                struct channel_volume *ret_volume)
{
    return ask_as(req, ask, NULL, ret, ret_key, ret_volume);
}

int channel_ask_once(int fd, struct key **ret_key, struct channel_volume *ret_volume)
{
    const struct agent_auth ask = {.flags = AGENT_AUTH_MAINTENANCE | AGENT_AUTH_WANT_KEY};
    struct msg_head head = {.type = AGENT_FS_AUTH, .len = sizeof(ask), .id = 1};
    struct agent_message *m = secmem_alloc(sizeof(*m));
    struct waiter w = {.key = key_new(), .auth = {.kind = AGENT_DENY}};
    int rc = m && w.key ? msg_send(fd, &head, &ask, NULL, 0) : -ENOMEM;

    do {
        rc = rc < 0 ? rc : msg_recv(fd, &m->head, &m->body, sizeof(m->body), m->fds, &m->nfds, MOUNT_WAIT_MS);
        for (int i = 0; rc == 0 && i < m->nfds; i++)
            close_quiet(m->fds[i]);
    } while (rc == 0 && m->head.type == AGENT_FS_UNLOCKED);
    if (rc == 0 && m->head.type == AGENT_FS_LOCK)
        rc = -ENOKEY;
    else if (rc == 0 && (m->head.type != AGENT_FS_AUTH || m->head.len != sizeof(m->body.verdict) ||
                         !verdict_ok(&m->body.verdict, 0)))
        rc = -EPROTO;
    if (rc == 0) {
        pthread_mutex_lock(&agent_lock);
        waiter_finish(&w, &m->body.verdict, -1);
        pthread_mutex_unlock(&agent_lock);
        auth_put(&w.auth);
        rc = w.err < 0 ? w.err : w.has_key ? 0 : -ENOKEY;
    }
    secmem_free(m);
    if (rc < 0) {
        key_free(&w.key);
        return rc;
    }
    *ret_key = w.key;
    *ret_volume = w.volume;
    return 0;
}

unsigned channel_lock_orders(void)
{
    unsigned n;

    pthread_mutex_lock(&agent_lock);
    n = agent_lock_orders;
    pthread_mutex_unlock(&agent_lock);
    return n;
}

int channel_ask_again(const struct agent_renew *q, struct auth *ret)
{
    const struct agent_auth ask = {.tid = q->tid};

    return ask_as(NULL, &ask, q, ret, NULL, NULL);
}

bool channel_unlocked(void)
{
    bool unlocked;

    pthread_mutex_lock(&agent_lock);
    unlocked = agent_unlocked;
    pthread_mutex_unlock(&agent_lock);
    return unlocked;
}

bool channel_wait_word(int ms)
{
    int64_t end = mono_ns() + (int64_t)ms * 1000000;
    bool said;

    pthread_mutex_lock(&agent_lock);
    while (!(said = agent_unlocked || agent_locks) && mono_ns() < end)
        wait_slice();
    pthread_mutex_unlock(&agent_lock);
    return said;
}

void channel_seen(void *ctx, const struct volume_seen *now)
{
    int64_t end = mono_ns() + (int64_t)MOUNT_WAIT_MS * 1000000;

    (void)ctx;
    pthread_mutex_lock(&agent_lock);
    seen_last = *now;
    seen_sent = seen_done = false;
    if (agent_fd >= 0)
        send_seen();
    while (seen_sent && !seen_done && mono_ns() < end)
        wait_slice();
    pthread_mutex_unlock(&agent_lock);
}

/* --- cofferd --- */

static pthread_mutex_t control_lock = PTHREAD_MUTEX_INITIALIZER; /* one packet at a time, and what follows */
static uint64_t control_last_id;
static int64_t damage_second;
static unsigned damage_count;

static void control_packet(uint16_t type, uint64_t id, const void *body, size_t n, int wait_ms)
{
    struct msg_head head = {.type = type, .len = (uint32_t)n, .id = id};
    struct pollfd p = {.fd = SERVER_FD_CONTROL, .events = POLLOUT};

    pthread_mutex_lock(&control_lock);
    if (id == 0)
        head.id = ++control_last_id;
    while (msg_send(SERVER_FD_CONTROL, &head, body, NULL, 0) == -EAGAIN) {
        if (wait_ms == 0 || poll(&p, 1, wait_ms) <= 0)
            break;
    }
    pthread_mutex_unlock(&control_lock);
}

static void control_text(uint16_t type, uint64_t id, int err, const char *text, int wait_ms)
{
    struct agent_reply r;

    memset(&r, 0, sizeof(r));
    r.err = err;
    escape_text(text, r.text, sizeof(r.text));
    control_packet(type, id, &r, sizeof(r), wait_ms);
}

void control_send(uint16_t type, uint64_t id, int err, const char *text)
{
    control_text(type, id, err, text, CONTROL_MS);
}

void control_ready(const struct server_init *init)
{
    control_packet(SERVER_READY, 0, init, init ? sizeof(*init) : 0, CONTROL_MS);
}

void control_stat(uint64_t id, const struct server_stat *stat)
{
    control_packet(SERVER_STAT, id, stat, sizeof(*stat), CONTROL_MS);
}

/* Never waited for: the next one says more. */
void control_progress(uint64_t id, uint64_t done, uint64_t total)
{
    struct server_progress p = {done, total};

    control_packet(SERVER_PROGRESS, id, &p, sizeof(p), 0);
}

void control_damage(void *ctx, const char *what)
{
    int64_t second = mono_ns() / 1000000000;
    bool say;

    (void)ctx;
    pthread_mutex_lock(&control_lock);
    if (second != damage_second) {
        damage_second = second;
        damage_count = 0;
    }
    say = damage_count++ < DAMAGE_PER_SECOND;
    pthread_mutex_unlock(&control_lock);
    if (!say)
        return;
    log_err("volume %s: damage: %s", mount_config.name, what);
    /* The engine's locks may be held: what cannot be sent at once stands in the log. */
    control_text(SERVER_DAMAGE, 0, -EIO, what, 0);
}

void control_failed(const char *fmt, ...)
{
    char text[AGENT_TEXT_MAX];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    log_err("volume %s: %s", mount_config.name, text);
    control_send(SERVER_FAILED, 0, -EIO, text);
}
