/*
 * common.h - what all parts of cofferd share: its configuration, one-line reasons for the operator, the identity of a
 * process, strict JSON.
 */
#ifndef COFFER_PLUGIN_COMMON_H
#define COFFER_PLUGIN_COMMON_H

#include "coffer/agent.h"
#include "fs/base/base.h"

#include <jansson.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define COFFERD_VERSION "0.1.0"

/* Set once by main() before any thread starts, then only read. */
struct plugin_config {
    const char *state_dir; /* absolute */
    const char *run_dir;   /* absolute */
    const char *mnt_dir;   /* <run>/mnt */
    const char *plugin_socket;
    const char *control_socket;
    const char *keyd_socket;
    const char *engine_root;
    const char *engine_socket;
    int takeover_s;  /* seconds until a mount that no server takes over is aborted */
    char driver[64]; /* the engine's name for this driver: the plugin socket's file name without .sock */
    int state_fd, keystore_fd, volumes_fd, mnt_fd; /* directories */
    int programs_fd;                               /* the directory of our own executable */
    uid_t keyd_uid, fs_uid;
    gid_t keyd_gid, fs_gid;
    char boot_id[40];
    char mnt_ns[64], pid_ns[64]; /* readlink of our own namespaces */
};
extern struct plugin_config plugin_config;

/* --- reasons --- */

/* One line for the operator that says what to do about it; travels beside a negative errno. */
struct why {
    char text[AGENT_TEXT_MAX];
};

/* Sets the text (control characters become '?') and returns err. */
int why_set(struct why *why, int err, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

#define ENTRY_NAME_MAX (AGENT_NAME_MAX + 1 + SNAPSHOT_NAME_MAX) /* of VOLUME@SNAPSHOT, with a NUL */

/* --- processes --- */

/* A process that cannot be mistaken for a later one with the same number (within one boot). pid 0: unknown. */
struct process {
    pid_t pid;
    uint64_t start; /* field 22 of /proc/pid/stat */
};

/* Fills in the start time. -ESRCH when there is no such process. */
int process_identify(pid_t pid, struct process *ret_process);
/* True as long as the very process lives (a zombie does not). An unknown process counts as alive. */
bool process_alive(const struct process *p);
bool process_same(const struct process *a, const struct process *b);
/* A pidfd of p, checked to be the very process, or -errno. */
int process_pidfd(const struct process *p);

/* Sleeps for ms milliseconds. */
void sleep_ms(int ms);
/* pthread_mutex_timedlock() by a relative time. 0 or -EBUSY. */
int mutex_lock_for(pthread_mutex_t *m, int ms);
/* Starts a detached thread with a small stack and all signals blocked. 0 or -errno. */
int thread_start(void *(*fn)(void *), void *arg);

/* --- strict JSON --- */

#define JSON_DEPTH_MAX 8

/* An object of at most JSON_DEPTH_MAX levels without duplicate keys, NULs or trailing bytes. 0 and a new reference, or
 * -EINVAL with the reason. */
int json_parse(const char *buf, size_t n, json_t **ret_object, struct why *why);

/* One member that a request may have. */
struct json_member {
    const char *key;
    json_type type; /* JSON_TRUE means either boolean */
    bool required;
    json_t **ret; /* borrowed from the object; NULL when absent */
};
/* Takes the members out of obj; every other key but "cmd" is refused. 0 or -EINVAL with the reason. */
int json_members(json_t *obj, const struct json_member *members, size_t n, struct why *why);

#endif
