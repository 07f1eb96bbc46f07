/*
 * keystore_format.h - every structure of the keystore file, version 1, and what the files that implement keystore.h
 * share. KEYSTORE.md is the document; this header is the same in C.
 *
 *   | disk_head | disk_slot, 1 to 8 of them | MAC | nonce, sealed body, MAC | signature |
 *   body, opened:  | disk_body | disk_record, payload | ... | zeroes to a multiple of BODY_UNIT |
 *
 * All integers are little-endian. All fields named zero are zero: they are room, and refused otherwise.
 */
#ifndef COFFER_KEYSTORE_FORMAT_H
#define COFFER_KEYSTORE_FORMAT_H

#include "fs/base/base.h"
#include "keystore/keystore.h"

#define KS_VERSION     1
#define KS_MAGIC       "COFFERKS"
#define KS_ID_BYTES    16
#define KS_NONCE_BYTES 24
#define KS_TAG_BYTES   16
#define KS_MAC_BYTES   32
#define KS_SIG_BYTES   64
#define KS_WRAP_BYTES  (KEY_BYTES + KS_TAG_BYTES) /* a 32-byte key, sealed */

/* --- in the clear --- */

struct disk_head {
    uint8_t magic[8];
    le32 version;
    le32 slots;
    le32 compat;             /* bits that a reader need not know; kept as they are */
    le32 incompat;           /* bits that it must know, or refuse: none in version 1 */
    uint8_t id[KS_ID_BYTES]; /* random, made by init */
    le64 generation;         /* from 1, one more at each write */
    le32 body_bytes;         /* nonce, sealed body and MAC */
    uint8_t zero[44];
};
_Static_assert(sizeof(struct disk_head) == 96, "disk_head");

#define ARGON2ID13        2 /* crypto_pwhash_ALG_ARGON2ID13 */
#define KS_ARGON_MEM_MIN  8192u
#define KS_ARGON_SALT     16
#define KS_SEALED_KEK     (KEY_BYTES + 48) /* crypto_box_seal of a key */
#define SLOT_PARAMS_BYTES 160

struct disk_passphrase {
    le32 algorithm; /* ARGON2ID13 */
    uint8_t zero[4];
    le64 ops, mem; /* passes, bytes */
    uint8_t salt[KS_ARGON_SALT];
};
_Static_assert(sizeof(struct disk_passphrase) == 40, "disk_passphrase");

struct disk_key_file {
    uint8_t salt[32];
};
_Static_assert(sizeof(struct disk_key_file) == 32, "disk_key_file");

struct disk_recovery {
    uint8_t public_key[32]; /* X25519 */
    uint8_t sealed[KS_SEALED_KEK];
};
_Static_assert(sizeof(struct disk_recovery) == 112, "disk_recovery");

struct disk_slot {
    le32 kind; /* enum agent_slot_kind */
    uint8_t zero[4];
    union {
        struct disk_passphrase passphrase;
        struct disk_key_file key_file;
        struct disk_recovery recovery;
        uint8_t bytes[SLOT_PARAMS_BYTES]; /* zero after the kind's own */
    } params;
    uint8_t commitment[32]; /* to the slot's key */
    /* the additional data of the wrap ends here */
    uint8_t nonce[KS_NONCE_BYTES];
    uint8_t wrapped[KS_WRAP_BYTES]; /* the root key */
    uint8_t zero2[48];
};
_Static_assert(sizeof(struct disk_slot) == 320 && offsetof(struct disk_slot, nonce) == 200, "disk_slot");

/* Head and slots as they lie in the file: head.slots of them are meant. */
struct ks_image {
    struct disk_head head;
    struct disk_slot slot[KEYSTORE_SLOTS_MAX];
};
_Static_assert(sizeof(struct ks_image) == sizeof(struct disk_head) + KEYSTORE_SLOTS_MAX * sizeof(struct disk_slot),
               "ks_image");

static inline size_t ks_image_bytes(const struct disk_head *h)
{
    return sizeof(*h) + le32_get(h->slots) * sizeof(struct disk_slot);
}

/* --- the body --- */

#define BODY_UNIT 4096u /* its length tells a thief no more than this */

struct disk_wrap {
    uint8_t nonce[KS_NONCE_BYTES];
    uint8_t sealed[KS_WRAP_BYTES];
};
_Static_assert(sizeof(struct disk_wrap) == 72, "disk_wrap");

struct disk_body {
    le32 bytes; /* of this and all records; zeroes follow */
    le32 records;
    struct disk_wrap seed; /* of the Ed25519 key that signs the file */
    uint8_t zero[48];
};
_Static_assert(sizeof(struct disk_body) == 128, "disk_body");

/* name, number, payload */
#define RECORD_TYPES(X) X(VOLUME, 1) /* disk_volume, then its rules: disk_rule and text each */

enum record_type {
#define X(name, number) RECORD_##name = (number),
    RECORD_TYPES(X)
#undef X
};

struct disk_record {
    le16 type;
    uint8_t zero[2];
    le32 bytes; /* with this header */
};
_Static_assert(sizeof(struct disk_record) == 8, "disk_record");

#define VOLUME_KEY_VERSION 1 /* how a volume's key is wrapped */

struct disk_volume {
    uint8_t name[132]; /* at most VOLUME_NAME_MAX bytes, then zeroes */
    le32 state, strict, attached;
    le64 created_ns;
    uint8_t id[VOLUME_ID_BYTES];
    le32 block_size, profile;
    le64 size_limit, log_segment;
    le32 root_mode, root_uid, root_gid;
    le32 key_version, key_epoch;
    struct disk_wrap key;
    le32 rules;
};
_Static_assert(sizeof(struct disk_volume) == 288, "disk_volume");

struct disk_rule {
    le16 bytes;   /* of the text that follows, without NUL: 1 to AGENT_RULE_MAX - 1 */
    uint8_t deny; /* 0 or 1 */
    uint8_t zero;
};
_Static_assert(sizeof(struct disk_rule) == 4, "disk_rule");

/* --- what the body says, in memory (keystore_body.c): no key in it that is not wrapped --- */

struct ks_rule {
    bool deny;
    char *text;
};

struct ks_volume {
    struct agent_volume v; /* reserved is zero */
    uint32_t key_version, key_epoch;
    struct disk_wrap key;
    unsigned nrules;
    struct ks_rule rules[AGENT_RULES_MAX];
};

struct ks_body {
    struct disk_wrap seed;
    struct ks_volume **volumes; /* in order of name; room for KEYSTORE_VOLUMES_MAX */
    unsigned n;
};

/* Whether a volume's name and parameters are possible, as volume_format sees it too. */
bool ks_volume_ok(const struct agent_volume *v);
struct ks_body *ks_body_new(void);
/* Wipes and frees; NULL is fine. */
void ks_body_free(struct ks_body *b);
void ks_volume_free(struct ks_volume *v);
/* The index of this name, or where it would have to be; *ret_found says which. */
unsigned ks_body_find(const struct ks_body *b, const char *name, bool *ret_found);
void ks_body_insert_take(struct ks_body *b, unsigned at, struct ks_volume *v);
struct ks_volume *ks_body_remove_take(struct ks_body *b, unsigned at);
/* Into *ret (wipe and free() it), a multiple of BODY_UNIT bytes. -ENOSPC: more than max. */
int ks_body_encode(const struct ks_body *b, size_t max, uint8_t **ret, size_t *ret_n);
/* Bytes that keystore_check_body has passed. */
struct ks_body *ks_body_decode(const uint8_t *body);

/* --- slots (slots.c) --- */

/* What a recovery text says. */
struct recovery_key {
    uint8_t version;         /* 1 */
    uint8_t secret[32];      /* X25519 */
    uint8_t sign_public[32]; /* Ed25519, of the key that signs the file */
    uint8_t check[5];
};
_Static_assert(sizeof(struct recovery_key) == 70, "14 times 5 bytes, so 112 letters without a rest");

/*
 * Makes a slot for the root key. secret: a passphrase, a key file's bytes, or (AGENT_SLOT_RECOVERY) the 32 bytes of the
 * public key. -EINVAL: kind, length, Argon2's cost; -ENOMEM.
 */
int slot_make(const uint8_t id[KS_ID_BYTES], uint32_t kind, const uint8_t *secret, size_t n, const struct key *root,
              struct disk_slot *ret);
/* Opens it; for AGENT_SLOT_RECOVERY the secret is the 32 secret bytes. -EKEYREJECTED: it is not this slot's; -EBADMSG:
 * it is, but the slot was changed; -ENOMEM. */
int slot_open(const uint8_t id[KS_ID_BYTES], const struct disk_slot *s, const uint8_t *secret, size_t n,
              struct key *ret_root);
/* version and check are set; out has KEYSTORE_RECOVERY_MAX bytes. */
void recovery_encode(struct recovery_key *r, char *out);
/* -EKEYREJECTED: a typing error, or no recovery text at all. */
int recovery_decode(const uint8_t *text, size_t n, struct recovery_key *ret);

/* --- the file (keystore_file.c) --- */

/* Removes what a killed writer left behind. */
void keyfile_clean(int dirfd);
/* Reads the first max bytes of the file (free() them) and its size. -ENOENT; -EBADMSG: not a regular file; -EFBIG. */
int keyfile_read(int dirfd, size_t max, uint8_t **ret, size_t *ret_n, uint64_t *ret_size);
/* Writes and flushes what keyfile_create puts in its place, or keyfile_clean removes. */
int keyfile_stage(int dirfd, const uint8_t *buf, size_t n);
/* Makes the file. -EEXIST. After a failure there is none that was not there before. */
int keyfile_create(int dirfd);
/* Puts a new file into the old one's place and overwrites the old one. *ret_doubt is set when a failure leaves unknown
 * which of the two a power cut would leave; on any other failure the old one is there, whole. */
int keyfile_replace(int dirfd, const uint8_t *buf, size_t n, bool *ret_doubt);

#endif
