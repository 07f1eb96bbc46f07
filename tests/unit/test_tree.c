/* test_tree.c - the tree and the checker of nodes (fs/volume/tree.h), on the strict disk of treeworld.h. */
#include "fs/volume/node.h"
#include "tests/model/treeworld.h"

#include <pthread.h>
#include <setjmp.h>
#include <cmocka.h>

static struct tree_key range_key(uint64_t ino, uint64_t block)
{
    return tree_key(ITEM_RANGE, ino, block);
}

static void put_range(struct tworld *w, uint64_t ino, uint64_t block)
{
    struct tree_key k = range_key(ino, block);

    tw_put(w, &k, (uint32_t)tw_mix(ino + block));
}

static void del_range(struct tworld *w, uint64_t ino, uint64_t block)
{
    struct tree_key k = range_key(ino, block);

    tw_del(w, &k);
}

/* A tree of level 2, written and opened again: the root and nothing else is loaded. */
static void big_world(struct tworld *w, size_t cache_bytes)
{
    tw_init(w, 1, cache_bytes, 4096);
    for (uint64_t i = 0; i < 2000; i++)
        tw_put(w, &(struct tree_key){.kind = ITEM_SPACE, .a = i}, (uint32_t)i);
    for (uint64_t i = 0; i < 4000; i++)
        put_range(w, i % 5, i);
    tw_checkpoint(w);
    tw_verify(w);
    assert_int_equal(w->level, 2);
    tw_reopen(w);
    assert_int_equal(tree_cached_nodes(w->tree), 1);
}

/* --- searching and changing --- */

static void keys_order_as_bytes(void **state)
{
    static const uint64_t numbers[] = {0, 1, 255, 256, 1ull << 32, 1ull << 63, UINT64_MAX};

    (void)state;
    for (unsigned i = 0; i < 1000; i++) {
        uint64_t r = i;
        struct tree_key x, y, back;
        struct disk_key dx, dy;
        int c, d;

        x = tree_key((enum item_kind)(1 + tw_below(&r, 3)), numbers[tw_below(&r, 7)], numbers[tw_below(&r, 7)]);
        y = tree_key((enum item_kind)(1 + tw_below(&r, 3)), numbers[tw_below(&r, 7)], numbers[tw_below(&r, 7)]);
        tree_key_encode(&x, &dx);
        tree_key_encode(&y, &dy);
        tree_key_decode(&dx, &back);
        assert_int_equal(tree_key_cmp(&x, &back), 0);
        c = tree_key_cmp(&x, &y);
        d = memcmp(&dx, &dy, sizeof(dx));
        assert_true((c < 0) == (d < 0) && (c > 0) == (d > 0));
    }
}

static void an_empty_tree(void **state)
{
    struct tree_key k = range_key(1, 1), found;
    struct tree_iter it;
    struct tworld w;
    const uint8_t *value;
    size_t len;

    (void)state;
    tw_init(&w, 1, 0, 16);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(tree_get(w.tree, &k, &value, &len), -ENOENT);
        assert_int_equal(tree_ge(w.tree, &k, &found, &value, &len), -ENOENT);
        assert_int_equal(tree_le(w.tree, &k, &found, &value, &len), -ENOENT);
        assert_int_equal(tree_iter_seek(w.tree, &k, &it), -ENOENT);
        assert_int_equal(tree_del(w.tree, &k), -ENOENT);
        assert_int_equal(tree_touch(w.tree, &k), -ENOENT);
        if (i == 0) {
            tw_checkpoint(&w);
            tw_verify(&w);
            tw_reopen(&w);
        }
    }
    tw_free(&w);
}

static void searches_between_items(void **state)
{
    struct tworld w;

    (void)state;
    tw_init(&w, 1, 0, 64);
    for (uint64_t i = 0; i < 2000; i++)
        put_range(&w, 3, 2 * i + 1);
    for (uint64_t i = 0; i < 4002; i++) {
        struct tree_key k = range_key(3, i);

        tw_get(&w, &k);
        tw_ge(&w, &k);
        tw_le(&w, &k);
        tw_walk(&w, &k, 3);
    }
    for (uint64_t a = 0; a < 7; a++) {
        struct tree_key k = range_key(a, UINT64_MAX);

        tw_ge(&w, &k);
        tw_le(&w, &k);
    }
    tw_free(&w);
}

static void values_of_changing_length(void **state)
{
    struct tworld w;
    uint64_t rng = 7;

    (void)state;
    tw_init(&w, 1, 0, 1024);
    for (unsigned i = 0; i < 6000; i++) {
        struct tree_key k = tree_key(i % 3 ? ITEM_XATTR : ITEM_INLINE, 1, tw_below(&rng, 60));

        tw_put(&w, &k, (uint32_t)tw_next(&rng));
        if (i % 1000 == 999) {
            tw_compare(&w);
            tw_checkpoint(&w);
            tw_verify(&w);
        }
    }
    tw_free(&w);
}

static void too_long_a_value(void **state)
{
    static const uint8_t value[ITEM_VALUE_MAX + 1];
    struct tree_key k = range_key(1, 1);
    struct tworld w;

    (void)state;
    tw_init(&w, 1, 0, 16);
    assert_int_equal(tree_put(w.tree, &k, value, sizeof(value)), -EINVAL);
    tw_compare(&w);
    tw_free(&w);
}

/* --- how full nodes are --- */

static size_t fill_percent(struct tworld *w)
{
    tw_checkpoint(w);
    tw_verify(w);
    return 100 * w->leaf_bytes / w->leaves / (NODE_BYTES - sizeof(struct disk_node));
}

#define MANY 20000

static void rising_keys_fill_nodes(void **state)
{
    struct tworld w;

    (void)state;
    for (unsigned others = 0; others <= 20; others += 10) {
        tw_init(&w, 1, 0, 1024);
        for (uint64_t i = 0; i < others; i++)
            tw_put(&w, &(struct tree_key){.kind = ITEM_SPACE, .a = i}, 1); /* behind the rising ones */
        for (uint64_t i = 0; i < MANY; i++)
            put_range(&w, 1, i);
        assert_in_range(fill_percent(&w), 90, 100);
        tw_free(&w);
    }
}

static void falling_keys_fill_nodes(void **state)
{
    struct tworld w;

    (void)state;
    tw_init(&w, 1, 0, 1024);
    for (uint64_t i = MANY; i > 0; i--)
        put_range(&w, 1, i);
    assert_in_range(fill_percent(&w), 90, 100);
    tw_free(&w);
}

/* Keys that fall towards a full node once got a node each. */
static void falling_behind_a_full_node(void **state)
{
    size_t fit = (NODE_BYTES - sizeof(struct disk_node)) / node_item_bytes(sizeof(struct disk_range));
    struct tworld w;

    (void)state;
    tw_init(&w, 1, 0, 1024);
    for (uint64_t i = 0; i < 4 * fit; i++)
        put_range(&w, 1, i);
    for (uint64_t i = MANY; i > 0; i--)
        put_range(&w, 2, i);
    assert_in_range(fill_percent(&w), 45, 100);
    tw_free(&w);
}

static void random_keys_fill_nodes(void **state)
{
    struct tworld w;

    (void)state;
    tw_init(&w, 1, 0, 1024);
    for (uint64_t i = 0; i < MANY; i++)
        put_range(&w, 1, tw_mix(i));
    assert_in_range(fill_percent(&w), 55, 100);
    tw_free(&w);
}

/* --- removing --- */

static void remove_all(unsigned order)
{
    struct tworld w;

    big_world(&w, 4096 * NODE_BYTES);
    while (w.model.n) {
        size_t i = order == 0 ? 0 : order == 1 ? w.model.n - 1 : tw_below(&w.rng, w.model.n);
        struct tree_key k = w.model.item[i].key;

        tw_del(&w, &k);
    }
    tw_compare(&w);
    tw_checkpoint(&w);
    tw_verify(&w);
    if (order < 2) {
        assert_int_equal(w.level, 0);
        assert_int_equal(w.nodes, 1);
    } else {
        assert_in_range(w.nodes, 1, 8);
    }
    for (uint64_t i = 0; i < 1000; i++)
        put_range(&w, 9, i);
    tw_compare(&w);
    tw_free(&w);
}

static void removing_all_leaves_one_node(void **state)
{
    (void)state;
    for (unsigned order = 0; order < 3; order++)
        remove_all(order);
}

static void thin_nodes_merge(void **state)
{
    struct tworld w;
    size_t before;

    (void)state;
    big_world(&w, 4096 * NODE_BYTES);
    tw_compare(&w); /* loads all */
    before = tree_cached_nodes(w.tree);
    for (size_t i = 0; i < w.written_model.n; i++)
        if (i % 8)
            tw_del(&w, &w.written_model.item[i].key);
    tw_compare(&w);
    tw_checkpoint(&w);
    tw_verify(&w);
    assert_in_range(w.nodes, 1, before / 3);
    tw_free(&w);
}

/* --- what prefetch promises --- */

static void del_without_reading(struct tworld *w, size_t from, size_t n)
{
    struct titem *gone = xcalloc(n, sizeof(*gone));

    memcpy(gone, &w->model.item[from], n * sizeof(*gone));
    for (size_t i = 0; i < n; i++)
        assert_int_equal(tree_prefetch(w->tree, &gone[i].key), 0);
    w->disk.fail = true;
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(tree_del(w->tree, &gone[i].key), 0);
        tmodel_del(&w->model, &gone[i].key);
    }
    /* The leaves are gone; their range must be in memory all the same. */
    for (size_t i = 0; i < n; i++) {
        uint8_t value[ITEM_VALUE_MAX];
        size_t len = tw_value(gone[i].key.kind, gone[i].seed, value);

        assert_int_equal(tree_put(w->tree, &gone[i].key, value, len), 0);
        tmodel_put(&w->model, &gone[i].key, gone[i].seed);
    }
    w->disk.fail = false;
    free(gone);
}

static void prefetched_changes_need_no_reading(void **state)
{
    (void)state;
    for (size_t from = 0; from < 5900; from += 431) {
        struct tworld w;

        big_world(&w, 4096 * NODE_BYTES);
        del_without_reading(&w, from, 100);
        tw_compare(&w);
        tw_checkpoint(&w);
        tw_verify(&w);
        tw_free(&w);
    }
}

static void a_leaf_emptied_alone_stays_usable(void **state)
{
    struct tworld w;

    (void)state;
    big_world(&w, 4096 * NODE_BYTES);
    /* All of the leaf of item 1000, whose neighbours are not loaded, and a few items beyond it. */
    for (size_t i = 990; i < 1010; i++)
        assert_int_equal(tree_prefetch(w.tree, &w.model.item[i].key), 0);
    w.disk.fail = true;
    for (size_t i = 0; i < 20; i++) {
        struct tree_key k = w.model.item[990].key;

        assert_int_equal(tree_del(w.tree, &k), 0);
        tmodel_del(&w.model, &k);
    }
    w.disk.fail = false;
    tw_compare(&w);
    tw_checkpoint(&w);
    tw_verify(&w);
    tw_reopen(&w);
    tw_compare(&w);
    for (size_t i = 900; i < 1100; i++) {
        struct tree_key k = w.model.item[i].key;

        tw_le(&w, &k);
        tw_ge(&w, &k);
        k.b++;
        tw_le(&w, &k);
        tw_ge(&w, &k);
    }
    tw_free(&w);
}

/* --- errors --- */

static void read_errors_leave_the_tree_usable(void **state)
{
    struct tworld w;

    (void)state;
    big_world(&w, 4096 * NODE_BYTES);
    w.disk.fail = true;
    for (unsigned i = 0; i < 200; i++) {
        struct tree_key k = w.model.item[tw_below(&w.rng, w.model.n)].key;
        size_t n = w.model.n;

        tw_get(&w, &k);
        tw_ge(&w, &k);
        tw_le(&w, &k);
        tw_walk(&w, &k, 100);
        tw_put(&w, &k, 5);
        tw_del(&w, &k);
        assert_int_equal(tree_prefetch(w.tree, &k), -EIO);
        assert_int_equal(tree_touch(w.tree, &k), -EIO);
        assert_int_equal(w.model.n, n);
    }
    assert_int_equal(tree_dirty_nodes(w.tree), 0);
    w.disk.fail = false;
    tw_compare(&w);
    tw_free(&w);
}

static int take_a_leaf(void *ctx, uint64_t addr, unsigned level, int err)
{
    (void)err;
    if (level == 0)
        *(uint64_t *)ctx = addr;
    return level == 0;
}

static void a_bad_place_spares_the_others(void **state)
{
    size_t bad = 0;
    struct tworld w;
    uint64_t leaf = 0;

    (void)state;
    big_world(&w, 4096 * NODE_BYTES);
    assert_int_equal(tree_visit(w.tree, take_a_leaf, &leaf), 1);
    w.disk.fail_addr = leaf;
    for (size_t i = 0; i < w.model.n; i++) {
        const uint8_t *value;
        size_t len;
        int rc = tree_get(w.tree, &w.model.item[i].key, &value, &len);

        assert_true(rc == 0 || rc == -EIO);
        bad += rc != 0;
    }
    assert_in_range(bad, 1, 600);
    w.disk.fail_addr = 0;
    tw_compare(&w);
    tw_free(&w);
}

/* --- checkpoints --- */

static void same_length_puts_dirty_nothing_new(void **state)
{
    struct tworld w;
    struct tree_space space;
    size_t dirty;

    (void)state;
    big_world(&w, 4096 * NODE_BYTES);
    space = tw_space(&w);
    for (uint64_t i = 0; i < 2000; i += 100)
        assert_int_equal(tree_touch(w.tree, &(struct tree_key){.kind = ITEM_SPACE, .a = i}), 0);
    dirty = tree_dirty_nodes(w.tree);
    assert_in_range(dirty, 20, 30);
    assert_int_equal(tree_assign(w.tree, &space), dirty);
    for (uint64_t i = 0; i < 2000; i += 100)
        tw_put(&w, &(struct tree_key){.kind = ITEM_SPACE, .a = i}, (uint32_t)i + 9);
    assert_int_equal(tree_dirty_nodes(w.tree), dirty);
    assert_int_equal(tree_assign(w.tree, &space), 0);
    tw_seal(&w);
    assert_int_equal(w.pages, dirty);
    tw_write(&w);
    tw_verify(&w);
    tw_reopen(&w);
    tw_compare(&w);
    tw_free(&w);
}

static void nodes_dropped_after_assign_are_released(void **state)
{
    struct tworld w;

    (void)state;
    big_world(&w, 4096 * NODE_BYTES);
    for (uint64_t i = 0; i < 4000; i += 2)
        del_range(&w, i % 5, i);
    tw_assign(&w);
    for (uint64_t i = 1; i < 4000; i += 2)
        del_range(&w, i % 5, i); /* leaves with new addresses go */
    tw_checkpoint(&w);
    tw_verify(&w); /* no place is lost */
    tw_compare(&w);
    tw_free(&w);
}

static void failing_allocation_is_taken_up_again(void **state)
{
    struct tworld w;
    struct tree_space space;
    size_t dirty, given = 0;
    int rc;

    (void)state;
    big_world(&w, 4096 * NODE_BYTES);
    space = tw_space(&w);
    for (uint64_t i = 0; i < 2000; i += 10)
        tw_put(&w, &(struct tree_key){.kind = ITEM_SPACE, .a = i}, 3);
    dirty = tree_dirty_nodes(w.tree);
    do {
        w.disk.alloc_left = 7;
        given = w.disk.allocs;
        rc = tree_assign(w.tree, &space);
        given = w.disk.allocs - given;
    } while (rc == -ENOSPC && given == 7);
    assert_int_equal(rc, (int)(dirty % 7));
    w.disk.alloc_left = -1;
    tw_seal(&w);
    assert_int_equal(w.pages, dirty);
    tw_write(&w);
    tw_verify(&w);
    tw_free(&w);
}

static void a_bad_page_is_not_sealed(void **state)
{
    struct tree_key k = tree_key(ITEM_INODE, 77, 0);
    struct tree_space space;
    struct tree_page *pages = NULL;
    struct disk_ptr root;
    struct tworld w;
    unsigned level;
    size_t n = 0;

    (void)state;
    big_world(&w, 0);
    space = tw_space(&w);
    for (uint64_t i = 0; i < 2000; i += 100)
        assert_int_equal(tree_touch(w.tree, &(struct tree_key){.kind = ITEM_SPACE, .a = i}), 0);
    assert_int_equal(tree_put(w.tree, &k, "no inode", 8), 0);
    assert_true(tree_assign(w.tree, &space) > 0);
    assert_int_equal(tree_seal(w.tree, w.generation, tdisk_seal, &w.disk, &pages, &n, &root, &level), -EUCLEAN);
    assert_null(pages);
    /* What was given an address was never written: it must not be dropped and read from there. */
    for (uint64_t i = 0; i < 2000; i++) {
        struct tree_key key = {.kind = ITEM_SPACE, .a = i};

        tree_trim(w.tree);
        tw_get(&w, &key);
    }
    tw_free(&w);
}

static void unwritten_nodes_stay_in_memory(void **state)
{
    struct tworld w;
    size_t pages;

    (void)state;
    big_world(&w, 0);
    for (uint64_t i = 0; i < 2000; i++)
        tw_put(&w, &(struct tree_key){.kind = ITEM_SPACE, .a = i}, 4);
    tw_assign(&w);
    tw_seal(&w);
    pages = w.pages;
    for (unsigned i = 0; i < 10; i++)
        tree_trim(w.tree);
    assert_true(tree_cached_nodes(w.tree) >= pages);
    tw_compare(&w); /* the disk tells when one is read */
    tw_write(&w);
    tree_trim(w.tree);
    assert_true(tree_cached_nodes(w.tree) < 20);
    tw_compare(&w);
    tw_free(&w);
}

static void trim_keeps_within_the_cache(void **state)
{
    struct tworld w;
    size_t most = 60 * NODE_BYTES / (NODE_BYTES + 100);

    (void)state;
    big_world(&w, 60 * NODE_BYTES);
    for (unsigned i = 0; i < 3000; i++) {
        struct tree_key k = w.model.item[tw_below(&w.rng, w.model.n)].key;

        tw_get(&w, &k);
        if (tree_wants_trim(w.tree)) {
            tree_trim(w.tree);
            assert_true(tree_cached_nodes(w.tree) <= most);
            assert_false(tree_wants_trim(w.tree));
        }
        assert_true(tree_cached_nodes(w.tree) <= most + 4);
    }
    /* Dirty nodes do not count, and do not go. */
    for (uint64_t i = 0; i < 2000; i++)
        tw_put(&w, &(struct tree_key){.kind = ITEM_SPACE, .a = i}, 6);
    tree_trim(w.tree);
    assert_true(tree_cached_nodes(w.tree) - tree_dirty_nodes(w.tree) <= most);
    tw_checkpoint(&w);
    tree_trim(w.tree);
    assert_true(tree_cached_nodes(w.tree) <= most);
    tw_compare(&w);
    tw_free(&w);
}

struct visits {
    size_t nodes, errors;
    int stop_at;
};

static int visit(void *ctx, uint64_t addr, unsigned level, int err)
{
    struct visits *v = ctx;

    assert_true(level <= 2 && (err == 0 || err == -EIO));
    assert_true(addr % NODE_UNITS == 0);
    v->nodes++;
    v->errors += err != 0;
    return v->stop_at && v->nodes == (size_t)v->stop_at ? 42 : 0;
}

static void visiting_sees_every_node(void **state)
{
    struct tworld w;
    struct visits v = {0};
    uint64_t rng = 3;

    (void)state;
    big_world(&w, 4096 * NODE_BYTES);
    assert_int_equal(tree_visit(w.tree, visit, &v), 0);
    assert_true(v.nodes == w.nodes && v.errors == 0);
    assert_int_equal(tree_cached_nodes(w.tree), 1);
    v = (struct visits){.stop_at = 5};
    assert_int_equal(tree_visit(w.tree, visit, &v), 42);
    do
        w.disk.fail_addr = (tw_below(&rng, w.disk.places) + 1) * NODE_UNITS;
    while (w.disk.state[w.disk.fail_addr / NODE_UNITS - 1] != PLACE_LIVE || w.disk.fail_addr == le64_get(w.root.addr));
    v = (struct visits){0};
    assert_int_equal(tree_visit(w.tree, visit, &v), 0);
    assert_int_equal(v.errors, 1);
    w.disk.fail_addr = 0;
    tw_free(&w);
}

/* --- trees made by hand --- */

#define HAND_PAGES 8

struct hand {
    uint8_t page[HAND_PAGES][NODE_BYTES];
};

static int hand_read(void *ctx, const struct disk_ptr *ptr, unsigned level, uint8_t *page)
{
    struct hand *h = ctx;

    (void)level;
    if (le64_get(ptr->addr) >= HAND_PAGES)
        return -EIO;
    memcpy(page, h->page[le64_get(ptr->addr)], NODE_BYTES);
    return 0;
}

static struct disk_ptr hand_ptr(uint64_t addr)
{
    return (struct disk_ptr){.addr = le64_make(addr), .birth = le64_make(1)};
}

static void hand_init(struct hand *h, uint64_t addr, unsigned level)
{
    node_init(h->page[addr], level);
    node_set_place(h->page[addr], addr, 1);
}

static void hand_add(struct hand *h, uint64_t addr, uint64_t block, uint64_t to)
{
    uint8_t value[ITEM_VALUE_MAX], *page = h->page[addr];
    struct tree_key k = range_key(1, block);
    struct disk_ptr ptr = hand_ptr(to);
    struct disk_key dk = {0};

    if (block || node_level(page) == 0)
        tree_key_encode(&k, &dk);
    if (node_level(page))
        node_insert(page, node_count(page), &dk, &ptr, sizeof(ptr));
    else
        node_insert(page, node_count(page), &dk, value, tw_value(ITEM_RANGE, (uint32_t)block, value));
}

static int hand_load(struct hand *h, unsigned level, struct tree **ret_t)
{
    struct tree_io io = {hand_read, h};
    struct disk_ptr root = hand_ptr(1);

    return tree_load(&io, 1u << 20, &root, level, ret_t);
}

/* The slot of the root that leads to a leaf with one item; is that item taken? */
static int leaf_below(uint64_t slot_block, uint64_t next_block, uint64_t item_block, bool last)
{
    struct hand *h = xcalloc(1, sizeof(*h));
    struct tree_key k = range_key(1, slot_block);
    struct tree *t = NULL;
    const uint8_t *value;
    size_t len;
    int rc;

    hand_init(h, 1, 1);
    hand_add(h, 1, 0, 2);
    hand_add(h, 1, slot_block, 3);
    if (!last)
        hand_add(h, 1, next_block, 2);
    hand_init(h, 2, 0);
    hand_init(h, 3, 0);
    hand_add(h, 3, item_block, 0);
    assert_int_equal(hand_load(h, 1, &t), 0);
    rc = tree_get(t, &k, &value, &len);
    tree_free(t);
    free(h);
    return rc;
}

static void children_are_where_their_parent_says(void **state)
{
    (void)state;
    assert_int_equal(leaf_below(100, 200, 100, false), 0);
    assert_int_equal(leaf_below(100, 200, 199, false), -ENOENT);
    assert_int_equal(leaf_below(100, 200, 99, false), -EIO);
    assert_int_equal(leaf_below(100, 200, 200, false), -EIO);
    assert_int_equal(leaf_below(100, 200, 5000, true), -ENOENT);
}

static void wrong_nodes_are_refused(void **state)
{
    struct hand *h = xcalloc(1, sizeof(*h));
    struct tree_key k = range_key(1, 50);
    struct tree *t = NULL;
    const uint8_t *value;
    size_t len;

    (void)state;
    hand_init(h, 1, 1);
    hand_add(h, 1, 0, 2);
    hand_add(h, 1, 100, 7);
    hand_init(h, 2, 1); /* should be a leaf */
    hand_add(h, 2, 0, 3);
    assert_int_equal(hand_load(h, 0, &t), -EIO);
    assert_int_equal(hand_load(h, 2, &t), -EIO);
    assert_int_equal(hand_load(h, NODE_LEVEL_MAX + 1, &t), -EIO);
    assert_null(t);
    assert_int_equal(hand_load(h, 1, &t), 0);
    assert_int_equal(tree_get(t, &k, &value, &len), -EIO);
    assert_int_equal(tree_put(t, &k, "", 0), -EIO);
    hand_init(h, 2, 0);
    node_set_place(h->page[2], 3, 1); /* of another place */
    assert_int_equal(tree_get(t, &k, &value, &len), -EIO);
    hand_init(h, 2, 0);
    assert_int_equal(tree_get(t, &k, &value, &len), -ENOENT);
    tree_free(t);
    free(h);
}

/* The format allows an inner node's first key to be above its slot's in the parent: smaller keys may come. */
static void keys_below_an_inner_nodes_first(void **state)
{
    struct hand *h = xcalloc(1, sizeof(*h));
    struct tree *t = NULL;
    struct tree_iter it;
    uint64_t expect = 1;
    int rc;

    (void)state;
    hand_init(h, 1, 2);
    hand_add(h, 1, 0, 2);
    hand_add(h, 1, 1000, 3);
    hand_init(h, 2, 1);
    hand_add(h, 2, 0, 4);
    hand_init(h, 3, 1);
    hand_add(h, 3, 5000, 5);
    hand_add(h, 3, 6000, 6);
    for (uint64_t addr = 4; addr < 7; addr++)
        hand_init(h, addr, 0);
    assert_int_equal(hand_load(h, 2, &t), 0);
    for (uint64_t i = 7000; i > 0; i--) {
        uint8_t value[ITEM_VALUE_MAX];
        struct tree_key k = range_key(1, i);

        assert_int_equal(tree_put(t, &k, value, tw_value(ITEM_RANGE, 1, value)), 0);
    }
    for (rc = tree_iter_seek(t, &(struct tree_key){0}, &it); rc == 0; rc = tree_iter_next(&it))
        assert_int_equal(it.key.b, expect++);
    assert_int_equal(rc, -ENOENT);
    assert_int_equal(expect, 7001);
    for (uint64_t i = 1; i <= 7000; i++)
        assert_int_equal(tree_del(t, &(struct tree_key){.kind = ITEM_RANGE, .a = 1, .b = i}), 0);
    tree_free(t);
    free(h);
}

/* --- the checker --- */

#define CHECK_ADDR  44
#define CHECK_BIRTH 9

static void leaf_of(uint8_t *page, uint8_t kind, const void *value, size_t len)
{
    struct tree_key k = {.kind = kind, .a = 5, .b = 6};
    struct disk_key dk;

    tree_key_encode(&k, &dk);
    node_init(page, 0);
    node_insert(page, 0, &dk, value, len);
    node_set_place(page, CHECK_ADDR, CHECK_BIRTH);
}

static bool good(const uint8_t *page, unsigned level)
{
    char why[200] = "";
    int rc = tree_check_page(page, CHECK_ADDR, CHECK_BIRTH, level, why, sizeof(why));

    if (rc == 0)
        return true;
    assert_int_equal(rc, -EUCLEAN);
    assert_true(strncmp(why, "corrupt ", 8) == 0 && strlen(why) > 12);
    return false;
}

static bool value_good(uint8_t kind, const void *value, size_t len)
{
    uint8_t page[NODE_BYTES];

    leaf_of(page, kind, value, len);
    return good(page, 0);
}

static void the_checker_knows_every_kind(void **state)
{
    uint8_t value[ITEM_VALUE_MAX + 16];

    (void)state;
    for (uint8_t kind = 1; kind <= 9; kind++) {
        for (uint32_t seed = 0; seed < 300; seed++) {
            size_t len = tw_value(kind, seed, value);

            memset(value + len, 'z', 16);
            assert_true(value_good(kind, value, len));
            if (kind == ITEM_INLINE)
                continue;
            assert_false(value_good(kind, value, len + 1));
            assert_true(len == 0 || !value_good(kind, value, len - 1));
            assert_true(len == 0 || !value_good(kind, value, 0));
        }
    }
    memset(value, 0, sizeof(value));
    assert_true(value_good(ITEM_INLINE, value, SYMLINK_MAX) && !value_good(ITEM_INLINE, value, SYMLINK_MAX + 1));
    assert_false(value_good(0, value, 0));
    assert_false(value_good(10, value, 0));
    assert_false(value_good(255, value, 0));
}

static void the_checker_refuses_bad_fields(void **state)
{
    static const unsigned modes[] = {0, 3, 5, 7, 9, 11, 13, 15};
    uint8_t value[ITEM_VALUE_MAX];
    size_t len;

    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(modes); i++) {
        len = tw_value(ITEM_INODE, 0, value);
        ((struct disk_inode *)value)->mode = le32_make(modes[i] << 12 | 0644);
        assert_false(value_good(ITEM_INODE, value, len));
        len = tw_value(ITEM_DIRENT, 0, value);
        ((struct disk_dirent *)value)->type = (uint8_t)modes[i];
        assert_false(value_good(ITEM_DIRENT, value, len));
    }
    len = tw_value(ITEM_INODE, 0, value);
    ((struct disk_inode *)value)->flags = le32_make(2);
    assert_false(value_good(ITEM_INODE, value, len));
    len = tw_value(ITEM_DIRENT, 0, value);
    value[len - 1] = '/';
    assert_false(value_good(ITEM_DIRENT, value, len));
    value[len - 1] = 0;
    assert_false(value_good(ITEM_DIRENT, value, len));
    memset(value, 0, sizeof(value));
    ((struct disk_dirent *)value)->type = 8;
    assert_false(value_good(ITEM_DIRENT, value, sizeof(struct disk_dirent))); /* no name */
    assert_false(value_good(ITEM_XATTR, value, sizeof(struct disk_xattr)));
    for (uint16_t first = 0; first < 20; first++) {
        for (uint16_t count = 0; count < 20; count++) {
            struct disk_range r = {.extent = le64_make(1), .first = le16_make(first), .count = le16_make(count)};

            assert_int_equal(value_good(ITEM_RANGE, &r, sizeof(r)), count >= 1 && first + count <= 16);
            r.extent = le64_make(EXTENT_LOST);
            assert_int_equal(value_good(ITEM_RANGE, &r, sizeof(r)), count >= 1 && first == 0);
        }
    }
    assert_false(value_good(
        ITEM_RANGE, &(struct disk_range){.extent = le64_make(7), .first = le16_make(65535), .count = le16_make(2)},
        sizeof(struct disk_range)));
    for (unsigned what = 0; what < 4; what++) {
        struct disk_extent *d = (struct disk_extent *)value;

        memset(value, 0, sizeof(value));
        *d = (struct disk_extent){.suite = what == 0 ? 2 : 1,
                                  .chunks = what == 1   ? 0
                                            : what == 2 ? 17
                                                        : 1,
                                  .refs = what == 3 ? 2 : 0};
        len = sizeof(*d) + d->chunks * (sizeof(struct disk_chunk) + d->refs * sizeof(le16));
        assert_false(value_good(ITEM_EXTENT, value, len));
    }
}

static void page_of_items(uint8_t *page, unsigned level, unsigned n)
{
    uint8_t value[ITEM_VALUE_MAX];
    struct disk_ptr ptr = hand_ptr(8);

    node_init(page, level);
    for (unsigned i = 0; i < n; i++) {
        struct tree_key k = range_key(1, i);
        struct disk_key dk;

        tree_key_encode(&k, &dk);
        if (level)
            node_insert(page, i, &dk, &ptr, sizeof(ptr));
        else
            node_insert(page, i, &dk, value, tw_value(ITEM_RANGE, i, value));
    }
    node_set_place(page, CHECK_ADDR, CHECK_BIRTH);
}

/* Each with what is wrong in it. */
static void the_checker_refuses_bad_pages(void **state)
{
    uint8_t page[NODE_BYTES];
    struct disk_node *h = (struct disk_node *)page;
    struct disk_slot *s = (struct disk_slot *)(page + sizeof(*h));
    struct disk_slot swap;
    struct disk_ptr ptr;
    size_t len;

#define BAD(level, change)                                                                                             \
    do {                                                                                                               \
        page_of_items(page, level, 5);                                                                                 \
        assert_true(good(page, level));                                                                                \
        change;                                                                                                        \
        assert_false(good(page, level));                                                                               \
    } while (0)

    (void)state;
    for (unsigned level = 0; level < 2; level++) {
        BAD(level, h->magic = le32_make(1));
        BAD(level, h->level ^= 1);
        BAD(level, h->level = 200);
        BAD(level, h->reserved = 1);
        BAD(level, h->reserved2[3] = 1);
        BAD(level, h->birth = le64_make(CHECK_BIRTH + 1));
        BAD(level, h->addr = le64_make(CHECK_ADDR + 4));
        BAD(level, h->count = le16_make(4));
        BAD(level, h->count = le16_make(6));
        BAD(level, h->count = le16_make(65535));
        BAD(level, h->items_start = le16_make(le16_get(h->items_start) + 1));
        BAD(level, h->items_start = le16_make(le16_get(h->items_start) - 1));
        BAD(level, h->items_start = le16_make(0));
        BAD(level, h->items_start = le16_make(65535));
        BAD(level, h->items_bytes = le16_make(le16_get(h->items_bytes) - 1));
        BAD(level, s[2].off = le16_make(NODE_BYTES - 1));
        BAD(level, s[2].off = le16_make(65535));
        BAD(level, s[2].off = le16_make(0));
        BAD(level, s[2].off = s[1].off);                          /* overlap */
        BAD(level, s[2].len = le16_make(le16_get(s[2].len) + 1)); /* overlap */
        BAD(level, s[2].len = le16_make(0));
        BAD(level, s[2].len = le16_make(65535));
        BAD(level, (swap = s[1], s[1] = s[2], s[2] = swap));                                       /* order */
        BAD(level, memcpy(page + le16_get(s[2].off), node_key(page, 1), sizeof(struct disk_key))); /* twice */
    }
    page_of_items(page, 0, 0);
    assert_true(good(page, 0));
    page_of_items(page, 1, 0); /* an inner node without slots */
    assert_false(good(page, 1));
    page_of_items(page, NODE_LEVEL_MAX, 3);
    assert_true(good(page, NODE_LEVEL_MAX));
    page_of_items(page, NODE_LEVEL_MAX + 1, 3);
    assert_false(good(page, NODE_LEVEL_MAX + 1));
    ptr = hand_ptr(0); /* no address */
    BAD(1, memcpy(node_value(page, 2, &len), &ptr, sizeof(ptr)));
    ptr = hand_ptr(8);
    ptr.birth = le64_make(CHECK_BIRTH + 1); /* younger than its parent */
    BAD(1, memcpy(node_value(page, 2, &len), &ptr, sizeof(ptr)));
#undef BAD
}

/* The page's own operations, with all lengths. */
static void pages_survive_random_edits(void **state)
{
    uint8_t page[NODE_BYTES], value[ITEM_VALUE_MAX];
    uint64_t rng = 1;

    (void)state;
    node_init(page, 0);
    node_set_place(page, CHECK_ADDR, CHECK_BIRTH);
    for (unsigned i = 0; i < 50000; i++) {
        struct tree_key k = tree_key(ITEM_INLINE, 1, tw_below(&rng, 40));
        size_t len = tw_value(ITEM_INLINE, (uint32_t)tw_next(&rng), value);
        struct disk_key dk;
        bool exact;
        unsigned at;

        tree_key_encode(&k, &dk);
        at = node_search(page, &dk, &exact);
        if (exact)
            node_remove(page, at);
        else if (node_room(page) >= node_item_bytes(len))
            node_insert(page, at, &dk, value, len);
        if (i % 64 == 0) {
            node_compact(page);
            assert_true(good(page, 0));
        }
    }
}

/* --- threads --- */

struct shared {
    struct tworld w;
    pthread_rwlock_t lock;
    atomic_bool done;
};

static uint32_t seed_of(const struct tree_key *k)
{
    return (uint32_t)tw_mix(k->a * 1000003 + k->b + k->kind);
}

static void check_found(const struct tree_key *k, const uint8_t *value, size_t len)
{
    struct titem expect = {*k, seed_of(k)};

    TW_MUST(tw_same(&expect, k, value, len));
}

static void *read_for_a_while(void *arg)
{
    struct shared *s = arg;
    uint64_t rng = (uint64_t)(uintptr_t)&rng;

    while (!s->done) {
        struct tree_key k = tree_key(ITEM_EXTENT, tw_below(&rng, 20000), 0), found;
        struct tree_iter it;
        const uint8_t *value;
        size_t len;
        int rc;

        pthread_rwlock_rdlock(&s->lock);
        if (tree_get(s->w.tree, &k, &value, &len) == 0)
            check_found(&k, value, len);
        if (tree_le(s->w.tree, &k, &found, &value, &len) == 0)
            check_found(&found, value, len);
        rc = tree_iter_seek(s->w.tree, &k, &it);
        for (unsigned i = 0; rc == 0 && i < 100; i++, rc = tree_iter_next(&it))
            check_found(&it.key, it.value, it.len);
        TW_MUST(rc == 0 || rc == -ENOENT);
        tree_wants_trim(s->w.tree);
        pthread_rwlock_unlock(&s->lock);
        tree_dirty_nodes(s->w.tree);
        tree_cached_nodes(s->w.tree);
    }
    return NULL;
}

static void readers_and_a_writer(void **state)
{
    struct shared s;
    pthread_rwlockattr_t attr;
    pthread_t thread[4];

    (void)state;
    tw_init(&s.w, 5, 40 * NODE_BYTES, 4096);
    atomic_init(&s.done, false);
    pthread_rwlockattr_init(&attr);
    pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&s.lock, &attr);
    for (uint64_t i = 0; i < 15000; i++) {
        struct tree_key k = tree_key(ITEM_EXTENT, i, 0);

        tw_put(&s.w, &k, seed_of(&k));
    }
    tw_checkpoint(&s.w);
    tw_reopen(&s.w);
    for (size_t i = 0; i < ARRAY_LEN(thread); i++)
        assert_int_equal(pthread_create(&thread[i], NULL, read_for_a_while, &s), 0);
    for (unsigned i = 0; i < 400; i++) {
        pthread_rwlock_wrlock(&s.lock);
        for (unsigned n = 0; n < 20; n++) {
            struct tree_key k = tree_key(ITEM_EXTENT, tw_below(&s.w.rng, 20000), 0);

            if (n % 2)
                tw_put(&s.w, &k, seed_of(&k));
            else
                tw_del(&s.w, &k);
        }
        if (i % 10 == 3) {
            tw_assign(&s.w);
            tw_seal(&s.w);
        } else if (i % 10 == 7) {
            tw_write(&s.w);
        }
        tree_trim(s.w.tree);
        pthread_rwlock_unlock(&s.lock);
        if (i % 10 == 8) {
            pthread_rwlock_rdlock(&s.lock);
            tree_written(s.w.tree);
            pthread_rwlock_unlock(&s.lock);
        }
    }
    s.done = true;
    for (size_t i = 0; i < ARRAY_LEN(thread); i++)
        pthread_join(thread[i], NULL);
    tw_compare(&s.w);
    tw_checkpoint(&s.w);
    tw_verify(&s.w);
    tw_free(&s.w);
    pthread_rwlock_destroy(&s.lock);
    pthread_rwlockattr_destroy(&attr);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(keys_order_as_bytes),
        cmocka_unit_test(an_empty_tree),
        cmocka_unit_test(searches_between_items),
        cmocka_unit_test(values_of_changing_length),
        cmocka_unit_test(too_long_a_value),
        cmocka_unit_test(rising_keys_fill_nodes),
        cmocka_unit_test(falling_keys_fill_nodes),
        cmocka_unit_test(falling_behind_a_full_node),
        cmocka_unit_test(random_keys_fill_nodes),
        cmocka_unit_test(removing_all_leaves_one_node),
        cmocka_unit_test(thin_nodes_merge),
        cmocka_unit_test(prefetched_changes_need_no_reading),
        cmocka_unit_test(a_leaf_emptied_alone_stays_usable),
        cmocka_unit_test(read_errors_leave_the_tree_usable),
        cmocka_unit_test(a_bad_place_spares_the_others),
        cmocka_unit_test(same_length_puts_dirty_nothing_new),
        cmocka_unit_test(nodes_dropped_after_assign_are_released),
        cmocka_unit_test(failing_allocation_is_taken_up_again),
        cmocka_unit_test(a_bad_page_is_not_sealed),
        cmocka_unit_test(unwritten_nodes_stay_in_memory),
        cmocka_unit_test(trim_keeps_within_the_cache),
        cmocka_unit_test(visiting_sees_every_node),
        cmocka_unit_test(children_are_where_their_parent_says),
        cmocka_unit_test(wrong_nodes_are_refused),
        cmocka_unit_test(keys_below_an_inner_nodes_first),
        cmocka_unit_test(the_checker_knows_every_kind),
        cmocka_unit_test(the_checker_refuses_bad_fields),
        cmocka_unit_test(the_checker_refuses_bad_pages),
        cmocka_unit_test(pages_survive_random_edits),
        cmocka_unit_test(readers_and_a_writer),
    };

    return cmocka_run_group_tests_name("tree", tests, NULL, NULL);
}
