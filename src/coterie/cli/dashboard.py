"""`coterie dashboard`: runs on this machine as a page that renews itself.

The page shows an owner's losses, and other people may have accounts on the same machine: it is served on loopback
alone, under an address that nobody can guess, and a request whose Host names something else (a page elsewhere that
pointed its own name here) is turned away. It only reads.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.output import say
from coterie.errors import ConfigError, CoterieError

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders of `coterie train`, `coterie up` or `coterie coordinator` on this machine."),
    ],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port on loopback; 0: any free one.")] = 0,
    every: Annotated[int, typer.Option("--every", min=1, help="Seconds after which the page renews itself.")] = 5,
) -> None:
    """Show runs on a local page: rounds, who is late or missing, bytes, budget, losses for the owner. Until Ctrl-C.

    Example:
        coterie dashboard runs/alder
        coterie dashboard runs/coordinator runs/alder --every 2
    """
    from coterie.audit.report.live_page import LiveRun, live_page

    for run in runs:
        LiveRun.read(run)  # a folder of no run is told now, and not in the browser
    with serving(lambda: live_page([LiveRun.read(run) for run in runs], every), port) as server:
        say(f"Dashboard   {server.url}")
        say("The address is for you alone: whoever has it on this machine sees your losses. Ctrl-C ends it.")
        server.serve_forever()


class PageServer(ThreadingHTTPServer):
    """Serves one page on loopback, under a secret path.

    Attributes:
        url: where it is.
    """

    daemon_threads = True

    def __init__(self, page: Callable[[], str], port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.page = page
        self.path = f"/{secrets.token_urlsafe(24)}/"
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}
        self.url = f"http://127.0.0.1:{self.server_port}{self.path}"


def serving(page: Callable[[], str], port: int) -> PageServer:
    """A server of a page that is made anew for each request.

    Raises:
        ConfigError: the port is in use (code ``dashboard-port``).
    """
    try:
        return PageServer(page, port)
    except OSError as error:
        raise ConfigError(
            f"port {port} cannot be used: {error.strerror}.",
            code="dashboard-port",
            fix="leave out --port, and any free one is taken",
        ) from error


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version, sys_version = "coterie", ""

    def do_GET(self) -> None:
        """The page, or nothing that tells whether there is one."""
        asked = self.path.encode("utf-8", "replace")
        if self.headers.get("Host") not in self.server.hosts or not secrets.compare_digest(
            asked, self.server.path.encode()
        ):
            self._answer(HTTPStatus.NOT_FOUND, "Nothing is here.\n", "text/plain")
            return
        try:
            self._answer(HTTPStatus.OK, self.server.page(), "text/html")
        except CoterieError as error:  # a folder that was moved or removed meanwhile
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n", "text/plain")

    def _answer(self, status: HTTPStatus, text: str, kind: str) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in {
            **_HEADERS,
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": len(body),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Requests carry the secret address; nobody needs a list of them."""
