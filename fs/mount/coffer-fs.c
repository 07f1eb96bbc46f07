/*
 * coffer-fs.c - main: the FUSE server of one volume, or its formatter or checker (coffer/server.h says how it is
 * started).
 *
 * Threads: main reads cofferd's orders; one reads the agent's channel (channel.c); the loop's serve requests; `locker`
 * does what must never be done by any of them: locking waits for requests and notifies the kernel.
 */
#include "mount.h"

#include <malloc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "fs/base/msg.h"

#define EXIT_DAMAGE 3

struct mount_config mount_config;

static pthread_mutex_t work_lock = PTHREAD_MUTEX_INITIALIZER; /* all below */
static pthread_cond_t work_cond = PTHREAD_COND_INITIALIZER;
static bool work_lock_volume, work_end;

/* --- serving --- */

static void on_lock(void)
{
    pthread_mutex_lock(&work_lock);
    work_lock_volume = true;
    pthread_cond_signal(&work_cond);
    pthread_mutex_unlock(&work_lock);
}

static void on_end(void)
{
    pthread_mutex_lock(&work_lock);
    work_end = true;
    pthread_cond_signal(&work_cond);
    pthread_mutex_unlock(&work_lock);
}

/* Ends the process: the mount is gone, or cofferd says so. */
static void finish(bool notify)
{
    int rc;

    life_stop();
    rc = life_lock(loop_session(), notify);
    if (rc < 0)
        control_failed("closing the volume failed: %s; it recovers at its next mount", strerror(-rc));
    _exit(rc < 0 ? 1 : 0);
}

static void *locker(void *arg)
{
    (void)arg;
    for (;;) {
        bool end;

        pthread_mutex_lock(&work_lock);
        while (!work_lock_volume && !work_end)
            pthread_cond_wait(&work_cond, &work_lock);
        end = work_end;
        work_lock_volume = false;
        pthread_mutex_unlock(&work_lock);
        if (end)
            finish(false);
        life_lock(loop_session(), true);
        channel_locked();
    }
    return NULL;
}

struct check_run {
    uint64_t id;
};

static void check_line(void *ctx, const char *text)
{
    control_send(SERVER_LINE, ((struct check_run *)ctx)->id, 0, text);
}

static void *check_thread(void *arg)
{
    struct check_run *run = arg;
    struct volume *v;
    int rc = -ENOKEY;

    life_enter_any(&v);
    if (v)
        rc = volume_check(v, true, check_line, run);
    life_leave();
    control_send(SERVER_REPLY, run->id, rc, "");
    free(run);
    return NULL;
}

static void start_check(uint64_t id)
{
    struct check_run *run = xmalloc(sizeof(*run));
    pthread_t t;

    run->id = id;
    if (pthread_create(&t, NULL, check_thread, run)) {
        free(run);
        control_send(SERVER_REPLY, id, -EAGAIN, "no thread");
        return;
    }
    pthread_detach(t);
}

static void answer_stat(uint64_t id)
{
    struct server_stat st = {0};
    struct volume *v;

    life_enter_any(&v);
    if (v) {
        st.unlocked = 1;
        volume_stat(v, &st.stat);
    }
    life_leave();
    control_stat(id, &st);
}

/* Reads cofferd's orders until it is gone: the mount is served on without it. */
static void serve_control(void)
{
    for (;;) {
        struct msg_head head;
        uint8_t body[16];
        int fds[MSG_FDS_MAX], nfds = 0, rc;

        rc = msg_recv(SERVER_FD_CONTROL, &head, body, sizeof(body), fds, &nfds, 3600 * 1000);
        if (rc == -ETIMEDOUT || rc == -EAGAIN)
            continue;
        if (rc < 0)
            break;
        if (head.type == SERVER_AGENT && nfds == 1) {
            channel_renew(fds[0]);
            continue;
        }
        for (int i = 0; i < nfds; i++)
            close_quiet(fds[i]);
        if (head.type == SERVER_STOP)
            finish(true);
        else if (head.type == SERVER_STAT)
            answer_stat(head.id);
        else if (head.type == SERVER_CHECK)
            start_check(head.id);
        else
            log_err("volume %s: cofferd: unknown order %u", mount_config.name, head.type);
    }
    log_info("volume %s: cofferd is gone; the mount is served on", mount_config.name);
    for (;;)
        pause();
}

static int serve(void)
{
    struct fuse_session *se = loop_session();
    pthread_t t;
    int rc;

    if (!se) {
        control_failed("libfuse makes no session");
        return 1;
    }
    rc = -pthread_create(&t, NULL, locker, NULL);
    if (rc == 0)
        rc = loop_start(se, on_end);
    if (rc < 0) {
        control_failed("serving the mount cannot start: %s", strerror(-rc));
        return 1;
    }
    control_ready();
    serve_control();
    return 0;
}

/* --- format and check --- */

static int maintenance_key(struct key **ret_key, struct channel_volume *ret_volume)
{
    struct agent_auth ask = {.flags = AGENT_AUTH_MAINTENANCE | AGENT_AUTH_WANT_KEY};
    struct auth a;
    int rc = channel_ask(NULL, &ask, &a, ret_key, ret_volume);

    if (rc == 0)
        auth_put(&a);
    if (rc == 0 && !*ret_key)
        rc = -ENOKEY;
    if (rc < 0)
        control_failed("the key agent gives no key: %s", rc == -ENOKEY ? "run coffer unlock" : strerror(-rc));
    return rc;
}

static int format(void)
{
    struct store *data = store_fd_take(SERVER_FD_DATA), *log = store_fd_take(SERVER_FD_LOG);
    struct channel_volume cv;
    struct key *key = NULL;
    int rc = maintenance_key(&key, &cv);

    if (rc < 0)
        return 1;
    rc = volume_format(data, log, key, &cv.params);
    key_free(&key);
    if (rc < 0)
        control_failed("formatting failed: %s", strerror(-rc));
    return rc < 0 ? 1 : 0;
}

static void print_line(void *ctx, const char *text)
{
    (void)ctx;
    control_send(SERVER_LINE, 0, 0, text);
}

static int check(bool data)
{
    struct volume_options o = {.on_damage = control_damage, .on_checkpoint = channel_seen};
    struct channel_volume cv;
    struct volume *v = NULL;
    struct key *key = NULL;
    int rc = maintenance_key(&key, &cv), closed;

    if (rc < 0)
        return 1;
    o.seen = cv.seen;
    o.new_branch = cv.accept_rollback;
    rc = volume_open(store_fd_take(SERVER_FD_DATA), store_fd_take(SERVER_FD_LOG), key, cv.params.id, &o, &v);
    key_free(&key);
    if (rc < 0) {
        control_failed("the volume does not open: %s",
                       rc == -ESTALE ? "it was put back to an older state: restore the newer one, or coffer volume "
                                       "accept-rollback"
                                     : strerror(-rc));
        return 1;
    }
    rc = volume_check(v, data, print_line, NULL);
    closed = volume_close(v);
    if (rc < 0 || closed < 0) {
        control_failed("the check could not be done: %s", strerror(rc < 0 ? -rc : -closed));
        return 1;
    }
    return rc > 0 ? EXIT_DAMAGE : 0;
}

/* --- arguments --- */

static int usage(void)
{
    fprintf(stderr,
            "usage: coffer-fs serve|format|check NAME [--profile database] [--strict] [--data]; started by cofferd\n");
    return 2;
}

int main(int argc, char **argv)
{
    bool data = false;
    int rc;

    if (argc < 3)
        return usage();
    mount_config.name = argv[2];
    for (int i = 3; i < argc; i++) {
        if (strcmp(argv[i], "--strict") == 0)
            mount_config.strict = true;
        else if (strcmp(argv[i], "--data") == 0)
            data = true;
        else if (strcmp(argv[i], "--profile") == 0 && i + 1 < argc && strcmp(argv[i + 1], "database") == 0)
            mount_config.database = true, i++;
        else
            return usage();
    }
    /* Few arenas and no look at /sys for the number of processors, which the sandbox would refuse. */
    mallopt(M_ARENA_MAX, 4);
    rc = secmem_init();
    if (rc == 0)
        rc = sandbox_enter();
    if (rc == 0)
        rc = channel_start(on_lock);
    if (rc < 0) {
        control_failed("start failed: %s", strerror(-rc));
        return 1;
    }
    if (strcmp(argv[1], "serve") == 0)
        return serve();
    if (strcmp(argv[1], "format") == 0)
        return format();
    if (strcmp(argv[1], "check") == 0)
        return check(data);
    return usage();
}
