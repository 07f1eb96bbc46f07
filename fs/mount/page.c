/*
 * page.c - the mapping of struct server_page (coffer/server.h), which outlives this server. Here whole fields; inodes.c owns
 * inode[], auth.c witness[].
 */
#include "mount.h"

#include <stdatomic.h>
#include <sys/mman.h>

struct server_page *mount_page;

void page_begin(void)
{
    struct server_page *p = MAP_FAILED;

    if (mount_config.page)
        p = mmap(NULL, sizeof(*p), PROT_READ | PROT_WRITE, MAP_SHARED, SERVER_FD_PAGE, 0);
    if (p == MAP_FAILED)
        return;
    if (p->head.version != SERVER_PAGE_VERSION) {
        /* Nothing, or another program's: then nothing is known. */
        p->head.all = p->head.open = p->head.version != 0;
        p->head.inodes = 0;
        memset(p->witness, 0, sizeof(p->witness));
        atomic_store((_Atomic uint32_t *)&p->head.version, SERVER_PAGE_VERSION);
    }
    mount_page = p;
}

bool page_was_open(void)
{
    return !mount_page || mount_page->head.open;
}

void page_set_open(bool open)
{
    if (mount_page)
        mount_page->head.open = open;
}
