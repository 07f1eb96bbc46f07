/*
 * scale.c - a volume of many files through the engine, without FUSE: makes it, then times opening it and operations on
 * it, and says what memory that takes.
 *
 *     scale make DIR --files N [--bytes N]     N files of so many bytes (0), 1000 in a directory
 *     scale measure DIR --files N [--ops N]    open, lookups, creates, reads, writes and unlinks in random places,
 * close scale compare DIR --files N              makes and measures a volume of 20000 files and one of N, and compares;
 * fails when the large one opens in more than 1 s, costs more than twice as much an operation, or takes more memory
 * than --rss MiB (48)
 *
 * DIR holds `data` and `log`; the key is fixed: this is for measuring only.
 */
#include "coffer/volume.h"
#include "fs/base/base.h"
#include "fs/base/secmem.h"

#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define A_DIRECTORY 1000
#define SMALL       20000

static const uint8_t volume_id[VOLUME_ID_BYTES] = "scale-volume";
static uint64_t arg_files = 10000000, arg_bytes, arg_ops = 20000, arg_rss = 48;
static struct key *key;

__attribute__((format(printf, 1, 2), noreturn)) static void die(const char *fmt, ...)
{
    va_list ap;

    fputs("scale: ", stderr);
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fputc('\n', stderr);
    exit(1);
}

static void must(int64_t rc, const char *what)
{
    if (rc < 0)
        die("%s: %s", what, strerror((int)-rc));
}

/* kB, from /proc/self/status. */
static uint64_t memory(const char *field)
{
    FILE *f = fopen("/proc/self/status", "r");
    char line[200];
    unsigned long long kb = 0;

    while (f && fgets(line, sizeof(line), f))
        if (strncmp(line, field, strlen(field)) == 0)
            sscanf(line + strlen(field), ": %llu", &kb);
    if (f)
        fclose(f);
    return kb;
}

static struct store *file_store(const char *dir, const char *name, bool fresh)
{
    char *path = xasprintf("%s/%s", dir, name);
    int fd = open(path, O_RDWR | O_CLOEXEC | (fresh ? O_CREAT | O_TRUNC : 0), 0600);

    if (fd < 0)
        die("%s: %s", path, strerror(errno));
    free(path);
    return store_fd_take(fd);
}

static struct volume *open_volume(const char *dir)
{
    struct volume_options o = {.background = true, .mount_id = 1};
    struct volume *v;

    must(volume_open(file_store(dir, "data", false), file_store(dir, "log", false), key, volume_id, &o, &v), "open");
    return v;
}

/* --- making --- */

static void make(const char *dir)
{
    struct volume_params p = {.block_size = 4096, .size_limit = 1ull << 40, .root_mode = 0755};
    struct store *data, *log;
    struct volume *v;
    struct vattr d = {0}, a;
    int64_t start = mono_ns();
    uint8_t *content = xcalloc(1, arg_bytes + 1);
    char name[32];

    memcpy(p.id, volume_id, sizeof(p.id));
    if (mkdir(dir, 0700) < 0 && errno != EEXIST)
        die("%s: %s", dir, strerror(errno));
    data = file_store(dir, "data", true);
    log = file_store(dir, "log", true);
    must(volume_format(data, log, key, &p), "format");
    data->ops->close(data);
    log->ops->close(log);
    v = open_volume(dir);
    for (uint64_t n = 0; n < arg_files; n++) {
        if (n % A_DIRECTORY == 0) {
            if (n)
                vol_forget(v, d.ino, 1);
            snprintf(name, sizeof(name), "d%llu", (unsigned long long)(n / A_DIRECTORY));
            must(vol_mknod(v, VOLUME_ROOT_INO, name, S_IFDIR | 0755, 0, 0, 0, &d), "mkdir");
        }
        snprintf(name, sizeof(name), "f%llu", (unsigned long long)n);
        must(vol_mknod(v, d.ino, name, S_IFREG | 0644, 0, 0, 0, &a), "mknod");
        if (arg_bytes)
            must(vol_write(v, a.ino, 0, content, arg_bytes), "write");
        vol_forget(v, a.ino, 1);
    }
    free(content);
    must(volume_close(v), "close");
    printf("made %llu files in %.1f s, peak memory %llu MiB\n", (unsigned long long)arg_files,
           (double)(mono_ns() - start) / 1e9, (unsigned long long)memory("VmHWM") / 1024);
}

/* --- measuring --- */

enum what { OPEN, FAR, LOOKUP, CREATE, WRITE, READ, UNLINK, CLOSE, RSS, WHATS };
static const char *const units[] = {"s", "us", "us", "us", "us", "us", "us", "s", "MiB"};
static const char *const texts[] = {"open",       "lookup (all)", "lookup", "create", "write 4 KiB",
                                    "read 4 KiB", "unlink",       "close",  "memory"};

static uint64_t random_state = 88172645463325252ull;

static uint64_t random_below(uint64_t n)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % n;
}

static void place(struct volume *v, uint64_t file, struct vattr *ret_dir)
{
    char name[32];

    snprintf(name, sizeof(name), "d%llu", (unsigned long long)(file / A_DIRECTORY));
    must(vol_lookup(v, VOLUME_ROOT_INO, name, ret_dir), "lookup");
    vol_forget(v, ret_dir->ino, 1);
}

static double micros(int64_t start, uint64_t n)
{
    return (double)(mono_ns() - start) / 1e3 / (double)n;
}

/* Looks up random ones of the n files from `first` on; us for each. */
static double lookups(struct volume *v, uint64_t first, uint64_t n)
{
    int64_t start = mono_ns();
    struct vattr d, a;
    char name[32];

    for (uint64_t k = 0; k < arg_ops; k++) {
        uint64_t file = first + random_below(n);

        place(v, file, &d);
        snprintf(name, sizeof(name), "f%llu", (unsigned long long)file);
        must(vol_lookup(v, d.ino, name, &a), "lookup");
        vol_forget(v, a.ino, 1);
    }
    return micros(start, arg_ops);
}

/* What is worked on is SMALL files in either volume; lookups among all of a large one miss every cache. */
static void measure(const char *dir, uint64_t files, double ret[WHATS])
{
    uint64_t first = files > SMALL ? (files - SMALL) / 2 / A_DIRECTORY * A_DIRECTORY : 0;
    struct vattr *made = xcalloc(arg_ops, sizeof(*made)), d;
    uint8_t block[4096] = {0};
    int64_t start = mono_ns();
    struct volume *v = open_volume(dir);
    char name[32];

    ret[OPEN] = (double)(mono_ns() - start) / 1e9;
    ret[FAR] = lookups(v, 0, files);
    ret[LOOKUP] = lookups(v, first, SMALL);
    start = mono_ns();
    for (uint64_t n = 0; n < arg_ops; n++) {
        place(v, first + random_below(SMALL), &d);
        snprintf(name, sizeof(name), "new%llu", (unsigned long long)n);
        must(vol_mknod(v, d.ino, name, S_IFREG | 0644, 0, 0, 0, &made[n]), "mknod");
        made[n].rdev = (uint32_t)d.ino;
    }
    ret[CREATE] = micros(start, arg_ops);
    start = mono_ns();
    for (uint64_t n = 0; n < arg_ops; n++)
        must(vol_write(v, made[n].ino, 0, block, sizeof(block)), "write");
    ret[WRITE] = micros(start, arg_ops);
    start = mono_ns();
    for (uint64_t n = 0; n < arg_ops; n++)
        must(vol_read(v, made[random_below(arg_ops)].ino, 0, block, sizeof(block)), "read");
    ret[READ] = micros(start, arg_ops);
    start = mono_ns();
    for (uint64_t n = 0; n < arg_ops; n++) {
        snprintf(name, sizeof(name), "new%llu", (unsigned long long)n);
        must(vol_unlink(v, made[n].rdev, name), "unlink");
        vol_forget(v, made[n].ino, 1);
    }
    ret[UNLINK] = micros(start, arg_ops);
    ret[RSS] = (double)memory("VmHWM") / 1024;
    start = mono_ns();
    must(volume_close(v), "close");
    ret[CLOSE] = (double)(mono_ns() - start) / 1e9;
    free(made);
}

/* In a process of its own, whose peak memory is the measurement's alone. */
static void in_child(const char *dir, uint64_t files, bool making, double ret[WHATS])
{
    int fd[2], status;
    pid_t pid;

    if (pipe2(fd, O_CLOEXEC) < 0)
        die("pipe: %s", strerror(errno));
    pid = fork();
    if (pid == 0) {
        arg_files = files;
        if (making)
            make(dir);
        else
            measure(dir, files, ret);
        fflush(stdout);
        _exit(write(fd[1], ret, WHATS * sizeof(*ret)) == WHATS * sizeof(*ret) ? 0 : 1);
    }
    if (pid < 0 || read(fd[0], ret, WHATS * sizeof(*ret)) < 0 || waitpid(pid, &status, 0) != pid || status != 0)
        die("a measurement failed");
    close(fd[0]);
    close(fd[1]);
}

static int compare(const char *dir)
{
    const uint64_t files[2] = {SMALL, arg_files};
    double got[2][WHATS] = {0};
    int rc = 0;

    for (int k = 0; k < 2; k++) {
        char *path = xasprintf("%s/%llu", dir, (unsigned long long)files[k]);

        in_child(path, files[k], true, got[k]);
        in_child(path, files[k], false, got[k]);
        free(path);
    }
    printf("%-14s %12llu %12llu\n", "files", (unsigned long long)files[0], (unsigned long long)files[1]);
    for (int w = 0; w < WHATS; w++) {
        bool slow = w == OPEN  ? got[1][w] > 1
                    : w == RSS ? got[1][w] > (double)arg_rss
                               : w != CLOSE && w != FAR && got[1][w] > 2 * got[0][w];

        printf("%-14s %12.3f %12.3f %-4s %s\n", texts[w], got[0][w], got[1][w], units[w], slow ? "TOO MUCH" : "");
        rc |= slow;
    }
    return rc;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"files", 1, 0, 'f'}, {"bytes", 1, 0, 'b'}, {"ops", 1, 0, 'o'}, {"rss", 1, 0, 'r'}, {0, 0, 0, 0}};
    double got[WHATS] = {0};
    int c;

    while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
        uint64_t *arg = c == 'f'   ? &arg_files
                        : c == 'b' ? &arg_bytes
                        : c == 'o' ? &arg_ops
                        : c == 'r' ? &arg_rss
                                   : NULL;

        if (!arg)
            argc = 0;
        else
            *arg = strtoull(optarg, NULL, 0);
    }
    if (argc - optind != 2 || !arg_files || arg_files < SMALL || !arg_ops || arg_bytes > 1 << 20) {
        fprintf(stderr, "usage: scale make|measure|compare DIR [--files N] [--bytes N] [--ops N] [--rss MiB]\n");
        return 2;
    }
    if (secmem_init() < 0 || !(key = key_new()))
        die("no locked memory");
    memset(key->b, 0x77, sizeof(key->b));
    if (strcmp(argv[optind], "compare") == 0)
        return compare(argv[optind + 1]);
    if (strcmp(argv[optind], "make") == 0) {
        make(argv[optind + 1]);
        return 0;
    }
    measure(argv[optind + 1], arg_files, got);
    for (int w = 0; w < WHATS; w++)
        printf("%-14s %12.3f %s\n", texts[w], got[w], units[w]);
    return 0;
}
