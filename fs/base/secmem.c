/* secmem.c - see secmem.h. */
#include "secmem.h"

#include <errno.h>
#include <sodium.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>

int secmem_init(void)
{
    struct rlimit none = {0, 0};

    if (sodium_init() < 0)
        return -ENOSYS;
    if (setrlimit(RLIMIT_CORE, &none) < 0 || prctl(PR_SET_DUMPABLE, 0) < 0)
        return -errno;
    return 0;
}

void *secmem_alloc(size_t n)
{
    void *p = sodium_malloc(n);

    if (!p)
        return NULL;
    /* sodium_malloc goes on when mlock fails; a key that could be swapped out is not what was asked for. */
    if (sodium_mlock(p, n) < 0) {
        sodium_free(p);
        errno = ENOMEM;
        return NULL;
    }
    memset(p, 0, n);
    return p;
}

void secmem_free(void *p)
{
    sodium_free(p);
}

struct key *key_new(void)
{
    return secmem_alloc(sizeof(struct key));
}

void key_free(struct key **k)
{
    secmem_free(*k);
    *k = NULL;
}
