/*
 * engine.c - the engine alone, without FUSE: operations per second, and processor time of each, on a fresh volume in two real
 * files. For profiles.
 *
 * usage: engine DIR [WORKLOAD]...      all workloads by default; DIR must be writable, two files are made there and
 * removed
 */
#include "coffer/volume.h"
#include "fs/base/base.h"
#include "fs/base/secmem.h"

#include <fcntl.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#define SECONDS 2.0

static struct volume *v;
static uint8_t buf[1 << 20];

static void check(int64_t rc, const char *what)
{
    if (rc < 0) {
        fprintf(stderr, "engine: %s: %s\n", what, strerror((int)-rc));
        exit(1);
    }
}

static struct store *open_store(const char *dir, const char *name)
{
    char path[4096];
    int fd;

    snprintf(path, sizeof(path), "%s/%s", dir, name);
    fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    check(fd < 0 ? -errno : 0, path);
    unlink(path);
    return store_fd_take(fd);
}

static uint64_t make_file(uint64_t dir, const char *name)
{
    struct vattr a;

    check(vol_mknod(v, dir, name, S_IFREG | 0644, 0, 0, 0, &a), "mknod");
    return a.ino;
}

static uint64_t random_file(const char *name, uint64_t mib)
{
    struct vattr a;
    uint64_t ino;

    if (vol_lookup(v, VOLUME_ROOT_INO, name, &a) == 0)
        return a.ino;
    ino = make_file(VOLUME_ROOT_INO, name);
    for (uint64_t i = 0; i < mib; i++)
        check(vol_write(v, ino, i << 20, buf, sizeof(buf)), "write");
    check(vol_sync(v), "sync");
    return ino;
}

static void write_sequential(uint64_t i)
{
    static uint64_t ino;

    if (i == 0)
        ino = make_file(VOLUME_ROOT_INO, "sequential");
    check(vol_write(v, ino, (i % 1024) << 20, buf, sizeof(buf)), "write");
}

static void read_sequential(uint64_t i)
{
    static uint64_t ino;

    if (i == 0)
        ino = random_file("read", 128);
    check(vol_read(v, ino, (i % 128) << 20, buf, sizeof(buf)), "read");
}

static void read_random(uint64_t i)
{
    static uint64_t ino;

    if (i == 0)
        ino = random_file("read", 128);
    check(vol_read(v, ino, (uint64_t)randombytes_uniform(128 * 256) * 4096, buf, 4096), "read");
}

static void write_random(uint64_t i)
{
    static uint64_t ino;

    if (i == 0)
        ino = random_file("write", 128);
    check(vol_write(v, ino, (uint64_t)randombytes_uniform(128 * 256) * 4096, buf, 4096), "write");
}

static void write_sync_grow(uint64_t i)
{
    static uint64_t ino;

    if (i == 0)
        ino = make_file(VOLUME_ROOT_INO, "grow");
    check(vol_write(v, ino, i * 4096, buf, 4096), "write");
    check(vol_fsync(v, ino, true), "fsync");
}

static void write_sync_over(uint64_t i)
{
    static uint64_t ino;

    if (i == 0)
        ino = random_file("over", 32);
    check(vol_write(v, ino, (uint64_t)randombytes_uniform(32 * 128) * 8192, buf, 8192), "write");
    check(vol_fsync(v, ino, true), "fsync");
}

static void create(uint64_t i)
{
    static uint64_t dir;
    struct vattr a;
    char name[32];

    if (i == 0) {
        check(vol_mknod(v, VOLUME_ROOT_INO, "many", S_IFDIR | 0755, 0, 0, 0, &a), "mkdir");
        dir = a.ino;
    }
    snprintf(name, sizeof(name), "%llu", (unsigned long long)i);
    check(vol_write(v, make_file(dir, name), 0, buf, 4096), "write");
}

static void lookup(uint64_t i)
{
    static uint64_t dir, n;
    struct vattr a;
    char name[32];

    if (i == 0) {
        check(vol_mknod(v, VOLUME_ROOT_INO, "look", S_IFDIR | 0755, 0, 0, 0, &a), "mkdir");
        dir = a.ino;
        for (n = 0; n < 20000; n++) {
            snprintf(name, sizeof(name), "%llu", (unsigned long long)n);
            make_file(dir, name);
        }
    }
    snprintf(name, sizeof(name), "%u", randombytes_uniform((uint32_t)n));
    check(vol_lookup(v, dir, name, &a), "lookup");
}

static const struct {
    const char *name, *unit;
    double factor;
    void (*run)(uint64_t i);
} workloads[] = {
    {"write-sequential", "MB/s", 1.048576, write_sequential},
    {"read-sequential", "MB/s", 1.048576, read_sequential},
    {"read-random", "reads/s", 1, read_random},
    {"write-random", "writes/s", 1, write_random},
    {"write-sync-grow", "writes/s", 1, write_sync_grow},
    {"write-sync-over", "writes/s", 1, write_sync_over},
    {"create", "files/s", 1, create},
    {"lookup", "lookups/s", 1, lookup},
};

static void damage(void *ctx, const char *what)
{
    (void)ctx;
    fprintf(stderr, "engine: damage: %s\n", what);
}

static double cpu_seconds(void)
{
    struct rusage r;

    getrusage(RUSAGE_SELF, &r);
    return (double)(r.ru_utime.tv_sec + r.ru_stime.tv_sec) + (double)(r.ru_utime.tv_usec + r.ru_stime.tv_usec) / 1e6;
}

static void make_volume(const char *dir)
{
    struct volume_params p = {.block_size = 4096, .size_limit = 32ull << 30, .root_mode = 0755};
    struct volume_options o = {.background = true, .on_damage = damage};
    struct store *data = open_store(dir, "engine.data"), *log = open_store(dir, "engine.log");
    struct key *key = key_new();

    randombytes_buf(key->b, sizeof(key->b));
    randombytes_buf(p.id, sizeof(p.id));
    check(volume_format(data, log, key, &p), "format");
    check(volume_open(data, log, key, p.id, &o, &v), "open");
    key_free(&key);
}

int main(int argc, char **argv)
{
    if (argc < 2 || sodium_init() < 0) {
        fprintf(stderr, "usage: engine DIR [WORKLOAD]...\n");
        return 2;
    }
    randombytes_buf(buf, sizeof(buf));
    make_volume(argv[1]);
    for (size_t w = 0; w < ARRAY_LEN(workloads); w++) {
        bool wanted = argc == 2;
        int64_t start, now;
        uint64_t n = 1;
        double cpu;

        for (int i = 2; i < argc; i++)
            wanted |= strcmp(argv[i], workloads[w].name) == 0;
        if (!wanted)
            continue;
        workloads[w].run(0); /* makes what it needs */
        cpu = cpu_seconds();
        start = mono_ns();
        do
            workloads[w].run(n);
        while ((now = mono_ns()) - start < (int64_t)(SECONDS * 1e9) && ++n);
        printf("%-18s %12.0f %-10s %8.2f us of processor time each\n", workloads[w].name,
               (double)n * workloads[w].factor / ((double)(now - start) / 1e9), workloads[w].unit,
               (cpu_seconds() - cpu) * 1e6 / (double)n);
        fflush(stdout);
    }
    check(volume_close(v), "close");
    return 0;
}
