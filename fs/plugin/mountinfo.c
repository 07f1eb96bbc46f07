/*
 * mountinfo.c - see mountinfo.h. Owns nothing. Another process's mountinfo is read as the kernel's statement of what is
 * mounted, never as evidence of who somebody is.
 */
#include "mountinfo.h"

#include "common.h"

#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

typedef void (*mount_fn)(void *ctx, const char *dev, const char *point);

void mountinfo_unescape(char *s)
{
    char *out = s;

    while (*s) {
        if (s[0] == '\\' && s[1] >= '0' && s[1] <= '3' && s[2] >= '0' && s[2] <= '7' && s[3] >= '0' && s[3] <= '7') {
            *out++ = (char)((s[1] - '0') << 6 | (s[2] - '0') << 3 | (s[3] - '0'));
            s += 4;
        } else {
            *out++ = *s++;
        }
    }
    *out = 0;
}

static int scan(const char *path, mount_fn fn, void *ctx)
{
    FILE *f = fopen(path, "re");
    char *line = NULL;
    size_t cap = 0;

    if (!f)
        return -errno;
    while (getline(&line, &cap, f) > 0) {
        /* id parent major:minor root mountpoint ... */
        char *save = NULL, *field[5] = {NULL};
        int n = 0;

        for (char *t = strtok_r(line, " ", &save); t && n < 5; t = strtok_r(NULL, " ", &save))
            field[n++] = t;
        if (n < 5)
            continue;
        mountinfo_unescape(field[4]);
        fn(ctx, field[2], field[4]);
    }
    free(line);
    fclose(f);
    return 0;
}

struct find {
    const char *path;
    char *dev;
    bool found;
};

static void find_one(void *ctx, const char *dev, const char *point)
{
    struct find *f = ctx;

    /* Later lines lie on top of earlier ones. */
    if (!strcmp(point, f->path) && strlen(dev) < MOUNT_DEV_MAX) {
        strcpy(f->dev, dev);
        f->found = true;
    }
}

int mountinfo_device(const char *path, char ret_dev[MOUNT_DEV_MAX])
{
    char dev[MOUNT_DEV_MAX] = "";
    struct find f = {.path = path, .dev = dev};
    int rc = scan("/proc/self/mountinfo", find_one, &f);

    if (rc < 0)
        return rc;
    if (!f.found)
        return -ENOENT;
    strcpy(ret_dev, dev);
    return 0;
}

struct elsewhere {
    const char *dev;
    const char *const *ours;
    size_t n;
    bool own_namespace, found;
};

static bool ends_with(const char *s, const char *end)
{
    size_t n = strlen(s), m = strlen(end);

    return n >= m && !strcmp(s + n - m, end);
}

static void look_elsewhere(void *ctx, const char *dev, const char *point)
{
    struct elsewhere *e = ctx;

    if (strcmp(dev, e->dev) != 0)
        return;
    for (size_t i = 0; i < e->n; i++) {
        if (e->own_namespace ? !strcmp(point, e->ours[i]) : ends_with(point, e->ours[i]))
            return;
    }
    e->found = true;
}

/* Mount namespaces already looked at, by inode number. */
struct seen {
    uint64_t *ns;
    size_t n;
};

static bool seen_before(struct seen *s, uint64_t ns)
{
    for (size_t i = 0; i < s->n; i++) {
        if (s->ns[i] == ns)
            return true;
    }
    s->ns = xrealloc(s->ns, (s->n + 1) * sizeof(*s->ns));
    s->ns[s->n++] = ns;
    return false;
}

bool mountinfo_used_elsewhere(const char *dev, const char *const *our_paths, size_t n)
{
    struct elsewhere e = {.dev = dev, .ours = our_paths, .n = n, .own_namespace = true};
    struct seen seen = {NULL, 0};
    unsigned long long ns = 0;
    struct dirent *d;
    DIR *proc = NULL;

    scan("/proc/self/mountinfo", look_elsewhere, &e);
    if (sscanf(plugin_config.mnt_ns, "mnt:[%llu]", &ns) == 1)
        seen_before(&seen, ns);
    e.own_namespace = false;
    proc = opendir("/proc");
    while (proc && !e.found && (d = readdir(proc))) {
        char path[300], link[64];
        ssize_t k;

        if (!isdigit((unsigned char)d->d_name[0]))
            continue;
        snprintf(path, sizeof(path), "/proc/%s/ns/mnt", d->d_name);
        k = readlink(path, link, sizeof(link) - 1);
        if (k <= 0)
            continue;
        link[k] = 0;
        if (sscanf(link, "mnt:[%llu]", &ns) != 1 || seen_before(&seen, ns))
            continue;
        snprintf(path, sizeof(path), "/proc/%s/mountinfo", d->d_name);
        scan(path, look_elsewhere, &e);
    }
    if (proc)
        closedir(proc);
    free(seen.ns);
    return e.found;
}
