/*
 * server.c - see server.h. Owns every connection, the engine's windows, the secrets that are being read, and the loop.
 *
 * 1. One thread. Nothing in the loop waits for the engine, for cofferd, for a coffer-fs or for a pipe: what must wait
 * is parked with a deadline. The one exception is the keystore's own work: Argon2id takes about a second, during which
 *    nobody could be answered anyway, as the keystore is locked.
 * 2. A peer that breaks the protocol, or does not take what is sent to it, is hung up on; a coffer-fs without its
 * channel has no right left.
 * 3. What changes policy, releases or refuses is in the audit log before it takes effect; where that fails the request
 *    does. Taking rights away never waits for the log.
 * 4. Connections are only marked dead while the list is walked, and freed at the end of a round.
 */
#include "keystore/server_internal.h"

#include <fcntl.h>
#include <signal.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/inotify.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define NS_PER_MS         1000000ll
#define SECRET_TIMEOUT_MS 5000
#define SUCCESSOR_MS      65000ll /* for a server that died to be followed by another: cofferd tries for 60 s */
#define CHECK_MS          2000    /* how often the grants' cgroups are looked at besides inotify */
#define RECOVERY_MAX      4096
#define PACKETS_A_ROUND   32 /* of one connection, before the others have their turn */

/* A secret that is coming through a pipe. */
struct secret_read {
    struct secret_read *next;
    uint64_t conn_id, msg_id;
    uint16_t type; /* AGENT_INIT or AGENT_UNLOCK */
    uint32_t kind; /* enum agent_slot_kind */
    int in, out;
    uint8_t *buf; /* secmem, AGENT_SECRET_MAX + 1 */
    size_t n;
    int64_t deadline_ns;
};

/* An AGENT_LOCK whose answer waits for the servers. */
struct lock_wait {
    struct lock_wait *next;
    uint64_t conn_id, msg_id;
    int64_t deadline_ns;
};

/* --- connections --- */

struct conn *server_conn(struct server *s, uint64_t id)
{
    for (struct conn *c = s->conns; c; c = c->next)
        if (c->id == id && !c->dead)
            return c;
    return NULL;
}

static struct conn *conn_add_take(struct server *s, int fd, enum conn_kind kind)
{
    struct conn *c = xcalloc(1, sizeof(*c));

    c->id = s->next_id++;
    c->fd = fd;
    c->kind = kind;
    c->next = s->conns;
    s->conns = c;
    return c;
}

static unsigned conns_count(const struct server *s, int kind)
{
    unsigned n = 0;

    for (const struct conn *c = s->conns; c; c = c->next)
        n += !c->dead && (!kind || c->kind == (enum conn_kind)kind);
    return n;
}

static void secret_free(struct secret_read *r)
{
    close_quiet(r->in);
    close_quiet(r->out);
    secmem_free(r->buf);
    free(r);
}

static void secrets_drop(struct server *s, uint64_t conn_id)
{
    for (struct secret_read **p = &s->secrets; *p;) {
        struct secret_read *r = *p;

        if (r->conn_id != conn_id) {
            p = &r->next;
            continue;
        }
        *p = r->next;
        secret_free(r);
    }
}

/* --- what is remembered of volumes --- */

static void conn_learn_id(struct server *s, struct conn *c)
{
    struct agent_volume v;

    if (c->kind != CONN_VOLUME || c->has_id || keystore_volume_get(s->keystore, c->volume, &v) < 0)
        return;
    memcpy(c->volume_id, v.params.id, sizeof(c->volume_id));
    c->has_id = true;
}

static int remember(struct server *s, struct conn *c, const struct volume_seen *now)
{
    int rc = c->has_id ? seen_put(s->seen, c->volume_id, now) : -ENOKEY;

    c->pending = rc < 0 && rc != -ESTALE ? *now : (struct volume_seen){0};
    if (rc < 0 && rc != -ENOKEY)
        log_err("volume %s: generation %llu is not remembered: %s", c->volume, (unsigned long long)now->generation,
                rc == -ESTALE ? "a newer one is" : strerror(-rc));
    return rc;
}

/* The keystore is open: reads what was remembered, and adds what came while it was not. 0 or -errno. */
static int seen_begin(struct server *s)
{
    struct key *key = NULL;
    int rc = keystore_seen_key(s->keystore, &key);

    if (rc == 0)
        rc = seen_unlock(s->seen, key);
    key_free(&key);
    if (rc < 0)
        return rc;
    if (rc == 1 && keystore_volumes(s->keystore) > 0 &&
        (rc = server_audit(s, "generations-missing", "",
                           "what was seen of the volumes is gone: an older state of one would not be noticed")) < 0)
        return rc;
    for (struct conn *c = s->conns; c; c = c->next) {
        conn_learn_id(s, c);
        if (c->kind == CONN_VOLUME && c->pending.generation)
            remember(s, c, &c->pending);
    }
    return 0;
}

/* The volume's other serving channel, besides c. */
static bool served(const struct server *s, const char *volume, const struct conn *but)
{
    for (const struct conn *c = s->conns; c; c = c->next)
        if (c != but && !c->dead && c->kind == CONN_VOLUME && c->purpose == AGENT_PURPOSE_SERVE &&
            !strcmp(c->volume, volume))
            return true;
    return false;
}

/* Ends the grants whose mount is gone: its server has said that it locked the volume, or was not followed by another. */
static void unserved_check(struct server *s)
{
    for (struct grant *g = grants_first(s->grants); g; g = g->next) {
        if (g->unserved_ns && served(s, g->volume, NULL))
            g->unserved_ns = 0;
        else if (g->unserved_ns && mono_ns() - g->unserved_ns > SUCCESSOR_MS * NS_PER_MS)
            grant_end(g, "its mount is gone");
    }
}

static void conn_gone(struct server *s, struct conn *c)
{
    authorise_drop(s, c->id);
    secrets_drop(s, c->id);
    if (c->kind == CONN_BROKER && conns_count(s, CONN_BROKER))
        authorise_ask_anew(s);
    else if (c->kind == CONN_BROKER)
        authorise_refuse_all(s, "the engine could not be asked: cofferd is gone");
    /* A grant outlives a server that died, whose successor will need it; what nothing else would end does not for long. */
    for (struct grant *g = grants_first(s->grants); g && c->kind == CONN_VOLUME; g = g->next) {
        if (g->kind == GRANT_CONTAINER || strcmp(g->volume, c->volume) || served(s, c->volume, c))
            continue;
        if (c->locked)
            grant_end(g, "its mount is gone");
        else
            g->unserved_ns = mono_ns();
    }
    close_quiet(c->fd);
    free(c);
}

static void conns_reap(struct server *s)
{
    for (struct conn **p = &s->conns; *p;) {
        struct conn *c = *p;

        if (!c->dead) {
            p = &c->next;
            continue;
        }
        *p = c->next;
        conn_gone(s, c);
    }
}

void server_send(struct conn *c, uint16_t type, uint64_t id, const void *body, uint32_t len, const int *fds, int nfds)
{
    struct msg_head head = {.type = type, .len = len, .id = id};

    if (!c->dead && msg_send(c->fd, &head, body, fds, nfds) < 0)
        c->dead = true;
}

void server_reply(struct conn *c, uint64_t id, int err, const char *fmt, ...)
{
    struct agent_reply r = {.err = err};
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(r.text, sizeof(r.text), fmt, ap);
    va_end(ap);
    server_send(c, AGENT_REPLY, id, &r, sizeof(r), NULL, 0);
}

int server_audit(struct server *s, const char *event, const char *volume, const char *text)
{
    int rc = audit_append(s->audit, event, volume, "", text);

    if (rc < 0)
        log_err("the audit log cannot be written: %s", strerror(-rc));
    return rc;
}

/* --- the end of grants, and locking --- */

static void send_unlocked(struct server *s, struct conn *c)
{
    const struct agent_unlocked body = {.agent = s->agent};

    if (c->kind == CONN_VOLUME && c->purpose == AGENT_PURPOSE_SERVE)
        server_send(c, AGENT_FS_UNLOCKED, 0, &body, sizeof(body), NULL, 0);
}

static void send_lock(struct conn *c)
{
    if (c->lock_sent)
        c->lock_again = true;
    if (c->lock_sent || c->dead)
        return;
    c->lock_sent = true;
    server_send(c, AGENT_FS_LOCK, 0, NULL, 0, NULL, 0);
}

static void tell_grant_end(struct server *s, const struct grant *g)
{
    struct agent_grant end = {.grant = g->id};
    bool last = grants_count(s->grants, g->volume) == 0;

    for (struct conn *c = s->conns; c; c = c->next) {
        if (c->dead || c->kind != CONN_VOLUME || c->purpose != AGENT_PURPOSE_SERVE || strcmp(c->volume, g->volume))
            continue;
        server_send(c, AGENT_FS_GRANT_END, 0, &end, sizeof(end), NULL, 0);
        if (last)
            send_lock(c);
    }
}

void server_end_grants(struct server *s)
{
    struct grant *g;

    while ((g = grants_take_ended(s->grants))) {
        tell_grant_end(s, g);
        authorise_audit_end(s, g);
        grant_free(g);
    }
}

/* Wipes the root key and takes every volume's key back. */
static void lock_everything(struct server *s, const char *why)
{
    s->locked = true;
    keystore_lock(s->keystore);
    authorise_refuse_all(s, "the keystore was locked");
    grants_end(s->grants, NULL, -1, why);
    server_end_grants(s);
    for (struct conn *c = s->conns; c; c = c->next)
        if (c->kind == CONN_VOLUME && !c->lock_sent)
            send_lock(c);
}

static bool locks_pending(const struct server *s)
{
    for (const struct conn *c = s->conns; c; c = c->next)
        if (!c->dead && c->lock_sent)
            return true;
    return false;
}

static void lock_waits_step(struct server *s)
{
    bool waiting = locks_pending(s);

    /* The servers' last checkpoints are remembered while they lock. */
    if (!waiting && !keystore_unlocked(s->keystore) && seen_unlocked(s->seen))
        seen_lock(s->seen);
    for (struct lock_wait **p = &s->lock_waits; *p;) {
        struct lock_wait *w = *p;
        struct conn *c = server_conn(s, w->conn_id);
        bool late = mono_ns() >= w->deadline_ns;

        if (c && waiting && !late) {
            p = &w->next;
            continue;
        }
        if (c && waiting)
            server_reply(c, w->msg_id, -ETIMEDOUT,
                         "locked, but a mounted volume's server has not wiped its key within 10 s: look at its log");
        else if (c)
            server_reply(c, w->msg_id, 0, "%s", "");
        *p = w->next;
        free(w);
    }
}

/* --- checking what came --- */

static bool text_ok(const char *s, size_t n)
{
    return memchr(s, 0, n) != NULL;
}

static bool zero(const void *p, size_t n)
{
    return sodium_is_zero(p, n);
}

/* --- control: requests --- */

/* What a handler gets. It returns 0, or a negative errno for a breach of the protocol, which ends the connection.
 * Descriptors that it takes it sets to -1; the others are closed for it. */
struct request {
    struct server *s;
    struct conn *c;
    uint64_t id;
    const void *body;
    int *fds;
};

static const char locked_text[] = "the keystore is locked: coffer unlock";

/* Replies with what err means where there is nothing better to say. */
static int done(struct request *r, int err)
{
    const char *text = "";

    if (err == -ENOKEY)
        text = locked_text;
    else if (err == -ENOENT)
        text = "there is no such volume or rule";
    else if (err < 0)
        text = strerror(-err);
    server_reply(r->c, r->id, err, "%s", text);
    return 0;
}

/* A keystore that was not there may have been put back. */
static void look_again(struct server *s)
{
    struct keystore *k;

    if (keystore_initialised(s->keystore) || keystore_open(s->dir_fd, &k) < 0)
        return;
    keystore_close(s->keystore);
    s->keystore = k;
}

static int on_status(struct request *r)
{
    struct agent_status st;

    look_again(r->s);
    st = (struct agent_status){.initialised = keystore_initialised(r->s->keystore),
                               .unlocked = keystore_unlocked(r->s->keystore),
                               .slots = keystore_slots(r->s->keystore),
                               .volumes = keystore_volumes(r->s->keystore),
                               .channels = conns_count(r->s, CONN_VOLUME),
                               .grants = grants_count(r->s->grants, NULL)};

    snprintf(st.driver, sizeof(st.driver), "%s", r->s->driver);
    server_send(r->c, AGENT_STATUS, r->id, &st, sizeof(st), NULL, 0);
    return 0;
}

static bool is_pipe(int fd)
{
    struct stat st;

    return fstat(fd, &st) == 0 && S_ISFIFO(st.st_mode);
}

/* Begins to read a secret; the answer comes when it is there (secret_complete). */
static int secret_begin(struct request *r, uint16_t type)
{
    const struct agent_slot *slot = r->body;
    struct secret_read *n = NULL;

    if (slot->reserved)
        return -EPROTO;
    if (slot->kind < AGENT_SLOT_PASSPHRASE || slot->kind > AGENT_SLOT_RECOVERY ||
        (type == AGENT_INIT && slot->kind == AGENT_SLOT_RECOVERY))
        return done(r, -EINVAL);
    /* Only a pipe: its other end is the one who types, and making it non-blocking disturbs no terminal. */
    if (!is_pipe(r->fds[0]) || fcntl(r->fds[0], F_SETFL, O_NONBLOCK) < 0 ||
        (type == AGENT_INIT && (!is_pipe(r->fds[1]) || fcntl(r->fds[1], F_SETFL, O_NONBLOCK) < 0))) {
        server_reply(r->c, r->id, -EINVAL, "a secret comes through a pipe");
        return 0;
    }
    n = xcalloc(1, sizeof(*n));
    n->buf = secmem_alloc(AGENT_SECRET_MAX + 1);
    if (!n->buf) {
        free(n);
        server_reply(r->c, r->id, -ENOMEM, "no memory can be locked for keys: raise LimitMEMLOCK");
        return 0;
    }
    n->conn_id = r->c->id;
    n->msg_id = r->id;
    n->type = type;
    n->kind = slot->kind;
    n->in = r->fds[0];
    n->out = type == AGENT_INIT ? r->fds[1] : -1;
    r->fds[0] = -1;
    if (type == AGENT_INIT)
        r->fds[1] = -1;
    n->deadline_ns = mono_ns() + SECRET_TIMEOUT_MS * NS_PER_MS;
    n->next = r->s->secrets;
    r->s->secrets = n;
    return 0;
}

static int on_init(struct request *r)
{
    look_again(r->s);
    if (keystore_initialised(r->s->keystore)) {
        server_reply(r->c, r->id, -EEXIST, "there is a keystore already");
        return 0;
    }
    return secret_begin(r, AGENT_INIT);
}

static int on_unlock(struct request *r)
{
    look_again(r->s);
    if (!keystore_initialised(r->s->keystore)) {
        server_reply(r->c, r->id, -ENOENT, "there is no keystore yet: coffer init");
        return 0;
    }
    if (r->s->stopping_ns)
        return done(r, -ESHUTDOWN);
    return secret_begin(r, AGENT_UNLOCK);
}

static int on_lock(struct request *r)
{
    struct lock_wait *w;

    server_audit(r->s, "lock", "", "the operator locks the keystore");
    lock_everything(r->s, "the keystore was locked");
    w = xcalloc(1, sizeof(*w));
    w->conn_id = r->c->id;
    w->msg_id = r->id;
    w->deadline_ns = mono_ns() + AGENT_TIMEOUT_MS * NS_PER_MS;
    w->next = r->s->lock_waits;
    r->s->lock_waits = w;
    return 0;
}

/* --- control: volumes --- */

static int send_volume(struct request *r, const struct agent_volume *v)
{
    server_send(r->c, AGENT_VOLUME_GET, r->id, v, sizeof(*v), NULL, 0);
    return 0;
}

static int on_volume_add(struct request *r)
{
    struct agent_volume v = *(const struct agent_volume *)r->body;
    int rc;

    if (!text_ok(v.name, sizeof(v.name)) || !zero(v.reserved, sizeof(v.reserved)))
        return -EPROTO;
    if (!volume_name_ok(v.name) || v.strict > 1 || v.attached > 1 || v.state > AGENT_VOLUME_USED ||
        (v.params.block_size != 4096 && v.params.block_size != 8192 && v.params.block_size != 16384) ||
        v.params.profile > VOLUME_PROFILE_DATABASE || v.params.size_limit < VOLUME_SIZE_MIN ||
        v.params.size_limit > VOLUME_SIZE_MAX || (v.params.root_mode & ~07777u)) {
        server_reply(r->c, r->id, -EINVAL, "the volume's name or parameters are not possible");
        return 0;
    }
    if (!keystore_unlocked(r->s->keystore))
        return done(r, -ENOKEY);
    rc = server_audit(r->s, "volume-add", v.name, "the operator or the engine makes the volume");
    if (rc == 0)
        rc = keystore_volume_add(r->s->keystore, &v);
    if (rc == -EEXIST) {
        server_reply(r->c, r->id, rc, "there is a volume of that name already");
        return 0;
    }
    return rc < 0 ? done(r, rc) : send_volume(r, &v);
}

static int on_volume_get(struct request *r)
{
    const struct agent_name *q = r->body;
    struct agent_volume v;
    int rc;

    if (!text_ok(q->name, sizeof(q->name)))
        return -EPROTO;
    rc = keystore_volume_get(r->s->keystore, q->name, &v);
    return rc < 0 ? done(r, rc) : send_volume(r, &v);
}

static int on_volume_list(struct request *r)
{
    const struct agent_index *q = r->body;
    struct agent_volume v;
    int rc;

    if (!text_ok(q->name, sizeof(q->name)))
        return -EPROTO;
    rc = keystore_volume_at(r->s->keystore, q->index, &v);
    return rc < 0 ? done(r, rc) : send_volume(r, &v);
}

static int on_volume_state(struct request *r)
{
    static const char *const names[] = {"new", "fresh", "used"};
    const struct agent_volume_state *q = r->body;
    int rc;

    if (!text_ok(q->name, sizeof(q->name)) || !zero(q->reserved, sizeof(q->reserved)))
        return -EPROTO;
    if (q->state > AGENT_VOLUME_USED)
        return done(r, -EINVAL);
    rc = server_audit(r->s, "volume-state", q->name, names[q->state]);
    if (rc == 0)
        rc = keystore_volume_set_state(r->s->keystore, q->name, q->state);
    return done(r, rc);
}

static int on_volume_size(struct request *r)
{
    const struct agent_volume_size *q = r->body;
    char text[64];
    int rc;

    if (!text_ok(q->name, sizeof(q->name)) || !zero(q->reserved, sizeof(q->reserved)))
        return -EPROTO;
    if (q->size_limit < VOLUME_SIZE_MIN || q->size_limit > VOLUME_SIZE_MAX)
        return done(r, -EINVAL);
    snprintf(text, sizeof(text), "limit %llu bytes", (unsigned long long)q->size_limit);
    rc = server_audit(r->s, "volume-size", q->name, text);
    if (rc == 0)
        rc = keystore_volume_set_size(r->s->keystore, q->name, q->size_limit);
    return done(r, rc);
}

static int on_volume_rm(struct request *r)
{
    const struct agent_name *q = r->body;
    struct agent_volume v;
    int rc;

    if (!text_ok(q->name, sizeof(q->name)))
        return -EPROTO;
    if (served(r->s, q->name, NULL)) {
        server_reply(r->c, r->id, -EBUSY, "the volume is mounted");
        return 0;
    }
    rc = keystore_volume_get(r->s->keystore, q->name, &v);
    if (rc == 0)
        rc = server_audit(r->s, "volume-rm", q->name, "the volume's key is destroyed");
    if (rc == 0)
        rc = keystore_volume_rm(r->s->keystore, q->name);
    if (rc == 0)
        seen_forget(r->s->seen, v.params.id);
    if (rc == 0)
        grants_end(r->s->grants, q->name, -1, "the volume was removed");
    return done(r, rc);
}

static int on_accept_rollback(struct request *r)
{
    const struct agent_name *q = r->body;
    struct agent_volume v;
    int rc;

    if (!text_ok(q->name, sizeof(q->name)))
        return -EPROTO;
    rc = keystore_volume_get(r->s->keystore, q->name, &v);
    if (rc == 0)
        rc = server_audit(r->s, "accept-rollback", q->name,
                          "the operator accepts whatever state the volume's next opening finds");
    if (rc == 0)
        rc = seen_accept(r->s->seen, v.params.id);
    return done(r, rc);
}

/* --- control: the rest --- */

static int on_bind(struct request *r)
{
    const struct agent_bind *q = r->body;
    int type = 0, domain = 0;
    socklen_t n = sizeof(int), m = sizeof(int);
    struct agent_volume v;
    struct conn *c;

    if (!text_ok(q->name, sizeof(q->name)) || !zero(q->reserved, sizeof(q->reserved)))
        return -EPROTO;
    if (!volume_name_ok(q->name) || q->purpose > AGENT_PURPOSE_CHECK)
        return done(r, -EINVAL);
    if (getsockopt(r->fds[0], SOL_SOCKET, SO_TYPE, &type, &n) < 0 || type != SOCK_SEQPACKET ||
        getsockopt(r->fds[0], SOL_SOCKET, SO_DOMAIN, &domain, &m) < 0 || domain != AF_UNIX ||
        fcntl(r->fds[0], F_SETFL, O_NONBLOCK) < 0)
        return done(r, -ENOTSOCK);
    /* While locked nobody knows which volumes there are; requests will be refused one by one. */
    if (keystore_unlocked(r->s->keystore) && keystore_volume_get(r->s->keystore, q->name, &v) < 0)
        return done(r, -ENOENT);
    if (conns_count(r->s, 0) >= SERVER_CONNS_MAX)
        return done(r, -EMFILE);
    c = conn_add_take(r->s, r->fds[0], CONN_VOLUME);
    r->fds[0] = -1;
    memcpy(c->volume, q->name, sizeof(c->volume));
    c->purpose = q->purpose;
    c->mount_id = q->mount_id;
    conn_learn_id(r->s, c);
    if (keystore_unlocked(r->s->keystore))
        send_unlocked(r->s, c);
    else if (r->s->locked && c->purpose == AGENT_PURPOSE_SERVE)
        send_lock(c);
    return done(r, 0);
}

/* Forgets the windows that are over and whose process is gone, and closes those whose process is gone. */
static void windows_check(struct server *s)
{
    for (struct window **p = &s->windows; *p;) {
        struct window *w = *p;

        if (attest_pidfd_alive(w->pidfd)) {
            p = &w->next;
            continue;
        }
        *p = w->next;
        for (struct grant *g = grants_first(s->grants); g; g = g->next)
            if (g->kind == GRANT_ENGINE && g->engine == w->tgid && !strcmp(g->volume, w->volume))
                grant_end(g, "the engine is gone");
        close_quiet(w->pidfd);
        free(w);
    }
}

static bool window_open(const struct server *s, const char *volume, pid_t tgid)
{
    for (const struct window *w = s->windows; w; w = w->next)
        if (w->open && w->tgid == tgid && !strcmp(w->volume, volume))
            return true;
    return false;
}

static int engine_begin(struct request *r, const struct agent_engine *q)
{
    struct window *w;

    if (r->fds[0] < 0)
        return -EPROTO;
    if (q->tgid <= 0 || !attest_pidfd_alive(r->fds[0]))
        return done(r, -ESRCH);
    windows_check(r->s);
    /* One that is over says no more than the new one does: it is used again, so that nothing piles up. */
    for (w = r->s->windows; w; w = w->next)
        if (!w->open && w->tgid == q->tgid && !strcmp(w->volume, q->name))
            break;
    if (!w) {
        w = xcalloc(1, sizeof(*w));
        w->next = r->s->windows;
        w->pidfd = -1;
        r->s->windows = w;
    }
    close_quiet(w->pidfd);
    memcpy(w->volume, q->name, sizeof(w->volume));
    w->tgid = q->tgid;
    w->pidfd = r->fds[0];
    w->ref = q->mount_ref;
    w->open = true;
    r->fds[0] = -1;
    return done(r, 0);
}

static int engine_end(struct request *r, const struct agent_engine *q)
{
    bool found = false;

    if (r->fds[0] >= 0)
        return -EPROTO;
    for (struct window *w = r->s->windows; w; w = w->next) {
        struct grant *g;

        if (!w->open || w->ref != q->mount_ref || strcmp(w->volume, q->name))
            continue;
        found = true;
        w->open = false;
        g = grants_engine(r->s->grants, w->volume, w->tgid);
        if (g && !window_open(r->s, w->volume, w->tgid))
            grant_end(g, "the engine's mount is over");
    }
    return done(r, found ? 0 : -ENOENT);
}

static int on_engine(struct request *r)
{
    const struct agent_engine *q = r->body;

    if (!text_ok(q->name, sizeof(q->name)) || !zero(q->reserved, sizeof(q->reserved)) || q->pad)
        return -EPROTO;
    if (!volume_name_ok(q->name) || q->kind > AGENT_ENGINE_END)
        return done(r, -EINVAL);
    return q->kind == AGENT_ENGINE_BEGIN ? engine_begin(r, q) : engine_end(r, q);
}

static int on_why(struct request *r)
{
    const struct agent_why *q = r->body;

    if (!text_ok(q->name, sizeof(q->name)) || !zero(q->reserved, sizeof(q->reserved)) || q->write > 1)
        return -EPROTO;
    if (!keystore_unlocked(r->s->keystore))
        return done(r, -ENOKEY);
    if (q->pid <= 0)
        return done(r, -EINVAL);
    authorise_why(r->s, r->c, r->id, q);
    return 0;
}

static int on_broker(struct request *r)
{
    for (struct conn *c = r->s->conns; c; c = c->next)
        if (c->kind == CONN_BROKER)
            c->dead = true;
    /* What the old one had been asked is asked again when its connection is gone; nothing waits longer than it did. */
    r->c->kind = CONN_BROKER;
    return done(r, 0);
}

/* --- control: rules and notes --- */

static bool rule_fields_ok(const struct agent_rule *q)
{
    return text_ok(q->name, sizeof(q->name)) && text_ok(q->rule, sizeof(q->rule)) && q->deny <= 1 &&
           zero(q->reserved, sizeof(q->reserved));
}

static int audit_rule(struct server *s, const struct agent_rule *q, const char *what)
{
    char rule[AGENT_RULE_MAX], text[AGENT_TEXT_MAX + 64];

    escape_text(q->rule, rule, sizeof(rule));
    snprintf(text, sizeof(text), "%s %s %s", what, q->deny ? "deny" : "allow", rule);
    return server_audit(s, "policy", q->name, text);
}

static int on_rule_add(struct request *r)
{
    const struct agent_rule *q = r->body;
    char why[AGENT_TEXT_MAX] = "";
    int rc;

    if (!rule_fields_ok(q))
        return -EPROTO;
    if (!keystore_unlocked(r->s->keystore))
        return done(r, -ENOKEY);
    rc = policy_check(q->rule, q->deny, why, sizeof(why));
    if (rc < 0) {
        server_reply(r->c, r->id, rc, "%s", why);
        return 0;
    }
    if (!authorise_labels_fit(r->s, q->name, q->rule)) {
        server_reply(r->c, r->id, -E2BIG, "a volume's rules may name at most %d labels", FACTS_LABELS_MAX);
        return 0;
    }
    rc = audit_rule(r->s, q, "add");
    if (rc == 0)
        rc = keystore_rule_add(r->s->keystore, q);
    if (rc == -EEXIST) {
        server_reply(r->c, r->id, rc, "the volume has this rule already");
        return 0;
    }
    if (rc == -E2BIG) {
        server_reply(r->c, r->id, rc, "a volume has at most %d rules: remove one", AGENT_RULES_MAX);
        return 0;
    }
    if (rc == 0)
        authorise_again(r->s, q->name);
    return done(r, rc);
}

static int on_rule_rm(struct request *r)
{
    const struct agent_rule *q = r->body;
    int rc;

    if (!rule_fields_ok(q))
        return -EPROTO;
    if (!keystore_unlocked(r->s->keystore))
        return done(r, -ENOKEY);
    rc = audit_rule(r->s, q, "remove");
    if (rc == 0)
        rc = keystore_rule_rm(r->s->keystore, q);
    if (rc == 0)
        authorise_again(r->s, q->name);
    return done(r, rc);
}

static int on_rule_get(struct request *r)
{
    const struct agent_index *q = r->body;
    struct agent_rule out = {0};
    int rc;

    if (!text_ok(q->name, sizeof(q->name)))
        return -EPROTO;
    rc = keystore_rule_at(r->s->keystore, q->name, q->index, &out);
    if (rc < 0)
        return done(r, rc);
    server_send(r->c, AGENT_RULE_GET, r->id, &out, sizeof(out), NULL, 0);
    return 0;
}

static int on_note(struct request *r)
{
    const struct agent_note *q = r->body;
    char event[80], text[AGENT_TEXT_MAX];

    if (!text_ok(q->name, sizeof(q->name)) || !text_ok(q->event, sizeof(q->event)) ||
        !text_ok(q->text, sizeof(q->text)) || !zero(q->reserved, sizeof(q->reserved)))
        return -EPROTO;
    escape_text(q->event, event, sizeof(event));
    escape_text(q->text, text, sizeof(text));
    return done(r, server_audit(r->s, event, q->name, text));
}

/* --- the broker's and the volumes' packets --- */

static int on_facts(struct request *r)
{
    const struct agent_facts *f = r->body;

    if (!text_ok(f->driver, sizeof(f->driver)) || !zero(f->reserved, sizeof(f->reserved)) || f->err > 0 ||
        f->source > AGENT_FACTS_API || f->host_pid_ns > 1 || f->host_mnt_ns > 1)
        return -EPROTO;
    authorise_facts(r->s, r->id, f, &r->fds[0]);
    return 0;
}

static int on_fs_auth(struct request *r)
{
    const struct agent_auth *q = r->body;
    const uint32_t flags =
        AGENT_AUTH_WANT_KEY | AGENT_AUTH_PROBE | AGENT_AUTH_WRITE | AGENT_AUTH_MAINTENANCE | AGENT_AUTH_RESUME;

    if (q->flags & ~flags)
        return -EPROTO;
    r->c->locked = false;
    authorise_request(r->s, r->c, r->id, q);
    return 0;
}

static int on_fs_renew(struct request *r)
{
    const struct agent_renew *q = r->body;

    if (q->write > 1 || q->grant == 0 || q->grant == UINT64_MAX)
        return -EPROTO;
    r->c->locked = false;
    authorise_renew(r->s, r->c, r->id, q);
    return 0;
}

static int on_fs_seen(struct request *r)
{
    struct agent_seen_done d = {0};
    struct volume_seen now;

    memcpy(&now, r->body, sizeof(now));
    if (!now.generation)
        return -EPROTO;
    d.err = remember(r->s, r->c, &now);
    server_send(r->c, AGENT_FS_SEEN, r->id, &d, sizeof(d), NULL, 0);
    return 0;
}

static int on_fs_locked(struct request *r)
{
    struct conn *c = r->c;
    bool again = c->lock_again;

    c->lock_sent = c->lock_again = false;
    c->locked = true;
    if (again)
        send_lock(c);
    return 0;
}

/* --- the table --- */

static const struct packet {
    uint16_t type;
    enum conn_kind kind;
    uint32_t size;
    int fds_min, fds_max;
    int (*handler)(struct request *);
} packets[] = {
    {AGENT_STATUS, CONN_CONTROL, 0, 0, 0, on_status},
    {AGENT_INIT, CONN_CONTROL, sizeof(struct agent_slot), 2, 2, on_init},
    {AGENT_UNLOCK, CONN_CONTROL, sizeof(struct agent_slot), 1, 1, on_unlock},
    {AGENT_LOCK, CONN_CONTROL, 0, 0, 0, on_lock},
    {AGENT_VOLUME_ADD, CONN_CONTROL, sizeof(struct agent_volume), 0, 0, on_volume_add},
    {AGENT_VOLUME_GET, CONN_CONTROL, sizeof(struct agent_name), 0, 0, on_volume_get},
    {AGENT_VOLUME_LIST, CONN_CONTROL, sizeof(struct agent_index), 0, 0, on_volume_list},
    {AGENT_VOLUME_STATE, CONN_CONTROL, sizeof(struct agent_volume_state), 0, 0, on_volume_state},
    {AGENT_VOLUME_SIZE, CONN_CONTROL, sizeof(struct agent_volume_size), 0, 0, on_volume_size},
    {AGENT_VOLUME_RM, CONN_CONTROL, sizeof(struct agent_name), 0, 0, on_volume_rm},
    {AGENT_ACCEPT_ROLLBACK, CONN_CONTROL, sizeof(struct agent_name), 0, 0, on_accept_rollback},
    {AGENT_RULE_ADD, CONN_CONTROL, sizeof(struct agent_rule), 0, 0, on_rule_add},
    {AGENT_RULE_RM, CONN_CONTROL, sizeof(struct agent_rule), 0, 0, on_rule_rm},
    {AGENT_RULE_GET, CONN_CONTROL, sizeof(struct agent_index), 0, 0, on_rule_get},
    {AGENT_BIND, CONN_CONTROL, sizeof(struct agent_bind), 1, 1, on_bind},
    {AGENT_ENGINE, CONN_CONTROL, sizeof(struct agent_engine), 0, 1, on_engine},
    {AGENT_WHY, CONN_CONTROL, sizeof(struct agent_why), 0, 0, on_why},
    {AGENT_NOTE, CONN_CONTROL, sizeof(struct agent_note), 0, 0, on_note},
    {AGENT_BROKER, CONN_CONTROL, 0, 0, 0, on_broker},
    {AGENT_FACTS, CONN_BROKER, sizeof(struct agent_facts), 0, 1, on_facts},
    {AGENT_FS_AUTH, CONN_VOLUME, sizeof(struct agent_auth), 0, 0, on_fs_auth},
    {AGENT_FS_RENEW, CONN_VOLUME, sizeof(struct agent_renew), 0, 0, on_fs_renew},
    {AGENT_FS_SEEN, CONN_VOLUME, sizeof(struct volume_seen), 0, 0, on_fs_seen},
    {AGENT_FS_LOCKED, CONN_VOLUME, 0, 0, 0, on_fs_locked},
};

static int dispatch(struct server *s, struct conn *c, const struct msg_head *head, const void *body, int *fds, int nfds)
{
    struct request r = {.s = s, .c = c, .id = head->id, .body = body, .fds = fds};

    for (size_t i = 0; i < ARRAY_LEN(packets); i++) {
        const struct packet *p = &packets[i];

        if (p->type != head->type || p->kind != c->kind)
            continue;
        if (head->len != p->size || head->flags || nfds < p->fds_min || nfds > p->fds_max)
            return -EPROTO;
        return p->handler(&r);
    }
    return -EPROTO;
}

static void conn_read(struct server *s, struct conn *c)
{
    /* Big enough for the biggest body of the table; what is longer is cut, and so a breach. */
    _Alignas(16) static uint8_t body[2048];

    for (int i = 0; i < PACKETS_A_ROUND && !c->dead; i++) {
        int fds[MSG_FDS_MAX], nfds = 0;
        struct msg_head head;
        int rc;

        memset(fds, -1, sizeof(fds));
        rc = msg_recv(c->fd, &head, body, sizeof(body), fds, &nfds, -1);
        if (rc == 0)
            rc = dispatch(s, c, &head, body, fds, nfds);
        for (int j = 0; j < nfds; j++)
            close_quiet(fds[j]);
        if (rc == -EAGAIN)
            return;
        if (rc < 0 && rc != -ECONNRESET)
            log_err("a %s connection breaks the protocol and is closed", c->kind == CONN_VOLUME ? "volume" : "control");
        c->dead |= rc < 0;
    }
}

static void accept_one(struct server *s)
{
    struct ucred peer;
    socklen_t n = sizeof(peer);
    int fd = accept4(s->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

    if (fd < 0)
        return;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &n) < 0 || peer.uid != 0) {
        close_quiet(fd);
        return;
    }
    conn_add_take(s, fd, CONN_CONTROL);
}

/* --- secrets through pipes --- */

static const char *const slot_names[] = {"", "passphrase", "key file", "recovery key"};

static void secret_reply(struct server *s, const struct secret_read *r, int err, const char *text)
{
    struct conn *c = server_conn(s, r->conn_id);

    if (c)
        server_reply(c, r->msg_id, err, "%s", text);
}

struct delivery {
    struct server *s;
    int out;
};

/* Between the keystore's writing and its coming into force: who cannot be shown the recovery key gets no keystore, and
 * what is not in the audit log does not happen. */
static int deliver(void *ctx, const char *recovery)
{
    struct delivery *d = ctx;
    struct pollfd out = {.fd = d->out, .events = POLLOUT};
    int rc = seen_reset(d->s->seen);

    if (rc == 0 && (poll(&out, 1, 0) != 1 || out.revents != POLLOUT))
        rc = -EPIPE;
    if (rc == 0)
        rc = server_audit(d->s, "init", "", "the keystore is made");
    return rc < 0 ? rc : write_full(d->out, recovery, strlen(recovery));
}

static void init_complete(struct server *s, struct secret_read *r)
{
    char *recovery = secmem_alloc(RECOVERY_MAX);
    struct delivery d = {s, r->out};
    int rc = recovery ? 0 : -ENOMEM;

    if (rc == 0)
        rc = keystore_init(s->keystore, r->kind, r->buf, r->n, recovery, RECOVERY_MAX, deliver, &d);
    if (rc == 0)
        rc = seen_begin(s);
    secmem_free(recovery);
    secret_reply(s, r, rc, rc < 0 ? strerror(-rc) : "");
}

static void unlock_complete(struct server *s, struct secret_read *r)
{
    int rc = keystore_unlock(s->keystore, r->kind, r->buf, r->n);

    if (rc == 0 && (rc = seen_begin(s)) < 0) {
        lock_everything(s, "the keystore was locked");
        log_err("%s cannot be read: %s", SEEN_FILE, strerror(-rc));
        secret_reply(
            s, r, rc,
            "this opens the keystore, but its file `generations` was changed or cannot be read: restore it, or "
            "remove it if you accept each volume's state as it is");
        return;
    }
    if (rc == 0 && (rc = server_audit(s, "unlock", "", slot_names[r->kind])) < 0)
        lock_everything(s, "the unlocking cannot be written into the audit log");
    else if (rc < 0)
        server_audit(s, "unlock-refused", "", slot_names[r->kind]);
    if (rc == 0)
        s->locked = false;
    for (struct conn *c = s->conns; c && rc == 0; c = c->next)
        send_unlocked(s, c);
    if (rc == -EKEYREJECTED)
        secret_reply(s, r, rc, "no slot of the keystore opens with this");
    else if (rc == -ENOENT)
        secret_reply(
            s, r, rc,
            keystore_initialised(s->keystore)
                ? "the keystore has no slot of this kind: unlock it with its passphrase, key file or recovery key"
                : "there is no keystore yet: run coffer init");
    else if (rc == -EBADMSG)
        secret_reply(s, r, rc, "this opens a slot, but the keystore file was changed: restore it from a backup");
    else
        secret_reply(s, r, rc, rc < 0 ? strerror(-rc) : "");
}

/* The secret is whole. */
static void secret_complete(struct server *s, struct secret_read *r)
{
    /* Whoever types or echoes a passphrase ends it with a newline, which is no part of it. */
    if (r->kind != AGENT_SLOT_KEY_FILE && r->n && r->buf[r->n - 1] == '\n')
        r->n--;
    if (r->n == 0)
        secret_reply(s, r, -EINVAL, "the passphrase or key file is empty");
    else if (r->type == AGENT_INIT)
        init_complete(s, r);
    else
        unlock_complete(s, r);
}

/* Reads on; true when the secret is done with, whatever came of it. */
static bool secret_step(struct server *s, struct secret_read *r)
{
    ssize_t n = read(r->in, r->buf + r->n, AGENT_SECRET_MAX + 1 - r->n);

    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        if (mono_ns() < r->deadline_ns)
            return false;
        secret_reply(s, r, -ETIMEDOUT, "the passphrase or key file did not come in time");
        return true;
    }
    if (n < 0) {
        secret_reply(s, r, -errno, "the passphrase or key file cannot be read");
        return true;
    }
    r->n += (size_t)n;
    if (r->n > AGENT_SECRET_MAX) {
        secret_reply(s, r, -E2BIG, "a passphrase or key file has at most 4096 bytes");
        return true;
    }
    if (n > 0)
        return secret_step(s, r);
    secret_complete(s, r);
    return true;
}

static void secrets_step(struct server *s)
{
    for (struct secret_read **p = &s->secrets; *p;) {
        struct secret_read *r = *p;

        if (!secret_step(s, r)) {
            p = &r->next;
            continue;
        }
        *p = r->next;
        secret_free(r);
    }
}

/* --- the loop --- */

/* What is polled in a round: fixed places, then connections, secrets, facts children. */
enum { POLL_LISTEN, POLL_SIGNAL, POLL_INOTIFY, POLL_HELPER, POLL_FIXED };

struct round {
    struct pollfd *p;
    struct conn **conns; /* of p + POLL_FIXED */
    int nconns, nasks, n;
};

static void round_fill(struct server *s, struct round *r)
{
    unsigned nconns = conns_count(s, 0), nsecrets = 0;

    for (const struct secret_read *q = s->secrets; q; q = q->next)
        nsecrets++;
    r->p = xrealloc(r->p, sizeof(*r->p) * (POLL_FIXED + nconns + nsecrets + SERVER_ASKS_MAX));
    r->conns = xrealloc(r->conns, sizeof(*r->conns) * (nconns + 1));
    r->nconns = 0;
    r->p[POLL_LISTEN] = (struct pollfd){.fd = nconns < SERVER_CONNS_MAX ? s->listen_fd : -1, .events = POLLIN};
    r->p[POLL_SIGNAL] = (struct pollfd){.fd = s->signal_fd, .events = POLLIN};
    r->p[POLL_INOTIFY] = (struct pollfd){.fd = s->inotify_fd, .events = POLLIN};
    r->p[POLL_HELPER] = (struct pollfd){.fd = s->helper_fd};
    r->n = POLL_FIXED;
    for (struct conn *c = s->conns; c; c = c->next) {
        if (c->dead)
            continue;
        r->conns[r->nconns++] = c;
        r->p[r->n++] = (struct pollfd){.fd = c->fd, .events = POLLIN};
    }
    for (const struct secret_read *q = s->secrets; q; q = q->next)
        r->p[r->n++] = (struct pollfd){.fd = q->in, .events = POLLIN};
    r->nasks = authorise_poll(s, r->p + r->n, SERVER_ASKS_MAX);
    r->n += r->nasks;
}

static int round_timeout_ms(const struct server *s)
{
    int64_t next = authorise_deadline(s), now = mono_ns();

    for (const struct secret_read *r = s->secrets; r; r = r->next)
        next = MIN(next, r->deadline_ns);
    for (const struct lock_wait *w = s->lock_waits; w; w = w->next)
        next = MIN(next, w->deadline_ns);
    if (grants_count(s->grants, NULL))
        next = MIN(next, s->next_check_ns);
    if (s->stopping_ns)
        next = MIN(next, s->stopping_ns);
    if (next == INT64_MAX)
        return -1;
    return next <= now ? 0 : (int)MIN((next - now) / NS_PER_MS + 1, 60000);
}

/* Looks whether the grants' cgroups are still there: at an event, and every CHECK_MS. */
static void grants_step(struct server *s, bool event)
{
    char buf[4096] __attribute__((aligned(8)));

    while (event && read(s->inotify_fd, buf, sizeof(buf)) > 0)
        ; /* which watch it was does not matter: all are looked at */
    if (!event && mono_ns() < s->next_check_ns)
        return;
    s->next_check_ns = mono_ns() + CHECK_MS * NS_PER_MS;
    grants_check(s->grants);
    unserved_check(s);
    windows_check(s);
}

static void helper_gone(struct server *s)
{
    log_err("the process that reads container facts is gone; containers that are not yet authorised are refused until "
            "coffer-keyd is restarted");
    close_quiet(s->helper_fd);
    s->helper_fd = -1;
}

static void stop(struct server *s)
{
    struct signalfd_siginfo si;

    if (read(s->signal_fd, &si, sizeof(si)) < 0 || s->stopping_ns)
        return;
    log_info("ends: locks every volume");
    s->stopping_ns = mono_ns() + AGENT_TIMEOUT_MS * NS_PER_MS;
    server_audit(s, "lock", "", "the agent ends");
    lock_everything(s, "the agent ends");
}

static void round_handle(struct server *s, const struct round *r)
{
    if (r->p[POLL_SIGNAL].revents)
        stop(s);
    if (r->p[POLL_HELPER].revents && s->helper_fd >= 0)
        helper_gone(s);
    for (int i = 0; i < r->nconns; i++)
        if (r->p[POLL_FIXED + i].revents && !r->conns[i]->dead)
            conn_read(s, r->conns[i]);
    authorise_step(s, r->p + r->n - r->nasks, r->nasks);
    secrets_step(s);
    grants_step(s, r->p[POLL_INOTIFY].revents != 0);
    do {
        server_end_grants(s);
        conns_reap(s);
    } while (grants_any_ended(s->grants));
    lock_waits_step(s);
    if (r->p[POLL_LISTEN].revents)
        accept_one(s);
}

int server_run(struct server *s)
{
    struct round r = {0};
    int rc = 0;

    while (!s->stopping_ns || (locks_pending(s) && mono_ns() < s->stopping_ns)) {
        round_fill(s, &r);
        if (poll(r.p, (nfds_t)r.n, round_timeout_ms(s)) < 0 && errno != EINTR) {
            rc = -errno;
            log_err("cannot go on: poll: %s", strerror(-rc));
            break;
        }
        round_handle(s, &r);
    }
    free(r.p);
    free(r.conns);
    return rc;
}

/* --- life --- */

int server_new(const struct server_config *config, struct server **ret)
{
    struct server *s = xcalloc(1, sizeof(*s));
    int rc;

    s->listen_fd = config->listen_fd;
    s->dir_fd = config->dir_fd;
    s->signal_fd = config->signal_fd;
    s->helper_fd = config->helper_fd;
    s->next_id = 1;
    randombytes_buf(&s->agent, sizeof(s->agent));
    snprintf(s->driver, sizeof(s->driver), "%s", config->driver);
    s->inotify_fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    s->grants = grants_new(s->inotify_fd);
    s->seen = seen_new(s->dir_fd);
    s->flood = flood_new();
    rc = s->seen ? attest_mounts_load(&s->mounts) : -EMFILE;
    if (rc < 0)
        log_err("/proc/self/mountinfo cannot be read: %s", strerror(-rc));
    if (rc == 0 && (rc = audit_open(s->dir_fd, &s->audit)) < 0) {
        log_err("the audit log cannot be opened: %s", rc == -EBADMSG ? "it is damaged" : strerror(-rc));
        rc = rc == -EBADMSG ? -EUCLEAN : rc; /* that is the keystore's */
    }
    if (rc == 0 && (rc = keystore_open(s->dir_fd, &s->keystore)) < 0)
        log_err("the keystore cannot be opened: %s",
                rc == -EBADMSG ? "its file is damaged: restore it from a backup" : strerror(-rc));
    if (rc == 0 && fcntl(s->listen_fd, F_SETFL, O_NONBLOCK) < 0) {
        rc = -errno;
        log_err("descriptor 3 is no socket: %s", strerror(-rc));
    }
    if (rc < 0) {
        server_free(s);
        return rc;
    }
    *ret = s;
    return 0;
}

void server_free(struct server *s)
{
    if (!s)
        return;
    for (struct conn *c = s->conns; c; c = c->next)
        c->dead = true;
    conns_reap(s);
    while (s->lock_waits) {
        struct lock_wait *w = s->lock_waits;

        s->lock_waits = w->next;
        free(w);
    }
    while (s->windows) {
        struct window *w = s->windows;

        s->windows = w->next;
        close_quiet(w->pidfd);
        free(w);
    }
    authorise_drop(s, 0);
    if (s->audit)
        authorise_audit_floods(s, true);
    flood_free(s->flood);
    grants_free(s->grants);
    attest_mounts_free(s->mounts);
    keystore_close(s->keystore);
    seen_free(s->seen);
    audit_close(s->audit);
    close_quiet(s->inotify_fd);
    close_quiet(s->helper_fd);
    free(s);
}
