/* xattr.c - extended attributes: one XATTR item each; the inode counts them. */
#include "fs/volume/names.h"

#include <sys/xattr.h>

#define XATTR_NAME_BYTES 255

static bool xattr_match(const uint8_t *value, size_t len, const char *name, size_t n)
{
    const struct disk_xattr *d = (const struct disk_xattr *)value;

    return len >= sizeof(*d) + n && d->namelen == n && memcmp(d + 1, name, n) == 0;
}

/* [state] Copies the whole item. */
static ssize_t find(struct volume *v, uint64_t ino, const char *name, struct tree_key *ret_key,
                    uint8_t item[ITEM_VALUE_MAX])
{
    ssize_t len = names_find(v, ITEM_XATTR, ino, name, strlen(name), xattr_match, ret_key, item, ITEM_VALUE_MAX);

    return len == -ENOENT ? -ENODATA : len;
}

ssize_t vol_getxattr(struct volume *v, uint64_t ino, const char *name, void *value, size_t size)
{
    const struct disk_xattr *d;
    uint8_t item[ITEM_VALUE_MAX];
    struct tree_key key;
    struct inode inode;
    ssize_t len;
    int rc;

    pthread_rwlock_rdlock(&v->state);
    rc = inode_get(v, ino, &inode);
    /* The kernel asks for security.capability before every write: most inodes have nothing to look through. */
    if (rc < 0)
        len = rc;
    else
        len = inode.xattrs ? find(v, ino, name, &key, item) : -ENODATA;
    pthread_rwlock_unlock(&v->state);
    volume_trim(v);
    if (len < 0)
        return len;
    d = (const struct disk_xattr *)item;
    len = le16_get(d->valuelen);
    if (size == 0)
        return len;
    if ((size_t)len > size)
        return -ERANGE;
    memcpy(value, item + sizeof(*d) + d->namelen, (size_t)len);
    return len;
}

static size_t encode(uint8_t item[ITEM_VALUE_MAX], const char *name, const void *value, size_t size)
{
    struct disk_xattr d = {.valuelen = le16_make((uint16_t)size), .namelen = (uint8_t)strlen(name)};

    memcpy(item, &d, sizeof(d));
    memcpy(item + sizeof(d), name, d.namelen);
    if (size)
        memcpy(item + sizeof(d) + d.namelen, value, size);
    return sizeof(d) + d.namelen + size;
}

static int set(struct tx *tx, uint64_t ino, const char *name, const void *value, size_t size, int flags)
{
    uint8_t item[ITEM_VALUE_MAX];
    struct tree_key key;
    struct inode inode;
    ssize_t old;
    int rc;

    rc = tx_inode(tx, ino, &inode);
    if (rc < 0)
        return rc;
    old = find(tx->v, ino, name, &key, item);
    if (old < 0 && old != -ENODATA)
        return (int)old;
    if (old == -ENODATA && (flags & XATTR_REPLACE))
        return -ENODATA;
    if (old >= 0 && (flags & XATTR_CREATE))
        return -EEXIST;
    if (old == -ENODATA) {
        rc = names_free_key(tx->v, ITEM_XATTR, ino, name, strlen(name), &key);
        inode.xattrs++;
    }
    if (rc == 0)
        rc = tx_put(tx, &key, item, encode(item, name, value, size));
    inode.ctime = tx->now;
    return rc < 0 ? rc : tx_inode_put(tx, &inode);
}

int vol_setxattr(struct volume *v, uint64_t ino, const char *name, const void *value, size_t size, int flags)
{
    struct tx tx;
    int rc;

    if (!*name || strlen(name) > XATTR_NAME_BYTES)
        return -ERANGE;
    if (size > VOLUME_XATTR_MAX)
        return -E2BIG;
    if (flags & ~(XATTR_CREATE | XATTR_REPLACE))
        return -EINVAL;
    rc = tx_begin(v, &tx, TX_GROWS);
    if (rc < 0)
        return rc;
    rc = set(&tx, ino, name, value, size, flags);
    return rc < 0 ? tx_abort(&tx, rc) : tx_commit(&tx);
}

ssize_t vol_listxattr(struct volume *v, uint64_t ino, char *list, size_t size)
{
    struct tree_key key = tree_key(ITEM_XATTR, ino, 0);
    struct tree_iter it;
    struct inode inode;
    size_t n = 0;
    int rc;

    pthread_rwlock_rdlock(&v->state);
    rc = inode_get(v, ino, &inode);
    if (rc == 0)
        rc = tree_iter_seek(v->tree, &key, &it);
    for (; rc == 0 && it.key.kind == ITEM_XATTR && it.key.a == ino; rc = tree_iter_next(&it)) {
        const struct disk_xattr *d = (const struct disk_xattr *)it.value;

        if (size && n + d->namelen + 1u > size) {
            rc = -ERANGE;
            break;
        }
        if (size) {
            memcpy(list + n, d + 1, d->namelen);
            list[n + d->namelen] = 0;
        }
        n += d->namelen + 1u;
    }
    pthread_rwlock_unlock(&v->state);
    volume_trim(v);
    if (rc == -ENOENT && n == 0 && vol_getattr(v, ino, &(struct vattr){0}) < 0)
        return -ENOENT;
    return rc < 0 && rc != -ENOENT ? rc : (ssize_t)n;
}

int vol_removexattr(struct volume *v, uint64_t ino, const char *name)
{
    uint8_t item[ITEM_VALUE_MAX];
    struct tree_key key;
    struct inode inode;
    ssize_t len = 0;
    struct tx tx;
    int rc;

    rc = tx_begin(v, &tx, TX_CHANGES);
    if (rc < 0)
        return rc;
    rc = tx_inode(&tx, ino, &inode);
    if (rc == 0)
        len = find(v, ino, name, &key, item);
    if (rc == 0)
        rc = len < 0 ? (int)len : tx_del(&tx, &key);
    if (rc == 0) {
        inode.xattrs -= inode.xattrs > 0;
        inode.ctime = tx.now;
        rc = tx_inode_put(&tx, &inode);
    }
    return rc < 0 ? tx_abort(&tx, rc) : tx_commit(&tx);
}
