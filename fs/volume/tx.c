/*
 * tx.c - see tx.h. Owns a transaction's body: a row of struct disk_change as the log record will hold it, with an index of
 * what is in it. The live path and recovery apply a body with the same function, apply_change.
 */
#include "fs/volume/tx.h"

#include "fs/volume/checkpoint.h"
#include "fs/volume/log.h"
#include "fs/volume/requests.h"
#include "fs/volume/space.h"

#include <stdlib.h>

/* --- begin and end --- */

/* [state exclusive] */
static bool has_room(struct volume *v)
{
    /* A region whose bitmap changed is a node to write, too. */
    return tree_dirty_nodes(v->tree) + space_dirty_regions(v->space) < v->dirty_max && log_has_room(v->log);
}

/* Units that one metadata operation may add: a few split nodes. */
#define GROW_UNITS (8 * NODE_UNITS)

/* [state exclusive] */
static bool room_for(struct volume *v, enum tx_room room)
{
    switch (room) {
    case TX_GROWS:
        return space_room(v->space, GROW_UNITS, tree_dirty_nodes(v->tree));
    case TX_CHANGES:
        return space_room_to_change(v->space, tree_dirty_nodes(v->tree));
    case TX_LAST:
        break;
    }
    return true;
}

int tx_begin(struct volume *v, struct tx *tx, enum tx_room room)
{
    bool forced = false;
    int rc;

    for (;;) {
        rc = volume_changes(v);
        if (rc < 0)
            return rc;
        pthread_rwlock_wrlock(&v->state);
        if (!has_room(v)) {
            pthread_rwlock_unlock(&v->state);
            rc = checkpoint_run(v, 0);
            if (rc < 0)
                return rc;
            continue;
        }
        if (room_for(v, room))
            break;
        pthread_rwlock_unlock(&v->state);
        if (forced)
            return -ENOSPC;
        rc = checkpoint_run(v, 0);
        if (rc < 0)
            return rc;
        forced = true;
    }
    if (v->failed) {
        pthread_rwlock_unlock(&v->state);
        return -EIO;
    }
    *tx = (struct tx){.v = v, .now = now_ns(), .next_inode = v->next_inode};
    return 0;
}

static void tx_free_buffers(struct tx *tx)
{
    free(tx->body);
    free(tx->change);
}

int tx_abort(struct tx *tx, int rc)
{
    pthread_rwlock_unlock(&tx->v->state);
    tx_free_buffers(tx);
    return rc;
}

/* --- building --- */

static struct disk_change *append(struct tx *tx, enum change_op op, const struct tree_key *key, const void *value,
                                  size_t len)
{
    size_t need = tx->body_len + sizeof(struct disk_change) + len;
    struct disk_change *c;

    if (need > tx->body_cap) {
        tx->body_cap = MAX(need, tx->body_cap ? tx->body_cap * 2 : 2048);
        tx->body = xrealloc(tx->body, tx->body_cap);
    }
    if (tx->changes == tx->changes_cap) {
        tx->changes_cap = tx->changes_cap ? tx->changes_cap * 2 : 16;
        tx->change = xrealloc(tx->change, tx->changes_cap * sizeof(*tx->change));
    }
    c = (struct disk_change *)(tx->body + tx->body_len);
    c->op = (uint8_t)op;
    tree_key_encode(key, &c->key);
    c->len = le16_make((uint16_t)len);
    if (len)
        memcpy(c + 1, value, len);
    tx->change[tx->changes++] =
        (struct tx_change){.op = (uint8_t)op, .key = *key, .len = (uint16_t)len, .value = (uint32_t)(need - len)};
    tx->body_len = need;
    return c;
}

/* The newest pending change of an item, or NULL. */
static const struct tx_change *find_change(const struct tx *tx, const struct tree_key *key)
{
    for (size_t i = tx->changes; i-- > 0;) {
        const struct tx_change *c = &tx->change[i];

        if ((c->op == CHANGE_PUT || c->op == CHANGE_DEL) && tree_key_cmp(&c->key, key) == 0)
            return c;
    }
    return NULL;
}

ssize_t tx_get(struct tx *tx, const struct tree_key *key, void *buf, size_t cap)
{
    const struct tx_change *c = find_change(tx, key);
    const uint8_t *value;
    size_t len;
    int rc;

    if (c) {
        if (c->op == CHANGE_DEL)
            return -ENOENT;
        value = tx->body + c->value;
        len = c->len;
    } else {
        rc = tree_get(tx->v->tree, key, &value, &len);
        if (rc < 0)
            return rc;
    }
    if (len > cap)
        return -ERANGE;
    memcpy(buf, value, len);
    return (ssize_t)len;
}

int tx_put(struct tx *tx, const struct tree_key *key, const void *value, size_t len)
{
    int rc;

    if (len > ITEM_VALUE_MAX)
        return -EINVAL;
    rc = tree_prefetch(tx->v->tree, key);
    if (rc < 0)
        return rc;
    append(tx, CHANGE_PUT, key, value, len);
    return 0;
}

int tx_del(struct tx *tx, const struct tree_key *key)
{
    int rc = tree_prefetch(tx->v->tree, key);

    if (rc < 0)
        return rc;
    append(tx, CHANGE_DEL, key, NULL, 0);
    return 0;
}

void tx_alloc(struct tx *tx, uint64_t addr, uint64_t units)
{
    append(tx, CHANGE_ALLOC, &(struct tree_key){.a = addr, .b = units}, NULL, 0);
}

void tx_free(struct tx *tx, uint64_t addr, uint64_t units)
{
    append(tx, CHANGE_FREE, &(struct tree_key){.a = addr, .b = units}, NULL, 0);
}

int tx_inode(struct tx *tx, uint64_t ino, struct inode *ret)
{
    struct tree_key key = tree_key(ITEM_INODE, ino, 0);
    uint8_t value[sizeof(struct disk_inode)];
    ssize_t len = tx_get(tx, &key, value, sizeof(value));

    if (len < 0)
        return len == -ERANGE ? -EIO : (int)len;
    return inode_decode(ino, value, (size_t)len, ret) < 0 ? -EIO : 0;
}

int tx_inode_put(struct tx *tx, const struct inode *i)
{
    struct tree_key key = tree_key(ITEM_INODE, i->ino, 0);
    struct disk_inode value;

    inode_encode(i, &value);
    return tx_put(tx, &key, &value, sizeof(value));
}

uint64_t tx_new_inode(struct tx *tx)
{
    return tx->next_inode++;
}

/* --- applying --- */

/* [state exclusive] The one place where logged changes meet the state. */
static int apply_change(struct volume *v, enum change_op op, const struct tree_key *key, const uint8_t *value,
                        size_t len)
{
    int rc;

    switch (op) {
    case CHANGE_PUT:
        rc = tree_put(v->tree, key, value, len);
        if (rc < 0)
            return rc;
        if (key->kind == ITEM_INODE && key->a >= v->next_inode) {
            v->next_inode = key->a + 1;
            v->inodes++;
        } else if (key->kind == ITEM_EXTENT) {
            uint64_t next = atomic_load(&v->next_extent);

            while (next <= key->a && !atomic_compare_exchange_weak(&v->next_extent, &next, key->a + 1))
                ;
        }
        return 0;
    case CHANGE_DEL:
        rc = tree_del(v->tree, key);
        if (rc == -ENOENT && v->repair)
            return 0; /* it was lost */
        if (rc == 0 && key->kind == ITEM_INODE)
            v->inodes--;
        return rc;
    case CHANGE_ALLOC:
        rc = v->space_lost ? 0 : space_commit(v->space, key->a, key->b);
        return v->repair ? 0 : rc; /* what is used is found out afterwards */
    case CHANGE_FREE:
        rc = v->space_lost ? 0 : space_release(v->space, key->a, key->b);
        return v->repair ? 0 : rc;
    }
    return -EUCLEAN;
}

int tx_commit(struct tx *tx)
{
    struct volume *v = tx->v;
    struct log_slot slot;
    bool with_data = false, kick;
    int rc = 0;

    if (!tx->changes)
        return tx_abort(tx, 0);
    if (tx->body_len > log_body_max(v->log))
        return tx_abort(tx, -EMSGSIZE); /* an operation that failed to split itself: refused whole */
    if (record_bytes(tx->body_len) + tx->payload_bytes > record_bytes(log_body_max(v->log)))
        tx->payload_bytes = 0;
    for (size_t i = 0; i < tx->changes && !tx->payload_bytes; i++)
        with_data |= tx->change[i].op == CHANGE_ALLOC;
    log_reserve(v->log, tx->body_len, tx->payload_bytes, with_data, &slot);
    request_committed();
    for (size_t i = 0; i < tx->changes && rc == 0; i++) {
        const struct tx_change *c = &tx->change[i];

        rc = apply_change(v, c->op, &c->key, tx->body + c->value, c->len);
    }
    if (rc < 0)
        rc = volume_fail(v, "applying a change", rc);
    if (tree_wants_trim(v->tree))
        tree_trim(v->tree);
    kick = log_wants_checkpoint(v->log) || tree_dirty_nodes(v->tree) > v->dirty_max / 2;
    pthread_rwlock_unlock(&v->state);
    if (rc == 0)
        rc = log_write(v, &slot, RECORD_CHANGES, tx->body, tx->body_len, tx->payload);
    tx_free_buffers(tx);
    volume_kick(v, kick);
    return rc;
}

int tx_replay(struct volume *v, const uint8_t *body, size_t len)
{
    while (len) {
        const struct disk_change *c = (const struct disk_change *)body;
        struct tree_key key;
        size_t n;
        int rc;

        if (len < sizeof(*c))
            return -EUCLEAN;
        n = le16_get(c->len);
        if (n > len - sizeof(*c) || n > ITEM_VALUE_MAX || (n && c->op != CHANGE_PUT))
            return -EUCLEAN;
        tree_key_decode(&c->key, &key);
        if (c->op < CHANGE_PUT || c->op > CHANGE_FREE)
            return -EUCLEAN;
        rc = apply_change(v, c->op, &key, (const uint8_t *)(c + 1), n);
        /* What is on a damaged node cannot be read with or without this change; the rest can. */
        if (rc == -EIO)
            v->read_only = true;
        else if (rc < 0)
            return rc == -ENOENT ? -EUCLEAN : rc;
        body += sizeof(*c) + n;
        len -= sizeof(*c) + n;
    }
    return 0;
}
