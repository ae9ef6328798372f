/* Answers every connection with one line over HTTP. It takes the port as its argument. */

#include <arpa/inet.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

static const char answer[] = "HTTP/1.1 200 OK\r\n"
                             "Content-Type: text/plain\r\n"
                             "Content-Length: 20\r\n"
                             "Connection: close\r\n"
                             "\r\n"
                             "Hello from scratch!\n";

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

int main(int argc, char **argv)
{
    int port = argc > 1 ? atoi(argv[1]) : 8080;
    int yes = 1;
    struct sockaddr_in address;

    signal(SIGPIPE, SIG_IGN);
    int server = socket(AF_INET, SOCK_STREAM, 0);
    if (server < 0)
        fail("socket");
    setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_ANY);
    address.sin_port = htons((unsigned short)port);
    if (bind(server, (struct sockaddr *)&address, sizeof address) < 0)
        fail("bind");
    if (listen(server, 16) < 0)
        fail("listen");
    printf("listening on port %d\n", port);
    fflush(stdout);

    for (;;) {
        char request[4096];
        struct timeval patience = {.tv_sec = 5};
        int client = accept(server, NULL, NULL);
        if (client < 0)
            continue;
        /* A client that says nothing must not keep the others waiting. */
        setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        if (read(client, request, sizeof request) > 0 && write(client, answer, sizeof answer - 1) < 0)
            perror("write");
        close(client);
    }
}
