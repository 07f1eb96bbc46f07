/*
 * view.h - a generation of a volume that stands still, while the volume is used.
 *
 * Nodes and extents are never overwritten in place, so the newest durable superblock's tree stays readable for as long
 * as space that is freed after it is not given out again (space_hold). When the volume runs out of space, it takes that
 * space all the same: the view is then stale, and what does not authenticate in it says nothing about the volume.
 *
 * A volume that is read-only or failed has no such generation (what recovery applied is only in memory), but it does
 * not change either: its view is the tree in memory, under the state lock.
 *
 * A view belongs to one thread. It must be closed before its volume.
 */
#ifndef COFFER_VIEW_H
#define COFFER_VIEW_H

#include "fs/volume/snapshot.h"

struct view {
    struct volume *v;
    struct tree *tree;
    bool live;               /* the volume's own tree */
    bool quiet;              /* damaged nodes are not reported (again) */
    bool exact;              /* the SPACE items describe this very state */
    uint64_t hold;           /* of space.h */
    unsigned slot;           /* of the superblock */
    struct disk_super super; /* of the generation; of a snapshot, as far as it says it */
    uint64_t snapshot;       /* its generation, or 0: the newest */
    uint64_t generation;
    /* Where the tree is on the disk. addr 0: nowhere, since what recovery applied is in memory only; then generation
     * names no state that anybody will see again. */
    struct disk_ptr root;
    unsigned root_level;
    uint64_t reads; /* nodes that were read for it */
    uint64_t regions, used_units;
    uint64_t inodes, next_inode, next_extent;
};

/* Checkpoints first when that is possible and `fresh`. -EIO: the root cannot be read. */
int view_open(struct volume *v, bool fresh, struct view *ret_view);
/* Of a snapshot (of v's newest state), which cannot be removed until the view is closed. -ENOENT; -EMFILE: too many are open; -EIO. */
int view_open_snapshot(struct volume *v, const char *name, struct view *ret_view);
/* The same by its generation. */
int view_open_kept(struct volume *v, uint64_t generation, struct view *ret_view);
void view_close(struct view *w);
/* Its space has been given out again. */
bool view_stale(const struct view *w);

/* For a row of calls that must see one state, and as long as values are looked at (frozen views need no lock). */
void view_lock(struct view *w);
void view_unlock(struct view *w);

/* [view_lock] Calls fn for each item at or above key, in order, until it returns nonzero; returns that, 0 at the end,
 * or -EIO. The cache is kept small on the way: fn must not keep pointers. */
typedef int (*view_fn)(void *ctx, const struct tree_iter *it);
int view_walk(struct view *w, const struct tree_key *from, view_fn fn, void *ctx);
/* [view_lock] -ENOENT, -EIO. */
int view_inode(struct view *w, uint64_t ino, struct inode *ret);
int view_extent(struct view *w, uint64_t id, struct extent *ret);
/* Reads and checks the node at ptr, past the cache; damage is reported. -EIO. */
int view_read_node(struct view *w, const struct disk_ptr *ptr, unsigned level, uint8_t *page);
/* Keeps the cache small, after a row of such calls: what these gave is not good any more. */
void view_trim(struct view *w);

/* Both copies of the view's superblock open, and say its generation? Reports to line() what does not; the number of it.
 */
int view_check_super(struct view *w, void (*line)(void *ctx, const char *text), void *ctx);

#endif
