/*
 * test_vcrypt.c - what is sealed opens at its own place and nowhere else, and no byte of it can change unnoticed.
 *
 * The data key is derived here a second time, from FORMAT.md, and extents are read with libsodium's sequential pull: so
 * both the reading from the middle and the document are held against the code.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "fs/volume/vcrypt.h"

#include <limits.h>
#include <sodium.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static const uint8_t id_a[16] = "volume a", id_b[16] = "volume b";
static struct key *key, *other_key;
static struct vkeys *ka, *kb, *kother;

static int setup(void **state)
{
    (void)state;
    if (secmem_init() < 0)
        return -1;
    key = key_new();
    other_key = key_new();
    randombytes_buf(key->b, sizeof(key->b));
    randombytes_buf(other_key->b, sizeof(other_key->b));
    return vkeys_derive(key, id_a, &ka) || vkeys_derive(key, id_b, &kb) || vkeys_derive(other_key, id_a, &kother);
}

static int teardown(void **state)
{
    (void)state;
    vkeys_free(ka);
    vkeys_free(kb);
    vkeys_free(kother);
    key_free(&key);
    key_free(&other_key);
    return 0;
}

static struct store *memory_store(void)
{
    int fd = memfd_create("test", MFD_CLOEXEC);

    assert_true(fd >= 0);
    return store_fd_take(fd);
}

static int extent_write(const struct vkeys *k, struct store *s, struct extent *e, uint32_t block, const uint8_t *plain)
{
    size_t n = (size_t)e->chunks * block;
    uint8_t *buf = malloc(EXTENT_SLACK_BEFORE + n + EXTENT_SLACK_AFTER);
    struct iovec iov = {buf + EXTENT_SLACK_BEFORE, n};
    int rc;

    extent_seal(k, e, block, plain, iov.iov_base);
    rc = s->ops->writev(s, &iov, 1, e->addr * UNIT_BYTES);
    free(buf);
    return rc;
}

static void store_flip(struct store *s, uint64_t off)
{
    uint8_t byte;
    struct iovec iov = {&byte, 1};

    assert_int_equal(s->ops->readv(s, &iov, 1, off), 0);
    byte ^= 0x10;
    iov = (struct iovec){&byte, 1};
    assert_int_equal(s->ops->writev(s, &iov, 1, off), 0);
}

/* --- nodes and superblocks --- */

static void test_self_test(void **state)
{
    (void)state;
    assert_int_equal(vcrypt_self_test(), 0);
}

static int try_node(const struct vkeys *k, struct disk_ptr ptr, unsigned level, const uint8_t *cipher,
                    const uint8_t *plain)
{
    uint8_t *page = malloc(NODE_BYTES);
    int rc;

    memcpy(page, cipher, NODE_BYTES);
    rc = node_open(k, &ptr, level, page);
    if (rc == 0)
        assert_memory_equal(page, plain, NODE_BYTES);
    else
        assert_memory_not_equal(page, plain, NODE_BYTES);
    free(page);
    return rc;
}

static void test_node(void **state)
{
    static uint8_t plain[NODE_BYTES], cipher[NODE_BYTES], again[NODE_BYTES];
    struct disk_ptr ptr = {.addr = le64_make(1234), .birth = le64_make(77)}, bad, second = ptr;

    (void)state;
    randombytes_buf(plain, sizeof(plain));
    node_seal(ka, 1234, 77, 2, plain, cipher, ptr.nonce, ptr.mac);
    node_seal(ka, 1234, 77, 2, plain, again, second.nonce, second.mac);
    assert_memory_not_equal(ptr.nonce, second.nonce, NONCE_BYTES);
    assert_memory_not_equal(cipher, again, NODE_BYTES);
    assert_int_equal(try_node(ka, ptr, 2, cipher, plain), 0);

    for (size_t i = 0; i < NODE_BYTES; i += i < 64 ? 1 : 509) {
        cipher[i] ^= 1;
        assert_int_equal(try_node(ka, ptr, 2, cipher, plain), -EBADMSG);
        cipher[i] ^= 1;
    }
    for (size_t i = 0; i < sizeof(ptr); i++) { /* address, birth, nonce, MAC */
        bad = ptr;
        ((uint8_t *)&bad)[i] ^= 0x80;
        assert_int_equal(try_node(ka, bad, 2, cipher, plain), -EBADMSG);
    }
    assert_int_equal(try_node(ka, ptr, 1, cipher, plain), -EBADMSG);
    assert_int_equal(try_node(kb, ptr, 2, cipher, plain), -EBADMSG);
    assert_int_equal(try_node(kother, ptr, 2, cipher, plain), -EBADMSG);
    assert_int_equal(try_node(ka, second, 2, cipher, plain), -EBADMSG);
    assert_int_equal(try_node(ka, ptr, 2, again, plain), -EBADMSG);
}

static void test_super(void **state)
{
    struct disk_super in = {.magic = le64_make(SUPER_MAGIC), .generation = le64_make(9)}, out;
    uint8_t buf[UNIT_BYTES], copy[UNIT_BYTES];

    (void)state;
    memset(in.zero, 3, sizeof(in.zero));
    super_seal(ka, 1, &in, buf);
    super_seal(ka, 1, &in, copy);
    assert_memory_not_equal(buf, copy, UNIT_BYTES);
    assert_int_equal(super_open(ka, 1, buf, &out), 0);
    assert_memory_equal(&in, &out, sizeof(in));
    assert_int_equal(super_open(ka, 0, buf, &out), -EBADMSG);
    assert_int_equal(super_open(kb, 1, buf, &out), -EBADMSG);
    assert_int_equal(super_open(kother, 1, buf, &out), -EBADMSG);
    for (size_t i = 0; i < sizeof(buf); i++) {
        buf[i] ^= 4;
        assert_int_equal(super_open(ka, 1, buf, &out), -EBADMSG);
        buf[i] ^= 4;
    }
    memset(buf, 0, sizeof(buf));
    assert_int_equal(super_open(ka, 1, buf, &out), -EBADMSG);
}

/* --- extents --- */

static void derive_data_key(uint8_t data_key[32])
{
    uint8_t base[32];

    crypto_generichash(base, sizeof(base), id_a, 16, key->b, sizeof(key->b));
    crypto_kdf_derive_from_key(data_key, 32, 1, "cofvol_1", base);
}

static void make_ad(const struct extent *e, uint8_t ad[25])
{
    le64 id = le64_make(e->id);

    memcpy(ad, id_a, 16);
    memcpy(ad + 16, &id, 8);
    ad[24] = e->chunks;
}

/* Reads the extent from its first chunk on, as FORMAT.md describes it, with nothing of vcrypt.c. */
static void sequential_pull(struct store *s, const struct extent *e, uint32_t block, uint8_t *plain)
{
    crypto_secretstream_xchacha20poly1305_state st;
    uint8_t data_key[32], ad[25], *message = malloc(block + 17), tag;

    derive_data_key(data_key);
    make_ad(e, ad);
    assert_int_equal(crypto_secretstream_xchacha20poly1305_init_pull(&st, e->header, data_key), 0);
    for (unsigned i = 0; i < e->chunks; i++) {
        struct iovec iov = {message + 1, block};

        message[0] = e->chunk[i].tag;
        memcpy(message + 1 + block, e->chunk[i].mac, 16);
        assert_int_equal(s->ops->readv(s, &iov, 1, e->addr * UNIT_BYTES + (uint64_t)i * block), 0);
        assert_int_equal(crypto_secretstream_xchacha20poly1305_pull(&st, plain + (size_t)i * block, NULL, &tag, message,
                                                                    block + 17, ad, sizeof(ad)),
                         0);
        assert_int_equal(tag, i + 1 == e->chunks ? crypto_secretstream_xchacha20poly1305_TAG_FINAL
                                                 : crypto_secretstream_xchacha20poly1305_TAG_MESSAGE);
    }
    free(message);
}

static void test_extent_everywhere(void **state)
{
    static uint8_t plain[EXTENT_BYTES], got[EXTENT_BYTES];
    struct store *s = memory_store();

    (void)state;
    randombytes_buf(plain, sizeof(plain));
    for (uint32_t block = 4096; block <= 16384; block *= 2) {
        for (unsigned chunks = 1; chunks * block <= EXTENT_BYTES; chunks++) {
            struct extent e = {.id = 5000 + chunks, .addr = 64 + chunks, .birth = 3, .chunks = (uint8_t)chunks};

            assert_int_equal(extent_write(ka, s, &e, block, plain), 0);
            memset(got, 0, sizeof(got));
            sequential_pull(s, &e, block, got);
            assert_memory_equal(got, plain, chunks * block);
            for (unsigned first = 0; first < chunks; first++) {
                for (unsigned n = 1; first + n <= chunks; n++) {
                    memset(got, 0, n * block);
                    assert_int_equal(extent_read(ka, s, &e, block, first, n, got), 0);
                    assert_memory_equal(got, plain + first * block, n * block);
                }
            }
            assert_int_equal(extent_read(ka, s, &e, block, 0, chunks + 1, got), -EBADMSG);
            assert_int_equal(extent_read(ka, s, &e, block, chunks, 1, got), -EBADMSG);
            assert_int_equal(extent_read(ka, s, &e, block, 0, 0, got), -EBADMSG);
            assert_int_equal(extent_read(ka, s, &e, block, UINT_MAX, 2, got), -EBADMSG);
        }
    }
    s->ops->close(s);
}

#define CHUNKS 5

/* Which of the chunks open with e; bit k for chunk k, read alone. What does not open must come back as zeroes. */
static unsigned readable(const struct vkeys *k, struct store *s, const struct extent *e, const uint8_t *plain)
{
    static const uint8_t zero[4096];
    uint8_t got[4096];
    unsigned set = 0;

    for (unsigned i = 0; i < CHUNKS; i++) {
        memset(got, 0x55, sizeof(got));
        if (extent_read(k, s, e, 4096, i, 1, got) == 0) {
            assert_memory_equal(got, plain + i * 4096, 4096);
            set |= 1u << i;
        } else {
            assert_memory_equal(got, zero, sizeof(zero));
        }
    }
    return set;
}

#define ALL ((1u << CHUNKS) - 1)

static void test_extent_tamper(void **state)
{
    static uint8_t plain[CHUNKS * 4096], got[CHUNKS * 4096];
    struct extent e = {.id = 99, .addr = 3, .chunks = CHUNKS}, x;
    struct store *s = memory_store();

    (void)state;
    randombytes_buf(plain, sizeof(plain));
    assert_int_equal(extent_write(ka, s, &e, 4096, plain), 0);
    assert_int_equal(readable(ka, s, &e, plain), ALL);
    for (unsigned i = 0; i < CHUNKS; i++) { /* the ciphertext of one chunk: only that one is lost */
        for (uint64_t at = 0; at < 4096; at += at == 0 ? 2047 : 2048) {
            store_flip(s, 3 * 4096 + i * 4096 + at);
            assert_int_equal(readable(ka, s, &e, plain), ALL & ~(1u << i));
            assert_int_equal(extent_read(ka, s, &e, 4096, 0, CHUNKS, got), -EBADMSG);
            store_flip(s, 3 * 4096 + i * 4096 + at);
        }
    }
    for (unsigned i = 0; i < CHUNKS; i++) {
        x = e;
        x.chunk[i].tag ^= 1;
        assert_int_equal(readable(ka, s, &x, plain), ALL & ~(1u << i));
        for (unsigned j = 0; j < MAC_BYTES; j++) {
            unsigned set;

            x = e;
            x.chunk[i].mac[j] ^= 1;
            set = readable(ka, s, &x, plain);
            /* The first 8 bytes are in the nonces of all later chunks. */
            assert_int_equal(set, j < 8 ? ALL & ((1u << i) - 1) : ALL & ~(1u << i));
        }
    }
    for (unsigned j = 0; j < EXTENT_HEADER; j++) {
        x = e;
        x.header[j] ^= 1;
        assert_int_equal(readable(ka, s, &x, plain), 0);
    }
    s->ops->close(s);
}

static void test_extent_place(void **state)
{
    static uint8_t plain[CHUNKS * 4096], other[CHUNKS * 4096], got[CHUNKS * 4096];
    struct extent e = {.id = 99, .addr = 3, .chunks = CHUNKS}, f = {.id = 100, .addr = 20, .chunks = CHUNKS}, x;
    struct store *s = memory_store();

    (void)state;
    randombytes_buf(plain, sizeof(plain));
    randombytes_buf(other, sizeof(other));
    assert_int_equal(extent_write(ka, s, &e, 4096, plain), 0);
    assert_int_equal(extent_write(ka, s, &f, 4096, other), 0);
    assert_int_equal(readable(kb, s, &e, plain), 0);
    assert_int_equal(readable(kother, s, &e, plain), 0);
    x = e, x.id = 100;
    assert_int_equal(readable(ka, s, &x, plain), 0);
    x = e, x.addr = 20;
    assert_int_equal(readable(ka, s, &x, plain), 0);
    x = e, x.addr = 4; /* each chunk read as the one before it */
    assert_int_equal(readable(ka, s, &x, plain), 0);
    x = e, x.chunks = CHUNKS + 1;
    assert_int_equal(readable(ka, s, &x, plain), 0);
    x = e, x.chunk[1] = e.chunk[2], x.chunk[2] = e.chunk[1];
    assert_int_equal(readable(ka, s, &x, plain), ALL & ~6u); /* later nonces hold the sum of both MACs: the same */

    /* An older version of the same bytes at the same place. */
    x = e;
    assert_int_equal(extent_write(ka, s, &x, 4096, plain), 0);
    assert_memory_not_equal(x.header, e.header, EXTENT_HEADER);
    assert_int_equal(readable(ka, s, &e, plain), 0);
    assert_int_equal(readable(ka, s, &x, plain), ALL);

    /* A hole, and a file that ends too early. */
    assert_int_equal(s->ops->punch(s, 4 * 4096, 4096), 0);
    assert_int_equal(readable(ka, s, &x, plain), ALL & ~2u);
    x.addr = 24;
    assert_int_equal(extent_read(ka, s, &x, 4096, 0, CHUNKS, got), -EIO);
    s->ops->close(s);
}

/* An extent whose every message has the tag MESSAGE is a stream that was cut: its last chunk is refused. */
static void test_extent_not_final(void **state)
{
    static uint8_t plain[CHUNKS * 4096], message[4096 + 17];
    crypto_secretstream_xchacha20poly1305_state st;
    struct extent e = {.id = 99, .addr = 3, .chunks = CHUNKS};
    struct store *s = memory_store();
    uint8_t data_key[32], ad[25];

    (void)state;
    randombytes_buf(plain, sizeof(plain));
    derive_data_key(data_key);
    make_ad(&e, ad);
    for (unsigned last = 0; last < 2; last++) {
        crypto_secretstream_xchacha20poly1305_init_push(&st, e.header, data_key);
        for (unsigned i = 0; i < CHUNKS; i++) {
            struct iovec iov = {message + 1, 4096};
            uint8_t tag = last && i + 1 == CHUNKS ? crypto_secretstream_xchacha20poly1305_TAG_FINAL : 0;

            crypto_secretstream_xchacha20poly1305_push(&st, message, NULL, plain + i * 4096, 4096, ad, sizeof(ad), tag);
            e.chunk[i].tag = message[0];
            memcpy(e.chunk[i].mac, message + 1 + 4096, MAC_BYTES);
            assert_int_equal(s->ops->writev(s, &iov, 1, (3 + i) * 4096), 0);
        }
        assert_int_equal(readable(ka, s, &e, plain), last ? ALL : ALL >> 1);
    }
    s->ops->close(s);
}

static void test_extent_item(void **state)
{
    struct extent e = {.id = 7, .addr = 55, .birth = 8, .chunks = 16, .suite = SUITE_XCHACHA20, .has_refs = true}, d;
    uint8_t item[EXTENT_ITEM_MAX + 2], bad[sizeof(item)];
    size_t n;

    (void)state;
    randombytes_buf(e.header, sizeof(e.header));
    randombytes_buf(e.chunk, sizeof(e.chunk));
    for (unsigned i = 0; i < 16; i++)
        e.ref[i] = (uint16_t)(i * 4000);
    n = extent_encode(&e, item);
    assert_int_equal(n, EXTENT_ITEM_MAX);
    assert_true(n <= ITEM_VALUE_MAX);
    assert_int_equal(extent_decode(7, item, n, &d), 0);
    assert_memory_equal(&d, &e, sizeof(e));
    for (size_t len = 0; len < sizeof(item); len++)
        assert_int_equal(extent_decode(7, item, len, &d), len == n ? 0 : -EUCLEAN);
    static const struct {
        size_t at;
        uint8_t value;
    } wrong[] = {{offsetof(struct disk_extent, suite), 0},      {offsetof(struct disk_extent, suite), 2},
                 {offsetof(struct disk_extent, chunks), 0},     {offsetof(struct disk_extent, chunks), 17},
                 {offsetof(struct disk_extent, chunks), 15},    {offsetof(struct disk_extent, refs), 0},
                 {offsetof(struct disk_extent, refs), 2},       {offsetof(struct disk_extent, epoch), 1},
                 {offsetof(struct disk_extent, addr) + 7, 0xff}};
    for (size_t i = 0; i < ARRAY_LEN(wrong); i++) {
        memcpy(bad, item, sizeof(bad));
        bad[wrong[i].at] = wrong[i].value;
        assert_int_equal(extent_decode(7, bad, n, &d), -EUCLEAN);
    }

    e.has_refs = false;
    e.chunks = 3;
    n = extent_encode(&e, item);
    assert_int_equal(n, sizeof(struct disk_extent) + 3 * sizeof(struct disk_chunk));
    assert_int_equal(extent_decode(7, item, n, &d), 0);
    assert_false(d.has_refs);
    for (unsigned i = 0; i < 3; i++)
        assert_int_equal(d.ref[i], 1);
}

/* --- records --- */

static struct disk_record a_head(enum record_type type)
{
    return (struct disk_record){.type = le16_make(type),
                                .sequence = le64_make(41),
                                .flushed = le64_make(40),
                                .data_flushed = le64_make(39),
                                .mount_id = le64_make(6)};
}

static int try_record(const struct vkeys *k, uint64_t generation, uint64_t sector, const uint8_t *in, size_t avail)
{
    struct disk_record head;
    uint8_t *body = NULL;
    int rc = record_open(k, generation, sector, in, avail, &head, &body);

    if (rc < 0)
        assert_null(body);
    free(body);
    return rc;
}

static void test_record_lengths(void **state)
{
    static uint8_t body[RECORD_BODY_MAX];
    static const size_t lengths[] = {0, 1, 389, 390, 391, 902, 903, 5000, 65536, RECORD_BODY_MAX - 1, RECORD_BODY_MAX};

    (void)state;
    randombytes_buf(body, sizeof(body));
    assert_int_equal(record_bytes(390), 512);
    assert_int_equal(record_bytes(391), 1024);
    for (size_t i = 0; i < ARRAY_LEN(lengths); i++) {
        size_t n = lengths[i], bytes = record_bytes(n);
        struct disk_record head = a_head(RECORD_CHANGES), got;
        uint8_t *out = malloc(bytes), *back = NULL;

        assert_int_equal(bytes % SECTOR_BYTES, 0);
        record_seal(ka, 3, 17, &head, n ? body : NULL, n, out);
        assert_int_equal(le32_get(head.sectors) * SECTOR_BYTES, bytes);
        assert_int_equal(record_open(ka, 3, 17, out, bytes, &got, &back), 0);
        assert_memory_equal(&got, &head, sizeof(head));
        assert_int_equal(le32_get(got.body_bytes), n);
        if (n)
            assert_memory_equal(back, body, n);
        else
            assert_null(back);
        free(back);
        assert_int_equal(try_record(ka, 3, 17, out, bytes - SECTOR_BYTES), -EBADMSG); /* cut at the segment's end */
        out[bytes - 1] ^= 1;
        assert_int_equal(try_record(ka, 3, 17, out, bytes), -EBADMSG);
        free(out);
    }
}

static void test_record_tamper(void **state)
{
    uint8_t body[700], out[1024], other[1024];
    struct disk_record head = a_head(RECORD_CHANGES);

    (void)state;
    memset(body, 5, sizeof(body));
    record_seal(ka, 3, 17, &head, body, sizeof(body), out);
    record_seal(ka, 3, 17, &head, body, sizeof(body), other);
    assert_memory_not_equal(out, other, EXTENT_HEADER);
    assert_int_equal(try_record(ka, 3, 17, out, 4096), 0);
    for (size_t i = 0; i < sizeof(out); i++) {
        out[i] ^= 0x40;
        assert_int_equal(try_record(ka, 3, 17, out, sizeof(out)), -EBADMSG);
        out[i] ^= 0x40;
    }
    assert_int_equal(try_record(ka, 2, 17, out, sizeof(out)), -EBADMSG);
    assert_int_equal(try_record(ka, 3, 18, out, sizeof(out)), -EBADMSG);
    assert_int_equal(try_record(kb, 3, 17, out, sizeof(out)), -EBADMSG);
    assert_int_equal(try_record(kother, 3, 17, out, sizeof(out)), -EBADMSG);
    memcpy(other + 512, out + 512, 512); /* torn: half of another record of the same place */
    assert_int_equal(try_record(ka, 3, 17, other, sizeof(other)), -EBADMSG);
    assert_int_equal(try_record(ka, 3, 17, out, 0), -EBADMSG);
    assert_int_equal(try_record(ka, 3, 17, out, 511), -EBADMSG);
}

/* Heads that authenticate but cannot be: only a bug or a thief of the key writes them. */
static void test_record_heads(void **state)
{
    uint8_t body[64] = {0}, out[512];
    struct disk_record head;

    (void)state;
    for (unsigned type = 0; type < 4; type++) {
        head = a_head((enum record_type)type);
        record_seal(ka, 1, 0, &head, body, sizeof(body), out);
        assert_int_equal(try_record(ka, 1, 0, out, 512),
                         type == RECORD_CHANGES || type == RECORD_REQUESTS ? 0 : -EBADMSG);
        head = a_head((enum record_type)type);
        record_seal(ka, 1, 0, &head, NULL, 0, out);
        assert_int_equal(try_record(ka, 1, 0, out, 512), type == 0 ? -EBADMSG : 0);
    }
    head = a_head(RECORD_CHANGES), head.reserved = le16_make(1);
    record_seal(ka, 1, 0, &head, body, sizeof(body), out);
    assert_int_equal(try_record(ka, 1, 0, out, 512), -EBADMSG);
    record_seal(ka, 1, 0, &head, body, sizeof(body), out);
    assert_int_equal(try_record(ka, 1, 0, out, 512), -EBADMSG);
}

/* --- names --- */

static void test_name_hash(void **state)
{
    char name[256];

    (void)state;
    memset(name, 'n', sizeof(name));
    for (size_t n = 0; n <= 255; n++) {
        uint64_t h = name_hash(ka, 1, name, n);

        assert_true(h >= COOKIE_FIRST && h + PROBE_MAX <= COOKIE_LAST);
        assert_true(h == name_hash(ka, 1, name, n));
        assert_true(h != name_hash(ka, 2, name, n) && h != name_hash(kb, 1, name, n) &&
                    h != name_hash(kother, 1, name, n));
        if (n)
            assert_true(h != name_hash(ka, 1, name, n - 1));
    }
}

/* --- the store of a descriptor --- */

static void test_store(void **state)
{
    static uint8_t bytes[3000], got[3000];
    struct iovec iov[3000];
    struct store *s = memory_store();

    (void)state;
    for (size_t i = 0; i < sizeof(bytes); i++)
        bytes[i] = (uint8_t)(i * 7);
    assert_true(ARRAY_LEN(iov) > IOV_MAX); /* one call of the store is several of the kernel */
    for (size_t i = 0; i < ARRAY_LEN(iov); i++)
        iov[i] = (struct iovec){bytes + i, 1};
    assert_int_equal(s->ops->writev(s, iov, ARRAY_LEN(iov), 100), 0);
    for (size_t i = 0; i < ARRAY_LEN(iov); i++)
        iov[i] = (struct iovec){got + i, i == 5 ? 0 : 1};
    assert_int_equal(s->ops->readv(s, iov, 5, 100), 0);
    assert_memory_equal(got, bytes, 5);
    iov[0] = (struct iovec){got, sizeof(got)};
    assert_int_equal(s->ops->readv(s, iov, 1, 100), 0);
    assert_memory_equal(got, bytes, sizeof(got));
    assert_int_equal(s->ops->size(s), 3100);
    iov[0] = (struct iovec){got, 2};
    assert_int_equal(s->ops->readv(s, iov, 1, 3099), -EIO);
    assert_int_equal(s->ops->grow(s, 65536), 0);
    assert_int_equal(s->ops->grow(s, 100), 0);
    assert_int_equal(s->ops->size(s), 65536);
    assert_int_equal(s->ops->sync(s), 0);
    s->ops->writeback(s, 0, 65536);
    assert_int_equal(s->ops->punch(s, 0, 4096), 0);
    iov[0] = (struct iovec){got, 1};
    assert_int_equal(s->ops->readv(s, iov, 1, 101), 0);
    assert_int_equal(got[0], 0);
    s->ops->close(s);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_self_test),
        cmocka_unit_test(test_node),
        cmocka_unit_test(test_super),
        cmocka_unit_test(test_extent_everywhere),
        cmocka_unit_test(test_extent_tamper),
        cmocka_unit_test(test_extent_place),
        cmocka_unit_test(test_extent_not_final),
        cmocka_unit_test(test_extent_item),
        cmocka_unit_test(test_record_lengths),
        cmocka_unit_test(test_record_tamper),
        cmocka_unit_test(test_record_heads),
        cmocka_unit_test(test_name_hash),
        cmocka_unit_test(test_store),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
