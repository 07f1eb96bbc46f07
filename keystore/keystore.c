/*
 * keystore.c - see keystore.h and KEYSTORE.md. Owns the keys of an unlocked keystore and what its body says.
 *
 *   root key   random; wrapped by each slot (slots.c)
 *   head       MAC of header and slots                        stops: an edited slot, cost, feature bit or count
 *   body       seals the body; additional data is everything before it, so body and slots belong together
 *   wrap       seals each volume's key, with its name, id, version and epoch, and the signing seed
 *   seen       seals `generations` (seen.c)
 *   signature  Ed25519 over the file, its public half in the recovery text: who only knows the recovery *public* key
 * (it is in the slot) can seal a keystore of his own to it, but not one that the text's owner takes for his
 *
 * In the clear: ids, number and kinds of slots, their costs and salts, the generation, the body's length in 4 KiB.
 *
 * 1. Keys lie in locked memory (struct ks_keys) and are wiped by keystore_lock and on every failure. The body in memory
 *    holds keys only wrapped; it is wiped, but not locked: 16 MiB could not be.
 * 2. A change is made in memory, written, and taken back if the writing fails. One thread, so nobody sees between.
 * 3. When it is not known which file a power cut would leave (the directory's flush failed), nothing more is written
 * until keystore_unlock has read the file again.
 * 4. What is read counts only after: bounds, slot, MAC, signature (recovery), seal, checker, signature.
 */
#include "keystore/keystore_format.h"

#include <fcntl.h>
#include <sodium.h>
#include <stdlib.h>
#include <unistd.h>

_Static_assert(KS_SIG_BYTES == crypto_sign_BYTES, "signature");

struct ks_keys {
    struct key root, head, body, wrap, seen;
    uint8_t sign[crypto_sign_SECRETKEYBYTES];
};

struct keystore {
    int dirfd;
    bool initialised, doubt;
    struct ks_image image;
    struct ks_keys *keys; /* NULL: locked */
    struct ks_body *body; /* NULL: locked */
};

/* --- keys --- */

/* The subkeys from k->root. */
static void derive(struct ks_keys *k, const uint8_t id[KS_ID_BYTES])
{
    static const char context[crypto_kdf_CONTEXTBYTES + 1] = "cofkeys1";
    uint8_t base[32];

    crypto_generichash(base, sizeof(base), id, KS_ID_BYTES, k->root.b, sizeof(k->root.b));
    crypto_kdf_derive_from_key(k->head.b, KEY_BYTES, 1, context, base);
    crypto_kdf_derive_from_key(k->body.b, KEY_BYTES, 2, context, base);
    crypto_kdf_derive_from_key(k->wrap.b, KEY_BYTES, 3, context, base);
    crypto_kdf_derive_from_key(k->seen.b, KEY_BYTES, 5, context, base);
    sodium_memzero(base, sizeof(base));
}

static void wrap(const struct ks_keys *k, const void *ad, size_t n, const uint8_t key[KEY_BYTES], struct disk_wrap *ret)
{
    randombytes_buf(ret->nonce, sizeof(ret->nonce));
    crypto_aead_xchacha20poly1305_ietf_encrypt(ret->sealed, NULL, key, KEY_BYTES, ad, n, NULL, ret->nonce, k->wrap.b);
}

static int unwrap(const struct ks_keys *k, const void *ad, size_t n, const struct disk_wrap *w,
                  uint8_t ret_key[KEY_BYTES])
{
    return crypto_aead_xchacha20poly1305_ietf_decrypt(ret_key, NULL, NULL, w->sealed, sizeof(w->sealed), ad, n,
                                                      w->nonce, k->wrap.b)
               ? -EBADMSG
               : 0;
}

#define SEED_AD   "coffer signing seed"
#define VOLUME_AD "coffer volume key"

struct volume_ad {
    uint8_t text[sizeof(VOLUME_AD) - 1];
    uint8_t name[132];
    uint8_t id[VOLUME_ID_BYTES];
    le32 version, epoch;
};
_Static_assert(sizeof(struct volume_ad) == 173, "volume_ad");

static struct volume_ad volume_ad(const struct ks_volume *v)
{
    struct volume_ad ad = {.version = le32_make(v->key_version), .epoch = le32_make(v->key_epoch)};

    memcpy(ad.text, VOLUME_AD, sizeof(ad.text));
    memcpy(ad.name, v->v.name, strlen(v->v.name));
    memcpy(ad.id, v->v.params.id, sizeof(ad.id));
    return ad;
}

/* --- the whole file --- */

static void head_mac(const struct ks_keys *k, const uint8_t *image, size_t n, uint8_t ret_mac[KS_MAC_BYTES])
{
    crypto_generichash(ret_mac, KS_MAC_BYTES, image, n, k->head.b, sizeof(k->head.b));
}

/* Seals the n bytes of body under an image that says so. */
static void file_seal(const struct ks_image *image, const struct ks_keys *k, const uint8_t *body, size_t n,
                      uint8_t **ret, size_t *ret_n)
{
    size_t head = ks_image_bytes(&image->head), before = head + KS_MAC_BYTES;
    size_t signed_bytes = before + KS_NONCE_BYTES + n + KS_TAG_BYTES;
    uint8_t *p = xmalloc(signed_bytes + KS_SIG_BYTES);
    crypto_sign_state state;

    memcpy(p, image, head);
    head_mac(k, p, head, p + head);
    randombytes_buf(p + before, KS_NONCE_BYTES);
    crypto_aead_xchacha20poly1305_ietf_encrypt(p + before + KS_NONCE_BYTES, NULL, body, n, p, before, NULL, p + before,
                                               k->body.b);
    crypto_sign_init(&state);
    crypto_sign_update(&state, p, signed_bytes);
    crypto_sign_final_create(&state, p + signed_bytes, NULL, k->sign);
    *ret = p;
    *ret_n = signed_bytes + KS_SIG_BYTES;
}

static int check_signature(const uint8_t *file, size_t n, const uint8_t sign_public[32])
{
    crypto_sign_state state;

    crypto_sign_init(&state);
    crypto_sign_update(&state, file, n - KS_SIG_BYTES);
    return crypto_sign_final_verify(&state, file + n - KS_SIG_BYTES, sign_public) ? -EBADMSG : 0;
}

/* Opens a file whose head is checked, with the root key in k, into the rest of k and *ret_body. sign_public: the
 * recovery text's, or NULL. */
static int file_open(const struct ks_image *image, const uint8_t *file, size_t n, struct ks_keys *k,
                     const uint8_t *sign_public, struct ks_body **ret_body)
{
    size_t head = ks_image_bytes(&image->head), before = head + KS_MAC_BYTES;
    size_t sealed = le32_get(image->head.body_bytes) - KS_NONCE_BYTES, plain_n = sealed - KS_TAG_BYTES;
    uint8_t mac[KS_MAC_BYTES], public_key[32], *plain = xmalloc(plain_n);
    struct ks_body *body = NULL;
    struct key *seed = key_new();
    int rc = seed ? 0 : -ENOMEM;

    derive(k, image->head.id);
    head_mac(k, file, head, mac);
    if (rc == 0 && sodium_memcmp(mac, file + head, sizeof(mac)))
        rc = -EBADMSG;
    if (rc == 0 && sign_public)
        rc = check_signature(file, n, sign_public);
    if (rc == 0 && crypto_aead_xchacha20poly1305_ietf_decrypt(plain, NULL, NULL, file + before + KS_NONCE_BYTES, sealed,
                                                              file, before, file + before, k->body.b))
        rc = -EBADMSG;
    if (rc == 0)
        rc = keystore_check_body(plain, plain_n);
    if (rc < 0)
        goto out;
    body = ks_body_decode(plain);
    rc = unwrap(k, SEED_AD, sizeof(SEED_AD) - 1, &body->seed, seed->b);
    if (rc < 0)
        goto out;
    crypto_sign_seed_keypair(public_key, k->sign, seed->b);
    rc = check_signature(file, n, public_key);
    if (rc < 0)
        goto out;
    *ret_body = body;
    body = NULL;
out:
    ks_body_free(body);
    key_free(&seed);
    sodium_memzero(plain, plain_n);
    free(plain);
    return rc;
}

/* Bytes of body that a file with this image has room for. */
static size_t body_max(const struct ks_image *image)
{
    return KEYSTORE_FILE_MAX - ks_image_bytes(&image->head) - KS_MAC_BYTES - KS_NONCE_BYTES - KS_TAG_BYTES -
           KS_SIG_BYTES;
}

/* A file of the body under the image, which is brought up to date. */
static int file_make(struct ks_image *image, const struct ks_keys *keys, const struct ks_body *body, uint8_t **ret,
                     size_t *ret_n)
{
    uint8_t *plain, *file;
    size_t n, file_n;
    int rc = ks_body_encode(body, body_max(image), &plain, &n);

    if (rc < 0)
        return rc;
    image->head.generation = le64_make(le64_get(image->head.generation) + 1);
    image->head.body_bytes = le32_make((uint32_t)(KS_NONCE_BYTES + n + KS_TAG_BYTES));
    file_seal(image, keys, plain, n, &file, &file_n);
    sodium_memzero(plain, n);
    free(plain);
    rc = keystore_check_head(file, file_n, file_n);
    if (rc < 0) {
        free(file);
        return rc;
    }
    *ret = file;
    *ret_n = file_n;
    return 0;
}

/* Writes what is in memory. After a failure the caller puts memory back. */
static int commit(struct keystore *k)
{
    struct ks_image image = k->image;
    uint8_t *file;
    size_t n;
    int rc;

    if (k->doubt)
        return -EIO;
    rc = file_make(&image, k->keys, k->body, &file, &n);
    if (rc < 0)
        return rc;
    rc = keyfile_replace(k->dirfd, file, n, &k->doubt);
    free(file);
    if (rc == 0)
        k->image = image;
    return rc;
}

/* --- life --- */

int keystore_open(int dirfd, struct keystore **ret)
{
    struct keystore *k = xcalloc(1, sizeof(*k));
    uint8_t *head = NULL;
    uint64_t size;
    size_t n;
    int rc = 0;

    k->dirfd = fcntl(dirfd, F_DUPFD_CLOEXEC, 0);
    if (k->dirfd < 0) {
        rc = -errno;
        goto out;
    }
    keyfile_clean(k->dirfd);
    rc = keyfile_read(k->dirfd, sizeof(k->image), &head, &n, &size);
    if (rc == 0)
        rc = keystore_check_head(head, n, size);
    if (rc == 0) {
        k->initialised = true;
        memcpy(&k->image, head, n);
    }
    if (rc == -ENOENT)
        rc = 0;
out:
    free(head);
    if (rc < 0)
        keystore_close(k);
    else
        *ret = k;
    return rc;
}

void keystore_close(struct keystore *k)
{
    if (!k)
        return;
    keystore_lock(k);
    close_quiet(k->dirfd);
    free(k);
}

bool keystore_initialised(const struct keystore *k)
{
    return k->initialised;
}

bool keystore_unlocked(const struct keystore *k)
{
    return k->keys != NULL;
}

unsigned keystore_slots(const struct keystore *k)
{
    return k->initialised ? le32_get(k->image.head.slots) : 0;
}

unsigned keystore_volumes(const struct keystore *k)
{
    return k->body ? k->body->n : 0;
}

void keystore_lock(struct keystore *k)
{
    secmem_free(k->keys);
    ks_body_free(k->body);
    k->keys = NULL;
    k->body = NULL;
}

/* The slots of a new keystore, for the secret and for the recovery key in r. */
static int new_slots(struct ks_image *image, const struct ks_keys *keys, uint32_t kind, const uint8_t *secret, size_t n,
                     struct recovery_key *r)
{
    uint8_t public_key[32];
    int rc = slot_make(image->head.id, kind, secret, n, &keys->root, &image->slot[0]);

    if (rc < 0)
        return rc;
    crypto_box_keypair(public_key, r->secret);
    image->head.slots = le32_make(2);
    return slot_make(image->head.id, AGENT_SLOT_RECOVERY, public_key, sizeof(public_key), &keys->root, &image->slot[1]);
}

static int init(struct keystore *k, uint32_t kind, const uint8_t *secret, size_t n, char *recovery,
                int (*deliver)(void *, const char *), void *ctx)
{
    struct ks_image image = {.head = {.magic = KS_MAGIC, .version = le32_make(KS_VERSION)}};
    struct recovery_key *r = secmem_alloc(sizeof(*r));
    struct ks_keys *keys = secmem_alloc(sizeof(*keys));
    struct ks_body *body = ks_body_new();
    struct key *seed = key_new();
    uint8_t *file = NULL;
    size_t file_n;
    int rc = r && keys && seed ? 0 : -ENOMEM;

    if (rc < 0)
        goto out;
    randombytes_buf(image.head.id, sizeof(image.head.id));
    randombytes_buf(keys->root.b, sizeof(keys->root.b));
    randombytes_buf(seed->b, sizeof(seed->b));
    derive(keys, image.head.id);
    crypto_sign_seed_keypair(r->sign_public, keys->sign, seed->b);
    wrap(keys, SEED_AD, sizeof(SEED_AD) - 1, seed->b, &body->seed);
    rc = new_slots(&image, keys, kind, secret, n, r);
    if (rc == 0)
        rc = file_make(&image, keys, body, &file, &file_n);
    if (rc == 0)
        rc = keyfile_stage(k->dirfd, file, file_n);
    if (rc < 0)
        goto out;
    recovery_encode(r, recovery);
    rc = deliver ? deliver(ctx, recovery) : 0;
    if (rc < 0)
        keyfile_clean(k->dirfd);
    else
        rc = keyfile_create(k->dirfd);
    if (rc < 0)
        goto out;
    k->initialised = true;
    k->doubt = false;
    k->image = image;
    k->keys = keys;
    k->body = body;
    keys = NULL;
    body = NULL;
out:
    free(file);
    key_free(&seed);
    ks_body_free(body);
    secmem_free(keys);
    secmem_free(r);
    return rc;
}

int keystore_init(struct keystore *k, uint32_t kind, const uint8_t *secret, size_t n, char *recovery, size_t size,
                  int (*deliver)(void *ctx, const char *recovery), void *ctx)
{
    int rc;

    if (k->initialised)
        rc = -EEXIST;
    else if (kind != AGENT_SLOT_PASSPHRASE && kind != AGENT_SLOT_KEY_FILE)
        rc = -EINVAL;
    else if (size < KEYSTORE_RECOVERY_MAX)
        rc = -ENOSPC;
    else
        rc = init(k, kind, secret, n, recovery, deliver, ctx);
    if (rc < 0)
        sodium_memzero(recovery, size);
    return rc;
}

/* The root key, by the first slot of the kind that opens. */
static int open_slots(const struct ks_image *image, uint32_t kind, const uint8_t *secret, size_t n,
                      struct key *ret_root)
{
    int rc = -ENOENT;

    for (uint32_t i = 0; i < le32_get(image->head.slots); i++) {
        if (le32_get(image->slot[i].kind) != kind)
            continue;
        rc = slot_open(image->head.id, &image->slot[i], secret, n, ret_root);
        if (rc != -EKEYREJECTED)
            break;
    }
    return rc;
}

/* Opens the n bytes of a file into keys and *ret_body. */
static int unlock(const struct ks_image *image, const uint8_t *file, size_t n, uint32_t kind, const uint8_t *secret,
                  size_t secret_n, struct ks_keys *keys, struct ks_body **ret_body)
{
    struct recovery_key *r = NULL;
    int rc = 0;

    if (kind == AGENT_SLOT_RECOVERY) {
        r = secmem_alloc(sizeof(*r));
        rc = r ? recovery_decode(secret, secret_n, r) : -ENOMEM;
        if (rc < 0)
            goto out;
        secret = r->secret;
        secret_n = sizeof(r->secret);
    }
    rc = open_slots(image, kind, secret, secret_n, &keys->root);
    if (rc == 0)
        rc = file_open(image, file, n, keys, r ? r->sign_public : NULL, ret_body);
out:
    secmem_free(r);
    return rc;
}

int keystore_unlock(struct keystore *k, uint32_t kind, const uint8_t *secret, size_t n)
{
    struct ks_image image = {0};
    struct ks_keys *keys = NULL;
    struct ks_body *body = NULL;
    uint8_t *file = NULL;
    uint64_t size;
    size_t file_n;
    int rc;

    if (!k->initialised)
        return -ENOENT;
    keys = secmem_alloc(sizeof(*keys));
    rc = keys ? keyfile_read(k->dirfd, KEYSTORE_FILE_MAX, &file, &file_n, &size) : -ENOMEM;
    if (rc == 0)
        rc = keystore_check_head(file, file_n, size);
    if (rc < 0)
        goto out;
    memcpy(&image, file, MIN(file_n, sizeof(image)));
    rc = unlock(&image, file, file_n, kind, secret, n, keys, &body);
    if (rc < 0)
        goto out;
    keystore_lock(k);
    k->doubt = false;
    k->image = image;
    k->keys = keys;
    k->body = body;
    keys = NULL;
out:
    free(file);
    secmem_free(keys);
    return rc;
}

/* --- volumes --- */

/* The volume of this name and its index (which may be NULL). -ENOKEY, -ENOENT. */
static int find(const struct keystore *k, const char *name, struct ks_volume **ret, unsigned *ret_at)
{
    unsigned at;
    bool found;

    if (!k->keys)
        return -ENOKEY;
    at = ks_body_find(k->body, name, &found);
    if (!found)
        return -ENOENT;
    if (ret_at)
        *ret_at = at;
    *ret = k->body->volumes[at];
    return 0;
}

/* A new volume of these parameters, with id, time and key of its own. */
static int volume_new(const struct ks_keys *keys, const struct agent_volume *v, struct ks_volume **ret)
{
    struct key *key = key_new();
    struct ks_volume *n;
    struct volume_ad ad;

    if (!key)
        return -ENOMEM;
    n = xcalloc(1, sizeof(*n));
    n->v = *v;
    memset(n->v.reserved, 0, sizeof(n->v.reserved));
    memset(n->v.name, 0, sizeof(n->v.name));
    memcpy(n->v.name, v->name, strlen(v->name));
    n->v.created_ns = now_ns();
    n->key_version = VOLUME_KEY_VERSION;
    randombytes_buf(n->v.params.id, sizeof(n->v.params.id));
    randombytes_buf(key->b, sizeof(key->b));
    ad = volume_ad(n);
    wrap(keys, &ad, sizeof(ad), key->b, &n->key);
    key_free(&key);
    *ret = n;
    return 0;
}

int keystore_volume_add(struct keystore *k, struct agent_volume *v)
{
    struct ks_volume *n;
    bool found;
    unsigned at;
    int rc;

    if (!k->keys)
        return -ENOKEY;
    if (!ks_volume_ok(v))
        return -EINVAL;
    at = ks_body_find(k->body, v->name, &found);
    if (found)
        return -EEXIST;
    if (k->body->n == KEYSTORE_VOLUMES_MAX)
        return -ENOSPC;
    rc = volume_new(k->keys, v, &n);
    if (rc < 0)
        return rc;
    ks_body_insert_take(k->body, at, n);
    rc = commit(k);
    if (rc == 0)
        *v = n->v;
    else
        ks_volume_free(ks_body_remove_take(k->body, at));
    return rc;
}

int keystore_volume_get(struct keystore *k, const char *name, struct agent_volume *v)
{
    struct ks_volume *found;
    int rc = find(k, name, &found, NULL);

    if (rc == 0)
        *v = found->v;
    return rc;
}

int keystore_volume_at(struct keystore *k, uint32_t index, struct agent_volume *v)
{
    if (!k->keys)
        return -ENOKEY;
    if (index >= k->body->n)
        return -ENOENT;
    *v = k->body->volumes[index]->v;
    return 0;
}

int keystore_volume_set_state(struct keystore *k, const char *name, uint32_t state)
{
    struct ks_volume *v;
    uint32_t before;
    int rc = find(k, name, &v, NULL);

    if (rc < 0)
        return rc;
    if (state > AGENT_VOLUME_USED)
        return -EINVAL;
    before = v->v.state;
    if (state == before)
        return 0;
    v->v.state = state;
    rc = commit(k);
    if (rc < 0)
        v->v.state = before;
    return rc;
}

int keystore_volume_set_size(struct keystore *k, const char *name, uint64_t size_limit)
{
    struct ks_volume *v;
    uint64_t before;
    int rc = find(k, name, &v, NULL);

    if (rc < 0)
        return rc;
    if (size_limit < VOLUME_SIZE_MIN || size_limit > VOLUME_SIZE_MAX)
        return -EINVAL;
    before = v->v.params.size_limit;
    if (size_limit == before)
        return 0;
    v->v.params.size_limit = size_limit;
    rc = commit(k);
    if (rc < 0)
        v->v.params.size_limit = before;
    return rc;
}

int keystore_volume_rm(struct keystore *k, const char *name)
{
    struct ks_volume *v;
    unsigned at;
    int rc = find(k, name, &v, &at);

    if (rc < 0)
        return rc;
    ks_body_remove_take(k->body, at);
    rc = commit(k);
    if (rc < 0)
        ks_body_insert_take(k->body, at, v);
    else
        ks_volume_free(v);
    return rc;
}

int keystore_volume_key(struct keystore *k, const char *name, struct key **ret)
{
    struct ks_volume *v;
    struct volume_ad ad;
    struct key *key;
    int rc = find(k, name, &v, NULL);

    if (rc < 0)
        return rc;
    key = key_new();
    if (!key)
        return -ENOMEM;
    ad = volume_ad(v);
    rc = unwrap(k->keys, &ad, sizeof(ad), &v->key, key->b);
    if (rc < 0)
        key_free(&key);
    else
        *ret = key;
    return rc;
}

int keystore_seen_key(const struct keystore *k, struct key **ret)
{
    struct key *key;

    if (!k->keys)
        return -ENOKEY;
    key = key_new();
    if (!key)
        return -ENOMEM;
    memcpy(key->b, k->keys->seen.b, KEY_BYTES);
    *ret = key;
    return 0;
}

/* --- rules --- */

/* The index of this rule among the volume's, or their number. */
static unsigned find_rule(const struct ks_volume *v, const struct agent_rule *r)
{
    unsigned i = 0;

    while (i < v->nrules && (v->rules[i].deny != !!r->deny || strcmp(v->rules[i].text, r->rule) != 0))
        i++;
    return i;
}

static bool rule_ok(const struct agent_rule *r)
{
    return memchr(r->name, 0, sizeof(r->name)) && memchr(r->rule, 0, sizeof(r->rule)) && r->rule[0] && r->deny <= 1;
}

static void rule_free(struct ks_rule *r)
{
    sodium_memzero(r->text, strlen(r->text));
    free(r->text);
}

int keystore_rule_add(struct keystore *k, const struct agent_rule *r)
{
    struct ks_volume *v;
    int rc;

    if (!k->keys)
        return -ENOKEY;
    if (!rule_ok(r))
        return -EINVAL;
    rc = find(k, r->name, &v, NULL);
    if (rc < 0)
        return rc;
    if (find_rule(v, r) < v->nrules)
        return -EEXIST;
    if (v->nrules == AGENT_RULES_MAX)
        return -E2BIG;
    v->rules[v->nrules++] = (struct ks_rule){.deny = r->deny, .text = xstrdup(r->rule)};
    rc = commit(k);
    if (rc < 0)
        rule_free(&v->rules[--v->nrules]);
    return rc;
}

int keystore_rule_rm(struct keystore *k, const struct agent_rule *r)
{
    struct ks_rule gone, *at;
    struct ks_volume *v;
    unsigned i, after;
    int rc;

    if (!k->keys)
        return -ENOKEY;
    if (!rule_ok(r))
        return -ENOENT;
    rc = find(k, r->name, &v, NULL);
    if (rc < 0)
        return rc;
    i = find_rule(v, r);
    if (i == v->nrules)
        return -ENOENT;
    at = &v->rules[i];
    gone = *at;
    after = --v->nrules - i;
    memmove(at, at + 1, after * sizeof(*at));
    rc = commit(k);
    if (rc == 0) {
        rule_free(&gone);
        return 0;
    }
    memmove(at + 1, at, after * sizeof(*at));
    *at = gone;
    v->nrules++;
    return rc;
}

int keystore_rule_at(struct keystore *k, const char *name, uint32_t index, struct agent_rule *r)
{
    struct ks_volume *v;
    int rc = find(k, name, &v, NULL);

    if (rc < 0)
        return rc;
    if (index >= v->nrules)
        return -ENOENT;
    *r = (struct agent_rule){.deny = v->rules[index].deny, .index = index};
    memcpy(r->name, v->v.name, sizeof(r->name));
    memcpy(r->rule, v->rules[index].text, strlen(v->rules[index].text));
    return 0;
}
