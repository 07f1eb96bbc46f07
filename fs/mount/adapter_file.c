/*
 * adapter_file.c - content: files and directories. The skeleton is in adapter.c.
 *
 * Two things are not one call of the engine:
 *
 *  - SEEK_DATA and SEEK_HOLE of a file that is open for writing. Under writeback the kernel asks without writing first,
 * and what it has not written yet would be taken for a hole (cp would lose it). The request is parked; a thread that
 * serves no requests lets the kernel write and forget its pages from the place on (a request's thread must not: the
 * writing is requests again), looks, and answers.
 *
 *  - READDIRPLUS gives the kernel a reference on each entry, but the engine lists under a lock under which none can be
 *    taken: they are taken afterwards, and an entry that went in between is sent without its inode.
 */
#include "adapter.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>

#define PLACEHOLDER_NAME "this-volume-is-for-its-containers-only"
#define PAGE             4096

/* --- handles --- */

static bool writes(int flags)
{
    return (flags & O_ACCMODE) != O_RDONLY || (flags & O_TRUNC);
}

/* Inside. A handle under the caller's grant. */
static int make_handle(const struct auth *a, uint64_t ino, struct fuse_file_info *fi)
{
    fi->fh = auth_handle_open(a);
    if (fi->fh == 0)
        return -EACCES;
    inodes_opened(ino, writes(fi->flags));
    fi->keep_cache = 1;
    return 0;
}

static void drop_handle(uint64_t ino, const struct fuse_file_info *fi)
{
    inodes_closed(ino, writes(fi->flags));
    auth_handle_close(fi->fh);
}

static int truncate_at_open(fuse_req_t req, struct volume *v, uint64_t ino)
{
    /* An older kernel does not say whether the caller may keep set-id bits: only root may. */
    bool kill = loop_kills_suidgid() ? loop_request()->kill_suidgid : fuse_req_ctx(req)->uid != 0;
    struct vattr attr = {.size = 0};
    int rc = kill ? adapter_kill_suidgid(v, ino) : 0;

    return rc < 0 ? rc : vol_setattr(v, ino, VOL_SET_SIZE, &attr, &attr);
}

void op_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    struct volume *v;
    struct auth a;
    int rc = adapter_enter(req, writes(fi->flags) ? LIFE_WRITE : 0, &a, &v);

    if (rc == 0) {
        if (fi->flags & O_TRUNC)
            rc = truncate_at_open(req, v, ino);
        if (rc == 0)
            rc = make_handle(&a, ino, fi);
        adapter_leave(&a);
    }
    if (rc < 0)
        adapter_reply(req, rc);
    else if (fuse_reply_open(req, fi) == -ENOENT)
        drop_handle(ino, fi);
}

void op_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, struct fuse_file_info *fi)
{
    bool tmpfile = loop_request()->tmpfile;
    struct fuse_entry_param e;
    struct volume *v;
    struct vattr attr;
    struct auth a;
    int rc = adapter_enter(req, LIFE_WRITE, &a, &v);

    if (rc == 0) {
        rc = adapter_make(req, v, parent, tmpfile ? NULL : name, S_IFREG | (mode & 07777), 0, &attr);
        if (rc == 0) {
            rc = make_handle(&a, attr.ino, fi);
            if (rc < 0)
                adapter_forget(v, attr.ino, 1);
        }
        adapter_leave(&a);
    }
    if (rc) {
        adapter_reply(req, rc);
        return;
    }
    adapter_entry(&attr, &e);
    if (fuse_reply_create(req, &e, fi) == -ENOENT) {
        drop_handle(attr.ino, fi);
        adapter_forget_unsent(attr.ino);
    }
}

void op_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    drop_handle(ino, fi);
    adapter_reply(req, 0);
}

/* --- content --- */

void op_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
    char *buf = (char *)loop_request()->out;
    struct volume *v;
    ssize_t n = life_enter_handle(fi->fh, &v);

    if (n == 0) {
        n = vol_read(v, ino, (uint64_t)off, buf, MIN(size, MOUNT_IO_MAX));
        life_leave();
    }
    if (n < 0)
        adapter_reply(req, (int)n);
    else
        fuse_reply_buf(req, buf, (size_t)n);
}

void op_write(fuse_req_t req, fuse_ino_t ino, const char *buf, size_t size, off_t off, struct fuse_file_info *fi)
{
    struct volume *v;
    ssize_t n = fi->writepage ? life_enter_kernel(&v) : life_enter_handle(fi->fh, &v);

    if (n == 0) {
        if (loop_request()->kill_suidgid)
            n = adapter_kill_suidgid(v, ino);
        /* Under writeback the kernel keeps a file's times and sends them: with its data, before or after. */
        if (n == 0 && adapter_caps.writeback)
            inodes_set_due(ino, now_ns());
        if (n == 0)
            n = (adapter_caps.writeback ? vol_write_back : vol_write)(v, ino, (uint64_t)off, buf, size);
        life_leave();
    }
    if (n < 0)
        adapter_reply(req, (int)n);
    else
        fuse_reply_write(req, (size_t)n);
}

/* The kernel has written what it had before it asks; and stops asking. */
void op_flush(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    (void)ino;
    (void)fi;
    fuse_reply_err(req, ENOSYS);
}

void op_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
    struct volume *v;
    int rc = life_enter_handle(fi->fh, &v);

    if (rc == 0) {
        rc = vol_fsync(v, ino, datasync);
        life_leave();
    }
    adapter_reply(req, rc);
}

void op_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t off, off_t len, struct fuse_file_info *fi)
{
    struct volume *v;
    int rc = life_enter_handle(fi->fh, &v);

    if (rc == 0) {
        /* FALLOCATE does not tell: only root may keep set-id bits. */
        if (loop_kills_suidgid() && fuse_req_ctx(req)->uid != 0)
            rc = adapter_kill_suidgid(v, ino);
        if (rc == 0)
            rc = vol_fallocate(v, ino, mode, (uint64_t)off, (uint64_t)len);
        life_leave();
    }
    adapter_reply(req, rc);
}

/* The kernel has written what it had of both files, and forgets what it has of the target. */
void op_copy_file_range(fuse_req_t req, fuse_ino_t from, off_t from_off, struct fuse_file_info *from_fi, fuse_ino_t to,
                        off_t to_off, struct fuse_file_info *to_fi, size_t len, int flags)
{
    struct volume *v;
    ssize_t n = auth_handle_check(from_fi->fh);

    (void)flags;
    if (n == 0)
        n = life_enter_handle(to_fi->fh, &v);
    if (n == 0) {
        if (loop_kills_suidgid() && fuse_req_ctx(req)->uid != 0)
            n = adapter_kill_suidgid(v, to);
        if (n == 0)
            n = vol_copy(v, from, (uint64_t)from_off, to, (uint64_t)to_off, len);
        life_leave();
    }
    if (n < 0)
        adapter_reply(req, (int)n);
    else
        fuse_reply_write(req, (size_t)n);
}

/* --- holes --- */

static void seek(fuse_req_t req, uint64_t ino, uint64_t off, int whence, uint64_t fh)
{
    struct volume *v;
    uint64_t found = 0;
    int rc = life_enter_handle(fh, &v);

    if (rc == 0) {
        rc = vol_seek(v, ino, off, whence, &found);
        life_leave();
    }
    if (rc < 0)
        adapter_reply(req, rc);
    else
        fuse_reply_lseek(req, (off_t)found);
}

struct parked {
    struct parked *next;
    fuse_req_t req;
    uint64_t ino, off, fh;
    int whence;
};

static pthread_mutex_t parked_lock = PTHREAD_MUTEX_INITIALIZER; /* all below */
static pthread_cond_t parked_cond = PTHREAD_COND_INITIALIZER;
static struct parked *parked_first, **parked_last = &parked_first;
static bool parked_started, parked_busy, parked_closed;

static void *parked_thread(void *arg)
{
    (void)arg;
    for (;;) {
        struct parked *p;

        pthread_mutex_lock(&parked_lock);
        while (!parked_first)
            pthread_cond_wait(&parked_cond, &parked_lock);
        p = parked_first;
        parked_first = p->next;
        if (!parked_first)
            parked_last = &parked_first;
        parked_busy = true;
        pthread_mutex_unlock(&parked_lock);
        fuse_lowlevel_notify_inval_inode(loop_session(), p->ino, (off_t)(p->off & ~(uint64_t)(PAGE - 1)), 0);
        seek(p->req, p->ino, p->off, p->whence, p->fh);
        free(p);
        pthread_mutex_lock(&parked_lock);
        parked_busy = false;
        pthread_mutex_unlock(&parked_lock);
    }
    return NULL;
}

static int parked_start(void)
{
    pthread_t t;
    int rc = pthread_create(&t, NULL, parked_thread, NULL);

    if (rc == 0)
        pthread_detach(t);
    return -rc;
}

static int park(const struct parked *p)
{
    struct parked *copy;
    int rc = 0;

    pthread_mutex_lock(&parked_lock);
    if (!parked_started && !parked_closed)
        rc = parked_start();
    parked_started |= rc == 0;
    if (rc == 0 && !parked_closed) { /* else the kernel sends it to the next server */
        copy = xmalloc(sizeof(*copy));
        *copy = *p;
        copy->next = NULL;
        *parked_last = copy;
        parked_last = &copy->next;
        pthread_cond_signal(&parked_cond);
    }
    pthread_mutex_unlock(&parked_lock);
    return rc;
}

int adapter_quiesce(int ms)
{
    const struct timespec look = {.tv_nsec = 1000000};
    int64_t end = mono_ns() + (int64_t)ms * 1000000;
    bool busy;

    for (;;) {
        pthread_mutex_lock(&parked_lock);
        parked_closed = true;
        busy = parked_busy || parked_first;
        pthread_mutex_unlock(&parked_lock);
        if (!busy || mono_ns() > end)
            return busy ? -ETIMEDOUT : 0;
        nanosleep(&look, NULL);
    }
}

void op_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence, struct fuse_file_info *fi)
{
    struct parked p = {.req = req, .ino = ino, .off = (uint64_t)off, .fh = fi->fh, .whence = whence};
    int rc;

    if (!adapter_caps.writeback || !inodes_written(ino)) {
        seek(req, ino, (uint64_t)off, whence, fi->fh);
        return;
    }
    rc = park(&p);
    if (rc < 0)
        adapter_reply(req, rc);
}

/* --- directories --- */

void op_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    struct volume *v;
    struct auth a;
    int rc = life_enter(req, loop_request()->opcode, 0, &a, &v);

    if (rc < 0) {
        adapter_reply(req, rc);
        return;
    }
    if (!v) {
        fi->fh = PLACEHOLDER_FH;
        rc = ino == VOLUME_ROOT_INO ? 0 : -EACCES;
    } else {
        fi->fh = auth_handle_open(&a);
        rc = fi->fh ? 0 : -EACCES;
    }
    adapter_leave(&a);
    if (rc < 0)
        adapter_reply(req, rc);
    else if (fuse_reply_open(req, fi) == -ENOENT && fi->fh != PLACEHOLDER_FH)
        auth_handle_close(fi->fh);
}

void op_releasedir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    (void)ino;
    if (fi->fh != PLACEHOLDER_FH)
        auth_handle_close(fi->fh);
    adapter_reply(req, 0);
}

/* What an entry is preceded by in the answer to READDIRPLUS (struct fuse_direntplus): the entry's inode number is at
 * its beginning, and 0 says that the inode is not told. */
struct direntplus_head {
    uint64_t ino;
    uint8_t entry[120];
    uint64_t dirent_ino, cookie;
    uint32_t namelen, type;
};
_Static_assert(sizeof(struct direntplus_head) == 152, "fuse_direntplus");

struct listing {
    fuse_req_t req;
    char *buf;
    size_t size, used;
    bool plus;
};

static int list_entry(void *ctx, const char *name, uint64_t ino, uint32_t type, uint64_t cookie,
                      const struct vattr *attr)
{
    struct fuse_entry_param e = {.attr = {.st_ino = ino, .st_mode = type}};
    struct listing *l = ctx;
    char *at = l->buf + l->used;
    size_t n, left = l->size - l->used;

    if (attr && cookie > 2) /* of "." and ".." the kernel takes no reference */
        adapter_entry(attr, &e);
    n = l->plus ? fuse_add_direntry_plus(l->req, at, left, name, &e, (off_t)cookie)
                : fuse_add_direntry(l->req, at, left, name, &e.attr, (off_t)cookie);
    if (n > left)
        return 1;
    l->used += n;
    return 0;
}

/* Each entry of a READDIRPLUS answer that tells its inode. */
static struct direntplus_head *next_told(const struct listing *l, size_t *at)
{
    while (*at < l->used) {
        struct direntplus_head *h = (struct direntplus_head *)(void *)(l->buf + *at);

        *at += (sizeof(*h) + h->namelen + 7) & ~(size_t)7;
        if (h->ino)
            return h;
    }
    return NULL;
}

/* Inside. */
static void take_references(struct volume *v, const struct listing *l)
{
    struct direntplus_head *h;
    size_t at = 0;

    while ((h = next_told(l, &at))) {
        if (vol_reference(v, h->ino, 1) < 0)
            h->ino = 0;
        else
            inodes_ref(h->ino);
    }
}

static void reply_listing(const struct listing *l)
{
    struct direntplus_head *h;
    size_t at = 0;

    if (fuse_reply_buf(l->req, l->buf, l->used) != -ENOENT || !l->plus)
        return;
    while ((h = next_told(l, &at)))
        adapter_forget_unsent(h->ino);
}

static void list_placeholder(struct listing *l, uint64_t cookie)
{
    static const char *const names[] = {".", "..", PLACEHOLDER_NAME};

    for (; cookie < ARRAY_LEN(names); cookie++) {
        if (list_entry(l, names[cookie], cookie < 2 ? VOLUME_ROOT_INO : 2, cookie < 2 ? S_IFDIR : S_IFREG, cookie + 1,
                       NULL))
            break;
    }
}

static void list(fuse_req_t req, uint64_t ino, size_t size, uint64_t cookie, uint64_t fh, bool plus)
{
    struct listing l = {.req = req, .buf = (char *)loop_request()->out, .size = MIN(size, MOUNT_IO_MAX), .plus = plus};
    struct volume *v;
    int rc = 0;

    if (fh == PLACEHOLDER_FH) {
        list_placeholder(&l, cookie);
    } else {
        rc = life_enter_handle(fh, &v);
        if (rc == 0) {
            rc = vol_readdir(v, ino, cookie, plus, list_entry, &l);
            if (rc == 0 && plus)
                take_references(v, &l);
            life_leave();
        }
    }
    if (rc < 0)
        adapter_reply(req, rc);
    else
        reply_listing(&l);
}

void op_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
    list(req, ino, size, (uint64_t)off, fi->fh, false);
}

void op_readdirplus(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
    list(req, ino, size, (uint64_t)off, fi->fh, true);
}

void op_fsyncdir(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
    if (fi->fh == PLACEHOLDER_FH)
        adapter_reply(req, 0);
    else
        op_fsync(req, ino, datasync, fi);
}
