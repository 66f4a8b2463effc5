"""A file server that is no bottleneck: nginx if installed, else sendfile in a separate process.

python benchmarks/server.py FOLDER    serves it without nginx, prints the port, and ends when its standard input does
"""

from __future__ import annotations

import http.server
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import requests

_NGINX = """
daemon off;
worker_processes 1;
pid {place}/pid;
error_log {place}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    {temporary}
    server {{ listen 127.0.0.1:{port}; root {folder}; }}
}}
"""
_KINDS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


class _Handler(http.server.SimpleHTTPRequestHandler):
    """The standard library's handler, with copies by the kernel and without a log."""

    protocol_version = "HTTP/1.1"

    def copyfile(self, source, outputfile) -> None:  # noqa: ARG002
        self.wfile.flush()
        self.connection.sendfile(source)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Silent."""


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, str]]:
    """Serve a folder on loopback; gives its address and the server's name."""
    with tempfile.TemporaryDirectory() as place:
        if nginx := shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin"):
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            temporary = " ".join(f"{kind}_temp_path {place}/{kind};" for kind in _KINDS)
            configuration = Path(place) / "nginx.conf"
            # The worker may run as another user, who needs access to the files.
            user = "user root;\n" if os.geteuid() == 0 else ""
            text = _NGINX.format(place=place, temporary=temporary, port=port, folder=folder.resolve())
            configuration.write_text(user + text)
            command = [nginx, "-c", str(configuration), "-e", f"{place}/error.log"]
            # In its own session: schedulers divide processors among sessions.
            running = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        else:
            command = [sys.executable, __file__, str(folder)]
            pipe = subprocess.PIPE
            running = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
            assert running.stdout is not None
            port = int(running.stdout.readline())
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url)
            yield url, "nginx" if nginx else "sendfile in Python"
        finally:
            running.terminate()
            running.wait()


def _wait(url: str) -> None:
    pause = threading.Event()
    for _ in range(100):
        try:
            requests.get(url, timeout=5)
            return
        except requests.ConnectionError:
            pause.wait(0.05)
    raise SystemExit(f"No server answers at {url}.")


def main() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=sys.argv[1])) as server:
        print(server.server_address[1], flush=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sys.stdin.read()
        server.shutdown()


if __name__ == "__main__":
    main()
