/*
 * store.h - the byte store: all I/O of the volume engine goes through this table of functions, so that a test can
 * cut the power below the engine (tests/crash).
 *
 * A store is one file of bytes. Calls may come from several threads at once; overlapping concurrent writes do not occur.
 * Every function returns 0 or a negative errno; EINTR and short transfers are handled inside.
 */
#ifndef COFFER_STORE_H
#define COFFER_STORE_H

#include <stdint.h>
#include <sys/uio.h>

struct store;

struct store_ops {
    /* Fills all iovecs from off. -EIO where the file is too short. The iovecs may be changed. */
    int (*readv)(struct store *s, struct iovec *iov, int niov, uint64_t off);
    /* Writes all iovecs at off. Durable only after sync. The iovecs may be changed. */
    int (*writev)(struct store *s, struct iovec *iov, int niov, uint64_t off);
    /* Makes all completed writes, and the file's size, durable (fdatasync(2)). After an error nothing may be assumed of
     * any write since the last good sync. */
    int (*sync)(struct store *s);
    /* Starts writing back a range without waiting (sync_file_range(2)); a hint, no promise. */
    void (*writeback)(struct store *s, uint64_t off, uint64_t len);
    /* Gives the range back to the backing filesystem; it reads as zeroes after. -EOPNOTSUPP is harmless. */
    int (*punch)(struct store *s, uint64_t off, uint64_t len);
    /* Allocates blocks for a range inside the file (fallocate(2)), whose bytes stay. NULL: nothing is ever punched. -ENOSPC. */
    int (*allocate)(struct store *s, uint64_t off, uint64_t len);
    /* Extends the file to size bytes with its blocks allocated (fallocate(2), or zeroes written). -ENOSPC leaves it as it
     * was. */
    int (*grow)(struct store *s, uint64_t size);
    /* The file's size in bytes, or -errno. */
    int64_t (*size)(struct store *s);
    /* Makes the next read of the range come from the disk where nothing newer waits to be written: after a failed sync the
     * page cache may hold what the disk never will (posix_fadvise(2)). A hint; NULL: nothing to do. */
    void (*drop)(struct store *s, uint64_t off, uint64_t len);
    /* Frees s; a store of a descriptor closes it. */
    void (*close)(struct store *s);
};

struct store {
    const struct store_ops *ops;
};

/*
 * A store on an open read-write (or read-only) regular file, which it takes. Never NULL. All goes through the page cache: past
 * it (O_DIRECT) each of our threads waits for its own piece, where the kernel keeps many more under way at once.
 */
struct store *store_fd_take(int fd);

/*
 * What a thread wants done before it waits for the disk in a readv of such a store: called once, then forgotten. With it
 * what the page cache has is read first, without waiting; for what it has not, the kernel has begun to read by then.
 */
extern _Thread_local void (*store_before_wait)(void);

#endif
