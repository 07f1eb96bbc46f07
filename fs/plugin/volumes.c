/*
 * volumes.c - see volumes.h. Owns the directories <state>/volumes/<id>.
 *
 * Making a volume, each step durable before the next: record in the keystore (NEW), rules, directory with two empty files,
 * format, record FRESH, state file. So after a crash a volume is either listed and whole, or:
 *   NEW in the keystore     never held data: the next create of that name, or unlock, destroys it
 *   FRESH, but not listed   whole: the next create, or unlock, takes it into the list
 * Files that are not empty are never formatted: each try has a directory of its own, named by the new record's id.
 */
#include "volumes.h"

#include "agent_client.h"
#include "fsproc.h"
#include "mounts.h"
#include "supervisor.h"

#include <ctype.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#define MIB           (1ull << 20)
#define CARE_FDS_MAX  2                  /* of a task */
#define SPAWN_FDS     (3 + CARE_FDS_MAX) /* agent, data, log */
#define STAT_MS       1000
#define BLOCK_DEFAULT 4096
#define MODE_DEFAULT  0755

/* --- specs --- */

void volumes_spec_init(struct volume_spec *s)
{
    *s = (struct volume_spec){.block = BLOCK_DEFAULT, .profile = VOLUME_PROFILE_GENERAL, .mode = MODE_DEFAULT};
}

int volumes_spec_add_rule(struct volume_spec *s, bool deny, const char *rule, size_t n, struct why *why)
{
    char **rules = deny ? s->deny : s->allow;
    size_t *count = deny ? &s->ndeny : &s->nallow;

    while (n && isspace((unsigned char)*rule))
        rule++, n--;
    while (n && isspace((unsigned char)rule[n - 1]))
        n--;
    if (n == 0)
        return why_set(why, -EINVAL, "a rule is empty");
    if (n >= AGENT_RULE_MAX)
        return why_set(why, -EINVAL, "a rule has at most %d characters", AGENT_RULE_MAX - 1);
    if (s->nallow + s->ndeny >= AGENT_RULES_MAX)
        return why_set(why, -E2BIG, "a volume has at most %d rules", AGENT_RULES_MAX);
    rules[*count] = xcalloc(n + 1, 1);
    memcpy(rules[(*count)++], rule, n);
    return 0;
}

static int opt_size(struct volume_spec *s, const char *value, struct why *why)
{
    if (size_parse(value, &s->size) < 0 || s->size == 0)
        return why_set(why, -EINVAL, "size: give bytes or a number with K, M, G or T");
    return 0;
}

static int opt_block(struct volume_spec *s, const char *value, struct why *why)
{
    uint64_t n;

    if (size_parse(value, &n) < 0 || n > UINT32_MAX)
        return why_set(why, -EINVAL, "block: give 4k, 8k or 16k");
    s->block = (uint32_t)n;
    return 0;
}

static int opt_profile(struct volume_spec *s, const char *value, struct why *why)
{
    if (strcmp(value, "general") != 0 && strcmp(value, "database") != 0)
        return why_set(why, -EINVAL, "profile: give general or database");
    s->profile = strcmp(value, "general") ? VOLUME_PROFILE_DATABASE : VOLUME_PROFILE_GENERAL;
    return 0;
}

static int opt_rules(struct volume_spec *s, bool deny, const char *value, struct why *why)
{
    int rc = 0;

    while (rc == 0) {
        size_t n = strcspn(value, ";");

        rc = volumes_spec_add_rule(s, deny, value, n, why);
        if (!value[n])
            break;
        value += n + 1;
    }
    return rc;
}

static int opt_allow(struct volume_spec *s, const char *value, struct why *why)
{
    return opt_rules(s, false, value, why);
}

static int opt_deny(struct volume_spec *s, const char *value, struct why *why)
{
    return opt_rules(s, true, value, why);
}

static int number(const char *key, const char *value, int base, uint32_t max, uint32_t *ret, struct why *why)
{
    unsigned long long n;
    char *end;

    errno = 0;
    n = strtoull(value, &end, base);
    if (!isdigit((unsigned char)*value) || *end || errno || n > max)
        return why_set(why, -EINVAL, "%s: give a number up to %u", key, max);
    *ret = (uint32_t)n;
    return 0;
}

static int opt_uid(struct volume_spec *s, const char *value, struct why *why)
{
    return number("uid", value, 10, UINT32_MAX - 1, &s->uid, why);
}

static int opt_gid(struct volume_spec *s, const char *value, struct why *why)
{
    return number("gid", value, 10, UINT32_MAX - 1, &s->gid, why);
}

static int opt_mode(struct volume_spec *s, const char *value, struct why *why)
{
    if (number("mode", value, 8, 07777, &s->mode, why) < 0)
        return why_set(why, -EINVAL, "mode: give an octal number up to 7777");
    return 0;
}

static int opt_strict(struct volume_spec *s, const char *value, struct why *why)
{
    bool yes = !*value || !strcmp(value, "true") || !strcmp(value, "1") || !strcmp(value, "yes");

    if (!yes && strcmp(value, "false") != 0 && strcmp(value, "0") != 0 && strcmp(value, "no") != 0)
        return why_set(why, -EINVAL, "strict: give true or false");
    s->strict = yes;
    return 0;
}

static const struct option {
    const char *key;
    int (*parse)(struct volume_spec *s, const char *value, struct why *why);
} options_known[] = {
    {"size", opt_size}, {"block", opt_block}, {"profile", opt_profile}, {"allow", opt_allow},   {"deny", opt_deny},
    {"uid", opt_uid},   {"gid", opt_gid},     {"mode", opt_mode},       {"strict", opt_strict},
};

static int parse_option(struct volume_spec *s, const char *key, json_t *value, struct why *why)
{
    for (size_t i = 0; i < ARRAY_LEN(options_known); i++) {
        if (strcmp(key, options_known[i].key) != 0)
            continue;
        if (!json_is_string(value))
            return why_set(why, -EINVAL, "option %s: give a text", key);
        return options_known[i].parse(s, json_string_value(value), why);
    }
    return why_set(why, -EINVAL,
                   "unknown option \"%.64s\": known are size, block, profile, allow, deny, uid, gid, mode, strict",
                   key);
}

int volumes_spec_from_options(json_t *options, struct volume_spec *s, struct why *why)
{
    const char *key;
    json_t *value;

    volumes_spec_init(s);
    if (!options || json_is_null(options))
        return 0;
    if (!json_is_object(options))
        return why_set(why, -EINVAL, "\"Opts\" is not an object");
    json_object_foreach(options, key, value)
    {
        int rc = parse_option(s, key, value, why);

        if (rc < 0)
            return rc;
    }
    return volumes_spec_check(s, why);
}

int volumes_spec_check(const struct volume_spec *s, struct why *why)
{
    if (s->block != 4096 && s->block != 8192 && s->block != 16384)
        return why_set(why, -EINVAL, "block: give 4k, 8k or 16k");
    if (s->size && (s->size < VOLUME_SIZE_MIN || s->size > VOLUME_SIZE_MAX))
        return why_set(why, -EINVAL, "size: give 64M to 16T");
    if (s->mode > 07777)
        return why_set(why, -EINVAL, "mode: give an octal number up to 7777");
    if (s->uid == UINT32_MAX || s->gid == UINT32_MAX)
        return why_set(why, -EINVAL, "uid, gid: give a number below 4294967295");
    return 0;
}

/* The whole backing filesystem. */
static uint64_t default_size(void)
{
    struct statvfs st;
    uint64_t total = 0;

    if (fstatvfs(plugin_config.volumes_fd, &st) == 0)
        total = (uint64_t)st.f_blocks * st.f_frsize / MIB * MIB;
    return MIN(MAX(total, VOLUME_SIZE_MIN), VOLUME_SIZE_MAX);
}

static bool same_as_existing(const struct plugin_volume *v, const struct volume_spec *s)
{
    struct volume_spec a = *s, b = v->spec;

    if (s->size == 0 ? b.size == 0 || b.size == default_size() : s->size == v->params.size_limit || s->size == b.size)
        a.size = b.size;
    return volume_spec_equal(&a, &b);
}

/* Whether a rule has a selector that no process in a container meets. */
static bool is_local_rule(const char *rule)
{
    while (*rule) {
        rule += strspn(rule, " \t,");
        if (!strncmp(rule, "uid:", 4))
            return true;
        rule += strcspn(rule, ",");
    }
    return false;
}

static bool spec_attached(const struct volume_spec *s, bool engine)
{
    for (size_t i = 0; i < s->nallow && !engine; i++) {
        if (is_local_rule(s->allow[i]))
            return false;
    }
    return true;
}

/* --- files --- */

static int make_file(int dir, const char *name)
{
    int fd = openat(dir, name, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600), rc = 0;

    if (fd < 0)
        return -errno;
    if (fsync(fd) < 0)
        rc = -errno;
    close_quiet(fd);
    return rc;
}

static int make_files(const uint8_t id[VOLUME_ID_BYTES])
{
    char hex[2 * VOLUME_ID_BYTES + 1];
    int dir = -1, rc = 0;

    hex_encode(id, VOLUME_ID_BYTES, hex);
    if (mkdirat(plugin_config.volumes_fd, hex, 0700) < 0)
        return -errno;
    dir = openat(plugin_config.volumes_fd, hex, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    rc = dir < 0 ? -errno : make_file(dir, "data");
    if (rc == 0)
        rc = make_file(dir, "log");
    if (rc == 0 && (fsync(dir) < 0 || fsync(plugin_config.volumes_fd) < 0))
        rc = -errno;
    close_quiet(dir);
    return rc;
}

static int remove_files(const uint8_t id[VOLUME_ID_BYTES])
{
    char hex[2 * VOLUME_ID_BYTES + 1];
    int dir, rc = 0;

    hex_encode(id, VOLUME_ID_BYTES, hex);
    dir = openat(plugin_config.volumes_fd, hex, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (dir < 0)
        return errno == ENOENT ? 0 : -errno;
    if ((unlinkat(dir, "data", 0) < 0 && errno != ENOENT) || (unlinkat(dir, "log", 0) < 0 && errno != ENOENT))
        rc = -errno;
    close_quiet(dir);
    if (rc == 0 && unlinkat(plugin_config.volumes_fd, hex, AT_REMOVEDIR) < 0)
        rc = -errno;
    if (rc == 0 && fsync(plugin_config.volumes_fd) < 0)
        rc = -errno;
    return rc;
}

static bool files_exist(const uint8_t id[VOLUME_ID_BYTES])
{
    char hex[2 * VOLUME_ID_BYTES + 1], *path;
    struct stat st;
    bool there;

    hex_encode(id, VOLUME_ID_BYTES, hex);
    path = xasprintf("%s/data", hex);
    there = fstatat(plugin_config.volumes_fd, path, &st, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(st.st_mode) && st.st_size;
    free(path);
    return there;
}

/* --- making --- */

static void take_record(struct plugin_volume *v, const struct agent_volume *av)
{
    memcpy(v->id, av->params.id, sizeof(v->id));
    v->params = av->params;
    v->created_ns = av->created_ns;
    v->strict = av->strict;
    v->attached = av->attached;
}

static int list_volume(struct plugin_volume *v, uint32_t kind, json_t *rules, struct why *why)
{
    json_t *old;
    int rc;

    pthread_mutex_lock(&registry_lock);
    old = v->rules;
    v->rules = rules;
    v->kind = kind;
    v->listed = true;
    pthread_mutex_unlock(&registry_lock);
    json_decref(old);
    rc = registry_save();
    if (rc < 0) {
        registry_set_listed(v, false);
        return why_set(why, rc, "cannot write the state file: %s", strerror(-rc));
    }
    return 0;
}

/* Takes a volume that is whole but not listed. op_lock held. */
static int take_over(struct plugin_volume *v, const struct agent_volume *av, struct why *why)
{
    json_t *rules = NULL, *rule;
    size_t i;
    int rc;

    if (!files_exist(av->params.id))
        return why_set(why, -EIO,
                       "the keystore knows volume %s, but its files are not there: bring them back, or "
                       "remove it with coffer volume rm %s",
                       v->name, v->name);
    rc = agent_rules_get(v->name, &rules, why);
    if (rc < 0)
        return rc;
    take_record(v, av);
    volume_spec_clear(&v->spec);
    v->spec = (struct volume_spec){.size = av->params.size_limit,
                                   .block = av->params.block_size,
                                   .profile = av->params.profile,
                                   .uid = av->params.root_uid,
                                   .gid = av->params.root_gid,
                                   .mode = av->params.root_mode,
                                   .strict = av->strict};
    json_array_foreach(rules, i, rule)
    {
        const char *text = json_string_value(json_object_get(rule, "rule"));
        const char *effect = json_string_value(json_object_get(rule, "effect"));

        if (volumes_spec_add_rule(&v->spec, !strcmp(effect, "deny"), text, strlen(text), why) < 0)
            break;
    }
    log_info("volume %s: taken over from the keystore", v->name);
    return list_volume(v, av->state, rules, why);
}

static int add_record(struct plugin_volume *v, const struct volume_spec *s, bool engine, struct agent_volume *ret,
                      struct why *why)
{
    struct agent_volume ask = {.state = AGENT_VOLUME_NEW,
                               .created_ns = now_ns(),
                               .params = {.block_size = s->block,
                                          .profile = s->profile,
                                          .size_limit = s->size ? s->size : default_size(),
                                          .root_mode = s->mode,
                                          .root_uid = s->uid,
                                          .root_gid = s->gid},
                               .strict = s->strict,
                               .attached = spec_attached(s, engine)};
    int rc;

    agent_set_name(ask.name, v->name);
    rc = agent_call(AGENT_VOLUME_ADD, &ask, sizeof(ask), NULL, 0, AGENT_VOLUME_GET, ret, sizeof(*ret), AGENT_WAIT_MS,
                    why);
    for (size_t i = 0; i < s->nallow && rc == 0; i++)
        rc = agent_rule(AGENT_RULE_ADD, v->name, false, s->allow[i], why);
    for (size_t i = 0; i < s->ndeny && rc == 0; i++)
        rc = agent_rule(AGENT_RULE_ADD, v->name, true, s->deny[i], why);
    return rc;
}

/* Empty, or with an import's content. */
static int format(struct plugin_volume *v, const struct volume_import *import, struct why *why)
{
    int data = -1, log = -1, agent = -1, rc;

    rc = mounts_open_backing(v, &data, &log, why);
    if (rc == 0)
        rc = agent_bind(v->name, AGENT_PURPOSE_FORMAT, &agent, why);
    if (rc == 0)
        rc = import ? fsproc_run("import", v->name, NULL,
                                 (const int[]){agent, data, log, import->fds[0], import->fds[1]}, 5, import->sink, why)
                    : fsproc_run("format", v->name, NULL, (const int[]){agent, data, log}, 3, NULL, why);
    close_quiet(data);
    close_quiet(log);
    close_quiet(agent);
    return rc;
}

/* Of a volume that never held data. The record goes last: as long as it is there, somebody finds the files. True when
 * nothing is left. */
static bool roll_back(struct plugin_volume *v)
{
    struct why why;
    int rc = remove_files(v->id);

    if (rc < 0) {
        log_err("volume %s: its files are not removed (the next create or unlock does it): %s", v->name, strerror(-rc));
        return false;
    }
    rc = agent_volume_rm(v->name, &why);
    if (rc < 0 && rc != -ENOENT)
        log_err("volume %s: not undone in the keystore (the next create or unlock does it): %s", v->name, why.text);
    return rc == 0 || rc == -ENOENT;
}

/* What a create left that was broken off. op_lock held. */
static bool discard(struct plugin_volume *v, const struct agent_volume *av)
{
    take_record(v, av);
    log_info("volume %s: what a broken-off create left is removed", v->name);
    return roll_back(v);
}

static int make(struct plugin_volume *v, const struct volume_spec *s, bool engine, const struct volume_import *import,
                struct why *why)
{
    struct agent_volume av = {0};
    json_t *rules = NULL;
    bool added;
    int rc;

    rc = add_record(v, s, engine, &av, why);
    added = av.params.block_size != 0;
    if (!added)
        return rc;
    take_record(v, &av);
    if (rc == 0) {
        rc = make_files(v->id);
        if (rc < 0)
            why_set(why, rc, "cannot make the volume's files in %s/volumes: %s", plugin_config.state_dir,
                    strerror(-rc));
    }
    if (rc == 0)
        rc = format(v, import, why);
    if (rc == 0)
        rc = agent_rules_get(v->name, &rules, why);
    if (rc == 0)
        rc = agent_volume_set_state(v->name, AGENT_VOLUME_FRESH, why);
    if (rc < 0) {
        json_decref(rules);
        roll_back(v);
        return rc;
    }
    volume_spec_clear(&v->spec);
    v->spec = *s;
    v->spec.nallow = v->spec.ndeny = 0;
    for (size_t i = 0; i < s->nallow; i++)
        v->spec.allow[v->spec.nallow++] = xstrdup(s->allow[i]);
    for (size_t i = 0; i < s->ndeny; i++)
        v->spec.deny[v->spec.ndeny++] = xstrdup(s->deny[i]);
    return list_volume(v, AGENT_VOLUME_FRESH, rules, why);
}

/* op_lock held. */
static int create_locked(struct plugin_volume *v, const struct volume_spec *s, bool engine,
                         const struct volume_import *import, struct why *why)
{
    struct agent_volume av;
    int rc = 0;

    if (!registry_is_listed(v)) {
        rc = agent_need_unlocked(why);
        if (rc < 0)
            return rc;
        rc = agent_volume_get(v->name, &av, why);
        if (rc == -ENOENT)
            return make(v, s, engine, import, why);
        if (rc == 0 && av.state == AGENT_VOLUME_NEW) {
            discard(v, &av);
            return make(v, s, engine, import, why);
        }
        if (rc == 0)
            rc = take_over(v, &av, why);
        if (rc < 0)
            return rc;
    }
    if (!engine || import)
        return why_set(why, -EEXIST, "volume %s exists already", v->name);
    if (!same_as_existing(v, s))
        return why_set(why, -EEXIST, "volume %s exists already with other options", v->name);
    return 0;
}

static int check_name(const char *name, struct why *why)
{
    if (volume_name_ok(name))
        return 0;
    return why_set(why, -EINVAL,
                   "a volume's name has 1 to %d characters of a-z A-Z 0-9 _ . - and begins with a "
                   "letter or digit",
                   VOLUME_NAME_MAX);
}

int volumes_create(const char *name, const struct volume_spec *s, bool engine, const struct volume_import *import,
                   struct why *why)
{
    struct plugin_volume *v = NULL;
    int rc = check_name(name, why);

    if (rc < 0)
        return rc;
    v = registry_reserve_ref(name);
    if (mutex_lock_for(&v->op_lock, MOUNTS_PATIENCE_MS) < 0) {
        rc = why_set(why, -EBUSY, "volume %s is busy with another operation: try again later", name);
    } else {
        rc = create_locked(v, s, engine, import, why);
        pthread_mutex_unlock(&v->op_lock);
    }
    registry_unref(v);
    return rc;
}

/* --- removing --- */

/* A record without a listed volume: what a crash or a lost state file left. */
static int remove_unlisted(struct plugin_volume *v, struct why *why)
{
    struct agent_volume av;
    int rc = agent_volume_get(v->name, &av, why);

    if (rc == -ENOENT)
        return why_set(why, -ENOENT, "no such volume: %s", v->name);
    if (rc == 0)
        rc = agent_volume_rm(v->name, why);
    if (rc < 0)
        return rc;
    rc = remove_files(av.params.id);
    return rc < 0 ? why_set(why, rc, "its key is destroyed, but its files are not removed: %s", strerror(-rc)) : 0;
}

static int remove_locked(struct plugin_volume *v, struct why *why)
{
    int rc;

    if (!registry_is_listed(v))
        return remove_unlisted(v, why);
    if (mounts_busy(v))
        return why_set(why, -EBUSY, "volume %s is in use: stop the containers that use it, or unmount it", v->name);
    rc = mounts_need_no_snapshots(v, why);
    if (rc < 0)
        return rc;
    rc = agent_volume_rm(v->name, why);
    /* -ENOENT: an earlier remove was broken off after the key was destroyed. */
    if (rc < 0 && rc != -ENOENT)
        return rc;
    rc = remove_files(v->id);
    if (rc < 0)
        return why_set(why, rc, "its key is destroyed, but its files are not removed: %s", strerror(-rc));
    registry_set_listed(v, false);
    registry_save();
    return 0;
}

int volumes_remove(const char *name, struct why *why)
{
    struct plugin_volume *v = NULL;
    int rc = check_name(name, why);

    if (rc < 0)
        return rc;
    v = registry_reserve_ref(name);
    if (mutex_lock_for(&v->op_lock, MOUNTS_PATIENCE_MS) < 0) {
        rc = why_set(why, -EBUSY, "volume %s is busy with another operation: try again later", name);
    } else {
        rc = remove_locked(v, why);
        pthread_mutex_unlock(&v->op_lock);
    }
    registry_unref(v);
    return rc;
}

/* --- looking after --- */

struct care {
    const char *verb;                            /* of coffer-fs, for one that is not mounted; NULL: it must be */
    enum server_task_kind task;                  /* of its server; 0: it must not be mounted */
    const char *options[FSPROC_OPTIONS_MAX + 1]; /* of the verb */
    uint64_t value;
    const char *snapshot, *since; /* names, or NULL */
    const int *fds;
    int nfds;
};

/* op_lock held, not mounted. */
static int care_unmounted(struct plugin_volume *v, const struct care *c, const struct fsproc_sink *sink,
                          struct why *why)
{
    int fds[SPAWN_FDS] = {-1, -1, -1}, rc;

    rc = agent_need_unlocked(why);
    if (rc == 0)
        rc = mounts_open_backing(v, &fds[1], &fds[2], why);
    if (rc == 0)
        rc = agent_bind(v->name, AGENT_PURPOSE_CHECK, &fds[0], why);
    if (c->nfds)
        memcpy(fds + 3, c->fds, sizeof(int) * (size_t)c->nfds);
    if (rc == 0)
        rc = fsproc_run(c->verb, v->name, c->options, fds, 3 + c->nfds, sink, why);
    for (int i = 0; i < 3; i++)
        close_quiet(fds[i]);
    return rc;
}

/* Mounted, but not open: its server gets the operator's word. */
static int care_unused(struct plugin_volume *v, struct fsproc *fs, const struct care *c, struct server_task *task,
                       const struct fsproc_sink *sink, struct why *why)
{
    int fds[CARE_FDS_MAX + 1], rc = agent_need_unlocked(why);

    if (rc < 0)
        return rc;
    if (c->nfds)
        memcpy(fds, c->fds, sizeof(int) * (size_t)c->nfds);
    rc = agent_bind(v->name, AGENT_PURPOSE_CHECK, &fds[c->nfds], why);
    if (rc < 0)
        return rc;
    task->agent = 1;
    rc = fsproc_task(fs, task, fds, c->nfds + 1, sink, why);
    close_quiet(fds[c->nfds]);
    return rc;
}

static int care(struct plugin_volume *v, const struct care *c, const struct fsproc_sink *sink, struct why *why)
{
    struct server_task task = {.kind = c->task, .value = c->value};
    struct fsproc *fs = mounts_server_ref(v);
    int rc;

    snprintf(task.name, sizeof(task.name), "%s", c->snapshot ? c->snapshot : "");
    snprintf(task.since, sizeof(task.since), "%s", c->since ? c->since : "");
    if (fs && !c->task) {
        rc = why_set(why, -EBUSY, "volume %s is mounted: stop the containers that use it, or unmount it", v->name);
    } else if (fs) {
        rc = fsproc_task(fs, &task, c->fds, c->nfds, sink, why);
        if (rc == -ENOKEY) /* nobody has used it since it was mounted, or since the keystore was unlocked */
            rc = care_unused(v, fs, c, &task, sink, why);
    } else if (!c->verb) {
        rc = why_set(why, -EINVAL, "volume %s is not mounted: run coffer volume check --data %s", v->name, v->name);
    } else if (mutex_lock_for(&v->op_lock, MOUNTS_PATIENCE_MS) < 0) {
        rc = why_set(why, -EBUSY, "volume %s is busy with another operation: try again later", v->name);
    } else {
        if (mounts_busy(v))
            rc = why_set(why, -EBUSY, "volume %s is in use: try again, or unmount it", v->name);
        else
            rc = c->task ? 0 : mounts_need_no_snapshots(v, why);
        if (rc == 0)
            rc = care_unmounted(v, c, sink, why);
        pthread_mutex_unlock(&v->op_lock);
    }
    fsproc_unref(fs);
    return rc;
}

int volumes_check(struct plugin_volume *v, bool data, const struct fsproc_sink *sink, struct why *why)
{
    const struct care c = {.verb = "check", .task = TASK_CHECK, .options = {data ? "--data" : NULL}, .value = data};

    return care(v, &c, sink, why);
}

int volumes_repair(struct plugin_volume *v, const struct fsproc_sink *sink, struct why *why)
{
    const struct care c = {.verb = "repair"};
    char text[64];
    int rc;

    agent_note(v->name, "repair", "repair began");
    rc = care(v, &c, sink, why);
    snprintf(text, sizeof(text), rc < 0 ? "repair failed" : "repair ended: %d things lost or mended", rc);
    agent_note(v->name, "repair", text);
    return rc;
}

int volumes_scrub(struct plugin_volume *v, uint64_t rate, struct why *why)
{
    static const struct fsproc_sink none;
    const struct care c = {.task = TASK_SCRUB, .value = rate};

    return care(v, &c, &none, why);
}

/* The volume's own limit first: the record only says what it is. */
int volumes_resize(struct plugin_volume *v, uint64_t size, struct why *why)
{
    static const struct fsproc_sink none;
    char value[24];
    const struct care c = {.verb = "resize", .task = TASK_RESIZE, .options = {"--size", value}, .value = size};
    int rc;

    snprintf(value, sizeof(value), "%llu", (unsigned long long)size);

    if (size < VOLUME_SIZE_MIN || size > VOLUME_SIZE_MAX)
        return why_set(why, -EINVAL, "size: give 64M to 16T");
    rc = agent_need_unlocked(why);
    if (rc == 0)
        rc = care(v, &c, &none, why);
    if (rc == 0)
        rc = agent_volume_set_size(v->name, size, why);
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&registry_lock);
    v->params.size_limit = size;
    pthread_mutex_unlock(&registry_lock);
    rc = registry_save();
    return rc < 0 ? why_set(why, rc, "it is done, but the state file cannot be written: %s", strerror(-rc)) : 0;
}

static int check_snapshot_name(const char *snapshot, struct why *why)
{
    if (snapshot_name_ok(snapshot, strlen(snapshot)))
        return 0;
    return why_set(why, -EINVAL,
                   "a snapshot's name is 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first");
}

int volumes_export(struct plugin_volume *v, const char *snapshot, const char *since, const int fds[2],
                   const struct fsproc_sink *sink, struct why *why)
{
    struct care c = {
        .verb = "export", .task = TASK_EXPORT, .snapshot = snapshot, .since = since, .fds = fds, .nfds = 2};
    const char **option = c.options;
    int rc = snapshot ? check_snapshot_name(snapshot, why) : 0;

    if (rc == 0 && since)
        rc = check_snapshot_name(since, why);
    if (rc < 0)
        return rc;
    if (snapshot)
        *option++ = "--snapshot", *option++ = snapshot;
    if (since)
        *option++ = "--since", *option++ = since;
    agent_note(v->name, "export",
               since ? "the operator exports what changed of the volume" : "the operator exports the volume");
    return care(v, &c, sink, why);
}

/* --- snapshots --- */

static int change_snapshots(struct plugin_volume *v, const struct care *c, const char *done, struct why *why)
{
    static const struct fsproc_sink none;
    char text[AGENT_TEXT_MAX];
    int rc = check_snapshot_name(c->snapshot, why);

    if (rc == 0)
        rc = agent_need_unlocked(why);
    if (rc == 0)
        rc = care(v, c, &none, why);
    if (rc < 0)
        return rc;
    snprintf(text, sizeof(text), "the operator %s the snapshot %s", done, c->snapshot);
    agent_note(v->name, "snapshot", text);
    return 0;
}

int volumes_snapshot_create(struct plugin_volume *v, const char *snapshot, struct why *why)
{
    const struct care c = {.verb = "snapshot-create",
                           .task = TASK_SNAPSHOT_CREATE,
                           .options = {"--snapshot", snapshot},
                           .snapshot = snapshot};

    return change_snapshots(v, &c, "made", why);
}

/* Nobody mounts it meanwhile: that takes the same entry's lock. */
int volumes_snapshot_remove(struct plugin_volume *v, const char *snapshot, struct why *why)
{
    const struct care c = {.verb = "snapshot-remove",
                           .task = TASK_SNAPSHOT_REMOVE,
                           .options = {"--snapshot", snapshot},
                           .snapshot = snapshot};
    int rc = check_snapshot_name(snapshot, why);
    struct plugin_volume *s;

    if (rc < 0)
        return rc;
    s = registry_reserve_snapshot_ref(v, snapshot);
    if (mutex_lock_for(&s->op_lock, MOUNTS_PATIENCE_MS) < 0) {
        rc = why_set(why, -EBUSY, "snapshot %s is busy with another operation: try again later", s->name);
    } else {
        rc = mounts_busy(s) ? why_set(why, -EBUSY, "snapshot %s is mounted: unmount it first", s->name)
                            : change_snapshots(v, &c, "removed", why);
        pthread_mutex_unlock(&s->op_lock);
    }
    registry_unref(s);
    return rc;
}

static void rfc3339(int64_t ns, char out[32]);

struct snapshot_list {
    const struct plugin_volume *v;
    json_t *list;
};

/* A line as server.h has it; what is none is left out: coffer-fs may have been taken over. */
static void add_snapshot(void *ctx, const char *text)
{
    struct snapshot_list *l = ctx;
    const char *space = strchr(text, ' ');
    long long created;
    unsigned long long used;
    struct plugin_volume *s;
    char when[32], *name;

    if (!space || !snapshot_name_ok(text, (size_t)(space - text)) || sscanf(space, " %lld %llu", &created, &used) != 2)
        return;
    rfc3339(created, when);
    name = xasprintf("%s@%.*s", l->v->name, (int)(space - text), text);
    s = registry_find_mount_ref(name);
    json_array_append_new(l->list, json_pack("{s:s%, s:s, s:I, s:b}", "name", text, (size_t)(space - text), "created",
                                             when, "used", (json_int_t)used, "mounted", (int)(s != NULL)));
    registry_unref(s);
    free(name);
}

int volumes_snapshot_list(struct plugin_volume *v, json_t **ret, struct why *why)
{
    static const struct care c = {.verb = "snapshot-list", .task = TASK_SNAPSHOT_LIST};
    json_t *list = json_array();
    struct snapshot_list l = {v, list};
    const struct fsproc_sink sink = {.line = add_snapshot, .ctx = &l};
    int rc = agent_need_unlocked(why);

    if (rc == 0)
        rc = care(v, &c, &sink, why);
    if (rc < 0) {
        json_decref(list);
        return rc;
    }
    *ret = list;
    return 0;
}

/* Its server would find out only when it is used. */
static int need_snapshot(struct plugin_volume *v, const char *snapshot, struct why *why)
{
    json_t *list, *s;
    bool found = false;
    size_t i;
    int rc = volumes_snapshot_list(v, &list, why);

    if (rc < 0)
        return rc;
    json_array_foreach(list, i, s) found |= strcmp(json_string_value(json_object_get(s, "name")), snapshot) == 0;
    json_decref(list);
    return found ? 0 : why_set(why, -ENOENT, "volume %s: %s", v->name, server_snapshot_error(-ENOENT));
}

int volumes_snapshot_mount(struct plugin_volume *v, const char *snapshot, const char *dir, struct why *why)
{
    int rc = check_snapshot_name(snapshot, why);
    struct plugin_volume *s;
    struct why ignored;

    if (rc == 0)
        rc = need_snapshot(v, snapshot, why);
    if (rc < 0)
        return rc;
    s = registry_reserve_snapshot_ref(v, snapshot);
    rc = mounts_local_mount(s, dir, why);
    registry_unref(s);
    if (rc < 0)
        return rc;
    /* Only now it cannot be removed any more. */
    rc = need_snapshot(v, snapshot, why);
    if (rc < 0)
        mounts_local_umount(dir, &ignored);
    return rc;
}

/* --- the keystore's view --- */

/* True when the keystore has it no more. */
static bool reconcile_one(const struct agent_volume *av)
{
    struct plugin_volume *v = registry_reserve_ref(av->name);
    struct agent_volume now;
    bool removed = false;
    struct why why;

    if (mutex_lock_for(&v->op_lock, 1000) == 0) {
        if (registry_is_listed(v)) {
            pthread_mutex_lock(&registry_lock);
            v->kind = av->state;
            pthread_mutex_unlock(&registry_lock);
        } else if (agent_volume_get(v->name, &now, &why) == 0) { /* a create may have ended since it was listed */
            if (now.state == AGENT_VOLUME_NEW)
                removed = discard(v, &now);
            else if (take_over(v, &now, &why) < 0)
                log_err("%s", why.text);
        }
        pthread_mutex_unlock(&v->op_lock);
    }
    registry_unref(v);
    return removed;
}

void volumes_reconcile(void)
{
    struct agent_volume av;
    struct why why;

    if (!supervisor_is_up() || agent_need_unlocked(&why) < 0)
        return;
    for (uint32_t i = 0;;) {
        struct agent_index ask = {.index = i};

        if (agent_call(AGENT_VOLUME_LIST, &ask, sizeof(ask), NULL, 0, AGENT_VOLUME_GET, &av, sizeof(av), AGENT_WAIT_MS,
                       &why) < 0)
            break;
        if (!memchr(av.name, 0, sizeof(av.name)) || !volume_name_ok(av.name) || !reconcile_one(&av))
            i++; /* else the next one has its place now */
    }
}

void volumes_refresh_rules(struct plugin_volume *v)
{
    json_t *rules, *old;
    struct why why;

    if (agent_rules_get(v->name, &rules, &why) < 0)
        return;
    pthread_mutex_lock(&registry_lock);
    old = v->rules;
    v->rules = rules;
    pthread_mutex_unlock(&registry_lock);
    json_decref(old);
    registry_save();
}

/* --- descriptions --- */

static const char *kind_name(uint32_t kind)
{
    return kind == AGENT_VOLUME_NEW ? "new" : kind == AGENT_VOLUME_FRESH ? "fresh" : "used";
}

static void rfc3339(int64_t ns, char out[32])
{
    time_t t = (time_t)(ns / 1000000000);
    struct tm tm;

    gmtime_r(&t, &tm);
    strftime(out, 32, "%Y-%m-%dT%H:%M:%SZ", &tm);
}

json_t *volumes_inspect(struct plugin_volume *v, bool ask_agent)
{
    struct fsproc *fs = mounts_server_ref(v);
    char id[2 * VOLUME_ID_BYTES + 1], created[32], *path = mounts_path(v);
    struct server_stat st = {0};
    bool have_stat = fs && fsproc_stat(fs, STAT_MS, &st) == 0;
    struct agent_volume av;
    struct why why;
    json_t *o;

    if (ask_agent && agent_volume_get(v->name, &av, &why) == 0) {
        pthread_mutex_lock(&registry_lock);
        v->kind = av.state;
        pthread_mutex_unlock(&registry_lock);
    }
    hex_encode(v->id, sizeof(v->id), id);
    rfc3339(v->created_ns, created);
    pthread_mutex_lock(&registry_lock);
    o = json_pack(
        "{s:s, s:s, s:s, s:I, s:I, s:s, s:b, s:s, s:b, s:b, s:s, s:o, s:b, s:I}", "name", v->name, "id", id, "created",
        created, "size", (json_int_t)v->params.size_limit, "block", (json_int_t)v->params.block_size, "profile",
        v->params.profile == VOLUME_PROFILE_DATABASE ? "database" : "general", "strict", (int)v->strict, "state",
        kind_name(v->kind), "mounted", (int)(fs != NULL), "unlocked", (int)(have_stat && st.unlocked), "mountpoint",
        path, "used", have_stat && st.unlocked ? json_integer((json_int_t)st.stat.used) : json_null(), "attached",
        (int)v->attached, "holders", (json_int_t)holder_total(v));
    if (have_stat && st.scrub_total)
        json_object_set_new(o, "scrub",
                            json_pack("{s:b, s:I, s:I, s:I}", "running", (int)st.scrubbing, "done",
                                      (json_int_t)st.scrub_done, "total", (json_int_t)st.scrub_total, "findings",
                                      (json_int_t)st.scrub_findings));
    pthread_mutex_unlock(&registry_lock);
    fsproc_unref(fs);
    free(path);
    return o;
}

json_t *volumes_engine_json(struct plugin_volume *v)
{
    struct fsproc *fs = mounts_server_ref(v);
    char created[32], *path = mounts_path(v);
    const char *state;
    json_t *o;

    if (fs)
        fsproc_refresh(fs); /* for the next one who asks */
    rfc3339(v->created_ns, created);
    pthread_mutex_lock(&registry_lock);
    state = !fs ? "locked" : !fsproc_has_channel(fs) ? "unknown" : v->unlocked ? "unlocked" : "locked";
    o = json_pack("{s:s, s:s, s:s, s:{s:s, s:s, s:I, s:s, s:b, s:O}}", "Name", v->name, "Mountpoint", path, "CreatedAt",
                  created, "Status", "state", state, "use", kind_name(v->kind), "size",
                  (json_int_t)v->params.size_limit, "cipher", "xchacha20-poly1305 secretstream", "mounted",
                  (int)(fs != NULL), "rules", v->rules);
    pthread_mutex_unlock(&registry_lock);
    fsproc_unref(fs);
    free(path);
    return o;
}
