"""`coterie dashboard` answers its owner's browser and nobody else; `coterie status --watch` looks again."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coterie.cli.app import main
from coterie.cli.dashboard import PageServer, serving
from coterie.errors import CheckpointError, ConfigError


@contextmanager
def running(page: str | Exception = "<p>here</p>") -> Iterator[PageServer]:
    def made() -> str:
        if isinstance(page, Exception):
            raise page
        return page

    with serving(made, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def asked(server: PageServer, path: str, method: str = "GET", host: str = "") -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    try:
        connection.request(method, path, headers={"Host": host} if host else {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), dict(answer.getheaders())
    finally:
        connection.close()


def test_the_owner_gets_the_page_and_it_may_load_nothing() -> None:
    with running() as server:
        status, text, headers = asked(server, server.path)
        assert (status, text) == (200, "<p>here</p>")
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert headers["Cache-Control"] == "no-store"
        assert server.url == f"http://127.0.0.1:{server.server_port}{server.path}"
        assert server.server_address[0] == "127.0.0.1"


def test_another_address_or_name_gets_nothing() -> None:
    with running() as server, running() as other:
        assert server.path != other.path
        assert len(server.path) > 30
        for path in ("/", "/favicon.ico", server.path[:-1], server.path + "x", other.path, "/%ff%fe/"):
            assert asked(server, path)[0] == 404, path
        for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1", "localhost"):
            assert asked(server, server.path, host=host)[0] == 404, host
        assert asked(server, server.path, host=f"localhost:{server.server_port}")[0] == 200
        assert asked(server, server.path, method="POST")[0] == 501


def test_a_folder_that_went_away_is_told_and_the_server_goes_on() -> None:
    with running(CheckpointError("it holds no run.", code="run-dir-none", fix="name one")) as server:
        status, text, _ = asked(server, server.path)
        assert status == 503
        assert "it holds no run." in text
        assert asked(server, server.path)[0] == 503


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError) as error:
            serving(str, taken.getsockname()[1])
    assert error.value.code == "dashboard-port"


def test_a_dashboard_of_no_run_is_refused_before_anything_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["dashboard", str(tmp_path)])
    shown = capsys.readouterr()
    assert "run-dir-none" in shown.err
    assert "Dashboard" not in shown.out


def test_watching_shows_every_process_and_ends_when_all_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for name, role in (("one", "coordinator"), ("two", "party")):
        folder = tmp_path / name
        folder.mkdir()
        told = {"role": role, "party": "alder", "round": 2, "rounds": 4, "missing": ["birch"], "at": 0}
        (folder / "status.json").write_text(json.dumps(told), "utf-8")
        folders.append(str(folder))
    with pytest.raises(SystemExit) as ended:
        main(["status", "--watch", *folders, "--json", str(tmp_path / "status.json")])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "coordinator: round 2 of 4, not running; missing: birch",
        "party alder: round 2 of 4, not running; missing: birch",
    ]
    found = json.loads((tmp_path / "status.json").read_text("utf-8"))
    assert [status["role"] for status in found] == ["coordinator", "party"]
    assert [status["running"] for status in found] == [False, False]
