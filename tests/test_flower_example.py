"""The Flower app in examples/: a site's own settings decide what starts, and only an exit code leaves."""

from __future__ import annotations

import importlib
import stat
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "flower"


class App:
    """Flower's two apps, as far as this example uses them: a decorator that leaves the function as it is."""

    def main(self) -> Callable[[Any], Any]:
        return lambda function: function

    def query(self, action: str) -> Callable[[Any], Any]:
        assert action == "take_part"
        return self.main()


class Message(types.SimpleNamespace):
    def __init__(self, content: Any, **options: Any) -> None:
        super().__init__(content=content, **options)

    def has_error(self) -> bool:
        return False


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], types.ModuleType]:
    """A module of the app, with stand-ins for Flower's names."""
    app, client, server = (types.ModuleType(f"flwr.{name}") for name in ("app", "clientapp", "serverapp"))
    app.__dict__.update(Message=Message, RecordDict=dict, ConfigRecord=dict, Context=object)
    client.__dict__.update(ClientApp=App)
    server.__dict__.update(ServerApp=App, Grid=object)
    for module in (types.ModuleType("flwr"), app, client, server):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in [name for name in sys.modules if name.startswith("coterie_flower")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ({}, ["up", "{settings}"]),
        ({"kit": "/k", "run-dir": "/r"}, ["coordinator", "{settings}", "--kit", "/k", "--run-dir", "/r"]),
    ],
)
def test_a_site_starts_what_its_supernode_names_and_tells_the_exit_code(
    part: Callable[[str], Any], tmp_path: Path, site: dict[str, str], words: list[str]
) -> None:
    command = tmp_path / "coterie"
    command.write_text('#!/bin/sh\necho "loss 4.2 of $*"\nexit 5\n')
    command.chmod(0o700)
    log = tmp_path / "flower.log"
    log.touch(0o644)
    settings = tmp_path / "settings.yaml"
    context = types.SimpleNamespace(node_config={"settings": str(settings), "coterie": str(command), **site})
    asked = Message({"settings": "/etc/passwd", "coterie": "/bin/true"})
    reply = part("coterie_flower.client_app").take_part(asked, context)
    assert reply.content == {"ended": {"code": 5}}
    assert log.read_text() == f"loss 4.2 of {' '.join(words).format(settings=settings)}\n"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


@pytest.mark.parametrize(("codes", "wrong"), [({1: 0, 2: 0}, None), ({1: 0, 2: 1}, "{2: 1}"), ({1: 0}, "no answer")])
def test_the_run_fails_where_a_member_did(
    part: Callable[[str], Any], codes: dict[int, int], wrong: str | None
) -> None:
    class Grid:
        def get_node_ids(self) -> list[int]:
            return [2, 1]

        def send_and_receive(self, messages: list[Any], timeout: float) -> list[Any]:
            assert [(each.dst_node_id, each.message_type) for each in messages] == [
                (1, "query.take_part"), (2, "query.take_part"),
            ]  # fmt: skip
            return [
                Message({"ended": {"code": code}}, metadata=types.SimpleNamespace(src_node_id=node))
                for node, code in codes.items()
            ]

    context = types.SimpleNamespace(run_config={"members": 2, "join-s": 1, "run-s": 60})
    main = part("coterie_flower.server_app").main
    if wrong is None:
        main(Grid(), context)
    else:
        with pytest.raises(RuntimeError, match=wrong):
            main(Grid(), context)


def test_its_settings_pin_flower_and_name_parts_that_are_there() -> None:
    settings = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert [each for each in settings["project"]["dependencies"] if each.startswith("flwr>=") and ",<" in each]
    for dotted in settings["tool"]["flwr"]["app"]["components"].values():
        module, name = dotted.split(":")
        assert f"\n{name} = " in (FOLDER / (module.replace(".", "/") + ".py")).read_text()
