/*
 * facts.h - what the engine's JSON says of a container, read by processes that hold no key.
 *
 * facts_start forks a helper before any key exists. For each job the helper forks a child that locks itself in
 * (seccomp, limits), parses one document, answers on a socket that is this job's alone, and ends: a document that takes
 * its child over can lie about its own container, which whoever writes the document can anyway, and nothing else. Jobs
 * and answers are fixed-size records.
 */
#ifndef COFFER_KEYSTORE_FACTS_H
#define COFFER_KEYSTORE_FACTS_H

#include "coffer/agent.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FACTS_ID_SIZE    65
#define FACTS_TEXT_SIZE  512
#define FACTS_LABELS_MAX 32
#define FACTS_TIMEOUT_MS 5000

struct facts_job {
    uint32_t source; /* enum agent_facts_source */
    uint32_t nlabels;
    char container[FACTS_ID_SIZE];
    char volume[AGENT_NAME_MAX];
    char driver[64];
    char labels[FACTS_LABELS_MAX][FACTS_TEXT_SIZE]; /* the keys whose values are wanted */
};

struct facts {
    int32_t err;      /* 0; -EINVAL: not what an engine writes; -EFBIG; -ENOENT: not of this container */
    uint32_t nlabels; /* as the job's */
    char id[FACTS_ID_SIZE];
    char name[FACTS_TEXT_SIZE];  /* without the slash */
    char image[FACTS_TEXT_SIZE]; /* the reference given at creation */
    char image_id[FACTS_TEXT_SIZE];
    uint8_t attached; /* the volume is mounted by this driver */
    uint8_t present[FACTS_LABELS_MAX];
    char values[FACTS_LABELS_MAX][FACTS_TEXT_SIZE]; /* "" and not present where it is longer than any rule can say */
};

/* Parses one document for the job. Pure. Sets *ret wholly; returns ret->err. */
int facts_parse(const char *json, size_t n, const struct facts_job *job, struct facts *ret);

/*
 * Forks the helper; call before any key is in memory. It closes every descriptor but stderr and its socket.
 * *ret_fd is its control socket (non-blocking). 0 or -errno.
 */
int facts_start(int *ret_fd, pid_t *ret_pid);
/*
 * Sends a job with the document's descriptor (which stays the caller's). *ret_answer becomes readable when the answer,
 * or the child's end, is there: facts_take then; close it to give up. -EAGAIN: too many at once; -EPIPE: no helper.
 */
int facts_ask(int helper, const struct facts_job *job, int json_fd, int *ret_answer);
/* Takes the answer and checks its every field against the job. 0 with *ret, whose err is 0; else -errno. */
int facts_take(int answer_fd, const struct facts_job *job, struct facts *ret);
/* The check that facts_take makes, for tests. */
bool facts_valid(const struct facts *f, const struct facts_job *job);

#endif
