/*
 * check.c - volume_check: everything that must hold between items, and between the tree and the bitmaps.
 *
 * One walk over all items in key order fills two tables (inodes, extents) and a map of used units; then each table is held
 * against what its items claim. Item kinds come in the order of format.h, so inodes are known before what belongs to them.
 * Content is read afterwards, without the lock.
 */
#include "fs/volume/names.h"
#include "fs/volume/space.h"

#include <stdio.h>
#include <stdlib.h>

struct seen_inode {
    struct inode inode;
    uint64_t names, subdirs, entries, blocks, xattrs, inline_len;
    uint64_t next_block; /* end of the last range */
    bool orphan, trim, has_inline;
};

struct seen_extent {
    uint64_t id;
    struct extent extent;
    uint16_t used[EXTENT_CHUNKS_MAX];
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
    uint8_t *units; /* bitmap: seen in use */
    uint64_t nunits;
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

_Static_assert(offsetof(struct seen_inode, inode.ino) == 0 && offsetof(struct seen_extent, id) == 0,
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

    for (uint64_t u = 0; u < c->nunits; u++) {
        bool seen = c->units[u / 8] >> (u % 8) & 1, used = space_is_used(c->v, u);

        if (used && !seen && leaked++ == 0)
            first_leaked = u;
        if (!used && seen && missing++ == 0)
            first_missing = u;
    }
    if (leaked)
        finding(c, "free space: %llu units are marked used but nothing uses them, the first is %llu", U(leaked),
                U(first_leaked));
    if (missing)
        finding(c, "free space: %llu units are in use but marked free, the first is %llu", U(missing),
                U(first_missing));
}

/* --- items --- */

static void see_inode(struct check *c, const struct tree_iter *it)
{
    struct seen_inode *s = table_add(&c->inodes);

    if (inode_decode(it->key.a, it->value, it->len, &s->inode) < 0) {
        finding(c, "corrupt inode: %llu, malformed item", U(it->key.a));
        s->inode.ino = it->key.a;
    }
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
    if (dir && !S_ISDIR(dir->inode.mode))
        finding(c, "corrupt directory entry: its directory %llu is none", U(it->key.a));
    if (dir)
        dir->entries++;
    if (!target) {
        finding(c, "corrupt directory entry: in %llu, names the missing inode %llu", U(it->key.a), U(le64_get(d->ino)));
        return;
    }
    target->names++;
    if ((target->inode.mode & S_IFMT) >> 12 != d->type)
        finding(c, "corrupt directory entry: in %llu, type have %u expect %u", U(it->key.a), d->type,
                (target->inode.mode & S_IFMT) >> 12);
    if (S_ISDIR(target->inode.mode) && dir) {
        dir->subdirs++;
        if (target->inode.parent != it->key.a)
            finding(c, "corrupt inode: %llu, parent have %llu expect %llu", U(target->inode.ino),
                    U(target->inode.parent), U(it->key.a));
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
    s->inline_len = it->len;
    if (!S_ISLNK(s->inode.mode) && !(s->inode.flags & INODE_INLINE))
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
    if (!S_ISREG(s->inode.mode) || (s->inode.flags & INODE_INLINE))
        finding(c, "corrupt range: inode %llu is not a file of blocks", U(it->key.a));
}

static void see_extent(struct check *c, const struct tree_iter *it)
{
    struct seen_extent *s = table_add(&c->extents);

    s->id = it->key.a;
    if (extent_decode(it->key.a, it->value, it->len, &s->extent) < 0) {
        finding(c, "corrupt extent: %llu, malformed item", U(it->key.a));
        return;
    }
    for (unsigned i = 0; i < s->extent.chunks; i++) {
        if (s->extent.ref[i])
            use_units(c, s->extent.addr + (uint64_t)i * c->v->block_units, c->v->block_units, "extent", s->id);
    }
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
        break; /* check_units compares what was loaded from them */
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

        if (!e || first + count > e->extent.chunks) {
            finding(c, "corrupt range: inode %llu, block %llu, extent %llu is missing or too short", U(it.key.a),
                    U(it.key.b), U(le64_get(d->extent)));
            continue;
        }
        for (unsigned i = first; i < first + count; i++)
            e->used[i]++;
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

static void check_inode(struct check *c, const struct seen_inode *s)
{
    const struct inode *i = &s->inode;
    bool dir = S_ISDIR(i->mode), root = i->ino == VOLUME_ROOT_INO;

    if (dir) {
        expect(c, i->ino, "names", s->names, root || s->orphan ? 0 : 1);
        expect(c, i->ino, "links", i->nlink, s->orphan ? 0 : 2 + s->subdirs);
        expect(c, i->ino, "entries", i->entries, s->entries);
    } else {
        expect(c, i->ino, "links", i->nlink, s->names);
    }
    if (!root && (s->names == 0) != s->orphan)
        finding(c, "corrupt inode: %llu, has %llu names and %s orphan item", U(i->ino), U(s->names),
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
    for (unsigned i = 0; i < s->extent.chunks; i++) {
        if (s->extent.ref[i] != s->used[i])
            finding(c, "corrupt extent: %llu, references of chunk %u, have %u expect %u", U(s->id), i,
                    s->extent.ref[i], s->used[i]);
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
    bool space = tree_dirty_nodes(c->v->tree) == 0 && !space_has_pending(c->v->space);
    int before = c->findings, rc;

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
    if (space)
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

/* Reads the chunks that are in use, one by one where the whole cannot be read. */
static void check_content(struct check *c, uint64_t id)
{
    uint8_t *plain = xmalloc(EXTENT_BYTES);
    struct extent e;

    if (reload_extent(c->v, id, &e) < 0)
        goto out; /* freed since the walk */
    for (unsigned i = 0; i < e.chunks; i++) {
        struct extent now;

        if (!e.ref[i] || extent_read(c->v->keys, c->v->data, &e, c->v->block, i, 1, plain) == 0)
            continue;
        /* Perhaps its units went to somebody else while it was read. */
        if (reload_extent(c->v, id, &now) == 0 && now.ref[i])
            finding(c, "corrupt data: extent %llu chunk %u at unit %llu does not authenticate or cannot be read", U(id),
                    i, U(e.addr + (uint64_t)i * c->v->block_units));
    }
out:
    explicit_bzero(plain, EXTENT_BYTES);
    free(plain);
}

int volume_check(struct volume *v, bool data, void (*line)(void *ctx, const char *text), void *ctx)
{
    struct check c = {.v = v, .line = line, .ctx = ctx, .inodes = {.size = sizeof(struct seen_inode)},
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
    for (size_t i = 0; data && i < c.extents.n; i++)
        check_content(&c, ((const struct seen_extent *)(c.extents.at + i * c.extents.size))->id);
    free(c.inodes.at);
    free(c.extents.at);
    free(c.units);
    volume_trim(v);
    return c.findings;
}
