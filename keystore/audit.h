/*
 * audit.h - the audit log: `audit.log`, one canonical JSON object a line, each with the hash of the line before.
 *
 *   {"event":"release","prev":"<64
 * hex>","seq":17,"text":"...","time":"2025-01-31T12:00:00.123456789Z","volume":"db",...}
 *
 * Keys sorted by bytes, no spaces, integers, strings in UTF-8: ", \ and control characters are escaped as JSON does it,
 * except that DEL and U+0080 to U+009F become the six characters of their escape as text. `prev` is the unkeyed
 * BLAKE2b-256 of the line before without its newline (64 zeroes in the first), `seq` counts from 1.
 *
 * What this version does: a line is in the file and flushed (fdatasync) when audit_write returns 0, so that whatever it
 * speaks of can wait for it; edits, and lines taken out of the middle, show in audit_verify; a line torn by a crash is
 * kept, put out of the way and named by a `recovered` record. What it does not do yet: there is no MAC and no sealed
 * count, so whoever may write the file can compute a new chain, or cut whole lines off its end, unnoticed. Flushes are
 * not grouped. The log is not rotated. One process writes it at one time, from one thread.
 */
#ifndef COFFER_KEYSTORE_AUDIT_H
#define COFFER_KEYSTORE_AUDIT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define AUDIT_FILE          "audit.log"
#define AUDIT_RESERVE_FILE  "audit.reserve"
#define AUDIT_RESERVE_BYTES (4u << 20)
#define AUDIT_FIELDS_MAX    16
#define AUDIT_TEXT_BYTES    1024          /* of one field; what is longer is cut, with "..." */
#define AUDIT_LINE_MAX      (128u << 10)  /* more than the fields above can make; a longer line is no record */
#define AUDIT_LIMIT_LINES   20            /* of one flood key ... */
#define AUDIT_LIMIT_NS      60000000000ll /* ... in this time */

struct audit;

struct audit_field {
    const char *key;  /* [a-z_]{1,32}; not event, prev, seq or time; each once */
    const char *text; /* any bytes (what is not UTF-8 becomes U+FFFD); NULL: the number */
    int64_t number;
};

/*
 * Opens or makes the log in dirfd (duplicated), mode 0640, continues its chain from its last whole record, and sets up
 * the reserve. A torn tail is recorded at once. -EBADMSG: no record is found where the log's end should be: move the
 * file away. Errors of I/O.
 */
int audit_open(int dirfd, struct audit **ret);
/* Writes the sums still outstanding, closes, frees; NULL is fine. */
void audit_close(struct audit *a);

/*
 * Appends one record and flushes it. event: [a-z0-9_-]{1,32} by custom, any text is taken. On an error the record is
 * not in the log (or, after -EIO, may be): what it was to speak of must not happen. -EINVAL: fields. When the disk is
 * full the reserve is given up and -ENOSPC comes only when that is full, too; where there is room again, the reserve is
 * made again within a minute of records. After a failed flush every call fails until the log is opened anew.
 */
int audit_write(struct audit *a, const char *event, const struct audit_field *fields, size_t n);
/* The same with fields volume, who and text; empty ones are left out. */
int audit_append(struct audit *a, const char *event, const char *volume, const char *who, const char *text);
/*
 * The same as audit_write, but at most AUDIT_LIMIT_LINES for one flood_key in AUDIT_LIMIT_NS; those beyond are counted
 * and 0 is returned. The count is written as event `suppressed` (key, of, count) by the first call of any of these
 * functions after that time. For refusals only: what must be in the log before it happens goes through audit_write.
 */
int audit_write_limited(struct audit *a, const char *event, const char *flood_key, const struct audit_field *fields,
                        size_t n);
/* Another monotonic clock, for tests. */
void audit_set_clock(struct audit *a, int64_t (*mono)(void));

/*
 * Checks every line of the log in dirfd. 0 with a summary in why (n bytes: how many records, the last one's hash; a
 * torn tail is named); -EBADMSG with the line and what is wrong; -ENOENT: no log; errors of I/O.
 */
int audit_verify(int dirfd, char *why, size_t n);

#endif
