/*
 * server.h - the agent's event loop: connections, requests, the life of grants (coffer/agent.h is its protocol).
 */
#ifndef COFFER_KEYSTORE_SERVER_H
#define COFFER_KEYSTORE_SERVER_H

struct server;

struct server_config {
    int listen_fd;      /* SOCK_SEQPACKET; peers that are not uid 0 are hung up on */
    int dir_fd;         /* the keystore's directory */
    int signal_fd;      /* a signalfd for SIGTERM and SIGINT, which are blocked */
    int helper_fd;      /* facts_start's */
    const char *driver; /* the engine's name for this volume driver, for `attached` */
};

/* Opens the keystore (locked) and the audit log, and gets everything that must exist before the sandbox is put on. The
 * descriptors become the server's. 0 or -errno, logged. */
int server_new(const struct server_config *config, struct server **ret);
/* Serves until SIGTERM, then locks every volume (10 s) and returns 0; -errno, logged, when it cannot go on. */
int server_run(struct server *s);
void server_free(struct server *s);

#endif
