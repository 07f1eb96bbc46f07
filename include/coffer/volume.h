/*
 * volume.h - the volume engine: one encrypted filesystem in two backing files, `data` and `log`.
 *
 * The engine knows nothing of FUSE, Docker or the keystore; it is handed two byte stores and a key. All functions may be
 * called from several threads at once. Functions return 0 (or a count) or a negative errno. Besides the errors named:
 *   -EIO     something in the backing files does not authenticate, or an earlier write or flush failed
 *   -EROFS   the volume refuses changes: opened read-only, or in its error state until it is reopened
 *   -ENOSPC  the volume's size limit or the backing filesystem is full; nothing that was acknowledged is lost
 *
 * Durability: an operation that returned success survives the death of the process at once (its log record is written),
 * and a power cut after the next successful vol_fsync, vol_sync or 5 s (with the background thread).
 *
 * References: vol_lookup, vol_mknod, vol_symlink, vol_link and vol_tmpfile each take one reference on the inode that they
 * return (FUSE's lookup count); vol_forget drops n. An inode without names lives until its last reference is gone.
 * The engine does not check permissions: that is the caller's (the kernel's default_permissions).
 */
#ifndef COFFER_VOLUME_H
#define COFFER_VOLUME_H

#include "store.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

struct key;
struct volume;

#define VOLUME_ROOT_INO   1
#define VOLUME_NAME_BYTES 255 /* a directory entry's name */
#define VOLUME_ID_BYTES   16
#define VOLUME_SIZE_MIN   (64ull << 20)
#define VOLUME_SIZE_MAX   (16ull << 40)
#define VOLUME_FILE_MAX   (16ull << 40)
#define VOLUME_LINK_MAX   65000
#define VOLUME_XATTR_MAX  4096 /* bytes of one attribute's value */

enum volume_profile {
    VOLUME_PROFILE_GENERAL = 0,
    VOLUME_PROFILE_DATABASE = 1,
};

/* How what takes long tells about itself; called by the thread that does it, perhaps with locks held: do not call back. */
struct volume_report {
    void (*line)(void *ctx, const char *text);                  /* a finding: one line, no plaintext in it */
    void (*progress)(void *ctx, uint64_t done, uint64_t total); /* bytes; NULL: nobody asks */
    bool (*stop)(void *ctx); /* NULL or false: go on; true: end with -ECANCELED soon */
    void *ctx;
};

static inline void volume_report_progress(const struct volume_report *r, uint64_t done, uint64_t total)
{
    if (r->progress)
        r->progress(r->ctx, done, total);
}

static inline bool volume_report_stop(const struct volume_report *r)
{
    return r->stop && r->stop(r->ctx);
}

/* What is fixed when a volume is made. */
struct volume_params {
    uint8_t id[VOLUME_ID_BYTES]; /* random; also in the keystore's record */
    uint32_t block_size;         /* 4096, 8192 or 16384 */
    uint32_t profile;            /* enum volume_profile */
    uint64_t size_limit;         /* bytes, all space of the volume in `data`; VOLUME_SIZE_MIN to VOLUME_SIZE_MAX */
    uint64_t log_segment; /* bytes of one log segment, multiple of 64 KiB, at least 256 KiB; 0: the default, 16 MiB */
    uint32_t root_mode;   /* permission bits of the root directory */
    uint32_t root_uid;
    uint32_t root_gid;
};

/* What somebody beyond the reach of whoever writes the backing files remembers of a volume: its newest checkpoint. */
struct volume_seen {
    uint8_t branch[VOLUME_ID_BYTES]; /* random; another one each time that an older state was accepted */
    uint64_t generation;             /* 0: nothing is remembered */
    uint8_t root_mac[16];
};

struct volume_options {
    bool read_only;
    bool background;    /* run the thread that checkpoints and flushes every 5 s; off: only inside calls */
    size_t cache_bytes; /* clean tree nodes kept in memory; 0: 16 MiB */
    uint64_t mount_id;  /* random, of this mount: goes into log records */
    /* A server of the same mount died and the kernel goes on: what it refers to is not known, so every inode of before
     * counts as referenced until it is forgotten (vol_forget); unlinked ones live on until then, or the next opening without
     * this. What requests of mount_id have done is remembered (vol_request_done). */
    bool resumed;
    /* Called (from any thread, locks may be held: do not call back) for damage found: one line, no plaintext in it. */
    void (*on_damage)(void *ctx, const char *what);
    struct volume_seen seen; /* a state that is older, or another of the same age, is refused: -ESTALE */
    bool new_branch;         /* the state is accepted whatever seen says, and begins a branch of its own */
    /* Called when a checkpoint is durable, before the space that it freed is used again (from any thread, locks may be
     * held: do not call back). May block: only checkpoints wait. */
    void (*on_checkpoint)(void *ctx, const struct volume_seen *now);
    void *ctx;
    const struct volume_report *repair; /* volume_repair's own */
};

struct vattr {
    uint64_t ino;
    uint64_t generation;
    uint32_t mode; /* type and permission bits */
    uint32_t uid, gid;
    uint32_t nlink;
    uint32_t rdev;
    uint64_t size;
    uint64_t blocks;                    /* 512-byte units really used */
    int64_t atime, mtime, ctime, btime; /* ns since 1970, may be negative */
};

/* --- life --- */

/* Makes an empty volume in two empty stores and makes it durable. -EEXIST when one is not empty. The stores stay the
 * caller's. */
int volume_format(struct store *data, struct store *log, const struct key *key, const struct volume_params *params);
/*
 * Opens through recovery. The stores are the volume's from here on, also after a failure (closed). The key is used only
 * during the call. -EIO: damaged, reported to on_damage; -EKEYREJECTED: no superblock opens with this key and id;
 * -ENOTSUP: a feature of a newer version; -ESTALE: an older state than options.seen.
 */
int volume_open(struct store *data, struct store *log, const struct key *key, const uint8_t id[VOLUME_ID_BYTES],
                const struct volume_options *options, struct volume **ret_volume);
/* Checkpoints, wipes the keys, closes the stores, frees. Returns the error of the checkpoint; v is gone all the same. No
 * other call may be under way. */
int volume_close(struct volume *v);
/* Frees without writing anything (as a killed process would leave it). For tests. */
void volume_abandon(struct volume *v);
/* Forces a checkpoint. */
int volume_checkpoint(struct volume *v);
/* The superblock's parameters. */
void volume_get_params(struct volume *v, struct volume_params *ret_params);

struct volume_stat {
    uint64_t size_limit, used, data_bytes; /* bytes: limit, in use, length of `data` */
    uint64_t inodes;
    uint64_t generation, sequence, flushed_sequence;
    uint64_t dirty_nodes, cached_nodes;
    bool failed; /* error state */
};
void volume_stat(struct volume *v, struct volume_stat *ret_stat);

/*
 * Walks everything: every node, item, extent record and reference, the free space against what is used, link counts,
 * and, with data, every extent's content. Returns the number of findings, -ECANCELED, or -EBUSY: the volume became so full
 * that the space of the generation that was being checked was needed. Of a volume in use it checks a generation that stands
 * still (it checkpoints first); nobody waits for it.
 */
int volume_check_report(struct volume *v, bool data, const struct volume_report *report);
/* The same without progress. */
int volume_check(struct volume *v, bool data, void (*line)(void *ctx, const char *text), void *ctx);

/*
 * Reads and authenticates all of a volume in use, a little at a time: zero *at, then call until it returns 0 (1: there is
 * more), with so many bytes to read in one call. Damage goes to on_damage, with what and where, and is counted. Each call
 * reads the newest generation, and holds nothing afterwards.
 */
struct volume_scrub {
    uint64_t
        snapshot; /* the newest state first, then each snapshot's, as far as it differs from the one that came before */
    uint8_t kind; /* where it goes on */
    uint64_t a, b;
    bool over;
    uint64_t done, total; /* bytes; the total is an estimate */
    unsigned findings;
};
int volume_scrub_step(struct volume *v, struct volume_scrub *at, uint64_t bytes);

/* Changes size_limit, durably; nothing is moved. -ENOSPC: less than what is used and the reserve; -EINVAL. */
int volume_resize(struct volume *v, uint64_t size_limit);

/*
 * Makes a damaged volume whole out of what authenticates: drops the rest, and calls line() for each thing that is lost,
 * dropped, kept under another name or made anew. Blocks that are lost read as -EIO from then on, until they are written; files
 * that lost their names are in /lost+found, as #<inode>. Nothing is changed on disk before all is decided, and then at
 * once. The stores are closed in every case. Returns the number of lines; -EIO, -EKEYREJECTED: nothing can be saved (the
 * tree's root or all superblocks are lost); -ENOSPC, -ECANCELED.
 */
int volume_repair(struct store *data, struct store *log, const struct key *key, const uint8_t id[VOLUME_ID_BYTES],
                  const struct volume_options *options, const struct volume_report *report);

/* --- snapshots --- */

#define VOLUME_SNAPSHOT_NAME 64 /* bytes of a snapshot's name, without a NUL */
#define VOLUME_SNAPSHOTS_MAX 256

struct volume_snapshot {
    char name[VOLUME_SNAPSHOT_NAME + 1];
    int64_t created;     /* ns since 1970 */
    uint64_t generation; /* of the state that it keeps */
    uint64_t used;       /* bytes that this state uses */
};

/* Letters, digits, '.', '_' and '-', the first one a letter or digit. */
bool volume_snapshot_name_ok(const char *name);
/*
 * Keeps the state of now under a name, durably: everything acknowledged before the call is in it. Nothing is copied; what
 * the volume changes later takes new space. -EEXIST, -EINVAL (the name), -EMFILE (VOLUME_SNAPSHOTS_MAX), -EBUSY: the
 * volume became so full that it could not stand still for a moment.
 */
int volume_snapshot_create(struct volume *v, const char *name);
/* Forgets it, durably; space that only it used becomes free. -ENOENT, -EBUSY: it is being read (by this process). */
int volume_snapshot_remove(struct volume *v, const char *name);
/* Calls fn for each, by name, until it returns nonzero, which is returned. */
int volume_snapshot_list(struct volume *v, int (*fn)(void *ctx, const struct volume_snapshot *s), void *ctx);
/*
 * Opens a snapshot as a volume that is read-only, for as long as nobody removes it: also while another process uses the
 * volume itself. Needs nothing but `data`, read-only, which is the volume's from here on, also after a failure. The
 * snapshot must have been there at the volume's last checkpoint (volume_snapshot_create makes one). -ENOENT; -EIO,
 * -EKEYREJECTED, -ENOTSUP, -ESTALE as volume_open. Of options, cache_bytes, on_damage, ctx, seen and new_branch count.
 */
int volume_snapshot_open(struct store *data, const struct key *key, const uint8_t id[VOLUME_ID_BYTES],
                         const char *snapshot, const struct volume_options *options, struct volume **ret_volume);

/* --- names --- */

/* The request (FUSE's unique id without bit 63, or 0) that the calling thread works for from now on: goes into the records of
 * what it changes. */
void vol_request(uint64_t id);
/* Whether the calling thread's request had changed the volume before the server that was asked first died. */
bool vol_request_done(struct volume *v);
/* Above all inode numbers in use. */
uint64_t vol_next_inode(struct volume *v);

int vol_lookup(struct volume *v, uint64_t dir, const char *name, struct vattr *ret_attr);
void vol_forget(struct volume *v, uint64_t ino, uint64_t n);
/* Makes a file, directory, device node, fifo or socket by mode's type. A setgid directory hands on its group (and the bit
 * to directories). -EEXIST, -EMLINK, -ENAMETOOLONG. time_ns 0: now. */
int vol_mknod(struct volume *v, uint64_t dir, const char *name, uint32_t mode, uint32_t rdev, uint32_t uid,
              uint32_t gid, struct vattr *ret_attr);
/* A file without a name (O_TMPFILE); vol_link can give it one. */
int vol_tmpfile(struct volume *v, uint64_t dir, uint32_t mode, uint32_t uid, uint32_t gid, struct vattr *ret_attr);
int vol_symlink(struct volume *v, uint64_t dir, const char *name, const char *target, uint32_t uid, uint32_t gid,
                struct vattr *ret_attr);
/* Returns the length (not NUL-terminated) or -errno. */
ssize_t vol_readlink(struct volume *v, uint64_t ino, char *buf, size_t n);
int vol_link(struct volume *v, uint64_t ino, uint64_t dir, const char *name, struct vattr *ret_attr);
int vol_unlink(struct volume *v, uint64_t dir, const char *name);
int vol_rmdir(struct volume *v, uint64_t dir, const char *name);
/* flags: RENAME_NOREPLACE or RENAME_EXCHANGE; others, and both, are -EINVAL. */
int vol_rename(struct volume *v, uint64_t dir, const char *name, uint64_t newdir, const char *newname, unsigned flags);
/* The same in one step with a whiteout of that owner left at the old name (RENAME_WHITEOUT, which does not stand in
 * flags; RENAME_EXCHANGE must not). No reference on the whiteout is taken. */
int vol_rename_whiteout(struct volume *v, uint64_t dir, const char *name, uint64_t newdir, const char *newname,
                        unsigned flags, uint32_t uid, uint32_t gid);

/*
 * Lists entries after cookie (0: from the start; "." and ".." come first, cookies 1 and 2). Calls entry() for each until
 * it returns nonzero (entry not taken). The cookie of an entry is stable as long as the entry lives. Locks are held: the
 * callback must not call the engine, except through attr, which is the entry's inode when want_attr (no reference taken;
 * NULL otherwise).
 */
typedef int (*vol_entry_fn)(void *ctx, const char *name, uint64_t ino, uint32_t mode_type, uint64_t cookie,
                            const struct vattr *attr);
int vol_readdir(struct volume *v, uint64_t dir, uint64_t cookie, bool want_attr, vol_entry_fn entry, void *ctx);
/* Takes n references on ino, as a lookup would (readdirplus). -ENOENT when it is gone. */
int vol_reference(struct volume *v, uint64_t ino, uint64_t n);

/* --- inodes --- */

int vol_getattr(struct volume *v, uint64_t ino, struct vattr *ret_attr);

enum vol_set {
    VOL_SET_MODE = 1 << 0,
    VOL_SET_UID = 1 << 1,
    VOL_SET_GID = 1 << 2,
    VOL_SET_SIZE = 1 << 3, /* truncates or extends; also mtime and ctime */
    VOL_SET_ATIME = 1 << 4,
    VOL_SET_MTIME = 1 << 5,
    VOL_SET_CTIME = 1 << 6, /* else ctime becomes now */
};
int vol_setattr(struct volume *v, uint64_t ino, unsigned set, const struct vattr *attr, struct vattr *ret_attr);

/* Returns the length; with size 0 only that. -ERANGE when size is too small, -ENODATA. */
ssize_t vol_getxattr(struct volume *v, uint64_t ino, const char *name, void *value, size_t size);
/* flags: XATTR_CREATE, XATTR_REPLACE. -E2BIG past VOLUME_XATTR_MAX. */
int vol_setxattr(struct volume *v, uint64_t ino, const char *name, const void *value, size_t size, int flags);
/* NUL-separated names. */
ssize_t vol_listxattr(struct volume *v, uint64_t ino, char *list, size_t size);
int vol_removexattr(struct volume *v, uint64_t ino, const char *name);

/* --- data --- */

/* Returns bytes read, short only at the end of the file. */
ssize_t vol_read(struct volume *v, uint64_t ino, uint64_t off, void *buf, size_t n);
/* Writes all n bytes (at most 1 MiB) or nothing. Returns n. An aligned block is atomic through a power cut. -EFBIG. */
ssize_t vol_write(struct volume *v, uint64_t ino, uint64_t off, const void *buf, size_t n);
/* The same, but the file's times stay: who had the data cached sets them. */
ssize_t vol_write_back(struct volume *v, uint64_t ino, uint64_t off, const void *buf, size_t n);
/* mode: 0, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE|KEEP_SIZE, FALLOC_FL_ZERO_RANGE[|KEEP_SIZE]. Space is not reserved in
 * this version: allocation only checks that there is room. */
int vol_fallocate(struct volume *v, uint64_t ino, int mode, uint64_t off, uint64_t len);
/*
 * Lets blocks of `to` be those of `from`: no content moves, until one of them is written. Both offsets at blocks' beginnings, and
 * n whole blocks, unless the end is that of both files. Returns the bytes that are copied, perhaps fewer than n: what one
 * transaction holds; 0 at the end of `from`. -EOPNOTSUPP: not in this way (offsets, small files, too many references),
 * copy the bytes; -EINVAL: the same file, and the places overlap.
 */
ssize_t vol_copy(struct volume *v, uint64_t from, uint64_t from_off, uint64_t to, uint64_t to_off, uint64_t n);
/* SEEK_DATA or SEEK_HOLE. -ENXIO. */
int vol_seek(struct volume *v, uint64_t ino, uint64_t off, int whence, uint64_t *ret_off);

/* Makes all that was acknowledged of this file (and what the file's names depend on) durable. */
int vol_fsync(struct volume *v, uint64_t ino, bool datasync);
/* Everything. */
int vol_sync(struct volume *v);

#endif
