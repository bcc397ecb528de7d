"""A site's members as FLARE sees them: when they have ended, how, and that the hub hears of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coterie.flare.local import STOPPED, LocalMember

pytest.importorskip("nvflare", reason="the extra `nvflare` is not installed")

from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.tie.defs import Constant

from coterie.flare import site
from coterie.flare.site import CoterieExecutor, Members


@dataclass(frozen=True)
class Ends(LocalMember):
    """A member whose process ends with a code."""

    code: str = "0"

    def command(self, listen: str, dial: Mapping[str, str]) -> list[str]:
        waits = "import time; time.sleep(60)"
        return [sys.executable, "-c", waits if self.code == "never" else f"raise SystemExit({self.code})"]


@contextmanager
def running(folder: Path, **codes: str) -> Iterator[Members]:
    members = Members()
    each = [Ends(name, folder / "party.yaml", code=code) for name, code in codes.items()]
    members.start({"members": each, "dial": dict.fromkeys(codes, "127.0.0.1:1"), "environment": {}})
    try:
        yield members
    finally:
        members.stop(0.1)


def ended(members: Members, within_s: float = 20.0) -> tuple[bool, int]:
    until = time.monotonic() + within_s
    while not members.is_stopped()[0] and time.monotonic() < until:
        time.sleep(0.05)
    return members.is_stopped()


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ({"alder": "0", "coordinator": "0"}, 0),
        ({"alder": "0", "coordinator": str(STOPPED)}, STOPPED),
        ({"alder": str(STOPPED), "coordinator": "1"}, 1),
        ({"alder": "1", "coordinator": "never"}, 1),
    ],
)
def test_a_site_has_ended_when_all_have_or_one_has_failed(codes: dict[str, str], code: int, tmp_path: Path) -> None:
    with running(tmp_path, **codes) as members:
        assert ended(members) == (True, code)


def test_one_that_was_asked_to_stop_leaves_the_others_to_their_end(tmp_path: Path) -> None:
    with running(tmp_path, alder=str(STOPPED), coordinator="never") as members:
        assert ended(members, 1.0)[0] is False


class DeafHub:
    """An engine whose hub hears only the third time."""

    def __init__(self) -> None:
        self.told: list[Shareable] = []

    def send_aux_request(self, targets: list[str], topic: str, request: Shareable, *_: Any, **__: Any) -> dict:
        self.told.append(request)
        answers = [{}, {"server": make_reply(ReturnCode.COMMUNICATION_ERROR)}, {"server": make_reply(ReturnCode.OK)}]
        return answers[len(self.told) - 1] if targets == ["server"] and topic == Constant.TOPIC_CLIENT_DONE else {}


def test_the_hub_is_told_until_it_has_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "_AGAIN_S", 0.01)
    executor, hub = CoterieExecutor(), DeafHub()
    executor.engine = hub
    executor._notify_client_done(STOPPED, FLContext())
    assert [told[Constant.MSG_KEY_EXIT_CODE] for told in hub.told] == [STOPPED] * 3
