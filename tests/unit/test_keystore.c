/*
 * test_keystore.c - the sealed keystore: round trips, wrong secrets, every byte of the file changed, limits, and
 * failures and deaths at every step of a write. The second half reads and forges keystores with code of its own,
 * written from KEYSTORE.md and not from keystore.c.
 */
#include "keystore/keystore_format.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <sodium.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define TMP     ".keystore.new"
#define PASS    "correct horse"
#define KEYFILE "0123456789abcdef\0\1\2\3 and more"

/* --- faults: these take the place of libc's; every call is a step --- */

static enum { NO_FAULT, FAIL, DIE_BEFORE, DIE_AFTER } fault;
static int fault_at, step;

static bool faulty(void)
{
    bool now = fault != NO_FAULT && step++ == fault_at;

    if (now && fault == DIE_BEFORE)
        _exit(77);
    errno = EIO;
    return now && fault == FAIL;
}

static int stepped(long rc)
{
    if (fault == DIE_AFTER && step == fault_at + 1)
        _exit(77);
    return (int)rc;
}

int fsync(int fd)
{
    return faulty() ? -1 : stepped(syscall(SYS_fsync, fd));
}

int fdatasync(int fd)
{
    return faulty() ? -1 : stepped(syscall(SYS_fdatasync, fd));
}

int renameat2(int a, const char *from, int b, const char *to, unsigned flags)
{
    return faulty() ? -1 : stepped(syscall(SYS_renameat2, a, from, b, to, flags));
}

int unlinkat(int fd, const char *name, int flags)
{
    return faulty() ? -1 : stepped(syscall(SYS_unlinkat, fd, name, flags));
}

static void fault_set(int kind, int at)
{
    step = 0;
    fault_at = at;
    fault = kind;
}

/* --- a directory for each test --- */

static char path[64];
static int dir = -1;

static int setup(void **state)
{
    (void)state;
    strcpy(path, access("/dev/shm", W_OK) ? "/tmp/coffer-ks-XXXXXX" : "/dev/shm/coffer-ks-XXXXXX");
    if (!mkdtemp(path))
        return -1;
    dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    keystore_set_argon_cost_for_new_slots(1, 8192);
    return dir < 0 ? -1 : 0;
}

static int teardown(void **state)
{
    (void)state;
    fault_set(NO_FAULT, 0);
    unlinkat(dir, KEYSTORE_FILE, 0);
    unlinkat(dir, TMP, 0);
    close(dir);
    return rmdir(path);
}

static bool there(const char *name)
{
    return faccessat(dir, name, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
}

static uint8_t *slurp(size_t *n)
{
    char *buf;

    assert_int_equal(file_read_all(dir, KEYSTORE_FILE, KEYSTORE_FILE_MAX, &buf, n), 0);
    return (uint8_t *)buf;
}

static void spit(const uint8_t *buf, size_t n)
{
    assert_int_equal(file_replace(dir, KEYSTORE_FILE, buf, n, 0600), 0);
}

static struct keystore *must_open(void)
{
    struct keystore *k = NULL;

    assert_int_equal(keystore_open(dir, &k), 0);
    return k;
}

static int unlock(struct keystore *k, uint32_t kind, const char *secret)
{
    size_t n = kind == AGENT_SLOT_KEY_FILE ? sizeof(KEYFILE) - 1 : strlen(secret);

    return keystore_unlock(k, kind, (const uint8_t *)secret, n);
}

/* A new keystore, unlocked. */
static struct keystore *made(uint32_t kind, char *recovery)
{
    struct keystore *k = must_open();
    char text[KEYSTORE_RECOVERY_MAX];
    const char *secret = kind == AGENT_SLOT_KEY_FILE ? KEYFILE : PASS;

    assert_int_equal(keystore_init(k, kind, (const uint8_t *)secret,
                                   kind == AGENT_SLOT_KEY_FILE ? sizeof(KEYFILE) - 1 : strlen(PASS),
                                   recovery ? recovery : text, KEYSTORE_RECOVERY_MAX, NULL, NULL),
                     0);
    return k;
}

/* Opens and unlocks what is in the directory: the first error. */
static int try_file(uint32_t kind, const char *secret)
{
    struct keystore *k = NULL;
    int rc = keystore_open(dir, &k);

    if (rc < 0) {
        assert_null(k);
        return rc;
    }
    rc = unlock(k, kind, secret);
    assert_int_equal(keystore_unlocked(k), rc == 0);
    keystore_close(k);
    return rc;
}

static struct keystore *reopened(struct keystore *k)
{
    keystore_close(k);
    k = must_open();
    assert_int_equal(unlock(k, AGENT_SLOT_KEY_FILE, KEYFILE), 0);
    return k;
}

static struct agent_volume volume(const char *name)
{
    struct agent_volume v = {.params = {.block_size = 4096, .size_limit = 1 << 30, .root_mode = 0755, .root_uid = 7},
                             .attached = 1};

    strcpy(v.name, name);
    return v;
}

static int add(struct keystore *k, const char *name)
{
    struct agent_volume v = volume(name);

    return keystore_volume_add(k, &v);
}

static struct agent_rule rule(const char *name, const char *text, bool deny)
{
    struct agent_rule r = {.deny = deny};

    strcpy(r.name, name);
    strcpy(r.rule, text);
    return r;
}

static int rule_add(struct keystore *k, const char *name, const char *text, bool deny)
{
    struct agent_rule r = rule(name, text, deny);

    return keystore_rule_add(k, &r);
}

static int rule_rm(struct keystore *k, const char *name, const char *text, bool deny)
{
    struct agent_rule r = rule(name, text, deny);

    return keystore_rule_rm(k, &r);
}

static void volume_key(struct keystore *k, const char *name, uint8_t ret[32])
{
    struct key *key = NULL;

    assert_int_equal(keystore_volume_key(k, name, &key), 0);
    memcpy(ret, key->b, 32);
    key_free(&key);
}

/* Everything that an unlocked keystore says, for comparing. */
static char *dump(struct keystore *k)
{
    struct agent_volume v;
    struct agent_rule r;
    char *s = xstrdup("");

    for (uint32_t i = 0; keystore_volume_at(k, i, &v) == 0; i++) {
        uint8_t key[32];
        char hex[65], id[33], *old = s;

        volume_key(k, v.name, key);
        hex_encode(key, 32, hex);
        hex_encode(v.params.id, 16, id);
        s = xasprintf("%s%s %u %s %s\n", old, v.name, v.state, id, hex);
        free(old);
        for (uint32_t j = 0; keystore_rule_at(k, v.name, j, &r) == 0; j++) {
            old = s;
            s = xasprintf("%s  %u %s %s\n", old, r.index, r.deny ? "deny" : "allow", r.rule);
            free(old);
        }
    }
    return s;
}

static void check_dump(struct keystore *k, const char *want)
{
    char *got = dump(k);

    assert_string_equal(got, want);
    free(got);
}

/* --- life --- */

static void test_life(void **state)
{
    struct keystore *k = must_open();
    char recovery[KEYSTORE_RECOVERY_MAX];
    struct agent_volume v = volume("a");
    struct agent_rule r = rule("a", "uid:0", false);
    struct key *key = NULL;
    struct stat st;

    (void)state;
    assert_false(keystore_initialised(k));
    assert_int_equal(keystore_slots(k), 0);
    assert_int_equal(unlock(k, AGENT_SLOT_PASSPHRASE, PASS), -ENOENT);
    assert_int_equal(keystore_volume_add(k, &v), -ENOKEY);
    assert_int_equal(keystore_init(k, AGENT_SLOT_PASSPHRASE, (const uint8_t *)PASS, strlen(PASS), recovery,
                                   sizeof(recovery), NULL, NULL),
                     0);
    assert_true(keystore_initialised(k) && keystore_unlocked(k));
    assert_int_equal(keystore_slots(k), 2);
    assert_int_equal(fstatat(dir, KEYSTORE_FILE, &st, 0), 0);
    assert_int_equal(st.st_mode & 07777, 0600);
    assert_false(there(TMP));
    assert_int_equal(
        keystore_init(k, AGENT_SLOT_PASSPHRASE, (const uint8_t *)PASS, 3, recovery, sizeof(recovery), NULL, NULL),
        -EEXIST);
    assert_true(sodium_is_zero((uint8_t *)recovery, sizeof(recovery)));
    assert_int_equal(keystore_volume_add(k, &v), 0);
    assert_int_equal(keystore_volumes(k), 1);
    /* a failure leaves it unlocked */
    assert_int_equal(unlock(k, AGENT_SLOT_PASSPHRASE, "wrong"), -EKEYREJECTED);
    assert_true(keystore_unlocked(k));
    assert_int_equal(keystore_volumes(k), 1);
    keystore_lock(k);
    assert_true(keystore_initialised(k) && !keystore_unlocked(k));
    assert_int_equal(keystore_slots(k), 2);
    assert_int_equal(keystore_volumes(k), 0);
    assert_int_equal(keystore_volume_add(k, &v), -ENOKEY);
    assert_int_equal(keystore_volume_get(k, "a", &v), -ENOKEY);
    assert_int_equal(keystore_volume_at(k, 0, &v), -ENOKEY);
    assert_int_equal(keystore_volume_set_state(k, "a", 1), -ENOKEY);
    assert_int_equal(keystore_volume_rm(k, "a"), -ENOKEY);
    assert_int_equal(keystore_volume_key(k, "a", &key), -ENOKEY);
    assert_int_equal(keystore_rule_add(k, &r), -ENOKEY);
    assert_int_equal(keystore_rule_rm(k, &r), -ENOKEY);
    assert_int_equal(keystore_rule_at(k, "a", 0, &r), -ENOKEY);
    assert_int_equal(unlock(k, AGENT_SLOT_PASSPHRASE, "correct horsf"), -EKEYREJECTED);
    assert_int_equal(unlock(k, AGENT_SLOT_PASSPHRASE, "correct hors"), -EKEYREJECTED);
    assert_int_equal(unlock(k, AGENT_SLOT_PASSPHRASE, ""), -EKEYREJECTED);
    assert_int_equal(unlock(k, AGENT_SLOT_KEY_FILE, KEYFILE), -ENOENT);
    assert_int_equal(unlock(k, 0, PASS), -ENOENT);
    assert_int_equal(unlock(k, 9, PASS), -ENOENT);
    assert_false(keystore_unlocked(k));
    assert_int_equal(unlock(k, AGENT_SLOT_PASSPHRASE, PASS), 0);
    assert_int_equal(keystore_volumes(k), 1);
    keystore_close(k);
    keystore_close(NULL);
    assert_int_equal(try_file(AGENT_SLOT_PASSPHRASE, PASS), 0);
}

static void check_init(uint32_t kind, const char *secret, size_t n, size_t size, int want)
{
    struct keystore *k = must_open();
    char recovery[KEYSTORE_RECOVERY_MAX];

    memset(recovery, 'x', sizeof(recovery));
    assert_int_equal(keystore_init(k, kind, (const uint8_t *)secret, n, recovery, size, NULL, NULL), want);
    assert_true(sodium_is_zero((uint8_t *)recovery, size));
    assert_false(keystore_initialised(k) || keystore_unlocked(k) || there(KEYSTORE_FILE) || there(TMP));
    keystore_close(k);
}

static void test_init_refused(void **state)
{
    static const char big[AGENT_SECRET_MAX + 1];
    const size_t size = KEYSTORE_RECOVERY_MAX;

    (void)state;
    check_init(AGENT_SLOT_PASSPHRASE, PASS, 0, size, -EINVAL);
    check_init(AGENT_SLOT_PASSPHRASE, big, sizeof(big), size, -EINVAL);
    check_init(AGENT_SLOT_KEY_FILE, big, KEYSTORE_KEY_FILE_MIN - 1, size, -EINVAL);
    check_init(AGENT_SLOT_KEY_FILE, big, sizeof(big), size, -EINVAL);
    check_init(AGENT_SLOT_RECOVERY, big, 32, size, -EINVAL);
    check_init(0, PASS, 5, size, -EINVAL);
    check_init(4, PASS, 5, size, -EINVAL);
    check_init(AGENT_SLOT_PASSPHRASE, PASS, 5, size - 1, -ENOSPC);
    keystore_set_argon_cost_for_new_slots(KEYSTORE_ARGON_OPS + 1, 8192);
    check_init(AGENT_SLOT_PASSPHRASE, PASS, 5, size, -EINVAL);
    keystore_set_argon_cost_for_new_slots(1, (uint64_t)KEYSTORE_ARGON_MEM + 1);
    check_init(AGENT_SLOT_PASSPHRASE, PASS, 5, size, -EINVAL);
}

/* Two that were opened before either was made. */
static void test_init_race(void **state)
{
    struct keystore *a = must_open(), *b = must_open();
    char recovery[KEYSTORE_RECOVERY_MAX];
    size_t n, m;
    uint8_t *before, *after;

    (void)state;
    assert_int_equal(keystore_init(a, AGENT_SLOT_KEY_FILE, (const uint8_t *)KEYFILE, sizeof(KEYFILE) - 1, recovery,
                                   sizeof(recovery), NULL, NULL),
                     0);
    before = slurp(&n);
    assert_int_equal(keystore_init(b, AGENT_SLOT_KEY_FILE, (const uint8_t *)KEYFILE, sizeof(KEYFILE) - 1, recovery,
                                   sizeof(recovery), NULL, NULL),
                     -EEXIST);
    after = slurp(&m);
    assert_true(n == m && !memcmp(before, after, n) && !there(TMP));
    free(before);
    free(after);
    keystore_close(a);
    keystore_close(b);
}

static void test_key_file(void **state)
{
    struct keystore *k = made(AGENT_SLOT_KEY_FILE, NULL);
    static const uint8_t zeroes[AGENT_SECRET_MAX + 1];

    (void)state;
    keystore_lock(k);
    assert_int_equal(unlock(k, AGENT_SLOT_PASSPHRASE, KEYFILE), -ENOENT);
    assert_int_equal(keystore_unlock(k, AGENT_SLOT_KEY_FILE, (const uint8_t *)KEYFILE, sizeof(KEYFILE) - 2),
                     -EKEYREJECTED);
    assert_int_equal(keystore_unlock(k, AGENT_SLOT_KEY_FILE, (const uint8_t *)KEYFILE, 16), -EKEYREJECTED);
    assert_int_equal(keystore_unlock(k, AGENT_SLOT_KEY_FILE, zeroes, 0), -EKEYREJECTED);
    assert_int_equal(keystore_unlock(k, AGENT_SLOT_KEY_FILE, zeroes, sizeof(zeroes)), -EKEYREJECTED);
    assert_int_equal(unlock(k, AGENT_SLOT_KEY_FILE, KEYFILE), 0);
    keystore_close(k);
}

/* --- the recovery text --- */

static void test_recovery(void **state)
{
    char text[KEYSTORE_RECOVERY_MAX], typed[2 * KEYSTORE_RECOVERY_MAX];
    struct keystore *k = made(AGENT_SLOT_PASSPHRASE, text);
    size_t n = strlen(text), o = 0;

    (void)state;
    assert_int_equal(n, 28 * 5 - 1);
    assert_int_equal(strspn(text, "0123456789ABCDEFGHJKMNPQRSTVWXYZ-"), n);
    assert_int_equal(add(k, "a"), 0);
    keystore_lock(k);
    assert_int_equal(unlock(k, AGENT_SLOT_RECOVERY, text), 0);
    assert_int_equal(keystore_volumes(k), 1);
    assert_int_equal(add(k, "b"), 0);
    /* as people type it */
    for (size_t i = 0; i < n; i++) {
        char c = text[i];

        if (c == '-')
            typed[o++] = ' ', typed[o++] = i % 3 ? '\t' : '\n';
        else
            typed[o++] = (char)(c == '0' ? "oO"[i % 2] : c == '1' ? "ilIL"[i % 4] : c >= 'A' ? c | 0x20 : c);
    }
    typed[o] = 0;
    assert_int_equal(unlock(k, AGENT_SLOT_RECOVERY, typed), 0);
    keystore_close(k);
    assert_int_equal(try_file(AGENT_SLOT_RECOVERY, text), 0);
    assert_int_equal(try_file(AGENT_SLOT_PASSPHRASE, text), -EKEYREJECTED);
}

static void test_recovery_typos(void **state)
{
    char text[KEYSTORE_RECOVERY_MAX], typed[KEYSTORE_RECOVERY_MAX + 1];
    struct keystore *k = made(AGENT_SLOT_KEY_FILE, text);
    size_t n = strlen(text);

    (void)state;
    keystore_lock(k);
    for (size_t i = 0; i < n; i++) {
        if (text[i] == '-')
            continue;
        /* one letter wrong, left out, twice, or changed with the next */
        strcpy(typed, text);
        typed[i] = text[i] == '7' ? '8' : '7';
        assert_int_equal(unlock(k, AGENT_SLOT_RECOVERY, typed), -EKEYREJECTED);
        strcpy(typed, text);
        typed[i] = 'U';
        assert_int_equal(unlock(k, AGENT_SLOT_RECOVERY, typed), -EKEYREJECTED);
        typed[i] = '-';
        assert_int_equal(unlock(k, AGENT_SLOT_RECOVERY, typed), -EKEYREJECTED);
        snprintf(typed, sizeof(typed), "%.*s%s", (int)i + 1, text, text + i);
        assert_int_equal(unlock(k, AGENT_SLOT_RECOVERY, typed), -EKEYREJECTED);
        if (text[i + 1] && text[i + 1] != '-' && text[i] != text[i + 1]) {
            strcpy(typed, text);
            typed[i] = text[i + 1], typed[i + 1] = text[i];
            assert_int_equal(unlock(k, AGENT_SLOT_RECOVERY, typed), -EKEYREJECTED);
        }
        assert_int_equal(keystore_unlock(k, AGENT_SLOT_RECOVERY, (const uint8_t *)text, i), -EKEYREJECTED);
    }
    assert_int_equal(keystore_unlock(k, AGENT_SLOT_RECOVERY, (const uint8_t *)text, n + 1), -EKEYREJECTED);
    assert_false(keystore_unlocked(k));
    assert_int_equal(unlock(k, AGENT_SLOT_RECOVERY, text), 0);
    keystore_close(k);
}

/* A missing letter is not taken for a zero. */
static void test_recovery_too_short(void **state)
{
    struct recovery_key r = {.secret = "any"}, got;
    char text[KEYSTORE_RECOVERY_MAX];
    size_t n;

    (void)state;
    do {
        r.secret[31]++;
        recovery_encode(&r, text);
        n = strlen(text);
    } while (text[n - 1] != '0');
    assert_int_equal(recovery_decode((const uint8_t *)text, n, &got), 0);
    assert_memory_equal(&r, &got, sizeof(r));
    assert_int_equal(recovery_decode((const uint8_t *)text, n - 1, &got), -EKEYREJECTED);
}

static void test_recovery_of_another(void **state)
{
    char text[KEYSTORE_RECOVERY_MAX];

    (void)state;
    keystore_close(made(AGENT_SLOT_KEY_FILE, text));
    unlinkat(dir, KEYSTORE_FILE, 0);
    keystore_close(made(AGENT_SLOT_KEY_FILE, NULL));
    assert_int_equal(try_file(AGENT_SLOT_RECOVERY, text), -EKEYREJECTED);
}

/* --- the file, changed --- */

static void test_every_byte(void **state)
{
    char text[KEYSTORE_RECOVERY_MAX];
    struct keystore *k = made(AGENT_SLOT_KEY_FILE, text), *live;
    size_t n, head = sizeof(struct disk_head) + 2 * sizeof(struct disk_slot) + KS_MAC_BYTES;
    uint8_t *file;
    int fd;

    (void)state;
    assert_int_equal(add(k, "a"), 0);
    live = must_open();
    file = slurp(&n);
    assert_int_equal(n, head + KS_NONCE_BYTES + BODY_UNIT + KS_TAG_BYTES + KS_SIG_BYTES);
    fd = openat(dir, KEYSTORE_FILE, O_WRONLY);
    for (size_t i = 0; i < n; i++) {
        uint8_t bad = file[i] ^ (uint8_t)(1 << i % 8);

        assert_int_equal(pwrite_full(fd, &bad, 1, i), 0);
        assert_true(try_file(AGENT_SLOT_KEY_FILE, KEYFILE) < 0);
        if (i < head || i % 16 == 0) {
            assert_true(try_file(AGENT_SLOT_RECOVERY, text) < 0);
            /* changed after it was opened; and a keystore that is unlocked stays so */
            assert_true(unlock(live, AGENT_SLOT_KEY_FILE, KEYFILE) < 0);
            assert_true(unlock(k, AGENT_SLOT_KEY_FILE, KEYFILE) < 0 && keystore_unlocked(k));
        }
        if (i >= head)
            assert_int_equal(try_file(AGENT_SLOT_KEY_FILE, KEYFILE), -EBADMSG);
        assert_int_equal(pwrite_full(fd, &file[i], 1, i), 0);
    }
    assert_int_equal(try_file(AGENT_SLOT_KEY_FILE, KEYFILE), 0);
    assert_int_equal(try_file(AGENT_SLOT_RECOVERY, text), 0);
    close(fd);
    free(file);
    keystore_close(live);
    keystore_close(k);
}

static void test_every_byte_of_a_passphrase_slot(void **state)
{
    struct keystore *k = made(AGENT_SLOT_PASSPHRASE, NULL);
    size_t n;
    uint8_t *file = slurp(&n);

    (void)state;
    for (size_t i = sizeof(struct disk_head); i < sizeof(struct disk_head) + sizeof(struct disk_slot); i++) {
        file[i] ^= 1;
        spit(file, n);
        assert_true(try_file(AGENT_SLOT_PASSPHRASE, PASS) < 0);
        file[i] ^= 1;
    }
    spit(file, n);
    assert_int_equal(try_file(AGENT_SLOT_PASSPHRASE, PASS), 0);
    free(file);
    keystore_close(k);
}

/* Parts of one keystore in another, or of an older file in a newer. */
static void test_mixed(void **state)
{
    struct keystore *k = made(AGENT_SLOT_KEY_FILE, NULL);
    size_t n, m, cuts[] = {96, 96 + 320, 96 + 640, 96 + 640 + 32, 0};
    uint8_t *old = slurp(&n), *next, *mixed;

    (void)state;
    assert_int_equal(add(k, "a"), 0);
    next = slurp(&m);
    assert_int_equal(n, m);
    mixed = xmalloc(n);
    cuts[4] = n - KS_SIG_BYTES;
    for (size_t i = 0; i < ARRAY_LEN(cuts); i++) {
        memcpy(mixed, next, n);
        memcpy(mixed, old, cuts[i]);
        spit(mixed, n);
        assert_int_equal(try_file(AGENT_SLOT_KEY_FILE, KEYFILE), -EBADMSG);
    }
    /* the slots change places */
    memcpy(mixed, next, n);
    memcpy(mixed + 96, next + 96 + 320, 320);
    memcpy(mixed + 96 + 320, next + 96, 320);
    spit(mixed, n);
    assert_int_equal(try_file(AGENT_SLOT_KEY_FILE, KEYFILE), -EBADMSG);
    free(old);
    free(next);
    free(mixed);
    keystore_close(k);
}

static void test_lengths(void **state)
{
    struct keystore *k = made(AGENT_SLOT_KEY_FILE, NULL);
    size_t n;
    uint8_t *file = slurp(&n);
    int fd = openat(dir, KEYSTORE_FILE, O_RDWR);

    (void)state;
    for (size_t cut = n; cut-- > 0; cut -= cut > 800 ? 61 : 0) {
        assert_int_equal(ftruncate(fd, (off_t)cut), 0);
        assert_int_equal(try_file(AGENT_SLOT_KEY_FILE, KEYFILE), -EBADMSG);
        assert_int_equal(unlock(k, AGENT_SLOT_KEY_FILE, KEYFILE), -EBADMSG);
    }
    assert_int_equal(pwrite_full(fd, file, n, 0), 0);
    assert_int_equal(try_file(AGENT_SLOT_KEY_FILE, KEYFILE), 0);
    assert_int_equal(ftruncate(fd, (off_t)n + 1), 0);
    assert_int_equal(try_file(AGENT_SLOT_KEY_FILE, KEYFILE), -EBADMSG);
    assert_int_equal(ftruncate(fd, KEYSTORE_FILE_MAX + 1), 0);
    assert_int_equal(try_file(AGENT_SLOT_KEY_FILE, KEYFILE), -EFBIG);
    assert_int_equal(unlock(k, AGENT_SLOT_KEY_FILE, KEYFILE), -EFBIG);
    close(fd);
    free(file);
    keystore_close(k);
}

/* What is no regular file is not read; a fifo does not hang us. */
static void test_no_file(void **state)
{
    struct keystore *k = made(AGENT_SLOT_KEY_FILE, NULL);
    char other[96];

    (void)state;
    snprintf(other, sizeof(other), "%s/other", path);
    renameat(dir, KEYSTORE_FILE, dir, "other");
    assert_int_equal(symlinkat(other, dir, KEYSTORE_FILE), 0);
    assert_int_equal(try_file(AGENT_SLOT_KEY_FILE, KEYFILE), -EBADMSG);
    unlinkat(dir, KEYSTORE_FILE, 0);
    assert_int_equal(mkfifoat(dir, KEYSTORE_FILE, 0600), 0);
    assert_int_equal(try_file(AGENT_SLOT_KEY_FILE, KEYFILE), -EBADMSG);
    unlinkat(dir, KEYSTORE_FILE, 0);
    assert_int_equal(mkdirat(dir, KEYSTORE_FILE, 0700), 0);
    assert_int_equal(try_file(AGENT_SLOT_KEY_FILE, KEYFILE), -EBADMSG);
    unlinkat(dir, KEYSTORE_FILE, AT_REMOVEDIR);
    assert_int_equal(unlock(k, AGENT_SLOT_KEY_FILE, KEYFILE), -ENOENT);
    /* somebody took the file away: a change writes it anew */
    assert_true(keystore_unlocked(k));
    assert_int_equal(add(k, "a"), 0);
    k = reopened(k);
    assert_int_equal(keystore_volumes(k), 1);
    unlinkat(dir, "other", 0);
    keystore_close(k);
}

static void test_bounds(void **state)
{
    struct keystore *k = made(AGENT_SLOT_PASSPHRASE, NULL);
    struct disk_slot *slot;
    struct disk_head *h;
    struct disk_passphrase *p;
    uint8_t *file;
    size_t n;

    (void)state;
    file = slurp(&n);
    h = (struct disk_head *)file;
    slot = (struct disk_slot *)(file + sizeof(*h));
    p = &slot->params.passphrase;
    assert_int_equal(keystore_check_head(file, n, n), 0);
    assert_int_equal(keystore_check_head(file, 96 + 640, n), 0);
    assert_int_equal(keystore_check_head(file, 96 + 639, n), -EBADMSG);
    assert_int_equal(keystore_check_head(file, n, n - 1), -EBADMSG);
    assert_int_equal(keystore_check_head(file, n, (uint64_t)n + (1ull << 32)), -EFBIG);
#define EDIT(what, to, want)                                                                                           \
    do {                                                                                                               \
        __typeof__(what) was = what;                                                                                   \
        what = to;                                                                                                     \
        assert_int_equal(keystore_check_head(file, n, n), want);                                                       \
        spit(file, n);                                                                                                 \
        assert_true(try_file(AGENT_SLOT_PASSPHRASE, PASS) < 0);                                                        \
        assert_true(unlock(k, AGENT_SLOT_PASSPHRASE, PASS) < 0);                                                       \
        what = was;                                                                                                    \
    } while (0)
    EDIT(h->version, le32_make(0), -EBADMSG);
    EDIT(h->version, le32_make(2), -ENOTSUP);
    EDIT(h->incompat, le32_make(1u << 31), -ENOTSUP);
    EDIT(h->compat, le32_make(1), 0); /* allowed, but the MAC says that it was not there */
    EDIT(h->slots, le32_make(0), -EBADMSG);
    EDIT(h->slots, le32_make(1), -EBADMSG);
    EDIT(h->slots, le32_make(KEYSTORE_SLOTS_MAX + 1), -EBADMSG);
    EDIT(h->slots, le32_make(UINT32_MAX), -EBADMSG);
    EDIT(h->generation, le64_make(0), -EBADMSG);
    EDIT(h->generation, le64_make(UINT64_MAX), -EBADMSG);
    EDIT(h->body_bytes, le32_make(0), -EBADMSG);
    EDIT(h->body_bytes, le32_make(UINT32_MAX), -EBADMSG);
    EDIT(slot->kind, le32_make(0), -EBADMSG);
    EDIT(slot->kind, le32_make(4), -ENOTSUP);
    EDIT(p->algorithm, le32_make(1), -EBADMSG);
    /* any of these would take minutes or all memory if it were believed */
    EDIT(p->ops, le64_make(0), -EBADMSG);
    EDIT(p->ops, le64_make(KEYSTORE_ARGON_OPS + 1), -EBADMSG);
    EDIT(p->ops, le64_make(UINT32_MAX), -EBADMSG);
    EDIT(p->ops, le64_make(UINT64_MAX), -EBADMSG);
    EDIT(p->mem, le64_make(8191), -EBADMSG);
    EDIT(p->mem, le64_make((uint64_t)KEYSTORE_ARGON_MEM + 1), -EBADMSG);
    EDIT(p->mem, le64_make(UINT64_MAX), -EBADMSG);
    /* a cheaper or dearer cost within bounds does not open */
    EDIT(p->ops, le64_make(2), 0);
    EDIT(p->mem, le64_make(16384), 0);
#undef EDIT
    spit(file, n);
    assert_int_equal(try_file(AGENT_SLOT_PASSPHRASE, PASS), 0);
    free(file);
    keystore_close(k);
}

/* --- volumes and rules --- */

static void test_volumes(void **state)
{
    static const char *const names[] = {"b", "Z", "a.b", "a", "a-b", "_"};
    static const char *const sorted[] = {"Z", "a", "a-b", "a.b", "b"};
    struct keystore *k = made(AGENT_SLOT_KEY_FILE, NULL);
    struct agent_volume v, w;
    uint8_t key[5][32], again[32];
    struct key *none = NULL;

    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(names); i++)
        assert_int_equal(add(k, names[i]), i < 5 ? 0 : -EINVAL);
    assert_int_equal(add(k, "a"), -EEXIST);
    v = volume("full");
    memset(v.name, 'n', VOLUME_NAME_MAX);
    v.name[VOLUME_NAME_MAX] = 0;
    v.state = AGENT_VOLUME_FRESH;
    v.strict = 1, v.attached = 0;
    v.params = (struct volume_params){.block_size = 16384,
                                      .profile = 1,
                                      .size_limit = VOLUME_SIZE_MAX,
                                      .log_segment = 1 << 20,
                                      .root_mode = 07777,
                                      .root_uid = UINT32_MAX,
                                      .root_gid = 9};
    w = v;
    assert_int_equal(keystore_volume_add(k, &v), 0);
    assert_false(sodium_is_zero(v.params.id, 16));
    assert_true(v.created_ns > 1600000000ll * 1000000000);
    w.created_ns = v.created_ns;
    memcpy(w.params.id, v.params.id, 16);
    assert_memory_equal(&v, &w, sizeof(v));
    assert_int_equal(keystore_volume_set_state(k, "a", AGENT_VOLUME_USED), 0);
    assert_int_equal(keystore_volume_set_state(k, "a", 3), -EINVAL);
    assert_int_equal(keystore_volume_set_state(k, "none", 1), -ENOENT);
    for (unsigned i = 0; i < 5; i++)
        volume_key(k, sorted[i], key[i]);

    k = reopened(k);
    assert_int_equal(keystore_volumes(k), 6);
    for (unsigned i = 0; i < 5; i++) {
        assert_int_equal(keystore_volume_at(k, i, &w), 0);
        assert_string_equal(w.name, sorted[i]);
        assert_int_equal(w.state, strcmp(w.name, "a") ? AGENT_VOLUME_NEW : AGENT_VOLUME_USED);
        volume_key(k, sorted[i], again);
        assert_memory_equal(again, key[i], 32);
        for (unsigned j = 0; j < i; j++)
            assert_memory_not_equal(key[i], key[j], 32);
    }
    assert_int_equal(keystore_volume_at(k, 6, &w), -ENOENT);
    assert_int_equal(keystore_volume_get(k, v.name, &w), 0);
    assert_memory_equal(&v, &w, sizeof(v));
    assert_int_equal(keystore_volume_rm(k, "a"), 0);
    assert_int_equal(keystore_volume_rm(k, "a"), -ENOENT);
    assert_int_equal(keystore_volume_get(k, "a", &w), -ENOENT);
    assert_int_equal(keystore_volume_key(k, "a", &none), -ENOENT);
    k = reopened(k);
    assert_int_equal(keystore_volumes(k), 5);
    assert_int_equal(keystore_volume_get(k, "a", &w), -ENOENT);
    assert_int_equal(add(k, "a"), 0);
    volume_key(k, "a", again);
    assert_memory_not_equal(again, key[1], 32);
    keystore_close(k);
}

static void test_volume_fields(void **state)
{
    struct keystore *k = made(AGENT_SLOT_KEY_FILE, NULL);
    struct agent_volume v;

    (void)state;
#define BAD(field, value)                                                                                              \
    do {                                                                                                               \
        v = volume("a");                                                                                               \
        v.field = value;                                                                                               \
        assert_int_equal(keystore_volume_add(k, &v), -EINVAL);                                                         \
    } while (0)
    BAD(name[0], 0);
    BAD(name[0], '/');
    BAD(state, 3);
    BAD(strict, 2);
    BAD(attached, 2);
    BAD(params.block_size, 5000);
    BAD(params.profile, 2);
    BAD(params.size_limit, VOLUME_SIZE_MIN - 1);
    BAD(params.size_limit, VOLUME_SIZE_MAX + 1);
    BAD(params.log_segment, 65536);
    BAD(params.log_segment, (1 << 20) + 1);
    BAD(params.log_segment, 2ull << 30);
    BAD(params.root_mode, 010000);
#undef BAD
    v = volume("a");
    memset(v.name, 'a', sizeof(v.name));
    assert_int_equal(keystore_volume_add(k, &v), -EINVAL);
    assert_int_equal(keystore_volumes(k), 0);
    keystore_close(k);
}

static void test_rules(void **state)
{
    struct keystore *k = made(AGENT_SLOT_KEY_FILE, NULL);
    struct agent_rule r;
    char text[AGENT_RULE_MAX], *want;

    (void)state;
    assert_int_equal(add(k, "a"), 0);
    assert_int_equal(add(k, "b"), 0);
    assert_int_equal(rule_add(k, "none", "x", false), -ENOENT);
    assert_int_equal(rule_add(k, "a", "", false), -EINVAL);
    memset(&r, 'x', sizeof(r));
    strcpy(r.name, "a");
    r.deny = 0;
    assert_int_equal(keystore_rule_add(k, &r), -EINVAL); /* no NUL */
    assert_int_equal(keystore_rule_rm(k, &r), -ENOENT);
    r = rule("a", "x", false);
    r.deny = 2;
    assert_int_equal(keystore_rule_add(k, &r), -EINVAL);
    for (int i = 0; i < AGENT_RULES_MAX; i++) {
        /* the same text as allow and as deny are two rules; the longest text there may be */
        memset(text, 'a' + i / 2, sizeof(text) - 1);
        text[sizeof(text) - 1] = 0;
        assert_int_equal(rule_add(k, "a", text, i % 2), 0);
        assert_int_equal(rule_add(k, "a", text, i % 2), -EEXIST);
    }
    assert_int_equal(rule_add(k, "a", "one more", false), -E2BIG);
    assert_int_equal(rule_add(k, "b", "one more", false), 0);
    want = dump(k);
    k = reopened(k);
    check_dump(k, want);
    free(want);
    memset(text, 'b', sizeof(text) - 1);
    assert_int_equal(rule_rm(k, "a", "b", true), -ENOENT);
    assert_int_equal(rule_rm(k, "a", text, true), 0);
    assert_int_equal(rule_rm(k, "a", text, true), -ENOENT);
    assert_int_equal(rule_rm(k, "none", text, true), -ENOENT);
    k = reopened(k);
    for (int i = 0; i < AGENT_RULES_MAX - 1; i++) {
        int was = i < 3 ? i : i + 1;

        memset(&r, 'x', sizeof(r));
        assert_int_equal(keystore_rule_at(k, "a", (uint32_t)i, &r), 0);
        assert_int_equal(r.index, i);
        assert_string_equal(r.name, "a");
        assert_int_equal(r.rule[0], 'a' + was / 2);
        assert_int_equal(strlen(r.rule), AGENT_RULE_MAX - 1);
        assert_int_equal(r.deny, was % 2);
        assert_true(sodium_is_zero(r.reserved, 2));
        assert_true(sodium_is_zero((uint8_t *)r.name + 1, sizeof(r.name) - 1));
    }
    assert_int_equal(keystore_rule_at(k, "a", AGENT_RULES_MAX - 1, &r), -ENOENT);
    assert_int_equal(keystore_rule_at(k, "none", 0, &r), -ENOENT);
    assert_int_equal(keystore_volume_rm(k, "a"), 0);
    assert_int_equal(add(k, "a"), 0);
    assert_int_equal(keystore_rule_at(k, "a", 0, &r), -ENOENT); /* a new volume has no rules */
    keystore_close(k);
}

/* Neither names nor rules nor keys lie in the file; two files of the same state have nothing in common behind the
 * slots. */
static void test_nothing_in_the_clear(void **state)
{
    struct keystore *k = made(AGENT_SLOT_KEY_FILE, NULL);
    size_t n, m, same = 0, head = 96 + 640;
    uint8_t *file, *next, key[32];

    (void)state;
    assert_int_equal(add(k, "conspicuous"), 0);
    assert_int_equal(rule_add(k, "conspicuous", "container:distinctive", false), 0);
    volume_key(k, "conspicuous", key);
    file = slurp(&n);
    assert_null(memmem(file, n, "conspicuous", 11));
    assert_null(memmem(file, n, "distinctive", 11));
    assert_null(memmem(file, n, key, 16));
    assert_int_equal(keystore_volume_set_state(k, "conspicuous", 1), 0);
    assert_int_equal(keystore_volume_set_state(k, "conspicuous", 0), 0);
    next = slurp(&m);
    assert_int_equal(n, m);
    for (size_t i = head; i < n; i++)
        same += file[i] == next[i];
    assert_true(same < (n - head) / 64);
    free(file);
    free(next);
    keystore_close(k);
}

/* --- failures and deaths while writing --- */

struct change {
    const char *name;
    int (*fn)(struct keystore *k);
};

static int change_add(struct keystore *k)
{
    return add(k, "c");
}

static int change_state(struct keystore *k)
{
    return keystore_volume_set_state(k, "b", AGENT_VOLUME_USED);
}

static int change_rm(struct keystore *k)
{
    return keystore_volume_rm(k, "a");
}

static int change_rule_add(struct keystore *k)
{
    return rule_add(k, "a", "label:x=y", true);
}

static int change_rule_rm(struct keystore *k)
{
    return rule_rm(k, "a", "uid:1", false);
}

static const struct change changes[] = {{"add", change_add},
                                        {"state", change_state},
                                        {"rm", change_rm},
                                        {"rule add", change_rule_add},
                                        {"rule rm", change_rule_rm}};

/* A keystore with two volumes, three rules. */
static struct keystore *populated(void)
{
    struct keystore *k;

    unlinkat(dir, KEYSTORE_FILE, 0);
    k = made(AGENT_SLOT_KEY_FILE, NULL);
    assert_int_equal(add(k, "b"), 0);
    assert_int_equal(add(k, "a"), 0);
    for (int i = 0; i < 3; i++) {
        char text[] = "uid:0";

        text[4] += (char)i;
        assert_int_equal(rule_add(k, "a", text, false), 0);
    }
    return k;
}

/* Every system call of a change fails in turn: memory is as it was, and so is the file. What fails after the new file
 * is durable does not matter. */
static void test_failures(void **state)
{
    (void)state;
    for (size_t c = 0; c < ARRAY_LEN(changes); c++) {
        int failed = 0, done = 0, doubt = 0;

        for (int at = 0;; at++) {
            struct keystore *k = populated();
            char *before = dump(k), *after;
            int rc, reached;

            fault_set(FAIL, at);
            rc = changes[c].fn(k);
            reached = step > at;
            fault_set(NO_FAULT, 0);
            after = dump(k);
            assert_int_equal(strcmp(before, after) == 0, rc < 0);
            if (rc < 0) {
                assert_int_equal(rc, -EIO);
                failed++;
                rc = changes[c].fn(k);
                if (rc == -EIO) {
                    /* not known what is durable: refused until the file is read again */
                    doubt++;
                    check_dump(k, before);
                    assert_int_equal(unlock(k, AGENT_SLOT_KEY_FILE, KEYFILE), 0);
                    check_dump(k, before);
                    rc = changes[c].fn(k);
                }
                assert_int_equal(rc, 0);
                free(after);
                after = dump(k);
            } else {
                done++;
            }
            k = reopened(k);
            check_dump(k, after);
            assert_false(there(TMP));
            keystore_close(k);
            free(before);
            free(after);
            if (!reached)
                break;
        }
        /* fsync of the file and the directory; exchange falls back to rename, overwriting and unlinking may fail */
        assert_int_equal(failed, 2);
        assert_int_equal(doubt, 1);
        assert_true(done >= 4);
    }
}

/* Runs the change in a child that dies at a step; true if it got there. */
static bool dies(int kind, int at, int (*fn)(struct keystore *k))
{
    int status;
    pid_t pid = fork();

    if (pid == 0) {
        struct keystore *k = must_open();

        if (keystore_initialised(k) && unlock(k, AGENT_SLOT_KEY_FILE, KEYFILE) < 0)
            _exit(1);
        fault_set(kind, at);
        _exit(fn(k) < 0 ? 2 : 0);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status) && (WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 77));
    return WEXITSTATUS(status) == 77;
}

static void test_deaths(void **state)
{
    (void)state;
    for (size_t c = 0; c < ARRAY_LEN(changes); c++) {
        unsigned old = 0, later = 0;
        bool died = true;

        for (int i = 0; died; i++) {
            struct keystore *k = populated();
            char *before = dump(k), *after;

            keystore_close(k);
            died = dies(i % 2 ? DIE_AFTER : DIE_BEFORE, i / 2, changes[c].fn);
            k = must_open();
            assert_false(there(TMP));
            assert_int_equal(unlock(k, AGENT_SLOT_KEY_FILE, KEYFILE), 0);
            after = dump(k);
            if (strcmp(before, after)) {
                later++;
            } else {
                assert_int_equal(changes[c].fn(k), 0);
                assert_int_equal(later, 0); /* once there, it stays */
                old++;
            }
            k = reopened(k);
            keystore_close(k);
            free(before);
            free(after);
        }
        assert_true(old >= 3 && later >= 3);
    }
}

static int change_init(struct keystore *k)
{
    char recovery[KEYSTORE_RECOVERY_MAX];

    return keystore_init(k, AGENT_SLOT_KEY_FILE, (const uint8_t *)KEYFILE, sizeof(KEYFILE) - 1, recovery,
                         sizeof(recovery), NULL, NULL);
}

static void test_init_deaths_and_failures(void **state)
{
    bool more = true;

    (void)state;
    for (int i = 0; more; i++) {
        struct keystore *k;

        more = dies(i % 2 ? DIE_AFTER : DIE_BEFORE, i / 2, change_init);
        k = must_open();
        assert_false(there(TMP));
        assert_int_equal(keystore_initialised(k), there(KEYSTORE_FILE));
        assert_int_equal(unlock(k, AGENT_SLOT_KEY_FILE, KEYFILE), there(KEYSTORE_FILE) ? 0 : -ENOENT);
        keystore_close(k);
        unlinkat(dir, KEYSTORE_FILE, 0);
    }
    more = true;
    for (int i = 0; more; i++) {
        struct keystore *k = must_open();
        int rc;

        fault_set(FAIL, i);
        rc = change_init(k);
        more = step > i;
        fault_set(NO_FAULT, 0);
        assert_int_equal(rc, more ? -EIO : 0);
        assert_int_equal(keystore_initialised(k), rc == 0);
        assert_int_equal(keystore_unlocked(k), rc == 0);
        assert_int_equal(there(KEYSTORE_FILE), rc == 0);
        assert_false(there(TMP));
        keystore_close(k);
    }
}

/* The disk is full in the middle of the new file. */
static void test_no_room(void **state)
{
    struct rlimit was, little;
    size_t n, m;
    uint8_t *file, *again;

    (void)state;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &was), 0);
    signal(SIGXFSZ, SIG_IGN);
    for (size_t c = 0; c < ARRAY_LEN(changes); c++) {
        struct keystore *k = populated();
        char *before = dump(k);

        file = slurp(&n);
        little = (struct rlimit){3000, was.rlim_max};
        setrlimit(RLIMIT_FSIZE, &little);
        assert_int_equal(changes[c].fn(k), -EFBIG);
        setrlimit(RLIMIT_FSIZE, &was);
        check_dump(k, before);
        again = slurp(&m);
        assert_true(n == m && !memcmp(file, again, n));
        assert_false(there(TMP));
        assert_int_equal(changes[c].fn(k), 0);
        keystore_close(k);
        free(before);
        free(file);
        free(again);
    }
    unlinkat(dir, KEYSTORE_FILE, 0);
    setrlimit(RLIMIT_FSIZE, &little);
    check_init(AGENT_SLOT_PASSPHRASE, PASS, 5, KEYSTORE_RECOVERY_MAX, -EFBIG);
    setrlimit(RLIMIT_FSIZE, &was);
    signal(SIGXFSZ, SIG_DFL);
}

/* Dies in the middle of writing the new file. */
static void test_death_in_write(void **state)
{
    struct keystore *k = populated();
    int status;
    pid_t pid;

    (void)state;
    pid = fork();
    if (pid == 0) {
        struct rlimit little = {3000, 3000};

        setrlimit(RLIMIT_FSIZE, &little);
        change_add(k);
        _exit(0);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGXFSZ);
    assert_true(there(TMP));
    k = reopened(k);
    assert_false(there(TMP));
    assert_int_equal(keystore_volumes(k), 2);
    keystore_close(k);
}

/* --- old blocks --- */

static void check_overwritten(int fd, const uint8_t *was, size_t n)
{
    uint8_t *now = xmalloc(n);
    size_t same = 0;

    assert_int_equal(pread_full(fd, now, n, 0), 0);
    for (size_t i = 0; i < n; i++)
        same += now[i] == was[i];
    assert_true(same < n / 64);
    free(now);
    close(fd);
}

static void test_old_blocks(void **state)
{
    struct keystore *k = populated();
    size_t n;
    uint8_t *file = slurp(&n);
    int fd = openat(dir, KEYSTORE_FILE, O_RDONLY);

    (void)state;
    assert_int_equal(keystore_volume_rm(k, "a"), 0);
    check_overwritten(fd, file, n);
    free(file);
    /* every replaced file holds the keys that a later rm destroys */
    file = slurp(&n);
    fd = openat(dir, KEYSTORE_FILE, O_RDONLY);
    assert_int_equal(keystore_volume_set_state(k, "b", AGENT_VOLUME_FRESH), 0);
    check_overwritten(fd, file, n);
    free(file);
    keystore_close(k);
}

/* Dead after the exchange, before the overwriting: the next opening does it. */
static void test_old_blocks_after_death(void **state)
{
    unsigned left = 0;
    bool died = true;

    (void)state;
    for (int i = 0; died; i++) {
        struct keystore *k = populated();
        size_t n;
        uint8_t *file = slurp(&n);
        int fd = openat(dir, KEYSTORE_FILE, O_RDONLY);
        struct stat st;

        keystore_close(k);
        died = dies(i % 2 ? DIE_AFTER : DIE_BEFORE, i / 2, change_rm);
        k = reopened(must_open());
        left += there(TMP);
        fstat(fd, &st);
        if (st.st_nlink == 0)
            check_overwritten(fd, file, n);
        else
            close(fd);
        assert_int_equal(keystore_volumes(k), st.st_nlink == 0 ? 1 : 2);
        keystore_close(k);
        free(file);
    }
    assert_int_equal(left, 0);
}

/* A stale temporary file that is another name of something is unlinked, and its content left alone. */
static void test_stale_link(void **state)
{
    struct keystore *k = populated();
    char *before = dump(k);

    (void)state;
    assert_int_equal(linkat(dir, KEYSTORE_FILE, dir, TMP, 0), 0);
    k = reopened(k);
    assert_false(there(TMP));
    check_dump(k, before);
    assert_int_equal(symlinkat(KEYSTORE_FILE, dir, TMP), 0);
    k = reopened(k);
    assert_false(there(TMP));
    check_dump(k, before);
    keystore_close(k);
    free(before);
}

/* --- a second implementation, from KEYSTORE.md: opens with the key file, forges --- */

struct forge {
    struct ks_image image;
    uint8_t root[32], head[32], body_key[32], wrap[32];
    uint8_t sign_public[32], sign[64];
    uint8_t *body; /* KEYSTORE_FILE_MAX bytes */
    size_t n;
};

static void forge_keys(struct forge *f)
{
    uint8_t base[32];

    crypto_generichash(base, 32, f->image.head.id, 16, f->root, 32);
    crypto_kdf_derive_from_key(f->head, 32, 1, "cofkeys1", base);
    crypto_kdf_derive_from_key(f->body_key, 32, 2, "cofkeys1", base);
    crypto_kdf_derive_from_key(f->wrap, 32, 3, "cofkeys1", base);
}

static void forge_root(struct forge *f)
{
    const struct disk_slot *s = &f->image.slot[0];
    uint8_t slot[32], wrap[32], commitment[32], ad[220] = {1};

    crypto_generichash(slot, 32, (const uint8_t *)KEYFILE, sizeof(KEYFILE) - 1, s->params.key_file.salt, 32);
    crypto_kdf_derive_from_key(wrap, 32, 1, "cofslot1", slot);
    crypto_kdf_derive_from_key(commitment, 32, 2, "cofslot1", slot);
    assert_memory_equal(commitment, s->commitment, 32);
    memcpy(ad + 4, f->image.head.id, 16);
    memcpy(ad + 20, s, 200);
    assert_int_equal(
        crypto_aead_xchacha20poly1305_ietf_decrypt(f->root, NULL, NULL, s->wrapped, 48, ad, sizeof(ad), s->nonce, wrap),
        0);
}

static struct forge *forge_open(void)
{
    struct forge *f = xcalloc(1, sizeof(*f));
    size_t n, head = 96 + 640, sealed;
    uint8_t *file = slurp(&n), mac[32], seed[32];
    const struct disk_wrap *w;
    crypto_sign_state sig;

    memcpy(&f->image, file, head);
    forge_root(f);
    forge_keys(f);
    crypto_generichash(mac, 32, file, head, f->head, 32);
    assert_memory_equal(mac, file + head, 32);
    f->body = xcalloc(1, KEYSTORE_FILE_MAX);
    sealed = le32_get(f->image.head.body_bytes) - 24;
    f->n = sealed - 16;
    assert_int_equal(n, head + 32 + 24 + sealed + 64);
    assert_int_equal(crypto_aead_xchacha20poly1305_ietf_decrypt(f->body, NULL, NULL, file + head + 56, sealed, file,
                                                                head + 32, file + head + 32, f->body_key),
                     0);
    w = &((const struct disk_body *)f->body)->seed;
    assert_int_equal(crypto_aead_xchacha20poly1305_ietf_decrypt(seed, NULL, NULL, w->sealed, 48,
                                                                (const uint8_t *)"coffer signing seed", 19, w->nonce,
                                                                f->wrap),
                     0);
    crypto_sign_seed_keypair(f->sign_public, f->sign, seed);
    crypto_sign_init(&sig);
    crypto_sign_update(&sig, file, n - 64);
    assert_int_equal(crypto_sign_final_verify(&sig, file + n - 64, f->sign_public), 0);
    free(file);
    return f;
}

static void forge_write(struct forge *f)
{
    size_t head = 96 + 640, n = head + 32 + 24 + f->n + 16;
    uint8_t *file = xmalloc(n + 64);
    crypto_sign_state sig;

    f->image.head.body_bytes = le32_make((uint32_t)(24 + f->n + 16));
    memcpy(file, &f->image, head);
    crypto_generichash(file + head, 32, file, head, f->head, 32);
    randombytes_buf(file + head + 32, 24);
    crypto_aead_xchacha20poly1305_ietf_encrypt(file + head + 56, NULL, f->body, f->n, file, head + 32, NULL,
                                               file + head + 32, f->body_key);
    crypto_sign_init(&sig);
    crypto_sign_update(&sig, file, n);
    crypto_sign_final_create(&sig, file + n, NULL, f->sign);
    spit(file, n + 64);
    free(file);
}

static void forge_free(struct forge *f)
{
    free(f->body);
    free(f);
}

static struct disk_volume *forge_volume(struct forge *f)
{
    return (struct disk_volume *)(f->body + sizeof(struct disk_body) + sizeof(struct disk_record));
}

/* The documented format is the one that is written, and is read again. */
static void test_forge_round_trip(void **state)
{
    struct keystore *k = populated();
    char *before = dump(k);
    struct forge *f = forge_open();
    uint8_t key[32], want[32], ad[173] = "coffer volume key";
    struct disk_volume *d = forge_volume(f);

    (void)state;
    volume_key(k, "a", want);
    memcpy(ad + 17, d->name, 132);
    memcpy(ad + 149, d->id, 16);
    ad[165] = 1; /* version; the epoch is 0 */
    assert_int_equal(crypto_aead_xchacha20poly1305_ietf_decrypt(key, NULL, NULL, d->key.sealed, 48, ad, sizeof(ad),
                                                                d->key.nonce, f->wrap),
                     0);
    assert_memory_equal(key, want, 32);
    f->image.head.compat = le32_make(0x80000001); /* of a later version: need not be known, and stays */
    forge_write(f);
    forge_free(f);
    k = reopened(k);
    check_dump(k, before);
    assert_int_equal(change_add(k), 0);
    f = forge_open();
    assert_int_equal(le32_get(f->image.head.compat), 0x80000001);
    forge_free(f);
    keystore_close(k);
    free(before);
}

/* Each lies behind authentication: who writes it knows the keys, and is still refused. */
static void test_forged_bodies(void **state)
{
    struct keystore *k = populated();
    struct forge *f = forge_open();
    struct disk_body *b = (struct disk_body *)f->body;
    struct disk_volume *d = forge_volume(f);
    struct disk_record *r = (struct disk_record *)(b + 1),
                       *second = (struct disk_record *)((uint8_t *)r + le32_get(r->bytes));
    struct disk_rule *rules = (struct disk_rule *)(d + 1);

    (void)state;
    assert_int_equal(keystore_check_body(f->body, f->n), 0);
    assert_int_equal(keystore_check_body(f->body, le32_get(b->bytes)), 0);
    assert_int_equal(keystore_check_body(f->body, le32_get(b->bytes) - 1), -EBADMSG);
#define FORGE(what, to)                                                                                                \
    do {                                                                                                               \
        __typeof__(what) was = what;                                                                                   \
        what = to;                                                                                                     \
        assert_int_equal(keystore_check_body(f->body, f->n), -EBADMSG);                                                \
        forge_write(f);                                                                                                \
        assert_int_equal(try_file(AGENT_SLOT_KEY_FILE, KEYFILE), -EBADMSG);                                            \
        what = was;                                                                                                    \
    } while (0)
    FORGE(b->bytes, le32_make(le32_get(b->bytes) - 1));
    FORGE(b->bytes, le32_make(le32_get(b->bytes) + 1));
    FORGE(b->bytes, le32_make(UINT32_MAX));
    FORGE(b->bytes, le32_make(0));
    FORGE(b->records, le32_make(1));
    FORGE(b->records, le32_make(3));
    FORGE(b->records, le32_make(UINT32_MAX));
    FORGE(b->zero[47], 1);
    FORGE(f->body[f->n - 1], 1);
    FORGE(r->type, le16_make(2));
    FORGE(r->zero[1], 1);
    FORGE(r->bytes, le32_make(0));
    FORGE(r->bytes, le32_make(7));
    FORGE(r->bytes, le32_make(le32_get(r->bytes) - 1));
    FORGE(r->bytes, le32_make(le32_get(r->bytes) + 1));
    FORGE(r->bytes, le32_make(UINT32_MAX));
    FORGE(second->bytes, le32_make(le32_get(second->bytes) + 1));
    FORGE(d->name[0], 'b'); /* two of one name */
    FORGE(d->name[0], 'c'); /* out of order */
    FORGE(d->name[0], 0);
    FORGE(d->name[1], '/');
    FORGE(d->name[131], 'x');
    FORGE(d->state, le32_make(3));
    FORGE(d->strict, le32_make(2));
    FORGE(d->attached, le32_make(2));
    FORGE(d->block_size, le32_make(4095));
    FORGE(d->profile, le32_make(2));
    FORGE(d->size_limit, le64_make(0));
    FORGE(d->log_segment, le64_make(1));
    FORGE(d->root_mode, le32_make(0100755));
    FORGE(d->key_version, le32_make(2));
    FORGE(d->key_epoch, le32_make(1));
    FORGE(d->rules, le32_make(2));
    FORGE(d->rules, le32_make(4));
    FORGE(d->rules, le32_make(UINT32_MAX));
    FORGE(rules->bytes, le16_make(0));
    FORGE(rules->bytes, le16_make(UINT16_MAX));
    FORGE(rules->deny, 2);
    FORGE(rules->zero, 1);
    FORGE(((char *)(rules + 1))[4], 0);
    FORGE(((char *)(rules + 1))[4], '1'); /* the second rule's text */
#undef FORGE
    forge_write(f);
    assert_int_equal(try_file(AGENT_SLOT_KEY_FILE, KEYFILE), 0);
    forge_free(f);
    keystore_close(k);
}

/* A wrapped key is bound to its volume's name and id. */
static void test_moved_keys(void **state)
{
    struct keystore *k = populated();
    struct forge *f = forge_open();
    struct disk_record *r = (struct disk_record *)(f->body + sizeof(struct disk_body));
    struct disk_volume *a = forge_volume(f), *b = (struct disk_volume *)((uint8_t *)r + le32_get(r->bytes) + 8);
    struct disk_wrap key = a->key;
    struct key *none = NULL;

    (void)state;
    assert_string_equal((char *)b->name, "b");
    a->key = b->key;
    forge_write(f);
    k = reopened(k);
    assert_int_equal(keystore_volume_key(k, "a", &none), -EBADMSG);
    assert_null(none);
    a->key = key;
    a->id[0] ^= 1;
    forge_write(f);
    k = reopened(k);
    assert_int_equal(keystore_volume_key(k, "a", &none), -EBADMSG);
    a->id[0] ^= 1;
    a->name[1] = '2';
    forge_write(f);
    k = reopened(k);
    assert_int_equal(keystore_volume_key(k, "a2", &none), -EBADMSG);
    a->name[1] = 0;
    forge_write(f);
    k = reopened(k);
    assert_int_equal(keystore_volume_key(k, "a", &none), 0);
    key_free(&none);
    keystore_close(k);
    forge_free(f);
}

/* Two slots of one kind: either opens, a third secret does not, a changed one says so. */
static void test_two_of_a_kind(void **state)
{
    static const char second[] = "another key file";
    struct keystore *k = populated();
    struct forge *f = forge_open();
    struct key *root = key_new();

    (void)state;
    memcpy(root->b, f->root, 32);
    assert_int_equal(
        slot_make(f->image.head.id, AGENT_SLOT_KEY_FILE, (const uint8_t *)second, 16, root, &f->image.slot[1]), 0);
    forge_write(f);
    keystore_lock(k);
    assert_int_equal(keystore_unlock(k, AGENT_SLOT_KEY_FILE, (const uint8_t *)second, 16), 0);
    assert_int_equal(unlock(k, AGENT_SLOT_KEY_FILE, KEYFILE), 0);
    assert_int_equal(keystore_unlock(k, AGENT_SLOT_KEY_FILE, (const uint8_t *)"Another key file", 16), -EKEYREJECTED);
    assert_int_equal(unlock(k, AGENT_SLOT_RECOVERY, "x"), -EKEYREJECTED);
    f->image.slot[0].wrapped[0] ^= 1;
    forge_write(f);
    assert_int_equal(unlock(k, AGENT_SLOT_KEY_FILE, KEYFILE), -EBADMSG);
    assert_int_equal(keystore_unlock(k, AGENT_SLOT_KEY_FILE, (const uint8_t *)second, 16), 0);
    key_free(&root);
    forge_free(f);
    keystore_close(k);
}

/* A MAC of the head under another key; signed with a key that is not the body's; a seed that is another one's. */
static void test_forged_signature(void **state)
{
    struct keystore *k = populated();
    struct forge *f = forge_open();
    uint8_t good[64], other[32];

    (void)state;
    f->head[0] ^= 1;
    forge_write(f);
    assert_int_equal(try_file(AGENT_SLOT_KEY_FILE, KEYFILE), -EBADMSG);
    f->head[0] ^= 1;
    memcpy(good, f->sign, 64);
    crypto_sign_keypair(other, f->sign);
    forge_write(f);
    assert_int_equal(try_file(AGENT_SLOT_KEY_FILE, KEYFILE), -EBADMSG);
    memcpy(f->sign, good, 64);
    ((struct disk_body *)f->body)->seed.sealed[0] ^= 1;
    forge_write(f);
    assert_int_equal(try_file(AGENT_SLOT_KEY_FILE, KEYFILE), -EBADMSG);
    forge_free(f);
    keystore_close(k);
}

/* A stranger makes a keystore of his own, and seals it to our recovery public key, which lies in our file: well formed,
 * opens with our recovery key, but is not signed by the key in our recovery text. */
static void test_sealed_by_someone_else(void **state)
{
    char ours[KEYSTORE_RECOVERY_MAX];
    struct keystore *k = made(AGENT_SLOT_KEY_FILE, ours);
    struct disk_slot slot;
    struct key *root = key_new();
    struct forge *f = forge_open();

    (void)state;
    slot = f->image.slot[1];
    forge_free(f);
    keystore_close(k);
    unlinkat(dir, KEYSTORE_FILE, 0);
    k = populated();
    f = forge_open();
    memcpy(root->b, f->root, 32);
    assert_int_equal(
        slot_make(f->image.head.id, AGENT_SLOT_RECOVERY, slot.params.recovery.public_key, 32, root, &f->image.slot[1]),
        0);
    forge_write(f);
    assert_int_equal(try_file(AGENT_SLOT_KEY_FILE, KEYFILE), 0);
    assert_int_equal(try_file(AGENT_SLOT_RECOVERY, ours), -EBADMSG);
    key_free(&root);
    forge_free(f);
    keystore_close(k);
}

/* --- limits --- */

/* Fills the body of f with n volumes of rules rules each, as if they had been added. */
static void forge_fill(struct forge *f, unsigned n, unsigned rules)
{
    struct disk_volume d = *forge_volume(f);
    size_t at = sizeof(struct disk_body), bytes = 8 + sizeof(d) + rules * (4 + 511);

    d.rules = le32_make(rules);
    for (unsigned i = 0; i < n; i++) {
        struct disk_record r = {.type = le16_make(1), .bytes = le32_make((uint32_t)bytes)};

        snprintf((char *)d.name, sizeof(d.name), "v%05u", i);
        memcpy(f->body + at, &r, 8);
        memcpy(f->body + at + 8, &d, sizeof(d));
        for (unsigned j = 0; j < rules; j++) {
            struct disk_rule rule = {.bytes = le16_make(511)};
            uint8_t *p = f->body + at + 8 + sizeof(d) + j * (4 + 511);

            memcpy(p, &rule, 4);
            memset(p + 4, 'a' + (int)j, 511);
        }
        at += bytes;
    }
    ((struct disk_body *)f->body)->records = le32_make(n);
    ((struct disk_body *)f->body)->bytes = le32_make((uint32_t)at);
    f->n = (at + BODY_UNIT - 1) / BODY_UNIT * BODY_UNIT;
}

static struct keystore *filled(unsigned n, unsigned rules)
{
    struct keystore *k;
    struct forge *f;

    unlinkat(dir, KEYSTORE_FILE, 0);
    k = made(AGENT_SLOT_KEY_FILE, NULL);
    assert_int_equal(add(k, "a"), 0);
    f = forge_open();
    forge_fill(f, n, rules);
    forge_write(f);
    forge_free(f);
    return reopened(k);
}

static void test_volume_limit(void **state)
{
    struct keystore *k = filled(KEYSTORE_VOLUMES_MAX - 1, 0);
    struct agent_volume v;
    struct forge *f;

    (void)state;
    assert_int_equal(add(k, "a"), 0);
    assert_int_equal(keystore_volumes(k), KEYSTORE_VOLUMES_MAX);
    assert_int_equal(add(k, "b"), -ENOSPC);
    assert_int_equal(add(k, "a"), -EEXIST);
    k = reopened(k);
    assert_int_equal(keystore_volumes(k), KEYSTORE_VOLUMES_MAX);
    assert_int_equal(keystore_volume_at(k, KEYSTORE_VOLUMES_MAX - 1, &v), 0);
    assert_string_equal(v.name, "v04094");
    assert_int_equal(keystore_volume_rm(k, "v04094"), 0);
    assert_int_equal(add(k, "b"), 0);
    f = forge_open();
    forge_fill(f, KEYSTORE_VOLUMES_MAX + 1, 0);
    forge_write(f);
    forge_free(f);
    assert_int_equal(try_file(AGENT_SLOT_KEY_FILE, KEYFILE), -EBADMSG);
    keystore_close(k);
}

static void test_file_limit(void **state)
{
    const unsigned record = 8 + 288 + 8 * 515, n = (KEYSTORE_FILE_MAX - 4096 - 128) / record;
    struct keystore *k = filled(n, 8);
    char name[16];
    struct stat st;
    int rc = 0;

    (void)state;
    for (int i = 0; rc == 0 && i < 100; i++) {
        snprintf(name, sizeof(name), "a%02d", i);
        rc = add(k, name);
    }
    assert_int_equal(rc, -ENOSPC);
    assert_int_equal(fstatat(dir, KEYSTORE_FILE, &st, 0), 0);
    assert_true(st.st_size <= KEYSTORE_FILE_MAX && st.st_size > KEYSTORE_FILE_MAX - 8192);
    rc = (int)keystore_volumes(k);
    k = reopened(k);
    assert_int_equal(keystore_volumes(k), rc);
    assert_int_equal(keystore_volume_rm(k, "v00000"), 0);
    assert_int_equal(add(k, name), 0);
    keystore_close(k);
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_life),
        TEST(test_init_refused),
        TEST(test_init_race),
        TEST(test_key_file),
        TEST(test_recovery),
        TEST(test_recovery_typos),
        TEST(test_recovery_too_short),
        TEST(test_recovery_of_another),
        TEST(test_every_byte),
        TEST(test_every_byte_of_a_passphrase_slot),
        TEST(test_mixed),
        TEST(test_lengths),
        TEST(test_no_file),
        TEST(test_bounds),
        TEST(test_volumes),
        TEST(test_volume_fields),
        TEST(test_rules),
        TEST(test_nothing_in_the_clear),
        TEST(test_failures),
        TEST(test_deaths),
        TEST(test_init_deaths_and_failures),
        TEST(test_no_room),
        TEST(test_death_in_write),
        TEST(test_old_blocks),
        TEST(test_old_blocks_after_death),
        TEST(test_stale_link),
        TEST(test_forge_round_trip),
        TEST(test_forged_bodies),
        TEST(test_moved_keys),
        TEST(test_two_of_a_kind),
        TEST(test_forged_signature),
        TEST(test_sealed_by_someone_else),
        TEST(test_volume_limit),
        TEST(test_file_limit),
    };

    if (secmem_init() < 0)
        return 1;
    return cmocka_run_group_tests_name("keystore", tests, NULL, NULL);
}
