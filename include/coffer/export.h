/*
 * export.h - a volume as one sealed stream, and back (fs/volume/EXPORT.md is the document).
 *
 * The stream is sealed with a key of its own, which stands in the stream's head, wrapped with a key that a passphrase
 * or a key file makes: nothing of the keystore is needed to bring it back, on any host.
 */
#ifndef COFFER_EXPORT_H
#define COFFER_EXPORT_H

#include "coffer/volume.h"
#include "fs/base/base.h"

struct key;

#define EXPORT_MAGIC       0x315872656666f643ull /* the first 8 bytes of every stream */
#define EXPORT_WHOLE       1 /* versions: a whole export, which readers of before increments know, too */
#define EXPORT_INCREMENT   2 /* what changed since an earlier state */
#define EXPORT_FRAME_PLAIN 65536u
#define EXPORT_FRAME_BYTES (EXPORT_FRAME_PLAIN + 17u)
#define EXPORT_MEM_MAX     (1ull << 30) /* bytes of Argon2id that a reader agrees to */
#define EXPORT_OPS_MAX     16

enum export_kind { EXPORT_PASSPHRASE = 1, EXPORT_KEY_FILE = 2 };

struct export_head {
    le64 magic;
    le32 version;
    uint8_t kind; /* enum export_kind */
    uint8_t reserved[3];
    uint8_t salt[16];
    le64 ops, mem; /* of Argon2id; 0 for a key file */
    uint8_t nonce[24];
    uint8_t wrapped[32 + 16]; /* the stream's key: XChaCha20-Poly1305, what stands before it is additional data */
    uint8_t stream[24];       /* secretstream header */
};
_Static_assert(sizeof(struct export_head) == 144, "export_head");

/* What goes through a pipe to who exports or imports. */
struct export_secret {
    struct export_head head; /* for an export: only what export_head_new filled in */
    uint8_t key[32];         /* that wraps */
};

/* Begins a head, and derives the wrapping key from the secret. -ENOMEM. */
int export_secret_new(enum export_kind kind, const void *secret, size_t n, struct export_secret *ret);
/* s->head was read, of any version: derives the key. -EINVAL: no export stream; -ENOTSUP: newer, or too dear; -EKEYREJECTED: another
 * secret; -ENOMEM. */
int export_secret_open(const void *secret, size_t n, struct export_secret *s);

/* All n bytes, or a negative errno; read: -ENODATA at the end of the file before that. */
struct export_io {
    int (*write)(void *ctx, const void *buf, size_t n);
    int (*read)(void *ctx, void *buf, size_t n);
    /* Called by an import or verification at a stream's end; NULL: there is one only. 1: from here on `read` gives an
     * increment, whose head was read before and opened into *ret (which stays the caller's, until the next call or the
     * end); 0: that was the last one; or a negative errno. */
    int (*next)(void *ctx, const struct export_secret **ret);
    void *ctx;
};

/*
 * Writes the stream of a snapshot, or (NULL) of the newest generation, which stands still meanwhile, while the volume is used.
 * since NULL: all of it; else what changed since that snapshot. What cannot be read is marked lost in the stream, and a
 * line. The number of lines, -ENOENT: no such snapshot; -EINVAL: since is not the older one; -EBUSY (as volume_check),
 * -ECANCELED, or an error of write.
 */
int volume_export(struct volume *v, const char *snapshot, const char *since, const struct export_secret *s,
                  const struct export_io *io, const struct volume_report *report);
/* Makes a new volume in two empty stores (closed in every case) of a stream whose head was read. Of params id matters,
 * and where they are not 0 size_limit, block_size (which must be the stream's: -EINVAL) and with that profile.
 * -EBADMSG: altered or cut, at the place that line() says; -EUCLEAN: sealed so, but no volume. Increments that io->next
 * brings are applied one after the other: -EINVAL where one is not based on the very state reached. After any error
 * what is in the stores is no volume. */
int volume_import(struct store *data, struct store *log, const struct key *key, const struct volume_params *params,
                  const struct export_secret *s, const struct export_io *io, const struct volume_report *report);
/* Reads it to its end and authenticates all of it. A whole export or an increment; what io->next brings, too, and that
 * each is based on the one before. Errors as volume_import. */
int export_verify(const struct export_secret *s, const struct export_io *io, struct volume_params *ret_params,
                  const struct volume_report *report);

#endif
