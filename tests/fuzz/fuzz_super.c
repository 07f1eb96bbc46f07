/*
 * fuzz_super.c - superblocks: raw bytes as a sealed one, and edits of a good one that are then sealed with the right
 * key (what lies behind authentication), opened and used.
 */
#include "tests/fuzz/fuzzvol.h"

int LLVMFuzzerTestOneInput(const uint8_t *in, size_t len);

int LLVMFuzzerTestOneInput(const uint8_t *in, size_t len)
{
    static struct image *base[2];
    struct disk_super super, raw;
    uint8_t buf[UNIT_BYTES] = {0};
    struct image *image[2];
    unsigned slot;

    if (!base[0])
        fuzz_base(true, base);
    memcpy(buf, in, MIN(len, sizeof(buf)));
    super_open(fuzz_keys, 0, buf, &raw);
    slot = fuzz_super(base[0], &super);
    fuzz_edit((uint8_t *)&super, offsetof(struct disk_super, zero) + 8, in, len);
    image[0] = image_new(base[0]);
    image[1] = image_new(base[1]);
    for (unsigned copy = 0; copy < SUPER_COPIES; copy++) {
        super_seal(fuzz_keys, slot, &super, buf);
        image_write(image[0], SUPER_UNIT(slot, copy) * UNIT_BYTES, buf, sizeof(buf));
    }
    fuzz_use(image);
    return 0;
}
