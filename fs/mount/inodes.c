/*
 * inodes.c - which inodes the kernel knows (its lookup counts), and which of them have pages in its cache.
 *
 * An open-addressing table, ino -> counts. While a volume is open, the engine holds as many references as stand here;
 * the table outlives a locking, so that the next opening can take them again and a locking finds all that is cached.
 * Called by adapter.c and life.c, both under the engine lock where table and engine must agree.
 *
 * What is cached stands in struct server_page, too, for the next server of this mount: it does not know what the kernel has.
 * Invariants of the page, at every instant at which this process may die:
 *  1. inode[0 .. inodes) has every slot that is `opened`, unless `all` is set. (It may have one twice, for a moment.)
 *  2. An inode stands there before the kernel gets the answer after which it can cache something.
 */
#include "mount.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#define SLOTS_MIN 256u

struct slot {
    uint64_t ino; /* 0: never used; INO_GONE: was used */
    uint64_t refs;
    uint32_t writers; /* handles that may write */
    uint32_t handles;
    uint32_t place; /* in the page, plus 1; 0: not there */
    int64_t due;    /* when it was written last, if the times of that may be still to come; else 0 */
    bool opened;    /* the kernel may have content of it */
    bool before;    /* so a server of before has left it: with references that are not counted here */
};

#define INO_GONE UINT64_MAX

static pthread_mutex_t inodes_lock = PTHREAD_MUTEX_INITIALIZER; /* all below */
static struct slot *slots;
static size_t nslots, nused /* not never used */, nlive;
static bool unknown; /* the kernel may have content of any inode */

#define INO_LIMIT (1ull << 48)

static struct slot *slot_find(uint64_t ino)
{
    for (size_t i = (size_t)(ino * 0x9e3779b97f4a7c15ull >> 20), n = 0; n < nslots; i++, n++) {
        struct slot *s = &slots[i & (nslots - 1)];

        if (s->ino == ino)
            return s;
        if (s->ino == 0)
            return NULL;
    }
    return NULL;
}

static struct slot *slot_place(uint64_t ino)
{
    size_t i = (size_t)(ino * 0x9e3779b97f4a7c15ull >> 20) & (nslots - 1);

    while (slots[i].ino != 0 && slots[i].ino != INO_GONE)
        i = (i + 1) & (nslots - 1);
    return &slots[i];
}

static void slots_resize(size_t n)
{
    struct slot *old = slots;
    size_t nold = nslots;

    slots = xcalloc(n, sizeof(*slots));
    nslots = n;
    nused = nlive;
    for (size_t i = 0; i < nold; i++) {
        if (old[i].ino != 0 && old[i].ino != INO_GONE)
            *slot_place(old[i].ino) = old[i];
    }
    free(old);
}

static struct slot *slot_get(uint64_t ino)
{
    struct slot *s = slot_find(ino);

    if (s)
        return s;
    if (nused * 4 >= nslots * 3) {
        size_t n = SLOTS_MIN;

        while (n < nlive * 2 + 1)
            n *= 2;
        slots_resize(n);
    }
    s = slot_place(ino);
    if (s->ino == 0)
        nused++;
    *s = (struct slot){.ino = ino};
    nlive++;
    return s;
}

/* --- the page; the compiler must not turn these stores round --- */

static void page_add(struct slot *s)
{
    struct server_page *page = mount_page;
    uint32_t n = page ? page->head.inodes : 0;

    if (!page || s->place || n > SERVER_PAGE_INODES)
        return;
    if (n == SERVER_PAGE_INODES) {
        atomic_store((_Atomic uint32_t *)&page->head.all, 1);
        return;
    }
    page->inode[n] = s->ino;
    atomic_store((_Atomic uint32_t *)&page->head.inodes, n + 1);
    s->place = n + 1;
}

static void page_remove(const struct slot *s)
{
    struct server_page *page = mount_page;
    uint32_t last = page && s->place ? page->head.inodes - 1 : 0;
    struct slot *moved;

    if (!page || !s->place)
        return;
    moved = slot_find(page->inode[last]);
    if (moved)
        moved->place = s->place;
    page->inode[s->place - 1] = page->inode[last];
    atomic_store((_Atomic uint32_t *)&page->head.inodes, last);
}

/* What the last server has left. It may have been taken over: nothing of it is believed but as a number to be invalidated. */
static void page_load(struct server_page *page)
{
    uint32_t n = MIN(page->head.inodes, SERVER_PAGE_INODES), kept = 0;

    for (uint32_t i = 0; i < n; i++) {
        uint64_t ino = page->inode[i];
        struct slot *s;

        if (ino < VOLUME_ROOT_INO || ino >= INO_LIMIT)
            continue;
        s = slot_get(ino);
        if (s->place)
            continue;
        s->opened = s->before = true;
        page->inode[kept++] = ino;
        s->place = kept;
    }
    atomic_store((_Atomic uint32_t *)&page->head.inodes, kept);
}

void inodes_begin(void)
{
    pthread_mutex_lock(&inodes_lock);
    unknown = mount_page ? mount_page->head.all : mount_config.takeover;
    if (mount_page)
        page_load(mount_page);
    pthread_mutex_unlock(&inodes_lock);
}

bool inodes_unknown(void)
{
    return unknown;
}

/* --- counting --- */

static void slot_drop_unused(struct slot *s, bool forgotten)
{
    s->before &= !forgotten;
    if (s->refs || s->handles || s->before || s->ino == VOLUME_ROOT_INO)
        return;
    page_remove(s);
    *s = (struct slot){.ino = INO_GONE};
    nlive--;
    /* What an unpacked archive left behind is given back. */
    if (nslots > SLOTS_MIN * 64 && nlive * 16 < nslots)
        slots_resize(nslots / 8);
}

void inodes_ref(uint64_t ino)
{
    pthread_mutex_lock(&inodes_lock);
    slot_get(ino)->refs++;
    pthread_mutex_unlock(&inodes_lock);
}

uint64_t inodes_forget(uint64_t ino, uint64_t n)
{
    struct slot *s;

    pthread_mutex_lock(&inodes_lock);
    s = slot_find(ino);
    n = s ? MIN(n, s->refs) : 0;
    if (s) {
        s->refs -= n;
        slot_drop_unused(s, true); /* the kernel gives back all at once */
    }
    pthread_mutex_unlock(&inodes_lock);
    return n;
}

void inodes_opened(uint64_t ino, bool write)
{
    struct slot *s;

    pthread_mutex_lock(&inodes_lock);
    s = slot_get(ino);
    s->opened = true;
    s->handles++;
    s->writers += write;
    page_add(s);
    pthread_mutex_unlock(&inodes_lock);
}

void inodes_cached(uint64_t ino)
{
    struct slot *s;

    pthread_mutex_lock(&inodes_lock);
    s = slot_get(ino);
    s->opened = true;
    page_add(s);
    pthread_mutex_unlock(&inodes_lock);
}

void inodes_closed(uint64_t ino, bool write)
{
    struct slot *s;

    pthread_mutex_lock(&inodes_lock);
    s = slot_find(ino);
    if (s && s->handles) {
        s->handles--;
        s->writers -= write && s->writers;
        if (!s->writers)
            s->due = 0; /* before it lets go of the last, the kernel has sent them */
        slot_drop_unused(s, false);
    }
    pthread_mutex_unlock(&inodes_lock);
}

void inodes_set_due(uint64_t ino, int64_t ns)
{
    struct slot *s;

    pthread_mutex_lock(&inodes_lock);
    s = slot_find(ino);
    if (s)
        s->due = ns;
    pthread_mutex_unlock(&inodes_lock);
}

size_t inodes_take_due(struct inode_due **ret)
{
    struct inode_due *due;
    size_t n = 0;

    pthread_mutex_lock(&inodes_lock);
    due = xcalloc(nlive + 1, sizeof(*due));
    for (size_t i = 0; i < nslots; i++) {
        struct slot *s = &slots[i];

        if (s->ino == 0 || s->ino == INO_GONE || !s->due)
            continue;
        due[n++] = (struct inode_due){s->ino, s->due};
        s->due = 0;
    }
    pthread_mutex_unlock(&inodes_lock);
    *ret = due;
    return n;
}

bool inodes_written(uint64_t ino)
{
    const struct slot *s;
    bool written;

    pthread_mutex_lock(&inodes_lock);
    s = slot_find(ino);
    written = mount_config.takeover || (s && s->writers); /* handles of before are not known */
    pthread_mutex_unlock(&inodes_lock);
    return written;
}

size_t inodes_list(enum inodes_which which, uint64_t **ret_ino, uint64_t **ret_refs)
{
    uint64_t *ino, *refs = NULL;
    size_t n = 0;

    pthread_mutex_lock(&inodes_lock);
    ino = xcalloc(nlive + 1, sizeof(*ino));
    if (ret_refs)
        refs = xcalloc(nlive + 1, sizeof(*refs));
    for (size_t i = 0; i < nslots; i++) {
        const struct slot *s = &slots[i];

        if (s->ino == 0 || s->ino == INO_GONE || (which == INODES_WRITTEN && !s->writers) ||
            (which == INODES_OPENED && !s->opened))
            continue;
        if (refs)
            refs[n] = s->refs;
        ino[n++] = s->ino;
    }
    pthread_mutex_unlock(&inodes_lock);
    *ret_ino = ino;
    if (ret_refs)
        *ret_refs = refs;
    return n;
}
