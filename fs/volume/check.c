/*
 * check.c - volume_check: everything that must hold between items, and between the tree and the bitmaps.
 *
 * One walk over all items in key order fills two tables (inodes, extents) and a map of used units; then each table is
 * held against what its items claim. Item kinds come in the order of format.h, so inodes are known before what belongs
 * to them. Content is read afterwards, without the lock.
 *
 * Snapshots are held to the same, each by itself; but content that was read once is not read again.
 *
 * Memory: 72 bytes an inode, 48 an extent, two bits a unit. So the tables keep what was counted, not the items: those are
 * looked up again.
 */
#include "fs/volume/names.h"
#include "fs/volume/table.h"
#include "fs/volume/view.h"

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

struct check {
    struct volume *v;
    struct view view;
    const struct volume_report *report;
    int findings;
    struct table inodes, extents;
    uint8_t *units; /* bitmap: seen in use */
    uint64_t nunits, seen_units;
    uint64_t leaked, missing, first_leaked, first_missing; /* of the bitmaps */
    uint64_t regions;
    uint64_t done;  /* bytes of content read */
    uint8_t *good;  /* bitmap of units whose content authenticated, in whichever state: what is held keeps its place */
    uint64_t ngood; /* bits of it */
    const char *snapshot; /* NULL: the volume itself */
};

static void say(void *ctx, const char *text)
{
    struct check *c = ctx;
    char line[sizeof("snapshot : ") + SNAPSHOT_NAME_MAX + 256];

    if (c->snapshot) {
        snprintf(line, sizeof(line), "snapshot %s: %s", c->snapshot, text);
        text = line;
    }
    c->report->line(c->report->ctx, text);
}

__attribute__((format(printf, 2, 3))) static void finding(struct check *c, const char *fmt, ...)
{
    char text[256];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    c->findings++;
    say(c, text);
}

#define U(x) ((unsigned long long)(x))

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
    if (c->leaked)
        finding(c, "free space: %llu units are marked used but nothing uses them, the first is %llu", U(c->leaked),
                U(c->first_leaked));
    if (c->missing)
        finding(c, "free space: %llu units are in use but marked free, the first is %llu", U(c->missing),
                U(c->first_missing));
    if (c->view.used_units != c->seen_units)
        finding(c, "free space: used units, have %llu expect %llu", U(c->view.used_units), U(c->seen_units));
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
    if (s->id >= c->view.next_extent)
        finding(c, "corrupt extent: %llu, number is above the next one", U(s->id));
}

/* SPACE items come last: all units in use have been seen. */
static void see_space(struct check *c, const struct tree_iter *it)
{
    uint64_t first = it->key.a * REGION_UNITS;

    if (it->key.a >= c->view.regions || it->len != REGION_UNITS / 8) {
        finding(c, "corrupt free space: region %llu, behind the end or malformed", U(it->key.a));
        return;
    }
    for (uint64_t i = 0; i < REGION_UNITS / 8; i++) {
        uint8_t seen = c->units[first / 8 + i], used = it->value[i];

        for (unsigned k = 0; k < 8 && seen != used; k++) {
            if ((used & ~seen) >> k & 1 && c->leaked++ == 0)
                c->first_leaked = first + i * 8 + k;
            if ((seen & ~used) >> k & 1 && c->missing++ == 0)
                c->first_missing = first + i * 8 + k;
        }
    }
    c->regions++;
}

static int see_item(void *ctx, const struct tree_iter *it)
{
    struct check *c = ctx;
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
    case ITEM_SNAPSHOT:
        break; /* the node's check, and the snapshot's own */
    }
    return volume_report_stop(c->report) ? -ECANCELED : 0;
}

/* Ranges come before extents: a second walk over them counts references. */
static int count_reference(void *ctx, const struct tree_iter *it)
{
    const struct disk_range *d = (const struct disk_range *)it->value;
    unsigned first = le16_get(d->first), count = le16_get(d->count);
    struct check *c = ctx;
    struct seen_extent *e;

    if (it->key.kind != ITEM_RANGE)
        return 1;
    if (le64_get(d->extent) == EXTENT_LOST)
        return 0;
    e = table_find(&c->extents, le64_get(d->extent));
    if (!e || first + count > e->chunks)
        finding(c, "corrupt range: inode %llu, block %llu, extent %llu is missing or too short", U(it->key.a),
                U(it->key.b), U(le64_get(d->extent)));
    for (unsigned i = first; e && i < MIN(first + count, e->chunks); i++)
        e->owed[i]--;
    return 0;
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

    if (s->bad || view_inode(&c->view, s->ino, i) < 0)
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
    if (i->ino >= c->view.next_inode)
        finding(c, "corrupt inode: %llu, number is above the next one, %llu", U(i->ino), U(c->view.next_inode));
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
    if (c->inodes.n != c->view.inodes)
        finding(c, "corrupt volume: inodes, have %llu expect %zu", U(c->view.inodes), c->inodes.n);
}

/* 0, or an error that says nothing about the volume. */
static int check_structure(struct check *c)
{
    int before = c->findings, rc;

    c->nunits = c->view.regions * REGION_UNITS;
    c->units = xcalloc(1, c->nunits / 8);
    for (unsigned i = 0; i < SUPER_SLOTS * SUPER_COPIES; i++)
        use_units(c, SUPER_UNIT(i % SUPER_SLOTS, i / SUPER_SLOTS), 1, "superblock", i);
    rc = tree_visit(c->view.tree, visit_node, c);
    if (rc < 0)
        return rc;
    if (c->findings > before) {
        finding(c, "the tree is damaged: what hangs on the damaged nodes was not checked");
        return 0;
    }
    rc = view_walk(&c->view, &(struct tree_key){0}, see_item, c);
    if (rc == 0)
        rc = view_walk(&c->view, &(struct tree_key){.kind = ITEM_RANGE}, count_reference, c);
    if (rc == -ECANCELED)
        return rc;
    if (rc < 0) {
        finding(c, "the tree cannot be walked: %s", strerror(-rc));
        return 0;
    }
    check_tables(c);
    if (c->view.exact && c->regions != c->view.regions)
        finding(c, "free space: regions with a bitmap, have %llu expect %llu", U(c->regions), U(c->view.regions));
    if (c->view.exact)
        check_units(c);
    return 0;
}

/* --- content --- */

static bool is_good(const struct check *c, uint64_t unit)
{
    return unit < c->ngood && c->good[unit / 8] >> (unit % 8) & 1;
}

static void set_good(struct check *c, const struct extent *e, unsigned first, unsigned n)
{
    for (uint64_t u = e->addr + (uint64_t)first * c->v->block_units, end = u + (uint64_t)n * c->v->block_units;
         u < end && u < c->ngood; u++)
        c->good[u / 8] |= (uint8_t)(1u << (u % 8));
}

/* Reads each row of chunks that are in use, and not known to be good; where that fails, one by one. plain: EXTENT_BYTES. */
static void check_content(struct check *c, uint64_t id, uint8_t *plain)
{
    struct extent e, now;

    view_lock(&c->view);
    if (view_extent(&c->view, id, &e) < 0)
        e.chunks = 0; /* reported by the walk */
    view_unlock(&c->view);
    for (unsigned i = 0, n; i < e.chunks; i += n) {
        for (n = 0; i + n < e.chunks && e.ref[i + n] && !is_good(c, e.addr + (uint64_t)(i + n) * c->v->block_units);
             n++)
            ;
        if (n == 0) {
            c->done += e.ref[i] ? c->v->block : 0;
            n = 1;
            continue;
        }
        c->done += (uint64_t)n * c->v->block;
        if (extent_read(c->v->keys, c->v->data, &e, c->v->block, i, n, plain) == 0) {
            set_good(c, &e, i, n);
            continue;
        }
        for (unsigned k = i; k < i + n; k++) {
            if (extent_read(c->v->keys, c->v->data, &e, c->v->block, k, 1, plain) == 0) {
                set_good(c, &e, k, 1);
                continue;
            }
            view_lock(&c->view);
            if (!view_stale(&c->view) && view_extent(&c->view, id, &now) == 0)
                finding(c, "corrupt data: extent %llu chunk %u at unit %llu does not authenticate or cannot be read",
                        U(id), k, U(e.addr + (uint64_t)k * c->v->block_units));
            view_unlock(&c->view);
        }
    }
}

static int check_contents(struct check *c)
{
    uint8_t *plain = xmalloc(EXTENT_BYTES);
    int rc = 0;

    for (size_t i = 0; i < c->extents.n && rc == 0; i++) {
        check_content(c, ((const struct seen_extent *)(c->extents.at + i * c->extents.size))->id, plain);
        volume_report_progress(c->report, MIN(c->done, c->view.used_units * UNIT_BYTES),
                               c->view.used_units * UNIT_BYTES);
        rc = volume_report_stop(c->report) ? -ECANCELED : 0;
    }
    explicit_bzero(plain, EXTENT_BYTES);
    free(plain);
    return rc;
}

/* --- the whole --- */

/* The state of c->view, which is closed. 0, -ECANCELED, -EBUSY. */
static int check_view(struct check *c, bool data)
{
    int rc;

    c->findings += view_check_super(&c->view, say, c);
    view_lock(&c->view);
    rc = check_structure(c);
    view_unlock(&c->view);
    if (rc == 0 && data && !c->good) {
        c->ngood = c->nunits;
        c->good = xcalloc(1, c->ngood / 8 + 1);
    }
    if (rc == 0 && data)
        rc = check_contents(c);
    if (rc == 0 && view_stale(&c->view))
        rc = -EBUSY; /* the space of what was being checked was needed */
    view_close(&c->view);
    table_free(&c->inodes);
    table_free(&c->extents);
    free(c->units);
    return rc;
}

static struct check check_new(struct volume *v, const struct volume_report *report)
{
    return (struct check){.v = v,
                          .report = report,
                          .inodes = {.size = sizeof(struct seen_inode)},
                          .extents = {.size = sizeof(struct seen_extent)}};
}

struct names {
    char (*name)[VOLUME_SNAPSHOT_NAME + 1];
    size_t n;
};

static int add_name(void *ctx, const struct volume_snapshot *s)
{
    struct names *l = ctx;

    l->name = xrealloc(l->name, (l->n + 1) * sizeof(*l->name));
    memcpy(l->name[l->n++], s->name, sizeof(s->name));
    return 0;
}

/* The snapshots of a volume that is not damaged so that the list cannot be read. `all` goes on counting. */
static int check_snapshots(struct check *all, bool data)
{
    struct names list = {0};
    int rc = volume_snapshot_list(all->v, add_name, &list);

    if (rc < 0)
        finding(all, "corrupt node: the list of snapshots cannot be read");
    rc = 0;
    for (size_t i = 0; i < list.n && rc == 0; i++) {
        struct check c = check_new(all->v, all->report);

        c.snapshot = list.name[i];
        c.good = all->good;
        c.ngood = all->ngood;
        rc = view_open_snapshot(c.v, c.snapshot, &c.view);
        if (rc == 0)
            rc = check_view(&c, data);
        else if (rc == -EIO)
            finding(&c, "its tree's root does not authenticate or cannot be read");
        rc = rc == -ENOENT || rc == -EIO ? 0 : rc; /* gone meanwhile, or said */
        all->findings += c.findings;
    }
    free(list.name);
    return rc;
}

int volume_check_report(struct volume *v, bool data, const struct volume_report *report)
{
    struct check c = check_new(v, report);
    int rc = view_open(v, true, &c.view);

    if (rc < 0) {
        finding(&c, "corrupt node: the tree's root does not authenticate or cannot be read");
        return c.findings;
    }
    rc = check_view(&c, data);
    if (rc == 0)
        rc = check_snapshots(&c, data);
    free(c.good);
    volume_trim(v);
    return rc < 0 ? rc : c.findings;
}

int volume_check(struct volume *v, bool data, void (*line)(void *ctx, const char *text), void *ctx)
{
    return volume_check_report(v, data, &(struct volume_report){.line = line, .ctx = ctx});
}
