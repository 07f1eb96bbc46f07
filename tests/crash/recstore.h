/*
 * recstore.h - byte stores in memory for tests below the engine: images that share pages with a parent, a recorder of
 * every write, grow, punch and sync of both files in one sequence, faults, and the states that a power cut may leave.
 *
 * What a power cut at event `cut` leaves of one store (struct crash):
 *   - all events before the last good sync of that store, whole
 *   - of the events after it any subset, each whole or torn: any of its 512-byte sectors
 *   - a file's growth likewise; what lies past the file's end then is lost with it
 *   - what was pending when a sync failed, and a write that failed, may be lost for ever, whatever is synced later
 */
#ifndef TESTS_RECSTORE_H
#define TESTS_RECSTORE_H

#include "coffer/format.h"
#include "coffer/store.h"
#include "fs/base/base.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define UNUSED __attribute__((unused))

/* --- random numbers and hashes --- */

struct rng {
    uint64_t s;
};

static inline uint64_t rng_u64(struct rng *r)
{
    uint64_t z = (r->s += 0x9e3779b97f4a7c15ull);

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

/* 0 .. n - 1 */
static inline uint64_t rng_below(struct rng *r, uint64_t n)
{
    return n == 0 ? 0 : rng_u64(r) % n;
}

static inline bool rng_chance(struct rng *r, unsigned one_in)
{
    return rng_u64(r) % one_in == 0;
}

UNUSED static void rng_fill(struct rng *r, uint8_t *p, size_t n)
{
    uint64_t x;

    for (; n >= 8; n -= 8, p += 8) {
        x = rng_u64(r);
        memcpy(p, &x, 8);
    }
    x = rng_u64(r);
    memcpy(p, &x, n);
}

static inline uint64_t hash_mix(uint64_t a, uint64_t b)
{
    __uint128_t m = (__uint128_t)(a ^ 0xa0761d6478bd642full) * (b ^ 0xe7037ed1a0b428dbull);

    return (uint64_t)m ^ (uint64_t)(m >> 64);
}

UNUSED static uint64_t hash_bytes(const void *buf, size_t n, uint64_t seed)
{
    const uint8_t *p = buf;
    uint64_t h = hash_mix(seed, n), a, b;

    for (; n >= 16; n -= 16, p += 16) {
        memcpy(&a, p, 8);
        memcpy(&b, p + 8, 8);
        h = hash_mix(a ^ h, b ^ 0x8ebc6af09c88c6e3ull);
    }
    a = b = 0;
    memcpy(&a, p, MIN(n, 8));
    if (n > 8)
        memcpy(&b, p + 8, n - 8);
    return hash_mix(h ^ a, b ^ 0x589965cc75374cc3ull);
}

/* --- images: a file's bytes as 4 KiB pages, over those of an unchanging parent --- */

#define IMAGE_PAGE  4096u
#define IMAGE_PAGES (256u << 10) /* 1 GiB at most */
#define IMAGE_ROW   1024u        /* pages of which the table is made at once */

static const uint8_t image_zero[IMAGE_PAGE];

struct image {
    const struct image *parent;
    uint8_t **row[IMAGE_PAGES / IMAGE_ROW]; /* pages; NULL: the parent's, or zeroes */
    uint32_t *own;                          /* numbers of the pages that are not NULL */
    size_t owns, own_cap;
    uint64_t size;
    pthread_rwlock_t lock;
};

UNUSED static struct image *image_new(const struct image *parent)
{
    struct image *m = xcalloc(1, sizeof(*m));

    m->parent = parent;
    m->size = parent ? parent->size : 0;
    pthread_rwlock_init(&m->lock, NULL);
    return m;
}

/* The image's own page, or NULL. */
static uint8_t *image_own(const struct image *m, uint64_t no)
{
    uint8_t **row = m->row[no / IMAGE_ROW];

    return row ? row[no % IMAGE_ROW] : NULL;
}

UNUSED static void image_free(struct image *m)
{
    if (!m)
        return;
    for (size_t i = 0; i < m->owns; i++)
        if (image_own(m, m->own[i]) != image_zero)
            free(image_own(m, m->own[i]));
    for (size_t i = 0; i < IMAGE_PAGES / IMAGE_ROW; i++)
        free(m->row[i]);
    pthread_rwlock_destroy(&m->lock);
    free(m->own);
    free(m);
}

static const uint8_t *image_page(const struct image *m, uint64_t no)
{
    for (; m; m = m->parent)
        if (image_own(m, no))
            return image_own(m, no);
    return image_zero;
}

static void image_set(struct image *m, uint64_t no, uint8_t *page)
{
    uint8_t *old = image_own(m, no), ***row = &m->row[no / IMAGE_ROW];

    if (!*row)
        *row = xcalloc(IMAGE_ROW, sizeof(**row));
    if (!old) {
        if (m->owns == m->own_cap) {
            m->own_cap = m->own_cap ? 2 * m->own_cap : 64;
            m->own = xrealloc(m->own, m->own_cap * sizeof(*m->own));
        }
        m->own[m->owns++] = (uint32_t)no;
    } else if (old != image_zero) {
        free(old);
    }
    (*row)[no % IMAGE_ROW] = page;
}

/* Bytes past the end read as zeroes. */
UNUSED static void image_read(const struct image *m, uint64_t off, void *buf, size_t n)
{
    uint8_t *out = buf;

    while (n > 0) {
        size_t in = off % IMAGE_PAGE, k = MIN(n, IMAGE_PAGE - in);

        memcpy(out, image_page(m, off / IMAGE_PAGE) + in, k);
        out += k;
        off += k;
        n -= k;
    }
}

/* Extends the size where needed. False past what an image can hold. buf NULL: zeroes. */
UNUSED static bool image_write(struct image *m, uint64_t off, const void *buf, size_t n)
{
    const uint8_t *p = buf;

    if (off + n > (uint64_t)IMAGE_PAGES * IMAGE_PAGE)
        return false;
    if (off + n > m->size)
        m->size = off + n;
    while (n > 0) {
        uint64_t no = off / IMAGE_PAGE;
        size_t in = off % IMAGE_PAGE, k = MIN(n, IMAGE_PAGE - in);

        if (!p && k == IMAGE_PAGE) {
            image_set(m, no, (uint8_t *)image_zero);
        } else {
            if (!image_own(m, no) || image_own(m, no) == image_zero) {
                uint8_t *fresh = xmalloc(IMAGE_PAGE);

                memcpy(fresh, image_page(m, no), IMAGE_PAGE);
                image_set(m, no, fresh);
            }
            if (p)
                memcpy(image_own(m, no) + in, p, k);
            else
                memset(image_own(m, no) + in, 0, k);
        }
        if (p)
            p += k;
        off += k;
        n -= k;
    }
    return true;
}

UNUSED static void image_truncate(struct image *m, uint64_t size)
{
    uint64_t old = m->size;

    if (size < old)
        image_write(m, size, NULL, old - size);
    m->size = size;
}

/* Puts the pages that from has of its own, and its size, into m, an image of the same parent. */
UNUSED static void image_add(struct image *m, const struct image *from)
{
    for (size_t i = 0; i < from->owns; i++) {
        const uint8_t *p = image_own(from, from->own[i]);

        image_write(m, (uint64_t)from->own[i] * IMAGE_PAGE, p == image_zero ? NULL : p, IMAGE_PAGE);
    }
    m->size = from->size;
}

/* A flat copy with all pages of its parents. */
UNUSED static struct image *image_copy(const struct image *m)
{
    struct image *c = image_new(NULL);

    for (uint64_t no = 0; no < (m->size + IMAGE_PAGE - 1) / IMAGE_PAGE; no++) {
        const uint8_t *p = image_page(m, no);

        if (p != image_zero)
            image_write(c, no * IMAGE_PAGE, p, IMAGE_PAGE);
    }
    c->size = m->size;
    return c;
}

/* --- recorder and faults --- */

enum event_kind { EVENT_WRITE, EVENT_PUNCH, EVENT_GROW, EVENT_SYNC };

struct event {
    uint8_t kind;
    uint8_t store; /* 0 data, 1 log */
    bool lossy;    /* failed, or pending at a failed sync: no later sync makes it durable */
    bool failed;   /* a sync that failed */
    size_t upto;   /* of a sync: it made events below this durable */
    uint64_t off, len;
    uint8_t *bytes; /* of a write */
};

struct recorder {
    pthread_mutex_t mutex;
    unsigned sync_us; /* how long a sync takes, so that other threads come between */
    struct event *ev;
    size_t n, cap;
};

enum fault_kind { FAULT_NONE, FAULT_WRITE, FAULT_SYNC, FAULT_GROW, FAULT_READ };

/* Fails the countdown-th call of its kind (both stores are counted together) with err; sticky: and all later ones. */
struct faults {
    enum fault_kind kind;
    int err;
    bool sticky;
    _Atomic int64_t countdown;
    _Atomic uint64_t hits;
};

struct mstore {
    struct store s;
    struct image *image;
    const struct image *disk; /* what drop() makes visible: the image is only the page cache of it; or NULL */
    struct recorder *rec;
    struct faults *faults;
    uint8_t id;
};

static bool faults_hit(struct faults *f, enum fault_kind kind)
{
    int64_t left;

    if (!f || f->kind != kind)
        return false;
    left = --f->countdown;
    if (left == 0 || (left < 0 && f->sticky)) {
        f->hits++;
        return true;
    }
    return false;
}

/* Events so far. */
UNUSED static size_t recorder_count(struct recorder *r)
{
    size_t n;

    pthread_mutex_lock(&r->mutex);
    n = r->n;
    pthread_mutex_unlock(&r->mutex);
    return n;
}

/* Takes bytes. A failed sync makes what is pending lossy. */
static void recorder_add(struct recorder *r, struct event ev)
{
    if (!r) {
        free(ev.bytes);
        return;
    }
    pthread_mutex_lock(&r->mutex);
    if (r->n == r->cap) {
        r->cap = r->cap ? 2 * r->cap : 1024;
        r->ev = xrealloc(r->ev, r->cap * sizeof(*r->ev));
    }
    if (ev.kind == EVENT_SYNC && ev.failed)
        for (size_t i = r->n; i-- > 0;) {
            if (r->ev[i].store != ev.store)
                continue;
            if (r->ev[i].kind == EVENT_SYNC && !r->ev[i].failed)
                break;
            r->ev[i].lossy = true;
        }
    r->ev[r->n++] = ev;
    pthread_mutex_unlock(&r->mutex);
}

UNUSED static void recorder_reset(struct recorder *r)
{
    for (size_t i = 0; i < r->n; i++)
        free(r->ev[i].bytes);
    r->n = 0;
}

static int mstore_readv(struct store *s, struct iovec *iov, int niov, uint64_t off)
{
    struct mstore *ms = (struct mstore *)s;
    int rc = 0;

    if (faults_hit(ms->faults, FAULT_READ))
        return -ms->faults->err;
    pthread_rwlock_rdlock(&ms->image->lock);
    for (int i = 0; i < niov && rc == 0; i++) {
        if (off > ms->image->size || iov[i].iov_len > ms->image->size - off)
            rc = -EIO;
        else
            image_read(ms->image, off, iov[i].iov_base, iov[i].iov_len);
        off += iov[i].iov_len;
    }
    pthread_rwlock_unlock(&ms->image->lock);
    return rc;
}

static int mstore_writev(struct store *s, struct iovec *iov, int niov, uint64_t off)
{
    struct mstore *ms = (struct mstore *)s;
    bool fail = faults_hit(ms->faults, FAULT_WRITE), ok = true;
    size_t n = 0, at = 0;
    uint8_t *bytes = NULL;

    for (int i = 0; i < niov; i++)
        n += iov[i].iov_len;
    bytes = xmalloc(n ? n : 1);
    for (int i = 0; i < niov; i++) {
        memcpy(bytes + at, iov[i].iov_base, iov[i].iov_len);
        at += iov[i].iov_len;
    }
    pthread_rwlock_wrlock(&ms->image->lock);
    /* A failed write may have reached the page cache in part. */
    ok = image_write(ms->image, off, bytes, fail ? n / 2 / SECTOR_BYTES * SECTOR_BYTES : n);
    recorder_add(
        ms->rec,
        (struct event){.kind = EVENT_WRITE, .store = ms->id, .lossy = fail, .off = off, .len = n, .bytes = bytes});
    pthread_rwlock_unlock(&ms->image->lock);
    return fail ? -ms->faults->err : ok ? 0 : -ENOSPC;
}

static int mstore_sync(struct store *s)
{
    struct mstore *ms = (struct mstore *)s;
    bool fail = faults_hit(ms->faults, FAULT_SYNC);
    struct event ev = {.kind = EVENT_SYNC, .store = ms->id, .failed = fail, .upto = SIZE_MAX};

    if (ms->rec && ms->rec->sync_us) {
        /* What is written while it is under way is not in it. */
        ev.upto = recorder_count(ms->rec);
        usleep(ms->rec->sync_us);
    }
    recorder_add(ms->rec, ev);
    return fail ? -ms->faults->err : 0;
}

static void mstore_writeback(struct store *s, uint64_t off, uint64_t len)
{
    (void)s, (void)off, (void)len;
}

static int mstore_punch(struct store *s, uint64_t off, uint64_t len)
{
    struct mstore *ms = (struct mstore *)s;

    pthread_rwlock_wrlock(&ms->image->lock);
    if (off < ms->image->size)
        image_write(ms->image, off, NULL, MIN(len, ms->image->size - off));
    recorder_add(ms->rec, (struct event){.kind = EVENT_PUNCH, .store = ms->id, .off = off, .len = len});
    pthread_rwlock_unlock(&ms->image->lock);
    return 0;
}

static int mstore_allocate(struct store *s, uint64_t off, uint64_t len)
{
    struct mstore *ms = (struct mstore *)s;

    if (faults_hit(ms->faults, FAULT_GROW))
        return -ms->faults->err;
    return off + len <= ms->image->size ? 0 : -EINVAL;
}

static int mstore_grow(struct store *s, uint64_t size)
{
    struct mstore *ms = (struct mstore *)s;

    if (faults_hit(ms->faults, FAULT_GROW))
        return -ms->faults->err;
    if (size > (uint64_t)IMAGE_PAGES * IMAGE_PAGE)
        return -ENOSPC;
    pthread_rwlock_wrlock(&ms->image->lock);
    ms->image->size = MAX(ms->image->size, size);
    recorder_add(ms->rec, (struct event){.kind = EVENT_GROW, .store = ms->id, .len = size});
    pthread_rwlock_unlock(&ms->image->lock);
    return 0;
}

static int64_t mstore_size(struct store *s)
{
    struct mstore *ms = (struct mstore *)s;
    int64_t size;

    pthread_rwlock_rdlock(&ms->image->lock);
    size = (int64_t)ms->image->size;
    pthread_rwlock_unlock(&ms->image->lock);
    return size;
}

/* Only for ranges that were not written through this store. */
static void mstore_drop(struct store *s, uint64_t off, uint64_t len)
{
    struct mstore *ms = (struct mstore *)s;
    uint8_t page[IMAGE_PAGE];

    if (!ms->disk)
        return;
    pthread_rwlock_wrlock(&ms->image->lock);
    for (uint64_t at = off; at < off + len && at + IMAGE_PAGE <= ms->image->size; at += IMAGE_PAGE) {
        image_read(ms->disk, at, page, sizeof(page));
        image_write(ms->image, at, page, sizeof(page));
    }
    pthread_rwlock_unlock(&ms->image->lock);
}

static void mstore_close(struct store *s)
{
    free(s);
}

static const struct store_ops mstore_ops = {
    .readv = mstore_readv,
    .writev = mstore_writev,
    .sync = mstore_sync,
    .writeback = mstore_writeback,
    .punch = mstore_punch,
    .allocate = mstore_allocate,
    .grow = mstore_grow,
    .size = mstore_size,
    .drop = mstore_drop,
    .close = mstore_close,
};

/* A store on image, which stays the caller's; close() frees only the store. rec and faults may be NULL. */
UNUSED static struct store *mstore_new(struct image *image, struct recorder *rec, struct faults *faults, int id)
{
    struct mstore *ms = xcalloc(1, sizeof(*ms));

    *ms = (struct mstore){.s = {&mstore_ops}, .image = image, .rec = rec, .faults = faults, .id = (uint8_t)id};
    return &ms->s;
}

/* --- what a power cut leaves --- */

struct crash {
    const struct recorder *rec;
    struct image *durable[2];
    size_t upto[2]; /* events of the store below this are in durable (or lost) */
    struct rng rng;
};

enum crash_mode {
    CRASH_ALL,       /* nothing lost: the death of the process */
    CRASH_NONE,      /* nothing un-flushed is there */
    CRASH_DATA_ONLY, /* all of data, nothing of log */
    CRASH_LOG_ONLY,
    CRASH_LAST_TORN, /* all, but the last write is torn */
    CRASH_ONE_LOST,  /* all but one */
    CRASH_SUBSET,
    CRASH_TORN, /* each whole, torn or absent */
    CRASH_MODES
};

/* Applies the sectors of an event that pick() wants: keep_all, or each by chance. Returns a hash of what was applied.
 */
static uint64_t crash_apply(struct image *m, const struct event *e, size_t index, bool torn, struct rng *rng)
{
    uint64_t end = e->off + e->len, h = hash_mix(index, 1);
    unsigned odds = 2;

    switch (e->kind) {
    case EVENT_GROW:
        m->size = MAX(m->size, e->len);
        return h;
    case EVENT_PUNCH:
        end = MIN(end, m->size);
        break;
    default:
        break;
    }
    if (!torn) {
        if (e->off < end)
            image_write(m, e->off, e->bytes, end - e->off);
        return h;
    }
    odds = 2 + (unsigned)rng_below(rng, 7);
    for (uint64_t at = e->off; at < end;) {
        uint64_t next = MIN((at / SECTOR_BYTES + 1) * SECTOR_BYTES, end);
        bool keep = rng_chance(rng, odds) == (odds % 2 == 0);

        if (keep) {
            image_write(m, at, e->bytes ? e->bytes + (at - e->off) : NULL, next - at);
            h = hash_mix(h, at);
        }
        at = next;
    }
    return h;
}

/* Moves the durable images to what the syncs before cut (not going back) made durable. */
UNUSED static void crash_advance(struct crash *c, size_t cut)
{
    for (unsigned s = 0; s < 2; s++) {
        size_t last = c->upto[s];

        for (size_t i = c->upto[s]; i < cut; i++)
            if (c->rec->ev[i].store == s && c->rec->ev[i].kind == EVENT_SYNC && !c->rec->ev[i].failed)
                last = MAX(last, MIN(i, c->rec->ev[i].upto));
        for (size_t i = c->upto[s]; i < last; i++) {
            const struct event *e = &c->rec->ev[i];

            if (e->store != s || e->kind == EVENT_SYNC)
                continue;
            if (!e->lossy || rng_chance(&c->rng, 3))
                crash_apply(c->durable[s], e, i, e->lossy, &c->rng);
        }
        c->upto[s] = last;
    }
}

/* Events of both stores that a cut may lose. */
UNUSED static size_t crash_pending(const struct crash *c, size_t cut)
{
    size_t n = 0;

    for (size_t i = MIN(c->upto[0], c->upto[1]); i < cut; i++)
        n += c->rec->ev[i].kind != EVENT_SYNC && i >= c->upto[c->rec->ev[i].store];
    return n;
}

/*
 * The images that a cut leaves, over the durable ones (crash_advance to the same cut first). which: the pending event
 * that CRASH_ONE_LOST loses. Returns a hash that tells states apart.
 */
UNUSED static uint64_t crash_build(struct crash *c, size_t cut, enum crash_mode mode, size_t which,
                                   struct image *ret_image[2])
{
    size_t pending = crash_pending(c, cut), nth = 0;
    uint64_t h = hash_mix(c->upto[0], c->upto[1]);
    bool shrunk[2] = {false, false};

    for (unsigned s = 0; s < 2; s++)
        ret_image[s] = image_new(c->durable[s]);
    for (size_t i = MIN(c->upto[0], c->upto[1]); i < cut; i++) {
        const struct event *e = &c->rec->ev[i];
        struct image *m = ret_image[e->store];
        bool keep = true, torn = false;

        if (e->kind == EVENT_SYNC || i < c->upto[e->store])
            continue;
        switch (mode) {
        case CRASH_NONE:
            keep = false;
            break;
        case CRASH_DATA_ONLY:
            keep = e->store == 0;
            break;
        case CRASH_LOG_ONLY:
            keep = e->store == 1;
            break;
        case CRASH_LAST_TORN:
            torn = nth == pending - 1;
            break;
        case CRASH_ONE_LOST:
            keep = nth != which;
            break;
        case CRASH_SUBSET:
            keep = rng_chance(&c->rng, 2);
            break;
        case CRASH_TORN:
            keep = !rng_chance(&c->rng, 4);
            torn = rng_chance(&c->rng, 2);
            break;
        default:
            break;
        }
        nth++;
        if (!keep && (e->kind == EVENT_GROW || (e->kind == EVENT_WRITE && e->off + e->len > m->size)))
            shrunk[e->store] = true;
        if (!keep || (shrunk[e->store] && e->kind == EVENT_WRITE && e->off + e->len > m->size))
            continue; /* also what lies past an end whose growth was lost */
        h = hash_mix(h, crash_apply(m, e, i, torn || e->lossy, &c->rng));
    }
    return h;
}

#endif
