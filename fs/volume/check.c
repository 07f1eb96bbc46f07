/*
 * check.c - volume_check: everything that must hold between items, and between the tree and the bitmaps.
 *
 * One walk over all items in key order fills two tables (inodes, extents) and a map of used units; then each table is
 * held against what its items claim. Item kinds come in the order of format.h, so inodes are known before what belongs
 * to them. Content is read afterwards, without the lock.
 *
 * Memory: 72 bytes an inode, 48 an extent, a bit a unit. So the tables keep what was counted, not the items: those are
 * looked up again.
 */
#include "fs/volume/names.h"
#include "fs/volume/space.h"

#include <stdio.h>
#include <stdlib.h>

struct seen_inode {
    uint64_t ino;
    uint64_t entries, blocks;
    uint64_t next_block; /* end of the last range */
    uint64_t named_by;   /* of a directory: where its entry is */
    uint32_t mode, flags;
    uint32_t names, subdirs, xattrs;
    uint16_t inline_len;
    bool bad, orphan, trim, has_inline;
};
_Static_assert(ITEM_VALUE_MAX <= UINT16_MAX, "inline_len");

struct seen_extent {
    uint64_t id;
    uint16_t
        owed[EXTENT_CHUNKS_MAX]; /* references that the item counts, less the ranges seen; 0 in the end (mod 2^16) */
    uint8_t chunks;              /* 0: malformed */
};

/* Sorted by number, since items come in key order. */
struct table {
    uint8_t *at;
    size_t n, cap, size;
};

struct check {
    struct volume *v;
    void (*line)(void *ctx, const char *text);
    void *ctx;
    int findings;
    struct table inodes, extents;
    bool quiet;     /* nothing is dirty: items, bitmaps and nodes on disk are the same state */
    uint8_t *units; /* bitmap: seen in use */
    uint64_t nunits, seen_units;
};

__attribute__((format(printf, 2, 3))) static void finding(struct check *c, const char *fmt, ...)
{
    char text[256];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    c->findings++;
    c->line(c->ctx, text);
}

#define U(x) ((unsigned long long)(x))

/* --- tables --- */

static void *table_add(struct table *t)
{
    if (t->n == t->cap) {
        t->cap = t->cap ? t->cap * 2 : 256;
        t->at = xrealloc(t->at, t->cap * t->size);
    }
    memset(t->at + t->n * t->size, 0, t->size);
    return t->at + t->n++ * t->size;
}

/* Both entry types begin with their number. */
static void *table_find(const struct table *t, uint64_t number)
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

_Static_assert(offsetof(struct seen_inode, ino) == 0 && offsetof(struct seen_extent, id) == 0,
               "table_find compares the first member");

/* --- units --- */

static void use_units(struct check *c, uint64_t addr, uint64_t n, const char *what, uint64_t id)
{
    for (uint64_t u = addr; u < addr + n; u++) {
        if (u >= c->nunits) {
            finding(c, "corrupt %s: %llu, unit %llu lies behind the volume's end", what, U(id), U(u));
            return;
        }
        if (c->units[u / 8] >> (u % 8) & 1)
            finding(c, "corrupt %s: %llu, unit %llu is used twice", what, U(id), U(u));
        else
            c->seen_units++;
        c->units[u / 8] |= (uint8_t)(1u << (u % 8));
    }
}

static int visit_node(void *ctx, uint64_t addr, unsigned level, int err)
{
    struct check *c = ctx;

    if (err < 0)
        finding(c, "corrupt node: unit %llu, level %u, does not authenticate or cannot be read", U(addr), level);
    if (addr)
        use_units(c, addr, NODE_UNITS, "node", addr);
    return 0;
}

static void check_units(struct check *c)
{
    uint64_t leaked = 0, missing = 0, first_leaked = 0, first_missing = 0;
    uint8_t used[REGION_UNITS / 8];

    for (uint64_t at = 0; at < c->nunits; at += 8) {
        uint8_t seen = c->units[at / 8], have;

        if (at % REGION_UNITS == 0)
            space_get_bitmap(c->v->space, at / REGION_UNITS, used);
        have = used[at % REGION_UNITS / 8];
        for (unsigned k = 0; k < 8 && have != seen; k++) {
            if ((have & ~seen) >> k & 1 && leaked++ == 0)
                first_leaked = at + k;
            if ((seen & ~have) >> k & 1 && missing++ == 0)
                first_missing = at + k;
        }
    }
    if (leaked)
        finding(c, "free space: %llu units are marked used but nothing uses them, the first is %llu", U(leaked),
                U(first_leaked));
    if (missing)
        finding(c, "free space: %llu units are in use but marked free, the first is %llu", U(missing),
                U(first_missing));
    if (space_used(c->v->space) != c->seen_units)
        finding(c, "free space: used units, have %llu expect %llu", U(space_used(c->v->space)), U(c->seen_units));
}

/* --- items --- */

static void see_inode(struct check *c, const struct tree_iter *it)
{
    struct seen_inode *s = table_add(&c->inodes);
    struct inode i;

    s->ino = it->key.a;
    s->bad = inode_decode(it->key.a, it->value, it->len, &i) < 0;
    if (s->bad) {
        finding(c, "corrupt inode: %llu, malformed item", U(it->key.a));
        return;
    }
    s->mode = i.mode;
    s->flags = i.flags;
}

static struct seen_inode *owner(struct check *c, const struct tree_iter *it, const char *what)
{
    struct seen_inode *s = table_find(&c->inodes, it->key.a);

    if (!s)
        finding(c, "corrupt %s: belongs to the missing inode %llu", what, U(it->key.a));
    return s;
}

static void check_place(struct check *c, const struct tree_iter *it, const void *name, size_t n, const char *what)
{
    uint64_t hash = name_hash(c->v->keys, it->key.a, name, n);

    if (it->key.b < hash || it->key.b >= hash + PROBE_MAX)
        finding(c, "corrupt %s: inode %llu, an item is not at its name's hash", what, U(it->key.a));
}

static void see_dirent(struct check *c, const struct tree_iter *it)
{
    const struct disk_dirent *d = (const struct disk_dirent *)it->value;
    struct seen_inode *dir = owner(c, it, "directory entry"), *target = table_find(&c->inodes, le64_get(d->ino));

    check_place(c, it, d + 1, d->namelen, "directory entry");
    if (dir && !S_ISDIR(dir->mode))
        finding(c, "corrupt directory entry: its directory %llu is none", U(it->key.a));
    if (dir)
        dir->entries++;
    if (!target) {
        finding(c, "corrupt directory entry: in %llu, names the missing inode %llu", U(it->key.a), U(le64_get(d->ino)));
        return;
    }
    target->names++;
    if ((target->mode & S_IFMT) >> 12 != d->type)
        finding(c, "corrupt directory entry: in %llu, type have %u expect %u", U(it->key.a), d->type,
                (target->mode & S_IFMT) >> 12);
    if (S_ISDIR(target->mode)) {
        target->named_by = it->key.a;
        if (dir)
            dir->subdirs++;
    }
}

static void see_xattr(struct check *c, const struct tree_iter *it)
{
    const struct disk_xattr *d = (const struct disk_xattr *)it->value;
    struct seen_inode *s = owner(c, it, "attribute");

    check_place(c, it, d + 1, d->namelen, "attribute");
    if (s)
        s->xattrs++;
}

static void see_inline(struct check *c, const struct tree_iter *it)
{
    struct seen_inode *s = owner(c, it, "inline content");

    if (!s)
        return;
    s->has_inline = true;
    s->inline_len = (uint16_t)it->len;
    if (!S_ISLNK(s->mode) && !(s->flags & INODE_INLINE))
        finding(c, "corrupt inline content: inode %llu is neither inline nor a symlink", U(it->key.a));
}

static void see_range(struct check *c, const struct tree_iter *it)
{
    const struct disk_range *d = (const struct disk_range *)it->value;
    struct seen_inode *s = owner(c, it, "range");
    uint64_t count = le16_get(d->count);

    if (!s)
        return;
    if (it->key.b < s->next_block)
        finding(c, "corrupt range: inode %llu, block %llu overlaps the range before", U(it->key.a), U(it->key.b));
    s->next_block = it->key.b + count;
    s->blocks += count;
    if (!S_ISREG(s->mode) || (s->flags & INODE_INLINE))
        finding(c, "corrupt range: inode %llu is not a file of blocks", U(it->key.a));
}

static void see_extent(struct check *c, const struct tree_iter *it)
{
    struct seen_extent *s = table_add(&c->extents);
    unsigned live = 0;
    struct extent e;

    s->id = it->key.a;
    if (extent_decode(it->key.a, it->value, it->len, &e) < 0) {
        finding(c, "corrupt extent: %llu, malformed item", U(it->key.a));
        return;
    }
    s->chunks = e.chunks;
    for (unsigned i = 0; i < e.chunks; i++) {
        s->owed[i] = e.ref[i];
        live += e.ref[i] > 0;
        if (e.ref[i])
            use_units(c, e.addr + (uint64_t)i * c->v->block_units, c->v->block_units, "extent", s->id);
    }
    if (!live)
        finding(c, "corrupt extent: %llu, nothing refers to it", U(s->id));
    if (s->id >= atomic_load(&c->v->next_extent))
        finding(c, "corrupt extent: %llu, number is above the next one", U(s->id));
}

/* A bitmap's item must be the bitmap in memory. */
static void see_space(struct check *c, const struct tree_iter *it)
{
    uint8_t used[REGION_UNITS / 8];
    uint64_t differ = 0;

    if (it->key.a >= c->nunits / REGION_UNITS || it->len != REGION_UNITS / 8) {
        finding(c, "corrupt free space: region %llu, behind the end or malformed", U(it->key.a));
        return;
    }
    if (!c->quiet)
        return;
    space_get_bitmap(c->v->space, it->key.a, used);
    for (unsigned i = 0; i < sizeof(used); i++)
        differ += (unsigned)__builtin_popcount(it->value[i] ^ used[i]);
    if (differ)
        finding(c, "corrupt free space: region %llu, %llu units differ from the state in memory", U(it->key.a),
                U(differ));
}

static void see_item(struct check *c, const struct tree_iter *it)
{
    struct seen_inode *s;

    switch ((enum item_kind)it->key.kind) {
    case ITEM_INODE:
        see_inode(c, it);
        break;
    case ITEM_DIRENT:
        see_dirent(c, it);
        break;
    case ITEM_XATTR:
        see_xattr(c, it);
        break;
    case ITEM_INLINE:
        see_inline(c, it);
        break;
    case ITEM_RANGE:
        see_range(c, it);
        break;
    case ITEM_ORPHAN:
    case ITEM_TRIM:
        s = owner(c, it, it->key.kind == ITEM_ORPHAN ? "orphan" : "trim");
        if (s)
            *(it->key.kind == ITEM_ORPHAN ? &s->orphan : &s->trim) = true;
        break;
    case ITEM_EXTENT:
        see_extent(c, it);
        break;
    case ITEM_SPACE:
        see_space(c, it);
        break;
    }
}

/* Ranges come before extents: a second walk over them counts references. */
static int count_references(struct check *c)
{
    struct tree_iter it;
    int rc = tree_iter_seek(c->v->tree, &(struct tree_key){.kind = ITEM_RANGE}, &it);

    for (; rc == 0 && it.key.kind == ITEM_RANGE; rc = tree_iter_next(&it)) {
        const struct disk_range *d = (const struct disk_range *)it.value;
        struct seen_extent *e = table_find(&c->extents, le64_get(d->extent));
        unsigned first = le16_get(d->first), count = le16_get(d->count);

        if (!e || first + count > e->chunks) {
            finding(c, "corrupt range: inode %llu, block %llu, extent %llu is missing or too short", U(it.key.a),
                    U(it.key.b), U(le64_get(d->extent)));
            continue;
        }
        for (unsigned i = first; i < first + count; i++)
            e->owed[i]--;
    }
    return rc == -ENOENT ? 0 : rc;
}

static int walk_items(struct check *c)
{
    struct tree_iter it;
    int rc = tree_iter_seek(c->v->tree, &(struct tree_key){0}, &it);

    for (; rc == 0; rc = tree_iter_next(&it))
        see_item(c, &it);
    return rc == -ENOENT ? 0 : rc;
}

/* --- after the walk --- */

static void expect(struct check *c, uint64_t ino, const char *what, uint64_t have, uint64_t want)
{
    if (have != want)
        finding(c, "corrupt inode: %llu, %s, have %llu expect %llu", U(ino), what, U(have), U(want));
}

static void check_dir(struct check *c, const struct seen_inode *s, const struct inode *i)
{
    bool root = i->ino == VOLUME_ROOT_INO;

    expect(c, i->ino, "names", s->names, root || s->orphan ? 0 : 1);
    expect(c, i->ino, "links", i->nlink, s->orphan ? 0 : 2 + s->subdirs);
    expect(c, i->ino, "entries", i->entries, s->entries);
    if (!s->orphan)
        expect(c, i->ino, "parent", i->parent, root ? VOLUME_ROOT_INO : s->named_by);
}

static void check_inode(struct check *c, const struct seen_inode *s)
{
    struct inode inode, *i = &inode;

    if (s->bad || inode_get(c->v, s->ino, i) < 0)
        return; /* reported by the walk */
    if (S_ISDIR(i->mode))
        check_dir(c, s, i);
    else
        expect(c, i->ino, "links", i->nlink, s->names);
    if (i->ino != VOLUME_ROOT_INO && (s->names == 0) != s->orphan)
        finding(c, "corrupt inode: %llu, has %u names and %s orphan item", U(i->ino), s->names,
                s->orphan ? "an" : "no");
    expect(c, i->ino, "blocks", i->blocks, s->blocks);
    expect(c, i->ino, "attributes", i->xattrs, s->xattrs);
    if (S_ISLNK(i->mode))
        expect(c, i->ino, "target's length", s->inline_len, i->size);
    if (s->has_inline && S_ISREG(i->mode) && (s->inline_len > i->size || i->size > INLINE_MAX))
        finding(c, "corrupt inode: %llu, inline content of %llu bytes, size %llu", U(i->ino), U(s->inline_len),
                U(i->size));
    if (!s->trim && s->next_block > (i->size + c->v->block - 1) / c->v->block)
        finding(c, "corrupt inode: %llu, has blocks behind its end", U(i->ino));
    if (i->ino >= c->v->next_inode)
        finding(c, "corrupt inode: %llu, number is above the next one, %llu", U(i->ino), U(c->v->next_inode));
}

static void check_extent(struct check *c, const struct seen_extent *s)
{
    for (unsigned i = 0; i < s->chunks; i++) {
        if (s->owed[i])
            finding(c, "corrupt extent: %llu, references of chunk %u, have %d more than ranges", U(s->id), i,
                    (int16_t)s->owed[i]);
    }
}

static void check_tables(struct check *c)
{
    if (!table_find(&c->inodes, VOLUME_ROOT_INO))
        finding(c, "corrupt volume: the root directory is missing");
    for (size_t i = 0; i < c->inodes.n; i++)
        check_inode(c, (const struct seen_inode *)(c->inodes.at + i * c->inodes.size));
    for (size_t i = 0; i < c->extents.n; i++)
        check_extent(c, (const struct seen_extent *)(c->extents.at + i * c->extents.size));
    if (c->inodes.n != c->v->inodes)
        finding(c, "corrupt volume: inodes, have %llu expect %zu", U(c->v->inodes), c->inodes.n);
}

/* [state shared] */
static void check_structure(struct check *c)
{
    int before = c->findings, rc;

    c->quiet = tree_dirty_nodes(c->v->tree) == 0 && !space_has_pending(c->v->space);
    c->nunits = space_regions(c->v->space) * REGION_UNITS;
    c->units = xcalloc(1, c->nunits / 8);
    for (unsigned i = 0; i < SUPER_SLOTS * SUPER_COPIES; i++)
        use_units(c, SUPER_UNIT(i % SUPER_SLOTS, i / SUPER_SLOTS), 1, "superblock", i);
    tree_visit(c->v->tree, visit_node, c);
    if (c->findings > before) {
        finding(c, "the tree is damaged: what hangs on the damaged nodes was not checked");
        return;
    }
    rc = walk_items(c);
    if (rc == 0)
        rc = count_references(c);
    if (rc < 0) {
        finding(c, "the tree cannot be walked: %s", strerror(-rc));
        return;
    }
    check_tables(c);
    if (c->quiet)
        check_units(c);
    else
        c->line(c->ctx, "note: the volume was changed all the time; free space was not compared");
}

/* --- content --- */

static int reload_extent(struct volume *v, uint64_t id, struct extent *ret)
{
    struct tree_key key = tree_key(ITEM_EXTENT, id, 0);
    const uint8_t *value;
    size_t len;
    int rc;

    pthread_rwlock_rdlock(&v->state);
    rc = tree_get(v->tree, &key, &value, &len);
    if (rc == 0)
        rc = extent_decode(id, value, len, ret);
    pthread_rwlock_unlock(&v->state);
    return rc;
}

static bool readable(struct check *c, const struct extent *e, unsigned first, unsigned n, uint8_t *plain)
{
    return extent_read(c->v->keys, c->v->data, e, c->v->block, first, n, plain) == 0;
}

/* Reads each row of chunks that are in use; where that fails, one by one. plain: EXTENT_BYTES. */
static void check_content(struct check *c, uint64_t id, uint8_t *plain)
{
    struct extent e, now;

    if (reload_extent(c->v, id, &e) < 0)
        return; /* freed since the walk */
    for (unsigned i = 0, n; i < e.chunks; i += n) {
        for (n = 0; i + n < e.chunks && e.ref[i + n]; n++)
            ;
        if (n == 0 || readable(c, &e, i, n, plain)) {
            n += n == 0;
            continue;
        }
        for (unsigned k = i; k < i + n; k++) {
            /* Perhaps its units went to somebody else while it was read: then it is freed by now. */
            if (!readable(c, &e, k, 1, plain) && reload_extent(c->v, id, &now) == 0 && now.ref[k])
                finding(c, "corrupt data: extent %llu chunk %u at unit %llu does not authenticate or cannot be read",
                        U(id), k, U(e.addr + (uint64_t)k * c->v->block_units));
        }
    }
}

static void check_contents(struct check *c)
{
    uint8_t *plain = xmalloc(EXTENT_BYTES);

    for (size_t i = 0; i < c->extents.n; i++)
        check_content(c, ((const struct seen_extent *)(c->extents.at + i * c->extents.size))->id, plain);
    explicit_bzero(plain, EXTENT_BYTES);
    free(plain);
}

int volume_check(struct volume *v, bool data, void (*line)(void *ctx, const char *text), void *ctx)
{
    struct check c = {.v = v,
                      .line = line,
                      .ctx = ctx,
                      .inodes = {.size = sizeof(struct seen_inode)},
                      .extents = {.size = sizeof(struct seen_extent)}};

    for (int tries = 0;; tries++) {
        if (!v->read_only && !v->failed)
            volume_checkpoint(v);
        pthread_rwlock_rdlock(&v->state);
        if (tree_dirty_nodes(v->tree) == 0 || tries == 5)
            break;
        pthread_rwlock_unlock(&v->state);
    }
    check_structure(&c);
    pthread_rwlock_unlock(&v->state);
    if (data)
        check_contents(&c);
    free(c.inodes.at);
    free(c.extents.at);
    free(c.units);
    volume_trim(v);
    return c.findings;
}
