/*
 * supervisor.c - see supervisor.h. Owns the socket <run>/keyd.sock and the process coffer-keyd.
 *
 *            +-----------------------------answers------------------------------+
 *            |                                                                  v
 *   LOOKING -+-refuses--> (start) STARTING --answers--> (announce) UP --gone--> BACKOFF --timer--> LOOKING
 *            +-silent---> BACKOFF    +--gone, silent--> BACKOFF
 *
 * Any state goes to STOPPED on `stop`. The table `steps` is this drawing.
 *
 * Invariants:
 *  1. Never two keyds on one keystore: one is started only when nobody answers at the socket and the last known process
 *     has ended.
 *  2. keyd outlives cofferd: it has its own session, and the next cofferd finds it at the socket.
 *  3. UP means that the broker connection is open; its end is how the end of a keyd that is not our child is seen.
 */
#include "supervisor.h"

#include "agent_client.h"
#include "broker.h"
#include "registry.h"
#include "spawn.h"
#include "fs/base/msg.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define START_MS   10000
#define STOP_MS    10000
#define BACKOFF_MS 1000

enum keyd_state { KEYD_LOOKING, KEYD_STARTING, KEYD_UP, KEYD_BACKOFF, KEYD_STOPPED, KEYD_STATES };
enum keyd_event { EV_ANSWERS, EV_REFUSES, EV_SILENT, EV_GONE, EV_TIMER, EV_STOP, KEYD_EVENTS };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
/* Under lock: */
static enum keyd_state state = KEYD_LOOKING;
static bool stop_asked;
static uint64_t generation;
static int ended_with; /* the last one's exit status, 0: none has ended */
static int broker_sock = -1;
/* Of the thread only: */
static struct process announced; /* whose generation it is */
static int child_pidfd = -1;     /* of the keyd that we started, until reaped */
static void (*on_agent_up)(void);

/* --- what is seen --- */

static enum keyd_event probe(void)
{
    struct msg_head head = {.type = AGENT_STATUS, .id = 1};
    struct agent_status st;
    int sock = agent_connect(), rc;

    if (sock == -ECONNREFUSED || sock == -ENOENT)
        return EV_REFUSES;
    if (sock < 0)
        return EV_SILENT;
    rc = msg_send(sock, &head, NULL, NULL, 0);
    if (rc == 0)
        rc = msg_recv(sock, &head, &st, sizeof(st), NULL, NULL, AGENT_TIMEOUT_MS);
    close_quiet(sock);
    if (rc == -ECONNRESET || rc == -EPIPE)
        return EV_REFUSES;
    if (rc < 0 || head.type != AGENT_STATUS || head.len != sizeof(st))
        return EV_SILENT;
    st.driver[sizeof(st.driver) - 1] = 0;
    if (strcmp(st.driver, plugin_config.driver) != 0)
        log_info("coffer-keyd was started for driver %s, this cofferd serves %s", st.driver, plugin_config.driver);
    return EV_ANSWERS;
}

static bool stopping(void)
{
    bool yes;

    pthread_mutex_lock(&lock);
    yes = stop_asked;
    pthread_mutex_unlock(&lock);
    return yes;
}

static enum keyd_event see_starting(void)
{
    int64_t end = mono_ns() + (int64_t)START_MS * 1000000;

    while (mono_ns() < end && !stopping()) {
        if (child_pidfd < 0 || spawn_wait_end(child_pidfd, 20) == 0)
            return EV_GONE;
        if (probe() == EV_ANSWERS)
            return EV_ANSWERS;
    }
    log_err("coffer-keyd does not answer");
    return EV_SILENT;
}

static enum keyd_event see_up(void)
{
    int sock = agent_connect(), rc;

    rc = sock < 0 ? sock : broker_serve_take(sock, &broker_sock, &lock);
    if (!stopping())
        log_err("coffer-keyd is gone (%s)", strerror(-rc));
    return EV_GONE;
}

static enum keyd_event see_backoff(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    ts.tv_sec += BACKOFF_MS / 1000;
    pthread_mutex_lock(&lock);
    while (!stop_asked && pthread_cond_clockwait(&changed, &lock, CLOCK_MONOTONIC, &ts) != ETIMEDOUT)
        ;
    pthread_mutex_unlock(&lock);
    return EV_TIMER;
}

/* --- what is done --- */

static void reap_child(void)
{
    int status;

    if (child_pidfd < 0 || spawn_wait_end(child_pidfd, 0) < 0)
        return;
    status = spawn_reap(child_pidfd);
    pthread_mutex_lock(&lock);
    ended_with = status;
    pthread_mutex_unlock(&lock);
    if (stopping())
        log_info("coffer-keyd is stopped");
    else if (status > 128)
        log_err("coffer-keyd was killed by signal %d; the keystore is locked now: run coffer unlock", status - 128);
    else if (status != 0)
        log_err("coffer-keyd ended with status %d", status);
    close_quiet(child_pidfd);
    child_pidfd = -1;
}

/* Waits for the last known keyd to end, and ends it if it does not (invariant 1). */
static void end_last(int patience_ms)
{
    struct process last = registry_get_keyd();
    int pidfd = last.pid ? process_pidfd(&last) : -ESRCH;

    if (pidfd >= 0 && spawn_wait_end(pidfd, patience_ms) < 0) {
        log_err("coffer-keyd (pid %d) does not end: killed", (int)last.pid);
        spawn_signal(pidfd, SIGKILL);
        spawn_wait_end(pidfd, -1);
    }
    close_quiet(pidfd);
    reap_child();
}

static void act_start(void)
{
    const char *argv[] = {"coffer-keyd", "--driver", plugin_config.driver, NULL};
    struct spawn s = {.program = "coffer-keyd",
                      .argv = argv,
                      .nfds = 2,
                      .uid = plugin_config.keyd_uid,
                      .gid = plugin_config.keyd_gid};
    struct process p;
    int sock, rc;

    end_last(STOP_MS);
    sock = unix_listen(plugin_config.keyd_socket, SOCK_SEQPACKET, 0600);
    if (sock < 0) {
        log_err("cannot listen at %s: %s", plugin_config.keyd_socket, strerror(-sock));
        return;
    }
    s.fds[0] = sock;
    s.fds[1] = plugin_config.keystore_fd;
    rc = spawn_start(&s, &p, &child_pidfd);
    /* Ours must not stay open: a socket without keyd shall refuse, not queue. */
    close_quiet(sock);
    if (rc < 0)
        log_err("cannot start coffer-keyd: %s", strerror(-rc));
    else
        registry_set_keyd(&p);
}

static void *announce(void *arg)
{
    (void)arg;
    on_agent_up();
    return NULL;
}

/* The keyd that answers but is not the one that is known: the state file was lost. */
static struct process find_keyd(void)
{
    struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    struct process found = {0};
    int fd = openat(plugin_config.keystore_fd, KEYD_LOCK_FILE, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);

    if (fd >= 0 && fcntl(fd, F_GETLK, &fl) == 0 && fl.l_type != F_UNLCK && process_identify(fl.l_pid, &found) == 0)
        registry_set_keyd(&found);
    close_quiet(fd);
    return found;
}

static void act_announce(void)
{
    struct process now = registry_get_keyd();

    if (!now.pid || !process_alive(&now))
        now = find_keyd();
    /* The same process (only its broker connection had ended) keeps its channels. */
    if (announced.pid && process_same(&announced, &now))
        return;
    announced = now;
    pthread_mutex_lock(&lock);
    generation++;
    pthread_mutex_unlock(&lock);
    log_info("coffer-keyd is up");
    thread_start(announce, NULL);
}

static void act_gone(void)
{
    reap_child();
}

static const struct {
    enum keyd_state next;
    void (*act)(void);
} steps[KEYD_STATES][KEYD_EVENTS] = {
    [KEYD_LOOKING] = {[EV_ANSWERS] = {KEYD_UP, act_announce},
                      [EV_REFUSES] = {KEYD_STARTING, act_start},
                      [EV_SILENT] = {KEYD_BACKOFF, NULL},
                      [EV_STOP] = {KEYD_STOPPED, NULL}},
    [KEYD_STARTING] = {[EV_ANSWERS] = {KEYD_UP, act_announce},
                       [EV_SILENT] = {KEYD_BACKOFF, NULL},
                       [EV_GONE] = {KEYD_BACKOFF, act_gone},
                       [EV_STOP] = {KEYD_STOPPED, NULL}},
    [KEYD_UP] = {[EV_GONE] = {KEYD_BACKOFF, act_gone}, [EV_STOP] = {KEYD_STOPPED, NULL}},
    [KEYD_BACKOFF] = {[EV_TIMER] = {KEYD_LOOKING, NULL}, [EV_STOP] = {KEYD_STOPPED, NULL}},
    [KEYD_STOPPED] = {[EV_STOP] = {KEYD_STOPPED, NULL}},
};

static enum keyd_event see(enum keyd_state s)
{
    enum keyd_event e = s == KEYD_LOOKING    ? probe()
                        : s == KEYD_STARTING ? see_starting()
                        : s == KEYD_UP       ? see_up()
                                             : see_backoff();

    return stopping() ? EV_STOP : e;
}

static void *supervise(void *arg)
{
    enum keyd_state s = KEYD_LOOKING;

    (void)arg;
    while (s != KEYD_STOPPED) {
        enum keyd_event e = see(s);

        if (steps[s][e].act)
            steps[s][e].act();
        s = steps[s][e].next;
        pthread_mutex_lock(&lock);
        state = s;
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}

/* --- for others --- */

int supervisor_start(void (*agent_up)(void))
{
    on_agent_up = agent_up;
    return thread_start(supervise, NULL);
}

uint64_t supervisor_generation(void)
{
    uint64_t g;

    pthread_mutex_lock(&lock);
    g = generation;
    pthread_mutex_unlock(&lock);
    return g;
}

const char *supervisor_damage(void)
{
    int status;

    pthread_mutex_lock(&lock);
    status = state == KEYD_UP ? 0 : ended_with;
    pthread_mutex_unlock(&lock);
    return status == KEYD_EXIT_DAMAGED ? "the keystore file is damaged: restore it from a backup"
           : status == KEYD_EXIT_AUDIT
               ? "the audit log is damaged: move keystore/audit.log away and keep it; then it goes on"
               : NULL;
}

bool supervisor_is_up(void)
{
    bool up;

    pthread_mutex_lock(&lock);
    up = state == KEYD_UP;
    pthread_mutex_unlock(&lock);
    return up;
}

void supervisor_stop(void)
{
    struct process last;
    int pidfd;

    pthread_mutex_lock(&lock);
    stop_asked = true;
    if (broker_sock >= 0)
        shutdown(broker_sock, SHUT_RDWR);
    pthread_cond_broadcast(&changed);
    while (state != KEYD_STOPPED)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    last = registry_get_keyd();
    pidfd = last.pid ? process_pidfd(&last) : -ESRCH;
    if (pidfd >= 0)
        spawn_signal(pidfd, SIGTERM);
    close_quiet(pidfd);
    end_last(STOP_MS);
    unlink(plugin_config.keyd_socket);
    registry_set_keyd(&(struct process){0});
}
