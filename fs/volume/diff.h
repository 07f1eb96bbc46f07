/*
 * diff.h - what differs between two generations of a volume: a walk through both trees side by side, in key order.
 *
 * A node that both trees have is skipped with all below it, unread: what this costs follows what was changed, not the
 * volume's size. Memory: one page a level and side.
 */
#ifndef COFFER_DIFF_H
#define COFFER_DIFF_H

#include "fs/volume/view.h"

struct view_diff;

/* An item that only one of them has (the other value is NULL), or with another value. Good until the next call. */
struct view_change {
    struct tree_key key;
    const uint8_t *old, *new;
    size_t old_len, new_len;
};

/* Changes with keys from `from` to below `to` (NULL: to the end). Both views stay open until the close; needs no
 * view_lock. -ENOTSUP: a view has no root on the disk (view.h). */
int view_diff_open(struct view *old, struct view *new, const struct tree_key *from, const struct tree_key *to,
                   struct view_diff **ret_diff);
/* 1 and a change, 0 at the end, -EIO. */
int view_diff_next(struct view_diff *d, struct view_change *ret);
void view_diff_close(struct view_diff *d);

/* All changes, until visit returns nonzero: returns that, 0 at the end, or an error as above. */
typedef int (*view_diff_fn)(void *ctx, const struct view_change *c);
int view_diff(struct view *old, struct view *new, view_diff_fn visit, void *ctx);

#endif
