/*
 * facts.c - see facts.h. Called by the server's event loop (facts_ask, facts_take) and by coffer-keyd's main
 * (facts_start); facts_parse runs in the jobs' children and in tests.
 *
 * 1. The helper is forked before any key exists and has no descriptor of the keystore, the engine or another channel.
 * 2. A job's child sees one document and one socket, makes no new descriptor, and ends within FACTS_TIMEOUT_MS (its
 *    alarm is set before it is locked in, and it cannot change it afterwards).
 * 3. Nothing of an answer is used before facts_valid has looked at every field.
 */
#include "keystore/facts.h"

#include "fs/base/base.h"
#include "fs/base/msg.h"
#include "keystore/sandbox.h"

#include <fcntl.h>
#include <jansson.h>
#include <signal.h>
#include <sodium.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { FACTS_MSG_JOB = 1, FACTS_MSG_ANSWER };

/* --- parsing --- */

/* The string of an object's member into out; false where it is none or too long. */
static bool take_string(const json_t *object, const char *key, char *out, size_t size)
{
    const json_t *v = json_object_get(object, key);
    size_t n;

    if (!json_is_string(v))
        return false;
    n = json_string_length(v);
    if (n >= size || strlen(json_string_value(v)) != n)
        return false;
    memcpy(out, json_string_value(v), n + 1);
    return true;
}

static bool member_is(const json_t *object, const char *key, const char *want)
{
    const json_t *v = json_object_get(object, key);

    return json_is_string(v) && !strcmp(json_string_value(v), want);
}

static bool mount_is(const json_t *mount, const struct facts_job *job)
{
    return member_is(mount, "Type", "volume") && member_is(mount, "Driver", job->driver) &&
           member_is(mount, "Name", job->volume);
}

/* Absent or null labels are none; anything else that is no object of strings is refused. */
static bool take_labels(const json_t *labels, const struct facts_job *job, struct facts *f)
{
    const char *key;
    json_t *v;

    if (!labels || json_is_null(labels))
        return true;
    if (!json_is_object(labels))
        return false;
    json_object_foreach((json_t *)(uintptr_t)labels, key, v)
    {
        if (!json_is_string(v))
            return false;
    }
    for (uint32_t i = 0; i < job->nlabels; i++)
        f->present[i] = take_string(labels, job->labels[i], f->values[i], sizeof(f->values[i]));
    return true;
}

/* "/name" of the container itself; "/other/alias" is a link's name for it. */
static bool take_name(const json_t *name, struct facts *f)
{
    const char *s = json_string_value(name);

    if (!s || s[0] != '/' || !s[1] || strchr(s + 1, '/') || strlen(s + 1) >= sizeof(f->name))
        return false;
    memcpy(f->name, s + 1, strlen(s + 1) + 1);
    return true;
}

/* config.v2.json */
static bool parse_file(const json_t *root, const struct facts_job *job, struct facts *f)
{
    const json_t *config = json_object_get(root, "Config"), *mounts = json_object_get(root, "MountPoints");
    const char *key;
    json_t *mount;

    if (!json_is_object(root) || !json_is_object(config) || !take_string(root, "ID", f->id, sizeof(f->id)) ||
        !take_name(json_object_get(root, "Name"), f) || !take_string(config, "Image", f->image, sizeof(f->image)) ||
        !take_string(root, "Image", f->image_id, sizeof(f->image_id)) ||
        !take_labels(json_object_get(config, "Labels"), job, f))
        return false;
    if (!mounts || json_is_null(mounts))
        return true;
    if (!json_is_object(mounts))
        return false;
    json_object_foreach((json_t *)(uintptr_t)mounts, key, mount)
    {
        if (mount_is(mount, job))
            f->attached = 1;
    }
    return true;
}

/* The array of GET /containers/json with a filter by id */
static bool parse_api(const json_t *root, const struct facts_job *job, struct facts *f)
{
    const json_t *c = json_array_get(root, 0), *names, *mounts;
    bool named = false;

    if (json_array_size(root) != 1 || !json_is_object(c))
        return false;
    names = json_object_get(c, "Names");
    mounts = json_object_get(c, "Mounts");
    for (size_t i = 0; i < json_array_size(names) && !named; i++)
        named = take_name(json_array_get(names, i), f);
    if (!named || !take_string(c, "Id", f->id, sizeof(f->id)) || !take_string(c, "Image", f->image, sizeof(f->image)) ||
        !take_string(c, "ImageID", f->image_id, sizeof(f->image_id)) ||
        !take_labels(json_object_get(c, "Labels"), job, f))
        return false;
    for (size_t i = 0; i < json_array_size(mounts); i++)
        if (mount_is(json_array_get(mounts, i), job))
            f->attached = 1;
    return true;
}

int facts_parse(const char *json, size_t n, const struct facts_job *job, struct facts *ret)
{
    json_t *root = NULL;
    bool ok = false;
    int err = 0;

    memset(ret, 0, sizeof(*ret));
    if (n > AGENT_FACTS_MAX)
        err = -EFBIG;
    if (err == 0)
        root = json_loadb(json, n, JSON_REJECT_DUPLICATES, NULL);
    if (root && job->source == AGENT_FACTS_FILE)
        ok = parse_file(root, job, ret);
    else if (root && job->source == AGENT_FACTS_API)
        ok = parse_api(root, job, ret);
    json_decref(root);
    if (err == 0 && !ok)
        err = -EINVAL;
    if (err == 0 && strcmp(ret->id, job->container))
        err = -ENOENT;
    if (err < 0)
        memset(ret, 0, sizeof(*ret));
    ret->err = err;
    ret->nlabels = job->nlabels;
    return err;
}

/* --- the job's child --- */

static bool text_ok(const char *s, size_t size)
{
    return memchr(s, 0, size) != NULL;
}

static bool job_valid(const struct facts_job *j)
{
    bool ok = text_ok(j->container, sizeof(j->container)) && text_ok(j->volume, sizeof(j->volume)) &&
              text_ok(j->driver, sizeof(j->driver)) && j->nlabels <= FACTS_LABELS_MAX;

    for (uint32_t i = 0; ok && i < j->nlabels; i++)
        ok = text_ok(j->labels[i], sizeof(j->labels[i]));
    return ok;
}

static void limit(int resource, rlim_t n)
{
    struct rlimit r = {n, n};

    setrlimit(resource, &r);
}

/* Never returns. job, document and answer socket are all that the child has. */
static void child_run(const struct facts_job *job, int json_fd, int answer_fd)
{
    struct msg_head head = {.type = FACTS_MSG_ANSWER, .len = sizeof(struct facts), .id = 1};
    struct facts *f = xcalloc(1, sizeof(*f));
    char *buf = xmalloc(AGENT_FACTS_MAX + 1);
    ssize_t n;

    alarm(FACTS_TIMEOUT_MS / 1000);
    limit(RLIMIT_CPU, FACTS_TIMEOUT_MS / 1000);
    limit(RLIMIT_NOFILE, 0);
    sandbox_limit_memory(256u << 20);
    if (sandbox_facts_child() < 0)
        _exit(1);
    lseek(json_fd, 0, SEEK_SET); /* a pipe has no place to go to; that is fine */
    n = read_upto(json_fd, buf, AGENT_FACTS_MAX + 1);
    if (n < 0)
        f->err = (int32_t)n;
    else
        facts_parse(buf, (size_t)n, job, f);
    msg_send(answer_fd, &head, f, NULL, 0);
    _exit(0);
}

/* --- the helper --- */

static void helper_job(int sock, const struct facts_job *job, const int *fds)
{
    pid_t pid = fork();

    if (pid != 0)
        return; /* the parent; where fork failed the closed answer socket says so */
    close_quiet(sock);
    child_run(job, fds[0], fds[1]);
}

/* Never returns: ends when coffer-keyd does. */
static void helper_run(int sock)
{
    struct facts_job *job = xcalloc(1, sizeof(*job));

    prctl(PR_SET_NAME, "coffer-facts");
    signal(SIGCHLD, SIG_IGN);
    signal(SIGTERM, SIG_DFL);
    json_object_seed((size_t)randombytes_random() | 1);
    if (sandbox_facts_helper() < 0)
        _exit(1);
    for (;;) {
        int fds[MSG_FDS_MAX], nfds = 0;
        struct msg_head head;
        int rc = msg_recv(sock, &head, job, sizeof(*job), fds, &nfds, -1);

        if (rc == 0 && head.type == FACTS_MSG_JOB && head.len == sizeof(*job) && nfds == 2 && job_valid(job))
            helper_job(sock, job, fds);
        for (int i = 0; i < nfds; i++)
            close_quiet(fds[i]);
        if (rc < 0)
            _exit(0);
    }
}

int facts_start(int *ret_fd, pid_t *ret_pid)
{
    int pair[2];
    pid_t pid;

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return -errno;
    pid = fork();
    if (pid == 0) {
        /* Only stderr and the socket, at 3, go on: not the listening socket, not the keystore. */
        if (dup2(pair[1], 3) < 0 || close_range(4, ~0u, 0) < 0)
            _exit(1);
        close(0);
        close(1);
        helper_run(3);
    }
    close_quiet(pair[1]);
    if (pid < 0 || fcntl(pair[0], F_SETFL, O_NONBLOCK) < 0) {
        int rc = -errno;

        close_quiet(pair[0]);
        return rc;
    }
    *ret_fd = pair[0];
    *ret_pid = pid;
    return 0;
}

/* --- the agent's side --- */

int facts_ask(int helper, const struct facts_job *job, int json_fd, int *ret_answer)
{
    struct msg_head head = {.type = FACTS_MSG_JOB, .len = sizeof(*job), .id = 1};
    int pair[2], rc;

    if (helper < 0)
        return -EPIPE;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) < 0)
        return -errno;
    rc = msg_send(helper, &head, job, (int[]){json_fd, pair[1]}, 2);
    close_quiet(pair[1]);
    if (rc < 0) {
        close_quiet(pair[0]);
        return rc;
    }
    *ret_answer = pair[0];
    return 0;
}

bool facts_valid(const struct facts *f, const struct facts_job *job)
{
    bool ok = f->err <= 0 && f->nlabels == job->nlabels && f->attached <= 1 && text_ok(f->id, sizeof(f->id)) &&
              text_ok(f->name, sizeof(f->name)) && text_ok(f->image, sizeof(f->image)) &&
              text_ok(f->image_id, sizeof(f->image_id));

    for (uint32_t i = 0; ok && i < FACTS_LABELS_MAX; i++)
        ok = f->present[i] <= (i < job->nlabels) && text_ok(f->values[i], sizeof(f->values[i]));
    return ok && (f->err < 0 || !strcmp(f->id, job->container));
}

int facts_take(int answer_fd, const struct facts_job *job, struct facts *ret)
{
    struct msg_head head;
    int rc = msg_recv(answer_fd, &head, ret, sizeof(*ret), NULL, NULL, -1);

    if (rc < 0)
        return rc == -ECONNRESET ? -EIO : rc;
    if (head.type != FACTS_MSG_ANSWER || head.len != sizeof(*ret) || !facts_valid(ret, job))
        return -EPROTO;
    return ret->err;
}
