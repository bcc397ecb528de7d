"""Output that cannot be written ends no work: readers that go away, full disks, closed descriptors, encodings."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from coterie.cli.streams import KeptOn, KeptOnFileHandler

WORK = (
    "import sys, time, json, coterie.cli.app as app\n"
    "from coterie.cli.output import say, write_json, table, progress\n"
    "def command():\n"
    "    print('ready', flush=True)\n"
    "    sys.stdin.readline()\n"
    "    for number in range(2000):\n"
    "        say(f'line {number} of many'); print('error line', number, file=sys.stderr)\n"
    "    table(['a'], [(1,)])\n"
    "    with progress('round', 3) as advance:\n"
    "        for _ in range(3): advance('x')\n"
    "    write_json('done.json', {'done': True})\n"
    "class One:\n    command = staticmethod(command)\n"
    "import types; module = types.ModuleType('coterie.cli.models'); module.command = command\n"
    "command.__doc__ = 'Text.\\n\\nExample:\\n    coterie models\\n'\n"
    "sys.modules['coterie.cli.models'] = module\nsys.argv = ['coterie', 'models']\napp.main()\n"
)


def test_readers_that_go_away_end_nothing_and_the_figures_are_written(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WORK],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(30) == 0
    assert json.loads((tmp_path / "done.json").read_text()) == {"done": True}


@pytest.mark.parametrize("full", ["stdout", "stderr"])
def test_a_full_disk_behind_one_stream_is_said_once_on_the_other(tmp_path: Path, full: str) -> None:
    with open("/dev/full", "wb") as device:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, full: device}
        done = subprocess.run([sys.executable, "-c", WORK], cwd=tmp_path, input=b"\n", **streams, timeout=60)  # type: ignore[call-overload]
    assert done.returncode == 0
    assert (tmp_path / "done.json").exists()
    if full == "stdout":
        assert done.stderr.count(b"standard output cannot be written any more (No space left on device)") == 1
        assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_descriptors_that_were_closed_from_the_start_are_not_given_to_files(tmp_path: Path, closed: str) -> None:
    code = WORK.replace("    sys.stdin.readline()\n", "    kept = open('kept', 'w'); assert kept.fileno() > 2\n")
    (tmp_path / "work.py").write_text(code)
    line = f"exec {sys.executable} work.py {closed}"
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "done.json").read_text()) == {"done": True}


def test_a_stream_that_was_closed_meanwhile_is_given_up_quietly_after_one_word() -> None:
    told: list[str] = []
    stream = io.StringIO()
    kept = KeptOn(stream, "standard error", told.append)
    kept.write("before")
    stream.close()
    assert kept.write("after") == 5
    kept.flush()
    assert len(told) == 1
    assert "standard error cannot be written any more" in told[0]


def test_a_terminal_of_another_encoding_gets_a_mark_for_what_it_cannot_show() -> None:
    raw = io.BytesIO()
    kept = KeptOn(io.TextIOWrapper(raw, encoding="ascii"), "standard output", lambda text: None)
    kept.write("Bäume \ud83d\n")
    kept.flush()
    assert raw.getvalue() == b"B?ume ?\n"


def test_a_log_on_a_full_disk_is_given_up_once_without_tracebacks(capsys: pytest.CaptureFixture[str]) -> None:
    handler = KeptOnFileHandler("/dev/full", delay=True)
    log = logging.Logger("x")
    log.addHandler(handler)
    for _ in range(5):
        log.error("something")
    shown = capsys.readouterr().err
    assert shown.count("cannot be written any more (No space left on device)") == 1
    assert "Traceback" not in shown


def test_a_log_whose_folder_is_gone_is_given_up_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.Logger("x")
    log.addHandler(KeptOnFileHandler(tmp_path / "gone" / "a.log", delay=True))
    for _ in range(3):
        log.error("something")
    assert capsys.readouterr().err.count("going on without it") == 1
