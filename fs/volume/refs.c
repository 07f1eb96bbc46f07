/* refs.c - how many references FUSE holds on each inode (its lookup count). A hash table of its own mutex, in memory
 * only: after a restart nobody holds anything. */
#include "fs/volume/state.h"

#include <stdlib.h>

struct ref {
    struct ref *next;
    uint64_t ino, count;
};

struct refs {
    pthread_mutex_t mutex;
    struct ref **bucket;
    size_t buckets, n; /* buckets is a power of two */
};

struct refs *refs_new(void)
{
    struct refs *r = xcalloc(1, sizeof(*r));

    pthread_mutex_init(&r->mutex, NULL);
    r->buckets = 256;
    r->bucket = xcalloc(r->buckets, sizeof(*r->bucket));
    return r;
}

void refs_free(struct refs *r)
{
    if (!r)
        return;
    for (size_t i = 0; i < r->buckets; i++) {
        for (struct ref *e = r->bucket[i], *next; e; e = next) {
            next = e->next;
            free(e);
        }
    }
    free(r->bucket);
    pthread_mutex_destroy(&r->mutex);
    free(r);
}

static size_t slot_of(uint64_t ino, size_t buckets)
{
    return (ino * 0x9e3779b97f4a7c15ull >> 20) & (buckets - 1);
}

/* The place that points to ino's entry, or to NULL. */
static struct ref **find(struct refs *r, uint64_t ino)
{
    struct ref **e = &r->bucket[slot_of(ino, r->buckets)];

    while (*e && (*e)->ino != ino)
        e = &(*e)->next;
    return e;
}

static void rehash(struct refs *r)
{
    size_t buckets = r->buckets * 2;
    struct ref **bucket = xcalloc(buckets, sizeof(*bucket));

    for (size_t i = 0; i < r->buckets; i++) {
        for (struct ref *e = r->bucket[i], *next; e; e = next) {
            struct ref **to = &bucket[slot_of(e->ino, buckets)];

            next = e->next;
            e->next = *to;
            *to = e;
        }
    }
    free(r->bucket);
    r->bucket = bucket;
    r->buckets = buckets;
}

void refs_add(struct refs *r, uint64_t ino, uint64_t n)
{
    struct ref **e;

    pthread_mutex_lock(&r->mutex);
    e = find(r, ino);
    if (!*e) {
        struct ref *made = xcalloc(1, sizeof(*made));

        made->ino = ino;
        *e = made;
        r->n++;
    }
    (*e)->count += n;
    if (r->n > r->buckets)
        rehash(r);
    pthread_mutex_unlock(&r->mutex);
}

bool refs_drop(struct refs *r, uint64_t ino, uint64_t n)
{
    struct ref **e;
    bool last = true;

    pthread_mutex_lock(&r->mutex);
    e = find(r, ino);
    if (*e) {
        last = (*e)->count <= n;
        (*e)->count -= MIN(n, (*e)->count);
        if (last) {
            struct ref *gone = *e;

            *e = gone->next;
            free(gone);
            r->n--;
        }
    }
    pthread_mutex_unlock(&r->mutex);
    return last;
}

bool refs_held(struct refs *r, uint64_t ino)
{
    bool held;

    pthread_mutex_lock(&r->mutex);
    held = *find(r, ino) != NULL;
    pthread_mutex_unlock(&r->mutex);
    return held;
}
