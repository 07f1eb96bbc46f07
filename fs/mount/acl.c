/*
 * acl.c - see acl.h.
 *
 * A change of mode and ACL is two transactions of the engine. Their order is such that between them nobody may do more
 * than before or after: the kernel looks at the ACL whenever the mode's group bits are not all zero.
 */
#include "acl.h"

#include "fs/base/base.h"

#define ACL_VERSION 2
#define NO_ID       UINT32_MAX

enum acl_tag { USER_OBJ = 0x01, USER = 0x02, GROUP_OBJ = 0x04, GROUP = 0x08, MASK = 0x10, OTHER = 0x20 };

struct wire_entry {
    le16 tag, perm;
    le32 id;
};
_Static_assert(sizeof(struct wire_entry) == 8, "posix_acl_xattr_entry");

/* --- in memory --- */

static struct acl_entry *find(struct acl *a, enum acl_tag tag)
{
    for (size_t i = 0; i < a->n; i++) {
        if (a->entry[i].tag == tag)
            return &a->entry[i];
    }
    return NULL;
}

/* Which bits of a mode are the group's: the mask's, where there is one. */
static struct acl_entry *group_class(struct acl *a)
{
    struct acl_entry *mask = find(a, MASK);

    return mask ? mask : find(a, GROUP_OBJ);
}

/* Entries come in the order of their tags; USER_OBJ, GROUP_OBJ and OTHER exactly once, MASK at most once and wherever
 * there are named ones. */
static int check(const struct acl *a)
{
    unsigned count[OTHER + 1] = {0};
    uint16_t last = 0;

    for (size_t i = 0; i < a->n; i++) {
        const struct acl_entry *e = &a->entry[i];

        if (e->tag < last || (e->perm & ~7u))
            return -EINVAL;
        last = e->tag;
        if (e->tag != USER_OBJ && e->tag != USER && e->tag != GROUP_OBJ && e->tag != GROUP && e->tag != MASK &&
            e->tag != OTHER)
            return -EINVAL;
        if ((e->tag == USER || e->tag == GROUP) && e->id == NO_ID)
            return -EINVAL;
        count[e->tag]++;
    }
    if (count[USER_OBJ] != 1 || count[GROUP_OBJ] != 1 || count[OTHER] != 1 || count[MASK] > 1)
        return -EINVAL;
    return count[MASK] == 0 && count[USER] + count[GROUP] > 0 ? -EINVAL : 0;
}

int acl_decode(const void *value, size_t size, struct acl *ret)
{
    const uint8_t *p = value;
    le32 version;

    if (size < sizeof(version) || size > VOLUME_XATTR_MAX || (size - sizeof(version)) % sizeof(struct wire_entry))
        return -EINVAL;
    memcpy(&version, p, sizeof(version));
    if (le32_get(version) != ACL_VERSION)
        return -EINVAL;
    ret->n = (size - sizeof(version)) / sizeof(struct wire_entry);
    for (size_t i = 0; i < ret->n; i++) {
        struct wire_entry e;

        memcpy(&e, p + sizeof(version) + i * sizeof(e), sizeof(e));
        ret->entry[i] = (struct acl_entry){le16_get(e.tag), le16_get(e.perm), le32_get(e.id)};
    }
    return check(ret);
}

size_t acl_encode(const struct acl *a, uint8_t value[VOLUME_XATTR_MAX])
{
    le32 version = le32_make(ACL_VERSION);

    memcpy(value, &version, sizeof(version));
    for (size_t i = 0; i < a->n; i++) {
        struct wire_entry e = {le16_make(a->entry[i].tag), le16_make(a->entry[i].perm), le32_make(a->entry[i].id)};

        memcpy(value + sizeof(version) + i * sizeof(e), &e, sizeof(e));
    }
    return sizeof(version) + a->n * sizeof(struct wire_entry);
}

uint32_t acl_mode(const struct acl *a, bool *ret_equal)
{
    struct acl *any = (struct acl *)(uintptr_t)a; /* find() changes nothing */

    *ret_equal = a->n == 3;
    return (uint32_t)find(any, USER_OBJ)->perm << 6 | (uint32_t)group_class(any)->perm << 3 | find(any, OTHER)->perm;
}

void acl_set_mode(struct acl *a, uint32_t mode)
{
    find(a, USER_OBJ)->perm = mode >> 6 & 7;
    group_class(a)->perm = mode >> 3 & 7;
    find(a, OTHER)->perm = mode & 7;
}

uint32_t acl_create(struct acl *a, uint32_t mode)
{
    bool equal;
    uint32_t perm = acl_mode(a, &equal) & mode;

    acl_set_mode(a, perm);
    return (mode & ~0777u) | perm;
}

/* --- in a volume --- */

/* 0, -ENODATA, -EIO for one that cannot be. */
static int load(struct volume *v, uint64_t ino, const char *name, struct acl *ret)
{
    uint8_t value[VOLUME_XATTR_MAX];
    ssize_t n = vol_getxattr(v, ino, name, value, sizeof(value));

    if (n < 0)
        return (int)n;
    return acl_decode(value, (size_t)n, ret) < 0 ? -EIO : 0;
}

int acl_inherit(struct volume *v, uint64_t dir, uint32_t mode, uint32_t umask, bool acls, struct acl_new *ret)
{
    struct acl a;
    bool equal;
    int rc = acls ? load(v, dir, ACL_DEFAULT, &a) : -ENODATA;

    ret->access_size = ret->default_size = 0;
    if (rc == -ENODATA) {
        ret->mode = ret->first_mode = mode & ~(umask & 0777);
        return 0;
    }
    if (rc < 0)
        return rc;
    if (S_ISDIR(mode))
        ret->default_size = acl_encode(&a, ret->default_);
    ret->mode = ret->first_mode = acl_create(&a, mode);
    (void)acl_mode(&a, &equal);
    if (equal)
        return 0;
    ret->access_size = acl_encode(&a, ret->access);
    /* Without the ACL the group bits are the group's, not the mask's. */
    ret->first_mode &= ~0070u | (uint32_t)find(&a, GROUP_OBJ)->perm << 3;
    return 0;
}

int acl_give(struct volume *v, const struct acl_new *n, struct vattr *attr)
{
    uint64_t ino = attr->ino;
    int rc = 0;

    if (n->default_size)
        rc = vol_setxattr(v, ino, ACL_DEFAULT, n->default_, n->default_size, 0);
    if (rc == 0 && n->access_size)
        rc = vol_setxattr(v, ino, ACL_ACCESS, n->access, n->access_size, 0);
    if (rc == 0 && n->mode != n->first_mode) {
        /* The engine may have added set-group-ID, of a directory. */
        attr->mode = (attr->mode & ~0777u) | (n->mode & 0777);
        rc = vol_setattr(v, ino, VOL_SET_MODE, attr, attr);
    } else if (rc == 0 && n->default_size + n->access_size) {
        rc = vol_getattr(v, ino, attr);
    }
    return rc;
}

int acl_set(struct volume *v, uint64_t ino, uint32_t uid, uint32_t gid, const void *value, size_t size)
{
    struct vattr attr;
    struct acl a;
    bool equal;
    int rc = acl_decode(value, size, &a);

    if (rc == 0)
        rc = vol_getattr(v, ino, &attr);
    if (rc)
        return rc;
    attr.mode = (attr.mode & ~0777u) | acl_mode(&a, &equal);
    /* The kernel would say whether the caller is in the group, or privileged, only with FUSE_SETXATTR_EXT, which
     * libfuse 3.14 does not know; of other groups than the caller's first we know nothing. */
    if (uid != 0 && gid != attr.gid)
        attr.mode &= ~(uint32_t)S_ISGID;
    if (!equal)
        rc = vol_setxattr(v, ino, ACL_ACCESS, value, size, 0);
    if (rc == 0)
        rc = vol_setattr(v, ino, VOL_SET_MODE, &attr, &attr);
    if (rc == 0 && equal)
        rc = vol_removexattr(v, ino, ACL_ACCESS);
    return rc == -ENODATA ? 0 : rc;
}

int acl_follow_mode(struct volume *v, uint64_t ino, uint32_t mode)
{
    uint8_t value[VOLUME_XATTR_MAX];
    struct acl a;
    bool equal;
    int rc = load(v, ino, ACL_ACCESS, &a);

    if (rc < 0)
        return rc == -ENODATA ? 0 : rc;
    if (acl_mode(&a, &equal) == (mode & 0777))
        return 0;
    acl_set_mode(&a, mode);
    return vol_setxattr(v, ino, ACL_ACCESS, value, acl_encode(&a, value), 0);
}
