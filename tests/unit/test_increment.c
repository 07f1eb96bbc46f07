/*
 * test_increment.c - what differs between two generations, and exports of it: chains of increments bring back each
 * state, and no chain that is not whole and in order is taken.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "coffer/volume.h"
#include "fs/base/secmem.h"
#include "fs/volume/diff.h"
#include "fs/volume/export.h"
#include "tests/crash/recstore.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <unistd.h>

#define ROOT    VOLUME_ROOT_INO
#define MIB     (1u << 20)
#define STREAMS 16
#define DIRS    24
#define HELD    32

struct stream {
    uint8_t *at;
    size_t n, cap, read;
};

/* The streams that an import reads, one after the other. */
struct chain {
    struct stream *stream[STREAMS];
    unsigned n, at;
    struct export_secret secret;
};

struct fixture {
    struct key *key;
    struct image *image[2], *copy[2];
    struct volume *v, *imported;
    uint8_t id[VOLUME_ID_BYTES];
    struct rng rng;
    unsigned lines;
    char last[300];
    struct stream s[STREAMS];
    atomic_bool stop;
    uint64_t dir[DIRS], held[HELD]; /* held: with a reference, perhaps without a name */
};

static void on_damage(void *ctx, const char *what)
{
    (void)ctx;
    print_message("damage: %s\n", what);
}

static void quiet(void *ctx, const char *what)
{
    (void)ctx, (void)what;
}

static void on_line(void *ctx, const char *text)
{
    struct fixture *f = ctx;

    f->lines++;
    snprintf(f->last, sizeof(f->last), "%s", text);
}

static struct volume *open_images(struct fixture *f, struct image *image[2], bool read_only)
{
    struct volume_options o = {
        .cache_bytes = 1 << 20, .mount_id = 1, .on_damage = on_damage, .ctx = f, .read_only = read_only};
    struct volume *v;

    assert_int_equal(
        volume_open(mstore_new(image[0], NULL, NULL, 0), mstore_new(image[1], NULL, NULL, 1), f->key, f->id, &o, &v),
        0);
    return v;
}

static void format(struct fixture *f)
{
    struct volume_params p = {.block_size = 4096, .size_limit = 256 << 20, .log_segment = 4 << 20};
    struct store *data, *log;

    p.root_mode = 0755;
    memcpy(p.id, f->id, sizeof(p.id));
    f->image[0] = image_new(NULL);
    f->image[1] = image_new(NULL);
    data = mstore_new(f->image[0], NULL, NULL, 0);
    log = mstore_new(f->image[1], NULL, NULL, 1);
    assert_int_equal(volume_format(data, log, f->key, &p), 0);
    data->ops->close(data);
    log->ops->close(log);
    f->v = open_images(f, f->image, false);
}

static void free_images(struct image *image[2])
{
    for (unsigned i = 0; i < 2; i++) {
        if (image[i])
            image_free(image[i]);
        image[i] = NULL;
    }
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));

    *state = f;
    if (!f || secmem_init() < 0 || !(f->key = key_new()))
        return -1;
    memset(f->key->b, 0x21, sizeof(f->key->b));
    memcpy(f->id, "increment", 9);
    f->rng.s = 7;
    f->dir[0] = ROOT;
    format(f);
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    if (f->v)
        volume_abandon(f->v);
    if (f->imported)
        volume_abandon(f->imported);
    free_images(f->image);
    free_images(f->copy);
    for (unsigned i = 0; i < STREAMS; i++)
        free(f->s[i].at);
    key_free(&f->key);
    free(f);
    return 0;
}

static struct view *open_view(struct volume *v)
{
    struct view *w = calloc(1, sizeof(*w));

    assert_int_equal(view_open(v, true, w), 0);
    return w;
}

static void close_view(struct view *w)
{
    assert_false(view_stale(w));
    view_close(w);
    free(w);
}

/* --- streams --- */

static int stream_write(void *ctx, const void *buf, size_t n)
{
    struct stream *s = ctx;

    if (s->n + n > s->cap) {
        s->cap = (s->n + n) * 2;
        s->at = realloc(s->at, s->cap);
    }
    memcpy(s->at + s->n, buf, n);
    s->n += n;
    return 0;
}

static int chain_read(void *ctx, void *buf, size_t n)
{
    struct chain *c = ctx;
    struct stream *s = c->stream[c->at];

    if (n > s->n - s->read)
        return -ENODATA;
    memcpy(buf, s->at + s->read, n);
    s->read += n;
    return 0;
}

static int chain_open(struct chain *c)
{
    int rc;

    if (!c->stream[c->at])
        return -EINVAL;
    c->stream[c->at]->read = 0;
    rc = chain_read(c, &c->secret.head, sizeof(c->secret.head));
    return rc < 0 ? rc : export_secret_open("secret", 6, &c->secret);
}

static int chain_next(void *ctx, const struct export_secret **ret)
{
    struct chain *c = ctx;
    int rc;

    if (c->at + 1 == c->n)
        return 0;
    c->at++;
    rc = chain_open(c);
    *ret = &c->secret;
    return rc < 0 ? rc : 1;
}

static int export(struct fixture *f, struct view *w, struct view *since, struct stream *s)
{
    struct volume_report r = {.line = on_line, .ctx = f};
    struct export_io io = {.write = stream_write, .ctx = s};
    struct export_secret e;

    s->n = 0;
    assert_int_equal(export_secret_new(EXPORT_KEY_FILE, "secret", 6, &e), 0);
    return export_view(w, since, &e, &io, &r);
}

static int verify(struct fixture *f, struct chain *c)
{
    struct volume_report r = {.line = on_line, .ctx = f};
    struct export_io io = {.read = chain_read, .next = chain_next, .ctx = c};
    struct volume_params p;
    int rc;

    c->at = 0;
    rc = chain_open(c);
    return rc < 0 ? rc : export_verify(&c->secret, &io, &p, &r);
}

static int import_with(struct fixture *f, struct chain *c, struct volume_params *p)
{
    struct volume_report r = {.line = on_line, .ctx = f};
    struct export_io io = {.read = chain_read, .next = chain_next, .ctx = c};
    int rc;

    if (f->imported)
        volume_abandon(f->imported);
    f->imported = NULL;
    free_images(f->copy);
    f->copy[0] = image_new(NULL);
    f->copy[1] = image_new(NULL);
    memcpy(p->id, f->id, sizeof(p->id));
    c->at = 0;
    rc = chain_open(c);
    if (rc == 0)
        rc = volume_import(mstore_new(f->copy[0], NULL, NULL, 0), mstore_new(f->copy[1], NULL, NULL, 1), f->key, p,
                           &c->secret, &io, &r);
    if (rc == 0)
        f->imported = open_images(f, f->copy, false);
    return rc;
}

static int import(struct fixture *f, struct chain *c)
{
    return import_with(f, c, &(struct volume_params){0});
}

/* All streams of the fixture below n, as they came. */
static struct chain chain_of(struct fixture *f, unsigned n)
{
    struct chain c = {.n = n};

    for (unsigned i = 0; i < n; i++)
        c.stream[i] = &f->s[i];
    return c;
}

/* --- what both have --- */

struct compare {
    struct fixture *f;
    struct view *a, *b;
    uint64_t inodes;
};

static void same_file(struct compare *c, const struct inode *i)
{
    static uint8_t x[65536], y[65536];
    uint64_t at, p, q;

    for (at = 0; at < i->size; at += sizeof(x)) {
        ssize_t n = vol_read(c->a->v, i->ino, at, x, sizeof(x)), m = vol_read(c->b->v, i->ino, at, y, sizeof(y));

        assert_int_equal(n, m);
        if (n > 0)
            assert_memory_equal(x, y, (size_t)n);
        for (uint64_t k = at; n < 0 && k < at + sizeof(x) && k < i->size; k += 4096) {
            n = vol_read(c->a->v, i->ino, k, x, 4096);
            assert_int_equal(n, vol_read(c->b->v, i->ino, k, y, 4096));
            if (n > 0)
                assert_memory_equal(x, y, (size_t)n);
            n = -1;
        }
    }
    for (at = 0; at < i->size; at = p) {
        int rc = vol_seek(c->a->v, i->ino, at, SEEK_DATA, &p);

        assert_int_equal(rc, vol_seek(c->b->v, i->ino, at, SEEK_DATA, &q));
        if (rc < 0)
            break;
        assert_int_equal(p, q);
        assert_int_equal(vol_seek(c->a->v, i->ino, p, SEEK_HOLE, &p), 0);
        assert_int_equal(vol_seek(c->b->v, i->ino, q, SEEK_HOLE, &q), 0);
        assert_int_equal(p, q);
    }
}

static int same_item(void *ctx, const struct tree_iter *it)
{
    struct compare *c = ctx;
    uint8_t x[5000], y[5000];
    struct disk_inode d, e;
    struct inode i, j;
    char name[256] = "";
    struct vattr v;
    ssize_t n;

    if (it->key.kind > ITEM_RANGE)
        return 1;
    assert_int_equal(view_inode(c->a, it->key.a, &i), 0);
    if (!i.nlink)
        return 0;
    assert_int_equal(view_inode(c->b, i.ino, &j), 0);
    switch (it->key.kind) {
    case ITEM_INODE:
        c->inodes++;
        inode_encode(&i, &d);
        inode_encode(&j, &e);
        assert_memory_equal(&d, &e, sizeof(d));
        if (S_ISREG(i.mode))
            same_file(c, &i);
        break;
    case ITEM_DIRENT:
        memcpy(name, it->value + sizeof(struct disk_dirent), ((const struct disk_dirent *)it->value)->namelen);
        assert_int_equal(vol_lookup(c->b->v, i.ino, name, &v), 0);
        assert_int_equal(v.ino, le64_get(((const struct disk_dirent *)it->value)->ino));
        vol_forget(c->b->v, v.ino, 1);
        break;
    case ITEM_XATTR:
        memcpy(name, it->value + sizeof(struct disk_xattr), ((const struct disk_xattr *)it->value)->namelen);
        n = vol_getxattr(c->a->v, i.ino, name, x, sizeof(x));
        assert_true(n >= 0);
        assert_int_equal(n, vol_getxattr(c->b->v, i.ino, name, y, sizeof(y)));
        assert_memory_equal(x, y, (size_t)n);
        break;
    case ITEM_INLINE:
        if (!S_ISLNK(i.mode))
            break;
        n = vol_readlink(c->a->v, i.ino, (char *)x, sizeof(x));
        assert_int_equal(n, vol_readlink(c->b->v, i.ino, (char *)y, sizeof(y)));
        assert_memory_equal(x, y, (size_t)n);
        break;
    }
    return 0;
}

/* What has a name in one volume is the same in the other, which has nothing else. (Numbers of names and attributes are
 * in the inodes, and held against what there is by the check.) */
static void same(struct fixture *f, struct volume *a, struct volume *b)
{
    struct compare c = {.f = f, .a = open_view(a), .b = open_view(b)};

    assert_true(view_walk(c.a, &(struct tree_key){0}, same_item, &c) >= 0);
    assert_int_equal(c.inodes, c.b->inodes);
    close_view(c.a);
    close_view(c.b);
    assert_int_equal(volume_check(b, true, on_line, f), 0);
}

/* --- the walk through two trees --- */

struct plain_diff {
    struct tree_iter it[2];
    int rc[2];
    unsigned changes;
};

static void value_is(const struct tree_iter *it, const uint8_t *value, size_t len)
{
    assert_non_null(value);
    assert_int_equal(len, it->len);
    assert_memory_equal(value, it->value, len);
}

/* c is the next difference of two iterators. */
static int expect_change(void *ctx, const struct view_change *c)
{
    struct plain_diff *p = ctx;
    struct tree_iter *a = &p->it[0], *b = &p->it[1];

    while (p->rc[0] == 0 && p->rc[1] == 0 && tree_key_cmp(&a->key, &b->key) == 0 && a->len == b->len &&
           memcmp(a->value, b->value, a->len) == 0) {
        p->rc[0] = tree_iter_next(a);
        p->rc[1] = tree_iter_next(b);
    }
    if (!c) {
        assert_true(p->rc[0] == -ENOENT && p->rc[1] == -ENOENT);
        return 0;
    }
    p->changes++;
    for (unsigned i = 0; i < 2; i++) {
        const uint8_t *value = i ? c->new : c->old;

        if (p->rc[i] == 0 && tree_key_cmp(&p->it[i].key, &c->key) == 0) {
            value_is(&p->it[i], value, i ? c->new_len : c->old_len);
            p->rc[i] = tree_iter_next(&p->it[i]);
        } else {
            assert_null(value);
            assert_true(p->rc[i] == -ENOENT || tree_key_cmp(&p->it[i].key, &c->key) > 0);
        }
    }
    return 0;
}

static int count_change(void *ctx, const struct view_change *c)
{
    (void)c;
    ++*(unsigned *)ctx;
    return 0;
}

/* Nodes of both trees, by address: no address comes twice while a view holds the older state. */
struct nodes {
    uint8_t *in[2]; /* a bit a unit */
    unsigned now, count[2];
};

static int note_node(void *ctx, uint64_t addr, unsigned level, int err)
{
    struct nodes *n = ctx;

    (void)level;
    assert_int_equal(err, 0);
    assert_true(addr < 8u << 17);
    n->in[n->now][addr / 8] |= (uint8_t)(1u << addr % 8);
    n->count[n->now]++;
    return 0;
}

/* Reads the nodes that are not in both trees, and hardly any other one. */
static void check_reads(struct view *old, struct view *new)
{
    struct nodes n = {.in = {calloc(1, 1 << 17), calloc(1, 1 << 17)}};
    unsigned shared = 0, changes = 0;

    assert_int_equal(tree_visit(old->tree, note_node, &n), 0);
    n.now = 1;
    assert_int_equal(tree_visit(new->tree, note_node, &n), 0);
    for (unsigned i = 0; i < 1 << 17; i++)
        shared += (unsigned)__builtin_popcount(n.in[0][i] & n.in[1][i]);
    old->reads = new->reads = 0;
    assert_int_equal(view_diff(old, new, count_change, &changes), 0);
    print_message("%u and %u nodes, %u in both, %llu and %llu read, %u items changed\n", n.count[0], n.count[1], shared,
                  (unsigned long long)old->reads, (unsigned long long)new->reads, changes);
    assert_true(old->reads >= n.count[0] - shared && new->reads >= n.count[1] - shared);
    assert_true(old->reads + new->reads <= n.count[0] + n.count[1] - 2 * shared + 2);
    free(n.in[0]);
    free(n.in[1]);
}

static unsigned check_diff(struct view *old, struct view *new)
{
    struct plain_diff p = {0};

    check_reads(old, new);

    p.rc[0] = tree_iter_seek(old->tree, &(struct tree_key){0}, &p.it[0]);
    p.rc[1] = tree_iter_seek(new->tree, &(struct tree_key){0}, &p.it[1]);
    assert_int_equal(view_diff(old, new, expect_change, &p), 0);
    expect_change(&p, NULL);
    return p.changes;
}

static void make_many(struct fixture *f, unsigned n)
{
    for (unsigned k = 0; k < n; k++) {
        char name[40];
        struct vattr a;

        snprintf(name, sizeof(name), "a-name-that-fills-leaves-%u", k);
        assert_int_equal(vol_mknod(f->v, ROOT, name, S_IFREG | 0600, 0, 0, 0, &a), 0);
        assert_int_equal(vol_write(f->v, a.ino, 0, name, sizeof(name)), sizeof(name));
        vol_forget(f->v, a.ino, 1);
    }
}

static void test_shared_nodes(void **state)
{
    struct fixture *f = *state;
    struct view *nothing = open_view(f->v), *old, *new;
    struct vattr a, b;

    /* Trees of other heights, both ways. */
    make_many(f, 20000);
    old = open_view(f->v);
    assert_true(nothing->root_level < old->root_level);
    assert_true(check_diff(nothing, old) > 60000);
    assert_true(check_diff(old, nothing) > 60000);
    assert_int_equal(check_diff(old, old), 0);
    close_view(nothing);
    assert_int_equal(vol_lookup(f->v, ROOT, "a-name-that-fills-leaves-777", &a), 0);
    assert_int_equal(vol_write(f->v, a.ino, 2, "x", 1), 1);
    new = open_view(f->v);
    assert_true(check_diff(old, new) < 10); /* inode, content, bitmaps */
    /* The whole increment: it looks at each kind of its own, and at the inode. */
    old->reads = new->reads = 0;
    assert_int_equal(export(f, new, old, &f->s[0]), 0);
    assert_true(old->reads <= 40 && new->reads <= 40);
    assert_int_equal(f->s[0].n, sizeof(struct export_head) + EXPORT_FRAME_BYTES);
    close_view(new);
    /* Here and there, so that leaves split. */
    for (unsigned k = 0; k < 300; k++) {
        char name[32];

        snprintf(name, sizeof(name), "another-%u", k);
        assert_int_equal(vol_mknod(f->v, ROOT, name, S_IFREG | 0600, 0, 0, 0, &b), 0);
        vol_forget(f->v, b.ino, 1);
    }
    new = open_view(f->v);
    check_diff(old, new);
    close_view(new);
    /* Most of it goes. */
    for (unsigned k = 0; k < 19000; k++) {
        char name[40];

        snprintf(name, sizeof(name), "a-name-that-fills-leaves-%u", k);
        assert_int_equal(vol_unlink(f->v, ROOT, name), 0);
    }
    vol_forget(f->v, a.ino, 1);
    new = open_view(f->v);
    assert_true(check_diff(old, new) > 50000);
    close_view(old);
    close_view(new);
}

/* --- random changes --- */

static uint64_t some_dir(struct fixture *f)
{
    uint64_t ino = f->dir[rng_below(&f->rng, DIRS)];

    return ino ? ino : ROOT;
}

static void some_name(struct fixture *f, char name[32])
{
    snprintf(name, 32, "name-%u", (unsigned)rng_below(&f->rng, 12));
}

/* A file that there is, with a reference; false: the name is free. */
static bool some_file(struct fixture *f, struct vattr *ret)
{
    char name[32];

    some_name(f, name);
    return vol_lookup(f->v, some_dir(f), name, ret) == 0;
}

static void keep_or_forget(struct fixture *f, uint64_t ino)
{
    uint64_t *place = &f->held[rng_below(&f->rng, HELD)];

    if (!rng_chance(&f->rng, 8)) {
        vol_forget(f->v, ino, 1);
        return;
    }
    if (*place)
        vol_forget(f->v, *place, 1);
    *place = ino;
}

static void change_names(struct fixture *f, unsigned what)
{
    static const uint32_t types[] = {S_IFREG | 0644, S_IFREG | 0600, S_IFREG | 04755, S_IFIFO | 0600, S_IFCHR | 0666};
    uint64_t dir = some_dir(f), other = some_dir(f), held = f->held[rng_below(&f->rng, HELD)];
    char name[32], to[32];
    struct vattr a, b;

    some_name(f, name);
    some_name(f, to);
    switch (what) {
    case 0:
    case 1:
        if (vol_mknod(f->v, dir, name, types[rng_below(&f->rng, 5)], 5, 1, 2, &a) == 0)
            keep_or_forget(f, a.ino);
        break;
    case 2:
        if (vol_mknod(f->v, dir, name, S_IFDIR | 0755, 0, 1, 2, &a) == 0) {
            f->dir[1 + rng_below(&f->rng, DIRS - 1)] = a.ino;
            keep_or_forget(f, a.ino);
        }
        break;
    case 3:
        if (vol_symlink(f->v, dir, name, to, 1, 2, &a) == 0)
            keep_or_forget(f, a.ino);
        break;
    case 4:
        if (vol_tmpfile(f->v, dir, 0600, 1, 2, &a) == 0) {
            vol_write(f->v, a.ino, 0, types, rng_below(&f->rng, sizeof(types)));
            keep_or_forget(f, a.ino);
        }
        break;
    case 5:
        if (held && vol_link(f->v, held, dir, name, &a) == 0)
            vol_forget(f->v, held, 1);
        break;
    case 6:
        if (some_file(f, &a)) {
            if (vol_link(f->v, a.ino, dir, name, &b) == 0)
                vol_forget(f->v, b.ino, 1);
            vol_forget(f->v, a.ino, 1);
        }
        break;
    case 7:
        vol_unlink(f->v, dir, name);
        break;
    case 8:
        vol_rmdir(f->v, dir, name);
        break;
    case 9:
        vol_rename(f->v, dir, name, other, to, rng_chance(&f->rng, 3) ? RENAME_EXCHANGE : 0);
        break;
    default:
        vol_rename_whiteout(f->v, dir, name, other, to, 0, 1, 2);
        break;
    }
}

static uint64_t some_size(struct fixture *f)
{
    static const uint64_t most[] = {100, 2048, 9000, 70000, 400000};

    return rng_below(&f->rng, most[rng_below(&f->rng, 5)]);
}

static void change_file(struct fixture *f, unsigned what)
{
    static uint8_t buf[400000];
    uint64_t off = some_size(f), n = some_size(f) + 1;
    struct vattr a, b, set = {.size = off, .mode = 0640, .uid = 7, .mtime = (int64_t)n, .atime = 3};
    char name[40];

    if (!some_file(f, &a))
        return;
    if (rng_chance(&f->rng, 3))
        off &= ~4095ull;
    snprintf(name, sizeof(name), "user.x%u", (unsigned)rng_below(&f->rng, 5));
    switch (what) {
    case 0:
    case 1:
    case 2:
        rng_fill(&f->rng, buf, n);
        vol_write(f->v, a.ino, off, buf, n);
        break;
    case 3:
        vol_setattr(f->v, a.ino, VOL_SET_SIZE, &set, &b);
        break;
    case 4:
        vol_fallocate(f->v, a.ino, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off, n);
        break;
    case 5:
        vol_setattr(f->v, a.ino, 1u << rng_below(&f->rng, 2), &set, &b);
        break;
    case 6:
        vol_setattr(f->v, a.ino, VOL_SET_MTIME | VOL_SET_ATIME | VOL_SET_CTIME, &set, &b);
        break;
    case 7:
        vol_setxattr(f->v, a.ino, name, buf, rng_below(&f->rng, 300), 0);
        break;
    case 8:
        vol_removexattr(f->v, a.ino, name);
        break;
    default:
        if (some_file(f, &b)) {
            vol_copy(f->v, a.ino, off & ~4095ull, b.ino, some_size(f) & ~4095ull, n);
            vol_forget(f->v, b.ino, 1);
        }
        break;
    }
    vol_forget(f->v, a.ino, 1);
}

static void change(struct fixture *f, unsigned n)
{
    while (n--) {
        if (rng_chance(&f->rng, 2))
            change_names(f, (unsigned)rng_below(&f->rng, 11));
        else
            change_file(f, (unsigned)rng_below(&f->rng, 10));
    }
}

static void random_chain(struct fixture *f, uint64_t seed, unsigned rounds)
{
    static const unsigned steps[] = {2000, 300, 1, 0, 1000, 20, 5, 400};
    struct view *old, *new;
    struct chain c;

    f->rng.s = seed;
    if (seed % 2)
        make_many(f, 2000); /* a tree of more levels */
    change(f, steps[0]);
    old = open_view(f->v);
    assert_int_equal(export(f, old, NULL, &f->s[0]), 0);
    c = chain_of(f, 1);
    assert_int_equal(import(f, &c), 0);
    same(f, f->v, f->imported);
    for (unsigned k = 1; k < rounds; k++) {
        change(f, steps[k % ARRAY_LEN(steps)]);
        new = open_view(f->v);
        check_diff(old, new);
        assert_int_equal(export(f, new, old, &f->s[k]), 0);
        close_view(old);
        old = new;
        c = chain_of(f, k + 1);
        assert_int_equal(verify(f, &c), 0);
        f->last[0] = 0;
        if (import(f, &c) != 0)
            fail_msg("seed %llu, round %u: %s", (unsigned long long)seed, k, f->last);
        same(f, f->v, f->imported);
    }
    close_view(old);
}

static void test_random_chains(void **state)
{
    struct fixture *f = *state;

    for (uint64_t seed = 1; seed <= 6; seed++) {
        if (seed > 1) {
            volume_abandon(f->v);
            free_images(f->image);
            format(f);
            memset(f->dir + 1, 0, sizeof(f->dir) - sizeof(f->dir[0]));
            memset(f->held, 0, sizeof(f->held));
        }
        random_chain(f, seed, 8);
    }
}

/* --- in use --- */

static void *writer(void *arg)
{
    static uint8_t buf[4096];
    struct fixture *f = arg;
    struct vattr a, set = {0};

    assert_int_equal(vol_mknod(f->v, ROOT, "long", S_IFREG | 0600, 0, 0, 0, &a), 0);
    while (!f->stop) {
        change(f, 50);
        /* Many ranges, which are freed in steps: a state may have some behind the file's end. */
        for (unsigned k = 0; k < 600; k++)
            assert_true(vol_write(f->v, a.ino, (uint64_t)k * 8192, buf, sizeof(buf)) > 0);
        set.size = rng_below(&f->rng, 3) * 100000;
        assert_int_equal(vol_setattr(f->v, a.ino, VOL_SET_SIZE, &set, &set), 0);
        set.size = rng_below(&f->rng, 8) * 1000000;
        assert_int_equal(vol_setattr(f->v, a.ino, VOL_SET_SIZE, &set, &set), 0);
    }
    return NULL;
}

static int has_trim(void *ctx, const struct tree_iter *it)
{
    *(bool *)ctx = it->key.kind == ITEM_TRIM;
    return 1;
}

static void test_in_use(void **state)
{
    struct fixture *f = *state;
    unsigned n = 0, chains = 0, trims = 0;
    struct view *old = NULL, *new;
    struct chain c;
    pthread_t t;

    assert_int_equal(pthread_create(&t, NULL, writer, f), 0);
    for (unsigned k = 0; k < 60 || n < 2; k++) {
        bool trim = false, last = k >= 59;
        int rc;

        assert_true(k < 200);
        if (last && !f->stop) {
            f->stop = true;
            pthread_join(t, NULL);
        }
        new = calloc(1, sizeof(*new));
        assert_int_equal(view_open(f->v, true, new), 0);
        view_walk(new, &(struct tree_key){.kind = ITEM_TRIM}, has_trim, &trim);
        trims += trim;
        if (n == STREAMS && !last)
            n = 0;
        rc = export(f, new, n ? old : NULL, &f->s[n % STREAMS]);
        if (old)
            view_close(old);
        free(old);
        old = new;
        /* Its space was needed: from the beginning. */
        n = rc == -EBUSY ? 0 : n + 1;
        assert_true(rc == 0 || rc == -EBUSY);
        if (n && (n == STREAMS - 1 || last)) {
            c = chain_of(f, n);
            assert_int_equal(import(f, &c), 0);
            chains++;
            if (!last)
                n = 0;
        }
    }
    view_close(old);
    free(old);
    print_message("%u chains, %u states with blocks behind a file's end\n", chains, trims);
    same(f, f->v, f->imported);
}

/* --- what random changes do not come to --- */

/* The two states come from two volumes that were one: `f->v` goes on, the copy stays as it is. */
static struct volume *fork_volume(struct fixture *f, struct image *image[2])
{
    assert_int_equal(volume_close(f->v), 0);
    for (unsigned i = 0; i < 2; i++)
        image[i] = image_copy(f->image[i]);
    f->v = open_images(f, f->image, false);
    return open_images(f, image, true);
}

static void flip(struct fixture *f, uint64_t unit)
{
    uint8_t byte;

    image_read(f->image[0], unit * 4096 + 7, &byte, 1);
    byte ^= 4;
    image_write(f->image[0], unit * 4096 + 7, &byte, 1);
}

static uint64_t unit_of(struct fixture *f, uint64_t ino, uint64_t block)
{
    struct view *w = open_view(f->v);
    struct tree_key key = tree_key(ITEM_RANGE, ino, block), found;
    const struct disk_range *d;
    const uint8_t *value;
    struct extent e;
    uint64_t unit;
    size_t len;

    assert_int_equal(tree_le(w->tree, &key, &found, &value, &len), 0);
    assert_true(found.kind == ITEM_RANGE && found.a == ino);
    d = (const struct disk_range *)value;
    unit = le16_get(d->first) + block - found.b;
    assert_int_equal(view_extent(w, le64_get(d->extent), &e), 0);
    close_view(w);
    return e.addr + unit;
}

static void repair(struct fixture *f)
{
    struct volume_report r = {.line = on_line, .ctx = f};
    struct volume_options o = {.on_damage = quiet};

    assert_int_equal(volume_close(f->v), 0);
    assert_true(volume_repair(mstore_new(f->image[0], NULL, NULL, 0), mstore_new(f->image[1], NULL, NULL, 1), f->key,
                              f->id, &o, &r) > 0);
    f->v = open_images(f, f->image, false);
}

/* Lost blocks come, are written over, the last one partly; and what a state of before has is read there. */
static void test_lost(void **state)
{
    static uint8_t buf[300001];
    struct fixture *f = *state;
    struct image *image[2];
    struct volume *before;
    struct view *old, *new;
    struct chain c;
    struct vattr a;

    memset(buf, 5, sizeof(buf));
    assert_int_equal(vol_mknod(f->v, ROOT, "file", S_IFREG | 0600, 0, 0, 0, &a), 0);
    assert_int_equal(vol_write(f->v, a.ino, 0, buf, sizeof(buf)), sizeof(buf));
    before = fork_volume(f, image);
    old = open_view(before);
    assert_int_equal(export(f, old, NULL, &f->s[0]), 0);
    flip(f, unit_of(f, a.ino, 3));
    flip(f, unit_of(f, a.ino, 40));
    flip(f, unit_of(f, a.ino, 73));
    repair(f);
    assert_int_equal(vol_read(f->v, a.ino, 73 * 4096, buf, 1), -EIO);
    new = open_view(f->v);
    f->lines = 0;
    assert_int_equal(export(f, new, old, &f->s[1]), 3);
    assert_int_equal(f->lines, 3);
    assert_int_equal(f->s[1].n, sizeof(struct export_head) + EXPORT_FRAME_BYTES);
    close_view(old);
    volume_abandon(before);
    free_images(image);
    c = chain_of(f, 2);
    assert_int_equal(import(f, &c), 0);
    same(f, f->v, f->imported);
    /* The last block is written whole, but is not full. */
    assert_int_equal(vol_write(f->v, a.ino, 73 * 4096, buf, 4096), 4096);
    a.size = sizeof(buf);
    assert_int_equal(vol_setattr(f->v, a.ino, VOL_SET_SIZE, &a, &a), 0);
    assert_int_equal(vol_fallocate(f->v, a.ino, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 40 * 4096, 8192), 0);
    old = new;
    new = open_view(f->v);
    assert_int_equal(export(f, new, old, &f->s[2]), 0);
    close_view(old);
    c = chain_of(f, 3);
    assert_int_equal(import(f, &c), 0);
    same(f, f->v, f->imported);
    close_view(new);
}

/* Chunks of one extent in another order are another content; holes side by side are one. */
static void test_chunks_and_holes(void **state)
{
    static uint8_t buf[16 * 4096];
    struct fixture *f = *state;
    struct view *old, *new;
    struct chain c = chain_of(f, 2);
    struct vattr a, b;

    rng_fill(&f->rng, buf, sizeof(buf));
    assert_int_equal(vol_mknod(f->v, ROOT, "file", S_IFREG | 0600, 0, 0, 0, &a), 0);
    assert_int_equal(vol_mknod(f->v, ROOT, "holes", S_IFREG | 0600, 0, 0, 0, &b), 0);
    assert_int_equal(vol_write(f->v, a.ino, 0, buf, sizeof(buf)), sizeof(buf));
    for (unsigned k = 0; k < 4000; k++)
        assert_int_equal(vol_write(f->v, b.ino, (uint64_t)(k % 2 ? 4000 - k : k) * 4096, buf, 4096), 4096);
    old = open_view(f->v);
    assert_int_equal(export(f, old, NULL, &f->s[0]), 0);
    assert_int_equal(vol_copy(f->v, a.ino, 0, a.ino, 5 * 4096, 4096), 4096);
    assert_int_equal(vol_copy(f->v, a.ino, 8 * 4096, a.ino, 2 * 4096, 2 * 4096), 2 * 4096);
    assert_int_equal(
        vol_fallocate(f->v, b.ino, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4096, (uint64_t)3900 * 4096), 0);
    new = open_view(f->v);
    assert_int_equal(export(f, new, old, &f->s[1]), 0);
    assert_int_equal(f->s[1].n, sizeof(struct export_head) + EXPORT_FRAME_BYTES);
    close_view(old);
    close_view(new);
    assert_int_equal(import(f, &c), 0);
    same(f, f->v, f->imported);
}

/* Damage that no repair has seen is lost in an increment, too. */
static void test_unreadable(void **state)
{
    static uint8_t buf[100000];
    struct fixture *f = *state;
    struct view *old = open_view(f->v), *new;
    struct chain c = chain_of(f, 2);
    struct vattr a;

    assert_int_equal(export(f, old, NULL, &f->s[0]), 0);
    memset(buf, 5, sizeof(buf));
    assert_int_equal(vol_mknod(f->v, ROOT, "file", S_IFREG | 0600, 0, 0, 0, &a), 0);
    assert_int_equal(vol_write(f->v, a.ino, 0, buf, sizeof(buf)), sizeof(buf));
    flip(f, unit_of(f, a.ino, 3));
    new = open_view(f->v);
    assert_int_equal(export(f, new, old, &f->s[1]), 1);
    assert_non_null(strstr(f->last, "blocks 3 to 3"));
    close_view(old);
    close_view(new);
    assert_int_equal(import(f, &c), 0);
    assert_int_equal(vol_read(f->imported, a.ino, 3 * 4096, buf, 1), -EIO);
    assert_int_equal(vol_read(f->imported, a.ino, 4 * 4096, buf, 1), 1);
    assert_int_equal(volume_check(f->imported, true, on_line, f), 0);
}

/* The same numbers for other files: as after a return to an older state. */
static void test_reused_inodes(void **state)
{
    struct fixture *f = *state;
    struct image *image[2], *both[2];
    struct volume *other, *before;
    struct view *old, *new;
    struct chain c = chain_of(f, 2);
    struct vattr a, b;
    char name[32];

    assert_int_equal(volume_close(f->v), 0);
    for (unsigned i = 0; i < 2; i++)
        both[i] = image_copy(f->image[i]);
    other = open_images(f, both, false);
    assert_int_equal(vol_mknod(other, ROOT, "dir", S_IFDIR | 0700, 0, 0, 0, &a), 0);
    for (unsigned k = 0; k < 400; k++) {
        snprintf(name, sizeof(name), "f%u", k);
        assert_int_equal(vol_mknod(other, k % 2 ? ROOT : a.ino, name, S_IFREG | 0600, 0, 0, 0, &b), 0);
        assert_int_equal(vol_write(other, b.ino, 0, name, sizeof(name)), sizeof(name));
        assert_int_equal(vol_setxattr(other, b.ino, "user.a", name, sizeof(name), 0), 0);
    }
    assert_int_equal(volume_close(other), 0);
    for (unsigned i = 0; i < 2; i++)
        image[i] = image_copy(both[i]);
    before = open_images(f, image, true);
    old = open_view(before);
    assert_int_equal(export(f, old, NULL, &f->s[0]), 0);
    f->v = open_images(f, f->image, false);
    for (unsigned k = 0; k < 3; k++) {
        assert_int_equal(volume_close(f->v), 0); /* so that it is not the older one */
        f->v = open_images(f, f->image, false);
    }
    assert_int_equal(vol_mknod(f->v, ROOT, "file", S_IFREG | 0600, 0, 0, 0, &b), 0);
    assert_int_equal(b.ino, a.ino);
    assert_int_equal(vol_write(f->v, b.ino, 0, name, sizeof(name)), sizeof(name));
    for (unsigned k = 0; k < 300; k++) {
        snprintf(name, sizeof(name), k % 3 ? "f%u" : "g%u", k);
        assert_int_equal(vol_mknod(f->v, ROOT, name, k % 5 ? S_IFREG | 0600 : S_IFDIR | 0700, 0, 0, 0, &b), 0);
    }
    new = open_view(f->v);
    assert_int_equal(export(f, new, old, &f->s[1]), 0);
    assert_int_equal(export(f, old, new, &f->s[2]), -EINVAL);
    close_view(old);
    close_view(new);
    volume_abandon(before);
    free_images(image);
    free_images(both);
    assert_int_equal(import(f, &c), 0);
    same(f, f->v, f->imported);
}

/* A limit that is not given is that of the newest state; and what was there in between had room. */
static void test_limit(void **state)
{
    static uint8_t buf[MIB];
    struct fixture *f = *state;
    struct view *old = open_view(f->v), *new;
    struct volume_params p;
    struct chain c;
    struct vattr a;

    assert_int_equal(export(f, old, NULL, &f->s[0]), 0);
    assert_int_equal(volume_resize(f->v, 400 << 20), 0);
    assert_int_equal(vol_mknod(f->v, ROOT, "big", S_IFREG | 0600, 0, 0, 0, &a), 0);
    for (unsigned k = 0; k < 270; k++)
        assert_int_equal(vol_write(f->v, a.ino, (uint64_t)k * MIB, buf, sizeof(buf)), sizeof(buf));
    new = open_view(f->v);
    assert_int_equal(export(f, new, old, &f->s[1]), 0);
    close_view(old);
    old = new;
    assert_int_equal(vol_unlink(f->v, ROOT, "big"), 0);
    vol_forget(f->v, a.ino, 1);
    assert_int_equal(volume_checkpoint(f->v), 0);
    new = open_view(f->v);
    assert_int_equal(export(f, new, old, &f->s[2]), 0);
    close_view(old);
    close_view(new);
    c = chain_of(f, 2);
    assert_int_equal(import(f, &c), 0);
    volume_get_params(f->imported, &p);
    assert_int_equal(p.size_limit, 400 << 20);
    assert_int_equal(import_with(f, &c, &(struct volume_params){.size_limit = 256 << 20}), -ENOSPC);
    c = chain_of(f, 3);
    assert_int_equal(import(f, &c), 0);
    same(f, f->v, f->imported);
}

/* --- what is refused --- */

static int import_row(struct fixture *f, unsigned n, const unsigned *which)
{
    struct chain c = {.n = n};
    int rc;

    for (unsigned i = 0; i < n; i++)
        c.stream[i] = &f->s[which[i]];
    f->last[0] = 0;
    rc = import(f, &c);
    assert_true(rc == 0 || f->last[0]); /* it is said why */
    /* A single increment is whole, even if nothing can be made of it alone. */
    assert_int_equal(verify(f, &c), n == 1 ? 0 : rc);
    return rc;
}

#define IMPORT(...) import_row(f, sizeof((unsigned[]){__VA_ARGS__}) / sizeof(unsigned), (const unsigned[]){__VA_ARGS__})

static void test_refused(void **state)
{
    struct fixture *f = *state;
    struct view *w[4];
    struct chain c;

    for (unsigned k = 0; k < 4; k++) {
        change(f, 300);
        w[k] = open_view(f->v);
        assert_int_equal(export(f, w[k], k ? w[k - 1] : NULL, &f->s[k]), 0);
    }
    /* 4: from the first to the third; 5: whole, of the second; 6: from a state to itself. */
    assert_int_equal(export(f, w[2], w[0], &f->s[4]), 0);
    assert_int_equal(export(f, w[1], NULL, &f->s[5]), 0);
    assert_int_equal(export(f, w[3], w[3], &f->s[6]), 0);
    for (unsigned k = 0; k < 4; k++)
        close_view(w[k]);
    assert_int_equal(IMPORT(0), 0);
    assert_int_equal(IMPORT(0, 1, 2, 3, 6, 6), 0);
    same(f, f->v, f->imported);
    assert_int_equal(IMPORT(0, 4, 3), 0);
    same(f, f->v, f->imported);
    assert_int_equal(IMPORT(5, 2, 3), 0);
    same(f, f->v, f->imported);
    assert_int_equal(IMPORT(1), -EINVAL);
    assert_int_equal(IMPORT(0, 2), -EINVAL);
    assert_int_equal(IMPORT(0, 1, 1), -EINVAL);
    assert_int_equal(IMPORT(0, 1, 3), -EINVAL);
    assert_int_equal(IMPORT(5, 1), -EINVAL);
    assert_int_equal(IMPORT(0, 5), -EINVAL);
    assert_int_equal(IMPORT(0, 1, 5), -EINVAL);
    assert_int_equal(IMPORT(0, 1, 2, 4), -EINVAL);
    /* Every byte of an increment's head, some of every frame, cuts. */
    c = chain_of(f, 2);
    for (size_t i = 0; i < f->s[1].n; i += i < 300 ? 7 : 30011) {
        size_t n = f->s[1].n;
        int rc;

        f->s[1].at[i] ^= 0x10;
        rc = verify(f, &c);
        assert_true(rc == -EBADMSG || (i < sizeof(struct export_head) && rc < 0));
        if (i % 3 == 0)
            assert_int_equal(import(f, &c), rc);
        f->s[1].at[i] ^= 0x10;
        f->s[1].n = i;
        rc = verify(f, &c);
        assert_true(rc == -EBADMSG || (i < sizeof(struct export_head) && rc < 0));
        if (i % 3 == 0)
            assert_int_equal(import(f, &c), rc);
        f->s[1].n = n;
    }
    f->s[1].n -= EXPORT_FRAME_BYTES;
    assert_int_equal(import(f, &c), -EBADMSG);
    f->s[1].n += EXPORT_FRAME_BYTES;
    assert_int_equal(stream_write(&f->s[1], "x", 1), 0);
    assert_int_equal(import(f, &c), -EBADMSG);
    assert_non_null(strstr(f->last, "increment 1: "));
    f->s[1].n--;
    assert_int_equal(import(f, &c), 0);
}

/* Another volume with the same history but for its id. */
static void test_other_volume(void **state)
{
    struct fixture *f = *state;
    struct view *old, *new;
    struct chain c = chain_of(f, 2);

    for (unsigned k = 0; k < 2; k++) {
        old = open_view(f->v);
        make_many(f, 10);
        new = open_view(f->v);
        assert_int_equal(export(f, old, NULL, &f->s[2 * k]), 0);
        assert_int_equal(export(f, new, old, &f->s[2 * k + 1]), 0);
        close_view(old);
        close_view(new);
        volume_abandon(f->v);
        free_images(f->image);
        /* The first time another id; then the same, but other root nodes: a copy that went its own way. */
        f->id[0] ^= 1;
        format(f);
    }
    assert_int_equal(import(f, &c), 0);
    c.stream[1] = &f->s[3];
    assert_int_equal(import(f, &c), -EINVAL);
    assert_non_null(strstr(f->last, "another volume"));
    assert_int_equal(verify(f, &c), -EINVAL);
    old = open_view(f->v);
    make_many(f, 10);
    new = open_view(f->v);
    assert_int_equal(export(f, new, old, &f->s[4]), 0);
    close_view(old);
    close_view(new);
    c.stream[1] = &f->s[4];
    assert_int_equal(import(f, &c), -EINVAL);
    assert_non_null(strstr(f->last, "is based on"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_shared_nodes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_random_chains, setup, teardown),
        cmocka_unit_test_setup_teardown(test_in_use, setup, teardown),
        cmocka_unit_test_setup_teardown(test_lost, setup, teardown),
        cmocka_unit_test_setup_teardown(test_chunks_and_holes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_unreadable, setup, teardown),
        cmocka_unit_test_setup_teardown(test_reused_inodes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_limit, setup, teardown),
        cmocka_unit_test_setup_teardown(test_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(test_other_volume, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
