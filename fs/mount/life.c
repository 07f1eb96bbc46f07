/*
 * life.c - whether the volume is open, and who may enter it.
 *
 *   LOCKED --open_volume--> OPENING --(key, recovery)--> OPEN --life_lock--> LOCKING --(nobody new)--> CLOSING -->
 * LOCKED |                           ^                  |                                 ^ | +--(somebody new)--+ |
 *                              +----------------- the open failed ----------------------------------------------+
 *   any --life_stop: nothing is opened from then on
 *
 * Owns the volume. Invariants (check_state):
 *  1. `volume` is set and cleared only under engine_lock held exclusively; whoever works with it holds it shared, from
 *     life_enter* to life_leave. It is set in OPEN and LOCKING, or about to be so or not so any more.
 *  2. The stores work on duplicates of the descriptors, so that the volume can be opened again.
 *  3. While LOCKING no request waits for the locking to end: requests come with the kernel's locks held (a directory's,
 *     a truncated file's) which the notifications need. The grants of before have ended; the kernel's own requests are
 *     served, others by what the agent says of them now. If it has let somebody in meanwhile, the volume stays open:
 * its key is needed.
 *  4. While CLOSING nobody comes in and the kernel is not notified, so requests may wait.
 *  5. The kernel is notified without engine_lock: its answer to a notification may be a request that needs it.
 */
#include "mount.h"

#include <assert.h>
#include <fcntl.h>
#include <pthread.h>
#include <sodium.h>
#include <stdlib.h>

enum life_state { LOCKED, OPENING, OPEN, LOCKING, CLOSING };

/* Readers first: a locking that waits for a check of the volume to end must not hold up the kernel's own requests. */
static pthread_rwlock_t engine_lock = PTHREAD_RWLOCK_INITIALIZER; /* volume */
static struct volume *volume;

static pthread_mutex_t state_lock = PTHREAD_MUTEX_INITIALIZER; /* all below */
static pthread_cond_t state_cond = PTHREAD_COND_INITIALIZER;
static enum life_state state = LOCKED;
static bool stopped;
static int64_t failed_at; /* mono_ns of the last opening that failed, or 0 */

#define SAYS_SO_MS 300          /* until an agent that is unlocked has said so */
#define SLICE_NS   50000000ll   /* between looks at an interrupt */
#define RETRY_NS   1000000000ll /* a volume that does not open is not tried more often: each time its key comes along */

/* state_lock held, engine_lock not: by who moves the state. */
static void check_state(enum life_state from, enum life_state to)
{
    assert(state == from);
    assert((from == LOCKED && to == OPENING) || (from == OPENING && (to == OPEN || to == LOCKED)) ||
           (from == OPEN && to == LOCKING) || (from == LOCKING && (to == OPEN || to == CLOSING)) ||
           (from == CLOSING && to == LOCKED));
    /* Between OPENING and OPEN, and CLOSING and LOCKED, only the mover touches it. */
    assert((to == OPENING || to == LOCKED) == !volume);
    (void)from;
    (void)to;
}

/* --- entering --- */

static bool enter_open(struct volume **ret_volume)
{
    pthread_rwlock_rdlock(&engine_lock);
    if (volume) {
        *ret_volume = volume;
        return true;
    }
    pthread_rwlock_unlock(&engine_lock);
    return false;
}

void life_leave(void)
{
    pthread_rwlock_unlock(&engine_lock);
}

bool life_is_open(void)
{
    bool open;

    pthread_mutex_lock(&state_lock);
    open = state == OPEN;
    pthread_mutex_unlock(&state_lock);
    return open;
}

int life_enter_handle(uint64_t fh, struct volume **ret_volume)
{
    int rc = auth_handle_check(fh);

    if (rc < 0)
        return rc;
    return enter_open(ret_volume) ? 0 : -EKEYREVOKED;
}

int life_enter_kernel(struct volume **ret_volume)
{
    return enter_open(ret_volume) ? 0 : -EIO;
}

void life_enter_any(struct volume **ret_volume)
{
    pthread_rwlock_rdlock(&engine_lock);
    *ret_volume = volume;
}

/* state_lock held. */
static void wait_slice(void)
{
    int64_t t = mono_ns() + SLICE_NS;
    struct timespec ts = {t / 1000000000, t % 1000000000};

    pthread_cond_clockwait(&state_cond, &state_lock, CLOCK_MONOTONIC, &ts);
}

/* Waits while the volume is opened or closed. 0, -EINTR, -EACCES after `end`, mono_ns(). */
static int wait_settled(fuse_req_t req, int64_t end, bool *ret_open)
{
    int64_t since = mono_ns();
    int rc = 0;

    pthread_mutex_lock(&state_lock);
    while (rc == 0 && (state == OPENING || state == CLOSING)) {
        if (mono_ns() > end)
            rc = -EACCES;
        else if (mount_interrupted(req, since))
            rc = -EINTR;
        else
            wait_slice();
    }
    *ret_open = state == OPEN || state == LOCKING;
    if (rc == 0 && stopped)
        rc = -EACCES;
    pthread_mutex_unlock(&state_lock);
    return rc;
}

static void move(enum life_state from, enum life_state to)
{
    pthread_mutex_lock(&state_lock);
    check_state(from, to);
    state = to;
    pthread_cond_broadcast(&state_cond);
    pthread_mutex_unlock(&state_lock);
}

/* --- opening --- */

static struct store *store_dup(int fd)
{
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 16);

    return copy < 0 ? NULL : store_fd_take(copy);
}

/* The kernel's references of before the locking are the engine's again. */
static void take_references(struct volume *v)
{
    uint64_t *ino, *refs;
    size_t n = inodes_list(INODES_ALL, &ino, &refs);

    for (size_t i = 0; i < n; i++)
        if (refs[i])
            vol_reference(v, ino[i], refs[i]);
    free(ino);
    free(refs);
}

/* `log` is not needed. */
static int open_snapshot(const struct key *key, const struct channel_volume *cv, struct volume **ret)
{
    const struct volume_options o = {.on_damage = control_damage, .seen = cv->seen, .new_branch = cv->accept_rollback};
    struct store *data = store_dup(SERVER_FD_DATA);

    return data ? volume_snapshot_open(data, key, cv->params.id, mount_config.snapshot, &o, ret) : -EMFILE;
}

static int open_stores(const struct key *key, const struct channel_volume *cv, struct volume **ret)
{
    struct volume_options o = {.background = true,
                               .on_damage = control_damage,
                               .seen = cv->seen,
                               .new_branch = cv->accept_rollback,
                               .mount_id = mount_config.mount_id,
                               .resumed = mount_config.takeover,
                               .on_checkpoint = channel_seen};
    struct store *data = store_dup(SERVER_FD_DATA);
    struct store *log = store_dup(SERVER_FD_LOG);

    if (!data || !log) {
        if (data)
            data->ops->close(data);
        if (log)
            log->ops->close(log);
        return -EMFILE;
    }
    return volume_open(data, log, key, cv->params.id, &o, ret);
}

/* Opens the volume unless somebody else does or did. */
static int open_volume(const struct key *key, const struct channel_volume *cv)
{
    struct volume *v = NULL;
    int rc;

    pthread_mutex_lock(&state_lock);
    if (stopped || state != LOCKED || (failed_at && mono_ns() - failed_at < RETRY_NS)) {
        rc = stopped ? -EACCES : state != LOCKED ? 0 : -EIO;
        pthread_mutex_unlock(&state_lock);
        return rc;
    }
    check_state(LOCKED, OPENING);
    state = OPENING;
    pthread_mutex_unlock(&state_lock);
    rc = (mount_config.snapshot ? open_snapshot : open_stores)(key, cv, &v);
    if (rc < 0) {
        log_err("volume %s: cannot be opened: %s", mount_config.name,
                rc == -ESTALE ? "it was put back to an older state: restore the newer one, or coffer volume "
                                "accept-rollback"
                : rc == -ENOENT && mount_config.snapshot ? server_snapshot_error(rc)
                                                         : strerror(-rc));
        failed_at = mono_ns(); /* read again only after the move */
        move(OPENING, LOCKED);
        return -EIO;
    }
    failed_at = 0;
    pthread_rwlock_wrlock(&engine_lock);
    take_references(v);
    volume = v;
    pthread_rwlock_unlock(&engine_lock);
    move(OPENING, OPEN);
    page_set_open(true);
    return 0;
}

/* Asks the agent once, and opens if the answer brings the key. */
static int ask_and_open(fuse_req_t req, uint32_t opcode, unsigned flags, bool open, struct auth *ret)
{
    const struct fuse_ctx *ctx = fuse_req_ctx(req);
    struct agent_auth ask = {.tid = ctx->pid, .uid = ctx->uid, .opcode = opcode};
    struct channel_volume cv;
    struct key *key = NULL;
    int rc;

    ask.flags = (open ? 0 : AGENT_AUTH_WANT_KEY) | (flags & LIFE_WRITE ? AGENT_AUTH_WRITE : 0) |
                (flags & LIFE_PROBE ? AGENT_AUTH_PROBE : 0);
    rc = channel_ask(req, &ask, ret, &key, &cv);
    if (rc < 0)
        return rc;
    if (ret->kind == AGENT_ALLOW && (flags & LIFE_WRITE) && ret->read_only)
        rc = -EROFS;
    else if (ret->kind == AGENT_ALLOW && key)
        rc = open_volume(key, &cv);
    else if (ret->kind == AGENT_ALLOW && !open)
        rc = -ENOKEY;
    key_free(&key);
    if (rc < 0)
        auth_put(ret);
    return rc;
}

int life_open(int agent_fd)
{
    int64_t end = mono_ns() + (int64_t)MOUNT_WAIT_MS * 1000000;
    unsigned orders = channel_lock_orders();
    struct channel_volume cv;
    struct key *key = NULL;
    bool open;
    int rc = wait_settled(NULL, end, &open);

    if (rc == 0 && !open) {
        rc = channel_ask_once(agent_fd, &key, &cv);
        if (rc == 0)
            rc = open_volume(key, &cv);
        key_free(&key);
        if (rc == 0)
            rc = wait_settled(NULL, end, &open); /* somebody else may be opening it */
        if (rc == 0 && !open)
            rc = -ECANCELED;
    }
    /* An order that came by the other channel may have found nothing to close. */
    if (channel_lock_orders() != orders) {
        server_close_unused();
        return -ECANCELED;
    }
    return rc;
}

void life_renew(bool all)
{
    struct agent_renew q;
    unsigned at = 0;

    while (auth_next_lost(all, &at, &q)) {
        struct auth a;
        int rc = channel_ask_again(&q, &a);

        if (rc < 0 && !channel_unlocked())
            break; /* the agent is gone, or locked again: at the next unlocking */
        auth_found(&q, rc == 0);
        if (rc == 0)
            auth_put(&a);
    }
}

void life_resume(void)
{
    const struct agent_auth ask = {.flags = AGENT_AUTH_RESUME | AGENT_AUTH_WANT_KEY};
    struct channel_volume cv;
    struct key *key = NULL;
    struct auth a;
    int rc;

    if (!page_was_open())
        return;
    if (!channel_wait_word(SAYS_SO_MS)) {
        log_info("volume %s: waits for the keystore to be unlocked, %d s at most: run coffer unlock", mount_config.name,
                 mount_config.patience_ms / 1000);
        if (!channel_wait_word(mount_config.patience_ms))
            log_err("volume %s: the keystore is still locked; what is open is lost to its processes",
                    mount_config.name);
    }
    life_renew(true);
    rc = channel_ask(NULL, &ask, &a, &key, &cv);
    if (rc == 0 && key)
        rc = open_volume(key, &cv);
    key_free(&key);
    if (rc < 0)
        log_info("volume %s: its last server died; this one has no grant to go on with", mount_config.name);
}

/* Enters with a verdict that allows it. -EAGAIN: the volume is not open (any more); -EACCES: the grant has ended. */
static int enter_allowed(const struct auth *a, struct volume **ret_volume)
{
    bool closing;

    if (!enter_open(ret_volume))
        return -EAGAIN;
    pthread_mutex_lock(&state_lock);
    closing = state == CLOSING; /* else the grant is found by life_lock */
    pthread_mutex_unlock(&state_lock);
    if (!closing && auth_live(a))
        return 0;
    life_leave();
    return closing ? -EAGAIN : -EACCES;
}

int life_enter(fuse_req_t req, uint32_t opcode, unsigned flags, struct auth *ret, struct volume **ret_volume)
{
    int64_t end = mono_ns() + (int64_t)MOUNT_WAIT_MS * 1000000;
    const struct fuse_ctx *ctx = fuse_req_ctx(req);
    bool open;
    int rc;

    /* Also where root has made the kernel's side of the mount writable: nothing must get into its cache. */
    if ((flags & LIFE_WRITE) && mount_config.snapshot)
        return -EROFS;
    for (;;) {
        if (auth_cached(ctx->pid, ctx->uid, flags & LIFE_WRITE, ret)) {
            if (enter_allowed(ret, ret_volume) == 0)
                return 0;
            auth_put(ret);
        }
        rc = wait_settled(req, end, &open);
        if (rc == 0)
            rc = ask_and_open(req, opcode, flags, open, ret);
        if (rc < 0)
            return rc;
        if (ret->kind == AGENT_PLACEHOLDER) {
            *ret_volume = NULL;
            pthread_rwlock_rdlock(&engine_lock);
            return 0;
        }
        rc = enter_allowed(ret, ret_volume);
        if (rc == 0)
            return 0;
        auth_put(ret);
        if (rc != -EAGAIN || mono_ns() > end)
            return -EACCES;
    }
}

/* --- locking --- */

struct name_list {
    char **name;
    size_t n;
};

static int collect_name(void *ctx, const char *name, uint64_t ino, uint32_t type, uint64_t cookie,
                        const struct vattr *attr)
{
    struct name_list *l = ctx;

    (void)ino;
    (void)type;
    (void)attr;
    if (cookie < 3)
        return 0;
    l->name = xrealloc(l->name, (l->n + 1) * sizeof(*l->name));
    l->name[l->n++] = xstrdup(name);
    return 0;
}

static void invalidate_inodes(struct fuse_session *se, enum inodes_which which)
{
    uint64_t *ino;
    size_t n = inodes_list(which, &ino, NULL);

    for (size_t i = 0; i < n; i++)
        fuse_lowlevel_notify_inval_inode(se, ino[i], 0, 0);
    free(ino);
}

/* The kernel has written its data, but its times would come too late. Where they have come before the data, a file's time
 * gets as late as that. */
static void set_times_due(void)
{
    struct inode_due *due;
    struct volume *v;
    size_t n = inodes_take_due(&due);

    life_enter_any(&v);
    for (size_t i = 0; v && i < n; i++) {
        struct vattr attr;

        (void)vol_setattr(v, due[i].ino, VOL_SET_MTIME, &(struct vattr){.mtime = due[i].ns}, &attr);
    }
    life_leave();
    free(due);
}

/* A server that has taken over may not know what the kernel has of before. */
static void invalidate_unknown(struct fuse_session *se)
{
    uint64_t next = VOLUME_ROOT_INO;
    struct volume *v;

    life_enter_any(&v);
    if (v && inodes_unknown())
        next = vol_next_inode(v);
    life_leave();
    for (uint64_t ino = VOLUME_ROOT_INO + 1; ino < next; ino++)
        fuse_lowlevel_notify_inval_inode(se, ino, 0, 0);
}

/* Names go before the key: afterwards it would take the entries away from under who has come meanwhile, and detach what
 * is mounted below them. */
static void invalidate_root_entries(struct fuse_session *se)
{
    struct name_list l = {0};
    struct volume *v;

    life_enter_any(&v);
    if (v)
        vol_readdir(v, VOLUME_ROOT_INO, 0, false, collect_name, &l);
    life_leave();
    for (size_t i = 0; i < l.n; i++) {
        size_t len = strlen(l.name[i]);

        if (!auth_any_live())
            fuse_lowlevel_notify_inval_entry(se, VOLUME_ROOT_INO, l.name[i], len);
        explicit_bzero(l.name[i], len);
        free(l.name[i]);
    }
    free(l.name);
}

/* LOCKING -> CLOSING, or back to OPEN if a grant has come since the old ones ended. */
static bool begin_closing(void)
{
    enum life_state next;

    pthread_mutex_lock(&state_lock);
    next = auth_any_live() && !stopped ? OPEN : CLOSING;
    check_state(LOCKING, next);
    state = next;
    pthread_mutex_unlock(&state_lock);
    return next == CLOSING;
}

/* What the kernel has of a volume that the last server had open and that did not open any more: it cannot be asked for the
 * names in its root, and what was not written is lost, but no content is left. */
static void forget_left(struct fuse_session *se)
{
    invalidate_inodes(se, INODES_OPENED);
    fuse_lowlevel_notify_inval_inode(se, VOLUME_ROOT_INO, 0, 0);
    if (inodes_unknown())
        log_err("volume %s: what the kernel has of it in its cache is not known: unmount it", mount_config.name);
    pthread_mutex_lock(&state_lock);
    if (state == LOCKED)
        page_set_open(false);
    pthread_mutex_unlock(&state_lock);
}

bool life_left_open(void)
{
    return !life_is_open() && page_was_open();
}

int life_lock(struct fuse_session *se, bool notify)
{
    struct volume *v;
    int rc;

    pthread_mutex_lock(&state_lock);
    while (state == OPENING || state == LOCKING || state == CLOSING)
        pthread_cond_wait(&state_cond, &state_lock);
    if (state == LOCKED) {
        pthread_mutex_unlock(&state_lock);
        if (notify && loop_serves() && page_was_open())
            forget_left(se);
        return 0;
    }
    check_state(OPEN, LOCKING);
    state = LOCKING;
    pthread_mutex_unlock(&state_lock);
    if (notify) {
        invalidate_inodes(se, INODES_WRITTEN); /* writes dirty pages and waits for them */
        set_times_due();
        invalidate_inodes(se, INODES_OPENED);
        invalidate_unknown(se);
        invalidate_root_entries(se);
    }
    if (!begin_closing())
        return 0;
    pthread_rwlock_wrlock(&engine_lock);
    v = volume;
    volume = NULL;
    rc = volume_close(v);
    pthread_rwlock_unlock(&engine_lock);
    move(CLOSING, LOCKED);
    if (notify) {
        page_set_open(false);
        /* What was read meanwhile, and attributes. */
        invalidate_inodes(se, INODES_ALL);
        fuse_lowlevel_notify_inval_inode(se, VOLUME_ROOT_INO, 0, 0);
    }
    return rc;
}

void life_checkpoint(void)
{
    struct volume *v;

    life_enter_any(&v);
    if (v)
        (void)volume_checkpoint(v); /* closing tells */
    life_leave();
}

void life_stop(void)
{
    pthread_mutex_lock(&state_lock);
    stopped = true;
    pthread_cond_broadcast(&state_cond);
    pthread_mutex_unlock(&state_lock);
    auth_stop();
}
