/*
 * fuzz_export.c - the reader of export streams. The input is the plaintext of the stream's records: it is sealed as frames
 * with a known key, so that the import parses it as if somebody who knows the secret had made it. A first byte of 0 gives
 * the rest as it is, head and all.
 */
#include "coffer/export.h"
#include "fs/base/secmem.h"
#include "tests/crash/recstore.h"

#include <sodium.h>
#include <stdlib.h>

struct stream {
    uint8_t *at;
    size_t n, read;
};

static int stream_read(void *ctx, void *buf, size_t n)
{
    struct stream *s = ctx;

    if (n > s->n - s->read)
        return -ENODATA;
    memcpy(buf, s->at + s->read, n);
    s->read += n;
    return 0;
}

static void no_line(void *ctx, const char *text)
{
    (void)ctx;
    if (strlen(text) > 250)
        abort();
}

static void seal(struct stream *s, struct export_secret *e, const uint8_t *data, size_t n)
{
    static uint8_t plain[EXPORT_FRAME_PLAIN];
    crypto_secretstream_xchacha20poly1305_state st;
    uint8_t key[32] = {1};
    size_t frames = n / EXPORT_FRAME_PLAIN + 1;

    export_secret_new(EXPORT_KEY_FILE, "k", 1, e);
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

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct volume_params p = {.id = "fuzz", .size_limit = 64 << 20, .block_size = 4096, .log_segment = 256 << 10};
    struct volume_report r = {.line = no_line};
    struct image *image[2];
    struct export_secret e = {0};
    struct stream s = {0};
    struct export_io io = {.read = stream_read, .ctx = &s};
    static struct key *key;
    int rc = 0;

    if (!key && (secmem_init() < 0 || !(key = key_new())))
        abort();
    if (n == 0)
        return 0;
    if (data[0] == 0) {
        s.at = malloc(n);
        memcpy(s.at, data + 1, s.n = n - 1);
        rc = stream_read(&s, &e.head, sizeof(e.head));
        e.head.kind = EXPORT_KEY_FILE; /* no Argon2 */
        if (rc == 0)
            rc = export_secret_open("k", 1, &e);
    } else {
        seal(&s, &e, data + 1, n - 1);
    }
    if (rc == 0) {
        struct volume_params got;

        export_verify(&e, &io, &got, &r);
        s.read = data[0] == 0 ? sizeof(e.head) : 0;
        image[0] = image_new(NULL);
        image[1] = image_new(NULL);
        volume_import(mstore_new(image[0], NULL, NULL, 0), mstore_new(image[1], NULL, NULL, 1), key, &p, &e, &io, &r);
        image_free(image[0]);
        image_free(image[1]);
    }
    free(s.at);
    return 0;
}
