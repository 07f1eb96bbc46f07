/* test_audit.c - the chain verifies, what is changed shows, a torn tail is recovered, refusals are limited, a full
 * disk and a failing flush refuse. */
#include "fs/base/base.h"
#include "keystore/audit.h"

#include <fcntl.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmocka.h>

static char dir_path[64];
static int dir;
static int64_t fake_now;

static int64_t fake_mono(void)
{
    return fake_now;
}

static int setup(void **state)
{
    (void)state;
    strcpy(dir_path, "/tmp/coffer-audit-XXXXXX");
    if (!mkdtemp(dir_path))
        return -1;
    dir = open(dir_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return dir < 0 ? -1 : 0;
}

static int teardown(void **state)
{
    char *cmd = xasprintf("rm -r %s", dir_path);
    int rc = system(cmd);

    (void)state;
    free(cmd);
    close(dir);
    return rc;
}

__attribute__((noinline)) static char *read_log(size_t *n)
{
    char *buf;

    assert_int_equal(file_read_all(dir, AUDIT_FILE, 1 << 20, &buf, n), 0);
    return buf;
}

static void write_log(const char *buf, size_t n)
{
    assert_int_equal(file_replace(dir, AUDIT_FILE, buf, n, 0640), 0);
}

static void append_log(const char *buf, size_t n)
{
    int fd = openat(dir, AUDIT_FILE, O_WRONLY | O_APPEND | O_CLOEXEC);

    assert_int_equal(write_full(fd, buf, n), 0);
    close(fd);
}

static void write_some(int n)
{
    struct audit *a;

    assert_int_equal(audit_open(dir, &a), 0);
    for (int i = 0; i < n; i++)
        assert_int_equal(audit_append(a, "release", "db", "", "text \"\\\n\x7f \xff \xc3\xa4"), 0);
    audit_close(a);
}

static unsigned count(const char *s, const char *what)
{
    unsigned n = 0;

    for (; (s = strstr(s, what)); s++)
        n++;
    return n;
}

static void test_chain(void **state)
{
    char why[256], big[4000];
    struct audit_field bad[] = {{"seq", "x", 0}}, twice[] = {{"a", "x", 0}, {"a", NULL, 1}};
    struct audit_field fields[AUDIT_FIELDS_MAX];
    char keys[AUDIT_FIELDS_MAX][2] = {{0}};
    struct audit *a;
    struct stat st;

    (void)state;
    assert_int_equal(audit_verify(dir, why, sizeof(why)), -ENOENT);
    write_some(3);
    write_some(2);
    assert_int_equal(audit_open(dir, &a), 0);
    assert_int_equal(audit_write(a, "x", bad, 1), -EINVAL);
    assert_int_equal(audit_write(a, "x", twice, 2), -EINVAL);
    memset(big, 1, sizeof(big));
    big[sizeof(big) - 1] = 0;
    for (int i = 0; i < AUDIT_FIELDS_MAX; i++) {
        keys[i][0] = (char)('a' + i);
        fields[i] = (struct audit_field){keys[i], big, 0};
    }
    assert_int_equal(audit_write(a, "big", fields, AUDIT_FIELDS_MAX), 0);
    audit_close(a);
    write_some(1);
    assert_int_equal(audit_verify(dir, why, sizeof(why)), 0);
    assert_int_equal(strncmp(why, "7 records", 9), 0);
    assert_null(strstr(why, "torn"));
    assert_int_equal(fstatat(dir, AUDIT_FILE, &st, 0), 0);
    assert_int_equal(st.st_mode & 07777, 0640);
    assert_int_equal(fstatat(dir, AUDIT_RESERVE_FILE, &st, 0), 0);
    assert_true(st.st_size == AUDIT_RESERVE_BYTES);
}

static void test_changed(void **state)
{
    char why[256], *log, *second, *third;
    size_t n;

    (void)state;
    write_some(4);
    log = read_log(&n);
    second = strchr(log, '\n') + 1;
    third = strchr(second, '\n') + 1;
    /* edited */
    *(strstr(second, "\"db\"") + 1) = 'x';
    write_log(log, n);
    assert_int_equal(audit_verify(dir, why, sizeof(why)), -EBADMSG);
    assert_int_equal(strncmp(why, "line 3 ", 7), 0);
    *(strstr(second, "\"xb\"") + 1) = 'd';
    /* another form of the same */
    *strstr(second, "\"seq\":2") = ' ';
    write_log(log, n);
    assert_int_equal(audit_verify(dir, why, sizeof(why)), -EBADMSG);
    assert_int_equal(strncmp(why, "line 2 ", 7), 0);
    *(strstr(second, " seq\":2")) = '"';
    write_log(log, n);
    assert_int_equal(audit_verify(dir, why, sizeof(why)), 0);
    /* the first line is taken out */
    write_log(second, n - (size_t)(second - log));
    assert_int_equal(audit_verify(dir, why, sizeof(why)), -EBADMSG);
    assert_int_equal(strncmp(why, "line 1 ", 7), 0);
    /* the second line is taken out */
    memmove(second, third, n - (size_t)(third - log));
    write_log(log, n - (size_t)(third - second));
    assert_int_equal(audit_verify(dir, why, sizeof(why)), -EBADMSG);
    assert_int_equal(strncmp(why, "line 2 ", 7), 0);
    free(log);
}

/* Opens the log with that at its end. */
static void tear(const char *tail, size_t n, const char *file, unsigned recovered)
{
    char why[256], *log, *kept;
    size_t len;

    append_log(tail, n);
    assert_int_equal(audit_verify(dir, why, sizeof(why)), 0);
    assert_non_null(strstr(why, "torn"));
    write_some(1);
    assert_int_equal(audit_verify(dir, why, sizeof(why)), 0);
    assert_null(strstr(why, "torn"));
    log = read_log(&len);
    assert_int_equal(count(log, "\"event\":\"recovered\""), recovered);
    free(log);
    assert_int_equal(file_read_all(dir, file, 1 << 20, &kept, &len), 0);
    assert_int_equal(len, n);
    assert_memory_equal(kept, tail, n);
    free(kept);
}

static void test_torn(void **state)
{
    char *log;
    size_t n;
    int fd;

    (void)state;
    write_some(2);
    tear("{\"event\":\"rel", 13, "audit.torn-3", 1);
    tear("\0\0\0\0tail\"}\n", 11, "audit.torn-5", 2);
    tear("\0\0", 2, "audit.torn-7", 3);
    /* cut off, but the crash came before the record */
    fd = openat(dir, "audit.torn-9", O_WRONLY | O_CREAT | O_CLOEXEC, 0640);
    close(fd);
    write_some(1);
    log = read_log(&n);
    assert_int_equal(count(log, "\"event\":\"recovered\""), 4);
    free(log);
}

static void test_torn_alone(void **state)
{
    struct audit *a;

    (void)state;
    write_some(0);
    tear("{\"ev", 4, "audit.torn-1", 1);
    append_log("no record\n", 10);
    assert_int_equal(audit_open(dir, &a), -EBADMSG);
}

/* A terminal obeys DEL and C1 as it does the others: they stand in no line. */
static void test_controls(void **state)
{
    char all[256 + 64], why[256], *log;
    struct audit *a;
    size_t n = 0;

    (void)state;
    for (int c = 1; c < 0x80; c++)
        all[n++] = (char)c;
    for (int c = 0x80; c <= 0xa0; c++)
        all[n++] = (char)0xc2, all[n++] = (char)c;
    all[n] = 0;
    assert_int_equal(audit_open(dir, &a), 0);
    assert_int_equal(audit_append(a, "x", "", "", all), 0);
    audit_close(a);
    assert_int_equal(audit_verify(dir, why, sizeof(why)), 0);
    log = read_log(&n);
    for (size_t i = 0; i + 1 < n; i++) { /* but for the newline at the end */
        uint8_t c = (uint8_t)log[i], next = (uint8_t)log[i + 1];

        assert_true(c >= 0x20 && c != 0x7f && !(c == 0xc2 && next < 0xa0));
    }
    assert_int_equal(count(log, "\\\\u007f\\\\u0080\\\\u0081"), 1);
    assert_int_equal(count(log, "\\\\u009f\xc2\xa0"), 1);
    free(log);
}

static void test_limit(void **state)
{
    struct audit_field f[] = {{"text", "no", 0}};
    char why[256], *log;
    struct audit *a;
    size_t n;

    (void)state;
    fake_now = 1;
    assert_int_equal(audit_open(dir, &a), 0);
    audit_set_clock(a, fake_mono);
    for (int i = 0; i < AUDIT_LIMIT_LINES + 7; i++)
        assert_int_equal(audit_write_limited(a, "refuse", "db/1", f, 1), 0);
    assert_int_equal(audit_write_limited(a, "refuse", "db/2", f, 1), 0);
    fake_now += AUDIT_LIMIT_NS - 1;
    assert_int_equal(audit_append(a, "x", "", "", ""), 0);
    log = read_log(&n);
    assert_int_equal(count(log, "\"event\":\"refuse\""), AUDIT_LIMIT_LINES + 1);
    assert_int_equal(count(log, "suppressed"), 0);
    free(log);
    fake_now++;
    assert_int_equal(audit_append(a, "x", "", "", ""), 0);
    log = read_log(&n);
    assert_int_equal(count(log, "\"count\":7,\"event\":\"suppressed\",\"key\":\"db/1\",\"of\":\"refuse\""), 1);
    free(log);
    for (int i = 0; i < AUDIT_LIMIT_LINES + 2; i++)
        assert_int_equal(audit_write_limited(a, "refuse", "db/1", f, 1), 0);
    audit_close(a);
    log = read_log(&n);
    assert_int_equal(count(log, "\"count\":2,\"event\":\"suppressed\""), 1);
    free(log);
    assert_int_equal(audit_verify(dir, why, sizeof(why)), 0);
}

/* --- every place of the file --- */

/* Any one bit, any one line gone, two lines swapped: it shows, and never as a crash. */
static void test_every_edit(void **state)
{
    char why[256], *log, *second, *third, *swapped;
    size_t n, one, two;
    int fd;

    (void)state;
    write_some(3);
    log = read_log(&n);
    fd = openat(dir, AUDIT_FILE, O_WRONLY | O_CLOEXEC);
    for (size_t i = 0; i < n - 1; i++) { /* the last newline: a torn tail (below) */
        char changed = (char)(log[i] ^ 1 << i % 8);
        int rc;

        assert_int_equal(pwrite_full(fd, &changed, 1, i), 0);
        rc = audit_verify(dir, why, sizeof(why));
        assert_int_equal(pwrite_full(fd, log + i, 1, i), 0);
        /* The last line's values can be changed by who may write the file: nothing follows that has its hash. */
        if (rc != -EBADMSG && memchr(log + i, '\n', n - 1 - i))
            fail_msg("byte %zu of %zu is changed and verifies: %s", i, n, why);
    }
    close(fd);
    write_log(log, n - 1);
    assert_int_equal(audit_verify(dir, why, sizeof(why)), 0);
    assert_non_null(strstr(why, "2 records"));
    assert_non_null(strstr(why, "torn"));
    second = strchr(log, '\n') + 1;
    third = strchr(second, '\n') + 1;
    one = (size_t)(second - log), two = (size_t)(third - second);
    swapped = xasprintf("%.*s%.*s%s", (int)two, second, (int)one, log, third);
    write_log(swapped, n);
    assert_int_equal(audit_verify(dir, why, sizeof(why)), -EBADMSG);
    /* a record twice */
    free(swapped);
    swapped = xasprintf("%.*s%s", (int)(one + two), log, second);
    write_log(swapped, strlen(swapped));
    assert_int_equal(audit_verify(dir, why, sizeof(why)), -EBADMSG);
    assert_int_equal(strncmp(why, "line 3 ", 7), 0);
    free(swapped);
    free(log);
}

/* --- a full disk, in a filesystem of its own --- */

/* Fills what is left, so that not a page is free. */
static void fill_disk(void)
{
    static const char page[4096];
    int fd = openat(dir, "filler", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600), rc;

    assert_true(fd >= 0);
    while ((rc = write_full(fd, page, sizeof(page))) == 0)
        ;
    assert_int_equal(rc, -ENOSPC);
    close(fd);
}

static int setup_disk(void **state)
{
    if (setup(state) < 0)
        return -1;
    close(dir);
    if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
        mount("coffer-test", dir_path, "tmpfs", 0, "size=6m") < 0) {
        print_error("this test mounts a small filesystem: run it as root\n");
        return -1;
    }
    dir = open(dir_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return dir < 0 ? -1 : 0;
}

static int teardown_disk(void **state)
{
    close(dir);
    dir = -1;
    if (umount(dir_path) < 0)
        return -1;
    return teardown(state);
}

/* Writes big records until one fails; how many did not. */
static unsigned write_until_full(struct audit *a, int *ret_rc)
{
    static char big[AUDIT_TEXT_BYTES];
    struct audit_field f[] = {{"text", big, 0}, {"who", big, 0}};
    unsigned done = 0;

    memset(big, 'x', sizeof(big) - 1);
    while ((*ret_rc = audit_write(a, "big", f, ARRAY_LEN(f))) == 0)
        done++;
    return done;
}

static void test_full_disk(void **state)
{
    char why[256], *log;
    struct audit *a;
    struct stat st;
    unsigned done;
    size_t n;
    int rc;

    (void)state;
    assert_int_equal(audit_open(dir, &a), 0);
    assert_int_equal(audit_append(a, "before", "db", "", ""), 0);
    fill_disk();
    assert_int_equal(fstatat(dir, AUDIT_RESERVE_FILE, &st, 0), 0);
    /* What is left of the log's last page, then the reserve. Whoever fills the disk does not get at that, either. */
    for (int i = 0; i < 8; i++)
        assert_int_equal(audit_append(a, "during", "db", "", "a text that is long enough to need a page soon"), 0);
    done = 8;
    while (fstatat(dir, AUDIT_RESERVE_FILE, &st, 0) == 0) {
        assert_int_equal(audit_append(a, "during", "db", "", "a text that is long enough to need a page soon"), 0);
        done++;
    }
    assert_true(done < 100);
    fill_disk();
    done = write_until_full(a, &rc);
    assert_int_equal(rc, -ENOSPC);
    assert_true(done > (AUDIT_RESERVE_BYTES - (512u << 10)) / (2 * AUDIT_TEXT_BYTES + 300));
    /* it stays so, and what failed is not there */
    done = 0;
    while (done++ < 5)
        assert_int_equal(write_until_full(a, &rc), 0);
    assert_int_equal(rc, -ENOSPC);
    assert_int_equal(audit_verify(dir, why, sizeof(why)), 0);
    assert_null(strstr(why, "torn"));
    /* room again: it goes on where it was */
    assert_int_equal(unlinkat(dir, "filler", 0), 0);
    assert_int_equal(audit_append(a, "after", "db", "", ""), 0);
    /* ... and there is a reserve again as soon as it finds room, a minute after the last try */
    fake_now = mono_ns() + 120000000000ll;
    audit_set_clock(a, fake_mono);
    assert_int_equal(audit_append(a, "x", "", "", ""), 0);
    assert_int_equal(fstatat(dir, AUDIT_RESERVE_FILE, &st, 0), -1);
    assert_int_equal(mount(NULL, dir_path, NULL, MS_REMOUNT, "size=16m"), 0);
    assert_int_equal(audit_append(a, "x", "", "", ""), 0);
    assert_int_equal(fstatat(dir, AUDIT_RESERVE_FILE, &st, 0), -1);
    fake_now += 61000000000ll;
    assert_int_equal(audit_append(a, "x", "", "", ""), 0);
    assert_int_equal(fstatat(dir, AUDIT_RESERVE_FILE, &st, 0), 0);
    assert_int_equal(st.st_size, AUDIT_RESERVE_BYTES);
    audit_close(a);
    assert_int_equal(audit_verify(dir, why, sizeof(why)), 0);
    assert_null(strstr(why, "torn"));
    assert_int_equal(file_read_all(dir, AUDIT_FILE, 8 << 20, &log, &n), 0);
    assert_int_equal(count(log, "\"event\":\"before\""), 1);
    assert_int_equal(count(log, "\"event\":\"after\""), 1);
    free(log);
}

/* Opening finds no room for a reserve: the log is there, and refuses when it must. */
static void test_full_from_the_start(void **state)
{
    char why[256];
    struct audit *a;
    struct stat st;
    int rc;

    (void)state;
    fill_disk();
    assert_int_equal(audit_open(dir, &a), 0);
    assert_int_equal(fstatat(dir, AUDIT_RESERVE_FILE, &st, 0), -1);
    assert_int_equal(write_until_full(a, &rc), 0);
    assert_int_equal(rc, -ENOSPC);
    audit_close(a);
    assert_int_equal(unlinkat(dir, "filler", 0), 0);
    assert_int_equal(audit_open(dir, &a), 0);
    assert_int_equal(fstatat(dir, AUDIT_RESERVE_FILE, &st, 0), 0);
    assert_int_equal(audit_append(a, "x", "", "", ""), 0);
    audit_close(a);
    assert_int_equal(audit_verify(dir, why, sizeof(why)), 0);
}

/* --- a failing flush --- */

static int flush_error;
static unsigned flushes;

/* In the place of libc's: the log's own flushes fail when flush_error says so. */
int fdatasync(int fd)
{
    flushes++;
    if (flush_error) {
        errno = flush_error;
        return -1;
    }
    return (int)syscall(SYS_fdatasync, fd);
}

static void test_failed_flush(void **state)
{
    struct audit_field f[] = {{"text", "no", 0}};
    char why[256];
    struct audit *a;
    unsigned before;

    (void)state;
    assert_int_equal(audit_open(dir, &a), 0);
    before = flushes;
    assert_int_equal(audit_append(a, "one", "", "", ""), 0);
    assert_true(flushes > before);
    flush_error = EIO;
    assert_int_equal(audit_append(a, "two", "", "", ""), -EIO);
    /* The kernel would call the pages clean now: a flush that succeeds says nothing any more. */
    flush_error = 0;
    before = flushes;
    assert_int_equal(audit_append(a, "three", "", "", ""), -EIO);
    assert_int_equal(audit_write(a, "three", f, 1), -EIO);
    assert_int_equal(audit_write_limited(a, "three", "key", f, 1), -EIO);
    assert_int_equal(flushes, before);
    audit_close(a);
    assert_int_equal(audit_open(dir, &a), 0);
    flush_error = ENOSPC; /* of a thin device: nobody knows what was kept, so it is no full disk */
    assert_int_equal(audit_append(a, "four", "", "", ""), -EIO);
    assert_int_equal(audit_append(a, "four", "", "", ""), -EIO);
    flush_error = 0;
    audit_close(a);
    write_some(1);
    assert_int_equal(audit_verify(dir, why, sizeof(why)), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_chain, setup, teardown),
        cmocka_unit_test_setup_teardown(test_changed, setup, teardown),
        cmocka_unit_test_setup_teardown(test_torn, setup, teardown),
        cmocka_unit_test_setup_teardown(test_torn_alone, setup, teardown),
        cmocka_unit_test_setup_teardown(test_controls, setup, teardown),
        cmocka_unit_test_setup_teardown(test_limit, setup, teardown),
        cmocka_unit_test_setup_teardown(test_every_edit, setup, teardown),
        cmocka_unit_test_setup_teardown(test_full_disk, setup_disk, teardown_disk),
        cmocka_unit_test_setup_teardown(test_full_from_the_start, setup_disk, teardown_disk),
        cmocka_unit_test_setup_teardown(test_failed_flush, setup, teardown),
    };

    return cmocka_run_group_tests_name("audit", tests, NULL, NULL);
}
