/*
 * vcrypt.h - the cryptography of a volume (FORMAT.md, "Keys" and "What is sealed how").
 *
 * Each function says what it binds. Nothing here keeps state but the subkeys. Random bytes come from the kernel at the time
 * of use.
 */
#ifndef COFFER_VCRYPT_H
#define COFFER_VCRYPT_H

#include "coffer/format.h"
#include "coffer/store.h"
#include "fs/base/secmem.h"

struct vkeys; /* the subkeys of one volume, in locked memory */

/* -ENOMEM when locked memory cannot be had. */
int vkeys_derive(const struct key *volume_key, const uint8_t volume_id[16], struct vkeys **ret_keys);
void vkeys_free(struct vkeys *k);

/* Proves that extents can be opened from the middle with this libsodium (the state of a secretstream is a public struct,
 * whose layout vcrypt relies on): every length 1..16, every first chunk, against sequential pull; and a flipped bit is
 * refused. 0 or -ENOTSUP. Called by every volume_format and volume_open. */
int vcrypt_self_test(void);

/* Nodes: AEAD xchacha20poly1305-ietf, random nonce; binds volume, addr, birth, level. Node_open works in place; -EBADMSG. */
void node_seal(const struct vkeys *k, uint64_t addr, uint64_t birth, unsigned level, const uint8_t *plain,
               uint8_t *ret_cipher, uint8_t ret_nonce[NONCE_BYTES], uint8_t ret_mac[MAC_BYTES]);
int node_open(const struct vkeys *k, const struct disk_ptr *ptr, unsigned level, uint8_t *page);

/* Superblocks: the same cipher; binds volume and slot. out and in: UNIT_BYTES. -EBADMSG. */
void super_seal(const struct vkeys *k, unsigned slot, const struct disk_super *super, uint8_t *out);
int super_open(const struct vkeys *k, unsigned slot, const uint8_t *in, struct disk_super *ret_super);

/* An extent's record in host form; what disk_extent and its tail hold. */
struct extent {
    uint64_t id, addr, birth;
    uint8_t chunks, suite, epoch;
    bool has_refs;
    uint8_t header[EXTENT_HEADER];
    struct disk_chunk chunk[EXTENT_CHUNKS_MAX];
    uint16_t ref[EXTENT_CHUNKS_MAX]; /* valid also without has_refs: all 1 */
};
#define EXTENT_ITEM_MAX (sizeof(struct disk_extent) + EXTENT_CHUNKS_MAX * (sizeof(struct disk_chunk) + sizeof(le16)))
/* Returns the item's length. */
size_t extent_encode(const struct extent *e, uint8_t out[EXTENT_ITEM_MAX]);
/* Checks every field. -EUCLEAN. */
int extent_decode(uint64_t id, const uint8_t *value, size_t len, struct extent *ret_extent);

/*
 * Ciphertext of an extent lies in a row, as in `data`. The buffers of extent_seal and extent_open must have
 * EXTENT_SLACK_BEFORE writable bytes before it and EXTENT_SLACK_AFTER behind it: there, and in the neighbouring chunk, a
 * message's tag and MAC are put for a moment.
 */
#define EXTENT_SLACK_BEFORE 1
#define EXTENT_SLACK_AFTER  MAC_BYTES

/* Seals plain (chunks * block bytes) as extent e->id (id, addr, birth, chunks are set by the caller; the rest is filled in).
 * Binds volume, extent id, chunk count. */
void extent_seal(const struct vkeys *k, struct extent *e, uint32_t block, const uint8_t *plain, uint8_t *cipher);
/* Opens chunks first .. first + n - 1, whose ciphertext is at cipher (and is the same afterwards, but for the slack). -EBADMSG when
 * one does not authenticate; plain is then zeroed. */
int extent_open(const struct vkeys *k, const struct extent *e, uint32_t block, unsigned first, unsigned n,
                uint8_t *cipher, uint8_t *plain);
/* Reads and opens; -EBADMSG or the store's error. */
int extent_read(const struct vkeys *k, struct store *data, const struct extent *e, uint32_t block, unsigned first,
                unsigned n, uint8_t *plain);
/* Does this ciphertext of a whole extent authenticate? It is not changed. 0 or -EBADMSG. */
int extent_verify(const struct vkeys *k, const struct extent *e, uint32_t block, const uint8_t *cipher);

/* Log records. Bytes on disk for a body of n bytes, without a payload (a multiple of SECTOR_BYTES). */
size_t record_bytes(size_t body);
/* Seals head (sectors and body_bytes are filled in; payload_sectors is the caller's) and body as the record at sector of the
 * segment of generation. out has record_bytes(n); the payload belongs behind it. */
void record_seal(const struct vkeys *k, uint64_t generation, uint64_t sector, struct disk_record *head,
                 const uint8_t *body, size_t n, uint8_t *out);
/*
 * Opens the record at in (avail bytes to the segment's end). *ret_body is malloc'ed, head->body_bytes long (NULL when 0).
 * The payload is not looked at: it is the last head->payload_sectors of head->sectors.
 * -EBADMSG: no valid record here (also when its length, type or reserved fields are impossible).
 */
int record_open(const struct vkeys *k, uint64_t generation, uint64_t sector, const uint8_t *in, size_t avail,
                struct disk_record *ret_head, uint8_t **ret_body);

/* 63-bit keyed hash of a name in a directory (or of an attribute's name on an inode), COOKIE_FIRST .. COOKIE_LAST. */
uint64_t name_hash(const struct vkeys *k, uint64_t ino, const char *name, size_t n);

#endif
