/* inode.c - inodes as items, and their attributes. */
#include "fs/volume/tx.h"

#define DIR_ENTRY_BYTES 32 /* what a directory's size counts for an entry */

void inode_encode(const struct inode *i, struct disk_inode *ret)
{
    *ret = (struct disk_inode){
        .mode = le32_make(i->mode),
        .uid = le32_make(i->uid),
        .gid = le32_make(i->gid),
        .nlink = le32_make(i->nlink),
        .size = le64_make(i->size),
        .blocks = le64_make(i->blocks),
        .atime = le64_make((uint64_t)i->atime),
        .mtime = le64_make((uint64_t)i->mtime),
        .ctime = le64_make((uint64_t)i->ctime),
        .btime = le64_make((uint64_t)i->btime),
        .rdev = le32_make(i->rdev),
        .flags = le32_make(i->flags),
        .parent = le64_make(i->parent),
        .generation = le64_make(i->generation),
        .entries = le64_make(i->entries),
        .xattrs = le32_make(i->xattrs),
    };
}

static bool type_ok(uint32_t mode)
{
    switch (mode & S_IFMT) {
    case S_IFREG:
    case S_IFDIR:
    case S_IFLNK:
    case S_IFCHR:
    case S_IFBLK:
    case S_IFIFO:
    case S_IFSOCK:
        return !(mode & ~(uint32_t)(S_IFMT | 07777));
    default:
        return false;
    }
}

int inode_decode(uint64_t ino, const uint8_t *value, size_t len, struct inode *ret)
{
    struct disk_inode d;

    if (len != sizeof(d))
        return -EUCLEAN;
    memcpy(&d, value, sizeof(d));
    *ret = (struct inode){
        .ino = ino,
        .mode = le32_get(d.mode),
        .uid = le32_get(d.uid),
        .gid = le32_get(d.gid),
        .nlink = le32_get(d.nlink),
        .size = le64_get(d.size),
        .blocks = le64_get(d.blocks),
        .atime = (int64_t)le64_get(d.atime),
        .mtime = (int64_t)le64_get(d.mtime),
        .ctime = (int64_t)le64_get(d.ctime),
        .btime = (int64_t)le64_get(d.btime),
        .rdev = le32_get(d.rdev),
        .flags = le32_get(d.flags),
        .parent = le64_get(d.parent),
        .generation = le64_get(d.generation),
        .entries = le64_get(d.entries),
        .xattrs = le32_get(d.xattrs),
    };
    if (!type_ok(ret->mode) || (ret->flags & ~INODE_INLINE) || ret->size > VOLUME_FILE_MAX)
        return -EUCLEAN;
    return 0;
}

void inode_attr(const struct volume *v, const struct inode *i, struct vattr *ret)
{
    *ret = (struct vattr){
        .ino = i->ino,
        .generation = i->generation,
        .mode = i->mode,
        .uid = i->uid,
        .gid = i->gid,
        .nlink = i->nlink,
        .rdev = i->rdev,
        .size = S_ISDIR(i->mode) ? i->entries * DIR_ENTRY_BYTES : i->size,
        .blocks = i->blocks * (v->block / 512),
        .atime = i->atime,
        .mtime = i->mtime,
        .ctime = i->ctime,
        .btime = i->btime,
    };
}

int inode_get(struct volume *v, uint64_t ino, struct inode *ret)
{
    struct tree_key key = tree_key(ITEM_INODE, ino, 0);
    const uint8_t *value;
    size_t len;
    int rc = tree_get(v->tree, &key, &value, &len);

    if (rc < 0)
        return rc;
    return inode_decode(ino, value, len, ret) < 0 ? -EIO : 0;
}

int vol_getattr(struct volume *v, uint64_t ino, struct vattr *ret_attr)
{
    struct inode i;
    int rc;

    pthread_rwlock_rdlock(&v->state);
    rc = inode_get(v, ino, &i);
    pthread_rwlock_unlock(&v->state);
    if (rc == 0)
        inode_attr(v, &i, ret_attr);
    volume_trim(v);
    return rc;
}

static void set_fields(struct inode *i, unsigned set, const struct vattr *a, int64_t now)
{
    if (set & VOL_SET_MODE)
        i->mode = (i->mode & S_IFMT) | (a->mode & 07777);
    if (set & VOL_SET_UID)
        i->uid = a->uid;
    if (set & VOL_SET_GID)
        i->gid = a->gid;
    if (set & VOL_SET_ATIME)
        i->atime = a->atime;
    if (set & VOL_SET_MTIME)
        i->mtime = a->mtime;
    i->ctime = set & VOL_SET_CTIME ? a->ctime : now;
}

int vol_setattr(struct volume *v, uint64_t ino, unsigned set, const struct vattr *attr, struct vattr *ret_attr)
{
    struct inode i;
    struct tx tx;
    int rc;

    if (set & VOL_SET_SIZE) {
        rc = file_set_size(v, ino, attr->size);
        if (rc < 0)
            return rc;
        set &= ~(unsigned)VOL_SET_SIZE;
        if (!set)
            return vol_getattr(v, ino, ret_attr);
    }
    rc = tx_begin(v, &tx, TX_CHANGES);
    if (rc < 0)
        return rc;
    rc = tx_inode(&tx, ino, &i);
    if (rc == 0) {
        set_fields(&i, set, attr, tx.now);
        rc = tx_inode_put(&tx, &i);
    }
    if (rc < 0)
        return tx_abort(&tx, rc);
    inode_attr(v, &i, ret_attr);
    return tx_commit(&tx);
}
