/*
 * tx.h - a transaction: the changes of one operation, logged as one record and applied together.
 *
 *     struct tx tx;
 *     rc = tx_begin(v, &tx, TX_GROWS);     takes the state lock exclusively
 *     if (rc < 0) return rc;
 *     ... tx_get, tx_inode, tx_put, tx_del: reads see the transaction's own changes ...
 *     if (rc < 0) return tx_abort(&tx, rc);
 *     return tx_commit(&tx);              logs, applies, unlocks, waits until the record is written
 *
 * All that can fail for reasons on disk fails before tx_commit: put and del load the nodes that they will need.
 */
#ifndef COFFER_TX_H
#define COFFER_TX_H

#include "fs/volume/state.h"

struct tx_change {
    uint8_t op;
    struct tree_key key;
    uint16_t len;
    uint32_t value; /* offset in the body */
};

struct tx {
    struct volume *v;
    uint8_t *body; /* the record's body, growing: disk_change and values */
    size_t body_len, body_cap;
    struct tx_change *change;
    size_t changes, changes_cap;
    int64_t now; /* ns, one time for the whole operation */
    /* The ciphertext of all extents that the transaction allocates and puts, in that order, if it is to ride in the record:
     * then a flush of the log alone makes it durable. The caller's; it is in `data`, too, but not flushed. */
    const uint8_t *payload;
    size_t payload_bytes; /* at most PAYLOAD_MAX */
    uint64_t next_inode;  /* becomes v->next_inode at commit */
};

enum tx_room {
    TX_CHANGES, /* frees something, or changes what is there: refused only when snapshots keep so much that nothing can be freed */
    TX_GROWS, /* adds to the volume: refused when only the reserve (for checkpoints, deletes and truncates) is left */
    TX_LAST,  /* never refused: what removes a snapshot */
};

/* Waits for room in the log (a checkpoint may run), then takes the state lock exclusively. -EROFS, -EIO, -ENOSPC. */
int tx_begin(struct volume *v, struct tx *tx, enum tx_room room);

/* Copies the item's value, pending changes included. Returns its length, -ENOENT, -EIO, -ERANGE when cap is too small. */
ssize_t tx_get(struct tx *tx, const struct tree_key *key, void *buf, size_t cap);
/* Sets an item (len <= ITEM_VALUE_MAX). -EIO. */
int tx_put(struct tx *tx, const struct tree_key *key, const void *value, size_t len);
/* Removes an item that exists (in the tree or pending). -EIO. */
int tx_del(struct tx *tx, const struct tree_key *key);
/* Units handed out by space_alloc become used; units of an extent become free after the next checkpoint. */
void tx_alloc(struct tx *tx, uint64_t addr, uint64_t units);
void tx_free(struct tx *tx, uint64_t addr, uint64_t units);

/* An inode, pending changes included. -ENOENT, -EIO. */
int tx_inode(struct tx *tx, uint64_t ino, struct inode *ret);
int tx_inode_put(struct tx *tx, const struct inode *i);
/* A new inode number. */
uint64_t tx_new_inode(struct tx *tx);

/* Bytes of body so far: operations that can grow without bound split themselves well below RECORD_BODY_MAX. */
static inline size_t tx_size(const struct tx *tx)
{
    return tx->body_len;
}

/* Ends the transaction in every case. Returns 0, or -EIO when the record could not be written (the volume has then failed). */
int tx_commit(struct tx *tx);
/* Drops all changes, unlocks, returns rc. */
int tx_abort(struct tx *tx, int rc);

/* Applies the body of a CHANGES record during recovery [state exclusive]. -EUCLEAN when it is not well formed. A change on a
 * node that cannot be read is left out and makes the volume read-only. */
int tx_replay(struct volume *v, const uint8_t *body, size_t len);

#endif
