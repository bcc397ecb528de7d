"""A site's part in FLARE: start this site's own members, and carry their connections to the others' sites."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import coterie.flare.supported  # noqa: F401 - before anything of FLARE's

# isort: split
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.apis.utils.reliable_message import ReliableMessage
from nvflare.app_common.tie.applet import Applet
from nvflare.app_common.tie.connector import Connector
from nvflare.app_common.tie.defs import Constant
from nvflare.app_common.tie.executor import TieExecutor
from nvflare.fuel.f3.cellnet.fqcn import FQCN

from coterie.demonstration.processes import LIFELINE
from coterie.errors import CoterieError
from coterie.federation.identity.provision import free_endpoints
from coterie.flare.local import (
    REFUSALS,
    STOPPED,
    LocalMember,
    environment_of,
    members_here,
    note_refusal,
    refuse_code,
)
from coterie.flare.tunnel import Tunnel

MESSAGE_S, DELIVERY_S = 8.0, 60.0
"""Seconds that FLARE waits for one try at a message, and for all tries. A message that was lost is tried again while
members still hold the connection; they dial anew after 25 s of silence, and then nobody waits for it any more."""
_GRACE_S = 20.0
_AGAIN_S = 2.0
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
                env={**app_ctx["environment"], LIFELINE: str(self._lifeline)},  # they end when this process does
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
        """Whether all have ended, or one has failed; one that was asked to stop leaves the others to their end."""
        codes = [process.poll() for process in self._running.values()]
        failed = next((code for code in codes if code not in (None, 0, STOPPED)), None)
        if failed is not None:
            return True, failed
        return None not in codes, STOPPED if STOPPED in codes else 0


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
        self._workspace, self._local, self._code = Path(), Path(), Path()
        self._members: list[LocalMember] = []
        self._elsewhere: dict[str, str] = {}
        self._tunnel: Tunnel | None = None

    def initialize(self, fl_ctx: FLContext) -> None:
        super().initialize(fl_ctx)
        self._me = fl_ctx.get_identity_name()
        workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        self._workspace, self._local = Path(workspace.get_root_dir()), Path(workspace.get_site_config_dir())
        self._code = Path(workspace.get_app_custom_dir(fl_ctx.get_job_id()))
        ReliableMessage.register_request_handler(Constant.TOPIC_APP_REQUEST, self._received, fl_ctx)

    def configure(self, config: Mapping[str, Any], fl_ctx: FLContext) -> None:
        """Find out who runs here; see `members_here`."""
        sites: Mapping[str, str] = config["sites"]
        wanted = [member for member, site in sites.items() if site == self._me]
        try:
            refuse_code(self._code)
            self._members = members_here(self._local, wanted, str(config["agreement"]))
        except CoterieError as error:
            note_refusal(self._local, error)
            raise
        self._elsewhere = {member: site for member, site in sites.items() if site != self._me}

    def start(self, fl_ctx: FLContext) -> None:
        here = dict(zip((m.name for m in self._members), free_endpoints(len(self._members)), strict=True))
        self._tunnel = Tunnel(here, self._elsewhere, self._deliver)
        dial = {**here, **self._tunnel.start()}
        environment = environment_of(self._workspace)
        self.start_applet({"members": self._members, "dial": dial, "environment": environment}, fl_ctx)

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

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """What the hub asks for; where this site refuses, FLARE's log and the hub have the code alone."""
        try:
            return super().execute(task_name, shareable, fl_ctx, abort_signal)
        except CoterieError as error:
            self.log_error(fl_ctx, f"coterie starts nothing here ({error.code}); local/{REFUSALS} says why")
            return make_reply(ReturnCode.BAD_TASK_DATA)

    def _notify_client_done(self, rc: int, fl_ctx: FLContext) -> None:
        """Tell the hub until it has heard: it takes nobody's silence for the end, and would wait for ever."""
        if rc == Constant.EXIT_CODE_FATAL_ERROR:  # the job ends here and now, in the thread that says so
            super()._notify_client_done(rc, fl_ctx)
            return
        self.log_info(fl_ctx, f"members here ended with code {rc}")
        report = Shareable()
        report[Constant.MSG_KEY_EXIT_CODE] = rc
        while not self.abort_signal.triggered:
            replies = self.engine.send_aux_request(
                [FQCN.ROOT_SERVER], Constant.TOPIC_CLIENT_DONE, report, MESSAGE_S, fl_ctx, optional=True
            )
            reply = replies.get(FQCN.ROOT_SERVER)
            if reply is not None and reply.get_return_code() == ReturnCode.OK:
                return
            time.sleep(_AGAIN_S)
