/* repair.h - the parts of volume_open that differ when it repairs (volume_repair). */
#ifndef COFFER_REPAIR_H
#define COFFER_REPAIR_H

#include "fs/volume/state.h"

struct repair;

/* After the tree is loaded, instead of the bitmaps: drops what cannot be read, and fills v->space. *ret_repair is set
 * also after an error (repair_free). */
int repair_load(struct volume *v, struct repair **ret_repair);
/* The log ends before a record that was durable; so many later ones are dropped. */
void repair_log_cut(struct repair *r, uint64_t sequence, uint64_t dropped);
/* After the replay: mends the state in memory. A checkpoint makes it durable. */
int repair_run(struct repair *r);
void repair_free(struct repair *r);

#endif
