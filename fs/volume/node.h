/*
 * node.h - the slotted page of a tree node, edited in place as plaintext (FORMAT.md, "The tree").
 *
 * A page is NODE_BYTES. Functions on single pages; they know nothing of the tree. Indexes are slots, 0 .. count.
 */
#ifndef COFFER_NODE_H
#define COFFER_NODE_H

#include "fs/volume/tree.h"

void node_init(uint8_t *page, unsigned level);
unsigned node_count(const uint8_t *page);
unsigned node_level(const uint8_t *page);
/* The key of slot i, encoded. */
const struct disk_key *node_key(const uint8_t *page, unsigned i);
/* The value of slot i and its length. */
uint8_t *node_value(uint8_t *page, unsigned i, size_t *ret_len);
/* The first slot whose key is at or above key; *ret_exact when it is equal. */
unsigned node_search(const uint8_t *page, const struct disk_key *key, bool *ret_exact);
/* Bytes left for items and their slots. */
size_t node_room(const uint8_t *page);
/* Bytes that an item of a value of len takes. */
size_t node_item_bytes(size_t len);
/* Inserts at slot i; there is room. */
void node_insert(uint8_t *page, unsigned i, const struct disk_key *key, const void *value, size_t len);
void node_remove(uint8_t *page, unsigned i);
/* Gives slot i another key; the caller keeps the order. */
void node_set_key(uint8_t *page, unsigned i, const struct disk_key *key);
/* Moves slots from .. count - 1 of page to the end of to. */
void node_move(uint8_t *page, unsigned from, uint8_t *to);
/* Packs the items and zeroes the gap, so that nothing of older items is left. */
void node_compact(uint8_t *page);
void node_set_place(uint8_t *page, uint64_t addr, uint64_t birth);

#endif
