/*
 * seen.c - see seen.h. Owns the file `generations` and what it says.
 *
 *   | disk_seen_head | sealed: disk_seen, one a volume | MAC |      additional data: the head
 *
 * 1. A change is made in memory, written (a new file in the old one's place, made durable), and taken back when the
 *    writing fails: what is in memory is never newer than what a power cut leaves, but it may be older, where only the
 *    directory's flush failed. An older record refuses nothing that a newer one accepts.
 * 2. A checkpoint is told only after it is durable, so no record is ever newer than the volume: a volume that nobody
 *    touched is never refused.
 */
#include "keystore/seen.h"

#include "fs/base/base.h"
#include "keystore/keystore.h"

#include <fcntl.h>
#include <sodium.h>
#include <stdlib.h>
#include <unistd.h>

#define SEEN_MAGIC   "COFFERGN"
#define SEEN_VERSION 1
#define SEEN_ACCEPT  1u

struct disk_seen_head {
    uint8_t magic[8];
    le32 version;
    le32 count;
    uint8_t nonce[24];
    uint8_t zero[8];
};
_Static_assert(sizeof(struct disk_seen_head) == 48, "disk_seen_head");

struct disk_seen {
    uint8_t id[VOLUME_ID_BYTES];
    uint8_t branch[VOLUME_ID_BYTES];
    uint8_t root_mac[16];
    le64 generation; /* 0: only the flags are meant */
    le32 flags;      /* SEEN_ACCEPT */
    uint8_t zero[4];
};
_Static_assert(sizeof(struct disk_seen) == 64, "disk_seen");

#define SEEN_TAG crypto_aead_xchacha20poly1305_ietf_ABYTES

struct seen {
    int dirfd;
    struct key *key; /* NULL: locked */
    struct disk_seen *entry;
    size_t n;
};

struct seen *seen_new(int dirfd)
{
    struct seen *s;
    int fd = fcntl(dirfd, F_DUPFD_CLOEXEC, 0);

    if (fd < 0)
        return NULL;
    s = xcalloc(1, sizeof(*s));
    s->dirfd = fd;
    return s;
}

void seen_free(struct seen *s)
{
    if (!s)
        return;
    seen_lock(s);
    close_quiet(s->dirfd);
    free(s);
}

/* --- the file --- */

static int load(struct seen *s, const struct key *key)
{
    struct disk_seen_head head;
    struct disk_seen *entry = NULL;
    char *buf = NULL;
    size_t n, count;
    int rc = file_read_all(s->dirfd, SEEN_FILE,
                           sizeof(head) + KEYSTORE_VOLUMES_MAX * sizeof(struct disk_seen) + SEEN_TAG, &buf, &n);

    if (rc == -EFBIG || rc == -ELOOP)
        return -EBADMSG;
    if (rc < 0)
        return rc == -ENOENT ? 1 : rc;
    rc = -EBADMSG;
    if (n < sizeof(head) + SEEN_TAG)
        goto out;
    memcpy(&head, buf, sizeof(head));
    count = le32_get(head.count);
    if (memcmp(head.magic, SEEN_MAGIC, sizeof(head.magic)) || count > KEYSTORE_VOLUMES_MAX ||
        n != sizeof(head) + count * sizeof(*entry) + SEEN_TAG)
        goto out;
    if (le32_get(head.version) != SEEN_VERSION) {
        rc = -ENOTSUP;
        goto out;
    }
    entry = xcalloc(count + 1, sizeof(*entry));
    if (crypto_aead_xchacha20poly1305_ietf_decrypt((uint8_t *)entry, NULL, NULL, (uint8_t *)buf + sizeof(head),
                                                   n - sizeof(head), (uint8_t *)&head, sizeof(head), head.nonce,
                                                   key->b))
        goto out;
    s->entry = entry;
    s->n = count;
    entry = NULL;
    rc = 0;
out:
    free(entry);
    free(buf);
    return rc;
}

static int save(struct seen *s)
{
    struct disk_seen_head head = {.magic = SEEN_MAGIC, .version = le32_make(SEEN_VERSION)};
    size_t plain = s->n * sizeof(*s->entry), bytes = sizeof(head) + plain + SEEN_TAG;
    uint8_t *buf = xmalloc(bytes);
    int rc;

    head.count = le32_make((uint32_t)s->n);
    randombytes_buf(head.nonce, sizeof(head.nonce));
    memcpy(buf, &head, sizeof(head));
    crypto_aead_xchacha20poly1305_ietf_encrypt(buf + sizeof(head), NULL, (uint8_t *)s->entry, plain, (uint8_t *)&head,
                                               sizeof(head), NULL, head.nonce, s->key->b);
    rc = file_replace(s->dirfd, SEEN_FILE, buf, bytes, 0600);
    free(buf);
    return rc;
}

/* --- life --- */

int seen_unlock(struct seen *s, const struct key *key)
{
    int rc;

    seen_lock(s);
    rc = load(s, key);
    if (rc < 0)
        return rc;
    s->key = key_new();
    if (!s->key) {
        seen_lock(s);
        return -ENOMEM;
    }
    memcpy(s->key->b, key->b, KEY_BYTES);
    return rc;
}

void seen_lock(struct seen *s)
{
    key_free(&s->key);
    free(s->entry);
    s->entry = NULL;
    s->n = 0;
}

bool seen_unlocked(const struct seen *s)
{
    return s->key != NULL;
}

int seen_reset(struct seen *s)
{
    seen_lock(s);
    return unlinkat(s->dirfd, SEEN_FILE, 0) < 0 && errno != ENOENT ? -errno : 0;
}

/* --- entries --- */

static struct disk_seen *find(const struct seen *s, const uint8_t *id)
{
    for (size_t i = 0; i < s->n; i++)
        if (!memcmp(s->entry[i].id, id, VOLUME_ID_BYTES))
            return &s->entry[i];
    return NULL;
}

/* Puts e into the place of the entry of its id, or at the end, durably. */
static int put(struct seen *s, const struct disk_seen *e)
{
    struct disk_seen *at = find(s, e->id), before = {0};
    bool fresh = !at;
    int rc;

    if (fresh && s->n == KEYSTORE_VOLUMES_MAX)
        return -ENOSPC;
    if (fresh) {
        s->entry = xrealloc(s->entry, (s->n + 1) * sizeof(*s->entry));
        at = &s->entry[s->n++];
    }
    if (!fresh)
        before = *at;
    *at = *e;
    rc = save(s);
    if (rc < 0 && fresh)
        s->n--;
    else if (rc < 0)
        *at = before;
    return rc;
}

void seen_get(const struct seen *s, const uint8_t id[VOLUME_ID_BYTES], struct volume_seen *ret, bool *ret_accept)
{
    const struct disk_seen *e = find(s, id);

    *ret = (struct volume_seen){0};
    *ret_accept = e && (le32_get(e->flags) & SEEN_ACCEPT);
    if (!e || !le64_get(e->generation))
        return;
    ret->generation = le64_get(e->generation);
    memcpy(ret->branch, e->branch, sizeof(ret->branch));
    memcpy(ret->root_mac, e->root_mac, sizeof(ret->root_mac));
}

int seen_put(struct seen *s, const uint8_t id[VOLUME_ID_BYTES], const struct volume_seen *now)
{
    const struct disk_seen *old = find(s, id);
    struct disk_seen e = {.generation = le64_make(now->generation)};
    bool same_branch, accept;

    if (!s->key)
        return -ENOKEY;
    if (!now->generation)
        return -EINVAL;
    memcpy(e.id, id, sizeof(e.id));
    memcpy(e.branch, now->branch, sizeof(e.branch));
    memcpy(e.root_mac, now->root_mac, sizeof(e.root_mac));
    if (!old || !le64_get(old->generation))
        return put(s, &e);
    accept = le32_get(old->flags) & SEEN_ACCEPT;
    same_branch = !memcmp(old->branch, e.branch, sizeof(e.branch));
    if (!same_branch)
        return accept ? put(s, &e) : -ESTALE;
    if (now->generation == le64_get(old->generation) && !memcmp(old->root_mac, e.root_mac, sizeof(e.root_mac)))
        return 0;
    if (now->generation <= le64_get(old->generation))
        return -ESTALE;
    e.flags = old->flags;
    return put(s, &e);
}

int seen_accept(struct seen *s, const uint8_t id[VOLUME_ID_BYTES])
{
    const struct disk_seen *old = find(s, id);
    struct disk_seen e = {0};

    if (!s->key)
        return -ENOKEY;
    if (old)
        e = *old;
    memcpy(e.id, id, sizeof(e.id));
    e.flags = le32_make(SEEN_ACCEPT);
    return put(s, &e);
}

void seen_forget(struct seen *s, const uint8_t id[VOLUME_ID_BYTES])
{
    struct disk_seen *e = find(s, id);

    if (e)
        *e = s->entry[--s->n];
}
