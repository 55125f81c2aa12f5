"""A server on the loopback interface, for the tests of downloads."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[http.server.ThreadingHTTPServer]:
    """Serve at `server.url` until the end of the block; a handler may wait for `server.released` before it answers."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.url, server.released = f"http://127.0.0.1:{server.server_port}", threading.Event()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
