/* common.c - see common.h. Owns the configuration, which is only read once threads run. */
#include "common.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct plugin_config plugin_config;

int why_set(struct why *why, int err, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(why->text, sizeof(why->text), fmt, ap);
    va_end(ap);
    for (char *p = why->text; *p; p++) {
        if ((unsigned char)*p < 0x20 || *p == 0x7f)
            *p = '?';
    }
    return err;
}

/* --- processes --- */

/* Reads state and start time. The name in parentheses may hold anything, so fields are counted from the last ')'. */
static int read_stat(pid_t pid, char *ret_state, uint64_t *ret_start)
{
    char path[64], buf[1024], *p;
    ssize_t n;
    int fd = -1;

    snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    if (pid <= 0)
        return -ESRCH;
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -ESRCH;
    n = read_upto(fd, buf, sizeof(buf) - 1);
    close_quiet(fd);
    if (n <= 0)
        return -ESRCH;
    buf[n] = 0;
    p = strrchr(buf, ')');
    if (!p || p[1] != ' ')
        return -ESRCH;
    *ret_state = p[2];
    p += 2;
    for (int field = 3; field < 22; field++) {
        p = strchr(p, ' ');
        if (!p)
            return -ESRCH;
        p++;
    }
    *ret_start = strtoull(p, NULL, 10);
    return 0;
}

int process_identify(pid_t pid, struct process *ret_process)
{
    uint64_t start;
    char state;
    int rc = read_stat(pid, &state, &start);

    if (rc == 0)
        *ret_process = (struct process){.pid = pid, .start = start};
    return rc;
}

bool process_alive(const struct process *p)
{
    uint64_t start;
    char state;

    if (p->pid == 0)
        return true;
    return read_stat(p->pid, &state, &start) == 0 && start == p->start && state != 'Z' && state != 'X';
}

bool process_same(const struct process *a, const struct process *b)
{
    return a->pid == b->pid && a->start == b->start;
}

int process_pidfd(const struct process *p)
{
    uint64_t start;
    char state;
    int fd;

    if (p->pid <= 0)
        return -ESRCH;
    fd = (int)syscall(SYS_pidfd_open, p->pid, 0);
    if (fd < 0)
        return -errno;
    /* Read after the descriptor is there: had the number been reused before it, the start time tells. */
    if (read_stat(p->pid, &state, &start) < 0 || start != p->start) {
        close_quiet(fd);
        return -ESRCH;
    }
    return fd;
}

void sleep_ms(int ms)
{
    struct timespec ts = {ms / 1000, (long)(ms % 1000) * 1000000};

    while (nanosleep(&ts, &ts) < 0 && errno == EINTR)
        ;
}

int mutex_lock_for(pthread_mutex_t *m, int ms)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    ts.tv_sec += ms / 1000;
    ts.tv_nsec += (long)(ms % 1000) * 1000000;
    if (ts.tv_nsec >= 1000000000) {
        ts.tv_sec++;
        ts.tv_nsec -= 1000000000;
    }
    return pthread_mutex_clocklock(m, CLOCK_MONOTONIC, &ts) ? -EBUSY : 0;
}

int thread_start(void *(*fn)(void *), void *arg)
{
    pthread_attr_t attr;
    sigset_t all, old;
    pthread_t t;
    int rc;

    sigfillset(&all);
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attr, 512 << 10);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    rc = pthread_create(&t, &attr, fn, arg);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    return -rc;
}

/* --- strict JSON --- */

/* jansson's own limit is 2048 levels of recursion: far more than any request needs or a thread's stack should bear. */
static bool depth_ok(const char *buf, size_t n)
{
    bool in_string = false;
    int depth = 0;

    for (size_t i = 0; i < n; i++) {
        char c = buf[i];

        if (in_string) {
            if (c == '\\')
                i++;
            else if (c == '"')
                in_string = false;
        } else if (c == '"') {
            in_string = true;
        } else if (c == '{' || c == '[') {
            if (++depth > JSON_DEPTH_MAX)
                return false;
        } else if (c == '}' || c == ']') {
            depth--;
        }
    }
    return true;
}

int json_parse(const char *buf, size_t n, json_t **ret_object, struct why *why)
{
    json_error_t error;
    json_t *v = NULL;

    if (!depth_ok(buf, n))
        return why_set(why, -EINVAL, "it nests too deeply");
    v = json_loadb(buf, n, JSON_REJECT_DUPLICATES, &error);
    if (!v)
        return why_set(why, -EINVAL, "it is not valid JSON: %s", error.text);
    if (!json_is_object(v)) {
        json_decref(v);
        return why_set(why, -EINVAL, "it is not a JSON object");
    }
    *ret_object = v;
    return 0;
}

static bool type_fits(const json_t *v, json_type type)
{
    return type == JSON_TRUE ? json_is_boolean(v) : json_typeof(v) == type;
}

int json_members(json_t *obj, const struct json_member *members, size_t n, struct why *why)
{
    const char *key;
    json_t *v;

    for (size_t i = 0; i < n; i++) {
        v = json_object_get(obj, members[i].key);
        if (!v && members[i].required)
            return why_set(why, -EINVAL, "the request lacks \"%s\"", members[i].key);
        if (v && !type_fits(v, members[i].type))
            return why_set(why, -EINVAL, "\"%s\" has the wrong type", members[i].key);
        *members[i].ret = v;
    }
    json_object_foreach(obj, key, v)
    {
        bool known = !strcmp(key, "cmd");

        for (size_t i = 0; i < n && !known; i++)
            known = !strcmp(key, members[i].key);
        if (!known)
            return why_set(why, -EINVAL, "unknown member \"%.64s\"", key);
    }
    return 0;
}
