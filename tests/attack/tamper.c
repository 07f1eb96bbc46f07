/*
 * tamper.c - somebody writes the backing files: between mounts and under one.
 *
 * A volume with known content is written three times over, each file then having other content; the images of all three
 * are kept. Then each 4 KiB unit of `data` and `log` is damaged in each of several ways: flip a bit, change a byte,
 * zero (as a punched hole reads), random bytes, swap with a unit of the same or of the other file, put back what the
 * unit held in an older image and the volume is opened and read in full. Every answer must be the newest content, or an
 * error: -EIO for what is damaged, a refusal of the whole volume where its root or its log is. Never other content, an
 * older one, a name that is missing without an error, a crash or a hang. Files cut short are tried too.
 *
 * Each damaged image is then repaired: what opened must open, the check of it must be clean, what reads must be the
 * newest content, what does not (an error, or a name that is gone) must have been listed; and nothing may be listed where
 * nothing is missing.
 *
 * The same under a mounted volume whose cache is small: there what is put right again must be readable again.
 *
 * For the log a volume is left as by a killed process, with records behind the last flush: then the tree is a prefix of
 * history that holds all that was synced, or the volume is refused.
 *
 *     tamper [--seed N] [--places N]      --places: so many random cases of each part, 0 (the default) all
 */
#include "fs/base/secmem.h"
#include "tests/model/fsmodel.h"

#include <getopt.h>
#include <signal.h>
#include <unistd.h>

#define UNIT 4096u

static uint64_t arg_seed = 1, arg_places;
static struct key *volume_key;
static const uint8_t volume_id[VOLUME_ID_BYTES] = "tampered-volume";
static char repro[200] = "setup";
static struct rng rng;
static bool repaired; /* names may be missing now */
static uint64_t repairs, repairs_refused, listed;
static uint64_t cases, intact, partial, refused, failures, noticed;

static void on_signal(int sig)
{
    static const char text[] = "\nFAIL crash or hang (signal) in: tamper ";
    ssize_t n = write(STDOUT_FILENO, text, sizeof(text) - 1);

    n += write(STDOUT_FILENO, repro, strlen(repro));
    n += write(STDOUT_FILENO, "\n", 1);
    (void)n;
    signal(sig, SIG_DFL);
    raise(sig == SIGALRM ? SIGABRT : sig);
}

__attribute__((format(printf, 1, 2))) static void failed(const char *fmt, ...)
{
    va_list ap;

    if (++failures > 30)
        return;
    printf("FAIL tamper %s: ", repro);
    va_start(ap, fmt);
    vprintf(fmt, ap);
    va_end(ap);
    printf("\n");
    fflush(stdout);
}

static void die(const char *what, int rc)
{
    printf("FAIL tamper %s: %s: %s\n", repro, what, strerror(-rc));
    exit(1);
}

static void on_damage(void *ctx, const char *what)
{
    (void)ctx;
    (void)what;
    noticed++;
}

static void on_finding(void *ctx, const char *text)
{
    (void)text;
    ++*(unsigned *)ctx;
}

/* --- the volume --- */

static int open_images(struct image *const image[2], struct volume **ret_v)
{
    struct volume_options o = {.cache_bytes = 64 << 10, .mount_id = 5, .on_damage = on_damage};

    return volume_open(mstore_new(image[0], NULL, NULL, 0), mstore_new(image[1], NULL, NULL, 1), volume_key, volume_id,
                       &o, ret_v);
}

static void format_images(struct image *image[2])
{
    struct volume_params p = {.block_size = 4096, .size_limit = 64 << 20, .log_segment = 256 << 10, .root_mode = 0755};
    struct store *data, *log;
    int rc;

    memcpy(p.id, volume_id, sizeof(p.id));
    image[0] = image_new(NULL);
    image[1] = image_new(NULL);
    data = mstore_new(image[0], NULL, NULL, 0);
    log = mstore_new(image[1], NULL, NULL, 1);
    rc = volume_format(data, log, volume_key, &p);
    if (rc < 0)
        die("format", rc);
    data->ops->close(data);
    log->ops->close(log);
}

#define DIRS  6
#define FILES 26 /* in each directory */

static uint64_t file_size(unsigned d, unsigned f)
{
    static const uint64_t sizes[] = {0, 1, 100, 900, 2000, 2048, 2049, 4096, 5000, 8192, 12345, 30000};

    if (f == 0)
        return d == 0 ? 300000 : 65536;
    return f < 8 + d ? sizes[(f + d) % ARRAY_LEN(sizes)] : 20 + 11 * f;
}

static void file_content(unsigned d, unsigned f, unsigned version, uint8_t *buf, uint64_t size)
{
    struct rng r = {hash_mix(d * 1000 + f, version)};

    rng_fill(&r, buf, size);
}

static void must(const char *what, ssize_t rc)
{
    if (rc < 0)
        die(what, (int)rc);
}

/* Writes version of every third, half or all files. Version 1 makes them. */
static void write_version(struct volume *v, unsigned version)
{
    uint8_t *buf = xmalloc(1 << 20);
    char name[40];
    struct vattr dir, a;

    for (unsigned d = 0; d < DIRS; d++) {
        snprintf(name, sizeof(name), "directory-%u", d);
        if (version == 1)
            must("mkdir", vol_mknod(v, VOLUME_ROOT_INO, name, S_IFDIR | 0755, 0, 1, 1, &dir));
        else
            must("lookup", vol_lookup(v, VOLUME_ROOT_INO, name, &dir));
        for (unsigned f = 0; f < FILES; f++) {
            snprintf(name, sizeof(name), "file-%u-%u", d, f);
            if (version == 1)
                must("mknod", vol_mknod(v, dir.ino, name, S_IFREG | 0644, 0, 1, 1, &a));
            else
                must("lookup", vol_lookup(v, dir.ino, name, &a));
            file_content(d, f, version, buf, file_size(d, f));
            must("write", vol_write(v, a.ino, 0, buf, file_size(d, f)));
            if (f % 5 == 0)
                must("setxattr", vol_setxattr(v, a.ino, "user.version", &version, sizeof(version), 0));
            vol_forget(v, a.ino, 1);
        }
        vol_forget(v, dir.ino, 1);
    }
    free(buf);
}

/* What reading all of a volume came to. */
struct reading {
    unsigned errors; /* answers that were an error */
    unsigned wrong;
    unsigned good; /* files read in full */
};

static void read_error(struct reading *r, const char *what, const char *name, ssize_t rc)
{
    r->errors++;
    if (rc == -EIO || (repaired && (rc == -ENOENT || rc == -ENODATA)))
        return;
    r->wrong++;
    failed("%s of %s: %zd (%s), expected success or -EIO", what, name, rc, rc < 0 ? strerror((int)-rc) : "?");
}

static void read_file(struct volume *v, struct reading *r, uint64_t dir, unsigned d, unsigned f, unsigned version,
                      uint8_t *have, uint8_t *want)
{
    uint64_t size = file_size(d, f);
    unsigned value = 0;
    struct vattr a;
    char name[40];
    ssize_t n;
    int rc;

    snprintf(name, sizeof(name), "file-%u-%u", d, f);
    rc = vol_lookup(v, dir, name, &a);
    if (rc < 0) {
        read_error(r, "lookup", name, rc);
        return;
    }
    if (a.size != size || a.mode != (S_IFREG | 0644) || a.uid != 1 || a.nlink != 1) {
        r->wrong++;
        failed("attributes of %s are wrong: size %llu mode %o", name, (unsigned long long)a.size, a.mode);
    }
    file_content(d, f, version, want, size);
    n = vol_read(v, a.ino, 0, have, 1 << 20);
    if (n < 0)
        read_error(r, "read", name, n);
    else if ((uint64_t)n != size || memcmp(have, want, size) != 0) {
        r->wrong++;
        failed("content of %s is wrong (%zd bytes)", name, n);
    } else {
        r->good++;
    }
    /* A large file in pieces: what is intact stays readable. */
    if (n < 0 && size > 65536) {
        for (uint64_t off = 0; off < size; off += UNIT) {
            n = vol_read(v, a.ino, off, have, UNIT);
            if (n >= 0 && ((uint64_t)n != MIN(UNIT, size - off) || memcmp(have, want + off, (size_t)n) != 0)) {
                r->wrong++;
                failed("content of %s at %llu is wrong", name, (unsigned long long)off);
            }
        }
    }
    if (f % 5 == 0) {
        n = vol_getxattr(v, a.ino, "user.version", &value, sizeof(value));
        if (n < 0)
            read_error(r, "getxattr", name, n);
        else if (value != version) {
            r->wrong++;
            failed("xattr of %s is wrong: %u", name, value);
        }
    }
    vol_forget(v, a.ino, 1);
}

static int count_entry(void *ctx, const char *name, uint64_t ino, uint32_t type, uint64_t cookie, const struct vattr *a)
{
    (void)ino, (void)type, (void)cookie, (void)a;
    *(unsigned *)ctx += strncmp(name, "file-", 5) == 0;
    return 0;
}

/* Reads everything and compares it with version. */
static struct reading read_all(struct volume *v, unsigned version)
{
    static uint8_t have[1 << 20], want[1 << 20];
    struct reading r = {0};
    struct vattr dir;
    char name[40];
    int rc;

    for (unsigned d = 0; d < DIRS; d++) {
        unsigned n = 0;

        snprintf(name, sizeof(name), "directory-%u", d);
        rc = vol_lookup(v, VOLUME_ROOT_INO, name, &dir);
        if (rc < 0) {
            read_error(&r, "lookup", name, rc);
            continue;
        }
        rc = vol_readdir(v, dir.ino, 0, d % 2, count_entry, &n);
        if (rc < 0)
            read_error(&r, "readdir", name, rc);
        else if (repaired ? n > FILES : n != FILES) {
            r.wrong++;
            failed("%s lists %u names", name, n);
        }
        for (unsigned f = 0; f < FILES; f++)
            read_file(v, &r, dir.ino, d, f, version, have, want);
        vol_forget(v, dir.ino, 1);
    }
    return r;
}

/* --- damage --- */

enum damage { FLIP, BYTE, ZERO, RANDOM, SWAP, SWAP_OTHER, OLDER, OLDEST, DAMAGES };
static const char *const damage_names[] = {"flip a bit", "change a byte",     "zero",          "random",
                                           "swap",       "swap across files", "older content", "oldest content"};

/* A unit is used, or was, when some image has bytes there. */
static bool unit_used(struct image *const images[3][2], int file, uint64_t unit)
{
    for (int i = 0; i < 3; i++)
        if (images[i][file] && unit < IMAGE_PAGES && image_page(images[i][file], unit) != image_zero)
            return true;
    return false;
}

/* With --places: whether this one of all cases is among the random ones. */
static bool chosen(uint64_t all)
{
    return arg_places == 0 || rng_below(&rng, all) < arg_places;
}

static uint64_t used_units(struct image *const images[3][2], int file)
{
    uint64_t n = 0;

    for (uint64_t unit = 0; unit < images[2][file]->size / UNIT; unit++)
        n += unit_used(images, file, unit);
    return n;
}

/* Damages a unit of file in target. False when that changes nothing. */
static bool damage_unit(struct image *const target[2], struct image *const images[3][2], int file, uint64_t unit,
                        enum damage how)
{
    uint8_t was[UNIT], buf[UNIT], other[UNIT];
    uint64_t partner = 0;
    int partner_file = how == SWAP_OTHER ? !file : file;

    image_read(target[file], unit * UNIT, was, UNIT);
    memcpy(buf, was, UNIT);
    switch (how) {
    case FLIP:
        buf[rng_below(&rng, UNIT)] ^= (uint8_t)(1u << rng_below(&rng, 8));
        break;
    case BYTE:
        buf[rng_below(&rng, UNIT)] += (uint8_t)(1 + rng_below(&rng, 255));
        break;
    case ZERO:
        memset(buf, 0, UNIT);
        break;
    case RANDOM:
        rng_fill(&rng, buf, UNIT);
        break;
    case SWAP:
    case SWAP_OTHER:
        for (int tries = 0; tries < 2000; tries++) {
            partner = rng_below(&rng, target[partner_file]->size / UNIT);
            if (partner_file == 0 && tries < 1900)
                partner = rng_below(&rng, 2048);
            if (unit_used(images, partner_file, partner))
                break;
        }
        image_read(target[partner_file], partner * UNIT, buf, UNIT);
        break;
    case OLDER:
    case OLDEST:
        if (!images[how == OLDER ? 1 : 0][file])
            return false;
        image_read(images[how == OLDER ? 1 : 0][file], unit * UNIT, buf, UNIT);
        break;
    default:
        break;
    }
    if (memcmp(buf, was, UNIT) == 0)
        return false;
    memcpy(other, was, UNIT);
    if (how == SWAP || how == SWAP_OTHER)
        image_write(target[partner_file], partner * UNIT, other, UNIT);
    image_write(target[file], unit * UNIT, buf, UNIT);
    return true;
}

/* --- part 1: between mounts --- */

/* Some changes on a damaged volume, whatever they answer; then what was not touched is right or an error. */
static void change_and_verify(struct image *const image[2], struct volume *v)
{
    struct vattr a;
    uint8_t buf[9000];

    memset(buf, 'x', sizeof(buf));
    if (vol_mknod(v, VOLUME_ROOT_INO, "new", S_IFREG | 0600, 0, 0, 0, &a) == 0) {
        vol_write(v, a.ino, 0, buf, sizeof(buf));
        vol_fsync(v, a.ino, false);
        vol_forget(v, a.ino, 1);
    }
    vol_unlink(v, VOLUME_ROOT_INO, "new");
    if (rng_chance(&rng, 2))
        volume_close(v);
    else
        volume_abandon(v);
    if (open_images(image, &v) < 0)
        return;
    read_all(v, 3);
    volume_abandon(v);
}

static void on_listed(void *ctx, const char *text)
{
    (void)text;
    ++*(unsigned *)ctx;
}

/* before: what reading came to, NULL when the volume did not open; damaged: something was found wrong then. */
static void verify_repair(struct image *const image[2], const struct reading *before, bool damaged)
{
    unsigned lines = 0, findings = 0;
    struct volume_report report = {.line = on_listed, .ctx = &lines};
    struct volume *v = NULL;
    struct reading r;
    int rc;

    rc = volume_repair(mstore_new(image[0], NULL, NULL, 0), mstore_new(image[1], NULL, NULL, 1), volume_key, volume_id,
                       &(struct volume_options){0}, &report);
    if (rc < 0) {
        repairs_refused++;
        if (before || (rc != -EIO && rc != -EKEYREJECTED))
            failed("repair: %s", strerror(-rc));
        return;
    }
    repairs++;
    listed += lines;
    if ((unsigned)rc != lines)
        failed("repair returned %d, and listed %u lines", rc, lines);
    if (before && !damaged && lines)
        failed("repair listed %u lines, and nothing was missing", lines);
    rc = open_images(image, &v);
    if (rc < 0) {
        failed("open after repair: %s", strerror(-rc));
        return;
    }
    rc = volume_check(v, true, on_finding, &findings);
    if (rc != 0)
        failed("check after repair: %d findings", rc);
    repaired = true;
    r = read_all(v, 3);
    repaired = false;
    if (r.errors && lines == 0)
        failed("%u reads fail after the repair, which listed nothing", r.errors);
    if (before && r.good < before->good)
        failed("%u files read in full after the repair, %u before it", r.good, before->good);
    volume_abandon(v);
}

static void verify_images(struct image *const image[2])
{
    struct image *const copy[2] = {image_copy(image[0]), image_copy(image[1])};
    uint64_t noticed_before = noticed;
    struct volume *v = NULL;
    unsigned lines = 0;
    struct reading r;
    int rc;

    alarm(60);
    cases++;
    rc = open_images(image, &v);
    if (rc < 0) {
        refused++;
        if (rc != -EIO && rc != -EKEYREJECTED)
            failed("open: %s", strerror(-rc));
        verify_repair(copy, NULL, true);
        image_free(copy[0]);
        image_free(copy[1]);
        return;
    }
    r = read_all(v, 3);
    if (r.errors)
        partial++;
    else
        intact++;
    rc = volume_check(v, true, on_finding, &lines);
    if (r.errors && rc == 0)
        failed("%u reads gave errors, and the check finds nothing", r.errors);
    if (rng_chance(&rng, 8))
        change_and_verify(image, v);
    else
        volume_abandon(v);
    verify_repair(copy, &r, noticed > noticed_before || r.errors || rc);
    image_free(copy[0]);
    image_free(copy[1]);
}

static void between_mounts(struct image *const images[3][2])
{
    static const uint64_t cuts[] = {
        0, 1, 512, 4096, 8192, 65536, 1 << 20, 2 << 20, 32 << 20, (32 << 20) + 4096, (64 << 20) - 512};
    uint64_t all = DAMAGES * (used_units(images, 0) + used_units(images, 1));
    struct image *target[2];

    for (int file = 0; file < 2; file++)
        for (uint64_t unit = 0; unit < images[2][file]->size / UNIT; unit++) {
            if (!unit_used(images, file, unit))
                continue;
            for (enum damage how = 0; how < DAMAGES; how++) {
                if (!chosen(all))
                    continue;
                snprintf(repro, sizeof(repro), "--seed %llu: %s unit %llu: %s", (unsigned long long)arg_seed,
                         file ? "log" : "data", (unsigned long long)unit, damage_names[how]);
                target[0] = image_new(images[2][0]);
                target[1] = image_new(images[2][1]);
                if (damage_unit(target, images, file, unit, how))
                    verify_images(target);
                image_free(target[0]);
                image_free(target[1]);
            }
        }
    for (unsigned k = 0; k < 2 * ARRAY_LEN(cuts); k++) {
        int file = k % 2;

        if (cuts[k / 2] >= images[2][file]->size)
            continue;
        snprintf(repro, sizeof(repro), "%s cut to %llu bytes", file ? "log" : "data", (unsigned long long)cuts[k / 2]);
        target[0] = image_new(images[2][0]);
        target[1] = image_new(images[2][1]);
        image_truncate(target[file], cuts[k / 2]);
        verify_images(target);
        image_free(target[0]);
        image_free(target[1]);
    }
}

/* --- part 2: under a mounted volume --- */

static void under_mount(struct image *const images[3][2])
{
    struct image *live[2] = {image_copy(images[2][0]), image_copy(images[2][1])};
    uint64_t before = failures, all = used_units(images, 0);
    struct volume *v = NULL;
    int rc = open_images(live, &v);

    if (rc < 0)
        die("open", rc);
    for (uint64_t unit = 0; unit < live[0]->size / UNIT && failures - before < 10; unit++) {
        enum damage how = (enum damage)rng_below(&rng, DAMAGES);
        uint8_t was[UNIT];
        struct image *target[2] = {live[0], live[1]};
        struct reading r;

        if (!unit_used(images, 0, unit) || how == SWAP || how == SWAP_OTHER || !chosen(all))
            continue;
        snprintf(repro, sizeof(repro), "--seed %llu: mounted: data unit %llu: %s", (unsigned long long)arg_seed,
                 (unsigned long long)unit, damage_names[how]);
        image_read(live[0], unit * UNIT, was, UNIT);
        if (!damage_unit(target, images, 0, unit, how))
            continue;
        alarm(60);
        cases++;
        r = read_all(v, 3);
        if (r.errors)
            partial++;
        else
            intact++;
        image_write(live[0], unit * UNIT, was, UNIT);
        if (!r.errors)
            continue;
        r = read_all(v, 3);
        if (r.errors)
            failed("put right again, %u reads still fail", r.errors);
    }
    volume_abandon(v);
    image_free(live[0]);
    image_free(live[1]);
}

/* --- part 3: records that no checkpoint contains yet --- */

#define STEPS  60
#define SYNCED 40 /* steps below this were made durable, and later records say so */

static void step_name(unsigned k, char name[32])
{
    snprintf(name, 32, "step-%02u", k);
}

static void run_steps(struct volume *v, unsigned from, unsigned to)
{
    static uint8_t buf[40000];
    struct vattr a;
    char name[32];

    for (unsigned k = from; k < to; k++) {
        uint64_t size = k % 3 == 0 ? 9000 + 500 * k : 300 + 30 * k;

        step_name(k, name);
        must("mknod", vol_mknod(v, VOLUME_ROOT_INO, name, S_IFREG | 0600, 0, 0, 0, &a));
        file_content(50, k, 1, buf, size);
        must("write", vol_write(v, a.ino, 0, buf, size));
        vol_forget(v, a.ino, 1);
        if (k + 1 == SYNCED || k % 7 == 6)
            if (k < SYNCED)
                must("fsync", vol_fsync(v, a.ino, false));
    }
}

/* The tree is that after some number of whole or half steps: names 0 .. n - 1, all written but perhaps the last. */
static void verify_steps(struct volume *v)
{
    static uint8_t have[40000], want[40000];
    unsigned last = 0;
    struct vattr a;
    char name[32];
    bool gap = false, errors = false;

    for (unsigned k = 0; k < STEPS; k++) {
        uint64_t size = k % 3 == 0 ? 9000 + 500 * k : 300 + 30 * k;
        ssize_t n;
        int rc;

        step_name(k, name);
        rc = vol_lookup(v, VOLUME_ROOT_INO, name, &a);
        if (rc == -EIO) {
            errors = true;
            continue;
        }
        if (rc == -ENOENT) {
            gap = true;
            continue;
        }
        if (rc < 0 || gap) {
            failed("lookup of %s: %s, a name before it is missing: %d", name, strerror(-rc), gap);
            return;
        }
        last = k + 1;
        file_content(50, k, 1, want, size);
        n = vol_read(v, a.ino, 0, have, sizeof(have));
        vol_forget(v, a.ino, 1);
        if (n == -EIO) {
            errors = true;
            continue;
        }
        if (n == 0 && k >= SYNCED) {
            gap = true; /* the write was behind the end of history */
            continue;
        }
        if (n != (ssize_t)size || memcmp(have, want, size) != 0)
            failed("content of %s is wrong (%zd bytes)", name, n);
    }
    if (last < SYNCED && !errors)
        failed("only %u steps are left, %u were synced", last, SYNCED);
    if (errors)
        partial++;
    else
        intact++;
}

static void unfinished_log(void)
{
    struct image *images[3][2] = {{0}};
    struct image *base[2];
    struct volume *v = NULL;
    uint64_t all;
    int rc;

    format_images(base);
    rc = open_images(base, &v);
    if (rc < 0)
        die("open", rc);
    images[0][0] = image_copy(base[0]);
    images[0][1] = image_copy(base[1]);
    run_steps(v, 0, SYNCED / 2);
    images[1][0] = image_copy(base[0]);
    images[1][1] = image_copy(base[1]);
    run_steps(v, SYNCED / 2, STEPS);
    volume_abandon(v);
    images[2][0] = base[0];
    images[2][1] = base[1];
    all = DAMAGES * (used_units(images, 0) + used_units(images, 1));
    for (int file = 0; file < 2; file++)
        for (uint64_t unit = 0; unit < images[2][file]->size / UNIT; unit++) {
            if (!unit_used(images, file, unit))
                continue;
            for (enum damage how = 0; how < DAMAGES; how++) {
                struct image *target[2] = {image_new(base[0]), image_new(base[1])};

                snprintf(repro, sizeof(repro), "--seed %llu: unfinished log: %s unit %llu: %s",
                         (unsigned long long)arg_seed, file ? "log" : "data", (unsigned long long)unit,
                         damage_names[how]);
                if (chosen(all) && damage_unit(target, images, file, unit, how)) {
                    alarm(60);
                    cases++;
                    rc = open_images(target, &v);
                    if (rc == 0) {
                        verify_steps(v);
                        volume_abandon(v);
                    } else {
                        refused++;
                        if (rc != -EIO)
                            failed("open: %s", strerror(-rc));
                    }
                }
                image_free(target[0]);
                image_free(target[1]);
            }
        }
    for (int i = 0; i < 3; i++)
        for (int file = 0; file < 2; file++)
            image_free(images[i][file]);
}

/* --- main --- */

static void make_images(struct image *images[3][2])
{
    struct image *live[2];
    struct volume *v = NULL;

    format_images(live);
    for (unsigned version = 1; version <= 3; version++) {
        int rc = open_images(live, &v);

        if (rc < 0)
            die("open", rc);
        write_version(v, version);
        rc = volume_close(v);
        if (rc < 0)
            die("close", rc);
        images[version - 1][0] = image_copy(live[0]);
        images[version - 1][1] = image_copy(live[1]);
    }
    image_free(live[0]);
    image_free(live[1]);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"seed", 1, 0, 's'}, {"places", 1, 0, 'p'}, {0, 0, 0, 0}};
    static const int signals[] = {SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL, SIGALRM};
    struct image *images[3][2];
    int c;

    while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (c == 's') {
            arg_seed = strtoull(optarg, NULL, 0);
        } else if (c == 'p') {
            arg_places = strtoull(optarg, NULL, 0);
        } else {
            fprintf(stderr, "usage: tamper [--seed N] [--places N]\n");
            return 2;
        }
    }
    if (secmem_init() < 0 || !(volume_key = key_new())) {
        fprintf(stderr, "tamper: no locked memory\n");
        return 1;
    }
    memset(volume_key->b, 0x77, sizeof(volume_key->b));
    for (size_t k = 0; k < ARRAY_LEN(signals); k++)
        signal(signals[k], on_signal);
    rng.s = arg_seed;
    make_images(images);
    between_mounts(images);
    under_mount(images);
    unfinished_log();
    alarm(0);
    printf("tamper: %llu repaired (%llu lines of what was lost), %llu beyond repair\n", (unsigned long long)repairs,
           (unsigned long long)listed, (unsigned long long)repairs_refused);
    printf("tamper: %llu cases: %llu read in full, %llu in part, %llu refused; %llu lines of damage; failures %llu\n",
           (unsigned long long)cases, (unsigned long long)intact, (unsigned long long)partial,
           (unsigned long long)refused, (unsigned long long)noticed, (unsigned long long)failures);
    for (int i = 0; i < 3; i++)
        for (int file = 0; file < 2; file++)
            image_free(images[i][file]);
    key_free(&volume_key);
    return failures ? 1 : 0;
}
