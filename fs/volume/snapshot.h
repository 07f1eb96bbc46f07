/*
 * snapshot.h - snapshots inside the engine (volume.h has what others see).
 *
 * A snapshot is a SNAPSHOT item that names the tree of an older generation. Nodes and extents are never overwritten, so
 * all that it takes is that no unit which this tree uses is given out again. Which ones these are its own SPACE items say:
 * space.c holds the union of all snapshots' bitmaps, made when the volume is opened.
 */
#ifndef COFFER_SNAPSHOT_H
#define COFFER_SNAPSHOT_H

#include "fs/volume/state.h"

struct snapshot {
    uint64_t generation;
    int64_t created;
    struct disk_ptr root;
    unsigned root_level;
    uint64_t data_units, used_units, next_inode, next_extent, inodes;
    char name[SNAPSHOT_NAME_MAX + 1];
};

/* The first snapshot of a generation at or above `from`, in a tree (its lock held). -ENOENT, -EIO. */
int snapshot_next(struct tree *t, uint64_t from, struct snapshot *ret);
/* The last one below `below`. */
int snapshot_before(struct tree *t, uint64_t below, struct snapshot *ret);
/* The one of that name. -ENOENT, -EIO. */
int snapshot_find(struct tree *t, const char *name, struct snapshot *ret);

/* Fills in what the snapshot says of a superblock's fields. */
void snapshot_super(const struct snapshot *s, struct disk_super *super);

/* When a volume is opened, after the log's replay: holds what the snapshots need, of a damaged one what can be read of it.
 * Where the disk does not even answer, the volume becomes read-only. */
int snapshots_hold(struct volume *v);

#endif
