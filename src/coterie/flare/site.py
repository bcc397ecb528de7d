"""A site's part in FLARE: start this site's own members, and carry their connections to the others' sites."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.utils.reliable_message import ReliableMessage
from nvflare.app_common.tie.applet import Applet
from nvflare.app_common.tie.connector import Connector
from nvflare.app_common.tie.defs import Constant
from nvflare.app_common.tie.executor import TieExecutor

from coterie.demonstration.processes import LIFELINE
from coterie.federation.identity.provision import free_endpoints
from coterie.flare.local import LocalMember, members_here
from coterie.flare.tunnel import Tunnel

MESSAGE_S, DELIVERY_S = 30.0, 300.0
"""Seconds that FLARE waits for one try at a message, and for all tries."""
_GRACE_S = 20.0
_BODY = "coterie"


class Members(Applet):  # type: ignore[misc]  # FLARE has no types
    """The processes of this site's members."""

    def __init__(self) -> None:
        super().__init__()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._logs: list[BinaryIO] = []
        self._lifeline, self._held = os.pipe()

    def start(self, app_ctx: Mapping[str, Any]) -> None:
        """Start them; where what they print goes, `LocalMember.open_log` says."""
        members: list[LocalMember] = app_ctx["members"]
        for member in members:
            log = member.open_log()
            self._logs.append(log)
            others = {name: address for name, address in app_ctx["dial"].items() if name != member.name}
            command = member.command(app_ctx["dial"][member.name], others)
            self._running[member.name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, LIFELINE: str(self._lifeline)},  # they end when this process does, however it does
                pass_fds=(self._lifeline,),
            )

    def stop(self, timeout: float = 0.0) -> int:
        """Ask all for a clean end, then end them."""
        for process in self._running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        codes = [_ended(process, timeout or _GRACE_S) for process in self._running.values()]
        for log in self._logs:
            log.close()
        return next((code for code in codes if code), 0)

    def is_stopped(self) -> tuple[bool, int]:
        """Whether all have ended, or one has failed."""
        codes = [process.poll() for process in self._running.values()]
        failed = next((code for code in codes if code), 0)
        return bool(failed) or all(code is not None for code in codes), failed


def _ended(process: subprocess.Popen[bytes], timeout: float) -> int:
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


class Carrier(Connector):  # type: ignore[misc]  # FLARE has no types
    """Joins this site's members and the other sites'."""

    def __init__(self) -> None:
        super().__init__()
        self._me = ""
        self._local = Path()
        self._members: list[LocalMember] = []
        self._elsewhere: dict[str, str] = {}
        self._tunnel: Tunnel | None = None

    def initialize(self, fl_ctx: FLContext) -> None:
        super().initialize(fl_ctx)
        self._me = fl_ctx.get_identity_name()
        self._local = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_site_config_dir())
        ReliableMessage.register_request_handler(Constant.TOPIC_APP_REQUEST, self._received, fl_ctx)

    def configure(self, config: Mapping[str, Any], fl_ctx: FLContext) -> None:
        """Find out who runs here; see `members_here`."""
        sites: Mapping[str, str] = config["sites"]
        wanted = [member for member, site in sites.items() if site == self._me]
        self._members = members_here(self._local, wanted, str(config["agreement"]))
        self._elsewhere = {member: site for member, site in sites.items() if site != self._me}

    def start(self, fl_ctx: FLContext) -> None:
        here = dict(zip((m.name for m in self._members), free_endpoints(len(self._members)), strict=True))
        self._tunnel = Tunnel(here, self._elsewhere, self._deliver)
        self.start_applet({"members": self._members, "dial": {**here, **self._tunnel.start()}}, fl_ctx)

    def stop(self, fl_ctx: FLContext) -> None:
        self.stop_applet()
        if self._tunnel is not None:
            self._tunnel.close()

    def _deliver(self, site: str, body: Mapping[str, Any]) -> None:
        request = Shareable()
        request[_BODY] = dict(body)
        with self.engine.new_context() as fl_ctx:
            reply = self.send_request(site, str(body["op"]), request, MESSAGE_S, DELIVERY_S, fl_ctx)
        code = reply.get_return_code()
        if code != ReturnCode.OK:
            raise OSError(f"{site} answered {code}")

    def _received(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        site = fl_ctx.get_peer_context().get_identity_name()
        body = request.get(_BODY)
        try:
            if self._tunnel is None or not isinstance(body, dict):
                return make_reply(ReturnCode.SERVICE_UNAVAILABLE)
            self._tunnel.handle(site, body)
        except OSError:
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        return make_reply(ReturnCode.OK)


class CoterieExecutor(TieExecutor):  # type: ignore[misc]  # FLARE has no types
    """What a job names for its sites; it takes no settings from the job but who runs where."""

    def __init__(self) -> None:
        super().__init__()
        self._config: dict[str, Any] = {}

    def get_connector(self, fl_ctx: FLContext) -> Carrier:
        return Carrier()

    def get_applet(self, fl_ctx: FLContext) -> Members:
        return Members()

    def configure(self, config: dict[str, Any], fl_ctx: FLContext) -> None:
        self._config = config

    def get_connector_config(self, fl_ctx: FLContext) -> dict[str, Any]:
        return self._config
