/*
 * fuzz_image.c - whole images: the input edits `data` and `log` of a volume that was killed with records in its log,
 * and cuts the files; then it is opened, walked, checked, changed and closed.
 *
 * Input: rows of { file and kind, le32 place, length, bytes }.
 */
#include "tests/fuzz/fuzzvol.h"

int LLVMFuzzerTestOneInput(const uint8_t *in, size_t len);

/* Places are spread over what is in use: the first 4 MiB and the second superblock copies of data, all of log. */
static void edit(struct image *image[2], uint8_t kind, uint32_t place, const uint8_t *bytes, size_t n)
{
    struct image *m = image[kind & 1];
    uint64_t span = kind & 1 ? m->size : 4u << 20, off = span ? place % span : 0;
    uint8_t page[UNIT_BYTES];

    if (!(kind & 1) && (kind & 2))
        off = (32u << 20) + place % 8192;
    switch (kind >> 2 & 7) {
    case 0:
        image_truncate(m, MIN(m->size, off));
        break;
    case 1: /* a unit from elsewhere */
        image_read(m, (place >> 8) % (1u << 20) / UNIT_BYTES * UNIT_BYTES, page, sizeof(page));
        if (off + UNIT_BYTES <= m->size)
            image_write(m, off / UNIT_BYTES * UNIT_BYTES, page, sizeof(page));
        break;
    case 2:
        if (off + UNIT_BYTES <= m->size)
            image_write(m, off / UNIT_BYTES * UNIT_BYTES, NULL, UNIT_BYTES);
        break;
    default:
        if (off + n <= m->size)
            image_write(m, off, bytes, n);
        break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *in, size_t len)
{
    static struct image *base[2];
    struct image *image[2];

    if (!base[0])
        fuzz_base(true, base);
    image[0] = image_new(base[0]);
    image[1] = image_new(base[1]);
    while (len >= 7) {
        size_t n = MIN(1 + in[5] % 32u, len - 6);
        uint32_t place;

        memcpy(&place, in + 1, 4);
        edit(image, in[0], place, in + 6, n);
        in += 6 + n;
        len -= 6 + n;
    }
    fuzz_use(image);
    return 0;
}
