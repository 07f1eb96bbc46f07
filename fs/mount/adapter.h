/*
 * adapter.h - what the files of the adapter share.
 *
 *   adapter.c       the skeleton, the mount's life, names
 *   adapter_attr.c  attributes: stat, statfs, xattrs
 *   adapter_file.c  content: files, directories
 */
#ifndef COFFER_MOUNT_ADAPTER_H
#define COFFER_MOUNT_ADAPTER_H

#include "mount.h"

#define PLACEHOLDER_FH UINT64_MAX /* of the placeholder listing; no grant has this number */

/* Capabilities that the kernel has granted, set once by INIT. */
struct adapter_caps {
    bool acl;       /* FUSE_POSIX_ACL: it asks for ACLs and follows them */
    bool writeback; /* files open for writing may have content and a size that only it knows */
};
extern struct adapter_caps adapter_caps;

/* --- replies --- */

static inline void adapter_reply(fuse_req_t req, int rc)
{
    fuse_reply_err(req, rc < 0 ? -rc : 0);
}

void adapter_stat(const struct vattr *a, struct stat *st);
double adapter_attr_timeout(void);
void adapter_entry(const struct vattr *a, struct fuse_entry_param *e);

/* --- entering; after 0: adapter_leave() --- */

/* Enters by who asks. To the receiver of the placeholder, -EACCES. */
int adapter_enter(fuse_req_t req, unsigned flags, struct auth *a, struct volume **v);
/* Enters by the grant of fi's handle, or (NULL) by who asks. */
int adapter_enter_by(fuse_req_t req, unsigned flags, const struct fuse_file_info *fi, struct auth *a,
                     struct volume **v);
void adapter_leave(struct auth *a);

/* Drops n of the kernel's references. v may be NULL: locked. Inside. */
void adapter_forget(struct volume *v, uint64_t ino, uint64_t n);
/* The same from outside, for an answer that the kernel did not take. */
void adapter_forget_unsent(uint64_t ino);

/* Has a server that died done what the request asks for? Its log says so: then only the answer is missing. Inside. */
bool adapter_done(struct volume *v);
/* Makes an inode as mknod does (NULL: without a name), with what its directory's default ACL or the caller's umask say.
 * Notes the kernel's reference. Inside. */
int adapter_make(fuse_req_t req, struct volume *v, uint64_t dir, const char *name, uint32_t mode, uint32_t rdev,
                 struct vattr *ret);

/* --- operations --- */

void op_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi);
void op_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *st, int to_set, struct fuse_file_info *fi);
/* A change of content or owner by a caller who may not keep set-id bits ends them (file_remove_privs in the kernel). Inside. */
int adapter_kill_suidgid(struct volume *v, uint64_t ino);
void op_statfs(fuse_req_t req, fuse_ino_t ino);
void op_setxattr(fuse_req_t req, fuse_ino_t ino, const char *name, const char *value, size_t size, int flags);
void op_getxattr(fuse_req_t req, fuse_ino_t ino, const char *name, size_t size);
void op_listxattr(fuse_req_t req, fuse_ino_t ino, size_t size);
void op_removexattr(fuse_req_t req, fuse_ino_t ino, const char *name);

void op_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi);
void op_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, struct fuse_file_info *fi);
void op_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi);
void op_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi);
void op_write(fuse_req_t req, fuse_ino_t ino, const char *buf, size_t size, off_t off, struct fuse_file_info *fi);
void op_flush(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi);
void op_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi);
void op_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t off, off_t len, struct fuse_file_info *fi);
void op_copy_file_range(fuse_req_t req, fuse_ino_t from, off_t from_off, struct fuse_file_info *from_fi, fuse_ino_t to,
                        off_t to_off, struct fuse_file_info *to_fi, size_t len, int flags);
void op_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence, struct fuse_file_info *fi);
void op_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi);
void op_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi);
void op_readdirplus(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi);
void op_releasedir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi);
void op_fsyncdir(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi);

#endif
