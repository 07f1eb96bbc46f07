/*
 * agent_client.h - cofferd's requests to coffer-keyd (coffer/agent.h), one connection each, so that a slow one (a
 * passphrase being derived) holds up nobody and a restart of keyd is noticed by nothing but that request.
 *
 * All return 0 or the agent's negative errno, with a line for the operator in *why. -EHOSTDOWN: keyd does not answer.
 */
#ifndef COFFER_PLUGIN_AGENT_CLIENT_H
#define COFFER_PLUGIN_AGENT_CLIENT_H

#include "common.h"

#define AGENT_WAIT_MS (AGENT_TIMEOUT_MS + 5000) /* an ordinary request */
#define AGENT_SLOW_MS 120000                    /* init and unlock: Argon2 */

/* A connection to the agent, or -errno; at once, no waiting for a keyd that is being started. */
int agent_connect(void);
/*
 * Sends one request (body may be NULL with len 0) with descriptors, which stay the caller's, and takes the answer: of
 * type want into ret (exactly ret_len bytes), or AGENT_REPLY, whose error is returned. Waits a few seconds for a keyd
 * that is just being started.
 */
int agent_call(uint16_t type, const void *body, uint32_t len, const int *fds, int nfds, uint16_t want, void *ret,
               uint32_t ret_len, int timeout_ms, struct why *why);

int agent_status(struct agent_status *ret, struct why *why);
/* -ENOKEY with what to do unless the keystore is there and unlocked. */
int agent_need_unlocked(struct why *why);
int agent_volume_get(const char *name, struct agent_volume *ret, struct why *why);
int agent_volume_rm(const char *name, struct why *why);
int agent_accept_rollback(const char *name, struct why *why);
int agent_volume_set_state(const char *name, uint32_t state, struct why *why);
int agent_volume_set_size(const char *name, uint64_t size_limit, struct why *why);
/* type AGENT_RULE_ADD or AGENT_RULE_RM. */
int agent_rule(uint16_t type, const char *name, bool deny, const char *rule, struct why *why);
/* All rules, in order, as a new array of {"effect", "rule"}. */
int agent_rules_get(const char *name, json_t **ret_rules, struct why *why);
/* Makes a volume channel: *ret_fd is coffer-fs's end. */
int agent_bind(const char *name, uint32_t purpose, int *ret_fd, struct why *why);
/* pidfd is of the engine's process; -1 for AGENT_ENGINE_END. */
int agent_engine(const char *name, uint32_t kind, pid_t tgid, int pidfd, uint64_t ref, struct why *why);
/* Fills the field of a request that names the volume; of VOLUME@SNAPSHOT the agent knows the volume. */
void agent_set_name(char out[AGENT_NAME_MAX], const char *name);
/* An audit record; failure is logged, not returned. */
void agent_note(const char *name, const char *event, const char *text);

#endif
