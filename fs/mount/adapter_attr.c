/*
 * adapter_attr.c - attributes of inodes and of the volume, extended ones, ACLs. The skeleton is in adapter.c.
 *
 * Invariants:
 *  1. Mode and access ACL say the same: whatever changes one changes the other (acl.h).
 *  2. An attribute that the kernel would not enforce is not kept as if it did: ACLs only where it follows them, no name
 *     spaces that it does not know.
 */
#include "adapter.h"

#include "acl.h"

/* --- stat --- */

/* What is shown of the root to whom no grant covers. The kernel keeps one set of attributes, and checks others' rights by
 * what it heard last: so owner and mode are the true ones as long as there is anybody else. */
static void made_up_root(struct stat *st)
{
    struct vattr attr = {.mode = S_IFDIR | 0755};
    struct volume *v;

    life_enter_any(&v);
    if (v && vol_getattr(v, VOLUME_ROOT_INO, &attr) < 0)
        attr = (struct vattr){.mode = S_IFDIR | 0755};
    life_leave();
    *st = (struct stat){.st_ino = VOLUME_ROOT_INO,
                        .st_mode = attr.mode,
                        .st_uid = attr.uid,
                        .st_gid = attr.gid,
                        .st_nlink = 2,
                        .st_blksize = 4096};
}

void op_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
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
        rc = adapter_enter(req, root ? LIFE_PROBE : 0, &a, &v);
    if (rc < 0) {
        if (!root || rc == -EINTR) {
            adapter_reply(req, rc);
            return;
        }
        made_up_root(&st);
        fuse_reply_attr(req, &st, 0);
        return;
    }
    rc = vol_getattr(v, ino, &attr);
    adapter_leave(&a);
    if (rc < 0) {
        adapter_reply(req, rc);
        return;
    }
    adapter_stat(&attr, &st);
    fuse_reply_attr(req, &st, adapter_attr_timeout());
}

int adapter_kill_suidgid(struct volume *v, uint64_t ino)
{
    struct vattr attr;
    int rc = vol_getattr(v, ino, &attr);

    if (rc < 0 || S_ISDIR(attr.mode) || !(attr.mode & (S_ISUID | S_ISGID)))
        return rc;
    attr.mode &= ~(uint32_t)S_ISUID;
    if (attr.mode & S_IXGRP)
        attr.mode &= ~(uint32_t)S_ISGID;
    rc = vol_setattr(v, ino, VOL_SET_MODE, &attr, &attr);
    /* The kernel does not forget the mode by itself after a write. (Attributes alone are forgotten without any lock.) */
    if (rc == 0)
        fuse_lowlevel_notify_inval_inode(loop_session(), ino, -1, 0);
    return rc;
}

static const int set_times =
    FUSE_SET_ATTR_ATIME | FUSE_SET_ATTR_MTIME | FUSE_SET_ATTR_CTIME | FUSE_SET_ATTR_ATIME_NOW | FUSE_SET_ATTR_MTIME_NOW;

/* A volume keeps 64 bits of nanoseconds: the years 1677 to 2262. */
static int64_t from_timespec(const struct timespec *ts)
{
    int64_t ns;

    if (__builtin_mul_overflow((int64_t)ts->tv_sec, 1000000000, &ns) || __builtin_add_overflow(ns, ts->tv_nsec, &ns))
        return ts->tv_sec < 0 ? INT64_MIN : INT64_MAX;
    return ns;
}

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

void op_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *st, int to_set, struct fuse_file_info *fi)
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
        rc = adapter_enter_by(req, LIFE_WRITE, fi, &a, &v);
    if (rc == 0) {
        if (set & VOL_SET_MODE)
            rc = acl_follow_mode(v, ino, in.mode);
        else if (loop_request()->kill_suidgid || (loop_kills_suidgid() && set & (VOL_SET_UID | VOL_SET_GID)))
            rc = adapter_kill_suidgid(v, ino);
        if (rc == 0)
            rc = vol_setattr(v, ino, set, &in, &attr);
        if (rc == 0 && (set & VOL_SET_MTIME))
            inodes_set_due(ino, 0);
        adapter_leave(&a);
    }
    if (rc < 0) {
        adapter_reply(req, rc);
        return;
    }
    adapter_stat(&attr, &out);
    fuse_reply_attr(req, &out, adapter_attr_timeout());
}

void op_statfs(fuse_req_t req, fuse_ino_t ino)
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

/* --- extended attributes --- */

enum xattr_kind { XATTR_PLAIN, XATTR_ACL_ACCESS, XATTR_ACL_DEFAULT, XATTR_REFUSED };

static enum xattr_kind xattr_kind(const char *name)
{
    static const char *const spaces[] = {"user.", "trusted.", "security."};

    for (size_t i = 0; i < ARRAY_LEN(spaces); i++) {
        size_t n = strlen(spaces[i]);

        if (strncmp(name, spaces[i], n) == 0 && name[n])
            return XATTR_PLAIN;
    }
    if (adapter_caps.acl && strcmp(name, ACL_ACCESS) == 0)
        return XATTR_ACL_ACCESS;
    if (adapter_caps.acl && strcmp(name, ACL_DEFAULT) == 0)
        return XATTR_ACL_DEFAULT;
    return XATTR_REFUSED;
}

static int set_xattr(fuse_req_t req, struct volume *v, uint64_t ino, const char *name, const char *value, size_t size,
                     int flags)
{
    const struct fuse_ctx *c = fuse_req_ctx(req);
    enum xattr_kind kind = xattr_kind(name);
    struct acl a;

    if (kind == XATTR_ACL_ACCESS)
        return acl_set(v, ino, c->uid, c->gid, value, size); /* may be done twice */
    if (kind == XATTR_ACL_DEFAULT && acl_decode(value, size, &a) < 0)
        return -EINVAL;
    return vol_setxattr(v, ino, name, value, size, adapter_done(v) ? 0 : flags);
}

void op_setxattr(fuse_req_t req, fuse_ino_t ino, const char *name, const char *value, size_t size, int flags)
{
    struct volume *v;
    struct auth a;
    int rc = xattr_kind(name) == XATTR_REFUSED ? -EOPNOTSUPP : adapter_enter(req, LIFE_WRITE, &a, &v);

    if (rc == 0) {
        rc = set_xattr(req, v, ino, name, value, size, flags);
        adapter_leave(&a);
    }
    adapter_reply(req, rc);
}

static void reply_xattr(fuse_req_t req, ssize_t n, const char *buf, size_t size)
{
    if (n < 0)
        adapter_reply(req, (int)n);
    else if (size == 0)
        fuse_reply_xattr(req, (size_t)n);
    else if ((size_t)n > size)
        adapter_reply(req, -ERANGE);
    else
        fuse_reply_buf(req, buf, (size_t)n);
}

/* The kernel asks for security.capability before every write(); the engine answers at once where an inode has none. */
void op_getxattr(fuse_req_t req, fuse_ino_t ino, const char *name, size_t size)
{
    char *buf = (char *)loop_request()->out;
    struct volume *v;
    struct auth a;
    ssize_t n = xattr_kind(name) == XATTR_REFUSED ? -EOPNOTSUPP : adapter_enter(req, 0, &a, &v);

    if (n == 0) {
        n = vol_getxattr(v, ino, name, buf, MIN(size, MOUNT_IO_MAX));
        adapter_leave(&a);
    }
    reply_xattr(req, n, buf, size);
}

/* Takes the names out that only a privileged caller is shown, as other filesystems do. Returns what is left. */
static ssize_t hide_trusted(char *list, ssize_t n)
{
    char *from = list, *to = list;

    while (from < list + n) {
        size_t len = strlen(from) + 1;

        if (strncmp(from, "trusted.", 8) != 0) {
            memmove(to, from, len);
            to += len;
        }
        from += len;
    }
    return to - list;
}

void op_listxattr(fuse_req_t req, fuse_ino_t ino, size_t size)
{
    char *buf = (char *)loop_request()->out;
    struct volume *v;
    struct auth a;
    ssize_t n = adapter_enter(req, 0, &a, &v);

    if (n == 0) {
        n = vol_listxattr(v, ino, buf, MOUNT_IO_MAX);
        adapter_leave(&a);
    }
    if (n > 0 && fuse_req_ctx(req)->uid != 0)
        n = hide_trusted(buf, n);
    reply_xattr(req, n, buf, size);
}

void op_removexattr(fuse_req_t req, fuse_ino_t ino, const char *name)
{
    struct volume *v;
    struct auth a;
    int rc = xattr_kind(name) == XATTR_REFUSED ? -EOPNOTSUPP : adapter_enter(req, LIFE_WRITE, &a, &v);

    if (rc == 0) {
        rc = adapter_done(v) ? 0 : vol_removexattr(v, ino, name);
        adapter_leave(&a);
    }
    adapter_reply(req, rc);
}
