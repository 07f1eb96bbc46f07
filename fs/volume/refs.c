/* refs.c - how many references FUSE holds on each inode (its lookup count). A hash table of its own mutex, in memory
 * only: after a restart nobody holds anything, unless a kernel goes on that nobody can ask what it holds. */
#include "fs/volume/state.h"

#include <stdlib.h>

struct ref {
    struct ref *next;
    uint64_t ino, count;
    bool more; /* of before the restart, how many is not known */
};

struct refs {
    pthread_mutex_t mutex;
    struct ref **bucket;
    size_t buckets, n; /* buckets is a power of two */
    uint64_t unknown;  /* inodes below that are not in the table may be held */
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

/* [mutex] ino's entry, made if need be. */
static struct ref *get(struct refs *r, uint64_t ino)
{
    struct ref **e = find(r, ino), *made = *e;

    if (made)
        return made;
    made = *e = xcalloc(1, sizeof(*made));
    made->ino = ino;
    made->more = ino < r->unknown;
    if (++r->n > r->buckets)
        rehash(r);
    return made;
}

void refs_unknown_below(struct refs *r, uint64_t ino)
{
    r->unknown = ino;
}

void refs_add(struct refs *r, uint64_t ino, uint64_t n)
{
    pthread_mutex_lock(&r->mutex);
    get(r, ino)->count += n;
    pthread_mutex_unlock(&r->mutex);
}

/* The kernel gives back all references of an inode at once: whoever gives back as many as are counted here keeps none. */
bool refs_drop(struct refs *r, uint64_t ino, uint64_t n)
{
    struct ref **e, *gone;
    bool last = true;

    pthread_mutex_lock(&r->mutex);
    if (ino < r->unknown) {
        struct ref *old = get(r, ino);

        last = old->count <= n;
        old->count -= MIN(n, old->count);
        old->more &= !last;
        pthread_mutex_unlock(&r->mutex);
        return last;
    }
    e = find(r, ino);
    if (*e) {
        last = (*e)->count <= n;
        (*e)->count -= MIN(n, (*e)->count);
        if (last) {
            gone = *e;
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
    const struct ref *e;
    bool held;

    pthread_mutex_lock(&r->mutex);
    e = *find(r, ino);
    held = e ? e->count || e->more : ino < r->unknown;
    pthread_mutex_unlock(&r->mutex);
    return held;
}
