/*
 * tree_model.c - a long random run of the tree against a sorted array (treeworld.h): puts, deletes and searches in
 * several patterns, checkpoints with changes between their steps, failing reads, trims and reopenings.
 *
 *     tree_model [--seed N] [--ops N] [--corpus DIR]
 *
 * After every round the written nodes are read without the tree's code and compared whole. --corpus only writes some
 * nodes with items of all kinds into DIR, as a start for fuzz_node.
 */
#include "tests/model/treeworld.h"

#include <fcntl.h>
#include <getopt.h>
#include <unistd.h>

static uint64_t arg_seed = 1, arg_ops = 300000;
static const char *arg_corpus;

struct pattern {
    uint8_t kind; /* 0: any */
    uint64_t as;  /* numbers of a and b */
    uint64_t bs;
    int step;      /* of b: 0 random, 1 rising, -1 falling */
    unsigned puts; /* of 100 changes */
    uint64_t next; /* b, when it steps */
};

/* target: items that the run moves towards for now. */
static struct pattern new_pattern(uint64_t *rng, size_t items, size_t target)
{
    static const uint8_t kinds[] = {0, 0, ITEM_INLINE, ITEM_XATTR, ITEM_RANGE, ITEM_DIRENT, ITEM_EXTENT};
    struct pattern p = {.kind = kinds[tw_below(rng, ARRAY_LEN(kinds))],
                        .as = 1 + tw_below(rng, tw_below(rng, 2) ? 4 : 400),
                        .bs = 1 + tw_below(rng, tw_below(rng, 2) ? 2000 : 1u << 20),
                        .step = (int)tw_below(rng, 3) - 1,
                        .next = 1u << 30};

    p.puts = (unsigned)tw_below(rng, 50) + (items < target ? 50 : 5);
    return p;
}

static struct tree_key new_key(struct pattern *p, struct tworld *w)
{
    struct tree_key k = {.kind = p->kind ? p->kind : (uint8_t)(1 + tw_below(&w->rng, 9))};

    k.a = tw_below(&w->rng, p->as);
    k.b = p->step ? (p->next += (uint64_t)(int64_t)p->step) : tw_below(&w->rng, p->bs);
    if (p->step)
        k.a = p->as;
    return k;
}

/* An item that is there, most of the time. */
static struct tree_key old_key(struct pattern *p, struct tworld *w)
{
    size_t i;

    if (w->model.n == 0 || tw_below(&w->rng, 10) == 0)
        return new_key(p, w);
    if (p->step) {
        /* From somewhere on one after the other. */
        bool exact;
        struct tree_key from = {.kind = p->kind, .a = p->as / 2};

        i = tmodel_find(&w->model, &from, &exact);
        if (p->step < 0)
            i += 200;
        return w->model.item[MIN(i, w->model.n - 1)].key;
    }
    i = tw_below(&w->rng, w->model.n);
    return w->model.item[i].key;
}

static void change(struct tworld *w, struct pattern *p)
{
    struct tree_key k;

    if (tw_below(&w->rng, 100) < p->puts) {
        k = tw_below(&w->rng, 5) ? new_key(p, w) : old_key(p, w);
        tw_put(w, &k, (uint32_t)tw_next(&w->rng));
    } else {
        k = old_key(p, w);
        tw_del(w, &k);
    }
}

/* As a transaction does it: loads what it needs, and then cannot fail. */
static void prefetched_changes(struct tworld *w, struct pattern *p)
{
    struct titem todo[24];
    bool del[24];
    size_t n = 1 + tw_below(&w->rng, ARRAY_LEN(todo));
    size_t at = w->model.n ? tw_below(&w->rng, w->model.n) : 0;
    unsigned shape = (unsigned)tw_below(&w->rng, 3);

    for (size_t i = 0; i < n; i++) {
        del[i] = tw_below(&w->rng, 100) >= p->puts;
        todo[i].key = del[i] ? old_key(p, w) : new_key(p, w);
        if (shape && at + i < w->model.n) { /* neighbours, so that leaves become empty */
            del[i] = true;
            todo[i].key = w->model.item[at + i].key;
        }
        todo[i].seed = (uint32_t)tw_next(&w->rng);
    }
    if (shape == 2) { /* the last one comes back */
        del[n - 1] = false;
        if (n > 1)
            todo[n - 1].key = todo[n / 2].key;
    }
    for (size_t i = 0; i < n; i++)
        TW_MUST(tree_prefetch(w->tree, &todo[i].key) == 0);
    w->disk.fail = true;
    for (size_t i = 0; i < n; i++) {
        uint8_t value[ITEM_VALUE_MAX];
        size_t len = tw_value(todo[i].key.kind, todo[i].seed, value);

        if (del[i]) {
            TW_MUST(tree_del(w->tree, &todo[i].key) == (tmodel_del(&w->model, &todo[i].key) ? 0 : -ENOENT));
        } else {
            TW_MUST(tree_put(w->tree, &todo[i].key, value, len) == 0);
            tmodel_put(&w->model, &todo[i].key, todo[i].seed);
        }
    }
    w->disk.fail = false;
}

static void search(struct tworld *w, struct pattern *p)
{
    struct tree_key k = tw_below(&w->rng, 2) ? old_key(p, w) : new_key(p, w);

    switch (tw_below(&w->rng, 4)) {
    case 0:
        tw_get(w, &k);
        break;
    case 1:
        tw_ge(w, &k);
        break;
    case 2:
        tw_le(w, &k);
        break;
    default:
        tw_walk(w, &k, tw_below(&w->rng, 60));
    }
}

static void failing_reads(struct tworld *w, struct pattern *p)
{
    w->disk.fail = true;
    for (int i = 0; i < 5; i++) {
        search(w, p);
        change(w, p);
    }
    w->disk.fail = false;
}

/* As a checkpoint does it: items are made dirty, addresses given, and values of the same length put last. */
static void seal(struct tworld *w, struct pattern *p)
{
    struct tree_space space = tw_space(w);
    struct tree_key touched = old_key(p, w);
    int rc = tree_touch(w->tree, &touched);
    size_t dirty;
    bool exact, there = tmodel_find(&w->model, &touched, &exact) < w->model.n && exact;

    TW_MUST(rc == (there ? 0 : -ENOENT));
    tw_assign(w);
    if (tw_below(&w->rng, 2)) {
        for (uint64_t n = tw_below(&w->rng, 100); n; n--)
            change(w, p);
        there = tmodel_find(&w->model, &touched, &exact) < w->model.n && exact;
        if (there)
            TW_MUST(tree_touch(w->tree, &touched) == 0);
        tw_assign(w);
    }
    if (there && touched.kind != ITEM_INLINE && touched.kind != ITEM_XATTR) {
        size_t i = tmodel_find(&w->model, &touched, &exact);

        dirty = tree_dirty_nodes(w->tree);
        tw_put(w, &touched, w->model.item[i].seed);
        TW_MUST(tree_dirty_nodes(w->tree) == dirty && tree_assign(w->tree, &space) == 0);
    }
    tw_seal(w);
}

static int count_node(void *ctx, uint64_t addr, unsigned level, int err)
{
    (void)level;
    TW_MUST(addr != 0 && err == 0);
    ++*(size_t *)ctx;
    return 0;
}

static void round_end(struct tworld *w, struct pattern *p)
{
    size_t visited = 0;

    if (w->sealed)
        tw_write(w);
    seal(w, p);
    tree_trim(w->tree);
    tw_write(w);
    tw_verify(w);
    TW_MUST(tree_visit(w->tree, count_node, &visited) == 0 && visited == w->nodes);
    if (tw_below(&w->rng, 2))
        tw_reopen(w);
    tw_compare(w);
}

static void run(struct tworld *w, uint64_t ops)
{
    static const size_t targets[] = {0, 300, 5000, 40000};
    uint64_t rounds = 0, most = 0;
    size_t target = targets[tw_below(&w->rng, ARRAY_LEN(targets))];
    unsigned level = 0;

    while (ops) {
        struct pattern p = new_pattern(&w->rng, w->model.n, target);
        uint64_t n = 200 + tw_below(&w->rng, 4000);

        n = MIN(n, ops);
        for (uint64_t i = 0; i < n; i++) {
            uint64_t what = tw_below(&w->rng, 1000);

            if (what < 700)
                change(w, &p);
            else if (what < 900)
                search(w, &p);
            else if (what < 940)
                prefetched_changes(w, &p);
            else if (what < 960)
                failing_reads(w, &p);
            else if (what < 990)
                tree_trim(w->tree);
            else if (w->sealed)
                tw_write(w);
            else
                seal(w, &p);
        }
        ops -= n;
        if (++rounds % 12 == 0)
            target = targets[tw_below(&w->rng, ARRAY_LEN(targets))];
        round_end(w, &p);
        most = MAX(most, w->nodes);
        level = MAX(level, w->level);
    }
    printf("tree_model: %llu rounds, at most %llu nodes, level %u, %llu reads, no difference\n",
           (unsigned long long)rounds, (unsigned long long)most, level, (unsigned long long)w->disk.reads);
}

/* Some of the nodes that were written last, of each level. */
static int write_corpus(struct tworld *w, const char *dir)
{
    unsigned n[NODE_LEVEL_MAX + 1] = {0};
    char path[300];

    for (size_t i = 0; i < w->pages; i++) {
        const uint8_t *page = w->page[i].cipher; /* not encrypted for this */
        unsigned level = ((const struct disk_node *)page)->level;
        int fd, rc;

        if (n[level]++ % 4 || n[level] > 24)
            continue;
        snprintf(path, sizeof(path), "%s/level%u-%u", dir, level, n[level]);
        fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
        if (fd < 0)
            return -errno;
        rc = write_full(fd, "", 1); /* fuzz_node: a page follows */
        if (rc == 0)
            rc = write_full(fd, page, NODE_BYTES);
        close_quiet(fd);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static void plain_seal(void *ctx, uint64_t addr, uint64_t birth, unsigned level, const uint8_t *plain,
                       uint8_t *ret_cipher, uint8_t ret_nonce[NONCE_BYTES], uint8_t ret_mac[MAC_BYTES])
{
    (void)ctx, (void)addr, (void)birth, (void)level;
    memcpy(ret_cipher, plain, NODE_BYTES);
    memset(ret_nonce, 0, NONCE_BYTES);
    memset(ret_mac, 0, MAC_BYTES);
}

static int make_corpus(const char *dir)
{
    struct tworld w;
    int rc;

    tw_init(&w, arg_seed, 0, 8192);
    for (unsigned i = 0; i < 1200; i++)
        tw_put(&w, &(struct tree_key){.kind = (uint8_t)(1 + i % 9), .a = i, .b = i % 7}, (uint32_t)tw_next(&w.rng));
    tw_assign(&w);
    rc = tree_seal(w.tree, 1, plain_seal, NULL, &w.page, &w.pages, &w.sealed_root, &w.sealed_level);
    if (rc == 0)
        rc = write_corpus(&w, dir);
    tw_free(&w);
    return rc;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"seed", 1, NULL, 's'}, {"ops", 1, NULL, 'o'}, {"corpus", 1, NULL, 'c'}, {0}};
    static const size_t caches[] = {0, 20 * NODE_BYTES, 100 * NODE_BYTES};
    int c;

    while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (c == 's')
            arg_seed = strtoull(optarg, NULL, 0);
        else if (c == 'o')
            arg_ops = strtoull(optarg, NULL, 0);
        else if (c == 'c')
            arg_corpus = optarg;
        else
            return 2;
    }
    if (arg_corpus)
        return make_corpus(arg_corpus) < 0;
    for (size_t k = 0; k < ARRAY_LEN(caches); k++) {
        struct tworld w;

        snprintf(tw_repro, sizeof(tw_repro), "--seed %llu --ops %llu (cache %zu)", (unsigned long long)arg_seed,
                 (unsigned long long)arg_ops, caches[k]);
        tw_init(&w, arg_seed + k, caches[k], 8192);
        run(&w, arg_ops / ARRAY_LEN(caches));
        tw_free(&w);
    }
    return 0;
}
