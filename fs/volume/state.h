/*
 * state.h - a mounted volume's state in memory, shared by the engine's own files only.
 *
 * Locks, in the order in which they may be taken:
 *   inode stripe (inode_lock)  one file's content against concurrent readers and writers of it; data operations only
 *   state lock (v->state)      the tree and everything marked [state]: shared to read, exclusive to change
 *   v->space.mutex             the bitmaps [space]
 *   v->log.mutex               sequences and flushes [log]
 *   v->sync_mutex              one sync of `data` at a time; below it only the log's mutex
 * Checkpoints are serialised by v->checkpoint_mutex, taken before the state lock.
 * Ciphering and I/O of data happen without the state lock; log records are sealed and written after it is dropped.
 *
 * Once v->failed is set (a failed write or flush, or a change that could not be applied whole), nothing is written any more
 * until the volume is reopened through recovery.
 */
#ifndef COFFER_STATE_H
#define COFFER_STATE_H

#include "coffer/volume.h"
#include "fs/volume/tree.h"
#include "fs/volume/vcrypt.h"

#include <pthread.h>
#include <stdatomic.h>

#define INODE_STRIPES  256
#define SYNC_PATTERNS  256
#define SNAPSHOT_VIEWS 16

#define IO_BUFFER_BYTES ((1u << 20) + (32u << 10)) /* 1 MiB that is not aligned has a part of a block at either end */
#define IO_BUFFERS      8

struct space; /* space.h */
struct log;   /* log.h */
struct refs;  /* refs.h */

struct volume {
    struct store *data, *logstore;
    struct vkeys *keys;
    struct volume_options options;
    struct disk_super super;     /* the newest durable one [checkpoint_mutex] */
    struct volume_params params; /* of it; size_limit changes with volume_resize [state] */
    unsigned super_slot;         /* where it lies [checkpoint_mutex] */
    uint32_t block;              /* bytes of a block */
    uint32_t block_units;

    pthread_rwlock_t state;
    struct tree *tree;   /* [state] */
    uint64_t generation; /* [state] of the log segment in use */
    size_t dirty_max;    /* dirty nodes that force a checkpoint */
    uint64_t next_inode; /* [state] */
    _Atomic uint64_t next_extent;
    uint64_t inodes;     /* [state] */
    struct refs *refs;   /* own mutex, below the state lock */
    uint64_t *answered;  /* [state] requests of this mount whose records recovery found (options.resumed) */
    size_t nanswered;    /* [state] */
    int64_t answered_ns; /* mono_ns of that */

    struct space *space;
    struct log *log;
    pthread_rwlock_t stripes[INODE_STRIPES];
    pthread_mutex_t checkpoint_mutex;
    pthread_mutex_t snapshot_mutex;   /* taken before the others: making and removing snapshots */
    uint64_t reading[SNAPSHOT_VIEWS]; /* [snapshot_mutex] the snapshots of views that are open; 0: none */
    pthread_mutex_t sync_mutex;

    /* Memory for ciphertext on its way, kept since new memory is slow; freed when the volume is idle. */
    pthread_mutex_t io_mutex;
    uint8_t *io_buffer[IO_BUFFERS]; /* [io_mutex] */
    unsigned io_buffers;            /* [io_mutex] */

    /* How files are written and synced, of those whose sync was seen last (file.c). */
    pthread_mutex_t pattern_mutex;
    struct sync_pattern {
        uint64_t ino;
        uint32_t before, since; /* writes between the last two syncs, and since the last */
    } pattern[SYNC_PATTERNS];   /* [pattern_mutex] */

    _Atomic bool failed;
    bool read_only;
    struct repair *repair; /* while volume_repair opens it (repair.h) */
    bool space_lost;       /* the bitmaps could not be read: read-only, and recovery changes none */

    pthread_t thread; /* background: checkpoints and the 5 s flush */
    bool thread_running;
    pthread_mutex_t thread_mutex;
    pthread_cond_t thread_cond;
    bool thread_stop, thread_pending, thread_kick; /* [thread_mutex] */
};

/* 0 when it takes changes; -EIO in its error state; -EROFS. */
static inline int volume_changes(const struct volume *v)
{
    return v->failed ? -EIO : v->read_only ? -EROFS : 0;
}

/* Puts the volume into its error state and reports it once. Returns -EIO. */
int volume_fail(struct volume *v, const char *what, int err);
/*
 * Syncs `data`; a failure fails the volume before any other sync can begin. The kernel tells a failed writeback to one
 * fdatasync of a descriptor only: a checkpoint and an fsync that synced side by side could lose the error to each other,
 * and the one that got 0 would go on to a superblock. 0 or -EIO.
 */
int volume_sync_data(struct volume *v);
/* Reads and opens the node at ptr. -EBADMSG or the store's error; reports nothing. */
int volume_read_node(struct volume *v, const struct disk_ptr *ptr, unsigned level, uint8_t *page);
/* Dirty nodes that force a checkpoint, and units kept for checkpoints, by the limit. */
size_t volume_dirty_max(uint64_t limit_units);
uint64_t volume_reserve(uint64_t limit_units);
/* One line to on_damage. */
void volume_damage(struct volume *v, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

static inline pthread_rwlock_t *inode_lock(struct volume *v, uint64_t ino)
{
    return &v->stripes[(ino * 0x9e3779b97f4a7c15ull) >> 56];
}

/* IO_BUFFER_BYTES, aligned to UNIT_BYTES, with EXTENT_SLACK_* around; put takes it back (NULL: nothing). */
uint8_t *io_buffer_get(struct volume *v);
void io_buffer_put(struct volume *v, uint8_t *buffer);

/* Drops clean nodes past the cache's size, if there are any. Called without locks after reads. */
void volume_trim(struct volume *v);

/* --- inodes as items (inode.c) --- */

struct inode {
    uint64_t ino;
    uint32_t mode, uid, gid, nlink, rdev, flags;
    uint64_t size, blocks; /* blocks of the volume's block size */
    int64_t atime, mtime, ctime, btime;
    uint64_t parent, generation, entries;
    uint32_t xattrs;
};

void inode_encode(const struct inode *i, struct disk_inode *ret);
/* Checks every field. -EUCLEAN. */
int inode_decode(uint64_t ino, const uint8_t *value, size_t len, struct inode *ret);
void inode_attr(const struct volume *v, const struct inode *i, struct vattr *ret);
/* [state shared] -ENOENT, -EIO. */
int inode_get(struct volume *v, uint64_t ino, struct inode *ret);

/* --- references: FUSE's lookup counts (refs.c) --- */

struct refs *refs_new(void);
void refs_free(struct refs *r);
void refs_add(struct refs *r, uint64_t ino, uint64_t n);
/* Drops n; true when none is left. */
bool refs_drop(struct refs *r, uint64_t ino, uint64_t n);
bool refs_held(struct refs *r, uint64_t ino);
/* Inodes below may be held without a trace here, until refs_drop gives back all that is known. */
void refs_unknown_below(struct refs *r, uint64_t ino);

/* --- data (file.c) --- */

/* Frees all content of an inode that has no name and no reference, then the inode itself. Called without locks. */
int file_destroy(struct volume *v, uint64_t ino);
/* Sets the size, mtime and ctime of a regular file. Called without locks. -EFBIG, -EISDIR, -EINVAL, -ENOSPC. */
int file_set_size(struct volume *v, uint64_t ino, uint64_t size);
/* Frees blocks lo .. hi - 1 of a file; its size and times stay. Called without locks. */
int file_free_blocks(struct volume *v, uint64_t ino, uint64_t lo, uint64_t hi);
/* Finishes what a TRIM item says. Called without locks, or during recovery. */
int file_finish_trim(struct volume *v, uint64_t ino);
/* A sync of the file was asked for. */
void file_note_sync(struct volume *v, uint64_t ino);

#endif
