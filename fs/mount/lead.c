/*
 * lead.c - which of the threads reads the device.
 *
 * One leads: it reads, and serves most requests itself, since waking another thread costs more than they do. The others
 * sleep. Before what surely blocks, and before a wait for the disk, the lead is passed on. What only seldom blocks (a change of names that has to wait for a
 * checkpoint, say) is watched: a thread that looks every WATCH_NS takes the lead away from who has been in one request
 * for so long, and gives it to the next. While no requests come, the watch sleeps, too.
 *
 * Two threads that read at once, one of them just deprived, do no harm: the kernel hands out each request once.
 */
#include "lead.h"

#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#define WATCH_NS   1000000
#define IDLE_LOOKS 20

static _Atomic unsigned leader; /* 0: nobody, and `vacant` was posted */
static _Atomic uint64_t turn;   /* odd while the leader is in a request; only the leader changes it */
static _Atomic bool watch_asleep;
static sem_t vacant, watch_wake;

static void wait_for(sem_t *s)
{
    while (sem_wait(s) < 0 && errno == EINTR)
        ;
}

static void vacate(unsigned self)
{
    if (self && atomic_compare_exchange_strong(&leader, &self, 0))
        sem_post(&vacant);
}

void lead_wait(unsigned self)
{
    unsigned nobody;

    do {
        wait_for(&vacant);
        nobody = 0;
    } while (!atomic_compare_exchange_strong(&leader, &nobody, self));
}

void lead_pass(unsigned self)
{
    if (leader == self && turn & 1)
        turn++;
    vacate(self);
}

void lead_serving(void)
{
    turn += 1 + (turn & 1); /* odd already: the one before was deprived */
    if (watch_asleep && atomic_exchange(&watch_asleep, false))
        sem_post(&watch_wake);
}

bool lead_served(unsigned self)
{
    if (leader != self)
        return false;
    turn++;
    return true;
}

static void *watch(void *arg)
{
    const struct timespec look = {.tv_nsec = WATCH_NS};
    unsigned idle = 0;

    (void)arg;
    for (;;) {
        uint64_t before = turn;

        if (idle >= IDLE_LOOKS) {
            watch_asleep = true;
            if (turn == before || !atomic_exchange(&watch_asleep, false))
                wait_for(&watch_wake);
            idle = 0;
            continue;
        }
        nanosleep(&look, NULL);
        idle = turn == before ? idle + 1 : 0;
        if (idle && before & 1) {
            vacate(leader);
            idle = 0;
        }
    }
    return NULL;
}

int lead_start(void)
{
    pthread_t t;
    int rc;

    sem_init(&vacant, 0, 1);
    sem_init(&watch_wake, 0, 0);
    rc = -pthread_create(&t, NULL, watch, NULL);
    if (rc == 0)
        pthread_detach(t);
    return rc;
}
