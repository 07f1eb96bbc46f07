/*
 * checkpoint.h - writing the state of a volume as a new generation.
 */
#ifndef COFFER_CHECKPOINT_H
#define COFFER_CHECKPOINT_H

#include "fs/volume/state.h"

enum checkpoint_flags {
    CHECKPOINT_FORCE = 1 << 0, /* also when nothing has changed */
    CHECKPOINT_CLEAN = 1 << 1, /* the superblock says that no record follows */
};

/* Writes a checkpoint and makes it durable; called without locks. 0, or -EIO (the volume has failed). */
int checkpoint_run(struct volume *v, unsigned flags);

/* Tells the background thread that there is something to flush, or (now) to checkpoint. */
void volume_kick(struct volume *v, bool now);

#endif
