/*
 * test_dirops.c - names, attributes and the check, on real volumes in temporary files.
 *
 * After each test the volume is checked with all content, left as a killed process leaves it, opened again through
 * recovery and checked again: no operation may leave anything that the check finds. Then the other way round: each kind
 * of damage to the items is put in through a transaction, and the check has to name it.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "fs/base/secmem.h"
#include "fs/volume/space.h"
#include "fs/volume/tx.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/xattr.h>
#include <unistd.h>

#define ROOT VOLUME_ROOT_INO

static const uint8_t volume_id[VOLUME_ID_BYTES] = "directories";

struct fixture {
    char dir[64];
    struct key *key;
    struct volume *v;
    bool background;
    int findings, damage;
    char text[16384]; /* findings and damage, one a line */
};

/* --- the volume under test --- */

static void add_line(struct fixture *f, const char *text)
{
    size_t n = strlen(f->text);

    snprintf(f->text + n, sizeof(f->text) - n, "%s\n", text);
}

static void on_damage(void *ctx, const char *what)
{
    struct fixture *f = ctx;

    f->damage++;
    add_line(f, what);
}

static void on_line(void *ctx, const char *text)
{
    add_line(ctx, text);
}

static struct store *file_store(struct fixture *f, const char *name)
{
    char path[128];
    int fd;

    snprintf(path, sizeof(path), "%s/%s", f->dir, name);
    fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    return store_fd_take(fd);
}

static void open_volume(struct fixture *f, bool read_only)
{
    struct volume_options options = {
        .read_only = read_only, .background = f->background, .mount_id = 1, .on_damage = on_damage, .ctx = f};

    assert_int_equal(volume_open(file_store(f, "data"), file_store(f, "log"), f->key, volume_id, &options, &f->v), 0);
}

static int check(struct fixture *f)
{
    f->text[0] = 0;
    f->findings = volume_check(f->v, true, on_line, f);
    return f->findings;
}

/* Nothing is found, no damage was reported and nothing had to be left out. */
static void check_clean(struct fixture *f)
{
    check(f);
    if (f->findings || f->damage || f->text[0])
        print_message("check: %d findings, %d damage:\n%s", f->findings, f->damage, f->text);
    assert_int_equal(f->findings, 0);
    assert_int_equal(f->damage, 0);
    assert_string_equal(f->text, "");
}

/* As after kill -9. */
static void reopen(struct fixture *f)
{
    volume_abandon(f->v);
    open_volume(f, false);
}

static int setup(void **state)
{
    struct volume_params params = {.block_size = 4096,
                                   .size_limit = 128ull << 20,
                                   .log_segment = 1 << 20,
                                   .root_mode = 0755,
                                   .root_uid = 10,
                                   .root_gid = 20};
    struct fixture *f = calloc(1, sizeof(*f));
    struct store *data, *log;

    *state = f;
    if (!f || secmem_init() < 0 || !(f->key = key_new()))
        return -1;
    randombytes_buf(f->key->b, sizeof(f->key->b));
    memcpy(params.id, volume_id, sizeof(params.id));
    strcpy(f->dir, "/tmp/coffer-dirops-XXXXXX");
    if (!mkdtemp(f->dir))
        return -1;
    data = file_store(f, "data");
    log = file_store(f, "log");
    assert_int_equal(volume_format(data, log, f->key, &params), 0);
    data->ops->close(data);
    log->ops->close(log);
    open_volume(f, false);
    return 0;
}

static void remove_files(struct fixture *f)
{
    char path[128];

    volume_abandon(f->v);
    snprintf(path, sizeof(path), "%s/data", f->dir);
    unlink(path);
    snprintf(path, sizeof(path), "%s/log", f->dir);
    unlink(path);
    rmdir(f->dir);
    key_free(&f->key);
    free(f);
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    check_clean(f);
    reopen(f);
    check_clean(f);
    assert_int_equal(volume_close(f->v), 0);
    open_volume(f, false);
    check_clean(f);
    remove_files(f);
    return 0;
}

/* For tests that leave damage behind. */
static int teardown_damaged(void **state)
{
    remove_files(*state);
    return 0;
}

/* --- short hands --- */

static uint64_t mk(struct fixture *f, uint64_t dir, const char *name, uint32_t mode)
{
    struct vattr a;

    assert_int_equal(vol_mknod(f->v, dir, name, mode, 0, 1, 2, &a), 0);
    return a.ino;
}

/* The same, and nobody refers to it. */
static uint64_t mk_free(struct fixture *f, uint64_t dir, const char *name, uint32_t mode)
{
    uint64_t ino = mk(f, dir, name, mode);

    vol_forget(f->v, ino, 1);
    return ino;
}

/* The inode of a name, or an error. Takes no reference. */
static int64_t find(struct fixture *f, uint64_t dir, const char *name)
{
    struct vattr a;
    int rc = vol_lookup(f->v, dir, name, &a);

    if (rc == 0)
        vol_forget(f->v, a.ino, 1);
    return rc < 0 ? rc : (int64_t)a.ino;
}

static struct vattr attr(struct fixture *f, uint64_t ino)
{
    struct vattr a;

    assert_int_equal(vol_getattr(f->v, ino, &a), 0);
    return a;
}

static void same_attr(const struct vattr *x, const struct vattr *y)
{
    assert_true(x->ino == y->ino && x->generation == y->generation && x->mode == y->mode && x->uid == y->uid &&
                x->gid == y->gid && x->nlink == y->nlink && x->rdev == y->rdev && x->size == y->size &&
                x->blocks == y->blocks && x->atime == y->atime && x->mtime == y->mtime && x->ctime == y->ctime &&
                x->btime == y->btime);
}

static uint64_t inodes(struct fixture *f)
{
    struct volume_stat st;

    volume_stat(f->v, &st);
    return st.inodes;
}

/* --- making and removing --- */

static void test_make(void **state)
{
    static const uint32_t types[] = {S_IFREG, S_IFDIR, S_IFCHR, S_IFBLK, S_IFIFO, S_IFSOCK};
    struct fixture *f = *state;
    char name[300] = "";
    struct vattr a, root = attr(f, ROOT);

    assert_int_equal(root.mode, S_IFDIR | 0755);
    assert_int_equal(root.uid, 10);
    assert_int_equal(root.gid, 20);
    assert_int_equal(root.nlink, 2);
    for (size_t i = 0; i < ARRAY_LEN(types); i++) {
        struct vattr before = attr(f, ROOT), got;

        snprintf(name, sizeof(name), "of type %zu", i);
        assert_int_equal(vol_mknod(f->v, ROOT, name, types[i] | 04751, 0x501, 7, 8, &a), 0);
        assert_int_equal(a.mode, types[i] | 04751);
        assert_int_equal(a.uid, 7);
        assert_int_equal(a.gid, 8);
        assert_int_equal(a.nlink, S_ISDIR(types[i]) ? 2 : 1);
        assert_int_equal(a.rdev, S_ISCHR(types[i]) || S_ISBLK(types[i]) ? 0x501 : 0);
        assert_true(a.ctime == a.mtime && a.mtime == a.atime && a.btime == a.atime);
        root = attr(f, ROOT);
        assert_true(root.mtime == a.ctime && root.ctime == a.ctime && root.atime == before.atime);
        assert_int_equal(root.nlink, before.nlink + S_ISDIR(types[i]));
        assert_true(root.size > before.size);
        assert_int_equal(vol_lookup(f->v, ROOT, name, &got), 0);
        same_attr(&a, &got);
        assert_int_equal(vol_mknod(f->v, ROOT, name, S_IFREG, 0, 0, 0, &got), -EEXIST);
    }
    assert_int_equal(vol_mknod(f->v, ROOT, "x", S_IFLNK, 0, 0, 0, &a), -EINVAL);
    assert_int_equal(vol_mknod(f->v, ROOT, "x", 0644, 0, 0, 0, &a), -EINVAL);
    assert_int_equal(vol_mknod(f->v, ROOT, "", S_IFREG, 0, 0, 0, &a), -EINVAL);
    assert_int_equal(vol_mknod(f->v, ROOT, ".", S_IFREG, 0, 0, 0, &a), -EINVAL);
    assert_int_equal(vol_mknod(f->v, ROOT, "..", S_IFREG, 0, 0, 0, &a), -EINVAL);
    assert_int_equal(vol_mknod(f->v, ROOT, "a/b", S_IFREG, 0, 0, 0, &a), -EINVAL);
    memset(name, 'x', 256);
    name[256] = 0;
    assert_int_equal(vol_mknod(f->v, ROOT, name, S_IFREG, 0, 0, 0, &a), -ENAMETOOLONG);
    assert_int_equal(vol_lookup(f->v, ROOT, name, &a), -ENAMETOOLONG);
    assert_int_equal(vol_unlink(f->v, ROOT, name), -ENAMETOOLONG);
    assert_int_equal(vol_lookup(f->v, find(f, ROOT, "of type 0"), name, &a), -ENOTDIR); /* this comes first */
    assert_int_equal(vol_unlink(f->v, find(f, ROOT, "of type 0"), name), -ENOTDIR);
    assert_int_equal(vol_rename(f->v, ROOT, "of type 0", ROOT, name, 0), -ENAMETOOLONG);
    name[255] = 0;
    mk(f, ROOT, name, S_IFREG);
    mk(f, ROOT, "\xff\x01 not text", S_IFREG);
    assert_int_equal(vol_mknod(f->v, find(f, ROOT, name), "x", S_IFREG, 0, 0, 0, &a), -ENOTDIR);
    assert_int_equal(vol_lookup(f->v, find(f, ROOT, name), "x", &a), -ENOTDIR);
    assert_int_equal(vol_mknod(f->v, 999999, "x", S_IFREG, 0, 0, 0, &a), -ENOENT);
    assert_int_equal(vol_lookup(f->v, ROOT, "absent", &a), -ENOENT);
    assert_int_equal(vol_lookup(f->v, ROOT, "", &a), -ENOENT);
}

static void test_remove(void **state)
{
    struct fixture *f = *state;
    uint64_t dir = mk(f, ROOT, "dir", S_IFDIR | 0700), sub = mk(f, dir, "sub", S_IFDIR),
             file = mk(f, dir, "file", S_IFREG);
    uint64_t before = inodes(f);

    assert_int_equal(attr(f, dir).nlink, 3);
    assert_int_equal(vol_rmdir(f->v, ROOT, "dir"), -ENOTEMPTY);
    assert_int_equal(vol_unlink(f->v, ROOT, "dir"), -EISDIR);
    assert_int_equal(vol_rmdir(f->v, dir, "file"), -ENOTDIR);
    assert_int_equal(vol_rmdir(f->v, dir, "absent"), -ENOENT);
    assert_int_equal(vol_unlink(f->v, dir, "absent"), -ENOENT);
    assert_int_equal(vol_rmdir(f->v, dir, "."), -EINVAL);
    assert_int_equal(vol_rmdir(f->v, dir, ".."), -ENOTEMPTY);
    assert_int_equal(vol_unlink(f->v, file, "x"), -ENOTDIR);
    assert_int_equal(vol_unlink(f->v, dir, "file"), 0);
    assert_int_equal(attr(f, file).nlink, 0);
    assert_int_equal(vol_rmdir(f->v, dir, "sub"), 0);
    assert_int_equal(attr(f, dir).nlink, 2);
    assert_int_equal(attr(f, sub).nlink, 0);
    assert_int_equal(inodes(f), before); /* still referred to */
    vol_forget(f->v, file, 1);
    vol_forget(f->v, sub, 1);
    assert_int_equal(inodes(f), before - 2);
    assert_int_equal(vol_getattr(f->v, file, &(struct vattr){0}), -ENOENT);
    vol_forget(f->v, dir, 1);
    assert_int_equal(vol_rmdir(f->v, ROOT, "dir"), 0);
    assert_int_equal(inodes(f), before - 3);
    assert_int_equal(attr(f, ROOT).nlink, 2);
}

/* What was removed but is still in use takes no names, and neither it nor its vanished parent is called damaged. */
static void test_removed_dir(void **state)
{
    struct fixture *f = *state;
    uint64_t top = mk_free(f, ROOT, "top", S_IFDIR), low = mk(f, top, "low", S_IFDIR),
             file = mk(f, ROOT, "file", S_IFREG);
    struct vattr a;

    assert_int_equal(find(f, low, ".."), top);
    assert_int_equal(find(f, low, "."), low);
    assert_int_equal(find(f, ROOT, ".."), ROOT);
    assert_int_equal(vol_rmdir(f->v, top, "low"), 0);
    assert_int_equal(vol_rmdir(f->v, ROOT, "top"), 0);
    assert_int_equal(vol_getattr(f->v, top, &a), -ENOENT);
    assert_int_equal(find(f, low, ".."), -ENOENT);
    assert_int_equal(vol_mknod(f->v, low, "x", S_IFREG, 0, 0, 0, &a), -ENOENT);
    assert_int_equal(vol_symlink(f->v, low, "x", "y", 0, 0, &a), -ENOENT);
    assert_int_equal(vol_tmpfile(f->v, low, 0600, 0, 0, &a), -ENOENT);
    assert_int_equal(vol_link(f->v, file, low, "x", &a), -ENOENT);
    assert_int_equal(vol_rename(f->v, ROOT, "file", low, "x", 0), -ENOENT);
    assert_int_equal(vol_reference(f->v, low, 1), -ENOENT);
    assert_int_equal(vol_reference(f->v, top, 1), -ENOENT);
    assert_int_equal(vol_reference(f->v, file, 3), 0);
    assert_int_equal(vol_unlink(f->v, ROOT, "file"), 0);
    for (unsigned i = 0; i < 3; i++) {
        vol_forget(f->v, file, 1);
        assert_int_equal(vol_getattr(f->v, file, &a), 0);
    }
    vol_forget(f->v, file, 1);
    assert_int_equal(vol_getattr(f->v, file, &a), -ENOENT);
    check_clean(f);
    vol_forget(f->v, low, 1);
    assert_int_equal(inodes(f), 1);
}

static void test_unlinked_open(void **state)
{
    struct fixture *f = *state;
    static uint8_t buf[200000], got[200000];
    uint64_t file = mk(f, ROOT, "file", S_IFREG | 0600);

    randombytes_buf(buf, sizeof(buf));
    assert_int_equal(vol_write(f->v, file, 0, buf, sizeof(buf)), sizeof(buf));
    assert_int_equal(vol_setxattr(f->v, file, "user.x", "y", 1, 0), 0);
    assert_int_equal(vol_unlink(f->v, ROOT, "file"), 0);
    assert_int_equal(vol_read(f->v, file, 0, got, sizeof(got)), sizeof(got));
    assert_memory_equal(buf, got, sizeof(buf));
    assert_int_equal(vol_write(f->v, file, 5, "hello", 5), 5);
    check_clean(f);
    vol_forget(f->v, file, 1);
    assert_int_equal(inodes(f), 1);
    check_clean(f);
}

static void test_setgid(void **state)
{
    struct fixture *f = *state;
    uint64_t dir = mk(f, ROOT, "dir", S_IFDIR | 02775);
    struct vattr a;

    assert_int_equal(vol_setattr(f->v, dir, VOL_SET_GID, &(struct vattr){.gid = 500}, &a), 0);
    a = attr(f, mk(f, dir, "sub", S_IFDIR | 0755));
    assert_int_equal(a.gid, 500);
    assert_int_equal(a.mode, S_IFDIR | 02755);
    a = attr(f, mk(f, dir, "file", S_IFREG | 0644));
    assert_int_equal(a.gid, 500);
    assert_int_equal(a.mode, S_IFREG | 0644);
    assert_int_equal(vol_symlink(f->v, dir, "link", "to", 3, 4, &a), 0);
    assert_int_equal(a.gid, 500);
    assert_int_equal(vol_tmpfile(f->v, dir, 0600, 3, 4, &a), 0);
    assert_int_equal(a.gid, 500);
}

/* --- links --- */

static void test_symlink(void **state)
{
    struct fixture *f = *state;
    char target[SYMLINK_MAX + 2], got[SYMLINK_MAX + 2];
    struct vattr a;

    memset(target, 't', sizeof(target));
    target[SYMLINK_MAX + 1] = 0;
    assert_int_equal(vol_symlink(f->v, ROOT, "l", target, 1, 2, &a), -ENAMETOOLONG);
    target[SYMLINK_MAX] = 0;
    assert_int_equal(vol_symlink(f->v, ROOT, "l", target, 1, 2, &a), 0);
    assert_int_equal(a.mode, S_IFLNK | 0777);
    assert_int_equal(a.size, SYMLINK_MAX);
    assert_int_equal(vol_symlink(f->v, ROOT, "l", "x", 1, 2, &a), -EEXIST);
    assert_int_equal(vol_symlink(f->v, ROOT, "m", "", 1, 2, &a), -ENOENT);
    reopen(f);
    assert_int_equal(vol_readlink(f->v, find(f, ROOT, "l"), got, sizeof(got)), SYMLINK_MAX);
    assert_memory_equal(got, target, SYMLINK_MAX);
    assert_int_equal(vol_readlink(f->v, find(f, ROOT, "l"), got, 10), 10);
    assert_int_equal(vol_readlink(f->v, ROOT, got, sizeof(got)), -EINVAL);
    assert_int_equal(vol_readlink(f->v, 12345, got, sizeof(got)), -ENOENT);
    assert_int_equal(vol_unlink(f->v, ROOT, "l"), 0);
    assert_int_equal(inodes(f), 1);
}

static void test_link(void **state)
{
    struct fixture *f = *state;
    uint64_t dir = mk(f, ROOT, "dir", S_IFDIR), file = mk(f, ROOT, "a", S_IFREG);
    struct vattr a, before = attr(f, file);

    assert_int_equal(vol_link(f->v, file, dir, "b", &a), 0);
    assert_int_equal(a.ino, file);
    assert_int_equal(a.nlink, 2);
    assert_true(a.ctime >= before.ctime && a.mtime == before.mtime && attr(f, dir).mtime == a.ctime);
    assert_int_equal(vol_link(f->v, file, dir, "b", &a), -EEXIST);
    assert_int_equal(vol_link(f->v, dir, dir, "c", &a), -EPERM);
    assert_int_equal(vol_link(f->v, 777, dir, "c", &a), -ENOENT);
    assert_int_equal(vol_unlink(f->v, ROOT, "a"), 0);
    assert_int_equal(attr(f, file).nlink, 1);
    assert_int_equal(find(f, dir, "b"), file);
    vol_forget(f->v, file, 2);
    assert_int_equal(vol_unlink(f->v, dir, "b"), 0);
    assert_int_equal(vol_getattr(f->v, file, &a), -ENOENT);
}

static void test_link_max(void **state)
{
    struct fixture *f = *state;
    uint64_t file = mk(f, ROOT, "f", S_IFREG);
    struct vattr a;
    char name[32];

    for (unsigned i = 1; i < VOLUME_LINK_MAX; i++) {
        snprintf(name, sizeof(name), "%u", i);
        assert_int_equal(vol_link(f->v, file, ROOT, name, &a), 0);
    }
    assert_int_equal(a.nlink, VOLUME_LINK_MAX);
    assert_int_equal(vol_link(f->v, file, ROOT, "one more", &a), -EMLINK);
    assert_int_equal(vol_unlink(f->v, ROOT, "77"), 0);
    assert_int_equal(vol_link(f->v, file, ROOT, "one more", &a), 0);
}

static void test_tmpfile(void **state)
{
    struct fixture *f = *state;
    struct vattr a, b, before = attr(f, ROOT);

    assert_int_equal(vol_tmpfile(f->v, ROOT, 0640, 3, 4, &a), 0);
    assert_int_equal(a.mode, S_IFREG | 0640);
    assert_int_equal(a.nlink, 0);
    assert_int_equal(attr(f, ROOT).mtime, before.mtime);
    assert_int_equal(vol_write(f->v, a.ino, 0, "content", 7), 7);
    check_clean(f);
    assert_int_equal(vol_link(f->v, a.ino, ROOT, "named", &b), 0);
    assert_int_equal(b.nlink, 1);
    vol_forget(f->v, a.ino, 2);
    assert_int_equal(find(f, ROOT, "named"), a.ino);
    assert_int_equal(vol_tmpfile(f->v, ROOT, 0640, 3, 4, &b), 0);
    vol_forget(f->v, b.ino, 1);
    assert_int_equal(vol_getattr(f->v, b.ino, &b), -ENOENT);
    assert_int_equal(vol_tmpfile(f->v, a.ino, 0640, 3, 4, &b), -ENOTDIR);
    assert_int_equal(vol_tmpfile(f->v, ROOT, 0640, 3, 4, &b), 0);
    assert_int_equal(inodes(f), 3);
    reopen(f); /* nobody can refer to it any more */
    assert_int_equal(inodes(f), 2);
}

/* --- rename --- */

static void test_rename_whiteout(void **state)
{
    struct fixture *f = *state;
    uint64_t dir = mk(f, ROOT, "dir", S_IFDIR), a = mk(f, ROOT, "a", S_IFREG), d = mk(f, dir, "d", S_IFDIR);
    struct vattr w;

    mk(f, dir, "b", S_IFREG);
    assert_int_equal(vol_rename_whiteout(f->v, ROOT, "a", dir, "b", RENAME_EXCHANGE, 0, 0), -EINVAL);
    assert_int_equal(vol_rename_whiteout(f->v, ROOT, "a", dir, "b", RENAME_NOREPLACE, 0, 0), -EEXIST);
    assert_int_equal(vol_rename_whiteout(f->v, ROOT, "absent", dir, "b", 0, 0, 0), -ENOENT);
    assert_int_equal(vol_rename_whiteout(f->v, ROOT, "a", dir, "b", 0, 3, 4), 0); /* over something */
    assert_int_equal(vol_rename_whiteout(f->v, dir, "d", dir, "e", RENAME_NOREPLACE, 0, 0), 0);
    for (int again = 0; again < 2; again++) {
        assert_int_equal(find(f, dir, "b"), a);
        assert_int_equal(find(f, dir, "e"), d);
        w = attr(f, find(f, ROOT, "a"));
        assert_true(w.mode == S_IFCHR && w.rdev == 0 && w.nlink == 1 && w.uid == 3 && w.gid == 4);
        w = attr(f, find(f, dir, "d"));
        assert_true(w.mode == S_IFCHR && w.rdev == 0);
        assert_true(attr(f, dir).nlink == 3 && attr(f, ROOT).nlink == 3);
        if (again == 0)
            reopen(f);
    }
    assert_int_equal(vol_unlink(f->v, ROOT, "a"), 0);
    assert_int_equal(vol_unlink(f->v, dir, "d"), 0);
    assert_int_equal(vol_rmdir(f->v, dir, "e"), 0);
    assert_int_equal(vol_unlink(f->v, dir, "b"), 0);
    assert_int_equal(vol_rmdir(f->v, ROOT, "dir"), 0);
}

static void test_rename_file(void **state)
{
    struct fixture *f = *state;
    uint64_t dir = mk(f, ROOT, "dir", S_IFDIR), a = mk(f, ROOT, "a", S_IFREG), b = mk(f, dir, "b", S_IFREG), c;
    struct vattr before = attr(f, a);

    assert_int_equal(vol_rename(f->v, ROOT, "absent", dir, "x", 0), -ENOENT);
    assert_int_equal(vol_rename(f->v, ROOT, "a", dir, "b", RENAME_NOREPLACE), -EEXIST);
    assert_int_equal(vol_rename(f->v, ROOT, "a", dir, "x", RENAME_EXCHANGE), -ENOENT);
    assert_int_equal(vol_rename(f->v, ROOT, "a", dir, "b", RENAME_NOREPLACE | RENAME_EXCHANGE), -EINVAL);
    assert_int_equal(vol_rename(f->v, ROOT, "a", dir, "b", RENAME_WHITEOUT), -EINVAL);
    assert_int_equal(vol_rename(f->v, ROOT, "a", ROOT, ".", 0), -EBUSY);
    assert_int_equal(vol_rename(f->v, ROOT, "..", ROOT, "x", 0), -EBUSY);
    assert_int_equal(vol_rename(f->v, ROOT, "a", ROOT, "a", 0), 0);
    assert_int_equal(vol_rename(f->v, ROOT, "a", ROOT, "a2", RENAME_NOREPLACE), 0);
    assert_int_equal(find(f, ROOT, "a"), -ENOENT);
    assert_int_equal(find(f, ROOT, "a2"), a);
    assert_true(attr(f, a).mtime == before.mtime && attr(f, a).ctime >= before.ctime);

    assert_int_equal(vol_rename(f->v, ROOT, "a2", dir, "b", 0), 0); /* replaces b, which is in use */
    assert_int_equal(find(f, dir, "b"), a);
    assert_int_equal(attr(f, b).nlink, 0);
    vol_forget(f->v, b, 1);
    assert_int_equal(vol_getattr(f->v, b, &before), -ENOENT);
    assert_true(attr(f, dir).mtime == attr(f, a).ctime && attr(f, ROOT).mtime == attr(f, a).ctime);

    assert_int_equal(vol_link(f->v, a, ROOT, "second", &before), 0);
    assert_int_equal(vol_rename(f->v, ROOT, "second", dir, "b", 0), 0); /* two names of one inode stay */
    assert_int_equal(attr(f, a).nlink, 2);
    assert_int_equal(find(f, ROOT, "second"), a);
    assert_int_equal(vol_rename(f->v, ROOT, "second", dir, "b", RENAME_NOREPLACE), -EEXIST);

    c = mk(f, ROOT, "c", S_IFIFO);
    assert_int_equal(vol_rename(f->v, ROOT, "c", dir, "b", RENAME_EXCHANGE), 0);
    assert_int_equal(find(f, ROOT, "c"), a);
    assert_int_equal(find(f, dir, "b"), c);
    assert_int_equal(vol_rename(f->v, ROOT, "c", ROOT, "dir", 0), -EISDIR);
    assert_int_equal(vol_rename(f->v, ROOT, "dir", ROOT, "c", 0), -ENOTDIR);
    assert_int_equal(vol_rename(f->v, c, "x", ROOT, "y", 0), -ENOTDIR);
    assert_int_equal(vol_rename(f->v, ROOT, "c", c, "y", 0), -ENOTDIR);
}

static void test_rename_dir(void **state)
{
    struct fixture *f = *state;
    uint64_t a = mk(f, ROOT, "a", S_IFDIR), b = mk(f, a, "b", S_IFDIR), c = mk(f, b, "c", S_IFDIR);
    uint64_t empty = mk(f, ROOT, "empty", S_IFDIR), other, file;

    assert_int_equal(vol_rename(f->v, ROOT, "a", a, "x", 0), -EINVAL);
    assert_int_equal(vol_rename(f->v, ROOT, "a", c, "x", 0), -EINVAL);
    assert_int_equal(vol_rename(f->v, ROOT, "a", b, "c", RENAME_EXCHANGE), -EINVAL);
    assert_int_equal(vol_rename(f->v, b, "c", ROOT, "a", RENAME_EXCHANGE), -EINVAL);
    assert_int_equal(vol_rename(f->v, b, "c", ROOT, "a", 0), -ENOTEMPTY);
    assert_int_equal(vol_rename(f->v, ROOT, "empty", a, "b", 0), -ENOTEMPTY);
    file = mk(f, c, "file", S_IFREG);
    assert_int_equal(vol_rename(f->v, c, "file", ROOT, "a", RENAME_EXCHANGE), -EINVAL);

    assert_int_equal(vol_rename(f->v, b, "c", ROOT, "c", 0), 0);
    assert_int_equal(attr(f, b).nlink, 2);
    assert_int_equal(attr(f, ROOT).nlink, 5);
    assert_int_equal(find(f, c, ".."), ROOT);
    assert_int_equal(vol_rename(f->v, ROOT, "c", ROOT, "empty", 0), 0); /* over an empty one */
    assert_int_equal(attr(f, ROOT).nlink, 4);
    assert_int_equal(attr(f, empty).nlink, 0);
    assert_int_equal(find(f, ROOT, "empty"), c);
    assert_int_equal(find(f, c, "file"), file);

    assert_int_equal(vol_rename(f->v, ROOT, "empty", a, "b", RENAME_EXCHANGE), 0);
    assert_int_equal(find(f, ROOT, "empty"), b);
    assert_int_equal(find(f, a, "b"), c);
    assert_int_equal(find(f, b, ".."), ROOT);
    assert_int_equal(find(f, c, ".."), a);
    other = mk(f, ROOT, "plain", S_IFREG);
    assert_int_equal(vol_rename(f->v, ROOT, "plain", a, "b", RENAME_EXCHANGE), 0); /* a file for a directory */
    assert_int_equal(find(f, ROOT, "plain"), c);
    assert_int_equal(find(f, a, "b"), other);
    assert_int_equal(attr(f, a).nlink, 2);
    assert_int_equal(attr(f, ROOT).nlink, 5);
    check_clean(f);
    reopen(f);
    assert_int_equal(find(f, c, ".."), ROOT);
}

/* --- collisions of hashes: names are made to collide by items put where theirs would go --- */

static void put_blocker(struct fixture *f, uint64_t dir, uint64_t at, uint64_t target)
{
    struct {
        struct disk_dirent d;
        char name[16];
    } __attribute__((packed)) item = {.d = {.ino = le64_make(target), .type = S_IFREG >> 12}};
    struct tree_key key = tree_key(ITEM_DIRENT, dir, at);
    struct tx tx;

    item.d.namelen = (uint8_t)snprintf(item.name, sizeof(item.name), "b%llx", (unsigned long long)at % 4096);
    assert_int_equal(tx_begin(f->v, &tx, TX_GROWS), 0);
    assert_int_equal(tx_put(&tx, &key, &item, sizeof(item.d) + item.d.namelen), 0);
    assert_int_equal(tx_commit(&tx), 0);
}

static void del_item(struct fixture *f, enum item_kind kind, uint64_t a, uint64_t b)
{
    struct tree_key key = tree_key(kind, a, b);
    struct tx tx;

    assert_int_equal(tx_begin(f->v, &tx, TX_CHANGES), 0);
    assert_int_equal(tx_del(&tx, &key), 0);
    assert_int_equal(tx_commit(&tx), 0);
}

static void test_collisions(void **state)
{
    struct fixture *f = *state;
    uint64_t target = mk(f, ROOT, "target", S_IFREG), hash = name_hash(f->v->keys, ROOT, "name", 4), ino;
    struct vattr a;

    for (unsigned i = 0; i < PROBE_MAX - 1; i++)
        put_blocker(f, ROOT, hash + i, target);
    ino = mk(f, ROOT, "name", S_IFREG);
    assert_int_equal(find(f, ROOT, "name"), ino);
    assert_int_equal(vol_mknod(f->v, ROOT, "name", S_IFREG, 0, 0, 0, &a), -EEXIST);
    for (unsigned i = 0; i < PROBE_MAX - 1; i += 2) { /* gaps before it hide nothing */
        del_item(f, ITEM_DIRENT, ROOT, hash + i);
        assert_int_equal(find(f, ROOT, "name"), ino);
    }
    assert_int_equal(vol_rename(f->v, ROOT, "name", ROOT, "moved", 0), 0);
    assert_int_equal(vol_rename(f->v, ROOT, "moved", ROOT, "name", 0), 0); /* goes to the first gap */
    assert_int_equal(find(f, ROOT, "name"), ino);
    assert_int_equal(vol_unlink(f->v, ROOT, "name"), 0);
    for (unsigned i = 0; i < PROBE_MAX; i += i == PROBE_MAX - 2 ? 1 : 2)
        put_blocker(f, ROOT, hash + i, target);
    assert_int_equal(vol_mknod(f->v, ROOT, "name", S_IFREG, 0, 0, 0, &a), -ENOSPC);
    assert_int_equal(find(f, ROOT, "name"), -ENOENT);
    assert_true(check(f) > 0);
    assert_non_null(strstr(f->text, "an item is not at its name's hash"));
    for (unsigned i = 0; i < PROBE_MAX; i++)
        del_item(f, ITEM_DIRENT, ROOT, hash + i);
}

/* --- listing --- */

struct listing {
    unsigned n, stop;
    uint64_t cookie;
    unsigned char seen[3000];
    bool want_attr;
};

static int on_entry(void *ctx, const char *name, uint64_t ino, uint32_t type, uint64_t cookie, const struct vattr *attr)
{
    struct listing *l = ctx;
    unsigned i;

    if (l->stop-- == 0)
        return 1;
    assert_true(cookie > l->cookie);
    l->cookie = cookie;
    l->n++;
    assert_int_equal(l->want_attr, attr != NULL);
    if (attr) {
        assert_int_equal(attr->ino, ino);
        assert_int_equal(attr->mode & S_IFMT, type);
    }
    if (sscanf(name, "entry-%u", &i) == 1)
        l->seen[i]++;
    else
        assert_true(name[0] == '.' && cookie == strlen(name));
    return 0;
}

static void test_readdir(void **state)
{
    struct fixture *f = *state;
    struct listing *l = calloc(1, sizeof(*l));
    uint64_t dir = mk(f, ROOT, "dir", S_IFDIR);
    unsigned had = 0;
    char name[32];

    for (unsigned i = 0; i < ARRAY_LEN(l->seen); i++) {
        snprintf(name, sizeof(name), "entry-%u", i);
        mk_free(f, dir, name, i % 7 ? S_IFREG : S_IFDIR);
    }
    for (l->want_attr = false;; l->want_attr = true) {
        memset(l->seen, 0, sizeof(l->seen));
        l->n = 0, l->cookie = 0;
        do {
            had = l->n;
            l->stop = 17;
            assert_int_equal(vol_readdir(f->v, dir, l->cookie, l->want_attr, on_entry, l), 0);
        } while (l->n > had);
        assert_int_equal(l->n, ARRAY_LEN(l->seen) + 2);
        for (unsigned i = 0; i < ARRAY_LEN(l->seen); i++)
            assert_int_equal(l->seen[i], 1);
        if (l->want_attr)
            break;
    }
    /* rm -r: entries go while they are listed; those that stay are listed once each. */
    memset(l, 0, sizeof(*l));
    do {
        had = l->n;
        l->stop = 10;
        assert_int_equal(vol_readdir(f->v, dir, l->cookie, false, on_entry, l), 0);
        for (unsigned i = 0; i < ARRAY_LEN(l->seen); i += 2) {
            snprintf(name, sizeof(name), "entry-%u", i);
            if (l->seen[i] == 1)
                assert_int_equal(i % 7 ? vol_unlink(f->v, dir, name) : vol_rmdir(f->v, dir, name), 0), l->seen[i]++;
        }
    } while (l->n > had);
    assert_int_equal(l->n, ARRAY_LEN(l->seen) + 2);
    for (unsigned i = 0; i < ARRAY_LEN(l->seen); i++)
        assert_int_equal(l->seen[i], i % 2 ? 1 : 2);
    assert_int_equal(vol_readdir(f->v, 4321, 0, false, on_entry, l), -ENOENT);
    assert_int_equal(vol_readdir(f->v, find(f, dir, "entry-1"), 0, false, on_entry, l), -ENOTDIR);
    free(l);
}

/* --- attributes --- */

static void test_setattr(void **state)
{
    struct fixture *f = *state;
    uint64_t file = mk(f, ROOT, "file", S_IFREG | 0644);
    struct vattr set =
                     {.mode = 06701, .uid = 70000, .gid = 80000, .atime = -5, .mtime = 123456789012345678, .ctime = 9},
                 a;
    struct vattr before = attr(f, file);

    assert_int_equal(vol_setattr(f->v, file, VOL_SET_MODE, &set, &a), 0);
    assert_int_equal(a.mode, S_IFREG | 06701);
    assert_true(a.ctime > before.ctime && a.mtime == before.mtime && a.uid == before.uid);
    assert_int_equal(vol_setattr(f->v, file, VOL_SET_UID | VOL_SET_GID | VOL_SET_ATIME | VOL_SET_MTIME, &set, &a), 0);
    assert_true(a.uid == 70000 && a.gid == 80000 && a.atime == -5 && a.mtime == set.mtime && a.ctime > before.ctime);
    assert_int_equal(vol_setattr(f->v, file, VOL_SET_CTIME, &set, &a), 0);
    assert_int_equal(a.ctime, 9);
    set.size = 100000;
    assert_int_equal(vol_setattr(f->v, file, VOL_SET_SIZE, &set, &a), 0);
    assert_true(a.size == 100000 && a.mtime != set.mtime && a.ctime == a.mtime);
    assert_int_equal(vol_setattr(f->v, file, VOL_SET_SIZE | VOL_SET_MTIME, &set, &a), 0);
    assert_int_equal(a.mtime, set.mtime);
    assert_int_equal(vol_setattr(f->v, ROOT, VOL_SET_SIZE, &set, &a), -EISDIR);
    assert_int_equal(vol_setattr(f->v, 888, VOL_SET_MODE, &set, &a), -ENOENT);
    before = attr(f, file);
    reopen(f);
    a = attr(f, file);
    same_attr(&a, &before);
}

static void test_xattr(void **state)
{
    struct fixture *f = *state;
    uint64_t file = mk(f, ROOT, "file", S_IFREG), dir = mk(f, ROOT, "dir", S_IFDIR);
    static uint8_t big[VOLUME_XATTR_MAX + 1], got[VOLUME_XATTR_MAX];
    char name[300] = "user.", list[9000];
    size_t want = 0;
    ssize_t n;

    randombytes_buf(big, sizeof(big));
    assert_int_equal(vol_getxattr(f->v, file, "user.a", NULL, 0), -ENODATA);
    assert_int_equal(vol_listxattr(f->v, file, NULL, 0), 0);
    assert_int_equal(vol_removexattr(f->v, file, "user.a"), -ENODATA);
    assert_int_equal(vol_setxattr(f->v, file, "user.a", "x", 1, XATTR_REPLACE), -ENODATA);
    assert_int_equal(vol_setxattr(f->v, file, "user.a", "one", 3, XATTR_CREATE), 0);
    assert_int_equal(vol_setxattr(f->v, file, "user.a", "x", 1, XATTR_CREATE), -EEXIST);
    assert_int_equal(vol_setxattr(f->v, file, "user.a", "two!", 4, XATTR_REPLACE), 0);
    assert_int_equal(vol_getxattr(f->v, file, "user.a", NULL, 0), 4);
    assert_int_equal(vol_getxattr(f->v, file, "user.a", got, 3), -ERANGE);
    assert_int_equal(vol_getxattr(f->v, file, "user.a", got, 4), 4);
    assert_memory_equal(got, "two!", 4);
    assert_int_equal(vol_setxattr(f->v, dir, "user.empty", NULL, 0, 0), 0);
    assert_int_equal(vol_getxattr(f->v, dir, "user.empty", got, 10), 0);
    assert_int_equal(vol_setxattr(f->v, file, "user.big", big, VOLUME_XATTR_MAX + 1, 0), -E2BIG);
    assert_int_equal(vol_setxattr(f->v, file, "user.big", big, 1, 16), -EINVAL);
    memset(name + 5, 'n', 251);
    name[256] = 0;
    assert_int_equal(vol_setxattr(f->v, file, name, big, 1, 0), -ERANGE);
    assert_int_equal(vol_setxattr(f->v, file, "", big, 1, 0), -ERANGE);
    assert_int_equal(vol_getxattr(f->v, file, name, got, 1), -ENODATA);
    name[255] = 0;
    assert_int_equal(vol_setxattr(f->v, file, name, big, VOLUME_XATTR_MAX, 0), 0);
    assert_int_equal(vol_setxattr(f->v, 555, name, big, 1, 0), -ENOENT);
    assert_int_equal(vol_getxattr(f->v, 555, name, got, 1), -ENOENT);
    assert_int_equal(vol_listxattr(f->v, 555, NULL, 0), -ENOENT);
    reopen(f);
    assert_int_equal(vol_getxattr(f->v, file, name, got, sizeof(got)), VOLUME_XATTR_MAX);
    assert_memory_equal(got, big, VOLUME_XATTR_MAX);
    assert_int_equal(vol_removexattr(f->v, file, name), 0);
    for (unsigned i = 0; i < 400; i++) {
        snprintf(name, sizeof(name), "user.number %u", i);
        assert_int_equal(vol_setxattr(f->v, file, name, big, i, 0), 0);
        want += strlen(name) + 1;
    }
    want += strlen("user.a") + 1;
    n = vol_listxattr(f->v, file, NULL, 0);
    assert_int_equal(n, want);
    assert_int_equal(vol_listxattr(f->v, file, list, want - 1), -ERANGE);
    assert_int_equal(vol_listxattr(f->v, file, list, sizeof(list)), want);
    for (char *p = list; p < list + n; p += strlen(p) + 1)
        assert_true(vol_getxattr(f->v, file, p, got, sizeof(got)) >= 0);
    check_clean(f);
    assert_int_equal(vol_unlink(f->v, ROOT, "file"), 0);
    assert_int_equal(vol_getattr(f->v, file, &(struct vattr){0}), -ENOENT); /* no reference since the reopening */
}

static void test_read_only(void **state)
{
    struct fixture *f = *state;
    struct vattr a;

    mk(f, ROOT, "file", S_IFREG);
    assert_int_equal(volume_close(f->v), 0);
    open_volume(f, true);
    assert_true(find(f, ROOT, "file") > 0);
    assert_int_equal(vol_mknod(f->v, ROOT, "x", S_IFREG, 0, 0, 0, &a), -EROFS);
    assert_int_equal(vol_unlink(f->v, ROOT, "file"), -EROFS);
    assert_int_equal(vol_rename(f->v, ROOT, "file", ROOT, "x", 0), -EROFS);
    assert_int_equal(vol_setxattr(f->v, ROOT, "user.x", "", 0, 0), -EROFS);
    assert_int_equal(vol_setattr(f->v, ROOT, VOL_SET_MODE, &a, &a), -EROFS);
    check_clean(f);
    volume_abandon(f->v);
    open_volume(f, false);
}

/* --- the check finds what is wrong --- */

static void put_item(struct fixture *f, enum item_kind kind, uint64_t a, uint64_t b, const void *value, size_t len)
{
    struct tree_key key = tree_key(kind, a, b);
    struct tx tx;

    assert_int_equal(tx_begin(f->v, &tx, TX_CHANGES), 0);
    assert_int_equal(tx_put(&tx, &key, value, len), 0);
    assert_int_equal(tx_commit(&tx), 0);
}

static void found(struct fixture *f, const char *what)
{
    check(f);
    if (!strstr(f->text, what))
        print_message("expected \"%s\" in %d findings:\n%s", what, f->findings, f->text);
    assert_true(f->findings > 0);
    assert_non_null(strstr(f->text, what));
}

/* Changes one inode by `field`, looks that the check says `what`, and puts it back. */
#define INODE_WRONG(f, number, field, value, what)                                                                     \
    do {                                                                                                               \
        struct disk_inode good_ = get_inode(f, number), bad_ = good_;                                                  \
        bad_.field = (value);                                                                                          \
        put_item(f, ITEM_INODE, number, 0, &bad_, sizeof(bad_));                                                       \
        found(f, what);                                                                                                \
        put_item(f, ITEM_INODE, number, 0, &good_, sizeof(good_));                                                     \
        assert_int_equal(check(f), 0);                                                                                 \
    } while (0)

static struct disk_inode get_inode(struct fixture *f, uint64_t ino)
{
    struct disk_inode d;
    struct inode i;

    pthread_rwlock_rdlock(&f->v->state);
    assert_int_equal(inode_get(f->v, ino, &i), 0);
    pthread_rwlock_unlock(&f->v->state);
    inode_encode(&i, &d);
    return d;
}

static void test_check_inodes(void **state)
{
    struct fixture *f = *state;
    uint64_t dir = mk(f, ROOT, "dir", S_IFDIR), file = mk(f, dir, "file", S_IFREG),
             small = mk(f, dir, "small", S_IFREG);
    static uint8_t buf[50000];
    struct vattr a;

    assert_int_equal(vol_write(f->v, file, 0, buf, sizeof(buf)), sizeof(buf));
    assert_int_equal(vol_write(f->v, small, 0, buf, 700), 700);
    assert_int_equal(vol_setxattr(f->v, file, "user.x", "y", 1, 0), 0);
    assert_int_equal(vol_symlink(f->v, ROOT, "link", "target", 0, 0, &a), 0);
    INODE_WRONG(f, file, nlink, le32_make(2), "links, have 2 expect 1");
    INODE_WRONG(f, dir, nlink, le32_make(3), "links, have 3 expect 2");
    INODE_WRONG(f, ROOT, nlink, le32_make(2), "links, have 2 expect 3");
    INODE_WRONG(f, dir, entries, le64_make(9), "entries, have 9 expect 2");
    INODE_WRONG(f, dir, parent, le64_make(file), "parent, have");
    INODE_WRONG(f, ROOT, parent, le64_make(dir), "parent, have");
    INODE_WRONG(f, file, blocks, le64_make(12), "blocks, have 12 expect 13");
    INODE_WRONG(f, file, xattrs, le32_make(0), "attributes, have 0 expect 1");
    INODE_WRONG(f, file, size, le64_make(100), "blocks behind its end");
    INODE_WRONG(f, file, flags, le32_make(INODE_INLINE), "not a file of blocks");
    INODE_WRONG(f, small, size, le64_make(10), "inline content of 700 bytes, size 10");
    INODE_WRONG(f, small, flags, le32_make(0), "neither inline nor a symlink");
    INODE_WRONG(f, a.ino, size, le64_make(1), "target's length, have 6 expect 1");
    INODE_WRONG(f, file, mode, le32_make(S_IFIFO | 0600), "type have 8 expect 1");
    put_item(f, ITEM_ORPHAN, file, 0, NULL, 0);
    found(f, "1 names and an orphan item");
    del_item(f, ITEM_ORPHAN, file, 0);
    assert_int_equal(check(f), 0);
}

static void test_check_items(void **state)
{
    struct fixture *f = *state;
    uint64_t file = mk(f, ROOT, "file", S_IFREG), hash = name_hash(f->v->keys, ROOT, "file", 4), extent = 0;
    struct disk_dirent d = {.ino = le64_make(777777), .type = 8, .namelen = 4};
    uint8_t item[14], value[EXTENT_ITEM_MAX];
    static uint8_t buf[50000], bitmap[REGION_UNITS / 8];
    struct disk_range r;
    struct extent e;
    struct tx tx;

    assert_int_equal(vol_write(f->v, file, 0, buf, sizeof(buf)), sizeof(buf));
    put_item(f, ITEM_ORPHAN, 54321, 0, NULL, 0);
    found(f, "orphan: belongs to the missing inode 54321");
    del_item(f, ITEM_ORPHAN, 54321, 0);

    memcpy(item, &d, sizeof(d));
    memcpy(item + sizeof(d), "gone", 4);
    put_item(f, ITEM_DIRENT, ROOT, name_hash(f->v->keys, ROOT, "gone", 4), item, sizeof(item));
    found(f, "names the missing inode 777777");
    assert_int_equal(find(f, ROOT, "gone"), -EIO); /* and so does a lookup */
    assert_int_equal(f->damage, 1);
    f->damage = 0;
    del_item(f, ITEM_DIRENT, ROOT, name_hash(f->v->keys, ROOT, "gone", 4));

    d.ino = le64_make(file);
    memcpy(item, &d, sizeof(d));
    memcpy(item + sizeof(d), "file", 4);
    del_item(f, ITEM_DIRENT, ROOT, hash);
    found(f, "0 names and no orphan item");
    put_item(f, ITEM_DIRENT, ROOT, hash, item, sizeof(item));
    put_item(f, ITEM_DIRENT, file, 5, item, sizeof(item));
    found(f, "is none"); /* an entry in a file */
    del_item(f, ITEM_DIRENT, file, 5);
    assert_int_equal(check(f), 0);

    assert_int_equal(tx_begin(f->v, &tx, TX_CHANGES), 0);
    assert_int_equal(tx_get(&tx, &(struct tree_key){.kind = ITEM_RANGE, .a = file}, &r, sizeof(r)), sizeof(r));
    extent = le64_get(r.extent);
    assert_int_equal(
        extent_decode(extent, value,
                      (size_t)tx_get(&tx, &(struct tree_key){.kind = ITEM_EXTENT, .a = extent}, value, sizeof(value)),
                      &e),
        0);
    tx_abort(&tx, 0);
    assert_int_equal(le16_get(r.count), 13);
    r.count = le16_make(12);
    put_item(f, ITEM_RANGE, file, 0, &r, sizeof(r));
    found(f, "references of chunk 12, have 1 more than ranges");
    r.count = le16_make(13);
    put_item(f, ITEM_RANGE, file, 0, &r, sizeof(r));
    r.count = le16_make(1);
    put_item(f, ITEM_RANGE, file, 12, &r, sizeof(r));
    found(f, "overlaps the range before");
    del_item(f, ITEM_RANGE, file, 12);
    r.extent = le64_make(extent + 500), r.count = le16_make(13);
    put_item(f, ITEM_RANGE, file, 0, &r, sizeof(r));
    found(f, "is missing or too short");
    r.extent = le64_make(extent);
    put_item(f, ITEM_RANGE, file, 0, &r, sizeof(r));
    assert_int_equal(check(f), 0);

    e.addr += 1;
    put_item(f, ITEM_EXTENT, extent, 0, value, extent_encode(&e, value));
    found(f, "in use but marked free");
    assert_non_null(strstr(f->text, "marked used but nothing uses them"));
    assert_non_null(strstr(f->text, "does not authenticate"));
    e.addr = 1ull << 40;
    put_item(f, ITEM_EXTENT, extent, 0, value, extent_encode(&e, value));
    found(f, "lies behind the volume's end");
    e.addr = 0; /* the superblock's */
    put_item(f, ITEM_EXTENT, extent, 0, value, extent_encode(&e, value));
    found(f, "is used twice");
    put_item(f, ITEM_SPACE, 77, 0, bitmap, sizeof(bitmap));
    found(f, "corrupt free space: region 77");
}

static void test_check_data(void **state)
{
    struct fixture *f = *state;
    uint64_t file = mk(f, ROOT, "file", S_IFREG);
    static uint8_t buf[4 * 65536], got[sizeof(buf)];
    struct store *data;
    struct iovec iov;
    struct disk_range r;
    struct extent e;
    uint8_t byte, value[EXTENT_ITEM_MAX];
    struct tx tx;
    ssize_t n;

    randombytes_buf(buf, sizeof(buf));
    assert_int_equal(vol_write(f->v, file, 0, buf, sizeof(buf)), sizeof(buf));
    assert_int_equal(vol_write(f->v, file, 4 * 4096, buf, 4096), 4096); /* leaves a dead chunk in an extent */
    check_clean(f);
    assert_int_equal(tx_begin(f->v, &tx, TX_CHANGES), 0);
    assert_int_equal(tx_get(&tx, &(struct tree_key){.kind = ITEM_RANGE, .a = file}, &r, sizeof(r)), sizeof(r));
    n = tx_get(&tx, &(struct tree_key){.kind = ITEM_EXTENT, .a = le64_get(r.extent)}, value, sizeof(value));
    assert_int_equal(extent_decode(le64_get(r.extent), value, (size_t)n, &e), 0);
    tx_abort(&tx, 0);
    assert_int_equal(e.ref[4], 0);

    data = file_store(f, "data");
    for (unsigned chunk = 2; chunk <= 4; chunk += 2) { /* a live one, and the dead one */
        uint64_t off = (e.addr + chunk) * UNIT_BYTES + 99;

        iov = (struct iovec){&byte, 1};
        assert_int_equal(data->ops->readv(data, &iov, 1, off), 0);
        byte ^= 1;
        iov = (struct iovec){&byte, 1};
        assert_int_equal(data->ops->writev(data, &iov, 1, off), 0);
        assert_int_equal(check(f), 1);
        f->text[0] = 0;
        assert_int_equal(volume_check(f->v, false, on_line, f), 0);
    }
    data->ops->close(data);
    found(f, "chunk 2 at unit");
    assert_int_equal(vol_read(f->v, file, 2 * 4096, got, 4096), -EIO);
    assert_int_equal(vol_read(f->v, file, 3 * 4096, got, sizeof(got)), sizeof(got) - 3 * 4096);
}

/* Space that nothing uses, as a lost FREE would leave it. */
static void test_check_space(void **state)
{
    struct fixture *f = *state;
    uint64_t addr;
    struct tx tx;

    assert_int_equal(space_alloc(f->v->space, 3, 3, 1, false, &addr), 3);
    assert_int_equal(tx_begin(f->v, &tx, TX_GROWS), 0);
    tx_alloc(&tx, addr, 3);
    assert_int_equal(tx_commit(&tx), 0);
    found(f, "3 units are marked used but nothing uses them");
    assert_non_null(strstr(f->text, "used units, have"));
    assert_int_equal(tx_begin(f->v, &tx, TX_GROWS), 0);
    tx_free(&tx, addr, 3);
    assert_int_equal(tx_commit(&tx), 0);
    check_clean(f);
}

/* The third leaf: it has inodes or names. */
static int pick_leaf(void *ctx, uint64_t addr, unsigned level, int err)
{
    uint64_t *leaf = ctx;

    assert_int_equal(err, 0);
    if (level == 0 && leaf[0]++ == 2)
        leaf[1] = addr;
    return 0;
}

/* A node that does not authenticate: found, and nothing is made up about what hangs on it. */
static void test_check_node(void **state)
{
    struct fixture *f = *state;
    struct volume_options options = {.cache_bytes = 1, .on_damage = on_damage, .ctx = f};
    uint64_t leaf[2] = {0};
    uint8_t byte;
    struct iovec iov;
    struct store *data;
    char name[64];

    for (unsigned i = 0; i < 2000; i++) {
        snprintf(name, sizeof(name), "file %u", i);
        mk_free(f, ROOT, name, S_IFREG);
    }
    check_clean(f);
    tree_visit(f->v->tree, pick_leaf, leaf);
    assert_true(leaf[1] > 0);
    volume_abandon(f->v);
    data = file_store(f, "data");
    iov = (struct iovec){&byte, 1};
    assert_int_equal(data->ops->readv(data, &iov, 1, leaf[1] * UNIT_BYTES + 5000), 0);
    byte ^= 1;
    iov = (struct iovec){&byte, 1};
    assert_int_equal(data->ops->writev(data, &iov, 1, leaf[1] * UNIT_BYTES + 5000), 0);
    data->ops->close(data);
    assert_int_equal(volume_open(file_store(f, "data"), file_store(f, "log"), f->key, volume_id, &options, &f->v), 0);
    assert_int_equal(check(f), 2);
    assert_true(f->damage > 0);
    snprintf(name, sizeof(name), "corrupt node: unit %llu, level 0", (unsigned long long)leaf[1]);
    assert_non_null(strstr(f->text, name));
    assert_non_null(strstr(f->text, "was not checked"));
}

/* --- many at once --- */

struct worker {
    struct fixture *f;
    uint64_t shared;
    unsigned seed;
};

static void *work(void *arg)
{
    struct worker *w = arg;
    struct volume *v = w->f->v;
    static const char content[30000] = "some content of it";

    for (unsigned i = 0; i < 3000; i++) {
        char a[16], b[16];
        struct vattr at;

        snprintf(a, sizeof(a), "n%u", rand_r(&w->seed) % 24);
        snprintf(b, sizeof(b), "n%u", rand_r(&w->seed) % 24);
        switch (rand_r(&w->seed) % 8) {
        case 0:
        case 1:
            if (vol_mknod(v, w->shared, a, rand_r(&w->seed) % 3 ? S_IFREG : S_IFDIR, 0, 0, 0, &at) == 0) {
                vol_write(v, at.ino, 0, content, rand_r(&w->seed) % sizeof(content));
                vol_forget(v, at.ino, 1);
            }
            break;
        case 2:
            vol_rename(v, w->shared, a, w->shared, b, rand_r(&w->seed) % 3 ? 0 : RENAME_EXCHANGE);
            break;
        case 3:
            if (vol_lookup(v, w->shared, a, &at) == 0) {
                struct vattr linked;

                if (vol_link(v, at.ino, w->shared, b, &linked) == 0)
                    vol_forget(v, at.ino, 1);
                vol_forget(v, at.ino, 1);
            }
            break;
        case 4:
            if (vol_lookup(v, w->shared, a, &at) == 0) {
                if (S_ISDIR(at.mode))
                    vol_rename(v, w->shared, b, at.ino, b, 0);
                vol_setxattr(v, at.ino, "user.n", b, strlen(b), 0);
                vol_forget(v, at.ino, 1);
            }
            break;
        case 5:
            if (vol_tmpfile(v, w->shared, 0600, 0, 0, &at) == 0) {
                uint64_t ino = at.ino;

                if (vol_link(v, ino, w->shared, a, &at) == 0)
                    vol_forget(v, ino, 1);
                vol_forget(v, ino, 1);
            }
            break;
        case 6:
            vol_rmdir(v, w->shared, a);
            break;
        default:
            vol_unlink(v, w->shared, a);
        }
    }
    return NULL;
}

struct checker {
    struct fixture *f;
    _Atomic bool stop;
    unsigned runs, findings;
};

static void on_checker_line(void *ctx, const char *text)
{
    (void)ctx;
    if (strncmp(text, "note:", 5) != 0)
        print_message("while in use: %s\n", text);
}

/* The check is safe on a volume in use, and finds nothing there that is not so. */
static void *check_all_the_time(void *arg)
{
    struct checker *c = arg;

    while (!c->stop) {
        c->findings += volume_check(c->f->v, true, on_checker_line, NULL) != 0;
        c->runs++;
    }
    return NULL;
}

static void test_threads(void **state)
{
    struct fixture *f = *state;
    struct checker c = {.f = f};
    struct worker w[4];
    pthread_t t[ARRAY_LEN(w)], checking;
    uint64_t shared;

    assert_int_equal(volume_close(f->v), 0);
    f->background = true;
    open_volume(f, false);
    shared = mk(f, ROOT, "shared", S_IFDIR);
    assert_int_equal(pthread_create(&checking, NULL, check_all_the_time, &c), 0);
    for (unsigned i = 0; i < ARRAY_LEN(w); i++) {
        w[i] = (struct worker){.f = f, .shared = shared, .seed = i + 1};
        assert_int_equal(pthread_create(&t[i], NULL, work, &w[i]), 0);
    }
    for (unsigned i = 0; i < ARRAY_LEN(w); i++)
        pthread_join(t[i], NULL);
    c.stop = true;
    pthread_join(checking, NULL);
    assert_true(c.runs > 0);
    assert_int_equal(c.findings, 0);
    check_clean(f);
}

#define TEST(name)         cmocka_unit_test_setup_teardown(name, setup, teardown)
#define TEST_DAMAGED(name) cmocka_unit_test_setup_teardown(name, setup, teardown_damaged)

int main(void)
{
    static const struct CMUnitTest tests[] = {
        TEST(test_make),
        TEST(test_remove),
        TEST(test_removed_dir),
        TEST(test_unlinked_open),
        TEST(test_setgid),
        TEST(test_symlink),
        TEST(test_link),
        TEST(test_link_max),
        TEST(test_tmpfile),
        TEST(test_rename_file),
        TEST(test_rename_whiteout),
        TEST(test_rename_dir),
        TEST(test_collisions),
        TEST(test_readdir),
        TEST(test_setattr),
        TEST(test_xattr),
        TEST(test_read_only),
        TEST(test_check_inodes),
        TEST_DAMAGED(test_check_items),
        TEST_DAMAGED(test_check_data),
        TEST(test_check_space),
        TEST_DAMAGED(test_check_node),
        TEST(test_threads),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
