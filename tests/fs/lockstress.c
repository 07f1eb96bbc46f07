/*
 * lockstress.c - a load for a mount that is locked and unlocked under it.
 *
 *     lockstress DIR SECONDS [PROCESSES]      works in DIR itself
 *
 * Each process makes, writes, truncates, lists, renames, maps and removes files as fast as it can. What a locked volume
 * answers (EACCES, EKEYREVOKED, ENOKEY, EIO, SIGBUS) is put up with; everything else is an error. Each also appends
 * numbered records to a file of its own and calls fsync: at the end, when the volume must be unlocked, every record
 * whose fsync succeeded must be there. Prints "N operations, M refused, K records", exit status 1 after an error.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PROCESSES_MAX 64
#define FILES         32
#define RECORD        512
#define MAP_BYTES     (256 * 1024)

static struct shared {
    atomic_ulong ops, refused, errors;
    atomic_ulong synced[PROCESSES_MAX]; /* records whose fsync succeeded */
} * shared;
static time_t end;
static sigjmp_buf bus;

static bool over(void)
{
    return time(NULL) >= end;
}

static void complain(const char *what, const char *text)
{
    printf("%s: %s\n", what, text);
    fflush(stdout);
    atomic_fetch_add(&shared->errors, 1);
}

/* Did it work? allowed: an errno that the load itself brings about, or 0. */
static bool went(const char *what, long ret, int allowed)
{
    atomic_fetch_add(&shared->ops, 1);
    if (ret >= 0)
        return true;
    if (errno == EACCES || errno == EKEYREVOKED || errno == ENOKEY || errno == EIO) {
        atomic_fetch_add(&shared->refused, 1);
        usleep(1000); /* as a program would; without, the refusals are all that the machine does */
    } else if (errno != allowed) {
        complain(what, strerror(errno));
    }
    return false;
}

static void on_bus(int sig)
{
    (void)sig;
    siglongjmp(bus, 1);
}

static void mapped_write(int fd)
{
    char *m;

    if (!went("ftruncate", ftruncate(fd, MAP_BYTES), 0))
        return;
    m = mmap(NULL, MAP_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (!went("mmap", m == MAP_FAILED ? -1 : 0, 0))
        return;
    if (sigsetjmp(bus, 1) == 0) {
        for (size_t i = 0; i < MAP_BYTES; i += 4096)
            m[i] = (char)i;
    } else {
        atomic_fetch_add(&shared->refused, 1);
    }
    munmap(m, MAP_BYTES);
}

static void work_on_file(unsigned *seed)
{
    static char buf[128 * 1024];
    char name[32], other[32];
    int fd;

    /* All processes work in one directory: the mount's root is what locking needs. */
    snprintf(name, sizeof(name), "f%d", rand_r(seed) % FILES);
    snprintf(other, sizeof(other), "f%d", rand_r(seed) % FILES);
    switch (rand_r(seed) % 6) {
    case 0:
        went("unlink", unlink(name), ENOENT);
        return;
    case 1:
        went("rename", rename(name, other), ENOENT);
        return;
    case 2: {
        DIR *d = opendir(".");

        if (!went("opendir", d ? 0 : -1, 0))
            return;
        errno = 0;
        while (readdir(d))
            ;
        went("readdir", errno ? -1 : 0, 0);
        closedir(d);
        return;
    }
    }
    fd = open(name, O_RDWR | O_CREAT | (rand_r(seed) % 4 ? 0 : O_TRUNC), 0644);
    if (!went("open", fd, 0))
        return;
    if (rand_r(seed) % 3 == 0)
        mapped_write(fd);
    else
        went("pwrite", pwrite(fd, buf, 1 + (size_t)rand_r(seed) % sizeof(buf), rand_r(seed) % (1 << 20)), 0);
    if (rand_r(seed) % 2)
        went("ftruncate", ftruncate(fd, rand_r(seed) % (1 << 20)), 0);
    close(fd);
}

static void make_record(unsigned process, unsigned long n, char *buf)
{
    memset(buf, (int)(process + n), RECORD);
    snprintf(buf, RECORD, "%u %lu", process, n);
}

/* Record n is written again until its fsync succeeds. */
static void append(unsigned process)
{
    unsigned long n = atomic_load(&shared->synced[process]);
    char name[32], buf[RECORD];
    int fd;

    snprintf(name, sizeof(name), "records%u", process);
    make_record(process, n, buf);
    fd = open(name, O_WRONLY | O_CREAT, 0644);
    if (!went("open", fd, 0))
        return;
    if (went("pwrite", pwrite(fd, buf, RECORD, (off_t)(n * RECORD)), 0) && went("fsync", fsync(fd), 0))
        atomic_store(&shared->synced[process], n + 1);
    close(fd);
}

static void work(unsigned process)
{
    unsigned seed = process + 1;

    signal(SIGBUS, on_bus);
    while (!over()) {
        if (process % 2 == 0 && rand_r(&seed) % 4 == 0)
            append(process);
        else
            work_on_file(&seed);
    }
}

static void verify(unsigned process)
{
    unsigned long n = atomic_load(&shared->synced[process]);
    char name[32], have[RECORD], want[RECORD], text[80];
    int fd;

    if (n == 0)
        return;
    snprintf(name, sizeof(name), "records%u", process);
    fd = open(name, O_RDONLY);
    if (fd < 0) {
        complain(name, strerror(errno));
        return;
    }
    for (unsigned long i = 0; i < n; i++) {
        make_record(process, i, want);
        if (pread(fd, have, RECORD, (off_t)(i * RECORD)) != RECORD || memcmp(have, want, RECORD) != 0) {
            snprintf(text, sizeof(text), "record %lu of %lu is lost", i, n);
            complain(name, text);
            break;
        }
    }
    close(fd);
}

int main(int argc, char **argv)
{
    unsigned n = argc > 3 ? (unsigned)atoi(argv[3]) : 8, records = 0;

    if (argc < 3 || n < 1 || n > PROCESSES_MAX) {
        fprintf(stderr, "usage: lockstress DIR SECONDS [PROCESSES]\n");
        return 2;
    }
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    end = time(NULL) + atoi(argv[2]);
    if (shared == MAP_FAILED || chdir(argv[1]) < 0) {
        perror(argv[1]);
        return 1;
    }
    for (unsigned i = 0; i < n; i++) {
        if (fork() == 0) {
            work(i);
            _exit(0);
        }
    }
    for (int status; wait(&status) > 0;) {
        if (status)
            complain("a process", "died");
    }
    for (unsigned i = 0; i < n; i++) {
        verify(i);
        records += (unsigned)shared->synced[i];
    }
    printf("%lu operations, %lu refused, %u records\n", shared->ops, shared->refused, records);
    if (records == 0)
        complain("fsync", "never succeeded");
    return shared->errors ? 1 : 0;
}
