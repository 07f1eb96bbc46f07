/*
 * volume.c - a volume's life: format, open, close, the background thread, statistics, the error state.
 *
 *   volume_open:  superblock -> tree root -> bitmaps -> replay -> checkpoint -> orphans -> background thread
 *
 * The background thread sleeps until the first change (volume_kick), then flushes every 5 s while there is something to flush,
 * and checkpoints when the log is half full, when many nodes are dirty, and after 30 s.
 */
#include "coffer/volume.h"

#include "fs/volume/checkpoint.h"
#include "fs/volume/log.h"
#include "fs/volume/recovery.h"
#include "fs/volume/repair.h"
#include "fs/volume/snapshot.h"
#include "fs/volume/space.h"

#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define LOG_SEGMENT_DEFAULT (16ull << 20)
#define CACHE_DEFAULT       (16u << 20)
#define FLUSH_SECONDS       5
#define CHECKPOINT_TICKS    6 /* flushes without a checkpoint */

/* --- errors --- */

void volume_damage(struct volume *v, const char *fmt, ...)
{
    char line[256];
    va_list ap;

    if (!v->options.on_damage)
        return;
    va_start(ap, fmt);
    vsnprintf(line, sizeof(line), fmt, ap);
    va_end(ap);
    v->options.on_damage(v->options.ctx, line);
}

int volume_fail(struct volume *v, const char *what, int err)
{
    if (!atomic_exchange(&v->failed, true))
        volume_damage(v, "%s failed (%s): the volume takes no changes until it is opened again", what, strerror(-err));
    if (v->log)
        log_wake(v->log);
    return -EIO;
}

int volume_sync_data(struct volume *v)
{
    int rc;

    pthread_mutex_lock(&v->sync_mutex);
    rc = v->failed ? -EIO : v->data->ops->sync(v->data);
    if (rc < 0)
        rc = volume_fail(v, "flushing data", rc);
    pthread_mutex_unlock(&v->sync_mutex);
    return rc;
}

/* --- buffers --- */

uint8_t *io_buffer_get(struct volume *v)
{
    uint8_t *b = NULL;

    pthread_mutex_lock(&v->io_mutex);
    if (v->io_buffers)
        b = v->io_buffer[--v->io_buffers];
    pthread_mutex_unlock(&v->io_mutex);
    if (!b && posix_memalign((void **)&b, UNIT_BYTES, IO_BUFFER_BYTES + 2 * UNIT_BYTES))
        abort();
    return b + UNIT_BYTES;
}

void io_buffer_put(struct volume *v, uint8_t *buffer)
{
    uint8_t *b = buffer ? buffer - UNIT_BYTES : NULL;

    pthread_mutex_lock(&v->io_mutex);
    if (b && v->io_buffers < IO_BUFFERS) {
        v->io_buffer[v->io_buffers++] = b;
        b = NULL;
    }
    pthread_mutex_unlock(&v->io_mutex);
    free(b);
}

static void io_buffers_free(struct volume *v)
{
    pthread_mutex_lock(&v->io_mutex);
    while (v->io_buffers)
        free(v->io_buffer[--v->io_buffers]);
    pthread_mutex_unlock(&v->io_mutex);
}

void volume_trim(struct volume *v)
{
    if (!tree_wants_trim(v->tree))
        return;
    pthread_rwlock_wrlock(&v->state);
    tree_trim(v->tree);
    pthread_rwlock_unlock(&v->state);
}

/* --- making and freeing the structure --- */

int volume_read_node(struct volume *v, const struct disk_ptr *ptr, unsigned level, uint8_t *page)
{
    struct iovec iov = {page, NODE_BYTES};
    int rc;

    if (le64_get(ptr->addr) > VOLUME_SIZE_MAX / UNIT_BYTES)
        return -EIO;
    rc = v->data->ops->readv(v->data, &iov, 1, le64_get(ptr->addr) * UNIT_BYTES);
    return rc < 0 ? rc : node_open(v->keys, ptr, level, page);
}

static int read_node(void *ctx, const struct disk_ptr *ptr, unsigned level, uint8_t *page)
{
    struct volume *v = ctx;
    int rc = volume_read_node(v, ptr, level, page);

    if (rc < 0) {
        volume_damage(v, "data: tree node at unit %llu (level %u) %s", (unsigned long long)le64_get(ptr->addr), level,
                      rc == -EBADMSG ? "does not authenticate" : "cannot be read");
        return -EIO;
    }
    return 0;
}

static struct volume *volume_new(struct store *data, struct store *log, const struct volume_options *options)
{
    struct volume *v = xcalloc(1, sizeof(*v));
    pthread_rwlockattr_t fair;
    pthread_condattr_t steady;

    v->data = data;
    v->logstore = log;
    v->options = *options;
    v->read_only = options->read_only;
    /* Writers must not starve behind a stream of readers. */
    pthread_rwlockattr_init(&fair);
    pthread_rwlockattr_setkind_np(&fair, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&v->state, &fair);
    pthread_rwlockattr_destroy(&fair);
    for (unsigned i = 0; i < INODE_STRIPES; i++)
        pthread_rwlock_init(&v->stripes[i], NULL);
    pthread_mutex_init(&v->checkpoint_mutex, NULL);
    pthread_mutex_init(&v->snapshot_mutex, NULL);
    pthread_mutex_init(&v->sync_mutex, NULL);
    pthread_mutex_init(&v->pattern_mutex, NULL);
    pthread_mutex_init(&v->io_mutex, NULL);
    pthread_mutex_init(&v->thread_mutex, NULL);
    /* The 5 s of durability must not wait for a clock that was set back. */
    pthread_condattr_init(&steady);
    pthread_condattr_setclock(&steady, CLOCK_MONOTONIC);
    pthread_cond_init(&v->thread_cond, &steady);
    pthread_condattr_destroy(&steady);
    v->refs = refs_new();
    return v;
}

static void volume_free(struct volume *v)
{
    tree_free(v->tree);
    space_free(v->space);
    log_free(v->log);
    refs_free(v->refs);
    free(v->answered);
    vkeys_free(v->keys);
    pthread_rwlock_destroy(&v->state);
    for (unsigned i = 0; i < INODE_STRIPES; i++)
        pthread_rwlock_destroy(&v->stripes[i]);
    pthread_mutex_destroy(&v->checkpoint_mutex);
    pthread_mutex_destroy(&v->snapshot_mutex);
    pthread_mutex_destroy(&v->sync_mutex);
    pthread_mutex_destroy(&v->pattern_mutex);
    io_buffers_free(v);
    pthread_mutex_destroy(&v->io_mutex);
    pthread_mutex_destroy(&v->thread_mutex);
    pthread_cond_destroy(&v->thread_cond);
    free(v);
}

size_t volume_dirty_max(uint64_t limit_units)
{
    return MIN(MAX(limit_units / 32 / NODE_UNITS, 128), 2048);
}

/* A checkpoint needs room for all dirty nodes while their older versions are still held, and so does the one after. */
uint64_t volume_reserve(uint64_t limit_units)
{
    return 2 * volume_dirty_max(limit_units) * NODE_UNITS;
}

/* What follows from the superblock's fields. */
static void set_geometry(struct volume *v, uint64_t regions)
{
    uint64_t limit = le64_get(v->super.size_limit) / UNIT_BYTES;

    v->params = (struct volume_params){.block_size = le32_get(v->super.block_size),
                                       .profile = le32_get(v->super.profile),
                                       .size_limit = le64_get(v->super.size_limit),
                                       .log_segment = le64_get(v->super.log_segment)};
    memcpy(v->params.id, v->super.volume_id, VOLUME_ID_BYTES);
    v->block = le32_get(v->super.block_size);
    v->block_units = v->block / UNIT_BYTES;
    v->dirty_max = volume_dirty_max(limit);
    v->space = space_new(v->data, regions, limit, volume_reserve(limit));
}

/* --- format --- */

static int fill_log(struct store *log, uint64_t bytes)
{
    const size_t piece = 1u << 18;
    uint8_t seed[randombytes_SEEDBYTES], *buf = xmalloc(piece);
    int rc;

    rc = log->ops->grow(log, bytes);
    for (uint64_t off = 0; off < bytes && rc == 0; off += piece) {
        struct iovec iov = {buf, MIN(piece, bytes - off)};

        randombytes_buf(seed, sizeof(seed));
        randombytes_buf_deterministic(buf, piece, seed);
        rc = log->ops->writev(log, &iov, 1, off);
    }
    if (rc == 0)
        rc = log->ops->sync(log);
    free(buf);
    return rc;
}

static int params_ok(const struct volume_params *p)
{
    if (p->block_size != 4096 && p->block_size != 8192 && p->block_size != 16384)
        return -EINVAL;
    if (p->size_limit < VOLUME_SIZE_MIN || p->size_limit > VOLUME_SIZE_MAX || p->profile > VOLUME_PROFILE_DATABASE)
        return -EINVAL;
    if (p->log_segment &&
        (p->log_segment < (256u << 10) || p->log_segment > (1u << 30) || p->log_segment % (64u << 10)))
        return -EINVAL;
    return p->root_mode & ~07777u ? -EINVAL : 0;
}

static int put_root(struct volume *v, const struct volume_params *p)
{
    int64_t now = now_ns();
    struct inode root = {.ino = VOLUME_ROOT_INO,
                         .mode = S_IFDIR | p->root_mode,
                         .uid = p->root_uid,
                         .gid = p->root_gid,
                         .nlink = 2,
                         .atime = now,
                         .mtime = now,
                         .ctime = now,
                         .btime = now,
                         .parent = VOLUME_ROOT_INO,
                         .generation = 1};
    struct tree_key key = tree_key(ITEM_INODE, VOLUME_ROOT_INO, 0);
    struct disk_inode value;

    inode_encode(&root, &value);
    v->next_inode = VOLUME_ROOT_INO + 1;
    v->inodes = 1;
    atomic_store(&v->next_extent, 1);
    return tree_put(v->tree, &key, &value, sizeof(value));
}

static void first_super(struct disk_super *s, const struct volume_params *p)
{
    *s = (struct disk_super){0};
    s->magic = le64_make(SUPER_MAGIC);
    s->version = le32_make(FORMAT_VERSION);
    memcpy(s->volume_id, p->id, sizeof(s->volume_id));
    randombytes_buf(s->branch, sizeof(s->branch));
    s->block_size = le32_make(p->block_size);
    s->profile = le32_make(p->profile);
    s->size_limit = le64_make(p->size_limit);
    s->log_segment = le64_make(p->log_segment ? p->log_segment : LOG_SEGMENT_DEFAULT);
    s->log_segments = le32_make(LOG_SEGMENTS);
    s->created = le64_make((uint64_t)now_ns());
}

int volume_format(struct store *data, struct store *log, const struct key *key, const struct volume_params *params)
{
    struct volume_options options = {0};
    struct volume *v = NULL;
    struct tree_io io;
    int rc;

    rc = params_ok(params);
    if (rc == 0)
        rc = vcrypt_self_test();
    if (rc < 0)
        return rc;
    if (data->ops->size(data) != 0 || log->ops->size(log) != 0)
        return -EEXIST;
    v = volume_new(data, log, &options);
    first_super(&v->super, params);
    rc = vkeys_derive(key, params->id, &v->keys);
    if (rc == 0)
        rc = data->ops->grow(data, REGION_BYTES);
    if (rc == 0)
        rc = fill_log(log, LOG_SEGMENTS * le64_get(v->super.log_segment));
    if (rc < 0)
        goto out;
    set_geometry(v, 1);
    for (unsigned i = 0; i < SUPER_SLOTS * SUPER_COPIES; i++)
        space_commit(v->space, SUPER_UNIT(i % SUPER_SLOTS, i / SUPER_SLOTS), 1);
    io = (struct tree_io){read_node, v};
    v->tree = tree_new(&io, CACHE_DEFAULT);
    v->log = log_new(le64_get(v->super.log_segment), 0, 0);
    rc = put_root(v, params);
    if (rc == 0)
        rc = checkpoint_run(v, CHECKPOINT_FORCE | CHECKPOINT_CLEAN);
out:
    volume_free(v);
    return rc;
}

/* --- open --- */

/* The regions that the superblock names. What a shorter file has lost is not worth memory: the volume is only read. */
static uint64_t regions_there(struct volume *v)
{
    uint64_t regions = le64_get(v->super.data_units) / REGION_UNITS;
    int64_t size = v->data->ops->size(v->data);

    if (size >= 0 && (uint64_t)size / REGION_BYTES >= regions)
        return regions;
    /* What is missing is lost, and repair says so unit by unit. */
    if (v->options.repair && v->data->ops->grow(v->data, regions * REGION_BYTES) == 0)
        return regions;
    volume_damage(v, "data: the file is shorter than the volume: the volume is read-only");
    v->read_only = v->space_lost = true;
    return size < 0 ? 0 : (uint64_t)size / REGION_BYTES;
}

static int load_space(struct volume *v)
{
    for (uint64_t k = 0; k < space_regions(v->space) && !v->space_lost; k++) {
        struct tree_key key = tree_key(ITEM_SPACE, k, 0);
        const uint8_t *bitmap;
        size_t len;
        int rc = tree_get(v->tree, &key, &bitmap, &len);

        if (rc < 0) {
            volume_damage(v, "data: the free space of region %llu cannot be read: the volume is read-only",
                          (unsigned long long)k);
            v->read_only = v->space_lost = true;
            return 0;
        }
        space_load_region(v->space, k, bitmap);
    }
    return 0;
}

static int load_state(struct volume *v)
{
    struct tree_io io = {read_node, v};
    size_t cache = v->options.cache_bytes ? v->options.cache_bytes : CACHE_DEFAULT;
    int rc;

    rc = recovery_super(v);
    if (rc < 0)
        return rc;
    set_geometry(v, regions_there(v));
    v->next_inode = le64_get(v->super.next_inode);
    v->inodes = le64_get(v->super.inodes);
    atomic_store(&v->next_extent, le64_get(v->super.next_extent));
    rc = tree_load(&io, cache, &v->super.root, le32_get(v->super.root_level), &v->tree);
    if (rc == 0)
        rc = v->options.repair ? repair_load(v, &v->repair) : load_space(v);
    if (rc == 0)
        rc = recovery_replay(v);
    if (rc == 0 && v->repair)
        rc = repair_run(v->repair);
    repair_free(v->repair);
    v->repair = NULL;
    if (rc == 0 && !v->read_only)
        rc = snapshots_hold(v);
    if (rc == 0 && !v->read_only)
        space_ready(v->space);
    return rc;
}

uint64_t vol_next_inode(struct volume *v)
{
    uint64_t next;

    pthread_rwlock_rdlock(&v->state);
    next = v->next_inode;
    pthread_rwlock_unlock(&v->state);
    return next;
}

static void *background(void *arg);

int volume_open(struct store *data, struct store *log, const struct key *key, const uint8_t id[VOLUME_ID_BYTES],
                const struct volume_options *options, struct volume **ret_volume)
{
    struct volume *v = volume_new(data, log, options);
    int rc;

    rc = vcrypt_self_test();
    if (rc == 0)
        rc = vkeys_derive(key, id, &v->keys);
    if (rc == 0)
        rc = load_state(v);
    if (rc == 0 && v->options.resumed)
        refs_unknown_below(v->refs, v->next_inode);
    if (rc == 0 && !v->read_only) {
        rc = checkpoint_run(v, CHECKPOINT_FORCE);
        if (rc == 0)
            recovery_orphans(v);
    }
    if (rc == 0 && v->options.background && !v->read_only) {
        rc = -pthread_create(&v->thread, NULL, background, v);
        v->thread_running = rc == 0;
    }
    if (rc < 0) {
        volume_abandon(v);
        return rc;
    }
    *ret_volume = v;
    return 0;
}

/* --- snapshots, on their own --- */

/* The newest superblock's snapshot of that name. */
static int find_snapshot(struct volume *v, const char *name, struct snapshot *ret)
{
    struct tree_io io = {read_node, v};
    struct tree *tree = NULL;
    int rc = recovery_super(v);

    if (rc == 0)
        rc = tree_load(&io, CACHE_DEFAULT, &v->super.root, le32_get(v->super.root_level), &tree);
    if (rc == 0)
        rc = snapshot_find(tree, name, ret);
    tree_free(tree);
    return rc;
}

/*
 * The volume may be in use by somebody else: a tree that is two checkpoints old may be written over while it is read, and
 * superblocks between the reading of one and the other.
 */
#define FIND_TRIES 5

int volume_snapshot_open(struct store *data, const struct key *key, const uint8_t id[VOLUME_ID_BYTES],
                         const char *snapshot, const struct volume_options *options, struct volume **ret_volume)
{
    struct volume_options o = {.read_only = true,
                               .cache_bytes = options->cache_bytes,
                               .seen = options->seen,
                               .new_branch = options->new_branch,
                               .ctx = options->ctx};
    struct volume *v = volume_new(data, NULL, &o);
    struct tree_io io = {read_node, v};
    size_t cache = o.cache_bytes ? o.cache_bytes : CACHE_DEFAULT;
    struct snapshot s;
    int rc = vcrypt_self_test();

    if (rc == 0)
        rc = vkeys_derive(key, id, &v->keys);
    if (rc == 0)
        rc = find_snapshot(v, snapshot, &s);
    for (int tries = 1; (rc == -EIO || rc == -ESTALE || rc == -EKEYREJECTED) && tries < FIND_TRIES; tries++)
        rc = find_snapshot(v, snapshot, &s);
    v->options.on_damage = options->on_damage;
    if (rc < 0 && rc != -ENOENT)
        rc = find_snapshot(v, snapshot, &s); /* and says what is wrong */
    if (rc == 0) {
        snapshot_super(&s, &v->super);
        v->space_lost = true; /* nothing is ever allocated */
        set_geometry(v, 0);
        v->next_inode = s.next_inode;
        v->inodes = s.inodes;
        atomic_store(&v->next_extent, s.next_extent);
        v->generation = s.generation;
        v->log = log_new(le64_get(v->super.log_segment), v->generation, 0);
        rc = tree_load(&io, cache, &s.root, s.root_level, &v->tree);
    }
    if (rc < 0) {
        volume_abandon(v);
        return rc;
    }
    *ret_volume = v;
    return 0;
}

/* --- the background thread --- */

void volume_kick(struct volume *v, bool now)
{
    if (!v->thread_running)
        return;
    pthread_mutex_lock(&v->thread_mutex);
    if (now || !v->thread_pending) {
        v->thread_pending = true;
        v->thread_kick |= now;
        pthread_cond_signal(&v->thread_cond);
    }
    pthread_mutex_unlock(&v->thread_mutex);
}

/* Sleeps until there is work; false: stop. With pending work it sleeps at most FLUSH_SECONDS. */
static bool background_wait(struct volume *v, bool *ret_now)
{
    bool go_on;

    pthread_mutex_lock(&v->thread_mutex);
    while (!v->thread_stop && !v->thread_pending)
        pthread_cond_wait(&v->thread_cond, &v->thread_mutex);
    if (!v->thread_stop && !v->thread_kick) {
        struct timespec until;

        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_sec += FLUSH_SECONDS;
        while (!v->thread_stop && !v->thread_kick) {
            if (pthread_cond_timedwait(&v->thread_cond, &v->thread_mutex, &until) == ETIMEDOUT)
                break;
        }
    }
    *ret_now = v->thread_kick;
    v->thread_kick = false;
    v->thread_pending = false;
    go_on = !v->thread_stop;
    pthread_mutex_unlock(&v->thread_mutex);
    return go_on;
}

static void *background(void *arg)
{
    struct volume *v = arg;
    int ticks = 0;
    bool now;

    while (background_wait(v, &now)) {
        if (v->failed)
            continue;
        if (now || ++ticks >= CHECKPOINT_TICKS) {
            checkpoint_run(v, 0);
            ticks = 0;
        } else {
            if (log_unflushed(v->log))
                log_flush(v, log_sequence(v->log));
            volume_kick(v, false); /* until a checkpoint has made the state clean */
        }
        io_buffers_free(v);
    }
    return NULL;
}

static void background_stop(struct volume *v)
{
    if (!v->thread_running)
        return;
    pthread_mutex_lock(&v->thread_mutex);
    v->thread_stop = true;
    pthread_cond_signal(&v->thread_cond);
    pthread_mutex_unlock(&v->thread_mutex);
    pthread_join(v->thread, NULL);
    v->thread_running = false;
}

/* --- close --- */

void volume_abandon(struct volume *v)
{
    background_stop(v);
    v->data->ops->close(v->data);
    if (v->logstore)
        v->logstore->ops->close(v->logstore);
    volume_free(v);
}

int volume_close(struct volume *v)
{
    int rc = 0;

    background_stop(v);
    if (v->failed)
        rc = -EIO;
    else if (!v->read_only)
        rc = checkpoint_run(v, CHECKPOINT_FORCE | CHECKPOINT_CLEAN);
    volume_abandon(v);
    return rc;
}

struct counted {
    const struct volume_report *report;
    int lines;
};

static void count_line(void *ctx, const char *text)
{
    struct counted *c = ctx;

    c->lines++;
    c->report->line(c->report->ctx, text);
}

static void pass_progress(void *ctx, uint64_t done, uint64_t total)
{
    volume_report_progress(((struct counted *)ctx)->report, done, total);
}

static bool pass_stop(void *ctx)
{
    return volume_report_stop(((struct counted *)ctx)->report);
}

int volume_repair(struct store *data, struct store *log, const struct key *key, const uint8_t id[VOLUME_ID_BYTES],
                  const struct volume_options *options, const struct volume_report *report)
{
    struct counted c = {.report = report};
    struct volume_report counting = {count_line, pass_progress, pass_stop, &c};
    struct volume_options o = *options;
    struct volume *v;
    int rc;

    o.repair = &counting;
    rc = volume_open(data, log, key, id, &o, &v);
    if (rc == 0)
        rc = volume_close(v);
    return rc < 0 ? rc : c.lines;
}

int volume_checkpoint(struct volume *v)
{
    return v->read_only ? -EROFS : checkpoint_run(v, 0);
}

/* --- what it is --- */

void volume_get_params(struct volume *v, struct volume_params *ret_params)
{
    *ret_params = v->params;
}

void volume_stat(struct volume *v, struct volume_stat *ret_stat)
{
    uint64_t used, limit, reserve;

    *ret_stat = (struct volume_stat){.failed = v->failed};
    space_stat(v->space, &used, &limit, &reserve);
    log_stat(v->log, &ret_stat->sequence, &ret_stat->flushed_sequence);
    pthread_rwlock_rdlock(&v->state);
    /* What is kept for checkpoints is not for anybody's data: df must not promise it. */
    ret_stat->size_limit = (limit - reserve) * UNIT_BYTES;
    ret_stat->used = MIN(used, limit - reserve) * UNIT_BYTES;
    ret_stat->data_bytes = space_regions(v->space) * REGION_BYTES;
    if (v->space_lost) /* nothing is known but this */
        ret_stat->used = MIN(le64_get(v->super.used_units) * UNIT_BYTES, ret_stat->size_limit);
    ret_stat->inodes = v->inodes;
    ret_stat->generation = v->generation;
    ret_stat->dirty_nodes = tree_dirty_nodes(v->tree);
    ret_stat->cached_nodes = tree_cached_nodes(v->tree);
    pthread_rwlock_unlock(&v->state);
}

/* --- durability --- */

int vol_sync(struct volume *v)
{
    if (v->failed)
        return -EIO;
    return v->read_only ? 0 : log_flush(v, log_sequence(v->log));
}

/* The log is one row: what makes the last record durable makes all before it so, of whatever file. */
int vol_fsync(struct volume *v, uint64_t ino, bool datasync)
{
    (void)datasync;
    file_note_sync(v, ino);
    return vol_sync(v);
}
