/*
 * broker.h - answers coffer-keyd's questions about containers with what the engine knows (AGENT_FACTS): bytes from the
 * engine's files or its API, passed on unparsed.
 */
#ifndef COFFER_PLUGIN_BROKER_H
#define COFFER_PLUGIN_BROKER_H

#include "common.h"

/* Turns sock (a fresh control connection to keyd, taken) into the broker and serves it until it ends. Returns why it
 * ended, a negative errno. *live is the descriptor for shutdown(2) by another thread while it serves, else -1; it
 * changes under *lock. */
int broker_serve_take(int sock, int *live, pthread_mutex_t *lock);

/* What the engine knows of the container: 0 with a readable descriptor (the caller's) and enum agent_facts_source;
 * -ENOENT: no such container; -ETIMEDOUT and others: the engine cannot be asked. Bounded by 5 s. */
int broker_container_facts(const char *id, int *ret_fd, uint32_t *ret_source);

#endif
