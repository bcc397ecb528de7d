"""Old or new, never half: what is on the disk after a kill at every step, who waits for whom, what is synced when."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from coterie import storage
from coterie.errors import CheckpointError, CoterieError, LedgerError

DRIVER = '''
import json, os, signal, sys
from pathlib import Path
from coterie import storage

def dying_at(step):
    """Kill this process before its ``step``-th change of the disk; of a write, half is done by then."""
    done = 0
    def wrap(name):
        real = getattr(os, name)
        def dying(*given, **named):
            nonlocal done
            done += 1
            if done == step:
                if name == "write":
                    real(given[0], bytes(given[1])[: len(given[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)
        setattr(os, name, dying)
    for name in ("open", "write", "fsync", "fchmod", "replace", "unlink", "rmdir", "mkdir"):
        wrap(name)

def killed_at(step, change):
    """Whether ``change`` was cut short in a process of its own."""
    child = os.fork()
    if child == 0:
        dying_at(step)
        change()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

def at_every_step(change, look):
    seen = []
    for step in range(1, 200):
        cut = killed_at(step, change)
        seen.append(look())
        if not cut:
            return seen
'''


def driven(script: str, *arguments: object) -> list[str]:
    """What a fresh Python says, as JSON."""
    command = [sys.executable, "-c", DRIVER + script, *map(str, arguments)]
    found: list[str] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


# -- kills -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, storage.PRIVATE])
def test_a_file_is_old_or_new_wherever_its_writer_is_killed(tmp_path: Path, mode: int | None) -> None:
    seen = driven(
        """
path, mode = Path(sys.argv[1]), eval(sys.argv[2])
path.write_text("old" * 5000)
kinds = {"old" * 5000: "old", "new" * 7000: "new"}
change = lambda: storage.write_whole(path, b"new" * 7000, mode)
print(json.dumps(at_every_step(change, lambda: kinds.get(path.read_text(), "half"))))
""",
        tmp_path / "file",
        mode,
    )
    assert "half" not in seen
    assert seen.index("new") >= 4, "opened, written, synced and renamed before"
    assert seen == sorted(seen, key=["old", "new"].index)
    storage.clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_old_or_new_wherever_its_writer_is_killed(tmp_path: Path) -> None:
    seen = driven(
        """
folder = Path(sys.argv[1])

def fill(place, word):
    (place / "inner").mkdir(parents=True, exist_ok=True)
    for name in ("a", "inner/b"):
        (place / name).write_text(word)

def change():
    with storage.new_folder(folder) as aside:
        fill(aside, "new")

def look():
    storage.restore(folder)
    words = {(folder / name).read_text() for name in ("a", "inner/b")}
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    kind = words.pop() if len(words) == 1 and names == ["a", "inner", "inner/b"] else "half"
    fill(folder, "old")
    return kind

fill(folder, "old")
print(json.dumps(at_every_step(change, look)))
""",
        tmp_path / "folder",
    )
    assert set(seen) == {"old", "new"}
    assert seen[-1] == "new"
    with storage.new_folder(tmp_path / "folder") as aside:
        (aside / "c").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"], "what kills left is cleared"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["c"]


def test_a_folder_that_is_put_away_is_whole_or_gone(tmp_path: Path) -> None:
    seen = driven(
        """
folder = Path(sys.argv[1])

def look():
    kind = "gone" if not folder.exists() else "whole" if len(list(folder.iterdir())) == 3 else "half"
    folder.mkdir(exist_ok=True)
    for name in "abc":
        (folder / name).touch()
    return kind

look()
print(json.dumps(at_every_step(lambda: storage.put_away(folder), look)))
""",
        tmp_path / "folder",
    )
    assert set(seen) == {"whole", "gone"}


def test_two_writers_of_one_file_never_leave_a_mixture(tmp_path: Path) -> None:
    seen = driven(
        """
path = Path(sys.argv[1])
contents = [bytes([letter]) * 20000 for letter in b"abc"]
storage.write_whole(path, contents[0])
children = []
for content in contents:
    child = os.fork()
    if child == 0:
        for _ in range(60):
            storage.write_whole(path, content, synced=False)
        os._exit(0)
    children.append(child)
wrong = 0
for _ in range(300):
    wrong += path.read_bytes() not in contents
codes = [os.waitpid(child, 0)[1] for child in children]
print(json.dumps([wrong, *codes, [each.name for each in path.parent.iterdir()]]))
""",
        tmp_path / "file",
    )
    assert seen == [0, 0, 0, 0, ["file"]]


# -- order and modes ---------------------------------------------------------------------------------------------


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Syncs and renames, in order; the random part of a name left out."""
    made: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        made.append(f"sync {'aside' if name.startswith('.') else name}")
        real_sync(handle)

    def replace(source: Path, target: Path) -> None:
        made.append(f"rename to {Path(target).name}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    return made


def test_a_file_is_synced_before_it_gets_its_name_and_the_name_after(tmp_path: Path, trace: list[str]) -> None:
    storage.write_whole(tmp_path / "file", b"x")
    assert trace == ["sync aside", "rename to file", f"sync {tmp_path.name}"]
    trace.clear()
    storage.write_json(tmp_path / "file", {"a": 1})
    assert trace == ["sync aside", "rename to file", f"sync {tmp_path.name}"]
    trace.clear()
    storage.write_whole(tmp_path / "file", b"x", synced=False)
    assert trace == ["rename to file"]


def test_all_of_a_folder_is_synced_before_it_gets_its_name(tmp_path: Path, trace: list[str]) -> None:
    with storage.new_folder(tmp_path / "folder") as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "b").touch()
        (aside / "a").touch()
    assert trace[-2:] == ["rename to folder", f"sync {tmp_path.name}"]
    assert sorted(trace[:-2]) == ["sync a", "sync b", "sync folder.part", "sync inner"]
    assert trace.index("sync b") < trace.index("sync inner") < trace.index("sync folder.part")


def test_names_that_go_or_come_are_synced(tmp_path: Path, trace: list[str]) -> None:
    (tmp_path / "file").touch()
    storage.remove(tmp_path / "file")
    assert trace == [f"sync {tmp_path.name}"]
    storage.remove(tmp_path / "file")
    assert len(trace) == 1
    storage.make_private_folder(tmp_path / "a" / "b")
    assert trace[1:] == [f"sync {tmp_path.name}", "sync a"]
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_a_mode_that_is_asked_for_holds_from_the_first_byte_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        for name, mode, wanted in (
            ("key", storage.PRIVATE, 0o600),
            ("certificate", storage.PUBLIC, 0o644),
            ("figures", None, 0o666 & ~mask),
        ):
            with storage.replacing(tmp_path / name, mode) as aside:
                if mode is not None:
                    assert stat.S_IMODE(aside.stat().st_mode) == wanted, "before anything is in it"
                aside.write_bytes(b"x")
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == wanted
    finally:
        os.umask(before)


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    storage.write_whole(tmp_path / "file", b"old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("old")

    def fail(write: Callable[[Path], object]) -> None:
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path)

    def file(root: Path) -> None:
        with storage.replacing(root / "file") as aside:
            aside.write_text("new")
            raise KeyboardInterrupt

    def folder(root: Path) -> None:
        with storage.new_folder(root / "folder") as aside:
            (aside / "a").write_text("new")
            raise KeyboardInterrupt

    fail(file)
    fail(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"old"
    assert (tmp_path / "folder" / "a").read_text() == "old"


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    storage.write_json(tmp_path / "file", "old")
    for name in ("write", "fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, full)
            with pytest.raises(CheckpointError, match="file cannot be written: No space left"):
                storage.write_json(tmp_path / "file", "new")
        assert json.loads((tmp_path / "file").read_text()) == "old"
        assert len(list(tmp_path.iterdir())) == 1


def test_a_write_that_the_system_takes_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, content: real(handle, bytes(content[:7])))
    storage.write_whole(tmp_path / "file", b"0123456789" * 10)
    assert (tmp_path / "file").read_bytes() == b"0123456789" * 10


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
def test_a_digest_is_sha256_of_the_bytes(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(b"x" * size)
    assert storage.file_digest(tmp_path / "file") == hashlib.sha256(b"x" * size).hexdigest()


# -- locks -------------------------------------------------------------------------------------------------------

HOLDER = """
import subprocess, sys
from pathlib import Path
from coterie import storage
handle = storage.lock(Path(sys.argv[1]), wait=False)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], close_fds=False, stdout=sys.stderr)
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_a_lock_holds_between_processes_until_its_holder_dies_however_it_dies(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not storage.is_locked(path)
    assert not path.exists(), "looking makes nothing"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        assert storage.is_locked(path)
        with pytest.raises(BlockingIOError):
            storage.lock(path, wait=False)
        holder.kill()
        holder.wait()
        try:
            assert not storage.is_locked(path), "the program that it had started does not hold it"
        finally:
            os.kill(child, signal.SIGKILL)
        with storage.locked(path):
            assert storage.is_locked(path)
        assert not storage.is_locked(path)


def test_who_waits_for_a_lock_sees_what_its_holder_did(tmp_path: Path) -> None:
    seen = driven(
        """
count, lock = Path(sys.argv[1], "count"), Path(sys.argv[1], "lock")
count.write_text("0")
children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        for _ in range(100):
            with storage.locked(lock):
                count.write_text(str(int(count.read_text()) + 1))
        os._exit(0)
    children.append(child)
codes = [os.waitpid(child, 0)[1] for child in children]
print(json.dumps([count.read_text(), codes]))
""",
        tmp_path,
    )
    assert seen == ["300", [0, 0, 0]]


@pytest.mark.parametrize("kind", [CheckpointError, LedgerError])
def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[CoterieError]
) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    for wait in (True, False):
        with pytest.raises(kind, match="lock cannot be locked: No locks available") as caught:
            storage.lock(tmp_path / "lock", wait=wait, error=kind)
        assert caught.value.code == "no-locks"


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file of this process can grow beyond a kilobyte."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def by_bytes(path: Path) -> None:
    storage.write_whole(path, bytes(5000))


def by_tensors(path: Path) -> None:
    with storage.replacing(path) as aside:
        save_file({"w": torch.zeros(5000)}, aside)


@pytest.mark.usefixtures("small_disk")
@pytest.mark.parametrize("write", [by_bytes, by_tensors])
def test_what_a_disk_refuses_is_told_by_the_name_that_was_meant(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    path = tmp_path / "kept"
    path.write_bytes(b"before")
    with pytest.raises(OSError, match="File too large") as refused:
        write(path)
    assert (refused.value.errno, refused.value.filename) == (errno.EFBIG, str(path))
    assert [path.read_bytes(), *tmp_path.iterdir()] == [b"before", path]


def test_a_folder_that_is_not_there_is_told_by_the_name_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        storage.write_whole(tmp_path / "gone" / "file", b"content")
    assert missing.value.filename == str(tmp_path / "gone" / "file")


def test_an_error_in_the_block_that_is_not_the_disks_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as other, storage.replacing(tmp_path / "kept"):
        (tmp_path / "another").read_bytes()
    assert other.value.filename == str(tmp_path / "another")
