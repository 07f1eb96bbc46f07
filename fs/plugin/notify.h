/*
 * notify.h - the service manager's side, if there is one: sd_notify(3) and its store of descriptors, so that a mount outlives
 * cofferd and coffer-fs both. Without NOTIFY_SOCKET nothing is done. Names are 1 to 255 printable characters without ':'.
 */
#ifndef COFFER_PLUGIN_NOTIFY_H
#define COFFER_PLUGIN_NOTIFY_H

/* First of all in main(): takes the stored descriptors that came along (sd_listen_fds(3)), before their numbers can mean
 * anything else. */
void notify_begin(void);
/* READY=1. What was stored and not taken by then is nobody's: closed, and out of the store. */
void notify_ready(void);
/* The descriptor that was stored under prefix and name, the caller's now; -1: none. */
int notify_take(const char *prefix, const char *name);
/* Stores a duplicate; fd stays the caller's. */
void notify_store(const char *prefix, const char *name, int fd);
void notify_remove(const char *prefix, const char *name);

#endif
