/* Asks the PCP server argv[1] for a mapping of UDP port 1234 of argv[2] by
 * Cisco's PCP client library (https://github.com/libpcp/pcp) and prints
 * every change that the library tells of. */
#include "pcp.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <sys/select.h>

static void changed(pcp_flow_t *flow, struct sockaddr *source, struct sockaddr *external, pcp_fstate_e state, void *arg) {
	const struct sockaddr_in *at = (const struct sockaddr_in *)external;
	printf("state %d external %s:%d\n", state, inet_ntoa(at->sin_addr), ntohs(at->sin_port));
	fflush(stdout);
}

int main(int argc, char **argv) {
	struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(5351)};
	struct sockaddr_in source = {.sin_family = AF_INET, .sin_port = htons(1234)};
	struct sockaddr_in external = {.sin_family = AF_INET};
	pcp_ctx_t *ctx = pcp_init(DISABLE_AUTODISCOVERY, NULL);
	if (argc != 3 || ctx == NULL || !inet_aton(argv[1], &server.sin_addr) || !inet_aton(argv[2], &source.sin_addr))
		return 2;
	pcp_add_server(ctx, (struct sockaddr *)&server, 2);
	pcp_set_flow_change_cb(ctx, changed, NULL);
	if (pcp_new_flow(ctx, (struct sockaddr *)&source, NULL, (struct sockaddr *)&external, 17, 3600, NULL) == NULL)
		return 1;
	for (;;) {
		struct timeval wait = {0, 50000};
		fd_set ready;
		FD_ZERO(&ready);
		FD_SET(pcp_get_socket(ctx), &ready);
		select(pcp_get_socket(ctx) + 1, &ready, NULL, NULL, &wait);
		pcp_pulse(ctx, &wait);
	}
}
