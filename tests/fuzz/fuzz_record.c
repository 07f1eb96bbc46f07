/*
 * fuzz_record.c - log records: raw bytes, and bodies sealed with the right key (what lies behind authentication) that
 * recovery then replays. The first byte chooses: the rest is a body; or edits of the head; or edits of the body of a
 * real record.
 */
#include "tests/fuzz/fuzzvol.h"

#define TEMPLATES 32

static struct image *clean[2];
static struct disk_super super;
static uint64_t first_sequence;

struct template
{
    uint8_t *body;
    size_t n;
};
static struct template templates[TEMPLATES];
static unsigned template_count;

/* Bodies of real records, from the log of a volume that has some. */
static void take_templates(void)
{
    struct image *image[2];
    struct disk_super s;
    uint64_t segment, generation;
    size_t sector = 0;
    uint8_t *log;

    fuzz_base(true, image);
    fuzz_super(image[0], &s);
    segment = le64_get(s.log_segment);
    generation = le64_get(s.generation);
    log = xmalloc(segment);
    image_read(image[1], generation % LOG_SEGMENTS * segment, log, segment);
    while (sector < segment / SECTOR_BYTES && template_count < TEMPLATES) {
        struct disk_record head;
        uint8_t *body = NULL;

        if (record_open(fuzz_keys, generation, sector, log + sector * SECTOR_BYTES, segment - sector * SECTOR_BYTES,
                        &head, &body) < 0)
            break;
        sector += le32_get(head.sectors);
        if (body)
            templates[template_count++] = (struct template){body, le32_get(head.body_bytes)};
    }
    fuzz_must(template_count > 2, "templates");
    free(log);
    image_free(image[0]);
    image_free(image[1]);
}

int LLVMFuzzerTestOneInput(const uint8_t *in, size_t len);

int LLVMFuzzerTestOneInput(const uint8_t *in, size_t len)
{
    struct disk_record head = {.type = le16_make(RECORD_CHANGES)}, opened;
    uint64_t generation, segment;
    uint8_t *body = NULL, *out = NULL, *ignored = NULL;
    struct image *image[2];
    size_t n = 0;

    if (!clean[0]) {
        fuzz_base(false, clean);
        fuzz_super(clean[0], &super);
        first_sequence = le64_get(super.sequence) + 1;
        take_templates();
    }
    if (len < 2 || len > 65536)
        return 0;
    generation = le64_get(super.generation);
    segment = le64_get(super.log_segment);
    if (record_open(fuzz_keys, generation, 0, in, len, &opened, &ignored) == 0)
        free(ignored);
    head.sequence = le64_make(first_sequence);
    switch (in[0] % 4) {
    case 0: /* a body */
        n = len - 1;
        body = xmalloc(n);
        memcpy(body, in + 1, n);
        break;
    case 1: /* a head */
        fuzz_edit((uint8_t *)&head, sizeof(head), in + 1, len - 1);
        break;
    default: { /* a real body, edited */
        const struct template *t = &templates[in[1] % template_count];

        n = t->n;
        body = xmalloc(n);
        memcpy(body, t->body, n);
        fuzz_edit(body, n, in + 2, len - 2);
        break;
    }
    }
    out = xcalloc(1, record_bytes(n));
    record_seal(fuzz_keys, generation, 0, &head, body, n, out);
    image[0] = image_new(clean[0]);
    image[1] = image_new(clean[1]);
    image_write(image[1], generation % LOG_SEGMENTS * segment, out, record_bytes(n));
    fuzz_use(image);
    free(body);
    free(out);
    return 0;
}
