/*
 * recovery.h - from two files to a volume in memory (FORMAT.md, "Recovery").
 */
#ifndef COFFER_RECOVERY_H
#define COFFER_RECOVERY_H

#include "fs/volume/state.h"

/* Finds the newest superblock and fills in v->super and v->super_slot. -EKEYREJECTED, -ENOTSUP, -EIO,
 * -ESTALE. */
int recovery_super(struct volume *v);
/* Replays the log onto the loaded state; afterwards v->log exists and v->generation is such that the next checkpoint is
 * newer than any record. -EIO when a durable record is damaged. */
int recovery_replay(struct volume *v);
/* Destroys what has no name and finishes what was being freed. Errors leave that for the next time. */
void recovery_orphans(struct volume *v);

#endif
