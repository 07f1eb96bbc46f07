/*
 * fuzzvol.h - for fuzz targets of the engine: a base volume in memory, edits that a fuzzer's input makes, and a walk
 * that uses everything an opened volume offers, with bounds so that a tree with loops ends.
 */
#ifndef TESTS_FUZZVOL_H
#define TESTS_FUZZVOL_H

#include "coffer/volume.h"
#include "fs/base/secmem.h"
#include "fs/volume/vcrypt.h"
#include "tests/crash/recstore.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <unistd.h>

static struct key *fuzz_key;
static struct vkeys *fuzz_keys;
static const uint8_t fuzz_id[VOLUME_ID_BYTES] = "fuzzed-volume";

static void fuzz_damage(void *ctx, const char *what)
{
    *(uint64_t *)ctx += what[0] != 0;
}

static int fuzz_open(struct image *const image[2], struct volume **ret_v)
{
    static uint64_t lines;
    struct volume_options o = {.cache_bytes = 128 << 10, .mount_id = 9, .on_damage = fuzz_damage, .ctx = &lines};

    return volume_open(mstore_new(image[0], NULL, NULL, 0), mstore_new(image[1], NULL, NULL, 1), fuzz_key, fuzz_id, &o,
                       ret_v);
}

static void fuzz_must(bool ok, const char *what)
{
    if (ok)
        return;
    fprintf(stderr, "fuzz: the base volume cannot be made: %s\n", what);
    abort();
}

/* Content of all kinds. */
static void fuzz_content(struct volume *v)
{
    static uint8_t buf[150000];
    struct vattr dir, a;
    char name[32];

    memset(buf, 'c', sizeof(buf));
    fuzz_must(vol_mknod(v, VOLUME_ROOT_INO, "dir", S_IFDIR | 0755, 0, 0, 0, &dir) == 0, "mkdir");
    for (unsigned k = 0; k < 12; k++) {
        static const size_t sizes[] = {0, 10, 2000, 5000, 70000, 150000};

        snprintf(name, sizeof(name), "file%u", k);
        fuzz_must(vol_mknod(v, k % 2 ? dir.ino : VOLUME_ROOT_INO, name, S_IFREG | 0644, 0, 0, 0, &a) == 0, "mknod");
        fuzz_must(vol_write(v, a.ino, 0, buf, sizes[k % 6]) == (ssize_t)sizes[k % 6], "write");
    }
    fuzz_must(vol_setxattr(v, a.ino, "user.x", "value", 5, 0) == 0, "setxattr");
    fuzz_must(vol_link(v, a.ino, VOLUME_ROOT_INO, "link", &a) == 0, "link");
    fuzz_must(vol_symlink(v, dir.ino, "symlink", "target", 0, 0, &a) == 0, "symlink");
    fuzz_must(vol_tmpfile(v, dir.ino, S_IFREG | 0600, 0, 0, &a) == 0, "tmpfile");
    fuzz_must(vol_write(v, a.ino, 0, buf, 9000) == 9000, "write");
}

/* The base volume, whose newest superblock contains all content; with_records: and records of more follow. */
static void fuzz_base(bool with_records, struct image *ret_image[2])
{
    struct volume_params p = {.block_size = 4096, .size_limit = 64 << 20, .log_segment = 256 << 10, .root_mode = 0755};
    struct store *data, *log;
    struct volume *v = NULL;
    struct vattr a;

    if (!fuzz_key) {
        fuzz_must(secmem_init() == 0 && (fuzz_key = key_new()) != NULL, "memory");
        memset(fuzz_key->b, 0x42, sizeof(fuzz_key->b));
        fuzz_must(vkeys_derive(fuzz_key, fuzz_id, &fuzz_keys) == 0, "keys");
    }
    memcpy(p.id, fuzz_id, sizeof(p.id));
    ret_image[0] = image_new(NULL);
    ret_image[1] = image_new(NULL);
    data = mstore_new(ret_image[0], NULL, NULL, 0);
    log = mstore_new(ret_image[1], NULL, NULL, 1);
    fuzz_must(volume_format(data, log, fuzz_key, &p) == 0, "format");
    data->ops->close(data);
    log->ops->close(log);
    fuzz_must(fuzz_open(ret_image, &v) == 0, "open");
    fuzz_content(v);
    fuzz_must(volume_checkpoint(v) == 0, "checkpoint");
    if (with_records) {
        fuzz_must(vol_mknod(v, VOLUME_ROOT_INO, "late", S_IFREG | 0644, 0, 0, 0, &a) == 0, "mknod");
        fuzz_must(vol_write(v, a.ino, 0, "late content", 12) == 12, "write");
        fuzz_must(vol_write(v, a.ino, 5000, "more", 4) == 4, "write");
        fuzz_must(vol_fsync(v, a.ino, false) == 0, "fsync");
        fuzz_must(vol_rename(v, VOLUME_ROOT_INO, "file0", VOLUME_ROOT_INO, "late", 0) == 0, "rename");
        fuzz_must(vol_unlink(v, VOLUME_ROOT_INO, "link") == 0, "unlink");
    }
    volume_abandon(v);
}

/* --- a bounded walk --- */

struct fuzz_list {
    char name[64][VOLUME_NAME_BYTES + 1];
    unsigned n;
};

static int fuzz_entry(void *ctx, const char *name, uint64_t ino, uint32_t type, uint64_t cookie, const struct vattr *a)
{
    struct fuzz_list *l = ctx;

    (void)ino, (void)type, (void)cookie, (void)a;
    if (l->n == ARRAY_LEN(l->name) || strlen(name) > VOLUME_NAME_BYTES)
        return 1;
    strcpy(l->name[l->n++], name);
    return 0;
}

static void fuzz_walk(struct volume *v, uint64_t ino, unsigned depth, unsigned *budget)
{
    static uint8_t buf[128 << 10];
    struct fuzz_list *l = NULL;
    struct vattr a;
    uint64_t at;

    if (*budget == 0 || depth > 16 || vol_getattr(v, ino, &a) < 0)
        return;
    --*budget;
    vol_read(v, ino, 0, buf, sizeof(buf));
    vol_read(v, ino, a.size > 5000 ? a.size - 5000 : 0, buf, 6000);
    vol_seek(v, ino, 0, SEEK_HOLE, &at);
    vol_seek(v, ino, a.size / 2, SEEK_DATA, &at);
    vol_readlink(v, ino, (char *)buf, sizeof(buf));
    vol_listxattr(v, ino, (char *)buf, sizeof(buf));
    vol_getxattr(v, ino, "user.x", buf, sizeof(buf));
    if (!S_ISDIR(a.mode))
        return;
    l = xcalloc(1, sizeof(*l));
    vol_readdir(v, ino, 0, true, fuzz_entry, l);
    for (unsigned k = 0; k < l->n; k++) {
        if (strcmp(l->name[k], ".") == 0 || strcmp(l->name[k], "..") == 0)
            continue;
        if (vol_lookup(v, ino, l->name[k], &a) < 0)
            continue;
        fuzz_walk(v, a.ino, depth + 1, budget);
        vol_forget(v, a.ino, 1);
    }
    free(l);
}

static void fuzz_line(void *ctx, const char *text)
{
    *(unsigned *)ctx += text[0] != 0;
}

static void fuzz_change(struct volume *v)
{
    static uint8_t buf[70000];
    struct vattr a, size = {.size = 1000};

    if (vol_mknod(v, VOLUME_ROOT_INO, "fuzz", S_IFREG | 0600, 0, 0, 0, &a) == 0) {
        vol_write(v, a.ino, 100, buf, sizeof(buf));
        vol_setattr(v, a.ino, VOL_SET_SIZE, &size, &a);
        vol_forget(v, a.ino, 1);
    }
    if (vol_lookup(v, VOLUME_ROOT_INO, "file4", &a) == 0) {
        vol_write(v, a.ino, 3000, buf, 20000);
        vol_fallocate(v, a.ino, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 8192, 20000);
        vol_setattr(v, a.ino, VOL_SET_SIZE, &size, &a);
        vol_forget(v, a.ino, 1);
    }
    vol_rename(v, VOLUME_ROOT_INO, "file2", VOLUME_ROOT_INO, "file6", 0);
    vol_unlink(v, VOLUME_ROOT_INO, "file4");
    vol_rmdir(v, VOLUME_ROOT_INO, "dir");
    vol_sync(v);
}

/* Opens, walks, checks, changes, closes; whatever the answers, it must come to an end. Frees the images. */
static void fuzz_use(struct image *image[2])
{
    struct volume *v = NULL;
    unsigned budget = 60, lines = 0;

    if (fuzz_open(image, &v) == 0) {
        fuzz_walk(v, VOLUME_ROOT_INO, 0, &budget);
        volume_check(v, true, fuzz_line, &lines);
        fuzz_change(v);
        volume_close(v);
    }
    image_free(image[0]);
    image_free(image[1]);
}

/* Takes rows of { le16 offset, length 1..16 in a byte, bytes } from the input and puts them over buf. */
UNUSED static void fuzz_edit(uint8_t *buf, size_t n, const uint8_t *in, size_t len)
{
    while (len >= 4 && n > 0) {
        size_t off = (in[0] | (size_t)in[1] << 8) % n, k = MIN(1 + in[2] % 16u, MIN(len - 3, n - off));

        memcpy(buf + off, in + 3, k);
        in += 3 + k;
        len -= 3 + k;
    }
}

/* The newest superblock of an image; its slot. */
UNUSED static unsigned fuzz_super(const struct image *data, struct disk_super *ret_super)
{
    struct disk_super s[2];
    uint8_t buf[UNIT_BYTES];

    for (unsigned slot = 0; slot < 2; slot++) {
        image_read(data, SUPER_UNIT(slot, 0) * UNIT_BYTES, buf, sizeof(buf));
        if (super_open(fuzz_keys, slot, buf, &s[slot]) < 0)
            memset(&s[slot], 0, sizeof(s[slot]));
    }
    *ret_super = s[le64_get(s[1].generation) > le64_get(s[0].generation)];
    return le64_get(s[1].generation) > le64_get(s[0].generation);
}

#endif
