/*
 * repair.c - makes a damaged volume whole again, out of what authenticates and nothing else. Runs inside volume_open,
 * before anybody else can see the volume.
 *
 * 1. Nodes of the newest superblock's tree that cannot be opened are replaced by empty ones (tree_prune). Which keys
 * they held is remembered. The bitmaps are made anew from what is reachable.
 * 2. The log is replayed onto that. Where a durable record is damaged, it and what follows are dropped.
 * 3. Items are held against each other, kind by kind, and changed in memory: what belongs to a missing inode goes;
 * entries of missing inodes go; inodes without a name are put into /lost+found; counts are made to agree.
 * 4. Blocks whose content or whose place is lost become ranges of EXTENT_LOST, so that reading them is an error, not
 * zeroes.
 * 5. One checkpoint makes all of it durable at once: until then the files are as they were.
 *
 * Nothing is invented, with two exceptions, both reported: a root directory (0700, root) where that inode is lost, and
 * lost+found. Memory: 168 bytes an inode, 56 an extent, and all nodes that change.
 */
#include "fs/volume/repair.h"

#include "fs/volume/names.h"
#include "fs/volume/space.h"
#include "fs/volume/table.h"

#include <stdio.h>

struct fixed_inode {
    uint64_t ino;
    struct inode i; /* as the item has it */
    uint64_t blocks, entries, named_by, next_block;
    uint32_t names, subdirs, xattrs;
    uint16_t inline_len;
    bool gone, orphan, trim, has_inline, made;
};

struct fixed_extent {
    uint64_t id;
    uint16_t ref[EXTENT_CHUNKS_MAX]; /* ranges that need the chunk */
    uint16_t bad;                    /* chunks that do not authenticate: one bit each */
    uint8_t chunks;
};

struct repair {
    struct volume *v;
    const struct volume_report *report;
    int lines;
    struct lost_keys {
        struct tree_key lo, hi; /* hi is not lost */
    } * lost;
    size_t nlost;
    uint8_t *nodes, *want; /* bitmaps of units: nodes of the old tree; extents that stay */
    uint64_t nunits;
    struct table inodes, extents;
    uint64_t lost_found; /* inode, or 0 */
    uint64_t done;
    uint8_t plain[EXTENT_BYTES];
};

#define U(x) ((unsigned long long)(x))

__attribute__((format(printf, 2, 3))) static void say(struct repair *r, const char *fmt, ...)
{
    char text[256];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    r->lines++;
    r->report->line(r->report->ctx, text);
}

static bool bit(const uint8_t *map, uint64_t u)
{
    return map[u / 8] >> (u % 8) & 1;
}

static int set_units(struct repair *r, uint8_t *map, uint64_t addr, uint64_t n)
{
    if (addr >= r->nunits || n > r->nunits - addr)
        return -EUCLEAN;
    for (uint64_t u = addr; u < addr + n; u++)
        map[u / 8] |= (uint8_t)(1u << (u % 8));
    return 0;
}

/* --- walking while changing --- */

static void key_step(struct tree_key *k)
{
    if (++k->b == 0)
        k->a++;
}

/* Calls fn for each item of a kind; fn may change the tree: the value is a copy. Where fn returns n > 0, n keys are
 * done. */
static int each(struct repair *r, enum item_kind kind,
                int (*fn)(struct repair *r, const struct tree_key *key, const uint8_t *value, size_t len))
{
    struct tree_key at = tree_key(kind, 0, 0), key;
    uint8_t copy[ITEM_VALUE_MAX];
    const uint8_t *value;
    size_t len;
    int rc;

    for (unsigned n = 0;; n++) {
        rc = tree_ge(r->v->tree, &at, &key, &value, &len);
        if (rc < 0 || key.kind != kind)
            return rc == -ENOENT || rc == 0 ? 0 : rc;
        memcpy(copy, value, len);
        rc = fn(r, &key, copy, len);
        if (rc == 0 && volume_report_stop(r->report))
            rc = -ECANCELED;
        if (rc < 0)
            return rc;
        at = key;
        at.b += rc > 0 ? (uint64_t)rc - 1 : 0;
        key_step(&at);
        if (n % 1024 == 0 && tree_wants_trim(r->v->tree))
            tree_trim(r->v->tree);
    }
}

static int del(struct repair *r, const struct tree_key *key)
{
    return tree_del(r->v->tree, key);
}

static int put(struct repair *r, enum item_kind kind, uint64_t a, uint64_t b, const void *value, size_t len)
{
    struct tree_key key = tree_key(kind, a, b);

    return tree_put(r->v->tree, &key, value, len);
}

static struct fixed_inode *inode_of(struct repair *r, uint64_t ino)
{
    struct fixed_inode *f = table_find(&r->inodes, ino);

    return f && !f->gone ? f : NULL;
}

/* --- 1: what is reachable --- */

static void on_lost(void *ctx, uint64_t addr, unsigned level, const struct tree_key *lo, const struct tree_key *hi)
{
    struct repair *r = ctx;

    r->lost = xrealloc(r->lost, (r->nlost + 1) * sizeof(*r->lost));
    r->lost[r->nlost++] = (struct lost_keys){*lo, *hi};
    say(r, "lost: the tree node at unit %llu, level %u", U(addr), level);
}

static bool was_lost(const struct repair *r, const struct tree_key *key)
{
    for (size_t i = 0; i < r->nlost; i++)
        if (tree_key_cmp(&r->lost[i].lo, key) <= 0 && tree_key_cmp(key, &r->lost[i].hi) < 0)
            return true;
    return false;
}

static int see_node(void *ctx, uint64_t addr, unsigned level, int err)
{
    struct repair *r = ctx;

    (void)level, (void)err;
    return set_units(r, r->nodes, addr, NODE_UNITS);
}

static int commit_units(struct repair *r, const uint8_t *map)
{
    for (uint64_t u = 0; u < r->nunits; u++) {
        int rc = bit(map, u) && !space_is_used(r->v->space, u) ? space_commit(r->v->space, u, 1) : 0;

        if (rc < 0)
            return rc;
    }
    return 0;
}

static int want_extent(struct repair *r, const struct tree_key *key, const uint8_t *value, size_t len)
{
    struct extent e;

    if (extent_decode(key->a, value, len, &e) < 0) {
        say(r, "dropped: the malformed extent %llu", U(key->a));
        return del(r, key);
    }
    for (unsigned i = 0; i < e.chunks; i++) {
        uint64_t at = e.addr + (uint64_t)i * r->v->block_units;
        int rc = e.ref[i] ? set_units(r, r->want, at, r->v->block_units) : 0;

        if (rc < 0)
            return rc;
    }
    return 0;
}

int repair_load(struct volume *v, struct repair **ret_repair)
{
    struct repair *r = xcalloc(1, sizeof(*r));
    uint64_t regions = space_regions(v->space);
    int rc;

    *ret_repair = r;
    r->v = v;
    r->report = v->options.repair;
    r->nunits = regions * REGION_UNITS;
    r->nodes = xcalloc(1, r->nunits / 8);
    r->want = xcalloc(1, r->nunits / 8);
    r->inodes.size = sizeof(struct fixed_inode);
    r->extents.size = sizeof(struct fixed_extent);
    if (v->data->ops->size(v->data) < (int64_t)(regions * REGION_BYTES)) {
        say(r, "lost: the end of `data`, which is shorter than the volume");
        rc = v->data->ops->grow(v->data, regions * REGION_BYTES);
        if (rc < 0)
            return rc;
    }
    for (unsigned i = 0; i < SUPER_SLOTS * SUPER_COPIES; i++)
        set_units(r, r->nodes, SUPER_UNIT(i % SUPER_SLOTS, i / SUPER_SLOTS), 1);
    rc = tree_visit(v->tree, see_node, r);
    if (rc == 0)
        rc = tree_prune(v->tree, on_lost, r);
    if (rc == 0)
        rc = each(r, ITEM_EXTENT, want_extent);
    if (rc == 0)
        rc = commit_units(r, r->nodes);
    if (rc == 0)
        rc = commit_units(r, r->want);
    return rc;
}

void repair_log_cut(struct repair *r, uint64_t sequence, uint64_t dropped)
{
    say(r, "lost: log record %llu, which was durable; %llu records after it are dropped", U(sequence), U(dropped));
}

/* --- 3: extents and inodes --- */

static int see_extent(struct repair *r, const struct tree_key *key, const uint8_t *value, size_t len)
{
    struct fixed_extent *f = table_add(&r->extents);
    struct volume *v = r->v;
    struct extent e;

    f->id = key->a;
    if (extent_decode(key->a, value, len, &e) == 0) {
        f->chunks = e.chunks;
        for (unsigned i = 0; i < e.chunks; i++) {
            r->done += v->block;
            if (!e.ref[i] || extent_read(v->keys, v->data, &e, v->block, i, 1, r->plain) < 0)
                f->bad |= (uint16_t)(1u << i);
        }
    }
    volume_report_progress(r->report, r->done, MAX(r->done, space_used(v->space) * UNIT_BYTES));
    return 0;
}

static int see_inode(struct repair *r, const struct tree_key *key, const uint8_t *value, size_t len)
{
    struct fixed_inode *f;
    struct inode i;

    if (inode_decode(key->a, value, len, &i) < 0) {
        say(r, "dropped: the malformed inode %llu", U(key->a));
        return del(r, key);
    }
    f = table_add(&r->inodes);
    f->ino = key->a;
    f->i = i;
    return 0;
}

static int make_root(struct repair *r)
{
    int64_t now = now_ns();
    struct inode root = {.ino = VOLUME_ROOT_INO,
                         .mode = S_IFDIR | 0700,
                         .nlink = 2,
                         .atime = now,
                         .mtime = now,
                         .ctime = now,
                         .btime = now,
                         .parent = VOLUME_ROOT_INO,
                         .generation = 1};
    struct tree_key key = tree_key(ITEM_INODE, VOLUME_ROOT_INO, 0);
    struct disk_inode value;
    const uint8_t *old;
    size_t len;

    if (tree_get(r->v->tree, &key, &old, &len) == 0)
        return 0;
    say(r, "lost: owner, mode and attributes of the root directory; it is root's, mode 0700, now");
    inode_encode(&root, &value);
    return tree_put(r->v->tree, &key, &value, sizeof(value));
}

/* --- 3: what belongs to inodes --- */

/* The owner of an item; where it is missing the item goes, with one line for an inode's items of a kind. */
static int owned(struct repair *r, const struct tree_key *key, const char *what, struct fixed_inode **ret)
{
    struct tree_key before = *key, have;
    const uint8_t *value;
    size_t len;

    *ret = inode_of(r, key->a);
    if (*ret)
        return 0;
    before.b = UINT64_MAX;
    /* The last of them says it. */
    if (tree_le(r->v->tree, &before, &have, &value, &len) == 0 && tree_key_cmp(&have, key) == 0)
        say(r, "dropped: %s of the lost inode %llu", what, U(key->a));
    return del(r, key);
}

static int see_inline(struct repair *r, const struct tree_key *key, const uint8_t *value, size_t len)
{
    struct fixed_inode *f;
    int rc = owned(r, key, "content", &f);

    (void)value;
    if (rc < 0 || !f)
        return rc;
    if (!S_ISLNK(f->i.mode) && !(S_ISREG(f->i.mode) && f->i.flags & INODE_INLINE)) {
        say(r, "dropped: inline content of inode %llu, which has none", U(key->a));
        return del(r, key);
    }
    f->has_inline = true;
    f->inline_len = (uint16_t)len;
    return 0;
}

/* Symlinks whose target is gone go before entries are looked at. */
static int drop_symlinks(struct repair *r)
{
    for (size_t i = 0; i < r->inodes.n; i++) {
        struct fixed_inode *f = (struct fixed_inode *)(r->inodes.at + i * r->inodes.size);
        struct tree_key key = tree_key(ITEM_INODE, f->ino, 0);
        int rc;

        if (!S_ISLNK(f->i.mode) || (f->has_inline && f->inline_len == f->i.size))
            continue;
        say(r, "dropped: the symlink inode %llu, whose target is lost", U(f->ino));
        f->gone = true;
        rc = del(r, &key);
        key.kind = ITEM_INLINE;
        if (rc == 0 && f->has_inline)
            rc = del(r, &key);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int see_dirent(struct repair *r, const struct tree_key *key, const uint8_t *value, size_t len)
{
    const struct disk_dirent *d = (const struct disk_dirent *)value;
    struct fixed_inode *dir, *target = inode_of(r, le64_get(d->ino));
    int rc = owned(r, key, "entries", &dir);

    (void)len;
    if (rc < 0 || !dir)
        return rc;
    if (!target)
        say(r, "dropped: an entry of directory %llu, whose inode %llu is lost", U(key->a), U(le64_get(d->ino)));
    else if (!S_ISDIR(dir->i.mode) || (target->i.mode & S_IFMT) >> 12 != d->type ||
             (S_ISDIR(target->i.mode) && (target->names || target->ino == VOLUME_ROOT_INO)))
        say(r, "dropped: an impossible entry of inode %llu for inode %llu", U(key->a), U(le64_get(d->ino)));
    else
        goto keep;
    if (dir->i.entries)
        dir->i.entries--; /* what is missing besides is lost unseen */
    dir->made = true;
    return del(r, key);
keep:
    target->names++;
    dir->entries++;
    if (S_ISDIR(target->i.mode)) {
        target->named_by = key->a;
        dir->subdirs++;
    }
    return 0;
}

static int see_xattr(struct repair *r, const struct tree_key *key, const uint8_t *value, size_t len)
{
    struct fixed_inode *f;
    int rc = owned(r, key, "attributes", &f);

    (void)value, (void)len;
    if (rc == 0 && f)
        f->xattrs++;
    return rc;
}

static int see_mark(struct repair *r, const struct tree_key *key, const uint8_t *value, size_t len)
{
    struct fixed_inode *f = inode_of(r, key->a);

    (void)value, (void)len;
    if (!f)
        return del(r, key); /* an inode that was going anyway */
    *(key->kind == ITEM_ORPHAN ? &f->orphan : &f->trim) = true;
    return 0;
}

/* --- 4: blocks --- */

static int put_lost(struct repair *r, uint64_t ino, uint64_t block, uint64_t count)
{
    int rc = 0;

    while (count && rc == 0) {
        uint64_t n = MIN(count, RANGE_LOST_MAX);
        struct disk_range d = {.extent = le64_make(EXTENT_LOST), .count = le16_make((uint16_t)n)};

        rc = put(r, ITEM_RANGE, ino, block, &d, sizeof(d));
        block += n;
        count -= n;
    }
    return rc;
}

static int see_range(struct repair *r, const struct tree_key *key, const uint8_t *value, size_t len)
{
    const struct disk_range *d = (const struct disk_range *)value;
    unsigned first = le16_get(d->first), count = le16_get(d->count);
    struct fixed_extent *e = NULL;
    struct fixed_inode *f;
    bool any = false;
    int rc = owned(r, key, "blocks", &f);

    (void)len;
    if (rc < 0 || !f)
        return rc;
    if (!S_ISREG(f->i.mode) || f->i.flags & INODE_INLINE || key->b < f->next_block) {
        say(r, "dropped: an impossible range of inode %llu at block %llu", U(key->a), U(key->b));
        return del(r, key);
    }
    f->blocks += count;
    f->next_block = key->b + count;
    if (le64_get(d->extent) == EXTENT_LOST)
        return (int)count;
    e = table_find(&r->extents, le64_get(d->extent));
    for (unsigned i = 0; i < count; i++)
        any |= !e || first + i >= e->chunks || e->bad >> (first + i) & 1;
    for (unsigned i = 0, n; i < count && rc == 0; i += n) {
        bool lost = !e || first + i >= e->chunks || e->bad >> (first + i) & 1;
        struct disk_range part = {.extent = d->extent, .first = le16_make((uint16_t)(first + i))};

        for (n = 1; i + n < count; n++)
            if (lost != (!e || first + i + n >= e->chunks || e->bad >> (first + i + n) & 1))
                break;
        part.count = le16_make((uint16_t)n);
        for (unsigned k = i; k < i + n && !lost; k++)
            e->ref[first + k]++;
        if (lost) {
            say(r, "lost: inode %llu, blocks %llu to %llu, %s", U(key->a), U(key->b + i), U(key->b + i + n - 1),
                e ? "which do not authenticate" : "whose extent's record is lost");
            rc = put_lost(r, key->a, key->b + i, n);
        } else if (any) {
            rc = put(r, ITEM_RANGE, key->a, key->b + i, &part, sizeof(part));
        }
    }
    return rc < 0 ? rc : (int)count;
}

/* Blocks lo .. hi - 1 of a file, where no range is left, are lost. Adds their number. */
static int fill_lost(struct repair *r, struct fixed_inode *f, uint64_t lo, uint64_t hi)
{
    while (lo < hi) {
        struct tree_key key = tree_key(ITEM_RANGE, f->ino, lo), found;
        const uint8_t *value;
        uint64_t to = hi;
        size_t len;
        int rc = tree_le(r->v->tree, &key, &found, &value, &len);

        if (rc == 0 && found.kind == ITEM_RANGE && found.a == f->ino) {
            uint64_t end = found.b + le16_get(((const struct disk_range *)value)->count);

            if (end > lo) {
                lo = end;
                continue;
            }
        }
        rc = tree_ge(r->v->tree, &key, &found, &value, &len);
        if (rc < 0 && rc != -ENOENT)
            return rc;
        if (rc == 0 && found.kind == ITEM_RANGE && found.a == f->ino)
            to = MIN(to, found.b);
        say(r, "lost: inode %llu, blocks %llu to %llu, whose place is lost", U(f->ino), U(lo), U(to - 1));
        rc = put_lost(r, f->ino, lo, to - lo);
        if (rc < 0)
            return rc;
        f->blocks += to - lo;
        lo = to;
    }
    return 0;
}

/* The ranges of a file that lacks some may have been anywhere in the keys that were lost, up to its end. */
static int find_lost(struct repair *r, struct fixed_inode *f)
{
    struct tree_key first = tree_key(ITEM_RANGE, f->ino, 0), last = tree_key(ITEM_RANGE, f->ino, UINT64_MAX);
    uint64_t size = (f->i.size + r->v->block - 1) / r->v->block;
    int rc = 0;

    for (size_t i = 0; i < r->nlost && rc == 0; i++) {
        const struct lost_keys *l = &r->lost[i];

        if (tree_key_cmp(&l->hi, &first) <= 0 || tree_key_cmp(&l->lo, &last) > 0)
            continue;
        rc = fill_lost(r, f, tree_key_cmp(&l->lo, &first) > 0 ? l->lo.b : 0,
                       tree_key_cmp(&l->hi, &last) <= 0 ? MIN(l->hi.b, size) : size);
    }
    return rc;
}

static int fix_content(struct repair *r, struct fixed_inode *f)
{
    struct tree_key key = tree_key(ITEM_INLINE, f->ino, 0);
    int rc = 0;

    if (f->i.flags & INODE_INLINE && !f->has_inline && f->i.size && was_lost(r, &key)) {
        say(r, "lost: the content of inode %llu, %llu bytes", U(f->ino), U(f->i.size));
        f->i.flags &= ~INODE_INLINE;
        f->blocks = 1;
        f->made = true;
        return put_lost(r, f->ino, 0, 1);
    }
    if (f->blocks < f->i.blocks)
        rc = find_lost(r, f);
    if (rc == 0 && !f->trim && f->next_block > (f->i.size + r->v->block - 1) / r->v->block) {
        le64 from = le64_make((f->i.size + r->v->block - 1) / r->v->block);

        rc = put(r, ITEM_TRIM, f->ino, 0, &from, sizeof(from));
    }
    return rc;
}

/* --- 3: names --- */

static int put_entry(struct repair *r, struct fixed_inode *dir, const char *name, const struct inode *i)
{
    struct {
        struct disk_dirent d;
        char name[32];
    } value = {
        .d = {.ino = le64_make(i->ino), .type = (uint8_t)((i->mode & S_IFMT) >> 12), .namelen = (uint8_t)strlen(name)}};
    struct tree_key key;
    int rc = names_free_key(r->v, ITEM_DIRENT, dir->ino, name, strlen(name), &key);

    memcpy(value.name, name, strlen(name));
    if (rc == 0)
        rc = tree_put(r->v->tree, &key, &value, sizeof(value.d) + strlen(name));
    if (rc < 0)
        return rc;
    dir->entries++;
    dir->i.entries++;
    dir->subdirs += S_ISDIR(i->mode);
    dir->made = true;
    return 0;
}

static bool entry_is(const uint8_t *value, size_t len, const char *name, size_t n)
{
    const struct disk_dirent *d = (const struct disk_dirent *)value;

    return len == sizeof(*d) + n && d->namelen == n && memcmp(d + 1, name, n) == 0;
}

/* lost+found, found or made. */
static int need_lost_found(struct repair *r)
{
    int64_t now = now_ns();
    char name[24] = "lost+found";

    for (unsigned k = 1; !r->lost_found; k++) {
        struct fixed_inode *f, *root;
        struct disk_dirent *d;
        uint8_t value[512];
        struct tree_key key;
        ssize_t len =
            names_find(r->v, ITEM_DIRENT, VOLUME_ROOT_INO, name, strlen(name), entry_is, &key, value, sizeof(value));
        int rc;

        if (len < 0 && len != -ENOENT)
            return (int)len;
        if (len == -ENOENT) {
            f = table_add(&r->inodes);
            root = table_find(&r->inodes, VOLUME_ROOT_INO);
            f->ino = r->v->next_inode++;
            f->i = (struct inode){.ino = f->ino,
                                  .mode = S_IFDIR | 0700,
                                  .nlink = 2,
                                  .atime = now,
                                  .mtime = now,
                                  .ctime = now,
                                  .btime = now,
                                  .parent = VOLUME_ROOT_INO,
                                  .generation = r->v->generation};
            f->names = 1;
            f->named_by = VOLUME_ROOT_INO;
            f->made = true;
            rc = put_entry(r, root, name, &f->i);
            if (rc < 0)
                return rc;
            say(r, "made: the directory %s", name);
            r->lost_found = f->ino;
        } else {
            d = (struct disk_dirent *)value;
            f = inode_of(r, le64_get(d->ino));
            if (f && S_ISDIR(f->i.mode))
                r->lost_found = f->ino;
            snprintf(name, sizeof(name), "lost+found.%u", k);
        }
    }
    return 0;
}

/* at: its place in the table, which moves when lost+found is added. */
static int fix_names(struct repair *r, size_t at)
{
    struct fixed_inode *f = (struct fixed_inode *)(r->inodes.at + at * r->inodes.size);
    struct tree_key orphan = tree_key(ITEM_ORPHAN, f->ino, 0);
    char name[24];
    int rc;

    if (f->gone || f->ino == VOLUME_ROOT_INO || (f->names == 0) == f->orphan)
        return 0;
    if (f->orphan) {
        f->orphan = false;
        return del(r, &orphan);
    }
    if (f->i.nlink == 0) { /* it was removed already */
        f->orphan = true;
        return tree_put(r->v->tree, &orphan, NULL, 0);
    }
    rc = need_lost_found(r);
    if (rc < 0)
        return rc;
    f = (struct fixed_inode *)(r->inodes.at + at * r->inodes.size);
    snprintf(name, sizeof(name), "#%llu", U(f->ino));
    rc = put_entry(r, table_find(&r->inodes, r->lost_found), name, &f->i);
    if (rc < 0)
        return rc;
    say(r, "kept: inode %llu, whose name is lost, as %s in lost+found", U(f->ino), name);
    f->names = 1;
    f->named_by = r->lost_found;
    return 0;
}

/* --- counts --- */

static int fix_inode(struct repair *r, struct fixed_inode *f)
{
    struct inode now;
    struct disk_inode value;
    int rc = 0;

    if (f->gone)
        return 0;
    if (S_ISREG(f->i.mode))
        rc = fix_content(r, f);
    if (rc < 0)
        return rc;
    if (f->i.entries > f->entries)
        say(r, "lost: %llu entries of directory %llu", U(f->i.entries - f->entries), U(f->ino));
    if (f->i.xattrs > f->xattrs)
        say(r, "lost: %u attributes of inode %llu", f->i.xattrs - f->xattrs, U(f->ino));
    now = f->i;
    now.entries = f->entries;
    now.xattrs = f->xattrs;
    now.blocks = f->blocks;
    if (S_ISDIR(now.mode)) {
        now.nlink = f->orphan ? 0 : 2 + f->subdirs;
        if (!f->orphan)
            now.parent = f->ino == VOLUME_ROOT_INO ? VOLUME_ROOT_INO : f->named_by;
    } else {
        now.nlink = f->names;
    }
    if (!f->made && memcmp(&now, &f->i, sizeof(now)) == 0)
        return 0;
    inode_encode(&now, &value);
    return put(r, ITEM_INODE, f->ino, 0, &value, sizeof(value));
}

static int fix_extent(struct repair *r, const struct tree_key *key, const uint8_t *value, size_t len)
{
    struct fixed_extent *f = table_find(&r->extents, key->a);
    uint8_t item[EXTENT_ITEM_MAX];
    bool any = false;
    struct extent e;
    int rc;

    if (!f || extent_decode(key->a, value, len, &e) < 0)
        return del(r, key);
    for (unsigned i = 0; i < e.chunks; i++)
        any |= f->ref[i] != 0;
    if (!any)
        return del(r, key);
    rc = 0;
    for (unsigned i = 0; i < e.chunks && rc == 0; i++)
        if (f->ref[i])
            rc = set_units(r, r->want, e.addr + (uint64_t)i * r->v->block_units, r->v->block_units);
    if (rc < 0 || memcmp(e.ref, f->ref, e.chunks * sizeof(e.ref[0])) == 0)
        return rc;
    memcpy(e.ref, f->ref, sizeof(e.ref));
    e.has_refs = true;
    return tree_put(r->v->tree, key, item, extent_encode(&e, item));
}

/* What nothing uses any more is freed as by any operation: not before the checkpoint. */
static int fix_space(struct repair *r)
{
    for (uint64_t u = 0; u < r->nunits; u++) {
        bool want = bit(r->want, u) || bit(r->nodes, u), used = space_is_used(r->v->space, u);
        int rc = want == used ? 0 : want ? space_commit(r->v->space, u, 1) : space_release(r->v->space, u, 1);

        if (rc < 0)
            return rc;
    }
    return 0;
}

/* --- the whole --- */

/* `data` may have grown after the superblock was written. */
static void more_units(struct repair *r)
{
    uint64_t now = space_regions(r->v->space) * REGION_UNITS;

    free(r->want);
    r->want = xcalloc(1, now / 8);
    r->nodes = xrealloc(r->nodes, now / 8);
    memset(r->nodes + r->nunits / 8, 0, (now - r->nunits) / 8);
    r->nunits = now;
}

static int run(struct repair *r)
{
    int rc;

    more_units(r);
    rc = each(r, ITEM_EXTENT, see_extent);
    if (rc == 0)
        rc = make_root(r);
    if (rc == 0)
        rc = each(r, ITEM_INODE, see_inode);
    if (rc == 0)
        rc = each(r, ITEM_INLINE, see_inline);
    if (rc == 0)
        rc = drop_symlinks(r);
    if (rc == 0)
        rc = each(r, ITEM_DIRENT, see_dirent);
    if (rc == 0)
        rc = each(r, ITEM_XATTR, see_xattr);
    if (rc == 0)
        rc = each(r, ITEM_RANGE, see_range);
    if (rc == 0)
        rc = each(r, ITEM_ORPHAN, see_mark);
    if (rc == 0)
        rc = each(r, ITEM_TRIM, see_mark);
    for (size_t i = 0; i < r->inodes.n && rc == 0; i++)
        rc = fix_names(r, i);
    r->v->inodes = 0;
    for (size_t i = 0; i < r->inodes.n && rc == 0; i++) {
        struct fixed_inode *f = (struct fixed_inode *)(r->inodes.at + i * r->inodes.size);

        r->v->inodes += !f->gone;
        rc = fix_inode(r, f);
    }
    if (rc == 0)
        rc = each(r, ITEM_EXTENT, fix_extent);
    if (rc == 0)
        rc = fix_space(r);
    return rc;
}

int repair_run(struct repair *r)
{
    int rc = run(r);

    if (rc == 0)
        r->v->read_only = r->v->space_lost = false;
    return rc;
}

void repair_free(struct repair *r)
{
    if (!r)
        return;
    table_free(&r->inodes);
    table_free(&r->extents);
    free(r->lost);
    free(r->nodes);
    free(r->want);
    explicit_bzero(r->plain, sizeof(r->plain));
    free(r);
}
