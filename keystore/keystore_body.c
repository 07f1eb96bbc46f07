/*
 * keystore_body.c - what is in a keystore's bytes: the two checkers, and the body between bytes and memory. Pure;
 * called by keystore.c and the fuzzer.
 *
 * 1. The checkers look at every field, and nothing is decoded that they have not passed. What is encoded passes them,
 * too: ks_body_encode asks before it hands anything out.
 * 2. One state has one encoding: records in order of name, no gaps. (What a reader does not check, a forger chooses.)
 * 3. Costs and counts are bounded here, before anybody works on them.
 */
#include "keystore/keystore_format.h"

#include <sodium.h>
#include <stdlib.h>

static bool zero(const uint8_t *p, size_t n)
{
    return n == 0 || sodium_is_zero(p, n);
}

/* --- header and slots --- */

static bool passphrase_ok(const struct disk_passphrase *p)
{
    uint64_t ops = le64_get(p->ops), mem = le64_get(p->mem);

    return le32_get(p->algorithm) == ARGON2ID13 && zero(p->zero, sizeof(p->zero)) && ops >= 1 &&
           ops <= KEYSTORE_ARGON_OPS && mem >= KS_ARGON_MEM_MIN && mem <= KEYSTORE_ARGON_MEM;
}

static int check_slot(const struct disk_slot *s)
{
    size_t used;

    switch (le32_get(s->kind)) {
    case 0:
        return -EBADMSG;
    case AGENT_SLOT_PASSPHRASE:
        used = sizeof(s->params.passphrase);
        if (!passphrase_ok(&s->params.passphrase))
            return -EBADMSG;
        break;
    case AGENT_SLOT_KEY_FILE:
        used = sizeof(s->params.key_file);
        break;
    case AGENT_SLOT_RECOVERY:
        used = sizeof(s->params.recovery);
        break;
    default:
        return -ENOTSUP;
    }
    return zero(s->params.bytes + used, sizeof(s->params.bytes) - used) && zero(s->zero, sizeof(s->zero)) &&
                   zero(s->zero2, sizeof(s->zero2))
               ? 0
               : -EBADMSG;
}

static bool body_bytes_ok(uint32_t bytes)
{
    const uint32_t around = KS_NONCE_BYTES + KS_TAG_BYTES;

    return bytes <= KEYSTORE_FILE_MAX && bytes >= around + BODY_UNIT && (bytes - around) % BODY_UNIT == 0;
}

int keystore_check_head(const uint8_t *head, size_t n, uint64_t size)
{
    struct disk_head h;

    if (size > KEYSTORE_FILE_MAX)
        return -EFBIG;
    if (n < sizeof(h) || n > size)
        return -EBADMSG;
    memcpy(&h, head, sizeof(h));
    if (memcmp(h.magic, KS_MAGIC, sizeof(h.magic)) != 0 || le32_get(h.version) == 0)
        return -EBADMSG;
    if (le32_get(h.version) > KS_VERSION || le32_get(h.incompat))
        return -ENOTSUP;
    if (le32_get(h.slots) < 1 || le32_get(h.slots) > KEYSTORE_SLOTS_MAX || le64_get(h.generation) == 0 ||
        le64_get(h.generation) == UINT64_MAX || !zero(h.zero, sizeof(h.zero)) || n < ks_image_bytes(&h) ||
        !body_bytes_ok(le32_get(h.body_bytes)) ||
        size != ks_image_bytes(&h) + KS_MAC_BYTES + le32_get(h.body_bytes) + KS_SIG_BYTES)
        return -EBADMSG;
    for (uint32_t i = 0; i < le32_get(h.slots); i++) {
        struct disk_slot s;
        int rc;

        memcpy(&s, head + sizeof(h) + i * sizeof(s), sizeof(s));
        rc = check_slot(&s);
        if (rc < 0)
            return rc;
    }
    return 0;
}

/* --- volumes --- */

bool ks_volume_ok(const struct agent_volume *v)
{
    const struct volume_params *p = &v->params;

    return volume_name_ok(v->name) && v->state <= AGENT_VOLUME_USED && v->strict <= 1 && v->attached <= 1 &&
           (p->block_size == 4096 || p->block_size == 8192 || p->block_size == 16384) &&
           p->profile <= VOLUME_PROFILE_DATABASE && p->size_limit >= VOLUME_SIZE_MIN &&
           p->size_limit <= VOLUME_SIZE_MAX && p->log_segment % (64u << 10) == 0 &&
           (p->log_segment == 0 || p->log_segment >= 256u << 10) && p->log_segment <= 1u << 30 &&
           !(p->root_mode & ~07777u);
}

static void volume_get(const struct disk_volume *d, struct agent_volume *v)
{
    *v = (struct agent_volume){.state = le32_get(d->state),
                               .created_ns = (int64_t)le64_get(d->created_ns),
                               .params = {.block_size = le32_get(d->block_size),
                                          .profile = le32_get(d->profile),
                                          .size_limit = le64_get(d->size_limit),
                                          .log_segment = le64_get(d->log_segment),
                                          .root_mode = le32_get(d->root_mode),
                                          .root_uid = le32_get(d->root_uid),
                                          .root_gid = le32_get(d->root_gid)},
                               .strict = le32_get(d->strict),
                               .attached = le32_get(d->attached)};
    memcpy(v->name, d->name, sizeof(v->name));
    memcpy(v->params.id, d->id, sizeof(d->id));
}

static void volume_put(const struct ks_volume *k, struct disk_volume *d)
{
    const struct agent_volume *v = &k->v;

    *d = (struct disk_volume){.state = le32_make(v->state),
                              .strict = le32_make(v->strict),
                              .attached = le32_make(v->attached),
                              .created_ns = le64_make((uint64_t)v->created_ns),
                              .block_size = le32_make(v->params.block_size),
                              .profile = le32_make(v->params.profile),
                              .size_limit = le64_make(v->params.size_limit),
                              .log_segment = le64_make(v->params.log_segment),
                              .root_mode = le32_make(v->params.root_mode),
                              .root_uid = le32_make(v->params.root_uid),
                              .root_gid = le32_make(v->params.root_gid),
                              .key_version = le32_make(k->key_version),
                              .key_epoch = le32_make(k->key_epoch),
                              .key = k->key,
                              .rules = le32_make(k->nrules)};
    memcpy(d->name, v->name, strlen(v->name));
    memcpy(d->id, v->params.id, sizeof(d->id));
}

/* --- the checker of the body --- */

/* The rule at *at of n bytes; moves *at behind it. */
static const uint8_t *next_rule(const uint8_t *p, size_t n, size_t *at, struct disk_rule *ret)
{
    const uint8_t *text = p + *at + sizeof(*ret);

    if (n - *at < sizeof(*ret))
        return NULL;
    memcpy(ret, p + *at, sizeof(*ret));
    if (n - *at - sizeof(*ret) < le16_get(ret->bytes))
        return NULL;
    *at += sizeof(*ret) + le16_get(ret->bytes);
    return text;
}

static bool check_rules(const uint8_t *p, size_t n, uint32_t count)
{
    const uint8_t *texts[AGENT_RULES_MAX];
    struct disk_rule rules[AGENT_RULES_MAX];
    size_t at = 0;

    if (count > AGENT_RULES_MAX)
        return false;
    for (uint32_t i = 0; i < count; i++) {
        size_t len;

        texts[i] = next_rule(p, n, &at, &rules[i]);
        if (!texts[i])
            return false;
        len = le16_get(rules[i].bytes);
        if (len < 1 || len >= AGENT_RULE_MAX || rules[i].deny > 1 || rules[i].zero || memchr(texts[i], 0, len))
            return false;
        for (uint32_t j = 0; j < i; j++)
            if (rules[j].deny == rules[i].deny && le16_get(rules[j].bytes) == len && !memcmp(texts[j], texts[i], len))
                return false;
    }
    return at == n;
}

static bool check_volume(const uint8_t *p, size_t n, struct agent_volume *ret)
{
    struct disk_volume d;
    size_t len;

    if (n < sizeof(d))
        return false;
    memcpy(&d, p, sizeof(d));
    len = strnlen((const char *)d.name, sizeof(d.name));
    if (len > VOLUME_NAME_MAX || !zero(d.name + len, sizeof(d.name) - len) ||
        le32_get(d.key_version) != VOLUME_KEY_VERSION || le32_get(d.key_epoch) != 0)
        return false;
    volume_get(&d, ret);
    return ks_volume_ok(ret) && check_rules(p + sizeof(d), n - sizeof(d), le32_get(d.rules));
}

int keystore_check_body(const uint8_t *body, size_t n)
{
    char last[AGENT_NAME_MAX] = "";
    struct agent_volume v;
    struct disk_body b;
    size_t at = sizeof(b), end;

    if (n < sizeof(b) || n > KEYSTORE_FILE_MAX)
        return -EBADMSG;
    memcpy(&b, body, sizeof(b));
    end = le32_get(b.bytes);
    if (end < sizeof(b) || end > n || le32_get(b.records) > KEYSTORE_VOLUMES_MAX || !zero(b.zero, sizeof(b.zero)) ||
        !zero(body + end, n - end))
        return -EBADMSG;
    for (uint32_t i = 0; i < le32_get(b.records); i++) {
        struct disk_record r;

        if (end - at < sizeof(r))
            return -EBADMSG;
        memcpy(&r, body + at, sizeof(r));
        if (le16_get(r.type) != RECORD_VOLUME || !zero(r.zero, sizeof(r.zero)) || le32_get(r.bytes) < sizeof(r) ||
            le32_get(r.bytes) > end - at || !check_volume(body + at + sizeof(r), le32_get(r.bytes) - sizeof(r), &v) ||
            strcmp(v.name, last) <= 0)
            return -EBADMSG;
        memcpy(last, v.name, sizeof(last));
        at += le32_get(r.bytes);
    }
    return at == end ? 0 : -EBADMSG;
}

/* --- the body in memory --- */

struct ks_body *ks_body_new(void)
{
    struct ks_body *b = xcalloc(1, sizeof(*b));

    b->volumes = xcalloc(KEYSTORE_VOLUMES_MAX, sizeof(struct ks_volume *));
    return b;
}

void ks_volume_free(struct ks_volume *v)
{
    if (!v)
        return;
    for (unsigned i = 0; i < v->nrules; i++) {
        sodium_memzero(v->rules[i].text, strlen(v->rules[i].text));
        free(v->rules[i].text);
    }
    sodium_memzero(v, sizeof(*v));
    free(v);
}

void ks_body_free(struct ks_body *b)
{
    if (!b)
        return;
    for (unsigned i = 0; i < b->n; i++)
        ks_volume_free(b->volumes[i]);
    free(b->volumes);
    sodium_memzero(b, sizeof(*b));
    free(b);
}

unsigned ks_body_find(const struct ks_body *b, const char *name, bool *ret_found)
{
    unsigned lo = 0, hi = b->n;

    *ret_found = false;
    while (lo < hi) {
        unsigned mid = (lo + hi) / 2;
        int c = strcmp(b->volumes[mid]->v.name, name);

        if (c < 0) {
            lo = mid + 1;
        } else {
            hi = mid;
            *ret_found |= c == 0;
        }
    }
    return lo;
}

void ks_body_insert_take(struct ks_body *b, unsigned at, struct ks_volume *v)
{
    memmove(b->volumes + at + 1, b->volumes + at, (b->n - at) * sizeof(struct ks_volume *));
    b->volumes[at] = v;
    b->n++;
}

struct ks_volume *ks_body_remove_take(struct ks_body *b, unsigned at)
{
    struct ks_volume *v = b->volumes[at];

    b->n--;
    memmove(b->volumes + at, b->volumes + at + 1, (b->n - at) * sizeof(struct ks_volume *));
    return v;
}

/* --- to bytes and back --- */

static size_t volume_bytes(const struct ks_volume *v)
{
    size_t n = sizeof(struct disk_record) + sizeof(struct disk_volume);

    for (unsigned i = 0; i < v->nrules; i++)
        n += sizeof(struct disk_rule) + strlen(v->rules[i].text);
    return n;
}

static void encode_volume(const struct ks_volume *v, uint8_t *p)
{
    struct disk_record r = {.type = le16_make(RECORD_VOLUME), .bytes = le32_make((uint32_t)volume_bytes(v))};
    struct disk_volume d;

    volume_put(v, &d);
    memcpy(p, &r, sizeof(r));
    memcpy(p + sizeof(r), &d, sizeof(d));
    p += sizeof(r) + sizeof(d);
    for (unsigned i = 0; i < v->nrules; i++) {
        size_t len = strlen(v->rules[i].text);
        struct disk_rule rule = {.bytes = le16_make((uint16_t)len), .deny = v->rules[i].deny};

        memcpy(p, &rule, sizeof(rule));
        memcpy(p + sizeof(rule), v->rules[i].text, len);
        p += sizeof(rule) + len;
    }
}

int ks_body_encode(const struct ks_body *b, size_t max, uint8_t **ret, size_t *ret_n)
{
    struct disk_body head = {.records = le32_make(b->n), .seed = b->seed};
    size_t bytes = sizeof(head), n, at = sizeof(head);
    uint8_t *p;
    int rc;

    for (unsigned i = 0; i < b->n; i++)
        bytes += volume_bytes(b->volumes[i]);
    n = (bytes + BODY_UNIT - 1) / BODY_UNIT * BODY_UNIT;
    if (n > max)
        return -ENOSPC;
    p = xcalloc(1, n);
    head.bytes = le32_make((uint32_t)bytes);
    memcpy(p, &head, sizeof(head));
    for (unsigned i = 0; i < b->n; i++) {
        encode_volume(b->volumes[i], p + at);
        at += volume_bytes(b->volumes[i]);
    }
    rc = keystore_check_body(p, n);
    if (rc < 0) {
        sodium_memzero(p, n);
        free(p);
        return rc;
    }
    *ret = p;
    *ret_n = n;
    return 0;
}

static struct ks_volume *decode_volume(const uint8_t *p, size_t n)
{
    struct ks_volume *v = xcalloc(1, sizeof(*v));
    struct disk_volume d;
    size_t at = 0;

    memcpy(&d, p, sizeof(d));
    volume_get(&d, &v->v);
    v->key_version = le32_get(d.key_version);
    v->key_epoch = le32_get(d.key_epoch);
    v->key = d.key;
    p += sizeof(d), n -= sizeof(d);
    for (; v->nrules < le32_get(d.rules); v->nrules++) {
        struct ks_rule *rule = &v->rules[v->nrules];
        struct disk_rule r = {0};
        const uint8_t *text = next_rule(p, n, &at, &r);

        rule->deny = r.deny;
        rule->text = xcalloc(1, le16_get(r.bytes) + 1u);
        memcpy(rule->text, text, le16_get(r.bytes));
    }
    return v;
}

struct ks_body *ks_body_decode(const uint8_t *body)
{
    struct ks_body *b = ks_body_new();
    size_t at = sizeof(struct disk_body);
    struct disk_body head;

    memcpy(&head, body, sizeof(head));
    b->seed = head.seed;
    for (; b->n < le32_get(head.records); b->n++) {
        struct disk_record r;

        memcpy(&r, body + at, sizeof(r));
        b->volumes[b->n] = decode_volume(body + at + sizeof(r), le32_get(r.bytes) - sizeof(r));
        at += le32_get(r.bytes);
    }
    return b;
}
