"""The hub's part in FLARE: tell the sites who runs where, start them, wait. Connections pass it encrypted, unread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import coterie.flare.supported  # noqa: F401 - before anything of FLARE's

# isort: split
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.tie.applet import Applet
from nvflare.app_common.tie.connector import Connector
from nvflare.app_common.tie.controller import TieController
from nvflare.app_common.tie.defs import Constant

from coterie.flare.local import STOPPED

_START_S = 120
_SILENCE_S = 10 * 365 * 86400.0
"""Sites talk to each other, not to the hub: it does not take their silence for the end."""


class Nothing(Applet):  # type: ignore[misc]  # FLARE has no types
    """The hub runs nothing: an applet that is there until it is stopped."""

    def __init__(self) -> None:
        super().__init__()
        self._stopped = False

    def start(self, app_ctx: Mapping[str, Any]) -> None:
        self._stopped = False

    def stop(self, timeout: float = 0.0) -> int:
        self._stopped = True
        return 0

    def is_stopped(self) -> tuple[bool, int]:
        return self._stopped, 0


class Idle(Connector):  # type: ignore[misc]  # FLARE has no types
    """Joins nothing."""

    def configure(self, config: Mapping[str, Any], fl_ctx: FLContext) -> None: ...

    def start(self, fl_ctx: FLContext) -> None:
        self.start_applet({}, fl_ctx)

    def stop(self, fl_ctx: FLContext) -> None:
        self.stop_applet()


class CoterieController(TieController):  # type: ignore[misc]  # FLARE has no types
    """What a job names for the hub.

    Args:
        sites: member to site.
        agreement: hash of the federation.yaml that the job was made from.
    """

    def __init__(self, sites: Mapping[str, str], agreement: str) -> None:
        super().__init__(
            configure_task_timeout=_START_S,
            start_task_timeout=_START_S,
            max_client_op_interval=_SILENCE_S,
            progress_timeout=_SILENCE_S,
        )
        self._agreed = {"sites": dict(sites), "agreement": agreement}

    def get_client_config_params(self, fl_ctx: FLContext) -> dict[str, Any]:
        return self._agreed

    def get_connector_config_params(self, fl_ctx: FLContext) -> dict[str, Any]:
        return {}

    def get_connector(self, fl_ctx: FLContext) -> Idle:
        return Idle()

    def get_applet(self, fl_ctx: FLContext) -> Nothing:
        return Nothing()

    def _process_client_done(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        """A site whose member failed ends the job, which would otherwise count as a success."""
        reply = super()._process_client_done(topic, request, fl_ctx)
        code = request.get(Constant.MSG_KEY_EXIT_CODE)
        if code not in (0, STOPPED):
            self.system_panic(f"a member ended with code {code}; its site's log says why", fl_ctx)
        return reply
