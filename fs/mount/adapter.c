/*
 * adapter.c - the FUSE operations. Every operation has this form:
 *
 *     op(req, ...)
 *         enter: life_enter (what names something: by who asks), life_enter_handle (by the grant that a handle was
 *                opened under) or life_enter_kernel (what the kernel does by itself)
 *         work:  one call of the engine
 *         note:  the kernel's new references and handles (inodes.c), still inside
 *         leave
 *         reply: exactly once, outside
 *
 * Invariants:
 *  1. Node ids are inode numbers, handles are grants' numbers: nothing here outlives the process that a new one needs.
 *  2. Answers to whom no grant covers (made-up root, placeholder) have zero timeouts.
 *  3. Names and content never go to the log.
 */
#include "mount.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdlib.h>

#define PLACEHOLDER_NAME "this-volume-is-for-its-containers-only"
#define PLACEHOLDER_FH   UINT64_MAX
#define READAHEAD_MAX    (1u << 20)
#define BACKGROUND_MAX   64

/* --- replies --- */

static void reply_err(fuse_req_t req, int rc)
{
    fuse_reply_err(req, rc < 0 ? -rc : 0);
}

static void to_timespec(int64_t ns, struct timespec *ts)
{
    ts->tv_sec = ns / 1000000000;
    ts->tv_nsec = ns % 1000000000;
    if (ts->tv_nsec < 0) {
        ts->tv_sec--;
        ts->tv_nsec += 1000000000;
    }
}

static int64_t from_timespec(const struct timespec *ts)
{
    return (int64_t)ts->tv_sec * 1000000000 + ts->tv_nsec;
}

static void to_stat(const struct vattr *a, struct stat *st)
{
    *st = (struct stat){.st_ino = a->ino,
                        .st_mode = a->mode,
                        .st_nlink = a->nlink,
                        .st_uid = a->uid,
                        .st_gid = a->gid,
                        .st_rdev = a->rdev,
                        .st_size = (off_t)a->size,
                        .st_blksize = 4096,
                        .st_blocks = (blkcnt_t)a->blocks};
    to_timespec(a->atime, &st->st_atim);
    to_timespec(a->mtime, &st->st_mtim);
    to_timespec(a->ctime, &st->st_ctim);
}

static double attr_timeout(void)
{
    return mount_config.strict ? 0 : MOUNT_TIMEOUT_S;
}

static void fill_entry(const struct vattr *a, struct fuse_entry_param *e)
{
    *e = (struct fuse_entry_param){
        .ino = a->ino, .generation = a->generation, .attr_timeout = attr_timeout(), .entry_timeout = MOUNT_TIMEOUT_S};
    to_stat(a, &e->attr);
}

/* What is shown of the root to whom no grant covers. */
static void made_up_root(struct stat *st)
{
    *st = (struct stat){.st_ino = VOLUME_ROOT_INO, .st_mode = S_IFDIR | 0755, .st_nlink = 2, .st_blksize = 4096};
}

/* --- entering --- */

/* Enters by who asks; the placeholder's receiver gets -EACCES. After 0: leave(). */
static int enter(fuse_req_t req, uint32_t opcode, unsigned flags, struct auth *a, struct volume **v)
{
    int rc = life_enter(req, opcode, flags, a, v);

    if (rc < 0)
        return rc;
    if (*v)
        return 0;
    life_leave();
    auth_put(a);
    return -EACCES;
}

static void leave(struct auth *a)
{
    life_leave();
    auth_put(a);
}

static int enter_by(fuse_req_t req, uint32_t opcode, unsigned flags, const struct fuse_file_info *fi, struct auth *a,
                    struct volume **v)
{
    *a = (struct auth){.kind = AGENT_DENY};
    return fi ? life_enter_handle(fi->fh, v) : enter(req, opcode, flags, a, v);
}

enum opcode { /* of the kernel's protocol, for the audit log */
    OP_LOOKUP = 1, OP_GETATTR = 3, OP_SETATTR = 4, OP_READLINK = 5, OP_SYMLINK = 6, OP_MKNOD = 8, OP_MKDIR = 9,
    OP_UNLINK = 10, OP_RMDIR = 11, OP_RENAME = 12, OP_LINK = 13, OP_OPEN = 14, OP_SETXATTR = 21, OP_GETXATTR = 22,
    OP_LISTXATTR = 23, OP_REMOVEXATTR = 24, OP_OPENDIR = 27, OP_CREATE = 35,
};

/* --- life of the mount --- */

static void op_init(void *userdata, struct fuse_conn_info *conn)
{
    unsigned want = FUSE_CAP_ASYNC_READ | FUSE_CAP_PARALLEL_DIROPS | FUSE_CAP_ATOMIC_O_TRUNC | FUSE_CAP_CACHE_SYMLINKS |
                    FUSE_CAP_ASYNC_DIO;

    (void)userdata;
    if (!mount_config.database)
        want |= FUSE_CAP_WRITEBACK_CACHE;
    conn->want = conn->capable & want;
    conn->max_write = MOUNT_IO_MAX;
    conn->max_readahead = MIN(conn->max_readahead, READAHEAD_MAX);
    conn->max_background = BACKGROUND_MAX;
    conn->congestion_threshold = BACKGROUND_MAX * 3 / 4;
    conn->time_gran = 1;
}

bool adapter_ready(uint32_t opcode, uint64_t ino, pid_t tid, bool by_handle)
{
    struct auth a;

    (void)opcode;
    (void)ino;
    if (!life_is_open())
        return false;
    if (by_handle)
        return true;
    if (!auth_cached(tid, false, &a))
        return false;
    auth_put(&a);
    return true;
}

/* --- names --- */

/* Inside: the engine has taken a reference for an answer with an entry. */
static void reply_entry_noted(fuse_req_t req, int rc, const struct vattr *attr)
{
    struct fuse_entry_param e;

    if (rc < 0) {
        reply_err(req, rc);
        return;
    }
    fill_entry(attr, &e);
    fuse_reply_entry(req, &e);
}

static void op_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    struct fuse_entry_param none = {.entry_timeout = MOUNT_TIMEOUT_S};
    struct volume *v;
    struct vattr attr;
    struct auth a;
    int rc = enter(req, OP_LOOKUP, 0, &a, &v);

    if (rc < 0) {
        reply_err(req, rc);
        return;
    }
    rc = vol_lookup(v, parent, name, &attr);
    if (rc == 0)
        inodes_ref(attr.ino);
    leave(&a);
    if (rc == -ENOENT)
        fuse_reply_entry(req, &none);
    else
        reply_entry_noted(req, rc, &attr);
}

static void forget_one(struct volume *v, uint64_t ino, uint64_t n)
{
    n = inodes_forget(ino, n);
    if (v && n)
        vol_forget(v, ino, n);
}

static void op_forget(fuse_req_t req, fuse_ino_t ino, uint64_t n)
{
    struct volume *v;

    life_enter_any(&v);
    forget_one(v, ino, n);
    life_leave();
    fuse_reply_none(req);
}

static void op_forget_multi(fuse_req_t req, size_t count, struct fuse_forget_data *forgets)
{
    struct volume *v;

    life_enter_any(&v);
    for (size_t i = 0; i < count; i++)
        forget_one(v, forgets[i].ino, forgets[i].nlookup);
    life_leave();
    fuse_reply_none(req);
}

static void op_mknod(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, dev_t rdev)
{
    const struct fuse_ctx *c = fuse_req_ctx(req);
    struct volume *v;
    struct vattr attr;
    struct auth a;
    int rc = enter(req, OP_MKNOD, LIFE_WRITE, &a, &v);

    if (rc == 0) {
        rc = vol_mknod(v, parent, name, mode, (uint32_t)rdev, c->uid, c->gid, &attr);
        if (rc == 0)
            inodes_ref(attr.ino);
        leave(&a);
    }
    reply_entry_noted(req, rc, &attr);
}

static void op_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode)
{
    op_mknod(req, parent, name, S_IFDIR | (mode & 07777), 0);
}

static void op_symlink(fuse_req_t req, const char *target, fuse_ino_t parent, const char *name)
{
    const struct fuse_ctx *c = fuse_req_ctx(req);
    struct volume *v;
    struct vattr attr;
    struct auth a;
    int rc = enter(req, OP_SYMLINK, LIFE_WRITE, &a, &v);

    if (rc == 0) {
        rc = vol_symlink(v, parent, name, target, c->uid, c->gid, &attr);
        if (rc == 0)
            inodes_ref(attr.ino);
        leave(&a);
    }
    reply_entry_noted(req, rc, &attr);
}

static void op_link(fuse_req_t req, fuse_ino_t ino, fuse_ino_t parent, const char *name)
{
    struct volume *v;
    struct vattr attr;
    struct auth a;
    int rc = enter(req, OP_LINK, LIFE_WRITE, &a, &v);

    if (rc == 0) {
        rc = vol_link(v, ino, parent, name, &attr);
        if (rc == 0)
            inodes_ref(attr.ino);
        leave(&a);
    }
    reply_entry_noted(req, rc, &attr);
}

static void op_unlink(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    struct volume *v;
    struct auth a;
    int rc = enter(req, OP_UNLINK, LIFE_WRITE, &a, &v);

    if (rc == 0) {
        rc = vol_unlink(v, parent, name);
        leave(&a);
    }
    reply_err(req, rc);
}

static void op_rmdir(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    struct volume *v;
    struct auth a;
    int rc = enter(req, OP_RMDIR, LIFE_WRITE, &a, &v);

    if (rc == 0) {
        rc = vol_rmdir(v, parent, name);
        leave(&a);
    }
    reply_err(req, rc);
}

static void op_rename(fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t newparent, const char *newname,
                      unsigned flags)
{
    struct volume *v;
    struct auth a;
    int rc = enter(req, OP_RENAME, LIFE_WRITE, &a, &v);

    if (rc == 0) {
        rc = vol_rename(v, parent, name, newparent, newname, flags);
        leave(&a);
    }
    reply_err(req, rc);
}

static void op_readlink(fuse_req_t req, fuse_ino_t ino)
{
    char target[4096 + 1];
    struct volume *v;
    struct auth a;
    ssize_t n = enter(req, OP_READLINK, 0, &a, &v);

    if (n == 0) {
        n = vol_readlink(v, ino, target, sizeof(target) - 1);
        leave(&a);
    }
    if (n < 0) {
        reply_err(req, (int)n);
        return;
    }
    target[n] = 0;
    fuse_reply_readlink(req, target);
}

/* --- attributes --- */

static void op_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    bool root = ino == VOLUME_ROOT_INO;
    struct volume *v;
    struct vattr attr;
    struct stat st;
    struct auth a = {.kind = AGENT_DENY};
    int rc;

    if (fi && fi->fh != PLACEHOLDER_FH)
        rc = life_enter_handle(fi->fh, &v);
    else
        rc = enter(req, OP_GETATTR, root ? LIFE_PROBE : 0, &a, &v);
    if (rc < 0) {
        if (!root || rc == -EINTR) {
            reply_err(req, rc);
            return;
        }
        made_up_root(&st);
        fuse_reply_attr(req, &st, 0);
        return;
    }
    rc = vol_getattr(v, ino, &attr);
    leave(&a);
    if (rc < 0) {
        reply_err(req, rc);
        return;
    }
    to_stat(&attr, &st);
    fuse_reply_attr(req, &st, attr_timeout());
}

static const int set_times = FUSE_SET_ATTR_ATIME | FUSE_SET_ATTR_MTIME | FUSE_SET_ATTR_CTIME | FUSE_SET_ATTR_ATIME_NOW |
                             FUSE_SET_ATTR_MTIME_NOW;

static unsigned to_set_attr(const struct stat *st, int to_set, struct vattr *in)
{
    unsigned set = 0;

    *in = (struct vattr){.mode = st->st_mode,
                         .uid = st->st_uid,
                         .gid = st->st_gid,
                         .size = (uint64_t)st->st_size,
                         .atime = to_set & FUSE_SET_ATTR_ATIME_NOW ? now_ns() : from_timespec(&st->st_atim),
                         .mtime = to_set & FUSE_SET_ATTR_MTIME_NOW ? now_ns() : from_timespec(&st->st_mtim),
                         .ctime = from_timespec(&st->st_ctim)};
    set |= to_set & FUSE_SET_ATTR_MODE ? VOL_SET_MODE : 0;
    set |= to_set & FUSE_SET_ATTR_UID ? VOL_SET_UID : 0;
    set |= to_set & FUSE_SET_ATTR_GID ? VOL_SET_GID : 0;
    set |= to_set & FUSE_SET_ATTR_SIZE ? VOL_SET_SIZE : 0;
    set |= to_set & (FUSE_SET_ATTR_ATIME | FUSE_SET_ATTR_ATIME_NOW) ? VOL_SET_ATIME : 0;
    set |= to_set & (FUSE_SET_ATTR_MTIME | FUSE_SET_ATTR_MTIME_NOW) ? VOL_SET_MTIME : 0;
    set |= to_set & FUSE_SET_ATTR_CTIME ? VOL_SET_CTIME : 0;
    return set;
}

static void op_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *st, int to_set, struct fuse_file_info *fi)
{
    struct vattr in, attr;
    unsigned set = to_set_attr(st, to_set, &in);
    struct auth a = {.kind = AGENT_DENY};
    struct volume *v;
    struct stat out;
    int rc;

    if (fi && !(to_set & ~set_times))
        rc = life_enter_kernel(&v); /* writeback's times have no caller of their own */
    else
        rc = enter_by(req, OP_SETATTR, LIFE_WRITE, fi, &a, &v);
    if (rc == 0) {
        rc = vol_setattr(v, ino, set, &in, &attr);
        leave(&a);
    }
    if (rc < 0) {
        reply_err(req, rc);
        return;
    }
    to_stat(&attr, &out);
    fuse_reply_attr(req, &out, attr_timeout());
}

static void op_statfs(fuse_req_t req, fuse_ino_t ino)
{
    struct statvfs s = {.f_bsize = 4096, .f_frsize = 4096, .f_namemax = VOLUME_NAME_BYTES};
    struct volume_stat st;
    struct volume *v;

    (void)ino;
    life_enter_any(&v);
    if (v) {
        volume_stat(v, &st);
        s.f_blocks = st.size_limit / 4096;
        s.f_bfree = s.f_bavail = (st.size_limit - MIN(st.used, st.size_limit)) / 4096;
        s.f_ffree = s.f_favail = s.f_bfree * 4;
        s.f_files = st.inodes + s.f_ffree;
    }
    life_leave();
    fuse_reply_statfs(req, &s);
}

/* ACLs are not offered: an attribute that the kernel would not enforce must not look as if it did. */
static bool xattr_offered(const char *name)
{
    return strncmp(name, "system.", 7) != 0;
}

static void op_setxattr(fuse_req_t req, fuse_ino_t ino, const char *name, const char *value, size_t size, int flags)
{
    struct volume *v;
    struct auth a;
    int rc = xattr_offered(name) ? enter(req, OP_SETXATTR, LIFE_WRITE, &a, &v) : -EOPNOTSUPP;

    if (rc == 0) {
        rc = vol_setxattr(v, ino, name, value, size, flags);
        leave(&a);
    }
    reply_err(req, rc);
}

static void reply_xattr(fuse_req_t req, ssize_t n, const char *buf, size_t size)
{
    if (n < 0)
        reply_err(req, (int)n);
    else if (size == 0)
        fuse_reply_xattr(req, (size_t)n);
    else
        fuse_reply_buf(req, buf, (size_t)n);
}

static void op_getxattr(fuse_req_t req, fuse_ino_t ino, const char *name, size_t size)
{
    char *buf = (char *)loop_request()->out;
    struct volume *v;
    struct auth a;
    ssize_t n = xattr_offered(name) ? enter(req, OP_GETXATTR, 0, &a, &v) : -EOPNOTSUPP;

    if (n == 0) {
        n = vol_getxattr(v, ino, name, buf, MIN(size, MOUNT_IO_MAX));
        leave(&a);
    }
    reply_xattr(req, n, buf, size);
}

static void op_listxattr(fuse_req_t req, fuse_ino_t ino, size_t size)
{
    char *buf = (char *)loop_request()->out;
    struct volume *v;
    struct auth a;
    ssize_t n = enter(req, OP_LISTXATTR, 0, &a, &v);

    if (n == 0) {
        n = vol_listxattr(v, ino, buf, MIN(size, MOUNT_IO_MAX));
        leave(&a);
    }
    reply_xattr(req, n, buf, size);
}

static void op_removexattr(fuse_req_t req, fuse_ino_t ino, const char *name)
{
    struct volume *v;
    struct auth a;
    int rc = xattr_offered(name) ? enter(req, OP_REMOVEXATTR, LIFE_WRITE, &a, &v) : -EOPNOTSUPP;

    if (rc == 0) {
        rc = vol_removexattr(v, ino, name);
        leave(&a);
    }
    reply_err(req, rc);
}

/* --- files --- */

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

static void op_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    struct vattr zero = {.size = 0}, attr;
    struct volume *v;
    struct auth a;
    int rc = enter(req, OP_OPEN, writes(fi->flags) ? LIFE_WRITE : 0, &a, &v);

    if (rc == 0) {
        if (fi->flags & O_TRUNC)
            rc = vol_setattr(v, ino, VOL_SET_SIZE, &zero, &attr);
        if (rc == 0)
            rc = make_handle(&a, ino, fi);
        leave(&a);
    }
    if (rc < 0)
        reply_err(req, rc);
    else if (fuse_reply_open(req, fi) == -ENOENT)
        drop_handle(ino, fi);
}

static void op_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, struct fuse_file_info *fi)
{
    const struct fuse_ctx *c = fuse_req_ctx(req);
    struct fuse_entry_param e;
    struct volume *v;
    struct vattr attr;
    struct auth a;
    int rc = enter(req, OP_CREATE, LIFE_WRITE, &a, &v);

    if (rc == 0) {
        if (loop_request()->tmpfile)
            rc = vol_tmpfile(v, parent, mode & 07777, c->uid, c->gid, &attr);
        else
            rc = vol_mknod(v, parent, name, S_IFREG | (mode & 07777), 0, c->uid, c->gid, &attr);
        if (rc == 0) {
            inodes_ref(attr.ino);
            rc = make_handle(&a, attr.ino, fi);
            if (rc < 0)
                forget_one(v, attr.ino, 1);
        }
        leave(&a);
    }
    if (rc < 0) {
        reply_err(req, rc);
        return;
    }
    fill_entry(&attr, &e);
    if (fuse_reply_create(req, &e, fi) == -ENOENT) {
        drop_handle(attr.ino, fi);
        life_enter_any(&v);
        forget_one(v, attr.ino, 1);
        life_leave();
    }
}

static void op_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    drop_handle(ino, fi);
    reply_err(req, 0);
}

static void op_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
    char *buf = (char *)loop_request()->out;
    struct volume *v;
    ssize_t n = life_enter_handle(fi->fh, &v);

    if (n == 0) {
        n = vol_read(v, ino, (uint64_t)off, buf, MIN(size, MOUNT_IO_MAX));
        life_leave();
    }
    if (n < 0)
        reply_err(req, (int)n);
    else
        fuse_reply_buf(req, buf, (size_t)n);
}

/* A write by a caller who may not keep set-id bits ends them (inode_remove_privs in the kernel). */
static int kill_suidgid(struct volume *v, uint64_t ino)
{
    struct vattr attr;
    int rc = vol_getattr(v, ino, &attr);

    if (rc < 0 || !(attr.mode & (S_ISUID | S_ISGID)))
        return rc;
    attr.mode &= ~(uint32_t)S_ISUID;
    if (attr.mode & S_IXGRP)
        attr.mode &= ~(uint32_t)S_ISGID;
    return vol_setattr(v, ino, VOL_SET_MODE, &attr, &attr);
}

static void op_write(fuse_req_t req, fuse_ino_t ino, const char *buf, size_t size, off_t off, struct fuse_file_info *fi)
{
    struct volume *v;
    ssize_t n = fi->writepage ? life_enter_kernel(&v) : life_enter_handle(fi->fh, &v);

    if (n == 0) {
        if (loop_request()->kill_suidgid)
            n = kill_suidgid(v, ino);
        if (n == 0)
            n = vol_write(v, ino, (uint64_t)off, buf, size);
        life_leave();
    }
    if (n < 0)
        reply_err(req, (int)n);
    else
        fuse_reply_write(req, (size_t)n);
}

/* The kernel has written what it had before it asks; and stops asking. */
static void op_flush(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    (void)ino;
    (void)fi;
    fuse_reply_err(req, ENOSYS);
}

static void op_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
    struct volume *v;
    int rc = life_enter_handle(fi->fh, &v);

    if (rc == 0) {
        rc = vol_fsync(v, ino, datasync);
        life_leave();
    }
    reply_err(req, rc);
}

static void op_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t off, off_t len, struct fuse_file_info *fi)
{
    struct volume *v;
    int rc = life_enter_handle(fi->fh, &v);

    if (rc == 0) {
        rc = vol_fallocate(v, ino, mode, (uint64_t)off, (uint64_t)len);
        life_leave();
    }
    reply_err(req, rc);
}

static void op_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence, struct fuse_file_info *fi)
{
    struct volume *v;
    uint64_t found = 0;
    int rc = life_enter_handle(fi->fh, &v);

    if (rc == 0) {
        rc = vol_seek(v, ino, (uint64_t)off, whence, &found);
        life_leave();
    }
    if (rc < 0)
        reply_err(req, rc);
    else
        fuse_reply_lseek(req, (off_t)found);
}

/* --- directories --- */

static void op_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    struct volume *v;
    struct auth a;
    int rc = life_enter(req, OP_OPENDIR, 0, &a, &v);

    if (rc < 0) {
        reply_err(req, rc);
        return;
    }
    if (!v) {
        fi->fh = PLACEHOLDER_FH;
        rc = ino == VOLUME_ROOT_INO ? 0 : -EACCES;
    } else {
        fi->fh = auth_handle_open(&a);
        rc = fi->fh ? 0 : -EACCES;
    }
    leave(&a);
    if (rc < 0)
        reply_err(req, rc);
    else if (fuse_reply_open(req, fi) == -ENOENT && fi->fh != PLACEHOLDER_FH)
        auth_handle_close(fi->fh);
}

static void op_releasedir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    (void)ino;
    if (fi->fh != PLACEHOLDER_FH)
        auth_handle_close(fi->fh);
    reply_err(req, 0);
}

struct listing {
    fuse_req_t req;
    char *buf;
    size_t size, used;
};

static int list_entry(void *ctx, const char *name, uint64_t ino, uint32_t type, uint64_t cookie,
                      const struct vattr *attr)
{
    struct listing *l = ctx;
    struct stat st = {.st_ino = ino, .st_mode = type};
    size_t n;

    (void)attr;
    n = fuse_add_direntry(l->req, l->buf + l->used, l->size - l->used, name, &st, (off_t)cookie);
    if (n > l->size - l->used)
        return 1;
    l->used += n;
    return 0;
}

static void list_placeholder(struct listing *l, uint64_t cookie)
{
    static const char *const names[] = {".", "..", PLACEHOLDER_NAME};

    for (; cookie < ARRAY_LEN(names); cookie++)
        if (list_entry(l, names[cookie], cookie < 2 ? VOLUME_ROOT_INO : 2, cookie < 2 ? S_IFDIR : S_IFREG, cookie + 1,
                       NULL))
            break;
}

static void op_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
    struct listing l = {.req = req, .buf = (char *)loop_request()->out, .size = MIN(size, MOUNT_IO_MAX)};
    struct volume *v;
    int rc = 0;

    if (fi->fh == PLACEHOLDER_FH) {
        list_placeholder(&l, (uint64_t)off);
    } else {
        rc = life_enter_handle(fi->fh, &v);
        if (rc == 0) {
            rc = vol_readdir(v, ino, (uint64_t)off, false, list_entry, &l);
            life_leave();
        }
    }
    if (rc < 0)
        reply_err(req, rc);
    else
        fuse_reply_buf(req, l.buf, l.used);
}

static void op_fsyncdir(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
    if (fi->fh == PLACEHOLDER_FH)
        reply_err(req, 0);
    else
        op_fsync(req, ino, datasync, fi);
}

const struct fuse_lowlevel_ops adapter_ops = {
    .init = op_init,
    .lookup = op_lookup,
    .forget = op_forget,
    .forget_multi = op_forget_multi,
    .getattr = op_getattr,
    .setattr = op_setattr,
    .readlink = op_readlink,
    .mknod = op_mknod,
    .mkdir = op_mkdir,
    .unlink = op_unlink,
    .rmdir = op_rmdir,
    .symlink = op_symlink,
    .rename = op_rename,
    .link = op_link,
    .open = op_open,
    .create = op_create,
    .read = op_read,
    .write = op_write,
    .flush = op_flush,
    .release = op_release,
    .fsync = op_fsync,
    .opendir = op_opendir,
    .readdir = op_readdir,
    .releasedir = op_releasedir,
    .fsyncdir = op_fsyncdir,
    .statfs = op_statfs,
    .setxattr = op_setxattr,
    .getxattr = op_getxattr,
    .listxattr = op_listxattr,
    .removexattr = op_removexattr,
    .fallocate = op_fallocate,
    .lseek = op_lseek,
};
