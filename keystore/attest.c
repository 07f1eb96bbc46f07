/*
 * attest.c - see attest.h. Called by the server's event loop only; keeps no state but what it returns.
 *
 * 1. The pidfd is opened before anything is read and is checked to be alive after everything was: so what was read is
 *    the one thread's, whatever happened to its number.
 * 2. /proc/<tid>/cgroup is taken only as a whole: one line that is not understood refuses the caller.
 * 3. An id in a path is a candidate, never a fact: the engine must know it, and exactly one component of a path may
 * name a container that it knows (a container can make a child cgroup and call it after its neighbour).
 */
#include "keystore/attest.h"

#include "fs/base/base.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PIDFD_THREAD_FLAG O_EXCL /* PIDFD_THREAD, Linux 6.9 */
#define STATUS_MAX        (64u << 10)
#define MOUNTINFO_MAX     (1u << 20)
#define ID_HEX            64

/* --- mounts --- */

struct mount {
    char *options; /* super options: ",rw,cpu,cpuacct," */
    char *dir;
    bool v2;
};

struct attest_mounts {
    unsigned n;
    struct mount m[ATTEST_CGROUPS];
};

static bool below_cgroup(const char *dir)
{
    static const char top[] = "/sys/fs/cgroup";

    /* A mount point with an escape in it (\040) is none that a distribution makes. */
    return strncmp(dir, top, sizeof(top) - 1) == 0 && (dir[sizeof(top) - 1] == 0 || dir[sizeof(top) - 1] == '/') &&
           !strchr(dir, '\\');
}

/* One line: id parent major:minor root dir options [optional...] - type source super-options */
static void mounts_add(struct attest_mounts *ms, char *line)
{
    char *field[6], *save = NULL, *tail = strstr(line, " - "), *type, *options;

    if (!tail || ms->n == ATTEST_CGROUPS)
        return;
    *tail = 0;
    for (int i = 0; i < 6; i++) {
        field[i] = strtok_r(i ? NULL : line, " ", &save);
        if (!field[i])
            return;
    }
    type = strtok_r(tail + 3, " ", &save);
    if (!type || !strtok_r(NULL, " ", &save) || !(options = strtok_r(NULL, " ", &save)))
        return;
    if ((strcmp(type, "cgroup") && strcmp(type, "cgroup2")) || strcmp(field[3], "/") || !below_cgroup(field[4]))
        return;
    ms->m[ms->n++] =
        (struct mount){.options = xasprintf(",%s,", options), .dir = xstrdup(field[4]), .v2 = type[6] == '2'};
}

struct attest_mounts *attest_mounts_parse(const char *mountinfo)
{
    struct attest_mounts *ms = xcalloc(1, sizeof(*ms));
    char *copy = xstrdup(mountinfo), *save = NULL;

    for (char *line = strtok_r(copy, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        char *one = xstrdup(line);

        mounts_add(ms, one);
        free(one);
    }
    free(copy);
    return ms;
}

void attest_mounts_free(struct attest_mounts *ms)
{
    if (!ms)
        return;
    for (unsigned i = 0; i < ms->n; i++) {
        free(ms->m[i].options);
        free(ms->m[i].dir);
    }
    free(ms);
}

static const struct mount *mount_of(const struct attest_mounts *ms, const char *hierarchy)
{
    char *first = NULL;

    if (*hierarchy)
        first = xasprintf(",%.*s,", (int)strcspn(hierarchy, ","), hierarchy);
    for (unsigned i = 0; i < ms->n; i++) {
        const struct mount *m = &ms->m[i];

        if (first ? !m->v2 && strstr(m->options, first) : m->v2) {
            free(first);
            return m;
        }
    }
    free(first);
    return NULL;
}

/* --- reading /proc --- */

/* All of a /proc file, at most max bytes, with a NUL after it. */
static int read_proc(const char *path, size_t max, char **ret, size_t *ret_n)
{
    char *buf;
    ssize_t n;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);

    if (fd < 0)
        return -errno;
    buf = xmalloc(max + 2);
    n = read_upto(fd, buf, max + 1);
    close_quiet(fd);
    if (n < 0 || (size_t)n > max) {
        free(buf);
        return n < 0 ? (int)n : -EFBIG;
    }
    buf[n] = 0;
    *ret = buf;
    *ret_n = (size_t)n;
    return 0;
}

int attest_mounts_load(struct attest_mounts **ret)
{
    char *text = NULL;
    size_t n;
    int rc = read_proc("/proc/self/mountinfo", MOUNTINFO_MAX, &text, &n);

    if (rc < 0)
        return rc;
    *ret = attest_mounts_parse(text);
    free(text);
    return 0;
}

/* The numbers of a status line, at most max. Returns their count, or -1 where one is no number. */
static int status_numbers(const char *line, unsigned long *out, int max)
{
    int n = 0;

    while (*line == '\t' || *line == ' ')
        line++;
    while (*line && *line != '\n') {
        char *end;

        if (*line < '0' || *line > '9')
            return -1;
        errno = 0;
        out[n] = strtoul(line, &end, 10);
        if (errno || ++n > max - 1 || (*end != '\t' && *end != '\n' && *end != ' ' && *end != 0))
            return -1;
        line = end + strspn(end, "\t ");
    }
    return n;
}

/* The text after "key" at the start of a line; the kernel escapes newlines in Name, so lines cannot be made up. */
static const char *status_line(const char *text, const char *key)
{
    size_t n = strlen(key);

    while (text) {
        if (!strncmp(text, key, n))
            return text + n;
        text = strchr(text, '\n');
        if (text)
            text++;
    }
    return NULL;
}

int attest_parse_status(struct attest *a, const char *text)
{
    unsigned long v[34]; /* pid namespaces nest 32 deep */
    const char *name = status_line(text, "Name:\t"), *tgid = status_line(text, "Tgid:"),
               *uid = status_line(text, "Uid:"), *nspid = status_line(text, "NSpid:");
    size_t len;
    int n;

    if (!name || !tgid || !uid || !nspid)
        return -EACCES;
    len = MIN(strcspn(name, "\n"), sizeof(a->comm) - 1);
    memcpy(a->comm, name, len);
    a->comm[len] = 0;
    if (status_numbers(tgid, v, ARRAY_LEN(v)) != 1 || v[0] == 0 || v[0] > INT32_MAX)
        return -EACCES;
    a->tgid = (pid_t)v[0];
    if (status_numbers(uid, v, ARRAY_LEN(v)) != 4 || v[0] > UINT32_MAX)
        return -EACCES;
    a->uid = (uid_t)v[0];
    a->one_uid = v[1] == v[0] && v[2] == v[0] && v[3] == v[0];
    n = status_numbers(nspid, v, ARRAY_LEN(v));
    if (n < 1)
        return -EACCES;
    a->own_pid_ns = n == 1;
    return 0;
}

/* --- cgroup paths --- */

static bool lower_hex(const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!((s[i] >= '0' && s[i] <= '9') || (s[i] >= 'a' && s[i] <= 'f')))
            return false;
    return true;
}

/* The id that a component names, or NULL: 64 hex digits alone, or a scope of a known engine around them. */
static const char *component_id(const char *c, size_t n)
{
    static const char *const prefixes[] = {"docker-", "libpod-", "cri-containerd-", "crio-"};

    if (n == ID_HEX && lower_hex(c, n))
        return c;
    for (size_t i = 0; i < ARRAY_LEN(prefixes); i++) {
        size_t k = strlen(prefixes[i]);

        if (n == k + ID_HEX + 6 && !memcmp(c, prefixes[i], k) && !memcmp(c + k + ID_HEX, ".scope", 6) &&
            lower_hex(c + k, ID_HEX))
            return c + k;
    }
    return NULL;
}

/* Whether 64 hex digits stand in it anywhere: libpod-conmon-…, and what engines to come may call theirs. */
static bool component_shaped(const char *c, size_t n)
{
    size_t run = 0;

    for (size_t i = 0; i < n && run < ID_HEX; i++)
        run = lower_hex(c + i, 1) || (c[i] >= 'A' && c[i] <= 'F') ? run + 1 : 0;
    return run >= ID_HEX;
}

static int add_id(struct attest *a, const char *id)
{
    for (unsigned i = 0; i < a->nids; i++)
        if (!memcmp(a->ids[i], id, ID_HEX))
            return 0;
    if (a->nids == ATTEST_IDS)
        return -EACCES;
    memcpy(a->ids[a->nids], id, ID_HEX);
    a->ids[a->nids++][ID_HEX] = 0;
    return 0;
}

/* Checks an absolute path and takes the ids out of it. */
static int scan_path(struct attest *a, const char *path)
{
    size_t len = strlen(path);

    if (path[0] != '/')
        return -EACCES;
    /* What is left in a deleted cgroup is dying; its path is no longer anybody's. */
    if (len >= 10 && !strcmp(path + len - 10, " (deleted)"))
        return -EACCES;
    if (len == 1)
        return 0;
    for (const char *c = path; *c;) {
        size_t n = strcspn(++c, "/");
        const char *id = component_id(c, n);

        if (n == 0 || (n == 1 && c[0] == '.') || (n == 2 && c[0] == '.' && c[1] == '.'))
            return -EACCES;
        if (id && add_id(a, id) < 0)
            return -EACCES;
        if (component_shaped(c, n))
            a->shaped = true;
        c += n;
    }
    return 0;
}

/* One line, "N:controllers:path", cut in place. */
static int parse_cgroup_line(struct attest *a, char *line)
{
    size_t digits = strspn(line, "0123456789");
    char *hierarchy = line + digits, *path;

    if (digits == 0 || digits > 9 || *hierarchy++ != ':' || a->ncgroups == ATTEST_CGROUPS)
        return -EACCES;
    /* A named hierarchy's name holds no colon; a path may. */
    path = strchr(hierarchy, ':');
    if (!path)
        return -EACCES;
    *path++ = 0;
    if ((*hierarchy == 0) != (digits == 1 && line[0] == '0'))
        return -EACCES;
    for (unsigned i = 0; i < a->ncgroups; i++)
        if (!strcmp(a->cgroups[i].hierarchy, hierarchy))
            return -EACCES;
    a->cgroups[a->ncgroups++] = (struct attest_cgroup){hierarchy, path};
    return scan_path(a, path);
}

int attest_parse_cgroups(struct attest *a, const char *text, size_t n)
{
    if (n == 0 || n > ATTEST_TEXT_MAX || memchr(text, 0, n) || text[n - 1] != '\n')
        return -EACCES;
    free(a->text);
    a->text = xmalloc(n + 1);
    memcpy(a->text, text, n);
    a->text[n] = 0;
    a->ncgroups = a->nids = 0;
    a->shaped = false;
    for (char *line = a->text, *end; *line; line = end + 1) {
        int rc;

        end = strchr(line, '\n');
        *end = 0;
        rc = parse_cgroup_line(a, line);
        if (rc < 0)
            return rc;
        if (end + 1 == a->text + n)
            break;
    }
    return 0;
}

/* --- the caller --- */

static int open_pidfd(pid_t tid, struct attest *a)
{
    int fd = (int)syscall(SYS_pidfd_open, tid, PIDFD_THREAD_FLAG);

    a->thread_pidfd = fd >= 0;
    /* Before Linux 6.9 only a thread group has one: good enough to see that the process lives, not to cache against. */
    if (fd < 0 && errno == EINVAL)
        fd = (int)syscall(SYS_pidfd_open, tid, 0);
    return fd < 0 ? -errno : fd;
}

static int read_status(struct attest *a)
{
    char path[64], *text = NULL;
    size_t n;
    int rc;

    snprintf(path, sizeof(path), "/proc/%d/status", (int)a->tid);
    rc = read_proc(path, STATUS_MAX, &text, &n);
    if (rc == 0)
        rc = attest_parse_status(a, text);
    free(text);
    return rc;
}

static int read_cgroups(struct attest *a)
{
    char path[64], *text = NULL;
    size_t n = 0;
    int rc;

    snprintf(path, sizeof(path), "/proc/%d/cgroup", (int)a->tid);
    rc = read_proc(path, ATTEST_TEXT_MAX, &text, &n);
    if (rc == 0)
        rc = attest_parse_cgroups(a, text, n);
    free(text);
    return rc;
}

/* Before Linux 6.9 a thread that is not its group's first has no pidfd of its own: its group's is taken, and the thread
 * must be seen in the group while that lives. */
static int group_pidfd(struct attest *a)
{
    int rc = read_status(a);

    if (rc < 0)
        return rc;
    a->pidfd = (int)syscall(SYS_pidfd_open, a->tgid, 0);
    return a->pidfd < 0 ? -errno : 0;
}

static int identify(pid_t tid, bool cgroups, struct attest **ret, const char **ret_reason)
{
    struct attest *a = xcalloc(1, sizeof(*a));
    pid_t tgid;
    int rc;

    a->tid = tid;
    *ret_reason = "the calling process is gone";
    a->pidfd = open_pidfd(tid, a);
    if (a->pidfd < 0) {
        rc = a->pidfd == -ENOENT || a->pidfd == -EINVAL ? group_pidfd(a) : a->pidfd;
        if (rc < 0)
            goto out;
    }
    tgid = a->tgid;
    rc = read_status(a);
    if (rc == 0 && tgid && tgid != a->tgid)
        rc = -ESRCH;
    if (rc < 0)
        *ret_reason = "the calling process's status cannot be read";
    if (rc == 0 && cgroups) {
        rc = read_cgroups(a);
        if (rc < 0)
            *ret_reason = "the calling process's cgroups cannot be read strictly";
    }
    if (!attest_alive(a)) {
        *ret_reason = "the calling process is gone";
        rc = -ESRCH;
    }
out:
    if (rc < 0) {
        attest_free(a);
        return rc == -ESRCH || rc == -ENOENT ? -ESRCH : -EACCES;
    }
    *ret_reason = NULL;
    *ret = a;
    return 0;
}

int attest_caller(pid_t tid, struct attest **ret, const char **ret_reason)
{
    return identify(tid, true, ret, ret_reason);
}

int attest_process(pid_t tid, struct attest **ret, const char **ret_reason)
{
    return identify(tid, false, ret, ret_reason);
}

void attest_free(struct attest *a)
{
    if (!a)
        return;
    close_quiet(a->pidfd);
    free(a->text);
    free(a);
}

bool attest_pidfd_alive(int pidfd)
{
    struct pollfd p = {.fd = pidfd, .events = POLLIN};

    /* A pidfd becomes readable when what it names has ended. */
    return pidfd >= 0 && poll(&p, 1, 0) == 0;
}

bool attest_alive(const struct attest *a)
{
    return attest_pidfd_alive(a->pidfd);
}

/* --- which container --- */

/* The number of components of path that name a known id; the last such in *ret_index, and the path's length up to and
 * including it in *ret_len. */
static int known_components(const struct attest *a, const char *path, const bool *known, int *ret_index,
                            size_t *ret_len)
{
    int count = 0;

    if (!path[1])
        return 0;
    for (const char *c = path; *c;) {
        size_t n = strcspn(++c, "/");
        const char *id = component_id(c, n);

        for (unsigned i = 0; id && i < a->nids; i++) {
            if (!known[i] || memcmp(a->ids[i], id, ID_HEX))
                continue;
            count++;
            *ret_index = (int)i;
            *ret_len = (size_t)(c + n - path);
        }
        c += n;
    }
    return count;
}

int attest_container(const struct attest *a, const bool *known, int *ret_index, const char **ret_reason)
{
    int found = -1;

    for (unsigned i = 0; i < a->ncgroups; i++) {
        int index = -1, count;
        size_t len;

        count = known_components(a, a->cgroups[i].path, known, &index, &len);
        if (count > 1) {
            *ret_reason = "the caller's cgroup path names two containers";
            return -EACCES;
        }
        if (count && found >= 0 && found != index) {
            *ret_reason = "the caller's cgroup hierarchies name different containers";
            return -EACCES;
        }
        if (count)
            found = index;
    }
    *ret_index = found;
    return 0;
}

/* --- identities --- */

int attest_identify(const struct attest_mounts *ms, const struct attest *a, const char *container,
                    struct attest_identity *ret)
{
    struct attest_identity id = {0};
    bool known[ATTEST_IDS] = {false};

    for (unsigned i = 0; container && i < a->nids; i++)
        known[i] = !strcmp(a->ids[i], container);
    for (unsigned i = 0; i < a->ncgroups; i++) {
        const struct attest_cgroup *g = &a->cgroups[i];
        const struct mount *m = mount_of(ms, g->hierarchy);
        size_t len = strlen(g->path);
        struct stat st;
        char *path;
        int index;

        if (!m || (container && !known_components(a, g->path, known, &index, &len)))
            continue;
        path = xasprintf("%s%.*s", m->dir, (int)len, g->path);
        if (stat(path, &st) < 0 || !S_ISDIR(st.st_mode)) {
            /* The caller is in it, so it was there: a hierarchy that cannot be looked at is no identity. */
            free(path);
            continue;
        }
        id.dirs[id.n++] = (struct attest_dir){(uint64_t)st.st_dev, (uint64_t)st.st_ino, m->v2, path};
    }
    if (!id.n)
        return -ENOENT;
    *ret = id;
    return 0;
}

void attest_identity_free(struct attest_identity *id)
{
    for (unsigned i = 0; i < id->n; i++)
        free(id->dirs[i].path);
    id->n = 0;
}

bool attest_identity_equal(const struct attest_identity *a, const struct attest_identity *b)
{
    if (a->n != b->n)
        return false;
    for (unsigned i = 0; i < a->n; i++)
        if (a->dirs[i].dev != b->dirs[i].dev || a->dirs[i].ino != b->dirs[i].ino)
            return false;
    return true;
}

/* Whether a v2 cgroup has processes. The root has no such file and never ends. */
static bool populated(const char *dir)
{
    char *path = xasprintf("%s/cgroup.events", dir), *text = NULL;
    size_t n;
    bool yes = true;

    if (read_proc(path, 4096, &text, &n) == 0)
        yes = !status_line(text, "populated 0\n");
    free(text);
    free(path);
    return yes;
}

bool attest_identity_alive(const struct attest_identity *id)
{
    for (unsigned i = 0; i < id->n; i++) {
        const struct attest_dir *d = &id->dirs[i];
        struct stat st;

        if (stat(d->path, &st) < 0 || (uint64_t)st.st_dev != d->dev || (uint64_t)st.st_ino != d->ino)
            return false;
        if (d->v2 && !populated(d->path))
            return false;
    }
    return true;
}

void attest_identity_watch(const struct attest_identity *id, int inotify_fd)
{
    for (unsigned i = 0; i < id->n; i++) {
        const struct attest_dir *d = &id->dirs[i];
        char *events = xasprintf("%s/cgroup.events", d->path), *parent = xstrdup(d->path), *slash;

        slash = strrchr(parent, '/');
        if (slash && slash != parent)
            *slash = 0;
        /* Watches on one inode are one watch, and end with it: nothing piles up. */
        inotify_add_watch(inotify_fd, parent, IN_DELETE | IN_ONLYDIR);
        if (d->v2)
            inotify_add_watch(inotify_fd, events, IN_MODIFY);
        free(events);
        free(parent);
    }
}
