/*
 * secmem.h - keys in memory. A key is one type with one owner; it lives in sodium_malloc memory (mlocked, guard pages,
 * not dumped) and is wiped when freed. Never copy one into a plain buffer that outlives the call.
 */
#ifndef COFFER_SECMEM_H
#define COFFER_SECMEM_H

#include <stddef.h>
#include <stdint.h>

#define KEY_BYTES 32

struct key {
    uint8_t b[KEY_BYTES];
};

/* sodium_init(), core dumps off (RLIMIT_CORE 0, PR_SET_DUMPABLE 0). 0 or -errno; call first in every program. */
int secmem_init(void);
/* n zeroed bytes of guarded, locked memory; NULL and errno when it cannot be had (mlock failing is fatal to callers). */
void *secmem_alloc(size_t n);
/* Wipes and frees; NULL is fine. */
void secmem_free(void *p);
/* A zeroed key, or NULL. */
struct key *key_new(void);
/* Wipes, frees and sets *k to NULL. */
void key_free(struct key **k);

#endif
