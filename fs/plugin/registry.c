/*
 * registry.c - see registry.h. Owns the table of volumes and the state file.
 *
 * Invariants:
 *  1. The state file is replaced whole (temporary file, flush, rename, flush of the directory) and always holds the
 *     table of one instant; a later save never writes an older table.
 *  2. Only listed volumes are in the file. A volume is listed only once it can be mounted, a snapshot as long as it is
 *     mounted (or held), and not longer than its volume.
 *  3. Get, List and Path need registry_lock and nothing else, and nobody holds that across I/O.
 */
#include "registry.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#define STATE_FILE    "cofferd.json"
#define STATE_VERSION 1
#define STATE_MAX     (64u << 20)
#define HOLDERS_MAX   100000
#define SAVE_AGAIN_MS 1000

pthread_mutex_t registry_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t save_lock = PTHREAD_MUTEX_INITIALIZER;
static bool saves_again;              /* a thread tries until it is written (save_lock) */
static struct plugin_volume *volumes; /* in order of name */
static struct process keyd;

/* --- the table --- */

static struct plugin_volume *find(const char *name)
{
    for (struct plugin_volume *v = volumes; v; v = v->next) {
        if (!strcmp(v->name, name))
            return v;
    }
    return NULL;
}

static struct plugin_volume *insert(const char *name)
{
    struct plugin_volume *v = xcalloc(1, sizeof(*v)), **p = &volumes;

    snprintf(v->name, sizeof(v->name), "%s", name);
    pthread_mutex_init(&v->op_lock, NULL);
    v->fuse_fd = v->page_fd = -1;
    v->rules = json_array();
    while (*p && strcmp((*p)->name, name) < 0)
        p = &(*p)->next;
    v->next = *p;
    *p = v;
    return v;
}

static void holder_clear(struct holder *h)
{
    free(h->id);
    free(h->refs);
}

/* Frees an entry that is neither listed nor referenced. */
static void reap(struct plugin_volume *v)
{
    struct plugin_volume **p = &volumes;

    if (v->refs || v->listed)
        return;
    while (*p != v)
        p = &(*p)->next;
    *p = v->next;
    for (size_t i = 0; i < v->nholders; i++)
        holder_clear(&v->holders[i]);
    free(v->holders);
    volume_spec_clear(&v->spec);
    json_decref(v->rules);
    pthread_mutex_destroy(&v->op_lock);
    free(v);
}

struct plugin_volume *registry_find_mount_ref(const char *name)
{
    struct plugin_volume *v;

    pthread_mutex_lock(&registry_lock);
    v = find(name);
    if (v && !v->listed)
        v = NULL;
    if (v)
        v->refs++;
    pthread_mutex_unlock(&registry_lock);
    return v;
}

struct plugin_volume *registry_find_ref(const char *name)
{
    return strchr(name, '@') ? NULL : registry_find_mount_ref(name);
}

struct plugin_volume *registry_ref(struct plugin_volume *v)
{
    pthread_mutex_lock(&registry_lock);
    v->refs++;
    pthread_mutex_unlock(&registry_lock);
    return v;
}

struct plugin_volume *registry_reserve_ref(const char *name)
{
    struct plugin_volume *v;

    pthread_mutex_lock(&registry_lock);
    v = find(name);
    if (!v)
        v = insert(name);
    v->refs++;
    pthread_mutex_unlock(&registry_lock);
    return v;
}

/* registry_lock held. */
static struct plugin_volume *snapshot_entry(const struct plugin_volume *of, const char *snapshot)
{
    char name[ENTRY_NAME_MAX];
    struct plugin_volume *v;

    snprintf(name, sizeof(name), "%.*s@%s", AGENT_NAME_MAX - 1, of->name, snapshot);
    v = find(name);
    if (!v)
        v = insert(name);
    v->snapshot = strchr(v->name, '@') + 1;
    return v;
}

/* registry_lock held. */
static void list_snapshot(struct plugin_volume *v, const struct plugin_volume *of)
{
    memcpy(v->id, of->id, sizeof(v->id));
    v->params = of->params;
    v->strict = of->strict;
    v->listed = true;
}

struct plugin_volume *registry_reserve_snapshot_ref(const struct plugin_volume *of, const char *snapshot)
{
    struct plugin_volume *v;

    pthread_mutex_lock(&registry_lock);
    v = snapshot_entry(of, snapshot);
    v->refs++;
    pthread_mutex_unlock(&registry_lock);
    return v;
}

void registry_list_snapshot(struct plugin_volume *v, const struct plugin_volume *of)
{
    pthread_mutex_lock(&registry_lock);
    list_snapshot(v, of);
    pthread_mutex_unlock(&registry_lock);
}

void registry_unref(struct plugin_volume *v)
{
    if (!v)
        return;
    pthread_mutex_lock(&registry_lock);
    v->refs--;
    reap(v);
    pthread_mutex_unlock(&registry_lock);
}

static void list_ref(bool snapshots, struct plugin_volume ***ret, size_t *ret_n)
{
    size_t n = 0;

    pthread_mutex_lock(&registry_lock);
    for (struct plugin_volume *v = volumes; v; v = v->next)
        n++;
    *ret = xcalloc(n + 1, sizeof(**ret));
    n = 0;
    for (struct plugin_volume *v = volumes; v; v = v->next) {
        if (!v->listed || (v->snapshot && !snapshots))
            continue;
        v->refs++;
        (*ret)[n++] = v;
    }
    pthread_mutex_unlock(&registry_lock);
    *ret_n = n;
}

void registry_all_ref(struct plugin_volume ***ret, size_t *ret_n)
{
    list_ref(false, ret, ret_n);
}

void registry_mounts_ref(struct plugin_volume ***ret, size_t *ret_n)
{
    list_ref(true, ret, ret_n);
}

bool registry_has_snapshots(const struct plugin_volume *of)
{
    size_t n = strlen(of->name);
    bool has = false;

    pthread_mutex_lock(&registry_lock);
    for (struct plugin_volume *v = volumes; v && !has; v = v->next)
        has = v->snapshot && v->listed && !strncmp(v->name, of->name, n) && v->name[n] == '@';
    pthread_mutex_unlock(&registry_lock);
    return has;
}

void registry_set_listed(struct plugin_volume *v, bool listed)
{
    pthread_mutex_lock(&registry_lock);
    v->listed = listed;
    pthread_mutex_unlock(&registry_lock);
}

bool registry_is_listed(struct plugin_volume *v)
{
    bool listed;

    pthread_mutex_lock(&registry_lock);
    listed = v->listed;
    pthread_mutex_unlock(&registry_lock);
    return listed;
}

void registry_clear(void)
{
    pthread_mutex_lock(&registry_lock);
    while (volumes) {
        volumes->listed = false;
        volumes->refs = 0;
        reap(volumes);
    }
    keyd = (struct process){0};
    pthread_mutex_unlock(&registry_lock);
}

/* --- holders --- */

struct holder *holder_find(struct plugin_volume *v, const char *id, bool local)
{
    for (size_t i = 0; i < v->nholders; i++) {
        if (v->holders[i].local == local && !strcmp(v->holders[i].id, id))
            return &v->holders[i];
    }
    return NULL;
}

struct holder *holder_add(struct plugin_volume *v, const char *id, bool local)
{
    struct holder *h;

    v->holders = xrealloc(v->holders, (v->nholders + 1) * sizeof(*v->holders));
    h = &v->holders[v->nholders++];
    *h = (struct holder){.id = xstrdup(id), .local = local};
    return h;
}

void holder_remove(struct plugin_volume *v, struct holder *h)
{
    size_t i = (size_t)(h - v->holders);

    holder_clear(h);
    v->nholders--;
    memmove(h, h + 1, (v->nholders - i) * sizeof(*h));
}

unsigned holder_total(const struct plugin_volume *v)
{
    unsigned n = 0;

    for (size_t i = 0; i < v->nholders; i++)
        n += v->holders[i].count;
    return n;
}

/* --- specs --- */

void volume_spec_clear(struct volume_spec *s)
{
    for (size_t i = 0; i < s->nallow; i++)
        free(s->allow[i]);
    for (size_t i = 0; i < s->ndeny; i++)
        free(s->deny[i]);
    *s = (struct volume_spec){0};
}

static bool has_rule(char *const *rules, size_t n, const char *rule)
{
    for (size_t i = 0; i < n; i++) {
        if (!strcmp(rules[i], rule))
            return true;
    }
    return false;
}

/* The same rules in any order. */
static bool rules_equal(char *const *a, size_t na, char *const *b, size_t nb)
{
    bool equal = na == nb;

    for (size_t i = 0; i < na && equal; i++)
        equal = has_rule(b, nb, a[i]);
    for (size_t i = 0; i < nb && equal; i++)
        equal = has_rule(a, na, b[i]);
    return equal;
}

bool volume_spec_equal(const struct volume_spec *a, const struct volume_spec *b)
{
    return a->size == b->size && a->block == b->block && a->profile == b->profile && a->uid == b->uid &&
           a->gid == b->gid && a->mode == b->mode && a->strict == b->strict &&
           rules_equal(a->allow, a->nallow, b->allow, b->nallow) && rules_equal(a->deny, a->ndeny, b->deny, b->ndeny);
}

/* --- writing the state file --- */

static json_t *process_json(const struct process *p)
{
    return json_pack("{s:i, s:I}", "pid", (int)p->pid, "start", (json_int_t)p->start);
}

static json_t *texts_json(char *const *texts, size_t n)
{
    json_t *a = json_array();

    for (size_t i = 0; i < n; i++)
        json_array_append_new(a, json_string(texts[i]));
    return a;
}

static json_t *spec_json(const struct volume_spec *s)
{
    return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:b, s:o, s:o}", "size", (json_int_t)s->size, "block",
                     (json_int_t)s->block, "profile", (json_int_t)s->profile, "uid", (json_int_t)s->uid, "gid",
                     (json_int_t)s->gid, "mode", (json_int_t)s->mode, "strict", (int)s->strict, "allow",
                     texts_json(s->allow, s->nallow), "deny", texts_json(s->deny, s->ndeny));
}

static json_t *holder_json(const struct holder *h)
{
    json_t *refs = json_array();

    for (size_t i = 0; i < h->nrefs; i++)
        json_array_append_new(refs, json_integer((json_int_t)h->refs[i]));
    return json_pack("{s:s, s:b, s:I, s:o, s:o}", "id", h->id, "local", (int)h->local, "count", (json_int_t)h->count,
                     "engine", process_json(&h->engine), "refs", refs);
}

/* What another server of the mount needs; null where none can take over. */
static json_t *init_json(const struct plugin_volume *v)
{
    char init[2 * sizeof(v->init) + 1], id[2 * sizeof(v->mount_id) + 1];

    if (!v->has_init || v->mount == MOUNT_IDLE)
        return json_null();
    hex_encode((const uint8_t *)&v->init, sizeof(v->init), init);
    hex_encode((const uint8_t *)&v->mount_id, sizeof(v->mount_id), id);
    return json_pack("{s:s, s:s}", "init", init, "mount_id", id);
}

/* What there is of a mount, added to o. */
static json_t *add_mount_json(json_t *o, const struct plugin_volume *v)
{
    json_t *holders = json_array();

    for (size_t i = 0; i < v->nholders; i++)
        json_array_append_new(holders, holder_json(&v->holders[i]));
    json_object_set_new(o, "server", process_json(&v->server));
    json_object_set_new(o, "successor", process_json(&v->successor));
    json_object_set_new(o, "mounted", json_boolean(v->mount != MOUNT_IDLE));
    json_object_set_new(o, "takeover", init_json(v));
    json_object_set_new(o, "holders", holders);
    return o;
}

static json_t *volume_json(const struct plugin_volume *v)
{
    char id[2 * VOLUME_ID_BYTES + 1];

    hex_encode(v->id, sizeof(v->id), id);
    return json_pack("{s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:b, s:b, s:I, s:o, s:O}", "name", v->name,
                     "id", id, "created_ns", (json_int_t)v->created_ns, "size", (json_int_t)v->params.size_limit,
                     "block", (json_int_t)v->params.block_size, "profile", (json_int_t)v->params.profile, "log_segment",
                     (json_int_t)v->params.log_segment, "root_mode", (json_int_t)v->params.root_mode, "root_uid",
                     (json_int_t)v->params.root_uid, "root_gid", (json_int_t)v->params.root_gid, "strict",
                     (int)v->strict, "attached", (int)v->attached, "kind", (json_int_t)v->kind, "spec",
                     spec_json(&v->spec), "rules", v->rules);
}

static json_t *snapshot_json(const struct plugin_volume *v)
{
    return json_pack("{s:s%, s:s}", "volume", v->name, (size_t)(v->snapshot - 1 - v->name), "snapshot", v->snapshot);
}

char *registry_dump(void)
{
    json_t *list = json_array(), *snapshots = json_array(), *top;
    char *text;

    pthread_mutex_lock(&registry_lock);
    for (struct plugin_volume *v = volumes; v; v = v->next) {
        if (v->listed && v->snapshot)
            json_array_append_new(snapshots, add_mount_json(snapshot_json(v), v));
        else if (v->listed)
            json_array_append_new(list, add_mount_json(volume_json(v), v));
    }
    top = json_pack("{s:i, s:s, s:o, s:o, s:o}", "version", STATE_VERSION, "boot", plugin_config.boot_id, "keyd",
                    process_json(&keyd), "volumes", list, "snapshots", snapshots);
    pthread_mutex_unlock(&registry_lock);
    text = json_dumps(top, JSON_INDENT(1));
    json_decref(top);
    if (!text)
        abort();
    return text;
}

/* [save_lock] */
static int save(void)
{
    char *text = registry_dump();
    int rc = file_replace(plugin_config.state_fd, STATE_FILE, text, strlen(text), 0600);

    free(text);
    return rc;
}

/* A cofferd that follows must find what is now, not what was when there was room. */
static void *save_again(void *arg)
{
    int rc;

    (void)arg;
    do {
        sleep_ms(SAVE_AGAIN_MS);
        pthread_mutex_lock(&save_lock);
        rc = save();
        saves_again = rc < 0;
        pthread_mutex_unlock(&save_lock);
    } while (rc < 0);
    log_info("%s/%s is written again", plugin_config.state_dir, STATE_FILE);
    return NULL;
}

int registry_save(void)
{
    int rc;

    pthread_mutex_lock(&save_lock);
    rc = save();
    if (rc < 0)
        log_err("cannot write %s/%s: %s", plugin_config.state_dir, STATE_FILE, strerror(-rc));
    if (rc < 0 && !saves_again)
        saves_again = thread_start(save_again, NULL) == 0;
    pthread_mutex_unlock(&save_lock);
    return rc;
}

void registry_set_keyd(const struct process *p)
{
    pthread_mutex_lock(&registry_lock);
    keyd = *p;
    pthread_mutex_unlock(&registry_lock);
    registry_save();
}

struct process registry_get_keyd(void)
{
    struct process p;

    pthread_mutex_lock(&registry_lock);
    p = keyd;
    pthread_mutex_unlock(&registry_lock);
    return p;
}

/* --- reading it --- */

static bool get_uint(const json_t *o, const char *key, uint64_t max, uint64_t *ret)
{
    json_t *v = json_object_get(o, key);

    if (!json_is_integer(v) || json_integer_value(v) < 0 || (uint64_t)json_integer_value(v) > max)
        return false;
    *ret = (uint64_t)json_integer_value(v);
    return true;
}

static bool get_u32(const json_t *o, const char *key, uint32_t *ret)
{
    uint64_t x;

    if (!get_uint(o, key, UINT32_MAX, &x))
        return false;
    *ret = (uint32_t)x;
    return true;
}

static bool get_bool(const json_t *o, const char *key, bool *ret)
{
    json_t *v = json_object_get(o, key);

    *ret = json_is_true(v);
    return json_is_boolean(v);
}

static bool get_process(const json_t *o, const char *key, struct process *ret)
{
    json_t *p = json_object_get(o, key);
    uint64_t pid;

    if (!get_uint(p, "pid", INT32_MAX, &pid) || !get_uint(p, "start", INT64_MAX, &ret->start))
        return false;
    ret->pid = (pid_t)pid;
    return true;
}

static bool get_texts(const json_t *o, const char *key, char **texts, size_t *ret_n)
{
    json_t *a = json_object_get(o, key), *v;
    size_t i;

    if (!json_is_array(a) || json_array_size(a) > AGENT_RULES_MAX)
        return false;
    json_array_foreach(a, i, v)
    {
        if (!json_is_string(v))
            return false;
        texts[(*ret_n)++] = xstrdup(json_string_value(v));
    }
    return true;
}

static bool get_spec(const json_t *o, struct volume_spec *s)
{
    return get_uint(o, "size", INT64_MAX, &s->size) && get_u32(o, "block", &s->block) &&
           get_u32(o, "profile", &s->profile) && get_u32(o, "uid", &s->uid) && get_u32(o, "gid", &s->gid) &&
           get_u32(o, "mode", &s->mode) && get_bool(o, "strict", &s->strict) &&
           get_texts(o, "allow", s->allow, &s->nallow) && get_texts(o, "deny", s->deny, &s->ndeny);
}

static bool get_holder(struct plugin_volume *v, const json_t *o)
{
    json_t *id = json_object_get(o, "id"), *refs = json_object_get(o, "refs"), *ref;
    struct holder *h;
    uint64_t count;
    bool local;
    size_t i;

    if (!json_is_string(id) || !get_bool(o, "local", &local) || !get_uint(o, "count", UINT32_MAX, &count) ||
        count == 0 || !json_is_array(refs) || json_array_size(refs) > HOLDERS_MAX)
        return false;
    h = holder_add(v, json_string_value(id), local);
    h->count = (unsigned)count;
    if (!get_process(o, "engine", &h->engine))
        return false;
    h->refs = xcalloc(json_array_size(refs) + 1, sizeof(*h->refs));
    json_array_foreach(refs, i, ref)
    {
        if (!json_is_integer(ref))
            return false;
        h->refs[h->nrefs++] = (uint64_t)json_integer_value(ref);
    }
    return true;
}

static bool get_holders(struct plugin_volume *v, const json_t *o)
{
    json_t *a = json_object_get(o, "holders"), *h;
    size_t i;

    if (!json_is_array(a) || json_array_size(a) > HOLDERS_MAX)
        return false;
    json_array_foreach(a, i, h)
    {
        if (!get_holder(v, h))
            return false;
    }
    return true;
}

/* Absent (an older cofferd's file), or null: none can take over. */
static bool get_init(struct plugin_volume *v, const json_t *o)
{
    json_t *t = json_object_get(o, "takeover");
    const char *init = json_string_value(json_object_get(t, "init"));
    const char *id = json_string_value(json_object_get(t, "mount_id"));

    if (!t || json_is_null(t))
        return true;
    v->has_init = init && id && hex_decode(init, (uint8_t *)&v->init, sizeof(v->init)) == 0 &&
                  hex_decode(id, (uint8_t *)&v->mount_id, sizeof(v->mount_id)) == 0;
    return v->has_init;
}

static bool get_mount(struct plugin_volume *v, const json_t *o)
{
    bool mounted;

    if (!get_bool(o, "mounted", &mounted))
        return false;
    if (mounted)
        v->mount = MOUNT_FAILED; /* until mounts_adopt() has looked */
    /* An older cofferd's file has no "successor". */
    return get_process(o, "server", &v->server) &&
           (!json_object_get(o, "successor") || get_process(o, "successor", &v->successor)) && get_init(v, o) &&
           get_holders(v, o);
}

static bool get_volume(const json_t *o, bool same_boot)
{
    json_t *name = json_object_get(o, "name"), *id = json_object_get(o, "id"), *rules = json_object_get(o, "rules");
    struct plugin_volume *v;
    uint64_t created;

    if (!json_is_string(name) || !volume_name_ok(json_string_value(name)) || find(json_string_value(name)) ||
        !json_is_string(id) || json_string_length(id) != (size_t)2 * VOLUME_ID_BYTES || !json_is_array(rules))
        return false;
    v = insert(json_string_value(name));
    v->listed = true;
    json_decref(v->rules);
    v->rules = json_deep_copy(rules);
    if (hex_decode(json_string_value(id), v->id, sizeof(v->id)) < 0 ||
        !get_uint(o, "created_ns", INT64_MAX, &created) || !get_uint(o, "size", INT64_MAX, &v->params.size_limit) ||
        !get_u32(o, "block", &v->params.block_size) || !get_u32(o, "profile", &v->params.profile) ||
        !get_uint(o, "log_segment", INT64_MAX, &v->params.log_segment) ||
        !get_u32(o, "root_mode", &v->params.root_mode) || !get_u32(o, "root_uid", &v->params.root_uid) ||
        !get_u32(o, "root_gid", &v->params.root_gid) || !get_bool(o, "strict", &v->strict) ||
        !get_bool(o, "attached", &v->attached) || !get_u32(o, "kind", &v->kind) ||
        !get_spec(json_object_get(o, "spec"), &v->spec))
        return false;
    memcpy(v->params.id, v->id, sizeof(v->id));
    v->created_ns = (int64_t)created;
    return !same_boot || get_mount(v, o);
}

/* After the volumes. */
static bool get_snapshot(const json_t *o)
{
    const char *of = json_string_value(json_object_get(o, "volume"));
    const char *snapshot = json_string_value(json_object_get(o, "snapshot"));
    struct plugin_volume *volume = of && volume_name_ok(of) ? find(of) : NULL, *v;

    if (!volume || !snapshot || !snapshot_name_ok(snapshot, strlen(snapshot)))
        return false;
    v = snapshot_entry(volume, snapshot);
    if (v->listed)
        return false;
    list_snapshot(v, volume);
    return get_mount(v, o);
}

int registry_parse(const char *text, size_t n, struct why *why)
{
    json_t *top = NULL, *list, *snapshots, *o;
    const char *boot;
    bool same_boot;
    uint32_t version = 0;
    int rc = 0;
    size_t i;

    rc = json_parse(text, n, &top, why);
    if (rc < 0)
        return rc;
    list = json_object_get(top, "volumes");
    snapshots = json_object_get(top, "snapshots"); /* absent: an older cofferd's file */
    boot = json_string_value(json_object_get(top, "boot"));
    if (!get_u32(top, "version", &version) || version != STATE_VERSION || !json_is_array(list) || !boot ||
        (snapshots && !json_is_array(snapshots))) {
        json_decref(top);
        return why_set(why, -EINVAL, "it is not a state file of this version");
    }
    same_boot = !strcmp(boot, plugin_config.boot_id);
    pthread_mutex_lock(&registry_lock);
    if (same_boot && !get_process(top, "keyd", &keyd))
        rc = why_set(why, -EINVAL, "\"keyd\" is not understood");
    json_array_foreach(list, i, o)
    {
        if (rc == 0 && !get_volume(o, same_boot))
            rc = why_set(why, -EINVAL, "volume number %zu is not understood", i);
    }
    json_array_foreach(snapshots, i, o)
    {
        if (rc == 0 && same_boot && !get_snapshot(o))
            rc = why_set(why, -EINVAL, "snapshot number %zu is not understood", i);
    }
    pthread_mutex_unlock(&registry_lock);
    json_decref(top);
    return rc;
}

int registry_load(struct why *why)
{
    char *text = NULL;
    size_t n = 0;
    int rc = file_read_all(plugin_config.state_fd, STATE_FILE, STATE_MAX, &text, &n);

    if (rc == -ENOENT)
        return 0;
    if (rc < 0)
        return why_set(why, rc, "%s", strerror(-rc));
    rc = registry_parse(text, n, why);
    free(text);
    return rc;
}
