/*
 * fuzz_export.c - the reader of export streams. The input is the plaintext of the stream's records: it is sealed as frames
 * with a known key, so that the import parses it as if somebody who knows the secret had made it. The first byte chooses:
 *   0      the rest as it is, head and all
 *   2      a whole export and increments: before the records of each stands how many bytes these are (2, little-endian)
 *   others one whole export
 */
#include "coffer/export.h"
#include "fs/base/secmem.h"
#include "tests/crash/recstore.h"

#include <sodium.h>
#include <stdlib.h>

#define STREAMS_MAX 4

struct stream {
    struct export_secret secret;
    uint8_t *at;
    size_t n, read;
};

struct input {
    struct stream s[STREAMS_MAX];
    unsigned n, now;
};

static int stream_read(void *ctx, void *buf, size_t n)
{
    struct input *in = ctx;
    struct stream *s = &in->s[in->now];

    if (n > s->n - s->read)
        return -ENODATA;
    memcpy(buf, s->at + s->read, n);
    s->read += n;
    return 0;
}

static int stream_next(void *ctx, const struct export_secret **ret)
{
    struct input *in = ctx;

    if (in->now + 1 >= in->n)
        return 0;
    *ret = &in->s[++in->now].secret;
    return 1;
}

static void no_line(void *ctx, const char *text)
{
    (void)ctx;
    if (strlen(text) > 250)
        abort();
}

static void seal(struct stream *s, uint32_t version, const uint8_t *data, size_t n)
{
    static uint8_t plain[EXPORT_FRAME_PLAIN];
    crypto_secretstream_xchacha20poly1305_state st;
    struct export_secret *e = &s->secret;
    uint8_t key[32] = {1};
    size_t frames = n / EXPORT_FRAME_PLAIN + 1;

    export_secret_new(EXPORT_KEY_FILE, "k", 1, e);
    e->head.version = le32_make(version);
    crypto_aead_xchacha20poly1305_ietf_encrypt(e->head.wrapped, NULL, key, 32, (uint8_t *)&e->head,
                                               offsetof(struct export_head, wrapped), NULL, e->head.nonce, e->key);
    crypto_secretstream_xchacha20poly1305_init_push(&st, e->head.stream, key);
    s->n = frames * EXPORT_FRAME_BYTES;
    s->at = malloc(s->n);
    for (size_t i = 0; i < frames; i++) {
        size_t k = MIN(n - i * EXPORT_FRAME_PLAIN, EXPORT_FRAME_PLAIN);

        memset(plain, 0, sizeof(plain));
        memcpy(plain, data + i * EXPORT_FRAME_PLAIN, k);
        crypto_secretstream_xchacha20poly1305_push(
            &st, s->at + i * EXPORT_FRAME_BYTES, NULL, plain, sizeof(plain), i ? NULL : (uint8_t *)&e->head,
            i ? 0 : sizeof(e->head), i + 1 == frames ? crypto_secretstream_xchacha20poly1305_TAG_FINAL : 0);
    }
}

static void seal_chain(struct input *in, const uint8_t *data, size_t n)
{
    while (in->n < STREAMS_MAX && n >= 2) {
        size_t k = MIN(data[0] | (size_t)data[1] << 8, n - 2);

        if (in->n + 1 == STREAMS_MAX)
            k = n - 2;
        seal(&in->s[in->n], in->n ? EXPORT_INCREMENT : EXPORT_WHOLE, data + 2, k);
        in->n++;
        data += 2 + k;
        n -= 2 + k;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct volume_params p = {.id = "fuzz", .size_limit = 64 << 20, .block_size = 4096, .log_segment = 256 << 10};
    struct volume_report r = {.line = no_line};
    struct image *image[2];
    struct input in = {0};
    struct export_io io = {.read = stream_read, .next = stream_next, .ctx = &in};
    static struct key *key;
    int rc = 0;

    if (!key && (secmem_init() < 0 || !(key = key_new())))
        abort();
    if (n == 0)
        return 0;
    if (data[0] == 0) {
        in.s[0].at = malloc(n);
        memcpy(in.s[0].at, data + 1, in.s[0].n = n - 1);
        in.n = 1;
        rc = stream_read(&in, &in.s[0].secret.head, sizeof(in.s[0].secret.head));
        in.s[0].secret.head.kind = EXPORT_KEY_FILE; /* no Argon2 */
        if (rc == 0)
            rc = export_secret_open("k", 1, &in.s[0].secret);
    } else if (data[0] == 2) {
        seal_chain(&in, data + 1, n - 1);
        rc = in.n ? 0 : -EINVAL;
    } else {
        seal(&in.s[0], EXPORT_WHOLE, data + 1, n - 1);
        in.n = 1;
    }
    if (rc == 0) {
        struct volume_params got;

        export_verify(&in.s[0].secret, &io, &got, &r);
        for (unsigned i = 0; i < in.n; i++)
            in.s[i].read = 0;
        in.s[0].read = data[0] == 0 ? sizeof(struct export_head) : 0;
        in.now = 0;
        image[0] = image_new(NULL);
        image[1] = image_new(NULL);
        volume_import(mstore_new(image[0], NULL, NULL, 0), mstore_new(image[1], NULL, NULL, 1), key, &p,
                      &in.s[0].secret, &io, &r);
        image_free(image[0]);
        image_free(image[1]);
    }
    for (unsigned i = 0; i < STREAMS_MAX; i++)
        free(in.s[i].at);
    return 0;
}
