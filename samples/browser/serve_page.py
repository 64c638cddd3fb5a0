"""Serve a built page on this machine, with the headers that let WebAssembly have threads.

    python samples/browser/serve_page.py [FOLDER] [--port 8000]

A page that shares memory between threads has to be cut off from other origins: the browser gives
it threads only with the two headers here. Any server will do that sends them.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ISOLATION = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
}


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder; `isolated` decides about the headers."""

    isolated = True
    extensions_map = {  # noqa: RUF012  (the base class has it so)
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        """Add the headers to every answer; a rebuilt page is read anew."""
        for name, value in ISOLATION.items() if self.isolated else ():
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing for every file."""


class PlainHandler(Handler):
    """The same without isolation, as most servers answer: one thread."""

    isolated = False


class Server(ThreadingHTTPServer):
    """One that takes it quietly when a page is closed while it loads."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell everything else."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def server(folder: Path, port: int = 0, isolated: bool = True) -> Server:
    """A server on loopback, not yet running; port 0 takes a free one."""
    handler = partial(Handler if isolated else PlainHandler, directory=str(folder))
    return Server(("127.0.0.1", port), handler)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("out/browser"))
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    with server(arguments.folder, arguments.port) as running:
        print(f"http://127.0.0.1:{running.server_port}", flush=True)
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
