/*
 * coffer-fs.c - main: the FUSE server of one volume, or its caretaker (care.c). coffer/server.h says how it is started.
 *
 * Threads: main reads cofferd's orders; one reads the agent's channel (channel.c); the loop's serve requests; `locker`
 * does what must never be done by any of them: locking waits for requests and notifies the kernel.
 */
#include "mount.h"

#include <fcntl.h>
#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sodium.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fs/base/msg.h"

struct mount_config mount_config;

#define DRAIN_MS 5000 /* for requests at work to end, before another server goes on */

static pthread_mutex_t work_lock = PTHREAD_MUTEX_INITIALIZER; /* all below */
static pthread_cond_t work_cond = PTHREAD_COND_INITIALIZER;
static pthread_cond_t work_closed = PTHREAD_COND_INITIALIZER;
static bool work_lock_volume, work_forget, work_end, work_hand_over, work_renew;
static unsigned work_close_asked, work_close_done; /* server_close_unused: counted */

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

static void on_unlocked(void)
{
    pthread_mutex_lock(&work_lock);
    work_renew = true;
    pthread_cond_signal(&work_cond);
    pthread_mutex_unlock(&work_lock);
}

void server_close_unused(void)
{
    unsigned mine;

    pthread_mutex_lock(&work_lock);
    mine = ++work_close_asked;
    pthread_cond_signal(&work_cond);
    while (work_close_done < mine)
        pthread_cond_wait(&work_closed, &work_lock);
    pthread_mutex_unlock(&work_lock);
}

static void on_forget(void)
{
    pthread_mutex_lock(&work_lock);
    work_forget = true;
    pthread_cond_signal(&work_cond);
    pthread_mutex_unlock(&work_lock);
}

static void on_hand_over(void)
{
    pthread_mutex_lock(&work_lock);
    work_hand_over = true;
    pthread_cond_signal(&work_cond);
    pthread_mutex_unlock(&work_lock);
}

/*
 * Ends the process; the next one stands ready. What it read it answers, and then it closes the volume, so that nothing is
 * replayed. If that takes too long it just ends: the log has all that was acknowledged, and the kernel sends the rest again.
 * No thread may be left in a notification: the kernel would wait for a server in it, and this one could not end.
 */
static void hand_over(void)
{
    int rc;

    life_checkpoint();
    rc = adapter_quiesce(DRAIN_MS);
    if (rc == 0)
        rc = loop_stop(DRAIN_MS);
    if (rc == 0) {
        life_stop();
        rc = life_lock(loop_session(), false);
    }
    if (rc < 0)
        log_err("volume %s: ends without having closed the volume: %s; its log is replayed", mount_config.name,
                strerror(-rc));
    _exit(rc < 0 ? 1 : 0);
}

/* As often as it has been asked for. */
static void close_unused(unsigned asked)
{
    if (asked == work_close_done)
        return;
    if (life_is_open() && !auth_any_live())
        life_lock(loop_session(), true);
    pthread_mutex_lock(&work_lock);
    work_close_done = asked;
    pthread_cond_broadcast(&work_closed);
    pthread_mutex_unlock(&work_lock);
}

static void *locker(void *arg)
{
    (void)arg;
    for (;;) {
        bool end, lock, forget, renew;
        unsigned close;

        pthread_mutex_lock(&work_lock);
        while (!work_lock_volume && !work_forget && !work_end && !work_hand_over && !work_renew &&
               work_close_asked == work_close_done)
            pthread_cond_wait(&work_cond, &work_lock);
        end = work_end;
        lock = work_lock_volume;
        forget = work_forget;
        renew = work_renew;
        close = work_close_asked;
        work_lock_volume = work_forget = work_renew = false;
        pthread_mutex_unlock(&work_lock);
        if (end)
            finish(false);
        if (lock) {
            life_lock(loop_session(), true);
            channel_locked();
        } else if (forget) {
            if (life_left_open())
                life_lock(loop_session(), true);
        } else if (renew) {
            life_renew(false);
        } else if (close == work_close_done) {
            hand_over();
        }
        close_unused(close);
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

/* The device is read: who reads it sees its end. */
static atomic_bool reading;

/* Not main: orders are heard meanwhile. */
static void *take_over(void *arg)
{
    int rc;

    (void)arg;
    page_begin();
    inodes_begin();
    life_resume();
    rc = loop_resend();
    if (rc == 0)
        rc = loop_start(on_end);
    reading = rc == 0;
    if (rc == 0 && life_left_open())
        on_forget();
    if (rc < 0) {
        log_err("volume %s: cannot take over: %s", mount_config.name, strerror(-rc));
        on_end();
    }
    return NULL;
}

/* SERVER_GO. */
static void go_on(void)
{
    static bool gone_on;
    pthread_t t;
    int rc = gone_on || !mount_config.takeover ? 0 : -pthread_create(&t, NULL, take_over, NULL);

    gone_on = true;
    if (rc < 0) {
        control_failed("taking over cannot start: %s", strerror(-rc));
        _exit(1);
    }
}

/* The next order; one that waits for its turn ends with the mount. (Who polls the device is woken by each request.) */
static int next_order(struct msg_head *head, void *body, size_t n, int *fds, int *nfds)
{
    static bool gone;
    struct pollfd p[2] = {{.fd = SERVER_FD_CONTROL, .events = POLLIN}, {.fd = gone || reading ? -1 : SERVER_FD_FUSE}};

    if (poll(p, 2, -1) < 0)
        return -EAGAIN;
    if (p[1].revents & POLLERR) {
        gone = true;
        on_end();
    }
    return p[0].revents ? msg_recv(SERVER_FD_CONTROL, head, body, n, fds, nfds, 0) : -EAGAIN;
}

/* Reads cofferd's orders: this one's, or those of the next (the channel's other end is kept for it). */
static void serve_control(void)
{
    for (;;) {
        struct msg_head head;
        _Alignas(struct server_task) uint8_t body[sizeof(struct server_task)];
        int fds[MSG_FDS_MAX], nfds = 0, rc;

        rc = next_order(&head, body, sizeof(body), fds, &nfds);
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
        else if (head.type == SERVER_TASK_STOP)
            care_stop(head.id);
        else if (head.type == SERVER_GO)
            go_on();
        else if (head.type == SERVER_HANDOVER)
            on_hand_over();
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
    const struct server_init *init = NULL;
    pthread_t t;
    int rc;

    if (!se) {
        control_failed("libfuse makes no session");
        return 1;
    }
    if (!mount_config.takeover) {
        page_begin();
        inodes_begin();
    }
    rc = -pthread_create(&t, NULL, locker, NULL);
    if (rc == 0)
        rc = loop_init(se, &init);
    if (rc == 0)
        rc = mount_config.takeover ? 0 : loop_start(on_end); /* or with SERVER_GO */
    if (rc < 0) {
        control_failed("serving the mount cannot start: %s", strerror(-rc));
        return 1;
    }
    reading = !mount_config.takeover;
    control_ready(init);
    serve_control();
    return 0;
}

/* --- arguments --- */

static int usage(void)
{
    fprintf(
        stderr,
        "usage: coffer-fs serve|format|check|repair|resize|export|import|snapshot-create|snapshot-remove|snapshot-list "
        "NAME "
        "[--profile database] [--snapshot NAME] [--since NAME] "
        "[--strict] [--data] [--size BYTES] [--mount-id HEX] [--takeover HEX] [--patience MS]; started by cofferd\n");
    return 2;
}

int main(int argc, char **argv)
{
    struct care_args args = {0};
    int seals, rc;
    struct stat st;

    if (argc < 3)
        return usage();
    mount_config.name = argv[2];
    /* Before anything else can have this number. */
    seals = fcntl(SERVER_FD_PAGE, F_GET_SEALS);
    mount_config.page = seals >= 0 && (seals & F_SEAL_SHRINK) && fstat(SERVER_FD_PAGE, &st) == 0 &&
                        st.st_size == (off_t)sizeof(struct server_page);
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
        else if (strcmp(argv[i], "--patience") == 0 && i + 1 < argc)
            mount_config.patience_ms = atoi(argv[++i]);
        else if (strcmp(argv[i], "--size") == 0 && i + 1 < argc)
            args.size = strtoull(argv[++i], NULL, 10);
        else if (strcmp(argv[i], "--snapshot") == 0 && i + 1 < argc && volume_snapshot_name_ok(argv[i + 1]))
            args.snapshot = mount_config.snapshot = argv[++i];
        else if (strcmp(argv[i], "--since") == 0 && i + 1 < argc && volume_snapshot_name_ok(argv[i + 1]))
            args.since = argv[++i];
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
        rc = channel_start(on_lock, on_unlocked);
    if (rc < 0) {
        control_failed("start failed: %s", strerror(-rc));
        return 1;
    }
    if (strcmp(argv[1], "serve") == 0)
        return serve();
    rc = care_run(argv[1], &args);
    return rc < 0 ? usage() : rc;
}
