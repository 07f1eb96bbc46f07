/* table.h - entries in order of a number, which each begins with (uint64_t): how volume_check and repair keep count. */
#ifndef COFFER_TABLE_H
#define COFFER_TABLE_H

#include "fs/base/base.h"

#include <stdlib.h>

struct table {
    uint8_t *at;
    size_t n, cap, size; /* size: bytes of an entry */
};

/* A zeroed entry at the end; the caller gives it a number above that of the one before. Entries move. */
static inline void *table_add(struct table *t)
{
    if (t->n == t->cap) {
        t->cap = t->cap ? t->cap * 2 : 256;
        t->at = xrealloc(t->at, t->cap * t->size);
    }
    memset(t->at + t->n * t->size, 0, t->size);
    return t->at + t->n++ * t->size;
}

static inline void *table_find(const struct table *t, uint64_t number)
{
    size_t lo = 0, hi = t->n;

    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        uint64_t have;

        memcpy(&have, t->at + mid * t->size, sizeof(have));
        if (have == number)
            return t->at + mid * t->size;
        if (have < number)
            lo = mid + 1;
        else
            hi = mid;
    }
    return NULL;
}

static inline void table_free(struct table *t)
{
    free(t->at);
    t->at = NULL;
    t->n = t->cap = 0;
}

#endif
