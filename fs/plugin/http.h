/* http.h - the Docker volume plugin: the VolumeDriver protocol over HTTP on a unix socket. */
#ifndef COFFER_PLUGIN_HTTP_H
#define COFFER_PLUGIN_HTTP_H

#include "common.h"

/* Serves at plugin_config.plugin_socket with a thread for each connection. 0 or -errno with the reason. */
int plugin_http_start(struct why *why);

/* One request: path ("/VolumeDriver.Get"), body, the process that asks. Returns the HTTP status and the answer's text
 * (free it). What a Mount that succeeded took is in *ret_mounted_name and _id (free them), else NULL. */
struct engine_peer;
unsigned plugin_http_answer(const char *path, const char *body, size_t n, const struct engine_peer *peer,
                            char **ret_text, char **ret_mounted_name, char **ret_mounted_id);

#endif
