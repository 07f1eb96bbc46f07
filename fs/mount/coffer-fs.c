/*
 * coffer-fs.c - main: the FUSE server of one volume, or its caretaker (care.c). coffer/server.h says how it is started.
 *
 * Threads: main reads cofferd's orders; one reads the agent's channel (channel.c); the loop's serve requests; `locker`
 * does what must never be done by any of them: locking waits for requests and notifies the kernel.
 */
#include "mount.h"

#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sodium.h>
#include <stdlib.h>
#include <unistd.h>

#include "fs/base/msg.h"

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
    else
        channel_locked(); /* nobody will take over */
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
    care_stat(&st);
    control_stat(id, &st);
}

/* Reads cofferd's orders until it is gone: the mount is served on without it. */
static void serve_control(void)
{
    for (;;) {
        struct msg_head head;
        _Alignas(struct server_task) uint8_t body[sizeof(struct server_task)];
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
        if (head.type == SERVER_TASK && head.len == sizeof(struct server_task)) {
            care_task(head.id, (const struct server_task *)body, fds, nfds);
            continue;
        }
        for (int i = 0; i < nfds; i++)
            close_quiet(fds[i]);
        if (head.type == SERVER_STOP)
            finish(true);
        else if (head.type == SERVER_STAT)
            answer_stat(head.id);
        else
            log_err("volume %s: cofferd: unknown order %u", mount_config.name, head.type);
    }
    log_info("volume %s: cofferd is gone; the mount is served on", mount_config.name);
    for (;;)
        pause();
}

/* Not main: orders are heard meanwhile. */
static void *take_over(void *arg)
{
    int rc;

    (void)arg;
    life_resume();
    rc = loop_resend();
    if (rc == 0)
        rc = loop_start(on_end);
    if (rc < 0) {
        log_err("volume %s: cannot take over: %s", mount_config.name, strerror(-rc));
        on_end();
    }
    return NULL;
}

static int serve(void)
{
    struct fuse_session *se = loop_session();
    const struct server_init *init;
    pthread_t t;
    int rc;

    if (!se) {
        control_failed("libfuse makes no session");
        return 1;
    }
    rc = -pthread_create(&t, NULL, locker, NULL);
    if (rc == 0)
        rc = loop_init(se, &init);
    if (rc == 0)
        rc = mount_config.takeover ? -pthread_create(&t, NULL, take_over, NULL) : loop_start(on_end);
    if (rc < 0) {
        control_failed("serving the mount cannot start: %s", strerror(-rc));
        return 1;
    }
    control_ready(init);
    serve_control();
    return 0;
}

/* --- arguments --- */

static int usage(void)
{
    fprintf(stderr, "usage: coffer-fs serve|format|check|repair|resize|export|import NAME [--profile database] "
                    "[--strict] [--data] [--size BYTES] [--mount-id HEX] [--takeover HEX]; started by cofferd\n");
    return 2;
}

int main(int argc, char **argv)
{
    struct care_args args = {0};
    int direct, rc;

    if (argc < 3)
        return usage();
    mount_config.name = argv[2];
    /* Before anything else can have this number. */
    direct = fcntl(SERVER_FD_DIRECT, F_GETFL);
    mount_config.direct = direct >= 0 && (direct & O_DIRECT);
    randombytes_buf(&mount_config.mount_id, sizeof(mount_config.mount_id));
    for (int i = 3; i < argc; i++) {
        if (strcmp(argv[i], "--strict") == 0)
            mount_config.strict = true;
        else if (strcmp(argv[i], "--data") == 0)
            args.data = true;
        else if (strcmp(argv[i], "--mount-id") == 0 && i + 1 < argc)
            mount_config.mount_id = strtoull(argv[++i], NULL, 16);
        else if (strcmp(argv[i], "--takeover") == 0 && i + 1 < argc &&
                 hex_decode(argv[i + 1], (uint8_t *)&mount_config.init, sizeof(mount_config.init)) == 0)
            mount_config.takeover = true, i++;
        else if (strcmp(argv[i], "--size") == 0 && i + 1 < argc)
            args.size = strtoull(argv[++i], NULL, 10);
        else if (strcmp(argv[i], "--profile") == 0 && i + 1 < argc && strcmp(argv[i + 1], "database") == 0)
            mount_config.database = true, i++;
        else
            return usage();
    }
    signal(SIGPIPE, SIG_IGN); /* an export's reader may go away */
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
    rc = care_run(argv[1], &args);
    return rc < 0 ? usage() : rc;
}
