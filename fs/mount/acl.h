/*
 * acl.h - POSIX ACLs: with FUSE_POSIX_ACL the kernel checks them, and the server keeps them in step with modes.
 *
 * ACLs are stored as the attributes that the kernel passes (`struct posix_acl_xattr_header`, version 2). The rules are
 * those of the kernel's fs/posix_acl.c, whose functions are named below. All of them are called inside (life.c).
 */
#ifndef COFFER_MOUNT_ACL_H
#define COFFER_MOUNT_ACL_H

#include "coffer/volume.h"

#define ACL_ACCESS      "system.posix_acl_access"
#define ACL_DEFAULT     "system.posix_acl_default"
#define ACL_ENTRIES_MAX ((VOLUME_XATTR_MAX - 4) / 8)

struct acl_entry {
    uint16_t tag, perm;
    uint32_t id;
};

struct acl {
    size_t n;
    struct acl_entry entry[ACL_ENTRIES_MAX];
};

/* --- in memory --- */

/* An attribute's value; valid as posix_acl_valid() has it. -EINVAL. */
int acl_decode(const void *value, size_t size, struct acl *ret);
/* Writes 4 + 8 n bytes; returns their number. */
size_t acl_encode(const struct acl *a, uint8_t value[VOLUME_XATTR_MAX]);
/* The permission bits that the ACL is equal to, or shows. *ret_equal: it says no more than they do
 * (posix_acl_equiv_mode). */
uint32_t acl_mode(const struct acl *a, bool *ret_equal);
/* Sets the owner's, mask's (or group's) and others' bits (__posix_acl_chmod_masq). */
void acl_set_mode(struct acl *a, uint32_t mode);
/* What becomes of a directory's default ACL and of mode in a new file (posix_acl_create_masq): *a is its access ACL.
 * Returns the mode. */
uint32_t acl_create(struct acl *a, uint32_t mode);

/* --- in a volume --- */

/* What a new file is to get. */
struct acl_new {
    uint32_t mode;       /* in the end */
    uint32_t first_mode; /* to be made with: until the ACL is there nobody may do more than with it */
    size_t access_size;  /* 0: none */
    size_t default_size;
    uint8_t access[VOLUME_XATTR_MAX];
    uint8_t default_[VOLUME_XATTR_MAX];
};

/* By its directory's default ACL (with acls), or else umask. 0, -EIO. */
int acl_inherit(struct volume *v, uint64_t dir, uint32_t mode, uint32_t umask, bool acls, struct acl_new *ret);
/* Gives the new inode its ACLs; *attr follows. On an error it stays as it is. */
int acl_give(struct volume *v, const struct acl_new *n, struct vattr *attr);
/* Sets the access ACL, and the mode with it; the set-group-ID bit goes for uid and gid's caller as for chmod. An ACL
 * that is no more than a mode is not kept. -EINVAL and vol_setxattr's. */
int acl_set(struct volume *v, uint64_t ino, uint32_t uid, uint32_t gid, const void *value, size_t size);
/* Brings the access ACL, if there is one, in line with a new mode. */
int acl_follow_mode(struct volume *v, uint64_t ino, uint32_t mode);

#endif
