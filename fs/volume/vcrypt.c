/*
 * vcrypt.c - see vcrypt.h and FORMAT.md, which name every key, nonce, MAC and what binds what.
 *
 * Owns the subkeys (struct vkeys, in locked memory). Ciphertext of extents goes between memory and `data` without a
 * copy: a chunk's ciphertext is the middle of its secretstream message, whose ends lie over its neighbours' while it is sealed
 * or opened.
 */
#include "fs/volume/vcrypt.h"

#include <sodium.h>
#include <stdlib.h>

#define STREAM_ABYTES crypto_secretstream_xchacha20poly1305_ABYTES
#define TAG_MESSAGE   crypto_secretstream_xchacha20poly1305_TAG_MESSAGE
#define TAG_FINAL     crypto_secretstream_xchacha20poly1305_TAG_FINAL

_Static_assert(EXTENT_SLACK_BEFORE + EXTENT_SLACK_AFTER == STREAM_ABYTES, "a message's ends");
_Static_assert(STREAM_ABYTES == sizeof(struct disk_chunk), "a message is a tag, the ciphertext and a MAC");
_Static_assert(EXTENT_HEADER == crypto_secretstream_xchacha20poly1305_HEADERBYTES, "stream header");
_Static_assert(NONCE_BYTES == crypto_aead_xchacha20poly1305_ietf_NPUBBYTES, "nonce");
_Static_assert(MAC_BYTES == crypto_aead_xchacha20poly1305_ietf_ABYTES, "MAC");

typedef crypto_secretstream_xchacha20poly1305_state stream_state;

struct vkeys {
    uint8_t base[32]; /* only while the others are derived */
    uint8_t data[32], tree[32], log[32], super[32];
    uint8_t hash[crypto_shorthash_KEYBYTES];
    uint8_t volume_id[16];
};

/* --- keys --- */

int vkeys_derive(const struct key *volume_key, const uint8_t volume_id[16], struct vkeys **ret_keys)
{
    static const char context[crypto_kdf_CONTEXTBYTES + 1] = "cofvol_1";
    struct vkeys *k = secmem_alloc(sizeof(*k));

    if (!k)
        return -ENOMEM;
    crypto_generichash(k->base, sizeof(k->base), volume_id, 16, volume_key->b, sizeof(volume_key->b));
    crypto_kdf_derive_from_key(k->data, 32, 1, context, k->base);
    crypto_kdf_derive_from_key(k->tree, 32, 2, context, k->base);
    crypto_kdf_derive_from_key(k->log, 32, 3, context, k->base);
    crypto_kdf_derive_from_key(k->super, 32, 4, context, k->base);
    crypto_kdf_derive_from_key(k->hash, sizeof(k->hash), 5, context, k->base);
    memcpy(k->volume_id, volume_id, 16);
    sodium_memzero(k->base, sizeof(k->base));
    *ret_keys = k;
    return 0;
}

void vkeys_free(struct vkeys *k)
{
    secmem_free(k);
}

/* --- nodes --- */

struct node_ad {
    uint8_t volume_id[16];
    le64 addr, birth;
    uint8_t level;
};
_Static_assert(sizeof(struct node_ad) == 33, "node_ad");

static struct node_ad node_ad(const struct vkeys *k, uint64_t addr, uint64_t birth, unsigned level)
{
    struct node_ad ad = {.addr = le64_make(addr), .birth = le64_make(birth), .level = (uint8_t)level};

    memcpy(ad.volume_id, k->volume_id, 16);
    return ad;
}

void node_seal(const struct vkeys *k, uint64_t addr, uint64_t birth, unsigned level, const uint8_t *plain,
               uint8_t *ret_cipher, uint8_t ret_nonce[NONCE_BYTES], uint8_t ret_mac[MAC_BYTES])
{
    struct node_ad ad = node_ad(k, addr, birth, level);

    randombytes_buf(ret_nonce, NONCE_BYTES);
    crypto_aead_xchacha20poly1305_ietf_encrypt_detached(ret_cipher, ret_mac, NULL, plain, NODE_BYTES,
                                                        (const uint8_t *)&ad, sizeof(ad), NULL, ret_nonce, k->tree);
}

int node_open(const struct vkeys *k, const struct disk_ptr *ptr, unsigned level, uint8_t *page)
{
    struct node_ad ad = node_ad(k, le64_get(ptr->addr), le64_get(ptr->birth), level);

    if (crypto_aead_xchacha20poly1305_ietf_decrypt_detached(page, NULL, page, NODE_BYTES, ptr->mac,
                                                            (const uint8_t *)&ad, sizeof(ad), ptr->nonce, k->tree))
        return -EBADMSG;
    return 0;
}

/* --- superblocks --- */

#define SUPER_AD_TEXT "coffer super"

struct super_ad {
    uint8_t text[sizeof(SUPER_AD_TEXT) - 1];
    uint8_t volume_id[16];
    uint8_t slot;
};
_Static_assert(sizeof(struct super_ad) == 29, "super_ad");

static struct super_ad super_ad(const struct vkeys *k, unsigned slot)
{
    struct super_ad ad = {.slot = (uint8_t)slot};

    memcpy(ad.text, SUPER_AD_TEXT, sizeof(ad.text));
    memcpy(ad.volume_id, k->volume_id, 16);
    return ad;
}

void super_seal(const struct vkeys *k, unsigned slot, const struct disk_super *super, uint8_t *out)
{
    struct super_ad ad = super_ad(k, slot);

    randombytes_buf(out, NONCE_BYTES);
    crypto_aead_xchacha20poly1305_ietf_encrypt(out + NONCE_BYTES, NULL, (const uint8_t *)super, sizeof(*super),
                                               (const uint8_t *)&ad, sizeof(ad), NULL, out, k->super);
}

int super_open(const struct vkeys *k, unsigned slot, const uint8_t *in, struct disk_super *ret_super)
{
    struct super_ad ad = super_ad(k, slot);

    if (crypto_aead_xchacha20poly1305_ietf_decrypt((uint8_t *)ret_super, NULL, NULL, in + NONCE_BYTES,
                                                   UNIT_BYTES - NONCE_BYTES, (const uint8_t *)&ad, sizeof(ad), in,
                                                   k->super))
        return -EBADMSG;
    return 0;
}

/* --- extent records --- */

size_t extent_encode(const struct extent *e, uint8_t out[EXTENT_ITEM_MAX])
{
    struct disk_extent d = {.addr = le64_make(e->addr),
                            .birth = le64_make(e->birth),
                            .suite = e->suite,
                            .chunks = e->chunks,
                            .refs = e->has_refs,
                            .epoch = e->epoch};
    size_t n = sizeof(d) + e->chunks * sizeof(struct disk_chunk);

    memcpy(d.header, e->header, sizeof(d.header));
    memcpy(out, &d, sizeof(d));
    memcpy(out + sizeof(d), e->chunk, e->chunks * sizeof(struct disk_chunk));
    for (unsigned i = 0; i < e->chunks && e->has_refs; i++, n += sizeof(le16)) {
        le16 ref = le16_make(e->ref[i]);

        memcpy(out + n, &ref, sizeof(ref));
    }
    return n;
}

int extent_decode(uint64_t id, const uint8_t *value, size_t len, struct extent *ret)
{
    struct disk_extent d;
    size_t n;

    if (len < sizeof(d))
        return -EUCLEAN;
    memcpy(&d, value, sizeof(d));
    n = sizeof(d) + d.chunks * sizeof(struct disk_chunk);
    if (d.chunks < 1 || d.chunks > EXTENT_CHUNKS_MAX || d.refs > 1 || d.suite != SUITE_XCHACHA20 || d.epoch != 0 ||
        len != n + (d.refs ? d.chunks * sizeof(le16) : 0) || le64_get(d.addr) > UINT64_MAX / UNIT_BYTES / 2)
        return -EUCLEAN;
    *ret = (struct extent){.id = id,
                           .addr = le64_get(d.addr),
                           .birth = le64_get(d.birth),
                           .chunks = d.chunks,
                           .suite = d.suite,
                           .epoch = d.epoch,
                           .has_refs = d.refs};
    memcpy(ret->header, d.header, sizeof(ret->header));
    memcpy(ret->chunk, value + sizeof(d), d.chunks * sizeof(struct disk_chunk));
    for (unsigned i = 0; i < d.chunks; i++) {
        le16 ref = le16_make(1);

        if (d.refs)
            memcpy(&ref, value + n + i * sizeof(ref), sizeof(ref));
        ret->ref[i] = le16_get(ref);
    }
    return 0;
}

/* --- extents --- */

struct extent_ad {
    uint8_t volume_id[16];
    le64 id;
    uint8_t chunks;
};
_Static_assert(sizeof(struct extent_ad) == 25, "extent_ad");

static struct extent_ad extent_ad(const struct vkeys *k, const struct extent *e)
{
    struct extent_ad ad = {.id = le64_make(e->id), .chunks = e->chunks};

    memcpy(ad.volume_id, k->volume_id, 16);
    return ad;
}

void extent_seal(const struct vkeys *k, struct extent *e, uint32_t block, const uint8_t *plain, uint8_t *cipher)
{
    struct extent_ad ad = extent_ad(k, e);
    stream_state state;

    e->suite = SUITE_XCHACHA20;
    e->epoch = 0;
    e->has_refs = false;
    crypto_secretstream_xchacha20poly1305_init_push(&state, e->header, k->data);
    for (unsigned i = 0; i < e->chunks; i++) {
        uint8_t *m = cipher + (size_t)i * block - 1, before = m[0];

        e->ref[i] = 1;
        crypto_secretstream_xchacha20poly1305_push(&state, m, NULL, plain + (size_t)i * block, block,
                                                   (const uint8_t *)&ad, sizeof(ad),
                                                   i + 1 == e->chunks ? TAG_FINAL : TAG_MESSAGE);
        e->chunk[i].tag = m[0];
        memcpy(e->chunk[i].mac, m + 1 + block, MAC_BYTES);
        m[0] = before;
    }
    sodium_memzero(&state, sizeof(state));
}

/* The stream's state before chunk `first`: every message adds one to the counter and its MAC to the nonce. */
static int state_at(const struct vkeys *k, const struct extent *e, unsigned first, stream_state *ret)
{
    if (crypto_secretstream_xchacha20poly1305_init_pull(ret, e->header, k->data))
        return -EBADMSG;
    for (unsigned i = 0; i < first; i++) {
        for (unsigned j = 0; j < 8; j++)
            ret->nonce[4 + j] ^= e->chunk[i].mac[j];
    }
    ret->nonce[0] = (uint8_t)(1 + first);
    return 0;
}

int extent_open(const struct vkeys *k, const struct extent *e, uint32_t block, unsigned first, unsigned n,
                uint8_t *cipher, uint8_t *plain)
{
    struct extent_ad ad = extent_ad(k, e);
    stream_state state;
    int rc;

    rc = state_at(k, e, first, &state);
    for (unsigned i = 0; i < n && rc == 0; i++) {
        uint8_t *m = cipher + (size_t)i * block - 1, before = m[0], after[MAC_BYTES], tag;

        memcpy(after, m + 1 + block, MAC_BYTES);
        m[0] = e->chunk[first + i].tag;
        memcpy(m + 1 + block, e->chunk[first + i].mac, MAC_BYTES);
        if (crypto_secretstream_xchacha20poly1305_pull(&state, plain + (size_t)i * block, NULL, &tag, m,
                                                       block + STREAM_ABYTES, (const uint8_t *)&ad, sizeof(ad)) ||
            tag != (first + i + 1 == e->chunks ? TAG_FINAL : TAG_MESSAGE))
            rc = -EBADMSG;
        m[0] = before;
        memcpy(m + 1 + block, after, MAC_BYTES);
    }
    sodium_memzero(&state, sizeof(state));
    if (rc < 0)
        memset(plain, 0, (size_t)n * block);
    return rc;
}

/* Memory for n bytes of ciphertext, with its slack. */
static uint8_t *slack_alloc(size_t n)
{
    return (uint8_t *)xmalloc(EXTENT_SLACK_BEFORE + n + EXTENT_SLACK_AFTER) + EXTENT_SLACK_BEFORE;
}

static void slack_free(uint8_t *cipher)
{
    free(cipher - EXTENT_SLACK_BEFORE);
}

int extent_read(const struct vkeys *k, struct store *data, const struct extent *e, uint32_t block, unsigned first,
                unsigned n, uint8_t *plain)
{
    struct iovec iov;
    uint8_t *cipher;
    int rc;

    if (n == 0 || n > e->chunks || first > e->chunks - n || (size_t)e->chunks * block > EXTENT_BYTES)
        return -EBADMSG;
    cipher = slack_alloc((size_t)n * block);
    iov = (struct iovec){cipher, (size_t)n * block};
    rc = data->ops->readv(data, &iov, 1, e->addr * UNIT_BYTES + (uint64_t)first * block);
    if (rc == 0)
        rc = extent_open(k, e, block, first, n, cipher, plain);
    slack_free(cipher);
    return rc;
}

int extent_verify(const struct vkeys *k, const struct extent *e, uint32_t block, const uint8_t *cipher)
{
    size_t bytes = (size_t)e->chunks * block;
    uint8_t *copy = slack_alloc(bytes), *plain = xmalloc(bytes);
    int rc;

    memcpy(copy, cipher, bytes);
    rc = extent_open(k, e, block, 0, e->chunks, copy, plain);
    sodium_memzero(plain, bytes);
    free(plain);
    slack_free(copy);
    return rc;
}

/* --- self-test --- */

/* Every first chunk of an extent, against reading it in order; and a flipped bit is refused. */
static int test_length(const struct vkeys *k, unsigned chunks, const uint8_t *plain, uint8_t *cipher, uint8_t *got)
{
    const uint32_t block = 64;
    struct extent e = {.id = 7, .chunks = (uint8_t)chunks};

    extent_seal(k, &e, block, plain, cipher);
    for (unsigned first = 0; first < chunks; first++) {
        uint8_t *at = cipher + (size_t)first * block;

        if (extent_open(k, &e, block, first, chunks - first, at, got) < 0 ||
            memcmp(got, plain + (size_t)first * block, (size_t)(chunks - first) * block) != 0)
            return -ENOTSUP;
        at[0] ^= 1;
        if (extent_open(k, &e, block, first, 1, at, got) == 0)
            return -ENOTSUP;
        at[0] ^= 1;
    }
    return 0;
}

static int self_test(void)
{
    static const uint8_t id[16] = "self-test volume";
    uint8_t plain[EXTENT_CHUNKS_MAX * 64], buf[EXTENT_SLACK_BEFORE + sizeof(plain) + EXTENT_SLACK_AFTER] = {0};
    uint8_t got[sizeof(plain)];
    struct key *key = key_new();
    struct vkeys *k = NULL;
    int rc;

    if (!key)
        return -ENOMEM;
    randombytes_buf(key->b, sizeof(key->b));
    randombytes_buf(plain, sizeof(plain));
    rc = vkeys_derive(key, id, &k);
    for (unsigned chunks = 1; chunks <= EXTENT_CHUNKS_MAX && rc == 0; chunks++)
        rc = test_length(k, chunks, plain, buf + EXTENT_SLACK_BEFORE, got);
    vkeys_free(k);
    key_free(&key);
    return rc;
}

/* What it proves of the library does not change while the process lives. */
int vcrypt_self_test(void)
{
    static _Atomic bool passed;
    int rc = passed ? 0 : self_test();

    if (rc == 0)
        passed = true;
    return rc;
}

/* --- records --- */

size_t record_bytes(size_t body)
{
    return (RECORD_OVERHEAD + body + SECTOR_BYTES - 1) / SECTOR_BYTES * SECTOR_BYTES;
}

static struct disk_record_ad record_ad(const struct vkeys *k, uint64_t generation, uint64_t sector)
{
    struct disk_record_ad ad = {.generation = le64_make(generation), .sector = le64_make(sector)};

    memcpy(ad.volume_id, k->volume_id, 16);
    return ad;
}

#define HEAD_BYTES (sizeof(struct disk_record) + STREAM_ABYTES)

void record_seal(const struct vkeys *k, uint64_t generation, uint64_t sector, struct disk_record *head,
                 const uint8_t *body, size_t n, uint8_t *out)
{
    struct disk_record_ad ad = record_ad(k, generation, sector);
    size_t bytes = record_bytes(n), padded = bytes - RECORD_OVERHEAD;
    uint8_t *message = out + EXTENT_HEADER + HEAD_BYTES, *plain = xcalloc(1, padded ? padded : 1);
    stream_state state;

    head->sectors = le32_make((uint32_t)(bytes / SECTOR_BYTES) + le32_get(head->payload_sectors));
    head->body_bytes = le32_make((uint32_t)n);
    if (n)
        memcpy(plain, body, n);
    crypto_secretstream_xchacha20poly1305_init_push(&state, out, k->log);
    crypto_secretstream_xchacha20poly1305_push(&state, out + EXTENT_HEADER, NULL, (const uint8_t *)head, sizeof(*head),
                                               (const uint8_t *)&ad, sizeof(ad), TAG_MESSAGE);
    crypto_secretstream_xchacha20poly1305_push(&state, message, NULL, plain, padded, (const uint8_t *)&ad, sizeof(ad),
                                               TAG_FINAL);
    sodium_memzero(&state, sizeof(state));
    sodium_memzero(plain, padded);
    free(plain);
}

static bool head_ok(const struct disk_record *h, size_t avail)
{
    size_t n = le32_get(h->body_bytes), sectors = le32_get(h->sectors), payload = le32_get(h->payload_sectors);
    uint16_t type = le16_get(h->type);

    return (type == RECORD_CHANGES || type == RECORD_FLUSH || type == RECORD_REQUESTS) && n <= RECORD_BODY_MAX &&
           payload <= PAYLOAD_MAX / SECTOR_BYTES && (n || !payload) &&
           sectors * SECTOR_BYTES == record_bytes(n) + payload * SECTOR_BYTES && sectors * SECTOR_BYTES <= avail &&
           le16_get(h->reserved) == 0 && le64_get(h->reserved3) == 0 && (type != RECORD_FLUSH || n == 0) &&
           (type != RECORD_REQUESTS || (n % sizeof(le64) == 0 && !payload));
}

int record_open(const struct vkeys *k, uint64_t generation, uint64_t sector, const uint8_t *in, size_t avail,
                struct disk_record *ret_head, uint8_t **ret_body)
{
    struct disk_record_ad ad = record_ad(k, generation, sector);
    struct disk_record head;
    uint8_t tag = 0, *body = NULL;
    size_t padded = 0;
    stream_state state;
    int rc = -EBADMSG;

    if (avail < SECTOR_BYTES || crypto_secretstream_xchacha20poly1305_init_pull(&state, in, k->log))
        return -EBADMSG;
    if (crypto_secretstream_xchacha20poly1305_pull(&state, (uint8_t *)&head, NULL, &tag, in + EXTENT_HEADER, HEAD_BYTES,
                                                   (const uint8_t *)&ad, sizeof(ad)) ||
        tag != TAG_MESSAGE || !head_ok(&head, avail))
        goto out;
    padded = record_bytes(le32_get(head.body_bytes)) - RECORD_OVERHEAD;
    body = xmalloc(padded);
    if (crypto_secretstream_xchacha20poly1305_pull(&state, body, NULL, &tag, in + EXTENT_HEADER + HEAD_BYTES,
                                                   padded + STREAM_ABYTES, (const uint8_t *)&ad, sizeof(ad)) ||
        tag != TAG_FINAL)
        goto out;
    *ret_head = head;
    *ret_body = NULL;
    if (le32_get(head.body_bytes)) {
        *ret_body = body;
        body = NULL;
    }
    rc = 0;
out:
    sodium_memzero(&state, sizeof(state));
    free(body);
    return rc;
}

/* --- names --- */

uint64_t name_hash(const struct vkeys *k, uint64_t ino, const char *name, size_t n)
{
    uint8_t in[8 + 256];
    le64 dir = le64_make(ino), out;
    uint64_t h;

    n = MIN(n, sizeof(in) - 8);
    memcpy(in, &dir, 8);
    memcpy(in + 8, name, n);
    crypto_shorthash((uint8_t *)&out, in, 8 + n, k->hash);
    h = le64_get(out) & INT64_MAX;
    return MIN(MAX(h, COOKIE_FIRST), COOKIE_LAST - PROBE_MAX);
}
