/*
 * mounts.c - see mounts.h. Owns the mountpoints below <run>/mnt, each mount's /dev/fuse descriptor, and the counts of
 * holders.
 *
 *   IDLE --mount--> SERVING --last holder gone--> (unmount) STOPPING --server ended--> IDLE
 *                    |   ^  \--but a namespace still has it--> LINGERING --gone there too--> (unmount) STOPPING
 *        server died |   | started anew                         |  ^ mount: SERVING again
 *                    v   |                                      |
 *                    FAILED <---(while held)--------------------+--- (not held: IDLE)
 *
 * A server that died is followed by another on the same connection (take_over): meanwhile the mount is FAILED and fuse_fd
 * is open. Only where that does not work is it mounted anew. One that the operator has changed (mounts_restart_server) ends
 * only when the next one stands ready.
 *
 * A cofferd that is started again has fuse_fd and page_fd from the service manager's store, if there is one, or from the
 * living server, or from the one that was to follow it (adopt_server).
 *
 * Invariants:
 *  1. Two servers never run on one volume: `log` carries a lock that belongs to the open file that the server has, until it
 *     has ended or can do nothing any more (fsproc.c).
 *  2. Nobody's data goes to the host's disk in the clear: a mountpoint exists only while something is mounted there, so
 *     binding it at any other time fails.
 *  3. A mount that a container lives with is not taken away, whatever the counts say: what other mount namespaces have
 *     is looked up, not believed (mountinfo_used_elsewhere).
 *  4. The mounted directory is never looked into, not even by stat(2): that would ask a server that may hang.
 *  5. State changes and their fields are made under op_lock and registry_lock both; reading needs one of them.
 *
 * Counts of an engine process that is dead: its next Mount of the same ID replaces them, and what is left is dropped when
 * no namespace has the volume any more. dockerd itself sends no Unmount for what it mounted in an earlier life.
 */
#include "mounts.h"

#include "agent_client.h"
#include "fsproc.h"
#include "mountinfo.h"
#include "notify.h"
#include "spawn.h"
#include "supervisor.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define LOG_LOCK_MS     10000 /* for the last server's flush to end, before a new one */
#define BUSY_MS         2000  /* until a busy mount is detached, and until an unmounted server is told to stop */
#define STOP_MS         50000 /* for a server to flush and end; Docker waits 60 s for Unmount */
#define ENGINE_GRACE_MS 60000 /* after which a dead engine's counts are dropped */
#define HEALTHY_MS      60000 /* a server that lived so long does not count as dying in a row */
#define RESTARTS_MAX    6
#define HANDOVER_MS     30000 /* until a server that shall end for the next one is killed */
#define PATIENCE_MIN_MS 1000  /* for the keystore to be unlocked, of a server that takes over */
#define DEATHS_MS       10000 /* ARRAY_LEN(death_ns) deaths in that time: the next server would die, too */

/* Podman, whose every command is a process of its own, mounts all with this one ID and counts by itself. */
#define PODMAN_ID "2f73349cfc4630255319c6c8dfc1b46a8996ace9d14d8e07563b165915918ec2"

static pthread_mutex_t down_lock = PTHREAD_MUTEX_INITIALIZER;
static bool going_down; /* (down_lock) */

static int server_start(struct plugin_volume *v, struct fsproc *old, struct why *why);
static void restart_failed(struct plugin_volume *v);

static bool is_going_down(void)
{
    bool yes;

    pthread_mutex_lock(&down_lock);
    yes = going_down;
    pthread_mutex_unlock(&down_lock);
    return yes;
}

char *mounts_path(const struct plugin_volume *v)
{
    return xasprintf("%s/%s", plugin_config.mnt_dir, v->name);
}

static void set_state(struct plugin_volume *v, enum mount_state state)
{
    pthread_mutex_lock(&registry_lock);
    v->mount = state;
    pthread_mutex_unlock(&registry_lock);
}

/* Takes fs (or NULL) as the volume's server. */
static void set_server(struct plugin_volume *v, struct fsproc *fs, enum mount_state state)
{
    struct fsproc *old;

    pthread_mutex_lock(&registry_lock);
    old = v->fs;
    v->fs = fs;
    v->server = fs ? fsproc_process(fs) : (struct process){0};
    v->successor = (struct process){0};
    v->unlocked = false;
    v->mount = state;
    pthread_mutex_unlock(&registry_lock);
    fsproc_unref(old);
}

static bool is_held(struct plugin_volume *v)
{
    bool held;

    pthread_mutex_lock(&registry_lock);
    held = v->nholders > 0;
    pthread_mutex_unlock(&registry_lock);
    return held;
}

/* The directories of `coffer mount`, copied. */
static char **local_dirs(struct plugin_volume *v, size_t *ret_n)
{
    char **dirs;
    size_t n = 0;

    pthread_mutex_lock(&registry_lock);
    dirs = xcalloc(v->nholders + 1, sizeof(*dirs));
    for (size_t i = 0; i < v->nholders; i++) {
        if (v->holders[i].local)
            dirs[n++] = xstrdup(v->holders[i].id);
    }
    pthread_mutex_unlock(&registry_lock);
    *ret_n = n;
    return dirs;
}

static void free_dirs(char **dirs, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(dirs[i]);
    free(dirs);
}

/* --- backing files --- */

/* access: O_RDWR or O_RDONLY. */
static int open_backing(int dir, const char *name, int access, int *ret_fd)
{
    struct stat st;
    int fd = openat(dir, name, access | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);

    if (fd < 0)
        return -errno;
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || st.st_uid != 0 || st.st_nlink != 1 || (st.st_mode & 077)) {
        close_quiet(fd);
        return -EPERM;
    }
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
    *ret_fd = fd;
    return 0;
}

static int lock_log(int fd)
{
    int64_t end = mono_ns() + (int64_t)LOG_LOCK_MS * 1000000;
    struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET};

    while (fcntl(fd, F_OFD_SETLK, &fl) < 0) {
        if (errno != EAGAIN && errno != EACCES)
            return -errno;
        if (mono_ns() > end)
            return -EBUSY;
        sleep_ms(50);
    }
    return 0;
}

/* A snapshot is only read, beside the volume's own server. */
static int lock_backing(struct plugin_volume *v, int log, struct why *why)
{
    int rc = v->snapshot ? 0 : lock_log(log);

    if (rc < 0)
        why_set(why, rc,
                "volume %s is still being flushed by its last server: try again in a moment; if it is mounted where "
                "cofferd does not know of, umount it there",
                v->name);
    return rc;
}

static int open_files(struct plugin_volume *v, int *ret_data, int *ret_log, struct why *why)
{
    char id[2 * VOLUME_ID_BYTES + 1];
    int dir = -1, data = -1, log = -1, access = v->snapshot ? O_RDONLY : O_RDWR, rc;

    hex_encode(v->id, sizeof(v->id), id);
    dir = openat(plugin_config.volumes_fd, id, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    rc = dir < 0 ? -errno : open_backing(dir, "data", access, &data);
    if (rc == 0)
        rc = open_backing(dir, "log", access, &log);
    if (rc == -EPERM)
        why_set(why, rc, "%s/volumes/%s: its files must be regular, root's own, mode 0600, with one link",
                plugin_config.state_dir, id);
    else if (rc < 0)
        why_set(why, rc, "cannot open %s/volumes/%s: %s", plugin_config.state_dir, id, strerror(-rc));
    close_quiet(dir);
    if (rc < 0) {
        close_quiet(data);
        close_quiet(log);
        return rc;
    }
    *ret_data = data;
    *ret_log = log;
    return 0;
}

int mounts_open_backing(struct plugin_volume *v, int *ret_data, int *ret_log, struct why *why)
{
    int rc = open_files(v, ret_data, ret_log, why);

    if (rc == 0)
        rc = lock_backing(v, *ret_log, why);
    if (rc < 0) {
        close_quiet(*ret_data);
        close_quiet(*ret_log);
        *ret_data = *ret_log = -1;
    }
    return rc;
}

/* --- the FUSE mount --- */

/*
 * What INIT cannot say (Documentation/ABI/testing/sysfs-class-bdi). The kernel reads ahead 128 KiB, and lets a FUSE file system
 * have 1 % of the dirty memory that all file systems together may have, so that every writer waits for the server. Half of
 * it is enough to collect writes in, and a server that hangs cannot hold up the rest of the host's.
 */
static void tune_bdi(const char *dev)
{
    static const struct {
        const char *name, *value;
    } knobs[] = {{"read_ahead_kb", "1024"}, {"max_ratio", "50"}};

    for (size_t i = 0; i < ARRAY_LEN(knobs); i++) {
        char *path = xasprintf("/sys/class/bdi/%s/%s", dev, knobs[i].name);
        int fd = open(path, O_WRONLY | O_CLOEXEC);

        if (fd < 0 || write_full(fd, knobs[i].value, strlen(knobs[i].value)) < 0)
            log_info("cannot set %s (the volume is slower)", path);
        close_quiet(fd);
        free(path);
    }
}

/* What the mount's servers leave to each other. all: what the kernel has is not known. */
static int page_make(bool all)
{
    const struct server_page_head head = {.version = all ? SERVER_PAGE_VERSION : 0, .all = all};
    int fd = memfd_create("coffer-page", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    if (fd < 0 || ftruncate(fd, sizeof(struct server_page)) < 0 ||
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0 ||
        pwrite_full(fd, &head, sizeof(head), 0) < 0) {
        close_quiet(fd);
        return -1;
    }
    return fd;
}

static int fuse_mount(struct plugin_volume *v, int *ret_fd, struct why *why)
{
    unsigned long flags = MS_NOSUID | MS_NODEV | (v->snapshot ? MS_RDONLY : 0);
    char *path = mounts_path(v), dev[MOUNT_DEV_MAX], options[160];
    int fd = -1, rc = 0;

    if (mountinfo_device(path, dev) == 0)
        umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW); /* of a server that is gone; nothing of ours is left there */
    if (mkdirat(plugin_config.mnt_fd, v->name, 0700) < 0 && errno != EEXIST) {
        rc = why_set(why, -errno, "cannot make %s: %s", path, strerror(errno));
        goto out;
    }
    fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        rc = why_set(why, -errno, "cannot open /dev/fuse: %s: load the module fuse", strerror(errno));
        goto out;
    }
    snprintf(options, sizeof(options),
             "fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read=262144", fd);
    if (mount("coffer", path, "fuse.coffer", flags, options) < 0) {
        rc = why_set(why, -errno, "cannot mount %s: %s", path, strerror(errno));
        goto out;
    }
    if (mountinfo_device(path, dev) == 0)
        tune_bdi(dev);
    v->page_fd = page_make(false);
    *ret_fd = fd;
    fd = -1;
out:
    close_quiet(fd);
    if (rc < 0)
        unlinkat(plugin_config.mnt_fd, v->name, AT_REMOVEDIR);
    free(path);
    return rc;
}

/* Detaches whatever is mounted there and removes the mountpoint (invariant 2). */
static void fuse_detach(struct plugin_volume *v)
{
    char *path = mounts_path(v);

    umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW);
    if (unlinkat(plugin_config.mnt_fd, v->name, AT_REMOVEDIR) < 0 && errno != ENOENT)
        log_err("cannot remove %s: %s", path, strerror(errno));
    free(path);
    if (v->fuse_fd >= 0) {
        notify_remove("fuse", v->name);
        notify_remove("page", v->name);
    }
    close_quiet(v->fuse_fd);
    close_quiet(v->page_fd);
    v->fuse_fd = v->page_fd = -1;
}

/* --- directories of `coffer mount` --- */

static int bind_dir(struct plugin_volume *v, const char *dir, struct why *why)
{
    char *path = mounts_path(v), target[64];
    int fd, rc = 0;

    fd = open(dir, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) {
        rc = why_set(why, -errno, "cannot open %s: %s", dir, strerror(errno));
        goto out;
    }
    snprintf(target, sizeof(target), "/proc/self/fd/%d", fd);
    if (mount(path, target, NULL, MS_BIND, NULL) < 0)
        rc = why_set(why, -errno, "cannot bind %s to %s: %s", path, dir, strerror(errno));
out:
    close_quiet(fd);
    free(path);
    return rc;
}

/* Binds the directories anew after a new server's start. */
static void bind_all(struct plugin_volume *v)
{
    size_t n;
    char **dirs = local_dirs(v, &n);
    struct why why;

    for (size_t i = 0; i < n; i++) {
        umount2(dirs[i], MNT_DETACH | UMOUNT_NOFOLLOW);
        if (bind_dir(v, dirs[i], &why) < 0)
            log_err("volume %s: %s", v->name, why.text);
    }
    free_dirs(dirs, n);
}

static void unbind_all(struct plugin_volume *v)
{
    size_t n;
    char **dirs = local_dirs(v, &n);

    for (size_t i = 0; i < n; i++)
        umount2(dirs[i], MNT_DETACH | UMOUNT_NOFOLLOW);
    free_dirs(dirs, n);
}

/* Whether a container, or anybody whom we did not mount it for, has the filesystem somewhere. */
static bool used_elsewhere(struct plugin_volume *v)
{
    char *path = mounts_path(v), dev[MOUNT_DEV_MAX];
    const char **ours = NULL;
    bool used = false;
    char **dirs;
    size_t n;

    dirs = local_dirs(v, &n);
    ours = xcalloc(n + 1, sizeof(*ours));
    ours[0] = path;
    for (size_t i = 0; i < n; i++)
        ours[i + 1] = dirs[i];
    if (mountinfo_device(path, dev) == 0)
        used = mountinfo_used_elsewhere(dev, ours, n + 1);
    free(ours);
    free_dirs(dirs, n);
    free(path);
    return used;
}

/* --- what the server's thread tells --- */

/* The next one can go on with the mount, and whoever waits for an answer gets it: unless the connection has ended (a server
 * that sees that ends by itself). op_lock held. */
static bool can_take_over(struct plugin_volume *v)
{
    struct pollfd p = {.fd = v->fuse_fd};

    return v->fuse_fd >= 0 && v->has_init && (poll(&p, 1, 0) == 0 || !(p.revents & (POLLERR | POLLNVAL)));
}

/* Notes a death. False: there were too many in a short time. op_lock held. */
static bool death_allowed(struct plugin_volume *v)
{
    memmove(v->death_ns, v->death_ns + 1, sizeof(v->death_ns) - sizeof(v->death_ns[0]));
    v->death_ns[ARRAY_LEN(v->death_ns) - 1] = mono_ns();
    return !v->death_ns[0] || mono_ns() - v->death_ns[0] > (int64_t)DEATHS_MS * 1000000;
}

#define FUSECTL "/sys/fs/fuse/connections"

/* Ends the connection, so that nobody waits for ever: a thread of the dead server may keep the device open. op_lock held. */
static void fuse_abort(struct plugin_volume *v)
{
    char *path = mounts_path(v), dev[MOUNT_DEV_MAX], *abort;
    const char *minor;
    int fd = -1;

    if (mountinfo_device(path, dev) == 0 && (minor = strchr(dev, ':'))) {
        abort = xasprintf(FUSECTL "/%s/abort", minor + 1);
        fd = open(abort, O_WRONLY | O_CLOEXEC);
        /* Where nobody has mounted it (systemd does). */
        if (fd < 0 && errno == ENOENT &&
            mount("fusectl", FUSECTL, "fusectl", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) == 0)
            fd = open(abort, O_WRONLY | O_CLOEXEC);
        if (fd < 0 || write_full(fd, "1", 1) < 0)
            log_info("cannot write %s", abort);
        close_quiet(fd);
        free(abort);
    }
    free(path);
}

/* Starts servers on the mount until one goes on with it. False when none did in time. */
static bool take_over(struct plugin_volume *v)
{
    int64_t end = mono_ns() + (int64_t)plugin_config.takeover_s * 1000000000;
    struct why why = {""};
    int rc = -ESHUTDOWN;
    bool mine;

    do {
        pthread_mutex_lock(&v->op_lock);
        mine = v->mount == MOUNT_FAILED && v->fuse_fd >= 0;
        if (mine && !is_going_down())
            rc = server_start(v, NULL, &why);
        if (mine && rc == 0) {
            if (!is_held(v))
                set_state(v, MOUNT_LINGERING);
            registry_save();
            log_info("volume %s: a new server has taken over", v->name);
        }
        pthread_mutex_unlock(&v->op_lock);
        if (!mine || rc == 0)
            return true; /* or somebody else has started or ended it */
        log_err("volume %s: no server can take over yet: %s", v->name, why.text);
        sleep_ms(500);
    } while (mono_ns() < end && !is_going_down());
    return false;
}

/* A snapshot that is not mounted any more, or could not be, has no entry. op_lock held. */
static void unlist_snapshot(struct plugin_volume *v)
{
    if (v->snapshot && v->mount == MOUNT_IDLE && !is_held(v) && registry_is_listed(v)) {
        registry_set_listed(v, false);
        registry_save();
    }
}

/* Its server has ended: what is left of the mount goes. op_lock held. */
static void clear_mount(struct plugin_volume *v)
{
    fuse_detach(v);
    pthread_mutex_lock(&registry_lock);
    v->has_init = false;
    pthread_mutex_unlock(&registry_lock);
    set_server(v, NULL, is_held(v) ? MOUNT_FAILED : MOUNT_IDLE);
    registry_save();
}

/* The same, and no other mount follows. */
static void finish(struct plugin_volume *v)
{
    clear_mount(v);
    unlist_snapshot(v);
}

/* op_lock held. */
static void give_up(struct plugin_volume *v)
{
    v->deaths = mono_ns() - v->started_ns > (int64_t)HEALTHY_MS * 1000000 ? 1 : v->deaths + 1;
    memset(v->death_ns, 0, sizeof(v->death_ns));
    log_err("volume %s: its mount is given up", v->name);
    fuse_abort(v);
    unbind_all(v);
}

/* A FAILED mount gets another server, or is given up: then false, and there is none. */
static bool replace_dead(struct plugin_volume *v)
{
    bool mine;

    if (take_over(v))
        return true;
    pthread_mutex_lock(&v->op_lock);
    mine = v->mount == MOUNT_FAILED && v->fuse_fd >= 0;
    if (mine) {
        give_up(v);
        finish(v);
    }
    pthread_mutex_unlock(&v->op_lock);
    return !mine;
}

static void server_died(void *ctx, struct fsproc *p, const char *how)
{
    struct plugin_volume *v = ctx;
    bool mine, expected;

    pthread_mutex_lock(&v->op_lock);
    /* Or ensure_mounted has seen its end, too, and could not start another. */
    mine = v->fs == p || (!v->fs && v->mount == MOUNT_FAILED && v->fuse_fd >= 0);
    expected = v->mount == MOUNT_STOPPING;
    if (mine && !expected) {
        char *text = xasprintf("coffer-fs (pid %d): %s", (int)fsproc_process(p).pid, how);

        log_err("volume %s: %s died: %s", v->name, "coffer-fs", how);
        agent_note(v->name, "server-died", text);
        free(text);
        if (death_allowed(v) && can_take_over(v)) {
            set_server(v, NULL, MOUNT_FAILED);
            pthread_mutex_unlock(&v->op_lock);
            if (!replace_dead(v))
                restart_failed(v);
            return;
        }
        give_up(v);
    }
    if (mine)
        finish(v);
    pthread_mutex_unlock(&v->op_lock);
    if (mine)
        restart_failed(v);
}

static void server_ended(void *ctx, struct fsproc *p)
{
    struct plugin_volume *v = ctx;
    bool mine;

    pthread_mutex_lock(&v->op_lock);
    mine = v->fs == p;
    if (mine)
        finish(v);
    pthread_mutex_unlock(&v->op_lock);
    if (mine)
        restart_failed(v);
}

static void server_unlocked(void *ctx, bool unlocked)
{
    struct plugin_volume *v = ctx;

    pthread_mutex_lock(&registry_lock);
    v->unlocked = unlocked;
    pthread_mutex_unlock(&registry_lock);
}

/* One that shall take over: a cofferd that is started meanwhile finds it. */
static void server_started(void *ctx, const struct process *process)
{
    struct plugin_volume *v = ctx;

    pthread_mutex_lock(&registry_lock);
    v->successor = *process;
    pthread_mutex_unlock(&registry_lock);
    registry_save();
}

static void server_free(void *ctx)
{
    registry_unref(ctx);
}

static void server_tick(void *ctx, struct fsproc *p);

static const struct fsproc_owner server_owner = {.started = server_started,
                                                 .died = server_died,
                                                 .ended = server_ended,
                                                 .tick = server_tick,
                                                 .unlocked = server_unlocked,
                                                 .free = server_free};

/* --- starting a server; op_lock held --- */

/* The server whose turn it is: fs, known to the state file before it is told to go on, so that a cofferd that is started
 * meanwhile finds it. 0 or -errno. */
static int server_go(struct plugin_volume *v, struct fsproc *fs, int log, struct why *why)
{
    int rc = lock_backing(v, log, why);

    if (rc < 0)
        return rc;
    set_server(v, fs, MOUNT_SERVING);
    registry_save();
    rc = fsproc_go(fs);
    return rc < 0 ? why_set(why, rc, "the new server of volume %s does not listen: %s", v->name, strerror(-rc)) : 0;
}

static void store_descriptors(struct plugin_volume *v)
{
    notify_store("fuse", v->name, v->fuse_fd);
    notify_store("page", v->name, v->page_fd);
}

/* What is left of the time in which a mount must have another server. op_lock held. */
static int patience_ms(const struct plugin_volume *v)
{
    int64_t died = v->mount == MOUNT_FAILED ? v->death_ns[ARRAY_LEN(v->death_ns) - 1] : 0;
    int64_t left = plugin_config.takeover_s * 1000 - (died ? (mono_ns() - died) / 1000000 : 0);

    return (int)MAX(left, PATIENCE_MIN_MS);
}

/* On the mount if there is one (then it takes over), else on a new one. old: the server that lives on until the new one stands
 * ready, then ends; or NULL. An error leaves old as it is, or ended and the mount FAILED. */
static int server_start(struct plugin_volume *v, struct fsproc *old, struct why *why)
{
    struct fsproc_fds fds = {
        .agent = -1, .data = -1, .log = -1, .agent_generation = supervisor_generation(), .patience_ms = patience_ms(v)};
    bool takeover = v->fuse_fd >= 0;
    struct plugin_volume *ref = NULL;
    struct server_init init;
    struct fsproc *fs = NULL;
    bool has_init;
    int rc;

    rc = old ? open_files(v, &fds.data, &fds.log, why) : mounts_open_backing(v, &fds.data, &fds.log, why);
    if (rc == 0 && !takeover) {
        randombytes_buf(&v->mount_id, sizeof(v->mount_id));
        rc = fuse_mount(v, &v->fuse_fd, why);
    }
    if (rc < 0)
        goto out;
    fds.fuse = v->fuse_fd;
    fds.page = v->page_fd;
    fds.snapshot = v->snapshot;
    fds.mount_id = v->mount_id;
    fds.takeover = takeover ? &v->init : NULL;
    rc = fds.page < 0 ? why_set(why, -ENOMEM, "volume %s: no memory to share with its server", v->name)
                      : agent_bind(v->name, AGENT_PURPOSE_SERVE, &fds.agent, why);
    if (rc < 0)
        goto unmount;
    ref = registry_ref(v);
    rc = fsproc_start(v->name, v->params.profile == VOLUME_PROFILE_DATABASE, v->strict, &fds, &server_owner, v, &fs,
                      why);
    if (rc < 0)
        goto unmount;
    ref = NULL; /* the server's thread has it now */
    has_init = fsproc_init(fs, &init);
    pthread_mutex_lock(&registry_lock);
    v->has_init = has_init;
    v->init = init;
    pthread_mutex_unlock(&registry_lock);
    v->started_ns = mono_ns();
    if (!takeover) {
        set_server(v, fs, MOUNT_SERVING);
        if (has_init)
            store_descriptors(v);
        goto out;
    }
    if (old && fsproc_hand_over(old, HANDOVER_MS) < 0)
        log_err("volume %s: its old server did not end within %d s: killed", v->name, HANDOVER_MS / 1000);
    rc = server_go(v, fs, fds.log, why);
    if (rc == 0)
        goto out;
    fsproc_expect_end(fs);
    fsproc_kill(fs);
    if (v->fs == fs)
        fsproc_ref(fs); /* set_server drops the one of the volume */
    set_server(v, NULL, MOUNT_FAILED);
    fsproc_unref(fs);
unmount:
    if (!takeover)
        fuse_detach(v);
out:
    registry_unref(ref);
    close_quiet(fds.agent);
    close_quiet(fds.data);
    close_quiet(fds.log);
    return rc;
}

static int ensure_mounted(struct plugin_volume *v, struct why *why)
{
    /* A server that has just died, before its thread got to say so. */
    if (v->fs && v->mount != MOUNT_STOPPING && fsproc_wait_end(v->fs, 0) == 0) {
        if (v->fuse_fd >= 0 && v->has_init) {
            set_server(v, NULL, MOUNT_FAILED);
        } else {
            unbind_all(v);
            clear_mount(v);
        }
    }
    if (v->mount == MOUNT_STOPPING) {
        if (fsproc_wait_end(v->fs, LOG_LOCK_MS) < 0)
            return why_set(why, -EBUSY, "volume %s is still being flushed: try again in a moment", v->name);
        clear_mount(v);
    }
    if (v->mount == MOUNT_LINGERING)
        set_state(v, MOUNT_SERVING);
    if (v->mount == MOUNT_SERVING)
        return 0;
    return server_start(v, NULL, why);
}

/* Starts a server for a volume that is held and has none; waits longer from one death in a row to the next. */
static void restart_failed(struct plugin_volume *v)
{
    for (int tries = 0; tries < RESTARTS_MAX; tries++) {
        struct why why = {""};
        unsigned deaths;
        int rc = 0;

        pthread_mutex_lock(&v->op_lock);
        deaths = v->deaths;
        pthread_mutex_unlock(&v->op_lock);
        deaths = MAX(deaths, (unsigned)tries + 1);
        sleep_ms(deaths <= 1 ? 0 : 1000 << MIN(deaths - 2, 5u));
        pthread_mutex_lock(&v->op_lock);
        if (v->mount == MOUNT_FAILED && registry_is_listed(v) && !is_going_down()) {
            bool takeover = v->fuse_fd >= 0; /* the mount is the same: its directories are bound */

            rc = server_start(v, NULL, &why);
            if (rc == 0) {
                if (!takeover)
                    bind_all(v);
                registry_save();
                log_info("volume %s: %s", v->name, takeover ? "a new server has taken over" : "mounted anew");
            }
        }
        pthread_mutex_unlock(&v->op_lock);
        if (rc == 0)
            return;
        log_err("volume %s: %s", v->name, why.text);
    }
}

/* --- unmounting; op_lock held --- */

/* Waits for the unmounted volume's server to end. */
static int stop_server(struct plugin_volume *v, struct why *why)
{
    int rc = 0;

    if (v->fs) {
        fsproc_expect_end(v->fs);
        rc = fsproc_wait_end(v->fs, BUSY_MS);
        if (rc < 0) {
            fsproc_stop(v->fs);
            rc = fsproc_wait_end(v->fs, STOP_MS);
        }
    }
    if (rc < 0)
        return why_set(why, rc, "volume %s is unmounted, but still being flushed", v->name);
    finish(v);
    agent_note(v->name, "umount", "");
    return 0;
}

enum urgency {
    POLITE, /* a mount that is busy, or lives in another namespace, stays (LINGERING) */
    NORMAL, /* one that lives in another namespace stays; a busy one is detached */
    FORCED,
};

static int teardown(struct plugin_volume *v, enum urgency urgency, struct why *why)
{
    char *path = NULL;
    int64_t end = mono_ns() + (int64_t)BUSY_MS * 1000000;
    int rc = 0;

    if (v->mount == MOUNT_IDLE || v->mount == MOUNT_FAILED) {
        if (v->fuse_fd >= 0)
            fuse_abort(v);
        finish(v);
        return 0;
    }
    if (v->mount == MOUNT_STOPPING)
        return stop_server(v, why);
    if (urgency != FORCED) {
        while (used_elsewhere(v)) {
            if (urgency == POLITE || mono_ns() > end)
                goto linger;
            sleep_ms(100);
        }
    }
    path = mounts_path(v);
    set_state(v, MOUNT_STOPPING);
    while ((rc = umount2(path, UMOUNT_NOFOLLOW) < 0 ? -errno : 0) == -EBUSY && mono_ns() < end)
        sleep_ms(50);
    if (rc == -EBUSY && urgency == POLITE)
        goto linger;
    if (rc < 0 && umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW) < 0 && errno != EINVAL)
        log_err("cannot unmount %s: %s", path, strerror(errno));
    free(path);
    return stop_server(v, why);
linger:
    free(path);
    if (v->mount != MOUNT_LINGERING)
        log_info("volume %s: nobody holds it, but something still uses it; unmounted when that ends", v->name);
    set_state(v, MOUNT_LINGERING);
    registry_save();
    return 0;
}

/* --- counts --- */

/* Takes the newest open window off the holder. registry_lock held. */
static uint64_t pop_ref(struct holder *h)
{
    return h->nrefs ? h->refs[--h->nrefs] : 0;
}

/* Closes windows that the agent has open. */
static void end_windows(struct plugin_volume *v, const struct process *engine, const uint64_t *refs, size_t n)
{
    struct why why;

    for (size_t i = 0; i < n; i++) {
        if (refs[i] && agent_engine(v->name, AGENT_ENGINE_END, engine->pid, -1, refs[i], &why) < 0)
            log_info("volume %s: the engine's window is not closed: %s", v->name, why.text);
    }
}

/* One more for id. The counts of a dead engine process for this ID are replaced, not added to. */
static void count_mount(struct plugin_volume *v, const char *id, bool local, const struct process *engine, uint64_t ref)
{
    struct holder *h;
    uint64_t *stale = NULL;
    size_t nstale = 0;
    struct process dead = {0};

    pthread_mutex_lock(&registry_lock);
    h = holder_find(v, id, local);
    if (!h)
        h = holder_add(v, id, local);
    if (h->count && strcmp(id, PODMAN_ID) != 0 && !process_same(&h->engine, engine) && !process_alive(&h->engine)) {
        stale = h->refs;
        nstale = h->nrefs;
        dead = h->engine;
        h->refs = NULL;
        h->nrefs = 0;
        h->count = 0;
    }
    h->count++;
    h->engine = *engine;
    h->refs = xrealloc(h->refs, (h->nrefs + 1) * sizeof(*h->refs));
    h->refs[h->nrefs++] = ref;
    pthread_mutex_unlock(&registry_lock);
    end_windows(v, &dead, stale, nstale);
    free(stale);
}

/* One less for id. False when nobody of that id holds it. */
static bool count_unmount(struct plugin_volume *v, const char *id, bool local)
{
    struct process engine = {0};
    struct holder *h;
    uint64_t ref = 0;

    pthread_mutex_lock(&registry_lock);
    h = holder_find(v, id, local);
    if (h) {
        engine = h->engine;
        ref = pop_ref(h);
        if (--h->count == 0)
            holder_remove(v, h);
    }
    pthread_mutex_unlock(&registry_lock);
    end_windows(v, &engine, &ref, 1);
    return h != NULL;
}

/* Drops the counts of engine processes that are dead. True when there was one. */
static bool drop_dead(struct plugin_volume *v)
{
    bool dropped = false;

    for (;;) {
        struct holder *dead = NULL, copy = {0};

        pthread_mutex_lock(&registry_lock);
        for (size_t i = 0; i < v->nholders && !dead; i++) {
            struct holder *h = &v->holders[i];

            if (!h->local && strcmp(h->id, PODMAN_ID) != 0 && !process_alive(&h->engine))
                dead = h;
        }
        if (dead) {
            copy = *dead;
            dead->id = NULL;
            dead->refs = NULL;
            holder_remove(v, dead);
        }
        pthread_mutex_unlock(&registry_lock);
        if (!dead)
            break;
        end_windows(v, &copy.engine, copy.refs, copy.nrefs);
        free(copy.id);
        free(copy.refs);
        dropped = true;
    }
    return dropped;
}

static bool has_dead_engine(struct plugin_volume *v)
{
    bool dead = false;

    pthread_mutex_lock(&registry_lock);
    for (size_t i = 0; i < v->nholders && !dead; i++)
        dead =
            !v->holders[i].local && strcmp(v->holders[i].id, PODMAN_ID) != 0 && !process_alive(&v->holders[i].engine);
    pthread_mutex_unlock(&registry_lock);
    return dead;
}

/* --- what time brings --- */

/* A thread of its own: it waits for the server's end, which the server's thread must see. */
static void *tidy(void *arg)
{
    struct plugin_volume *v = arg;
    struct why why;

    pthread_mutex_lock(&v->op_lock);
    if (v->mount == MOUNT_SERVING && has_dead_engine(v) && !used_elsewhere(v) && drop_dead(v)) {
        log_info("volume %s: dropped the counts of an engine that is gone", v->name);
        registry_save();
    }
    if ((v->mount == MOUNT_LINGERING || v->mount == MOUNT_SERVING) && !is_held(v) && teardown(v, POLITE, &why) < 0)
        log_err("%s", why.text);
    pthread_mutex_unlock(&v->op_lock);
    registry_unref(v);
    return NULL;
}

static void server_tick(void *ctx, struct fsproc *p)
{
    struct plugin_volume *v = ctx, *ref;
    bool due = false;

    if (pthread_mutex_trylock(&v->op_lock) != 0)
        return;
    if (v->fs == p && v->mount == MOUNT_LINGERING)
        due = !used_elsewhere(v);
    if (v->fs == p && v->mount == MOUNT_SERVING) {
        if (!has_dead_engine(v))
            v->engine_dead_ns = 0;
        else if (v->engine_dead_ns == 0)
            v->engine_dead_ns = mono_ns();
        else
            due = mono_ns() - v->engine_dead_ns > (int64_t)ENGINE_GRACE_MS * 1000000 && !used_elsewhere(v);
    }
    pthread_mutex_unlock(&v->op_lock);
    if (!due)
        return;
    ref = registry_ref(v);
    if (thread_start(tidy, ref) < 0)
        registry_unref(ref);
}

/* --- the engine's Mount and Unmount --- */

/* Takes op_lock of a volume that exists. */
static int lock_volume(struct plugin_volume *v, int ms, struct why *why)
{
    if (mutex_lock_for(&v->op_lock, ms) < 0)
        return why_set(why, -EBUSY, "volume %s is busy with another operation: try again later", v->name);
    if (!registry_is_listed(v)) {
        pthread_mutex_unlock(&v->op_lock);
        return why_set(why, -ENOENT, "no such volume: %s", v->name);
    }
    return 0;
}

/* Takes op_lock of a snapshot's entry, and lists it: whoever had it mounted may have unmounted it meanwhile. */
static int lock_snapshot(struct plugin_volume *v, int ms, struct why *why)
{
    char *name = xasprintf("%.*s", (int)(v->snapshot - 1 - v->name), v->name);
    struct plugin_volume *of = registry_find_ref(name);
    int rc;

    if (!of) {
        rc = why_set(why, -ENOENT, "no such volume: %s", name);
    } else if (mutex_lock_for(&v->op_lock, ms) < 0) {
        rc = why_set(why, -EBUSY, "snapshot %s is busy with another operation: try again later", v->name);
    } else if ((rc = lock_volume(of, ms, why)) < 0) {
        pthread_mutex_unlock(&v->op_lock);
    } else {
        registry_list_snapshot(v, of);
        pthread_mutex_unlock(&of->op_lock);
    }
    registry_unref(of);
    free(name);
    return rc;
}

/* What Mount does before it counts. op_lock held. */
static int prepare_mount(struct plugin_volume *v, bool *ret_started, struct why *why)
{
    bool running = v->mount == MOUNT_SERVING || v->mount == MOUNT_LINGERING;
    int rc;

    if (is_going_down())
        return why_set(why, -ESHUTDOWN, "cofferd is going down");
    rc = agent_need_unlocked(why);
    if (rc < 0)
        return rc;
    rc = ensure_mounted(v, why);
    *ret_started = rc == 0 && !running;
    return rc;
}

/* Opens the window in which the engine may fill a fresh volume. 0 when there is none. */
static uint64_t begin_window(struct plugin_volume *v, const struct engine_peer *peer)
{
    struct why why;
    uint64_t ref;

    if (peer->pidfd < 0)
        return 0;
    randombytes_buf(&ref, sizeof(ref));
    ref = (ref >> 2) | 1; /* a positive JSON integer */
    if (agent_engine(v->name, AGENT_ENGINE_BEGIN, peer->process.pid, peer->pidfd, ref, &why) < 0) {
        log_err("volume %s: the engine will not be let in to fill it: %s", v->name, why.text);
        return 0;
    }
    return ref;
}

/* op_lock held. What is counted must survive us, or it is not given. */
static int save_mount(struct plugin_volume *v, const char *id, bool local, struct why *why)
{
    struct why ignored;
    int rc = registry_save();

    if (rc == 0)
        return 0;
    if (local)
        umount2(id, UMOUNT_NOFOLLOW | MNT_DETACH);
    if (count_unmount(v, id, local) && !is_held(v))
        teardown(v, NORMAL, &ignored);
    return why_set(why, rc, "volume %s is not mounted: %s/cofferd.json cannot be written: %s", v->name,
                   plugin_config.state_dir, strerror(-rc));
}

int mounts_engine_mount(struct plugin_volume *v, const char *id, const struct engine_peer *peer, struct why *why)
{
    bool started = false;
    int rc = lock_volume(v, MOUNTS_PATIENCE_MS, why);

    if (rc < 0)
        return rc;
    rc = prepare_mount(v, &started, why);
    if (rc == 0) {
        count_mount(v, id, false, &peer->process, begin_window(v, peer));
        rc = save_mount(v, id, false, why);
        if (rc == 0 && started)
            agent_note(v->name, "mount", "by the container engine");
    }
    pthread_mutex_unlock(&v->op_lock);
    return rc;
}

int mounts_engine_unmount(struct plugin_volume *v, const char *id, struct why *why)
{
    int rc = lock_volume(v, MOUNTS_PATIENCE_MS, why);

    if (rc < 0)
        return rc == -ENOENT ? 0 : rc;
    if (count_unmount(v, id, false)) {
        if (!is_held(v))
            rc = teardown(v, NORMAL, why);
        registry_save();
    } else if (v->mount == MOUNT_STOPPING) {
        rc = stop_server(v, why); /* the engine asks again after an Unmount that took too long */
    }
    pthread_mutex_unlock(&v->op_lock);
    return rc;
}

/* --- coffer mount and umount --- */

/* dir with its parents resolved. The last component is not looked at: it may be a mounted volume (invariant 4). */
static int canonical_dir(const char *dir, char **ret, struct why *why)
{
    char *copy = xstrdup(dir), *slash, *parent;
    size_t n = strlen(copy);

    while (n > 1 && copy[n - 1] == '/')
        copy[--n] = 0;
    slash = strrchr(copy, '/');
    if (dir[0] != '/' || n >= PATH_MAX || !slash || !slash[1] || !strcmp(slash, "/.") || !strcmp(slash, "/..")) {
        free(copy);
        return why_set(why, -EINVAL, "give the directory as an absolute path");
    }
    *slash = 0;
    parent = realpath(copy[0] ? copy : "/", NULL);
    if (!parent) {
        int rc = why_set(why, -errno, "%s: %s", dir, strerror(errno));

        free(copy);
        return rc;
    }
    *ret = xasprintf("%s/%s", strcmp(parent, "/") ? parent : "", slash + 1);
    free(parent);
    free(copy);
    return 0;
}

static int check_dir(const char *dir, struct why *why)
{
    char dev[MOUNT_DEV_MAX];
    struct dirent *d;
    DIR *list = NULL;
    int fd, rc = 0;

    if (mountinfo_device(dir, dev) == 0)
        return why_set(why, -EBUSY, "%s is a mount already", dir);
    fd = open(dir, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return why_set(why, -errno, "%s: %s: give an empty directory that exists", dir, strerror(errno));
    list = fdopendir(fd);
    while (list && rc == 0 && (d = readdir(list))) {
        if (strcmp(d->d_name, ".") != 0 && strcmp(d->d_name, "..") != 0)
            rc = why_set(why, -ENOTEMPTY, "%s is not empty: give an empty directory", dir);
    }
    if (list)
        closedir(list);
    else
        close_quiet(fd);
    return rc;
}

int mounts_local_mount(struct plugin_volume *v, const char *dir, struct why *why)
{
    struct process self = {0};
    char *path = NULL, *text = NULL;
    bool started;
    int rc;

    rc = canonical_dir(dir, &path, why);
    if (rc == 0)
        rc = (v->snapshot ? lock_snapshot : lock_volume)(v, MOUNTS_PATIENCE_MS, why);
    if (rc < 0) {
        free(path);
        return rc;
    }
    rc = check_dir(path, why);
    if (rc == 0)
        rc = prepare_mount(v, &started, why);
    if (rc < 0)
        goto out;
    rc = bind_dir(v, path, why);
    if (rc == 0) {
        count_mount(v, path, true, &self, 0);
        rc = save_mount(v, path, true, why);
        if (rc < 0)
            goto out;
        text = xasprintf("at %s", path);
        agent_note(v->name, "mount", text);
        free(text);
    } else if (!is_held(v)) {
        struct why ignored;

        teardown(v, NORMAL, &ignored);
    }
out:
    unlist_snapshot(v);
    pthread_mutex_unlock(&v->op_lock);
    free(path);
    return rc;
}

/* The volume that is mounted at dir, with a reference. */
static struct plugin_volume *volume_at_ref(const char *dir)
{
    struct plugin_volume **all, *found = NULL;
    size_t n;

    registry_mounts_ref(&all, &n);
    for (size_t i = 0; i < n; i++) {
        pthread_mutex_lock(&registry_lock);
        if (!found && holder_find(all[i], dir, true))
            found = all[i];
        pthread_mutex_unlock(&registry_lock);
        if (found != all[i])
            registry_unref(all[i]);
    }
    free(all);
    return found;
}

int mounts_local_umount(const char *dir, struct why *why)
{
    struct plugin_volume *v = NULL;
    char *path = NULL;
    int rc = canonical_dir(dir, &path, why);

    if (rc < 0)
        return rc;
    v = volume_at_ref(path);
    if (!v) {
        rc = why_set(why, -ENOENT, "no volume is mounted at %s", path);
        goto out;
    }
    rc = lock_volume(v, MOUNTS_PATIENCE_MS, why);
    if (rc < 0)
        goto out;
    /* EINVAL: somebody unmounted it by hand. */
    if (umount2(path, UMOUNT_NOFOLLOW) < 0 && errno != EINVAL && errno != ENOENT) {
        rc = why_set(why, -errno, "cannot unmount %s: %s: end what uses it (fuser -vm %s) and try again", path,
                     strerror(errno), path);
    } else if (count_unmount(v, path, true)) {
        if (!is_held(v))
            rc = teardown(v, NORMAL, why);
        registry_save();
    }
    pthread_mutex_unlock(&v->op_lock);
out:
    registry_unref(v);
    free(path);
    return rc;
}

/* --- for others --- */

bool mounts_busy(struct plugin_volume *v)
{
    bool busy;

    pthread_mutex_lock(&registry_lock);
    busy = v->mount != MOUNT_IDLE || v->nholders > 0 || v->fs;
    pthread_mutex_unlock(&registry_lock);
    return busy;
}

int mounts_need_no_snapshots(const struct plugin_volume *v, struct why *why)
{
    return registry_has_snapshots(v)
               ? why_set(why, -EBUSY, "a snapshot of volume %s is mounted: unmount it first", v->name)
               : 0;
}

struct fsproc *mounts_server_ref(struct plugin_volume *v)
{
    struct fsproc *fs = NULL;

    pthread_mutex_lock(&registry_lock);
    if (v->fs && (v->mount == MOUNT_SERVING || v->mount == MOUNT_LINGERING))
        fs = fsproc_ref(v->fs);
    pthread_mutex_unlock(&registry_lock);
    return fs;
}

/* --- a planned change of the server --- */

/* op_lock held. */
static int may_restart(struct plugin_volume *v, struct why *why)
{
    int rc = agent_need_unlocked(why); /* or the next one would not get the key */

    if (rc < 0)
        return rc;
    if (v->mount != MOUNT_SERVING && v->mount != MOUNT_LINGERING)
        return why_set(why, v->mount == MOUNT_IDLE ? -ENOTCONN : -EBUSY,
                       v->mount == MOUNT_IDLE ? "volume %s is not mounted: it has no server"
                                              : "volume %s has no server at this moment: try again later",
                       v->name);
    if (!can_take_over(v))
        return why_set(why, -EOPNOTSUPP,
                       "no other server can take this mount of volume %s over (that needs Linux 6.9): unmount it and "
                       "mount it again",
                       v->name);
    if (fsproc_busy(v->fs))
        return why_set(why, -EBUSY, "a check, export or resize of volume %s is under way: try again when it has ended",
                       v->name);
    return 0;
}

static bool restart_begins(struct plugin_volume *v, bool begin)
{
    bool was;

    pthread_mutex_lock(&registry_lock);
    was = v->restarting;
    v->restarting = begin;
    pthread_mutex_unlock(&registry_lock);
    return !was;
}

int mounts_restart_server(struct plugin_volume *v, struct mounts_restarted *ret, struct why *why)
{
    struct fsproc *old = NULL;
    enum mount_state state;
    bool failed;
    char *text;
    int rc;

    if (!restart_begins(v, true))
        return why_set(why, -EALREADY, "the server of volume %s is being restarted already", v->name);
    rc = lock_volume(v, MOUNTS_PATIENCE_MS, why);
    if (rc < 0)
        goto out;
    rc = may_restart(v, why);
    if (rc == 0 && (rc = registry_save()) < 0) /* a cofferd that follows would not find the new one */
        why_set(why, rc, "%s/cofferd.json cannot be written: %s: nothing is changed", plugin_config.state_dir,
                strerror(-rc));
    if (rc == 0) {
        old = fsproc_ref(v->fs);
        state = v->mount;
        ret->old_pid = fsproc_process(old).pid;
        rc = server_start(v, old, why);
    }
    if (rc == 0) {
        set_state(v, state);
        ret->pid = fsproc_process(v->fs).pid;
        text = xasprintf("coffer-fs (pid %d) has followed pid %d", (int)ret->pid, (int)ret->old_pid);
        log_info("volume %s: %s, as the operator asked", v->name, text);
        agent_note(v->name, "server-restarted", text);
        free(text);
    }
    failed = v->mount == MOUNT_FAILED;
    pthread_mutex_unlock(&v->op_lock);
    if (rc < 0 && failed) {
        log_err("volume %s: %s; another one is started", v->name, why->text);
        if (!replace_dead(v))
            restart_failed(v);
    }
out:
    fsproc_unref(old);
    restart_begins(v, false);
    return rc;
}

/* --- at start --- */

/* fd, or -1 where it is not the device. */
static int device_take(int fd)
{
    struct stat st;

    if (fd >= 0 && fstat(fd, &st) == 0 && S_ISCHR(st.st_mode) && st.st_rdev == makedev(10, 229))
        return fd;
    close_quiet(fd);
    return -1;
}

/* fd, or a new one that says that nothing is known. */
static int page_take(int fd)
{
    int seals = fd < 0 ? -1 : fcntl(fd, F_GET_SEALS);
    struct stat st;

    if (seals >= 0 && (seals & F_SEAL_SHRINK) && fstat(fd, &st) == 0 && st.st_size == (off_t)sizeof(struct server_page))
        return fd;
    close_quiet(fd);
    return page_make(true);
}

/* What was stored, else what the server kept for us, or the one that was to follow it (a pidfd, or -1): these may have been
 * taken over, so what they call the device is looked at. fs NULL: it has ended. False: there is nothing that another server
 * could go on with. op_lock held. */
static bool adopt_descriptors(struct plugin_volume *v, struct fsproc *fs, int successor)
{
    int fuse = device_take(notify_take("fuse", v->name)), page = notify_take("page", v->name);

    if (fuse < 0 && fs)
        fuse = device_take(fsproc_fetch(fs, SERVER_FD_FUSE));
    if (page < 0 && fs)
        page = fsproc_fetch(fs, SERVER_FD_PAGE);
    if (fuse < 0 && successor >= 0)
        fuse = device_take(spawn_fetch_fd(successor, SERVER_FD_FUSE));
    if (page < 0 && successor >= 0)
        page = spawn_fetch_fd(successor, SERVER_FD_PAGE);
    if (fuse < 0 || !v->has_init) {
        close_quiet(fuse);
        close_quiet(page);
        return false;
    }
    v->fuse_fd = fuse;
    v->page_fd = page_take(page);
    store_descriptors(v);
    return true;
}

/* Perhaps it is one that was to take over, and waits. op_lock held. */
static void adopt_go(struct plugin_volume *v, struct fsproc *fs)
{
    int log = fsproc_log(fs);
    struct why why = {"its log is not known"};

    if (log < 0 || lock_backing(v, log, &why) < 0 || fsproc_go(fs) < 0)
        log_err("volume %s: its server may not be serving: %s", v->name, why.text);
    close_quiet(log);
}

static void *replace_thread(void *arg)
{
    struct plugin_volume *v = arg;

    if (!replace_dead(v))
        restart_failed(v);
    registry_unref(v);
    return NULL;
}

/* The server that an earlier cofferd had, or, where that has ended, the one that was to follow it. Where both live the latter,
 * *ret_successor (a pidfd, else -1), was not told to go on yet. op_lock held. */
static struct fsproc *adopt_server(struct plugin_volume *v, int *ret_successor)
{
    bool ended = !v->server.pid || !process_alive(&v->server);
    const struct process *process = ended && v->successor.pid ? &v->successor : &v->server;
    int data = -1, log = -1;
    struct fsproc *fs = NULL;
    struct why why;

    *ret_successor = ended ? -1 : process_pidfd(&v->successor);
    if (process->pid && open_files(v, &data, &log, &why) < 0)
        log_err("%s", why.text);
    if (process->pid && fsproc_adopt(v->name, process, log, &server_owner, v, &fs) < 0)
        fs = NULL;
    close_quiet(data);
    close_quiet(log);
    return fs;
}

static void adopt_one(struct plugin_volume *v)
{
    char *path = mounts_path(v), dev[MOUNT_DEV_MAX];
    bool mounted = mountinfo_device(path, dev) == 0;
    struct plugin_volume *ref = registry_ref(v);
    int successor = -1;
    struct fsproc *fs = adopt_server(v, &successor);

    if (fs) {
        enum mount_state state = !mounted ? MOUNT_STOPPING : is_held(v) ? MOUNT_SERVING : MOUNT_LINGERING;

        ref = NULL;
        set_server(v, fs, state);
        registry_save();
        v->started_ns = mono_ns();
        if (!adopt_descriptors(v, fs, successor))
            log_err("volume %s: its mount lives only as long as its server: that did not give its descriptors",
                    v->name);
        else if (fsproc_has_channel(fs))
            adopt_go(v, fs);
        log_info("volume %s: its server (pid %d) is found again", v->name, (int)fsproc_process(fs).pid);
    } else if (mounted && v->mount != MOUNT_IDLE && adopt_descriptors(v, NULL, successor) && can_take_over(v) &&
               thread_start(replace_thread, ref) == 0) {
        log_info("volume %s: its server ended while no cofferd ran; another one shall take over", v->name);
        set_server(v, NULL, MOUNT_FAILED);
        ref = NULL;
    } else {
        if (v->mount != MOUNT_IDLE) {
            log_err("volume %s: its server ended while no cofferd ran: its mount is lost%s", v->name,
                    is_held(v) ? ", and made anew" : "");
            fuse_abort(v); /* whoever kept the device open */
            unbind_all(v);
        }
        finish(v);
    }
    /* Only now: the old one may have been about to end for it, and then nobody else had the mount's descriptors. */
    if (successor >= 0)
        spawn_signal(successor, SIGKILL);
    close_quiet(successor);
    registry_unref(ref);
    free(path);
}

/* Whatever else lies in <run>/mnt is nobody's. */
static void sweep(void)
{
    int fd = openat(plugin_config.mnt_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *list = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *d;

    while (list && (d = readdir(list))) {
        struct plugin_volume *v = registry_find_mount_ref(d->d_name);
        bool ours = v && v->mount != MOUNT_IDLE;
        char *path = xasprintf("%s/%s", plugin_config.mnt_dir, d->d_name);

        if (!ours && strcmp(d->d_name, ".") != 0 && strcmp(d->d_name, "..") != 0) {
            umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW);
            unlinkat(plugin_config.mnt_fd, d->d_name, AT_REMOVEDIR);
        }
        free(path);
        registry_unref(v);
    }
    if (list)
        closedir(list);
    else
        close_quiet(fd);
}

void mounts_adopt(void)
{
    struct plugin_volume **all;
    size_t n;

    registry_mounts_ref(&all, &n);
    for (size_t i = 0; i < n; i++) {
        pthread_mutex_lock(&all[i]->op_lock);
        adopt_one(all[i]);
        pthread_mutex_unlock(&all[i]->op_lock);
        registry_unref(all[i]);
    }
    free(all);
    sweep();
}

static void *restart_thread(void *arg)
{
    struct plugin_volume *v = arg;

    restart_failed(v);
    registry_unref(v);
    return NULL;
}

void mounts_agent_up(void)
{
    uint64_t generation = supervisor_generation();
    struct plugin_volume **all;
    size_t n;

    registry_mounts_ref(&all, &n);
    for (size_t i = 0; i < n; i++) {
        struct plugin_volume *v = all[i];
        struct fsproc *fs = mounts_server_ref(v);
        bool failed;
        int rc = fs ? fsproc_renew_agent(fs, v->name, generation) : 0;

        if (rc < 0)
            log_info("volume %s: no channel to the new agent yet: %s", v->name, strerror(-rc));
        if (fs && generation > 1 && !fsproc_has_channel(fs))
            log_err(
                "volume %s: its server, started by an earlier cofferd, cannot reach the new agent: what needs a new "
                "grant is refused until it is unmounted and mounted again",
                v->name);
        fsproc_unref(fs);
        pthread_mutex_lock(&registry_lock);
        failed = v->mount == MOUNT_FAILED;
        pthread_mutex_unlock(&registry_lock);
        if (!failed || thread_start(restart_thread, v) < 0)
            registry_unref(v);
    }
    free(all);
}

/* Unmounts one, whoever holds it. */
static int down_one(struct plugin_volume *v, struct why *why)
{
    int rc;

    pthread_mutex_lock(&v->op_lock);
    unbind_all(v);
    pthread_mutex_lock(&registry_lock);
    while (v->nholders)
        holder_remove(v, &v->holders[v->nholders - 1]);
    pthread_mutex_unlock(&registry_lock);
    rc = teardown(v, FORCED, why);
    pthread_mutex_unlock(&v->op_lock);
    return rc;
}

int mounts_down(bool force, struct why *why)
{
    struct plugin_volume **all;
    int rc = 0;
    size_t n;

    pthread_mutex_lock(&down_lock);
    going_down = true;
    pthread_mutex_unlock(&down_lock);
    registry_mounts_ref(&all, &n);
    for (size_t i = 0; i < n && !force && rc == 0; i++) {
        if (is_held(all[i]) || (mounts_busy(all[i]) && used_elsewhere(all[i])))
            rc = why_set(why, -EBUSY, "busy: volume %s is in use: stop what uses it, or use --force", all[i]->name);
    }
    for (size_t i = 0; i < n; i++) {
        if (rc == 0)
            rc = down_one(all[i], why);
        registry_unref(all[i]);
    }
    free(all);
    registry_save();
    if (rc < 0) {
        pthread_mutex_lock(&down_lock);
        going_down = false;
        pthread_mutex_unlock(&down_lock);
    }
    return rc;
}
