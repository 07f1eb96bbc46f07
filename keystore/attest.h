/*
 * attest.h - who is calling: from a thread id to its process, real user, cgroups, and the container that they name.
 *
 * Only /proc/<tid>/status and /proc/<tid>/cgroup are read: they are the kernel's own words. What the caller can write
 * itself (comm, environment, mountinfo) is never evidence; comm is kept for the audit record alone.
 */
#ifndef COFFER_KEYSTORE_ATTEST_H
#define COFFER_KEYSTORE_ATTEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define ATTEST_CGROUPS  40          /* hierarchies of one process */
#define ATTEST_IDS      8           /* distinct container ids that the paths of one process may name */
#define ATTEST_ID_SIZE  65          /* 64 lower-case hex digits and a NUL */
#define ATTEST_TEXT_MAX (32u << 10) /* bytes of /proc/<tid>/cgroup */

struct attest_cgroup {
    const char *hierarchy; /* "cpu,cpuacct", "name=systemd"; "" is cgroup v2 */
    const char *path;      /* absolute, no component is empty, "." or ".." */
};

struct attest {
    pid_t tid, tgid;
    uid_t uid;         /* real, in the agent's user namespace */
    bool one_uid;      /* effective, saved and filesystem's are the same */
    bool own_pid_ns;   /* in the agent's own pid namespace */
    bool thread_pidfd; /* pidfd names the thread itself: an answer may be cached against it */
    bool shaped;       /* some component looks like a container's, whether its id is in ids or not */
    int pidfd;
    char comm[32];
    unsigned ncgroups, nids;
    struct attest_cgroup cgroups[ATTEST_CGROUPS];
    char ids[ATTEST_IDS][ATTEST_ID_SIZE]; /* what the engine is to be asked about */
    char *text;                           /* what cgroups points into */
};

/* --- where the hierarchies are mounted --- */

struct attest_mounts;

/* From the text of a mountinfo file (not kept): the whole hierarchies at and below /sys/fs/cgroup. Never NULL. */
struct attest_mounts *attest_mounts_parse(const char *mountinfo);
/* From /proc/self/mountinfo; once, at start. 0 or -errno. */
int attest_mounts_load(struct attest_mounts **ret);
void attest_mounts_free(struct attest_mounts *m);

/* --- the caller --- */

/*
 * Identifies the thread tid. *ret_reason (static) is set on failure. 0; -ESRCH: gone; -EACCES: what the kernel says
 * cannot be read strictly, or lies outside the agent's cgroup namespace. *ret is the caller's: attest_free.
 */
int attest_caller(pid_t tid, struct attest **ret, const char **ret_reason);
/* The process of a thread, without its cgroups, as an attest with no cgroups (to tell the engine early). */
int attest_process(pid_t tid, struct attest **ret, const char **ret_reason);
void attest_free(struct attest *a);
/* Whether the thread that was identified still lives; to be asked after everything was read, before an answer. */
bool attest_alive(const struct attest *a);
/* Whether the process behind any pidfd still lives. */
bool attest_pidfd_alive(int pidfd);

/* The parsers, for tests: of a cgroup file into a (text is copied), and of a status file. 0 or -EACCES. */
int attest_parse_cgroups(struct attest *a, const char *text, size_t n);
int attest_parse_status(struct attest *a, const char *text);

/*
 * Which container the paths name, when known[i] says whether the engine knows ids[i]. *ret_index is the one of ids, or
 * -1: none. -EACCES with a static *ret_reason: one path names two, or two hierarchies name different ones.
 */
int attest_container(const struct attest *a, const bool *known, int *ret_index, const char **ret_reason);

/* --- identities: cgroup directories, by inode --- */

struct attest_dir {
    uint64_t dev, ino;
    bool v2;
    char *path;
};

struct attest_identity {
    unsigned n;
    struct attest_dir dirs[ATTEST_CGROUPS];
};

/* The container's own directory in each hierarchy that names it; with container NULL the caller's own leaves. Those of
 * hierarchies that are not mounted are left out. -ENOENT when none is left. Free with attest_identity_free. */
int attest_identify(const struct attest_mounts *m, const struct attest *a, const char *container,
                    struct attest_identity *ret);
void attest_identity_free(struct attest_identity *i);
bool attest_identity_equal(const struct attest_identity *a, const struct attest_identity *b);
/* Whether every directory is still there, the same inode, and (v2) has processes in it or below. */
bool attest_identity_alive(const struct attest_identity *i);
/* Adds watches for their end to an inotify descriptor, best effort (the caller polls as well). */
void attest_identity_watch(const struct attest_identity *i, int inotify_fd);

#endif
