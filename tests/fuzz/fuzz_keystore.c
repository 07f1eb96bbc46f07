/*
 * fuzz_keystore.c - the two checkers of a keystore's bytes. The first byte chooses: 0, a head: four bytes of the file's
 * size follow, little-endian (zero: as the head says), then the bytes; else an opened body. What is accepted must keep
 * what the rest of the code relies on: a head's counts and costs are in bounds; a body is the one encoding of what it
 * says, so decoding and encoding it again gives the same bytes.
 */
#include "keystore/keystore_format.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void need(bool ok)
{
    if (!ok)
        abort();
}

static void head(const uint8_t *p, size_t n)
{
    struct ks_image image = {0};
    uint64_t size = 0;

    if (n < 4)
        return;
    memcpy(&size, p, 4);
    p += 4, n -= 4;
    memcpy(&image, p, MIN(n, sizeof(image)));
    if (size == 0)
        size = (uint64_t)sizeof(image.head) + (uint64_t)le32_get(image.head.slots) * sizeof(struct disk_slot) +
               KS_MAC_BYTES + le32_get(image.head.body_bytes) + KS_SIG_BYTES;
    if (keystore_check_head(p, n, size) < 0)
        return;
    need(size <= KEYSTORE_FILE_MAX && ks_image_bytes(&image.head) <= MIN(n, sizeof(image)));
    need(le32_get(image.head.slots) >= 1 && le32_get(image.head.slots) <= KEYSTORE_SLOTS_MAX);
    need(ks_image_bytes(&image.head) + KS_MAC_BYTES + le32_get(image.head.body_bytes) + KS_SIG_BYTES == size);
    for (uint32_t i = 0; i < le32_get(image.head.slots); i++) {
        const struct disk_passphrase *s = &image.slot[i].params.passphrase;

        if (le32_get(image.slot[i].kind) == AGENT_SLOT_PASSPHRASE)
            need(le64_get(s->ops) - 1 < KEYSTORE_ARGON_OPS && le64_get(s->mem) <= KEYSTORE_ARGON_MEM);
    }
}

static void body(const uint8_t *p, size_t n)
{
    struct ks_body *b;
    uint8_t *again;
    le32 bytes;
    size_t m;

    if (keystore_check_body(p, n) < 0)
        return;
    b = ks_body_decode(p);
    need(b->n <= KEYSTORE_VOLUMES_MAX);
    for (unsigned i = 0; i < b->n; i++) {
        bool found;

        need(ks_volume_ok(&b->volumes[i]->v) && b->volumes[i]->nrules <= AGENT_RULES_MAX);
        need(ks_body_find(b, b->volumes[i]->v.name, &found) == i && found);
    }
    need(ks_body_encode(b, KEYSTORE_FILE_MAX, &again, &m) == 0);
    memcpy(&bytes, p, sizeof(bytes));
    need(m >= le32_get(bytes) && !memcmp(p, again, le32_get(bytes)));
    free(again);
    ks_body_free(b);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    uint8_t *copy;

    if (n < 1)
        return 0;
    /* on the heap and no longer than it is, so that a read past its end is seen */
    copy = xmalloc(n - 1);
    memcpy(copy, data + 1, n - 1);
    if (data[0] == 0)
        head(copy, n - 1);
    else
        body(copy, n - 1);
    free(copy);
    return 0;
}
