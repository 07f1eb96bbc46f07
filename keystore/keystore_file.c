/*
 * keystore_file.c - the keystore's file as a thing in a directory: read, made, replaced, its old blocks overwritten.
 * Called by keystore.c alone; what is in the bytes is not known here.
 *
 * 1. At every instant KEYSTORE_FILE is a whole keystore, the old or the new one.
 * 2. A replaced keystore holds wrapped keys that were since deleted. So the two files change places (RENAME_EXCHANGE):
 * the old one is then the temporary file, and if we die before it is overwritten, the next opening overwrites it.
 * 3. Nothing is overwritten before the directory, as it is now, is durable: else a power cut could bring back the name
 * of a file that is gone.
 */
#include "keystore/keystore_format.h"

#include <fcntl.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define TMP_FILE "." KEYSTORE_FILE ".new"

static int sync_dir(int dirfd)
{
    return fsync(dirfd) < 0 ? -errno : 0;
}

/* Overwrites a file that has no name, or only TMP_FILE. Best effort: a filesystem or a disk may write elsewhere. */
static void erase(int fd)
{
    uint8_t noise[16384];
    struct stat st;

    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || st.st_nlink > 1)
        return;
    randombytes_buf(noise, sizeof(noise));
    for (uint64_t off = 0; off < (uint64_t)st.st_size; off += sizeof(noise)) {
        size_t n = MIN(sizeof(noise), (uint64_t)st.st_size - off);

        if (pwrite_full(fd, noise, n, off) < 0)
            break;
    }
    (void)!fdatasync(fd);
}

void keyfile_clean(int dirfd)
{
    int fd = openat(dirfd, TMP_FILE, O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);

    if (fd < 0 && errno == ENOENT)
        return;
    if (fd >= 0 && sync_dir(dirfd) == 0)
        erase(fd);
    close_quiet(fd);
    unlinkat(dirfd, TMP_FILE, 0);
}

int keyfile_read(int dirfd, size_t max, uint8_t **ret, size_t *ret_n, uint64_t *ret_size)
{
    uint8_t *buf = NULL;
    struct stat st;
    size_t n;
    int rc = 0, fd = openat(dirfd, KEYSTORE_FILE, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);

    if (fd < 0)
        return errno == ELOOP ? -EBADMSG : -errno;
    if (fstat(fd, &st) < 0)
        rc = -errno;
    else if (!S_ISREG(st.st_mode))
        rc = -EBADMSG;
    else if (st.st_size > KEYSTORE_FILE_MAX)
        rc = -EFBIG;
    if (rc < 0)
        goto out;
    n = MIN(max, (size_t)st.st_size);
    buf = xmalloc(n);
    rc = pread_full(fd, buf, n, 0);
    if (rc < 0)
        goto out;
    *ret = buf;
    *ret_n = n;
    *ret_size = (uint64_t)st.st_size;
    buf = NULL;
out:
    free(buf);
    close_quiet(fd);
    return rc;
}

/* The temporary file, whole and flushed. */
int keyfile_stage(int dirfd, const uint8_t *buf, size_t n)
{
    int rc, fd;

    keyfile_clean(dirfd);
    fd = openat(dirfd, TMP_FILE, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return -errno;
    rc = write_full(fd, buf, n);
    if (rc == 0 && fsync(fd) < 0)
        rc = -errno;
    if (close(fd) < 0 && rc == 0)
        rc = -errno;
    if (rc < 0)
        unlinkat(dirfd, TMP_FILE, 0);
    return rc;
}

static int rename_noreplace(int dirfd)
{
    if (renameat2(dirfd, TMP_FILE, dirfd, KEYSTORE_FILE, RENAME_NOREPLACE) == 0)
        return 0;
    if (errno != EINVAL && errno != ENOSYS)
        return -errno;
    /* A filesystem that knows no flags. */
    if (linkat(dirfd, TMP_FILE, dirfd, KEYSTORE_FILE, 0) < 0)
        return -errno;
    unlinkat(dirfd, TMP_FILE, 0);
    return 0;
}

int keyfile_create(int dirfd)
{
    int rc = rename_noreplace(dirfd);

    if (rc < 0) {
        unlinkat(dirfd, TMP_FILE, 0);
        return rc;
    }
    rc = sync_dir(dirfd);
    if (rc < 0)
        unlinkat(dirfd, KEYSTORE_FILE, 0);
    return rc;
}

int keyfile_replace(int dirfd, const uint8_t *buf, size_t n, bool *ret_doubt)
{
    bool exchanged = false;
    int old = -1, rc = keyfile_stage(dirfd, buf, n);

    if (rc < 0)
        return rc;
    old = openat(dirfd, KEYSTORE_FILE, O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    exchanged = renameat2(dirfd, TMP_FILE, dirfd, KEYSTORE_FILE, RENAME_EXCHANGE) == 0;
    /* A filesystem that cannot exchange, or somebody took the old file away. */
    if (!exchanged && renameat(dirfd, TMP_FILE, dirfd, KEYSTORE_FILE) < 0) {
        rc = -errno;
        unlinkat(dirfd, TMP_FILE, 0);
        goto out;
    }
    rc = sync_dir(dirfd);
    if (rc < 0) {
        /* Whoever reads the directory now sees what memory holds; what a power cut would leave is not known. */
        if (exchanged)
            (void)!renameat2(dirfd, TMP_FILE, dirfd, KEYSTORE_FILE, RENAME_EXCHANGE);
        *ret_doubt = true;
        goto out;
    }
    if (old >= 0)
        erase(old);
    if (exchanged)
        unlinkat(dirfd, TMP_FILE, 0);
out:
    close_quiet(old);
    return rc;
}
