/*
 * slots.c - what opens a keystore: passphrase, key file, recovery key. Called by keystore.c.
 *
 *   slot key   32 bytes: Argon2id of the passphrase; BLAKE2b of the key file; random and sealed to the recovery key
 *   commitment crypto_kdf(slot key, 2): looked at before anything is decrypted, because the AEAD alone would let one
 *              crafted slot open with many passphrases, and so answer many guesses at once
 *   wrap key   crypto_kdf(slot key, 1): seals the root key. Additional data: version, keystore id, and the slot up to
 * and with the commitment, so that an edited cost or salt does not open
 *
 * 1. Costs were bounded by keystore_check_head before a slot comes here.
 * 2. Every key here is in locked memory and is wiped on every way out.
 */
#include "keystore/keystore_format.h"

#include <sodium.h>

_Static_assert(ARGON2ID13 == crypto_pwhash_ALG_ARGON2ID13, "Argon2id");
_Static_assert(KS_ARGON_SALT == crypto_pwhash_SALTBYTES, "Argon2id's salt");
_Static_assert(KS_SEALED_KEK == KEY_BYTES + crypto_box_SEALBYTES, "box_seal");
_Static_assert(KS_NONCE_BYTES == crypto_aead_xchacha20poly1305_ietf_NPUBBYTES, "nonce");
_Static_assert(KS_TAG_BYTES == crypto_aead_xchacha20poly1305_ietf_ABYTES, "MAC");

/* Three passes over 256 MiB: a second or two, and a guess costs a thief as much memory. */
static uint64_t argon_ops = 3, argon_mem = 256u << 20;

void keystore_set_argon_cost_for_new_slots(uint64_t ops, uint64_t mem)
{
    argon_ops = ops;
    argon_mem = mem;
}

/* --- the wrap --- */

struct slot_ad {
    le32 version;
    uint8_t id[KS_ID_BYTES];
    uint8_t slot[offsetof(struct disk_slot, nonce)];
};
_Static_assert(sizeof(struct slot_ad) == 220, "slot_ad");

struct slot_keys {
    uint8_t slot[32], wrap[32], commitment[32];
};

static struct slot_ad slot_ad(const uint8_t id[KS_ID_BYTES], const struct disk_slot *s)
{
    struct slot_ad ad = {.version = le32_make(KS_VERSION)};

    memcpy(ad.id, id, sizeof(ad.id));
    memcpy(ad.slot, s, sizeof(ad.slot));
    return ad;
}

static void derive(struct slot_keys *k)
{
    static const char context[crypto_kdf_CONTEXTBYTES + 1] = "cofslot1";

    crypto_kdf_derive_from_key(k->wrap, sizeof(k->wrap), 1, context, k->slot);
    crypto_kdf_derive_from_key(k->commitment, sizeof(k->commitment), 2, context, k->slot);
}

/* --- the slot's key, of each kind --- */

static int argon(const struct disk_passphrase *p, const uint8_t *secret, size_t n, uint8_t out[32])
{
    if (n < 1 || n > AGENT_SECRET_MAX)
        return -EKEYREJECTED;
    if (crypto_pwhash(out, 32, (const char *)secret, n, p->salt, le64_get(p->ops), (size_t)le64_get(p->mem),
                      ARGON2ID13))
        return -ENOMEM;
    return 0;
}

static int hash_key_file(const struct disk_key_file *p, const uint8_t *secret, size_t n, uint8_t out[32])
{
    if (n < KEYSTORE_KEY_FILE_MIN || n > AGENT_SECRET_MAX)
        return -EKEYREJECTED;
    crypto_generichash(out, 32, secret, n, p->salt, sizeof(p->salt));
    return 0;
}

static int open_sealed(const struct disk_recovery *p, const uint8_t *secret, size_t n, uint8_t out[32])
{
    uint8_t public_key[32];

    if (n != 32 || crypto_scalarmult_base(public_key, secret) ||
        sodium_memcmp(public_key, p->public_key, sizeof(public_key)))
        return -EKEYREJECTED;
    return crypto_box_seal_open(out, p->sealed, sizeof(p->sealed), public_key, secret) ? -EBADMSG : 0;
}

static int slot_key(const struct disk_slot *s, const uint8_t *secret, size_t n, uint8_t out[32])
{
    switch (le32_get(s->kind)) {
    case AGENT_SLOT_PASSPHRASE:
        return argon(&s->params.passphrase, secret, n, out);
    case AGENT_SLOT_KEY_FILE:
        return hash_key_file(&s->params.key_file, secret, n, out);
    case AGENT_SLOT_RECOVERY:
        return open_sealed(&s->params.recovery, secret, n, out);
    default:
        return -EKEYREJECTED;
    }
}

/* Fills in the kind's parameters and the key that they make of the secret. */
static int new_params(struct disk_slot *s, const uint8_t *secret, size_t n, uint8_t out[32])
{
    struct disk_passphrase *p = &s->params.passphrase;
    struct disk_recovery *r = &s->params.recovery;

    switch (le32_get(s->kind)) {
    case AGENT_SLOT_PASSPHRASE:
        if (argon_ops < 1 || argon_ops > KEYSTORE_ARGON_OPS || argon_mem < KS_ARGON_MEM_MIN ||
            argon_mem > KEYSTORE_ARGON_MEM)
            return -EINVAL;
        p->algorithm = le32_make(ARGON2ID13);
        p->ops = le64_make(argon_ops);
        p->mem = le64_make(argon_mem);
        randombytes_buf(p->salt, sizeof(p->salt));
        return argon(p, secret, n, out);
    case AGENT_SLOT_KEY_FILE:
        randombytes_buf(s->params.key_file.salt, sizeof(s->params.key_file.salt));
        return hash_key_file(&s->params.key_file, secret, n, out);
    case AGENT_SLOT_RECOVERY:
        if (n != sizeof(r->public_key))
            return -EINVAL;
        memcpy(r->public_key, secret, sizeof(r->public_key));
        randombytes_buf(out, 32);
        return crypto_box_seal(r->sealed, out, 32, r->public_key) ? -EINVAL : 0;
    default:
        return -EINVAL;
    }
}

int slot_make(const uint8_t id[KS_ID_BYTES], uint32_t kind, const uint8_t *secret, size_t n, const struct key *root,
              struct disk_slot *ret)
{
    struct slot_keys *k = secmem_alloc(sizeof(*k));
    struct disk_slot s = {.kind = le32_make(kind)};
    struct slot_ad ad;
    int rc = k ? new_params(&s, secret, n, k->slot) : -ENOMEM;

    if (rc < 0)
        goto out;
    derive(k);
    memcpy(s.commitment, k->commitment, sizeof(s.commitment));
    randombytes_buf(s.nonce, sizeof(s.nonce));
    ad = slot_ad(id, &s);
    crypto_aead_xchacha20poly1305_ietf_encrypt(s.wrapped, NULL, root->b, sizeof(root->b), (const uint8_t *)&ad,
                                               sizeof(ad), NULL, s.nonce, k->wrap);
    *ret = s;
out:
    secmem_free(k);
    return rc == -EKEYREJECTED ? -EINVAL : rc;
}

int slot_open(const uint8_t id[KS_ID_BYTES], const struct disk_slot *s, const uint8_t *secret, size_t n,
              struct key *ret_root)
{
    struct slot_keys *k = secmem_alloc(sizeof(*k));
    struct slot_ad ad = slot_ad(id, s);
    int rc = k ? slot_key(s, secret, n, k->slot) : -ENOMEM;

    if (rc < 0)
        goto out;
    derive(k);
    if (sodium_memcmp(k->commitment, s->commitment, sizeof(s->commitment)))
        /* Whoever sealed a slot key to the recovery key has the right recovery key before him. */
        rc = le32_get(s->kind) == AGENT_SLOT_RECOVERY ? -EBADMSG : -EKEYREJECTED;
    else if (crypto_aead_xchacha20poly1305_ietf_decrypt(ret_root->b, NULL, NULL, s->wrapped, sizeof(s->wrapped),
                                                        (const uint8_t *)&ad, sizeof(ad), s->nonce, k->wrap))
        rc = -EBADMSG;
out:
    secmem_free(k);
    return rc;
}

/* --- the recovery text: Crockford's base32 (no I, L, O, U), 28 groups of 4 letters with dashes between --- */

#define RECOVERY_VERSION 1
#define RECOVERY_LETTERS (sizeof(struct recovery_key) * 8 / 5)
#define RECOVERY_GROUP   4

_Static_assert(sizeof(struct recovery_key) % 5 == 0, "whole letters");
_Static_assert(RECOVERY_LETTERS % RECOVERY_GROUP == 0, "whole groups");
_Static_assert(RECOVERY_LETTERS + RECOVERY_LETTERS / RECOVERY_GROUP <= KEYSTORE_RECOVERY_MAX, "with its NUL");

/* 40 bits: a text with typing errors passes once in 10^12 times, and then opens nothing. */
static void recovery_check(const struct recovery_key *r, uint8_t ret_check[5])
{
    static const uint8_t context[] = "coffer recovery";
    uint8_t hash[32];

    crypto_generichash(hash, sizeof(hash), (const uint8_t *)r, offsetof(struct recovery_key, check), context,
                       sizeof(context) - 1);
    memcpy(ret_check, hash, 5);
    sodium_memzero(hash, sizeof(hash));
}

void recovery_encode(struct recovery_key *r, char *out)
{
    static const char letters[] = "0123456789ABCDEFGHJKMNPQRSTVWXYZ";
    const uint8_t *in = (const uint8_t *)r;
    size_t o = 0;

    r->version = RECOVERY_VERSION;
    recovery_check(r, r->check);
    for (size_t i = 0; i < RECOVERY_LETTERS; i++) {
        unsigned letter = 0;

        for (size_t bit = i * 5; bit < i * 5 + 5; bit++)
            letter = letter << 1 | (in[bit / 8] >> (7 - bit % 8) & 1);
        if (i && i % RECOVERY_GROUP == 0)
            out[o++] = '-';
        out[o++] = letters[letter];
    }
    out[o] = 0;
}

/* What people type for it: either case, O for 0, I and L for 1. -1: no letter. */
static int letter_value(uint8_t c)
{
    static const char letters[] = "0123456789abcdefghjkmnpqrstvwxyz";
    const char *at;

    if (c >= 'A' && c <= 'Z')
        c |= 0x20;
    if (c == 'o')
        c = '0';
    if (c == 'i' || c == 'l')
        c = '1';
    at = c ? strchr(letters, c) : NULL;
    return at ? (int)(at - letters) : -1;
}

int recovery_decode(const uint8_t *text, size_t n, struct recovery_key *ret)
{
    uint8_t *out = (uint8_t *)ret, check[5];
    size_t got = 0;

    memset(ret, 0, sizeof(*ret));
    for (size_t i = 0; i < n; i++) {
        int v = letter_value(text[i]);

        if (text[i] && strchr("- \t\r\n", text[i]))
            continue;
        if (v < 0 || got == RECOVERY_LETTERS)
            return -EKEYREJECTED;
        for (unsigned bit = 0; bit < 5; bit++) {
            size_t at = got * 5 + bit;

            out[at / 8] |= (uint8_t)((v >> (4 - bit) & 1) << (7 - at % 8));
        }
        got++;
    }
    recovery_check(ret, check);
    if (got != RECOVERY_LETTERS || sodium_memcmp(check, ret->check, sizeof(check)) || ret->version != RECOVERY_VERSION)
        return -EKEYREJECTED;
    return 0;
}
