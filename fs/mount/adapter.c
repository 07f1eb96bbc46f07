/*
 * adapter.c - the FUSE operations. Every operation has this form:
 *
 *     op(req, ...)
 *         enter: adapter_enter (what names something: by who asks), life_enter_handle (by the grant that a handle was
 *                opened under) or life_enter_kernel (what the kernel does by itself)
 *         work:  one call of the engine, or few
 *         note:  the kernel's new references and handles (inodes.c), still inside
 *         leave
 *         reply: exactly once, outside
 *
 * Invariants:
 *  1. Node ids are inode numbers, handles are grants' numbers: nothing here outlives the process that a new one needs.
 *  2. Answers to whom no grant covers (made-up root, placeholder) have zero timeouts.
 *  3. Names and content never go to the log.
 *  4. A reference that the kernel did not take, because it gave up the request, is dropped again.
 *
 * Not here: flock and fcntl locks (the kernel keeps them, since nobody else has the volume), access
 * (default_permissions).
 */
#include "adapter.h"

#include "acl.h"

#include <linux/fs.h>
#include <stdlib.h>

#define READAHEAD_MAX  (1u << 20)
#define BACKGROUND_MAX 64

struct adapter_caps adapter_caps;

/* --- replies --- */

static void to_timespec(int64_t ns, struct timespec *ts)
{
    ts->tv_sec = ns / 1000000000;
    ts->tv_nsec = ns % 1000000000;
    if (ts->tv_nsec < 0) {
        ts->tv_sec--;
        ts->tv_nsec += 1000000000;
    }
}

void adapter_stat(const struct vattr *a, struct stat *st)
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

double adapter_attr_timeout(void)
{
    return mount_config.strict ? 0 : MOUNT_TIMEOUT_S;
}

void adapter_entry(const struct vattr *a, struct fuse_entry_param *e)
{
    *e = (struct fuse_entry_param){.ino = a->ino,
                                   .generation = a->generation,
                                   .attr_timeout = adapter_attr_timeout(),
                                   .entry_timeout = MOUNT_TIMEOUT_S};
    adapter_stat(a, &e->attr);
}

/* --- entering --- */

int adapter_enter(fuse_req_t req, unsigned flags, struct auth *a, struct volume **v)
{
    int rc = life_enter(req, loop_request()->opcode, flags, a, v);

    if (rc < 0)
        return rc;
    if (*v)
        return 0;
    life_leave();
    auth_put(a);
    return -EACCES;
}

int adapter_enter_by(fuse_req_t req, unsigned flags, const struct fuse_file_info *fi, struct auth *a, struct volume **v)
{
    *a = (struct auth){.kind = AGENT_DENY};
    return fi ? life_enter_handle(fi->fh, v) : adapter_enter(req, flags, a, v);
}

void adapter_leave(struct auth *a)
{
    life_leave();
    auth_put(a);
}

void adapter_forget(struct volume *v, uint64_t ino, uint64_t n)
{
    uint64_t known = inodes_forget(ino, n);

    if (v && (known || mount_config.takeover))
        vol_forget(v, ino, mount_config.takeover ? n : known); /* of before, the engine does not know how many */
}

void adapter_forget_unsent(uint64_t ino)
{
    struct volume *v;

    life_enter_any(&v);
    adapter_forget(v, ino, 1);
    life_leave();
}

/* --- life of the mount --- */

static void op_init(void *userdata, struct fuse_conn_info *conn)
{
    /* Not wanted: splice (the answer lies in one buffer, which is copied once), HANDLE_KILLPRIV (loop.c answers its second
     * version, which libfuse 3.14 does not know), AUTO_INVAL_DATA (nobody else changes files). */
    unsigned want = FUSE_CAP_ASYNC_READ | FUSE_CAP_PARALLEL_DIROPS | FUSE_CAP_ATOMIC_O_TRUNC | FUSE_CAP_CACHE_SYMLINKS |
                    FUSE_CAP_ASYNC_DIO | FUSE_CAP_READDIRPLUS | FUSE_CAP_READDIRPLUS_AUTO | FUSE_CAP_EXPORT_SUPPORT;
    unsigned acl = FUSE_CAP_POSIX_ACL | FUSE_CAP_DONT_MASK; /* only together: the umask yields to a default ACL */

    (void)userdata;
    if (mount_config.strict)
        want &= ~(unsigned)FUSE_CAP_CACHE_SYMLINKS; /* a link in the root is read without asking for attributes */
    if (!mount_config.database)
        want |= FUSE_CAP_WRITEBACK_CACHE;
    if ((conn->capable & acl) == acl)
        want |= acl;
    conn->want = conn->capable & want;
    adapter_caps.acl = conn->want & FUSE_CAP_POSIX_ACL;
    adapter_caps.writeback = conn->want & FUSE_CAP_WRITEBACK_CACHE;
    conn->max_write = MOUNT_IO_MAX;
    /* The kernel takes the smaller of this and read_ahead_kb, which cofferd has raised since the kernel wrote its own
     * value into the request. */
    conn->max_readahead = READAHEAD_MAX;
    conn->max_background = BACKGROUND_MAX;
    conn->congestion_threshold = BACKGROUND_MAX * 3 / 4;
    conn->time_gran = 1;
}

bool adapter_ready(pid_t tid, uid_t uid, bool by_handle)
{
    struct auth a;

    if (!life_is_open())
        return false;
    if (by_handle)
        return true;
    if (!auth_cached(tid, uid, false, &a))
        return false;
    auth_put(&a);
    return true;
}

/* --- names --- */

static void reply_entry(fuse_req_t req, int rc, const struct vattr *attr)
{
    struct fuse_entry_param e;

    if (rc < 0) {
        adapter_reply(req, rc);
        return;
    }
    adapter_entry(attr, &e);
    if (fuse_reply_entry(req, &e) == -ENOENT)
        adapter_forget_unsent(attr->ino);
}

/* "." of any inode: from a file handle (name_to_handle_at, NFS). */
static int lookup_self(struct volume *v, uint64_t ino, struct vattr *ret)
{
    int rc = vol_getattr(v, ino, ret);

    return rc < 0 ? rc : vol_reference(v, ino, 1);
}

static void op_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    struct fuse_entry_param none = {.entry_timeout = MOUNT_TIMEOUT_S};
    struct volume *v;
    struct vattr attr;
    struct auth a;
    int rc = adapter_enter(req, 0, &a, &v);

    if (rc < 0) {
        adapter_reply(req, rc);
        return;
    }
    rc = strcmp(name, ".") == 0 ? lookup_self(v, parent, &attr) : vol_lookup(v, parent, name, &attr);
    if (rc == 0)
        inodes_ref(attr.ino);
    adapter_leave(&a);
    if (rc == -ENOENT)
        fuse_reply_entry(req, &none);
    else
        reply_entry(req, rc, &attr);
}

static void op_forget(fuse_req_t req, fuse_ino_t ino, uint64_t n)
{
    struct volume *v;

    life_enter_any(&v);
    adapter_forget(v, ino, n);
    life_leave();
    fuse_reply_none(req);
}

static void op_forget_multi(fuse_req_t req, size_t count, struct fuse_forget_data *forgets)
{
    struct volume *v;

    life_enter_any(&v);
    for (size_t i = 0; i < count; i++)
        adapter_forget(v, forgets[i].ino, forgets[i].nlookup);
    life_leave();
    fuse_reply_none(req);
}

bool adapter_done(struct volume *v)
{
    return loop_request()->resent && vol_request_done(v);
}

int adapter_make(fuse_req_t req, struct volume *v, uint64_t dir, const char *name, uint32_t mode, uint32_t rdev,
                 struct vattr *ret)
{
    const struct fuse_ctx *c = fuse_req_ctx(req);
    struct acl_new n;
    int rc = acl_inherit(v, dir, mode, c->umask, adapter_caps.acl, &n);

    if (rc < 0)
        return rc;
    if (name && adapter_done(v) && vol_lookup(v, dir, name, ret) == 0)
        rc = 0; /* all but the ACLs, perhaps */
    else
        rc = name ? vol_mknod(v, dir, name, n.first_mode, rdev, c->uid, c->gid, ret)
                  : vol_tmpfile(v, dir, n.first_mode & 07777, c->uid, c->gid, ret);
    if (rc < 0)
        return rc;
    rc = acl_give(v, &n, ret);
    if (rc == 0) {
        inodes_ref(ret->ino);
        return 0;
    }
    if (name)
        (void)(S_ISDIR(mode) ? vol_rmdir(v, dir, name) : vol_unlink(v, dir, name));
    vol_forget(v, ret->ino, 1);
    return rc;
}

static void op_mknod(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, dev_t rdev)
{
    struct volume *v;
    struct vattr attr;
    struct auth a;
    int rc = adapter_enter(req, LIFE_WRITE, &a, &v);

    if (rc == 0) {
        rc = adapter_make(req, v, parent, name, mode, (uint32_t)rdev, &attr);
        adapter_leave(&a);
    }
    reply_entry(req, rc, &attr);
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
    int rc = adapter_enter(req, LIFE_WRITE, &a, &v);

    if (rc == 0) {
        if (!adapter_done(v) || vol_lookup(v, parent, name, &attr) < 0)
            rc = vol_symlink(v, parent, name, target, c->uid, c->gid, &attr);
        if (rc == 0)
            inodes_ref(attr.ino);
        adapter_leave(&a);
    }
    reply_entry(req, rc, &attr);
}

static void op_link(fuse_req_t req, fuse_ino_t ino, fuse_ino_t parent, const char *name)
{
    struct volume *v;
    struct vattr attr;
    struct auth a;
    int rc = adapter_enter(req, LIFE_WRITE, &a, &v);

    if (rc == 0) {
        if (!adapter_done(v) || vol_lookup(v, parent, name, &attr) < 0)
            rc = vol_link(v, ino, parent, name, &attr);
        if (rc == 0)
            inodes_ref(attr.ino);
        adapter_leave(&a);
    }
    reply_entry(req, rc, &attr);
}

static void op_unlink(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    struct volume *v;
    struct auth a;
    int rc = adapter_enter(req, LIFE_WRITE, &a, &v);

    if (rc == 0) {
        rc = adapter_done(v) ? 0 : vol_unlink(v, parent, name);
        adapter_leave(&a);
    }
    adapter_reply(req, rc);
}

static void op_rmdir(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    struct volume *v;
    struct auth a;
    int rc = adapter_enter(req, LIFE_WRITE, &a, &v);

    if (rc == 0) {
        rc = adapter_done(v) ? 0 : vol_rmdir(v, parent, name);
        adapter_leave(&a);
    }
    adapter_reply(req, rc);
}

static void op_rename(fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t newparent, const char *newname,
                      unsigned flags)
{
    const struct fuse_ctx *c = fuse_req_ctx(req);
    struct volume *v;
    struct auth a;
    int rc = adapter_enter(req, LIFE_WRITE, &a, &v);

    if (rc == 0) {
        if (adapter_done(v))
            rc = 0;
        else if (flags & RENAME_WHITEOUT)
            rc = vol_rename_whiteout(v, parent, name, newparent, newname, flags & ~RENAME_WHITEOUT, c->uid, c->gid);
        else
            rc = vol_rename(v, parent, name, newparent, newname, flags);
        adapter_leave(&a);
    }
    adapter_reply(req, rc);
}

static void op_readlink(fuse_req_t req, fuse_ino_t ino)
{
    char target[4096 + 1];
    struct volume *v;
    struct auth a;
    ssize_t n = adapter_enter(req, 0, &a, &v);

    if (n == 0) {
        n = vol_readlink(v, ino, target, sizeof(target) - 1);
        if (n >= 0)
            inodes_cached(ino);
        adapter_leave(&a);
    }
    if (n < 0) {
        adapter_reply(req, (int)n);
        return;
    }
    target[n] = 0;
    fuse_reply_readlink(req, target);
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
    .readdirplus = op_readdirplus,
    .releasedir = op_releasedir,
    .fsyncdir = op_fsyncdir,
    .statfs = op_statfs,
    .setxattr = op_setxattr,
    .getxattr = op_getxattr,
    .listxattr = op_listxattr,
    .removexattr = op_removexattr,
    .fallocate = op_fallocate,
    .copy_file_range = op_copy_file_range,
    .lseek = op_lseek,
};
