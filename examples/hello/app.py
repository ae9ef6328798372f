"""Answers every GET with a greeting and the name of the machine."""

import os
import socket
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer

PORT = 8080
GREETING = os.environ.get("GREETING", "Hello")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{GREETING}, {socket.gethostname()}!\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


# Not http.server's own server class: that one looks its name up in DNS before it listens.
class Server(ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


if __name__ == "__main__":
    with Server(("0.0.0.0", PORT), Handler) as server:
        print(f"listening on port {PORT}")
        server.serve_forever()
