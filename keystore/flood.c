/*
 * flood.c - see flood.h. Called by authorise.c. A slot is in use until its window is over. One with a count is given up
 * only by flood_take; when all have counts, a new kind is written every time.
 */
#include "keystore/flood.h"

#include "fs/base/base.h"

#include <stdlib.h>

struct slot {
    struct flood_sum sum;
    int64_t until; /* 0: free */
};

struct flood {
    struct slot slots[FLOOD_KINDS];
};

struct flood *flood_new(void)
{
    return xcalloc(1, sizeof(struct flood));
}

void flood_free(struct flood *f)
{
    free(f);
}

static bool same(const struct flood_kind *a, const struct flood_kind *b)
{
    return !strcmp(a->volume, b->volume) && !strcmp(a->event, b->event) && !strcmp(a->subject, b->subject) &&
           !strcmp(a->reason, b->reason);
}

bool flood_pass(struct flood *f, const struct flood_kind *kind, int64_t now)
{
    struct slot *room = NULL;

    for (size_t i = 0; i < FLOOD_KINDS; i++) {
        struct slot *s = &f->slots[i];

        if (s->until > now && same(&s->sum.kind, kind)) {
            s->sum.more++;
            return false;
        }
        /* The one that ends first makes room, but never one with a count. */
        if (!s->sum.more && (!room || s->until < room->until))
            room = s;
    }
    if (room)
        *room = (struct slot){{*kind, 0}, now + FLOOD_WINDOW_NS};
    return true;
}

bool flood_take(struct flood *f, int64_t now, bool all, struct flood_sum *ret)
{
    for (size_t i = 0; i < FLOOD_KINDS; i++) {
        struct slot *s = &f->slots[i];
        bool over = s->until && (all || s->until <= now);

        if (!over)
            continue;
        *ret = s->sum;
        s->until = 0;
        s->sum.more = 0;
        if (ret->more)
            return true;
    }
    return false;
}

int64_t flood_deadline(const struct flood *f)
{
    int64_t first = INT64_MAX;

    for (size_t i = 0; i < FLOOD_KINDS; i++)
        if (f->slots[i].until && f->slots[i].sum.more)
            first = MIN(first, f->slots[i].until);
    return first;
}
