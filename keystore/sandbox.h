/*
 * sandbox.h - the cages of coffer-keyd and its helpers: seccomp allow-lists and Landlock. Each is put on once, by the
 * process itself, and never comes off. In sanitizer builds, whose run-time needs other calls, the seccomp part is left
 * out (sandbox_active says so).
 */
#ifndef COFFER_KEYSTORE_SANDBOX_H
#define COFFER_KEYSTORE_SANDBOX_H

#include <stdbool.h>
#include <stddef.h>

/* Whether this build filters system calls. */
bool sandbox_active(void);

/*
 * coffer-keyd: no exec, no fork, no network socket; files only below keystore_dir (read, write), /proc and
 * /sys/fs/cgroup (read). *ret_landlock: whether the kernel could do the latter. 0 or -errno.
 */
int sandbox_keyd(int keystore_dir, bool *ret_landlock);
/* The helper that forks one child for each document: receive, fork, close. 0 or -errno. */
int sandbox_facts_helper(void);
/* The child that parses: read, write to its socket, memory, end. A call outside that kills it. 0 or -errno. */
int sandbox_facts_child(void);
/* Bounds the address space (not in sanitizer builds). */
void sandbox_limit_memory(size_t bytes);

#endif
