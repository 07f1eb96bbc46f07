/*
 * space.h - which units of `data` are used.
 *
 * Bits of a unit: used (the committed state, what SPACE items will hold) and busy (handed out by space_alloc but not
 * yet committed, or freed but not yet free in a durable checkpoint). A unit is given out only when all are 0. So the
 * used bits are at every instant exactly what the tree and the logged records reference.
 *
 *            space_alloc        space_commit       space_release        space_thaw
 *   free ---------------> busy -------------> used -------------> busy -------------> free
 *                          |  space_cancel                         (checkpoint durable)
 *                          `-------------> free
 *
 * A third bit says that a snapshot holds the unit: whatever the other two are, it is not given out. Such units count
 * against the limit also when the volume itself does not use them any more.
 *
 * Own mutex; all functions may be called from any thread.
 */
#ifndef COFFER_SPACE_H
#define COFFER_SPACE_H

#include "fs/volume/state.h"

/* Space of a volume of `regions` regions with no unit used; limit_units bounds what is used, reserve_units of it are
 * kept for checkpoints, deletes and truncates. */
struct space *space_new(struct store *data, uint64_t regions, uint64_t limit_units, uint64_t reserve_units);
void space_free(struct space *s);

/* Changes the limit and the reserve. -ENOSPC: more than that is used. */
int space_set_limit(struct space *s, uint64_t limit_units, uint64_t reserve_units);

/* Takes over a SPACE item when a volume is opened. */
void space_load_region(struct space *s, uint64_t region, const uint8_t bitmap[REGION_UNITS / 8]);

/* After the last space_load_region and the replay of the log: free chunks may have been punched in an earlier life, so
 * they are allocated again before use, as many as the reserve needs at once. */
void space_ready(struct space *s);

/*
 * Finds a run of `most` units, or else one of `want`, or else the longest shorter one that is a multiple of `step`, and makes it
 * busy. Grows `data` where it must for `want`. Returns the units got, -ENOSPC (limit, backing filesystem, or only the reserve is left), -EIO.
 * from_reserve: half of the reserve may be used (truncates and holes, which need a block to free more).
 */
int64_t space_alloc(struct space *s, uint64_t most, uint64_t want, uint64_t step, bool from_reserve,
                    uint64_t *ret_addr);
void space_cancel(struct space *s, uint64_t addr, uint64_t units);
/* busy -> used; in recovery also free -> used. -EUCLEAN when it is used already or out of bounds. */
int space_commit(struct space *s, uint64_t addr, uint64_t units);
/* used -> busy until space_thaw. -EUCLEAN when it is not used. */
int space_release(struct space *s, uint64_t addr, uint64_t units);
/* Checkpoint only, from the reserve too: units for a node, used at once; from regions that are dirty already if
 * possible. */
int space_alloc_node(struct space *s, uint64_t *ret_addr);

/* Is there room for an operation that adds `units`, with dirty_nodes still to be placed, besides the reserve? Nodes
 * need whole groups (space.c). */
bool space_room(struct space *s, uint64_t units, uint64_t dirty_nodes);
/* The same for operations that free something. Without snapshots there always is: each checkpoint gives back what it took
 * from the reserve. With them it may not, and half the reserve stays for the checkpoint that removes one. */
bool space_room_to_change(struct space *s, uint64_t dirty_nodes);
/* Regions whose bitmap the next checkpoint writes. */
uint64_t space_dirty_regions(struct space *s);
/* Would a checkpoint, or the end of the one under way, make units free? */
bool space_has_pending(struct space *s);
bool space_is_used(struct space *s, uint64_t unit);
uint64_t space_used(struct space *s);
uint64_t space_regions(struct space *s);
void space_stat(struct space *s, uint64_t *ret_used, uint64_t *ret_limit, uint64_t *ret_reserve);

/* --- checkpoint --- */

/* The next region whose bits changed since its item was last taken (space_region_bitmap), at or above from; -1: none.
 */
int64_t space_next_dirty(struct space *s, uint64_t from);
/* Copies a region's used bits and makes it clean. */
void space_take_bitmap(struct space *s, uint64_t region, uint8_t bitmap[REGION_UNITS / 8]);
/* Units released until now become free at the next space_thaw. */
void space_freeze(struct space *s);
/* The checkpoint is durable. While something holds the space, and enough is left, what was freed is kept back. */
void space_thaw(struct space *s);

/* --- holding a generation (view.h) --- */

/* [between checkpoints] From now on nothing that the newest superblock refers to becomes free, until space_unhold of
 * every hold, or until the volume needs the space: then space_held is false for all holds of that time. */
uint64_t space_hold(struct space *s);
bool space_held(struct space *s, uint64_t hold);
void space_unhold(struct space *s, uint64_t hold);

/* --- snapshots (snapshot.c) --- */

/* The units of a region's bitmap are held from now on. bitmap: like a SPACE item's. */
void space_keep(struct space *s, uint64_t region, const uint8_t *bitmap);
/* Only those of the bitmap stay held; what becomes free of it does so after the next checkpoint. */
void space_keep_only(struct space *s, uint64_t region, const uint8_t *bitmap);

#endif
