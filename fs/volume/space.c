/*
 * space.c - see space.h. Owns the bitmaps and the two lists of released runs.
 *
 * Invariants, under the mutex:
 *  1. free_units = number of units with no bit set, over all regions; region->free is its share.
 *  2. used + inflight + the released runs' units + free_units + punched * CHUNK_UNITS + those units that are held and
 *     neither used nor busy = regions * REGION_UNITS (but for chunks that are just being punched).
 *  3. run_hint of a region is never below its longest free run.
 *  4. a region whose used bits differ from its SPACE item has dirty set; `dirty` counts these.
 *  5. a chunk (CHUNK_UNITS, aligned) whose bit in region->punched is set has no blocks in the backing file, or perhaps
 * none: its units are busy. When space is short it is allocated again (restore), before `data` is made longer. Chunks
 * that became free are punched when much more than the reserve is free, so that the reserve always has its blocks.
 *  6. whole = number of groups (NODE_UNITS units at a multiple of that) of which all units are free; region->whole is
 * its share. Nodes are put into whole groups. The reserve is whole groups: free units in smaller pieces are for data
 * only, or a volume that is full of single blocks could not write the checkpoint that it needs to delete one.
 *  7. held = units with the held bit; kept = those of them that are not used: what snapshots alone cost.
 */
#include "fs/volume/space.h"

#include <stdlib.h>

struct region {
    uint64_t *used;
    uint64_t *busy;
    uint64_t *held; /* by snapshots; NULL: none of them */
    uint32_t free;
    uint32_t whole;
    uint32_t run_hint;
    uint64_t punched; /* a bit a chunk */
    bool dirty;
};

struct run {
    uint64_t addr, units;
};

struct run_list {
    struct run *run;
    size_t n, cap;
};

struct space {
    pthread_mutex_t mutex;
    struct store *data;
    struct region *region;
    uint64_t regions, regions_max;
    uint64_t limit, reserve;
    uint64_t used, inflight, free_units, whole, dirty;
    uint64_t held, kept;
    uint64_t punched;     /* chunks */
    uint64_t grown;       /* the region that grow() gave space in */
    bool no_holes;        /* the backing file takes none */
    uint64_t cursor;      /* where the search for data goes on */
    uint64_t node_cursor; /* a region that had room for nodes */
    uint64_t hold;        /* names the holds of this time */
    unsigned holds;
    struct run_list released, frozen;
};

#define WORDS      (REGION_UNITS / 64)
#define HOLD_UNITS 2048 /* free space at which holds end */

#define CHUNK_UNITS 256u  /* 1 MiB: what is punched at once */
#define KEEP_UNITS  4096u /* free space besides the reserve that is not punched */
_Static_assert(REGION_UNITS / CHUNK_UNITS == 64, "region->punched");

/* --- bits --- */

static bool bit_get(const uint64_t *map, uint32_t i)
{
    return map[i / 64] >> (i % 64) & 1;
}

static void bits_set(uint64_t *map, uint32_t i, uint32_t n, bool value)
{
    for (; n; i++, n--) {
        if (i % 64 == 0 && n >= 64) {
            map[i / 64] = value ? UINT64_MAX : 0;
            i += 63, n -= 63;
        } else if (value) {
            map[i / 64] |= 1ull << (i % 64);
        } else {
            map[i / 64] &= ~(1ull << (i % 64));
        }
    }
}

static bool bits_all(const uint64_t *map, uint32_t i, uint32_t n, bool value)
{
    for (; n; i++, n--) {
        if (bit_get(map, i) != value)
            return false;
    }
    return true;
}

static uint64_t held_word(const struct region *r, uint32_t word)
{
    return r->held ? r->held[word] : 0;
}

/* The units of a word that are not free. */
static uint64_t taken_word(const struct region *r, uint32_t word)
{
    return r->used[word] | r->busy[word] | held_word(r, word);
}

/* Units of at .. at + n - 1 that snapshots hold. */
static uint32_t count_held(const struct region *r, uint32_t at, uint32_t n)
{
    uint32_t count = 0;

    for (uint32_t i = at; r->held && i < at + n; i++)
        count += bit_get(r->held, i);
    return count;
}

/* The groups of a word that are free, as a bit at each one's first unit. */
static uint64_t whole_groups(const struct region *r, uint32_t word)
{
    uint64_t room = ~taken_word(r, word);

    room &= room >> 1;
    room &= room >> 2;
    return room & 0x1111111111111111ull;
}

_Static_assert(NODE_UNITS == 4 && REGION_UNITS % 64 == 0, "whole_groups");

/* Free groups that have a unit in at .. at + n - 1. */
static uint32_t count_whole(const struct region *r, uint32_t at, uint32_t n)
{
    uint32_t first = at / NODE_UNITS, last = (at + n - 1) / NODE_UNITS, count = 0;

    for (uint32_t g = first; g <= last; g++)
        count += whole_groups(r, g * NODE_UNITS / 64) >> (g * NODE_UNITS % 64) & 1;
    return count;
}

/* The first run of free units of at least want, at or after from; else the longest. Returns its length (cut to want).
 * scraps: only units outside whole groups. */
static uint32_t find_run(const struct region *r, uint32_t from, uint32_t want, bool scraps, uint32_t *ret_at)
{
    uint32_t best = 0, run = 0, start = 0;

    for (uint32_t i = from; i < REGION_UNITS; i++) {
        uint64_t taken = taken_word(r, i / 64) | (scraps ? whole_groups(r, i / 64) * 15 : 0);

        if (i % 64 == 0 && taken == UINT64_MAX) {
            run = 0;
            i += 63;
            continue;
        }
        if (taken >> (i % 64) & 1) {
            run = 0;
            continue;
        }
        if (run++ == 0)
            start = i;
        if (run > best) {
            best = run;
            *ret_at = start;
            if (best == want)
                break;
        }
    }
    return best;
}

/* --- life --- */

static void set_dirty(struct space *s, struct region *r, bool dirty)
{
    s->dirty += (uint64_t)dirty - (uint64_t)r->dirty;
    r->dirty = dirty;
}

/* What counts against the limit. */
static uint64_t in_use(const struct space *s)
{
    return s->used + s->inflight + s->kept;
}

static void add_region(struct space *s)
{
    struct region *r = &s->region[s->regions++];

    *r = (struct region){.used = xcalloc(WORDS, 8),
                         .busy = xcalloc(WORDS, 8),
                         .free = REGION_UNITS,
                         .whole = REGION_UNITS / NODE_UNITS,
                         .run_hint = REGION_UNITS};
    set_dirty(s, r, true);
    s->free_units += REGION_UNITS;
    s->whole += REGION_UNITS / NODE_UNITS;
}

struct space *space_new(struct store *data, uint64_t regions, uint64_t limit_units, uint64_t reserve_units)
{
    struct space *s = xcalloc(1, sizeof(*s));

    pthread_mutex_init(&s->mutex, NULL);
    s->data = data;
    s->limit = limit_units;
    s->reserve = reserve_units;
    s->regions_max = (limit_units + REGION_UNITS - 1) / REGION_UNITS;
    /* As many as there can ever be: 10 MiB, resident as far as it is used. */
    s->region = xcalloc(VOLUME_SIZE_MAX / REGION_BYTES, sizeof(*s->region));
    for (uint64_t i = 0; i < regions; i++)
        add_region(s);
    return s;
}

int space_set_limit(struct space *s, uint64_t limit_units, uint64_t reserve_units)
{
    int rc = 0;

    pthread_mutex_lock(&s->mutex);
    if (in_use(s) + reserve_units > limit_units) {
        rc = -ENOSPC;
    } else {
        s->limit = limit_units;
        s->reserve = reserve_units;
        s->regions_max = (limit_units + REGION_UNITS - 1) / REGION_UNITS;
    }
    pthread_mutex_unlock(&s->mutex);
    return rc;
}

void space_free(struct space *s)
{
    if (!s)
        return;
    for (uint64_t i = 0; i < s->regions; i++) {
        free(s->region[i].used);
        free(s->region[i].busy);
        free(s->region[i].held);
    }
    free(s->region);
    free(s->released.run);
    free(s->frozen.run);
    pthread_mutex_destroy(&s->mutex);
    free(s);
}

void space_load_region(struct space *s, uint64_t region, const uint8_t bitmap[REGION_UNITS / 8])
{
    struct region *r = &s->region[region];
    uint32_t used = 0;

    for (unsigned i = 0; i < WORDS; i++) {
        le64 word;

        memcpy(&word, bitmap + i * 8, 8);
        r->used[i] = le64_get(word);
        used += (uint32_t)__builtin_popcountll(r->used[i]);
    }
    r->free = REGION_UNITS - used;
    s->whole -= r->whole;
    r->whole = count_whole(r, 0, REGION_UNITS);
    s->whole += r->whole;
    set_dirty(s, r, false);
    s->used += used;
    s->free_units -= used;
}

/* --- allocation --- */

static int grow_file(struct space *s)
{
    int rc;

    if (s->regions >= s->regions_max)
        return -ENOSPC;
    rc = s->data->ops->grow(s->data, (s->regions + 1) * REGION_BYTES);
    if (rc < 0)
        return rc == -EDQUOT || rc == -EFBIG ? -ENOSPC : rc;
    s->grown = s->regions;
    add_region(s);
    return 0;
}

static void make_free(struct space *s, uint64_t addr, uint64_t units);

/* Gives a punched chunk its blocks back. */
static int restore(struct space *s)
{
    uint64_t k = s->cursor / REGION_UNITS, addr;
    int rc;

    while (!s->region[k % s->regions].punched)
        k++;
    k %= s->regions;
    addr = k * REGION_UNITS + (uint64_t)__builtin_ctzll(s->region[k].punched) * CHUNK_UNITS;
    rc = s->data->ops->allocate(s->data, addr * UNIT_BYTES, CHUNK_UNITS * UNIT_BYTES);
    if (rc < 0)
        return rc == -EDQUOT || rc == -EFBIG ? -ENOSPC : rc;
    s->region[k].punched &= s->region[k].punched - 1;
    s->punched--;
    make_free(s, addr, CHUNK_UNITS);
    s->grown = k;
    return 0;
}

static bool can_grow(const struct space *s)
{
    return s->punched || s->regions < s->regions_max;
}

static int grow(struct space *s)
{
    return s->punched ? restore(s) : grow_file(s);
}

static void take(struct space *s, struct region *r, uint32_t at, uint32_t n, uint64_t *map)
{
    uint32_t broken = count_whole(r, at, n);

    r->whole -= broken;
    s->whole -= broken;
    bits_set(map, at, n, true);
    r->free -= n;
    s->free_units -= n;
}

/* A full run at or after the cursor, round the volume; regions that cannot have one are passed over. */
static bool find_full(struct space *s, uint32_t want, uint64_t *ret_region, uint32_t *ret_at)
{
    uint64_t first = s->cursor / REGION_UNITS;

    for (uint64_t i = 0; i <= s->regions; i++) {
        uint64_t k = (first + i) % s->regions;
        struct region *r = &s->region[k];
        uint32_t from = i == 0 ? (uint32_t)(s->cursor % REGION_UNITS) : 0;
        uint32_t got;

        if (r->run_hint < want || r->free < want)
            continue;
        got = find_run(r, from, want, false, ret_at);
        if (got >= want) {
            *ret_region = k;
            return true;
        }
        if (from == 0)
            r->run_hint = got;
    }
    return false;
}

static uint32_t find_longest(struct space *s, uint32_t want, uint64_t *ret_region, uint32_t *ret_at)
{
    uint32_t best = 0, at = 0;

    for (uint64_t k = 0; k < s->regions && best < want; k++) {
        struct region *r = &s->region[k];
        uint32_t got;

        if (r->run_hint <= best || r->free <= best)
            continue;
        got = find_run(r, 0, want, false, &at);
        if (got < want)
            r->run_hint = got;
        if (got > best) {
            best = got;
            *ret_region = k;
            *ret_at = at;
        }
    }
    return best;
}

/* The longest run outside whole groups in the first region, from the cursor's on, that has one of a step at least. */
static uint32_t find_scraps(struct space *s, uint32_t want, uint32_t step, uint64_t *ret_region, uint32_t *ret_at)
{
    for (uint64_t i = 0; i < s->regions; i++) {
        uint64_t k = (s->cursor / REGION_UNITS + i) % s->regions;
        struct region *r = &s->region[k];
        uint32_t got = r->free - r->whole * NODE_UNITS;

        if (got >= step)
            got = find_run(r, 0, want, true, ret_at);
        if (got >= step) {
            *ret_region = k;
            return got;
        }
    }
    return 0;
}

/* May data of `want` units, wherever it is put, break groups? Data that adds to the volume leaves, besides the reserve,
 * some for nodes of operations that add names. */
static bool may_break(const struct space *s, uint64_t want, bool from_reserve)
{
    uint64_t keep = from_reserve ? s->reserve / 2 : s->reserve + s->reserve / 4;

    return s->whole * NODE_UNITS >= keep + want + 2 * NODE_UNITS;
}

int64_t space_alloc(struct space *s, uint64_t most, uint64_t want, uint64_t step, bool from_reserve, uint64_t *ret_addr)
{
    uint64_t region = 0, reserve = from_reserve ? s->reserve / 2 : s->reserve;
    bool scraps = false;
    uint32_t at = 0, got = 0;
    int64_t rc = 0;

    pthread_mutex_lock(&s->mutex);
    if (s->held) { /* what is freed then may be kept: nothing would fill the reserve again */
        from_reserve = false;
        reserve = s->reserve;
    }
    if (in_use(s) + want + reserve > s->limit) {
        rc = -ENOSPC;
        goto out;
    }
    if (most > want && in_use(s) + most + reserve <= s->limit && s->free_units >= most + reserve &&
        may_break(s, most, from_reserve) && find_full(s, (uint32_t)most, &region, &at))
        got = (uint32_t)most;
    while (rc == 0 && !got) {
        if (s->free_units >= want + reserve && may_break(s, want, from_reserve)) {
            if (find_full(s, (uint32_t)want, &region, &at))
                got = (uint32_t)want;
            if (got || !can_grow(s))
                break;
        }
        rc = grow(s);
    }
    if (rc < 0 && s->free_units < want + reserve)
        goto out;
    /* Fragmented, and no more room to grow: what there is. */
    scraps = !may_break(s, want, from_reserve);
    if (!got) {
        got = scraps ? find_scraps(s, (uint32_t)want, (uint32_t)step, &region, &at)
                     : find_longest(s, (uint32_t)want, &region, &at);
        got -= got % (uint32_t)step;
    }
    rc = got ? (int64_t)got : -ENOSPC;
    if (got) {
        take(s, &s->region[region], at, got, s->region[region].busy);
        s->inflight += got;
        *ret_addr = region * REGION_UNITS + at;
        s->cursor = (*ret_addr + got) % (s->regions * REGION_UNITS);
    }
out:
    pthread_mutex_unlock(&s->mutex);
    return rc;
}

static struct region *region_of(struct space *s, uint64_t addr, uint64_t units)
{
    uint64_t k = addr / REGION_UNITS;

    if (k >= s->regions || units == 0 || addr % REGION_UNITS + units > REGION_UNITS)
        return NULL;
    return &s->region[k];
}

/* Busy units become free, but for those that a snapshot holds. */
static void make_free(struct space *s, uint64_t addr, uint64_t units)
{
    struct region *r = region_of(s, addr, units);
    uint32_t at = (uint32_t)(addr % REGION_UNITS), n = (uint32_t)units, made = n - count_held(r, at, n);

    bits_set(r->busy, at, n, false);
    r->free += made;
    r->run_hint = REGION_UNITS;
    s->free_units += made;
    made = count_whole(r, at, n);
    r->whole += made;
    s->whole += made;
}

void space_cancel(struct space *s, uint64_t addr, uint64_t units)
{
    pthread_mutex_lock(&s->mutex);
    make_free(s, addr, units);
    s->inflight -= units;
    pthread_mutex_unlock(&s->mutex);
}

int space_commit(struct space *s, uint64_t addr, uint64_t units)
{
    uint32_t at = (uint32_t)(addr % REGION_UNITS), n = (uint32_t)units;
    struct region *r;
    int rc = 0;

    pthread_mutex_lock(&s->mutex);
    /* A log record of a time when `data` had grown, but no checkpoint since said so. */
    while (addr / REGION_UNITS >= s->regions && s->regions < s->regions_max) {
        if (s->data->ops->size(s->data) >= (int64_t)((s->regions + 1) * REGION_BYTES))
            add_region(s);
        else if (grow_file(s) < 0)
            break;
    }
    r = region_of(s, addr, units);
    if (!r || !bits_all(r->used, at, n, false)) {
        rc = -EUCLEAN;
    } else if (bits_all(r->busy, at, n, true) && s->inflight >= units) {
        bits_set(r->busy, at, n, false);
        bits_set(r->used, at, n, true);
        s->inflight -= units;
    } else if (bits_all(r->busy, at, n, false)) {
        take(s, r, at, n, r->used);
    } else {
        rc = -EUCLEAN;
    }
    if (rc == 0) {
        s->used += units;
        s->kept -= count_held(r, at, n);
        set_dirty(s, r, true);
    }
    pthread_mutex_unlock(&s->mutex);
    return rc;
}

static void run_push(struct run_list *l, uint64_t addr, uint64_t units)
{
    if (l->n && l->run[l->n - 1].addr + l->run[l->n - 1].units == addr && addr % REGION_UNITS) {
        l->run[l->n - 1].units += units;
        return;
    }
    if (l->n == l->cap) {
        l->cap = l->cap ? l->cap * 2 : 64;
        l->run = xrealloc(l->run, l->cap * sizeof(*l->run));
    }
    l->run[l->n++] = (struct run){addr, units};
}

int space_release(struct space *s, uint64_t addr, uint64_t units)
{
    uint32_t at = (uint32_t)(addr % REGION_UNITS), n = (uint32_t)units;
    struct region *r;
    int rc = 0;

    pthread_mutex_lock(&s->mutex);
    r = region_of(s, addr, units);
    if (!r || !bits_all(r->used, at, n, true)) {
        rc = -EUCLEAN;
    } else {
        bits_set(r->used, at, n, false);
        bits_set(r->busy, at, n, true);
        s->used -= units;
        s->kept += count_held(r, at, n);
        set_dirty(s, r, true);
        run_push(&s->released, addr, units);
    }
    pthread_mutex_unlock(&s->mutex);
    return rc;
}

static bool take_node(struct space *s, uint64_t k, uint64_t *ret_addr)
{
    struct region *r = &s->region[k];
    uint32_t word = 0, at;

    if (!r->whole)
        return false;
    while (!whole_groups(r, word))
        word++;
    at = word * 64 + (uint32_t)__builtin_ctzll(whole_groups(r, word));
    take(s, r, at, NODE_UNITS, r->used);
    s->used += NODE_UNITS;
    set_dirty(s, r, true);
    s->node_cursor = k;
    *ret_addr = k * REGION_UNITS + at;
    return true;
}

int space_alloc_node(struct space *s, uint64_t *ret_addr)
{
    int rc = 0;

    pthread_mutex_lock(&s->mutex);
    if (s->node_cursor < s->regions && s->region[s->node_cursor].dirty && take_node(s, s->node_cursor, ret_addr))
        goto out;
    /* Dirty regions first: taking from a clean one dirties one more leaf, which needs an address in turn. */
    for (int clean = 0; clean < 2; clean++) {
        for (uint64_t k = 0; k < s->regions; k++) {
            if (s->region[k].dirty == !clean && take_node(s, k, ret_addr))
                goto out;
        }
    }
    rc = grow(s);
    if (rc == 0 && !take_node(s, s->grown, ret_addr))
        rc = -ENOSPC;
out:
    pthread_mutex_unlock(&s->mutex);
    return rc;
}

/* --- questions --- */

bool space_room(struct space *s, uint64_t units, uint64_t dirty_nodes)
{
    uint64_t nodes = dirty_nodes * NODE_UNITS + s->reserve, need = units + nodes;
    bool ok;

    nodes += MIN(units, 8 * NODE_UNITS); /* more is for data */
    pthread_mutex_lock(&s->mutex);
    ok = in_use(s) + need <= s->limit;
    while (ok && (s->free_units < need || s->whole * NODE_UNITS < nodes) && can_grow(s))
        ok = grow(s) == 0;
    ok = ok && s->free_units >= need && s->whole * NODE_UNITS >= nodes;
    pthread_mutex_unlock(&s->mutex);
    return ok;
}

bool space_room_to_change(struct space *s, uint64_t dirty_nodes)
{
    uint64_t need = dirty_nodes * NODE_UNITS + s->reserve / 2;
    bool ok = true;

    pthread_mutex_lock(&s->mutex);
    if (s->held) {
        ok = in_use(s) + need <= s->limit;
        while (ok && s->whole * NODE_UNITS < need && can_grow(s))
            ok = grow(s) == 0;
        ok = ok && s->whole * NODE_UNITS >= need;
    }
    pthread_mutex_unlock(&s->mutex);
    return ok;
}

bool space_has_pending(struct space *s)
{
    bool any;

    pthread_mutex_lock(&s->mutex);
    any = s->released.n > 0 || s->frozen.n > 0;
    pthread_mutex_unlock(&s->mutex);
    return any;
}

uint64_t space_dirty_regions(struct space *s)
{
    uint64_t n;

    pthread_mutex_lock(&s->mutex);
    n = s->dirty;
    pthread_mutex_unlock(&s->mutex);
    return n;
}

bool space_is_used(struct space *s, uint64_t unit)
{
    bool used = false;

    pthread_mutex_lock(&s->mutex);
    if (unit / REGION_UNITS < s->regions)
        used = bit_get(s->region[unit / REGION_UNITS].used, (uint32_t)(unit % REGION_UNITS));
    pthread_mutex_unlock(&s->mutex);
    return used;
}

uint64_t space_used(struct space *s)
{
    uint64_t used;

    pthread_mutex_lock(&s->mutex);
    used = s->used;
    pthread_mutex_unlock(&s->mutex);
    return used;
}

uint64_t space_regions(struct space *s)
{
    uint64_t n;

    pthread_mutex_lock(&s->mutex);
    n = s->regions;
    pthread_mutex_unlock(&s->mutex);
    return n;
}

void space_stat(struct space *s, uint64_t *ret_used, uint64_t *ret_limit, uint64_t *ret_reserve)
{
    pthread_mutex_lock(&s->mutex);
    *ret_used = in_use(s);
    *ret_limit = s->limit;
    *ret_reserve = s->reserve;
    pthread_mutex_unlock(&s->mutex);
}

/* --- checkpoint --- */

int64_t space_next_dirty(struct space *s, uint64_t from)
{
    int64_t found = -1;

    pthread_mutex_lock(&s->mutex);
    for (uint64_t k = from; k < s->regions && found < 0; k++) {
        if (s->region[k].dirty)
            found = (int64_t)k;
    }
    pthread_mutex_unlock(&s->mutex);
    return found;
}

void space_take_bitmap(struct space *s, uint64_t region, uint8_t bitmap[REGION_UNITS / 8])
{
    pthread_mutex_lock(&s->mutex);
    for (unsigned i = 0; i < WORDS; i++) {
        le64 word = le64_make(s->region[region].used[i]);

        memcpy(bitmap + i * 8, &word, 8);
    }
    set_dirty(s, &s->region[region], false);
    pthread_mutex_unlock(&s->mutex);
}

void space_freeze(struct space *s)
{
    pthread_mutex_lock(&s->mutex);
    for (size_t i = 0; i < s->released.n; i++)
        run_push(&s->frozen, s->released.run[i].addr, s->released.run[i].units);
    s->released.n = 0;
    pthread_mutex_unlock(&s->mutex);
}

/* Is there space besides the reserve that a checkpoint and the data before it can be put into? */
static bool roomy(struct space *s)
{
    uint64_t keep = 2 * s->reserve + HOLD_UNITS;

    while ((s->free_units < keep || s->whole * NODE_UNITS < keep) && can_grow(s))
        if (grow(s) < 0)
            break;
    return s->free_units >= keep && s->whole * NODE_UNITS >= keep;
}

/* --- giving back --- */

static bool chunk_free(const struct region *r, uint32_t chunk)
{
    const uint32_t words = CHUNK_UNITS / 64;

    for (uint32_t w = chunk * words; w < (chunk + 1) * words; w++)
        if (taken_word(r, w))
            return false;
    return true;
}

static bool spare(const struct space *s)
{
    uint64_t keep = 2 * s->reserve + KEEP_UNITS + CHUNK_UNITS;

    return s->free_units >= keep && s->whole * NODE_UNITS >= keep;
}

/* A free chunk becomes busy, as punched ones are. */
static void chunk_take(struct space *s, uint64_t k, uint32_t chunk)
{
    take(s, &s->region[k], chunk * CHUNK_UNITS, CHUNK_UNITS, s->region[k].busy);
}

void space_ready(struct space *s)
{
    if (!s->data->ops->allocate)
        return;
    pthread_mutex_lock(&s->mutex);
    for (uint64_t k = 0; k < s->regions; k++)
        for (uint32_t chunk = 0; chunk < 64; chunk++) {
            if (!chunk_free(&s->region[k], chunk))
                continue;
            chunk_take(s, k, chunk);
            s->region[k].punched |= 1ull << chunk;
            s->punched++;
        }
    while (!spare(s) && s->punched)
        if (restore(s) < 0)
            break;
    pthread_mutex_unlock(&s->mutex);
}

/* [mutex, dropped while punching] The chunks of a run that has become free. */
static void give_back(struct space *s, const struct run *run)
{
    uint64_t first = run->addr / CHUNK_UNITS, last = (run->addr + run->units - 1) / CHUNK_UNITS;

    for (uint64_t c = first; c <= last && !s->no_holes && spare(s); c++) {
        uint64_t k = c / 64;
        int rc;

        if (!chunk_free(&s->region[k], c % 64))
            continue;
        chunk_take(s, k, c % 64);
        pthread_mutex_unlock(&s->mutex);
        rc = s->data->ops->punch(s->data, c * CHUNK_UNITS * UNIT_BYTES, CHUNK_UNITS * UNIT_BYTES);
        pthread_mutex_lock(&s->mutex);
        if (rc < 0) {
            s->no_holes = true;
            make_free(s, c * CHUNK_UNITS, CHUNK_UNITS);
            continue;
        }
        s->region[k].punched |= 1ull << (c % 64);
        s->punched++;
    }
}

void space_thaw(struct space *s)
{
    struct run_list freed;

    pthread_mutex_lock(&s->mutex);
    if (s->holds && roomy(s)) {
        pthread_mutex_unlock(&s->mutex);
        return;
    }
    if (s->holds) {
        s->holds = 0;
        s->hold++;
    }
    for (size_t i = 0; i < s->frozen.n; i++)
        make_free(s, s->frozen.run[i].addr, s->frozen.run[i].units);
    freed = s->frozen;
    s->frozen = (struct run_list){0};
    for (size_t i = 0; i < freed.n && s->data->ops->allocate; i++)
        give_back(s, &freed.run[i]);
    free(freed.run);
    pthread_mutex_unlock(&s->mutex);
}

/* --- holds --- */

uint64_t space_hold(struct space *s)
{
    uint64_t hold;

    pthread_mutex_lock(&s->mutex);
    s->holds++;
    hold = s->hold;
    pthread_mutex_unlock(&s->mutex);
    return hold;
}

bool space_held(struct space *s, uint64_t hold)
{
    bool held;

    pthread_mutex_lock(&s->mutex);
    held = s->holds && s->hold == hold;
    pthread_mutex_unlock(&s->mutex);
    return held;
}

void space_unhold(struct space *s, uint64_t hold)
{
    pthread_mutex_lock(&s->mutex);
    if (s->holds && s->hold == hold)
        s->holds--;
    pthread_mutex_unlock(&s->mutex);
}

/* --- snapshots --- */

/* One word of a region's held bits becomes `now`. */
static void set_held(struct space *s, uint64_t k, uint32_t word, uint64_t now)
{
    struct region *r = &s->region[k];
    uint64_t before = held_word(r, word), added = now & ~before, gone = before & ~now;
    uint64_t idle = ~(r->used[word] | r->busy[word]);
    uint64_t first = k * REGION_UNITS + (uint64_t)word * 64;
    uint32_t lost = (uint32_t)__builtin_popcountll(added & idle);
    uint32_t groups = (uint32_t)__builtin_popcountll(whole_groups(r, word));

    if (added && !r->held)
        r->held = xcalloc(WORDS, 8);
    if (added | gone)
        r->held[word] = now;
    s->held += (uint64_t)__builtin_popcountll(added) - (uint64_t)__builtin_popcountll(gone);
    s->kept +=
        (uint64_t)__builtin_popcountll(added & ~r->used[word]) - (uint64_t)__builtin_popcountll(gone & ~r->used[word]);
    r->free -= lost;
    s->free_units -= lost;
    /* What nothing needs any more is freed as by any operation: after a checkpoint. */
    r->busy[word] |= gone & idle;
    for (uint64_t left = gone & idle; left; left &= left - 1)
        run_push(&s->released, first + (uint64_t)__builtin_ctzll(left), 1);
    groups -= (uint32_t)__builtin_popcountll(whole_groups(r, word));
    r->whole -= groups;
    s->whole -= groups;
}

static uint64_t bitmap_word(const uint8_t *bitmap, uint32_t word)
{
    le64 w;

    memcpy(&w, bitmap + (size_t)word * 8, 8);
    return le64_get(w);
}

void space_keep(struct space *s, uint64_t region, const uint8_t *bitmap)
{
    pthread_mutex_lock(&s->mutex);
    for (uint32_t i = 0; region < s->regions && i < WORDS; i++)
        set_held(s, region, i, held_word(&s->region[region], i) | bitmap_word(bitmap, i));
    pthread_mutex_unlock(&s->mutex);
}

void space_keep_only(struct space *s, uint64_t region, const uint8_t *bitmap)
{
    pthread_mutex_lock(&s->mutex);
    for (uint32_t i = 0; region < s->regions && i < WORDS; i++)
        set_held(s, region, i, held_word(&s->region[region], i) & bitmap_word(bitmap, i));
    pthread_mutex_unlock(&s->mutex);
}
