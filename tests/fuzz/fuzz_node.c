/*
 * fuzz_node.c - the checker of nodes and what relies on it: a page that it accepts is loaded as a tree's root and
 * searched, changed and walked. First byte even: the rest is the page, zeroes behind it; odd: edits (le16 place, byte)
 * of a good leaf with items of all kinds.
 */
#include "fs/volume/node.h"
#include "tests/model/treeworld.h"

int LLVMFuzzerTestOneInput(const uint8_t *in, size_t len);

static uint8_t page[NODE_BYTES];

static int give_page(void *ctx, const struct disk_ptr *ptr, unsigned level, uint8_t *ret_page)
{
    (void)ptr;
    (void)level;
    if ((*(unsigned *)ctx)++)
        return -EIO; /* what is below an inner node */
    memcpy(ret_page, page, NODE_BYTES);
    return 0;
}

static void good_page(void)
{
    uint8_t value[ITEM_VALUE_MAX];

    node_init(page, 0);
    for (uint8_t kind = 1; kind <= 9; kind++) {
        for (unsigned i = 0; i < 3; i++) {
            struct tree_key k = {.kind = kind, .a = i, .b = i};
            size_t len = tw_value(kind, 100 + i * 7, value);
            struct disk_key dk;

            tree_key_encode(&k, &dk);
            if (len < 2500 && node_room(page) >= node_item_bytes(len))
                node_insert(page, node_count(page), &dk, value, len);
        }
    }
    node_set_place(page, 4, 1);
}

static void use(struct tree *t)
{
    struct tree_key key, found;
    uint8_t value[ITEM_VALUE_MAX] = {0};
    const uint8_t *at;
    struct tree_iter it;
    unsigned sum = 0;
    size_t len;
    int rc;

    for (rc = tree_iter_seek(t, &(struct tree_key){0}, &it); rc == 0; rc = tree_iter_next(&it))
        for (size_t i = 0; i < it.len; i++)
            sum += it.value[i];
    for (uint64_t i = 0; i < 40; i++) {
        key = (struct tree_key){.kind = (uint8_t)(i % 10), .a = i % 3 + sum % 2, .b = i % 5};
        tree_ge(t, &key, &found, &at, &len);
        tree_le(t, &key, &found, &at, &len);
        tree_put(t, &key, value, tw_mix(i + sum) % 3000);
        if (tree_ge(t, &key, &found, &at, &len) == 0)
            tree_del(t, &found);
    }
    while (tree_ge(t, &(struct tree_key){0}, &found, &at, &len) == 0)
        if (tree_del(t, &found) < 0)
            abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *in, size_t len)
{
    const struct disk_node *h = (const struct disk_node *)page;
    struct disk_ptr ptr;
    struct tree *t = NULL;
    unsigned reads = 0;
    struct tree_io io = {give_page, &reads};
    char why[160];
    int rc;

    if (len == 0)
        return 0;
    if (in[0] & 1) {
        good_page();
        for (size_t i = 1; i + 3 <= len; i += 3)
            page[(in[i] | in[i + 1] << 8) % NODE_BYTES] = in[i + 2];
    } else {
        memset(page, 0, sizeof(page));
        memcpy(page, in + 1, MIN(len - 1, sizeof(page)));
    }
    ptr = (struct disk_ptr){.addr = h->addr, .birth = h->birth};
    rc = tree_check_page(page, le64_get(h->addr), le64_get(h->birth), h->level, why, sizeof(why));
    if (tree_load(&io, 0, &ptr, h->level, &t) != (rc < 0 ? -EIO : 0))
        abort();
    if (t)
        use(t);
    tree_free(t);
    return 0;
}
