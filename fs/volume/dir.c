/*
 * dir.c - names: lookup, making and removing, links, rename, listing.
 *
 * Every change of a name is one transaction: the entry, the inode and the directories together. An inode that loses its
 * last name gets an ORPHAN item in the same transaction and is destroyed when nobody refers to it (here, or in
 * vol_forget). References for inodes that a call returns are taken under the state lock, so that an inode cannot go
 * between.
 */
#include "fs/volume/names.h"

#include <linux/fs.h>
#include <stdlib.h>

#define MODE_TYPE(mode) ((uint8_t)(((mode)&S_IFMT) >> 12))
#define DIRENT_ITEM_MAX (sizeof(struct disk_dirent) + VOLUME_NAME_BYTES)

/* --- entries --- */

struct entry {
    struct tree_key key;
    uint64_t ino;
    uint8_t type;
};

static int name_ok(const char *name)
{
    size_t n = strnlen(name, VOLUME_NAME_BYTES + 1);

    if (n > VOLUME_NAME_BYTES)
        return -ENAMETOOLONG;
    if (n == 0 || memchr(name, '/', n) || strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
        return -EINVAL;
    return 0;
}

static bool entry_match(const uint8_t *value, size_t len, const char *name, size_t n)
{
    const struct disk_dirent *d = (const struct disk_dirent *)value;

    return len == sizeof(*d) + n && d->namelen == n && memcmp(d + 1, name, n) == 0;
}

/* [state] */
static int entry_find(struct volume *v, uint64_t dir, const char *name, struct entry *ret)
{
    uint8_t item[DIRENT_ITEM_MAX];
    const struct disk_dirent *d = (const struct disk_dirent *)item;
    ssize_t len = names_find(v, ITEM_DIRENT, dir, name, strlen(name), entry_match, &ret->key, item, sizeof(item));

    if (len < 0)
        return (int)len;
    ret->ino = le64_get(d->ino);
    ret->type = d->type;
    return 0;
}

/* Puts an entry at key. */
static int entry_put(struct tx *tx, const struct tree_key *key, const char *name, const struct inode *i)
{
    uint8_t item[DIRENT_ITEM_MAX];
    struct disk_dirent d = {.ino = le64_make(i->ino), .type = MODE_TYPE(i->mode), .namelen = (uint8_t)strlen(name)};

    memcpy(item, &d, sizeof(d));
    memcpy(item + sizeof(d), name, d.namelen);
    return tx_put(tx, key, item, sizeof(d) + d.namelen);
}

static int get_dir(struct tx *tx, uint64_t ino, struct inode *ret)
{
    int rc = tx_inode(tx, ino, ret);

    if (rc < 0)
        return rc;
    return S_ISDIR(ret->mode) ? 0 : -ENOTDIR;
}

static int put_dir(struct tx *tx, struct inode *dir)
{
    dir->mtime = dir->ctime = tx->now;
    return tx_inode_put(tx, dir);
}

/* The directory must live (an orphaned one takes no names) and the name be free; *ret_key is where it goes. */
static int entry_place(struct tx *tx, const struct inode *dir, const char *name, struct tree_key *ret_key)
{
    struct entry e;
    int rc = name_ok(name);

    if (rc < 0)
        return rc;
    if (dir->nlink == 0)
        return -ENOENT;
    rc = entry_find(tx->v, dir->ino, name, &e);
    if (rc == 0)
        return -EEXIST;
    return rc == -ENOENT ? names_free_key(tx->v, ITEM_DIRENT, dir->ino, name, strlen(name), ret_key) : rc;
}

int vol_lookup(struct volume *v, uint64_t dir, const char *name, struct vattr *ret_attr)
{
    struct inode d, i;
    struct entry e;
    int rc;

    pthread_rwlock_rdlock(&v->state);
    rc = inode_get(v, dir, &d);
    if (rc == 0 && !S_ISDIR(d.mode))
        rc = -ENOTDIR;
    if (rc == 0 && strnlen(name, VOLUME_NAME_BYTES + 1) > VOLUME_NAME_BYTES)
        rc = -ENAMETOOLONG;
    /* The parent of a removed directory may be gone itself. */
    if (rc == 0 && d.nlink == 0)
        rc = -ENOENT;
    if (rc == 0 && strcmp(name, ".") == 0)
        e.ino = dir;
    else if (rc == 0 && strcmp(name, "..") == 0)
        e.ino = d.parent;
    else if (rc == 0)
        rc = entry_find(v, dir, name, &e);
    if (rc == 0) {
        rc = inode_get(v, e.ino, &i);
        if (rc == -ENOENT) {
            volume_damage(v, "corrupt directory: inode %llu, an entry names the missing inode %llu",
                          (unsigned long long)dir, (unsigned long long)e.ino);
            rc = -EIO;
        }
    }
    if (rc == 0)
        refs_add(v->refs, e.ino, 1);
    pthread_rwlock_unlock(&v->state);
    if (rc == 0)
        inode_attr(v, &i, ret_attr);
    volume_trim(v);
    return rc;
}

void vol_forget(struct volume *v, uint64_t ino, uint64_t n)
{
    struct inode i;
    int rc;

    if (!refs_drop(v->refs, ino, n))
        return;
    pthread_rwlock_rdlock(&v->state);
    rc = inode_get(v, ino, &i);
    pthread_rwlock_unlock(&v->state);
    if (rc == 0 && i.nlink == 0 && volume_changes(v) == 0)
        file_destroy(v, ino);
}

int vol_reference(struct volume *v, uint64_t ino, uint64_t n)
{
    struct inode i;
    int rc;

    pthread_rwlock_rdlock(&v->state);
    rc = inode_get(v, ino, &i);
    /* What lost its name since it was listed may be in destruction already. */
    if (rc == 0 && i.nlink == 0)
        rc = -ENOENT;
    if (rc == 0)
        refs_add(v->refs, ino, n);
    pthread_rwlock_unlock(&v->state);
    return rc;
}

/* Commits, with a reference on the inode that is returned; a failed commit takes it back. */
static int commit_with_ref(struct tx *tx, const struct inode *i, struct vattr *ret_attr)
{
    struct volume *v = tx->v;
    int rc;

    refs_add(v->refs, i->ino, 1);
    rc = tx_commit(tx);
    if (rc < 0)
        refs_drop(v->refs, i->ino, 1);
    else
        inode_attr(v, i, ret_attr);
    return rc;
}

/* --- making --- */

static struct inode new_inode(struct tx *tx, const struct inode *dir, uint32_t mode, uint32_t uid, uint32_t gid)
{
    struct inode i = {.ino = tx_new_inode(tx),
                      .mode = mode,
                      .uid = uid,
                      .gid = gid,
                      .nlink = 1,
                      .atime = tx->now,
                      .mtime = tx->now,
                      .ctime = tx->now,
                      .btime = tx->now,
                      .generation = tx->v->generation};

    if (dir->mode & S_ISGID) {
        i.gid = dir->gid;
        if (S_ISDIR(mode))
            i.mode |= S_ISGID;
    }
    if (S_ISREG(mode))
        i.flags = INODE_INLINE;
    if (S_ISDIR(mode)) {
        i.nlink = 2;
        i.parent = dir->ino;
    }
    return i;
}

/* What a new inode has besides its own item. */
struct making {
    uint32_t mode, rdev, uid, gid;
    const char *target; /* of a symlink */
};

static int make(struct tx *tx, uint64_t dir_ino, const char *name, const struct making *m, struct inode *ret)
{
    struct inode dir;
    struct tree_key key;
    int rc;

    rc = get_dir(tx, dir_ino, &dir);
    if (rc == 0)
        rc = entry_place(tx, &dir, name, &key);
    if (rc == 0 && S_ISDIR(m->mode) && dir.nlink >= VOLUME_LINK_MAX)
        rc = -EMLINK;
    if (rc < 0)
        return rc;
    *ret = new_inode(tx, &dir, m->mode, m->uid, m->gid);
    ret->rdev = m->rdev;
    if (m->target) {
        struct tree_key content = tree_key(ITEM_INLINE, ret->ino, 0);

        ret->size = strlen(m->target);
        rc = tx_put(tx, &content, m->target, ret->size);
    }
    if (rc == 0)
        rc = entry_put(tx, &key, name, ret);
    if (rc == 0)
        rc = tx_inode_put(tx, ret);
    if (rc < 0)
        return rc;
    dir.entries++;
    dir.nlink += S_ISDIR(m->mode) ? 1 : 0;
    return put_dir(tx, &dir);
}

static int make_committed(struct volume *v, uint64_t dir, const char *name, const struct making *m,
                          struct vattr *ret_attr)
{
    struct inode i;
    struct tx tx;
    int rc;

    rc = tx_begin(v, &tx, TX_GROWS);
    if (rc < 0)
        return rc;
    rc = make(&tx, dir, name, m, &i);
    return rc < 0 ? tx_abort(&tx, rc) : commit_with_ref(&tx, &i, ret_attr);
}

static bool makeable(uint32_t mode)
{
    return S_ISREG(mode) || S_ISDIR(mode) || S_ISCHR(mode) || S_ISBLK(mode) || S_ISFIFO(mode) || S_ISSOCK(mode);
}

int vol_mknod(struct volume *v, uint64_t dir, const char *name, uint32_t mode, uint32_t rdev, uint32_t uid,
              uint32_t gid, struct vattr *ret_attr)
{
    struct making m = {.mode = mode & (S_IFMT | 07777), .uid = uid, .gid = gid};

    if (!makeable(mode))
        return -EINVAL;
    if (S_ISCHR(mode) || S_ISBLK(mode))
        m.rdev = rdev;
    return make_committed(v, dir, name, &m, ret_attr);
}

int vol_symlink(struct volume *v, uint64_t dir, const char *name, const char *target, uint32_t uid, uint32_t gid,
                struct vattr *ret_attr)
{
    struct making m = {.mode = S_IFLNK | 0777, .uid = uid, .gid = gid, .target = target};

    if (!*target)
        return -ENOENT;
    if (strlen(target) > SYMLINK_MAX)
        return -ENAMETOOLONG;
    return make_committed(v, dir, name, &m, ret_attr);
}

static int put_orphan(struct tx *tx, uint64_t ino)
{
    struct tree_key key = tree_key(ITEM_ORPHAN, ino, 0);

    return tx_put(tx, &key, NULL, 0);
}

int vol_tmpfile(struct volume *v, uint64_t dir_ino, uint32_t mode, uint32_t uid, uint32_t gid, struct vattr *ret_attr)
{
    struct inode dir, i;
    struct tx tx;
    int rc;

    rc = tx_begin(v, &tx, TX_GROWS);
    if (rc < 0)
        return rc;
    rc = get_dir(&tx, dir_ino, &dir);
    if (rc == 0 && dir.nlink == 0)
        rc = -ENOENT;
    if (rc == 0) {
        i = new_inode(&tx, &dir, S_IFREG | (mode & 07777), uid, gid);
        i.nlink = 0;
        rc = put_orphan(&tx, i.ino);
    }
    if (rc == 0)
        rc = tx_inode_put(&tx, &i);
    return rc < 0 ? tx_abort(&tx, rc) : commit_with_ref(&tx, &i, ret_attr);
}

ssize_t vol_readlink(struct volume *v, uint64_t ino, char *buf, size_t n)
{
    struct tree_key key = tree_key(ITEM_INLINE, ino, 0);
    const uint8_t *value;
    struct inode i;
    size_t len = 0;
    int rc;

    pthread_rwlock_rdlock(&v->state);
    rc = inode_get(v, ino, &i);
    if (rc == 0 && !S_ISLNK(i.mode))
        rc = -EINVAL;
    if (rc == 0)
        rc = tree_get(v->tree, &key, &value, &len) < 0 ? -EIO : 0;
    if (rc == 0)
        memcpy(buf, value, MIN(len, n));
    pthread_rwlock_unlock(&v->state);
    volume_trim(v);
    return rc < 0 ? rc : (ssize_t)MIN(len, n);
}

static int link_inode(struct tx *tx, uint64_t ino, uint64_t dir_ino, const char *name, struct inode *ret)
{
    struct inode dir;
    struct tree_key key;
    int rc;

    rc = tx_inode(tx, ino, ret);
    if (rc == 0 && S_ISDIR(ret->mode))
        rc = -EPERM;
    if (rc == 0 && ret->nlink >= VOLUME_LINK_MAX)
        rc = -EMLINK;
    if (rc == 0)
        rc = get_dir(tx, dir_ino, &dir);
    if (rc == 0)
        rc = entry_place(tx, &dir, name, &key);
    /* Without a reference its destruction may be under way. */
    if (rc == 0 && ret->nlink == 0 && !refs_held(tx->v->refs, ino))
        rc = -ENOENT;
    if (rc == 0 && ret->nlink++ == 0)
        rc = tx_del(tx, &(struct tree_key){.kind = ITEM_ORPHAN, .a = ino});
    if (rc == 0)
        rc = entry_put(tx, &key, name, ret);
    if (rc)
        return rc;
    ret->ctime = tx->now;
    dir.entries++;
    rc = tx_inode_put(tx, ret);
    return rc < 0 ? rc : put_dir(tx, &dir);
}

int vol_link(struct volume *v, uint64_t ino, uint64_t dir, const char *name, struct vattr *ret_attr)
{
    struct inode i;
    struct tx tx;
    int rc;

    rc = tx_begin(v, &tx, TX_GROWS);
    if (rc < 0)
        return rc;
    rc = link_inode(&tx, ino, dir, name, &i);
    return rc < 0 ? tx_abort(&tx, rc) : commit_with_ref(&tx, &i, ret_attr);
}

/* --- removing --- */

/* Takes one name away from an inode whose entry is gone already; an inode without a name becomes an orphan. */
static int drop_name(struct tx *tx, struct inode *i)
{
    int rc = 0;

    i->ctime = tx->now;
    i->nlink = S_ISDIR(i->mode) ? 0 : i->nlink - (i->nlink > 0);
    if (i->nlink == 0)
        rc = put_orphan(tx, i->ino);
    return rc < 0 ? rc : tx_inode_put(tx, i);
}

/* Commits, and destroys what has neither name nor reference now. */
static int commit_dropped(struct tx *tx, const struct inode *gone)
{
    struct volume *v = tx->v;
    int rc = tx_commit(tx);

    if (rc == 0 && gone->ino && gone->nlink == 0 && !refs_held(v->refs, gone->ino))
        file_destroy(v, gone->ino); /* an error leaves the orphan for the next opening */
    return rc;
}

static int remove_name(struct tx *tx, uint64_t dir_ino, const char *name, bool directory, struct inode *ret_gone)
{
    struct inode dir;
    struct entry e;
    int rc;

    rc = get_dir(tx, dir_ino, &dir);
    if (rc == 0 && strnlen(name, VOLUME_NAME_BYTES + 1) > VOLUME_NAME_BYTES)
        rc = -ENAMETOOLONG;
    if (rc == 0)
        rc = entry_find(tx->v, dir_ino, name, &e);
    if (rc == 0)
        rc = tx_inode(tx, e.ino, ret_gone);
    if (rc == 0 && directory && !S_ISDIR(ret_gone->mode))
        rc = -ENOTDIR;
    if (rc == 0 && !directory && S_ISDIR(ret_gone->mode))
        rc = -EISDIR;
    if (rc == 0 && directory && ret_gone->entries > 0)
        rc = -ENOTEMPTY;
    if (rc == 0)
        rc = tx_del(tx, &e.key);
    if (rc == 0)
        rc = drop_name(tx, ret_gone);
    if (rc < 0)
        return rc;
    dir.entries -= dir.entries > 0;
    dir.nlink -= directory ? 1 : 0;
    return put_dir(tx, &dir);
}

static int remove_committed(struct volume *v, uint64_t dir, const char *name, bool directory)
{
    struct inode gone = {0};
    struct tx tx;
    int rc;

    if (strcmp(name, ".") == 0)
        return -EINVAL;
    if (strcmp(name, "..") == 0)
        return directory ? -ENOTEMPTY : -EISDIR;
    rc = tx_begin(v, &tx, TX_CHANGES);
    if (rc < 0)
        return rc;
    rc = remove_name(&tx, dir, name, directory, &gone);
    return rc < 0 ? tx_abort(&tx, rc) : commit_dropped(&tx, &gone);
}

int vol_unlink(struct volume *v, uint64_t dir, const char *name)
{
    return remove_committed(v, dir, name, false);
}

int vol_rmdir(struct volume *v, uint64_t dir, const char *name)
{
    return remove_committed(v, dir, name, true);
}

/* --- rename --- */

struct renaming {
    struct inode from_dir, to_dir; /* to_dir is unused when both are the same: see to() */
    bool same_dir;
    struct entry from, to;
    bool replaces;
    struct inode moved, other; /* other: what stood at the new name */
};

static struct inode *to(struct renaming *r)
{
    return r->same_dir ? &r->from_dir : &r->to_dir;
}

/* Is `ino` the directory `top` or below it? 1, 0 or an error. */
static int is_below(struct tx *tx, uint64_t ino, uint64_t top)
{
    for (uint64_t left = tx->v->inodes; ino != top; left--) {
        struct inode i;
        int rc;

        if (ino == VOLUME_ROOT_INO)
            return 0;
        rc = left ? tx_inode(tx, ino, &i) : -EIO; /* more steps than inodes: a loop */
        if (rc < 0)
            return rc;
        ino = i.parent;
    }
    return 1;
}

static int load_renaming(struct tx *tx, struct renaming *r, uint64_t dir, const char *name, uint64_t newdir,
                         const char *newname)
{
    int rc;

    r->same_dir = dir == newdir;
    rc = get_dir(tx, dir, &r->from_dir);
    if (rc == 0 && !r->same_dir)
        rc = get_dir(tx, newdir, &r->to_dir);
    if (rc == 0 && to(r)->nlink == 0)
        rc = -ENOENT;
    if (rc == 0)
        rc = entry_find(tx->v, dir, name, &r->from);
    if (rc == 0)
        rc = tx_inode(tx, r->from.ino, &r->moved);
    if (rc < 0)
        return rc;
    rc = entry_find(tx->v, newdir, newname, &r->to);
    if (rc == -ENOENT)
        return 0;
    r->replaces = true;
    return rc < 0 ? rc : tx_inode(tx, r->to.ino, &r->other);
}

static int check_replaced(const struct renaming *r)
{
    if (S_ISDIR(r->moved.mode) && !S_ISDIR(r->other.mode))
        return -ENOTDIR;
    if (!S_ISDIR(r->moved.mode) && S_ISDIR(r->other.mode))
        return -EISDIR;
    return S_ISDIR(r->other.mode) && r->other.entries > 0 ? -ENOTEMPTY : 0;
}

/* A directory that goes to another parent takes its link there. */
static void move_parent(struct inode *moved, struct inode *from_dir, struct inode *to_dir)
{
    if (!S_ISDIR(moved->mode) || from_dir == to_dir)
        return;
    from_dir->nlink--;
    to_dir->nlink++;
    moved->parent = to_dir->ino;
}

static int put_dirs(struct tx *tx, struct renaming *r)
{
    int rc = put_dir(tx, &r->from_dir);

    return rc < 0 || r->same_dir ? rc : put_dir(tx, &r->to_dir);
}

static int do_exchange(struct tx *tx, struct renaming *r, const char *name, const char *newname)
{
    int rc;

    move_parent(&r->moved, &r->from_dir, to(r));
    move_parent(&r->other, to(r), &r->from_dir);
    r->moved.ctime = r->other.ctime = tx->now;
    rc = entry_put(tx, &r->to.key, newname, &r->moved);
    if (rc == 0)
        rc = entry_put(tx, &r->from.key, name, &r->other);
    if (rc == 0)
        rc = tx_inode_put(tx, &r->moved);
    if (rc == 0)
        rc = tx_inode_put(tx, &r->other);
    return rc < 0 ? rc : put_dirs(tx, r);
}

/* Leaves a character device 0:0 at the old name, the mark that overlayfs puts where something of a lower layer went. */
static int put_whiteout(struct tx *tx, struct renaming *r, const char *name, const struct making *whiteout)
{
    struct inode i = new_inode(tx, &r->from_dir, whiteout->mode, whiteout->uid, whiteout->gid);
    int rc = entry_put(tx, &r->from.key, name, &i);

    r->from_dir.entries++;
    return rc < 0 ? rc : tx_inode_put(tx, &i);
}

static int do_move(struct tx *tx, struct renaming *r, const char *name, const char *newname,
                   const struct making *whiteout)
{
    struct tree_key key = r->to.key;
    int rc;

    if (r->replaces) {
        if (S_ISDIR(r->other.mode))
            to(r)->nlink--;
        rc = drop_name(tx, &r->other);
    } else {
        rc = names_free_key(tx->v, ITEM_DIRENT, to(r)->ino, newname, strlen(newname), &key);
        to(r)->entries++;
    }
    if (rc == 0)
        rc = tx_del(tx, &r->from.key);
    if (rc < 0)
        return rc;
    r->from_dir.entries--;
    move_parent(&r->moved, &r->from_dir, to(r));
    r->moved.ctime = tx->now;
    rc = entry_put(tx, &key, newname, &r->moved);
    if (rc == 0)
        rc = tx_inode_put(tx, &r->moved);
    if (rc == 0 && whiteout)
        rc = put_whiteout(tx, r, name, whiteout);
    return rc < 0 ? rc : put_dirs(tx, r);
}

static int check_loops(struct tx *tx, const struct renaming *r, uint64_t dir, uint64_t newdir, bool exchange)
{
    int rc = 0;

    if (S_ISDIR(r->moved.mode) && !r->same_dir)
        rc = is_below(tx, newdir, r->moved.ino);
    if (rc == 0 && exchange && S_ISDIR(r->other.mode) && !r->same_dir)
        rc = is_below(tx, dir, r->other.ino);
    return rc == 1 ? -EINVAL : rc;
}

static int do_rename(struct tx *tx, struct renaming *r, const char *name, const char *newname, unsigned flags,
                     const struct making *whiteout)
{
    int rc = 0;

    if (r->replaces && (flags & RENAME_NOREPLACE))
        return -EEXIST;
    if (flags & RENAME_EXCHANGE)
        return r->replaces ? do_exchange(tx, r, name, newname) : -ENOENT;
    if (r->replaces)
        rc = check_replaced(r);
    if (rc == 0 && S_ISDIR(r->moved.mode) && !r->same_dir && r->to_dir.nlink >= VOLUME_LINK_MAX)
        rc = -EMLINK;
    return rc < 0 ? rc : do_move(tx, r, name, newname, whiteout);
}

/* whiteout: what stays at the old name, or NULL. */
static int rename_committed(struct volume *v, uint64_t dir, const char *name, uint64_t newdir, const char *newname,
                            unsigned flags, const struct making *whiteout)
{
    struct renaming r = {0};
    struct inode none = {0};
    struct tx tx;
    int rc;

    if ((flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE)) || flags == (RENAME_NOREPLACE | RENAME_EXCHANGE) ||
        ((flags & RENAME_EXCHANGE) && whiteout))
        return -EINVAL;
    rc = name_ok(name);
    if (rc == 0)
        rc = name_ok(newname);
    if (rc < 0)
        return rc == -EINVAL ? -EBUSY : rc; /* "." and ".." */
    rc = tx_begin(v, &tx, TX_GROWS);
    if (rc < 0)
        return rc;
    rc = load_renaming(&tx, &r, dir, name, newdir, newname);
    if (rc == 0)
        rc = check_loops(&tx, &r, dir, newdir, flags & RENAME_EXCHANGE);
    if (rc < 0)
        return tx_abort(&tx, rc);
    /* Two names of one inode: nothing to do, as POSIX says. */
    if (r.replaces && r.moved.ino == r.other.ino && !(flags & RENAME_NOREPLACE))
        return tx_abort(&tx, 0);
    rc = do_rename(&tx, &r, name, newname, flags, whiteout);
    if (rc < 0)
        return tx_abort(&tx, rc);
    return commit_dropped(&tx, flags & RENAME_EXCHANGE ? &none : &r.other);
}

int vol_rename(struct volume *v, uint64_t dir, const char *name, uint64_t newdir, const char *newname, unsigned flags)
{
    return rename_committed(v, dir, name, newdir, newname, flags, NULL);
}

int vol_rename_whiteout(struct volume *v, uint64_t dir, const char *name, uint64_t newdir, const char *newname,
                        unsigned flags, uint32_t uid, uint32_t gid)
{
    const struct making whiteout = {.mode = S_IFCHR, .uid = uid, .gid = gid};

    return rename_committed(v, dir, name, newdir, newname, flags, &whiteout);
}

/* --- listing --- */

static int emit(struct volume *v, vol_entry_fn entry, void *ctx, const char *name, uint64_t ino, uint64_t cookie,
                bool want_attr, uint8_t type)
{
    struct vattr attr;
    struct inode i;
    int rc = 0;

    if (want_attr) {
        rc = inode_get(v, ino, &i);
        if (rc < 0)
            return rc == -ENOENT ? -EIO : rc;
        inode_attr(v, &i, &attr);
    }
    return entry(ctx, name, ino, (uint32_t)type << 12, cookie, want_attr ? &attr : NULL) ? 1 : 0;
}

static int emit_dots(struct volume *v, const struct inode *dir, uint64_t *cookie, bool want_attr, vol_entry_fn entry,
                     void *ctx)
{
    int rc = 0;

    if (*cookie < 1) {
        rc = emit(v, entry, ctx, ".", dir->ino, 1, want_attr, MODE_TYPE(S_IFDIR));
        *cookie = 1;
    }
    if (rc == 0 && *cookie < 2) {
        rc = emit(v, entry, ctx, "..", dir->parent, 2, want_attr, MODE_TYPE(S_IFDIR));
        *cookie = 2;
    }
    return rc;
}

int vol_readdir(struct volume *v, uint64_t dir, uint64_t cookie, bool want_attr, vol_entry_fn entry, void *ctx)
{
    struct tree_iter it;
    struct inode d;
    int rc, done;

    pthread_rwlock_rdlock(&v->state);
    rc = inode_get(v, dir, &d);
    if (rc == 0 && !S_ISDIR(d.mode))
        rc = -ENOTDIR;
    done = rc < 0 ? rc : 0;
    /* A removed directory is empty, without "..": its parent may be gone. */
    if (rc == 0 && d.nlink > 0)
        done = emit_dots(v, &d, &cookie, want_attr, entry, ctx);
    rc = done ? 0 : tree_iter_seek(v->tree, &(struct tree_key){.kind = ITEM_DIRENT, .a = dir, .b = cookie + 1}, &it);
    for (; rc == 0 && !done && it.key.kind == ITEM_DIRENT && it.key.a == dir; rc = done ? 0 : tree_iter_next(&it)) {
        const struct disk_dirent *e = (const struct disk_dirent *)it.value;
        char name[VOLUME_NAME_BYTES + 1];

        memcpy(name, e + 1, e->namelen);
        name[e->namelen] = 0;
        done = emit(v, entry, ctx, name, le64_get(e->ino), it.key.b, want_attr, e->type);
    }
    pthread_rwlock_unlock(&v->state);
    volume_trim(v);
    if (done < 0)
        return done;
    return rc < 0 && rc != -ENOENT ? rc : 0;
}
