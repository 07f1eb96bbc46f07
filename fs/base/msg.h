/*
 * msg.h - messages between coffer's processes on one host, over unix sockets.
 *
 * Two framings:
 *  - packets (SOCK_SEQPACKET): struct msg_head and a fixed-size body, host byte order, for the agent (agent.h) and
 *    coffer-fs (server.h). One send, one packet; a truncated packet or truncated descriptors is an error.
 *  - frames (SOCK_STREAM): a le32 length and that many bytes, for the JSON of the control socket (control.h).
 * Both carry up to MSG_FDS_MAX descriptors (SCM_RIGHTS), received with close-on-exec. Descriptors that a receiver did
 * not ask for are closed.
 */
#ifndef COFFER_MSG_H
#define COFFER_MSG_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define MSG_FDS_MAX    8
#define MSG_PACKET_MAX (64u << 10)
#define MSG_FRAME_MAX  (4u << 20)

struct msg_head {
    uint16_t type;  /* of the protocol's table */
    uint16_t flags; /* 0 */
    uint32_t len;   /* bytes after this head; must equal what the packet holds */
    uint64_t id;    /* a reply carries its request's id; ids of one sender do not repeat */
};

/* Sends head and body (head->len bytes) as one packet with nfds descriptors (which stay the caller's). 0 or -errno;
 * -EPIPE when the peer is gone (no signal). It never blocks, whatever the socket's flags are (who has the same open file can
 * change them): -EAGAIN. */
int msg_send(int sock, const struct msg_head *head, const void *body, const int *fds, int nfds);
/*
 * Receives one packet into *head and body (at most cap bytes). timeout_ms < 0 waits for ever. fds (MSG_FDS_MAX places,
 * or NULL) and *ret_nfds take the descriptors, now the caller's. 0; -ECONNRESET at the end; -ETIMEDOUT; -EPROTO for a
 * packet that is not well formed (its descriptors are closed); -EAGAIN: somebody else has taken it, or on a non-blocking
 * socket.
 */
int msg_recv(int sock, struct msg_head *head, void *body, size_t cap, int *fds, int *ret_nfds, int timeout_ms);

/* The same for frames. *ret_buf has a NUL after its last byte and is the caller's (free). */
int frame_send(int sock, const void *buf, size_t n, const int *fds, int nfds);
int frame_recv(int sock, char **ret_buf, size_t *ret_n, int *fds, int *ret_nfds, int timeout_ms);

/* A listening unix socket at path (an old socket there is removed), mode as given. type SOCK_SEQPACKET or SOCK_STREAM.
 * Returns the descriptor or -errno (-ENAMETOOLONG past 107 bytes). */
int unix_listen(const char *path, int type, mode_t mode);
/* A connected one. Returns the descriptor or -errno. */
int unix_connect(const char *path, int type);

#endif
