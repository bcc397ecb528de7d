"""`devices` and `experts_over` in a settings file: the command starts itself once for each rank, on this machine.

What torchrun would start is the same; but the place where these ranks meet, and what they send each other, is on
loopback only, and they end when the command does. Rank 0 has the terminal; what another rank has to say is shown
where rank 0 says nothing.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer

from coterie.cli.stopping import handling
from coterie.demonstration.processes import LIFELINE
from coterie.errors import ConfigError
from coterie.ranks.world import check_alone, check_enough_gpus, gpus_here

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from coterie.config import PartyConfig, TrainConfig
    from coterie.ranks.ranks import Ranks

_OWN = "COTERIE_OWN_RANKS"
"""Environment variable of the processes that a command started as its ranks."""
_GRACE_S = 30.0
"""How long ranks may take to end after one has failed: they hear of it, and say the same."""
_POLL_S = 0.05


def started_ranks() -> int:
    """How many processes a launcher started; 1 where none did."""
    count = os.environ.get("WORLD_SIZE", "").strip() or "1"
    return int(count) if count.isdecimal() else 1


def has_terminal() -> bool:
    """Whether this process speaks for all that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def started_again(config: TrainConfig) -> bool:
    """Whether torchrun started the processes of a run once more, after a rank had failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and (config.run_dir / "run.json").exists()


def joined(config: TrainConfig) -> AbstractContextManager[Ranks | None]:
    """The ranks that share a private run; None where it is this process's alone.

    Raises:
        ConfigError: a launcher started another number of them than the settings say.
    """
    count = started_ranks()
    if config.privacy is None or count == 1:
        return nullcontext()
    fixed = config.devices != "auto" and config.devices > 1
    fits = count == config.devices if fixed else count % config.spread_over == 0
    if not fits:
        name = "devices" if fixed else config.spread_by
        raise ConfigError(
            f"`{name}` is {getattr(config, name)}, and {count} processes were started.",
            code="ranks-count",
            fix=f"start as many as `{name}` says" + ("" if name == "devices" else ", or a multiple of that"),
        )
    from coterie.ranks.processes import join_ranks

    return join_ranks()


def start_if_asked(config: TrainConfig, command: str, target: Path, json_file: Path | None) -> None:
    """Start a command once for each rank that the settings ask for, and end as they do; else come back.

    Args:
        config: the settings.
        command: `train` or `resume`.
        target: its argument.
        json_file: its option.

    Raises:
        PrivacyError: another launcher than torchrun started this process beside others.
    """
    if config.ranks > 1 and started_ranks() == 1:
        check_alone()  # each would start ranks of its own
        raise typer.Exit(_run(config.ranks, [command, str(target), *option("--json", json_file)]))


def option(name: str, value: object) -> list[str]:
    """An option as words of a command; none where it was not given."""
    return [] if value is None else [name, str(value)]


def start_party_if_asked(config: PartyConfig, arguments: Sequence[str]) -> None:
    """Start a command once for each rank of a party, and end as they do; come back where the party is one process.

    Args:
        config: the party's settings.
        arguments: the command with its options.

    Raises:
        PrivacyError: a launcher started this process beside others.
        ConfigError: the ranks could not share the work.
    """
    if _OWN in os.environ:
        return
    check_alone()
    if config.ranks == 1:
        return
    from coterie.config import FederationConfig, load_yaml
    from coterie.config.federation import check_devices

    check_devices(config, load_yaml(config.federation, FederationConfig))
    if config.device != "cpu" and gpus_here():
        check_enough_gpus(config.ranks)
    if config.ranks > _cores():
        raise ConfigError(
            f"`{config.ranks_by}` is {config.ranks}, and this machine has {_cores()} cores.",
            code="ranks-cores",
            where=f"party.yaml of {config.party}",
            why="ranks that take turns on a core need more memory and gain nothing",
            fix="ask for at most as many as there are cores",
        )
    raise typer.Exit(_run(config.ranks, arguments))


def joined_party() -> AbstractContextManager[Ranks | None]:
    """The ranks of a party, where this process was started as one; None where it is the party by itself."""
    if os.environ.pop(_OWN, None) is None:
        return nullcontext()
    from coterie.ranks.processes import join_ranks

    return join_ranks()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(count: int, arguments: Sequence[str]) -> int:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from coterie.ranks.processes import on_loopback

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60),
        master_listen_fd=listener.detach(),
    )  # fmt: skip
    lifeline, held = os.pipe()
    shared = on_loopback() | {  # whatever the user's own variables say: they are of another run
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, _cores() // count))), _OWN: "1",
    }  # fmt: skip
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def stand_still(number: int, frame: FrameType | None) -> None:
        """Ranks stop, too: they would give up a store that does not answer."""
        pass_on(signal.SIGSTOP, frame)
        os.kill(os.getpid(), signal.SIGSTOP)  # until a SIGCONT
        pass_on(signal.SIGCONT, frame)

    handlers: dict[int, Callable[[int, FrameType | None], None]]
    handlers = dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), pass_on)
    handlers[signal.SIGTSTP] = stand_still
    early: list[int] = []
    with tempfile.TemporaryDirectory() as logs, handling(handlers):
        try:
            # a rank runs before it is one of `ranks`: what came then would miss it
            with handling(dict.fromkeys(handlers, lambda number, frame: early.append(number))):
                for number in range(count):
                    variables = {"RANK": str(number), "LOCAL_RANK": str(number), LIFELINE: str(lifeline)}
                    with Path(logs, str(number)).open("wb") as log:
                        ranks.append(
                            subprocess.Popen(
                                [sys.executable, "-P", "-m", "coterie", *arguments],
                                env={**os.environ, **shared, **variables},
                                pass_fds=(lifeline,),
                                stdin=subprocess.DEVNULL,
                                stdout=None if number == 0 else log,
                                stderr=None if number == 0 else log,
                                start_new_session=True,  # a Ctrl-C comes once, from here
                            )
                        )
            for number in early:
                signal.raise_signal(number)
            code = _ended(ranks)
            if code and (ranks[0].poll() or 0) <= 0:  # rank 0 was killed, or does not end: nobody has said why
                failed = next(number for number, rank in enumerate(ranks) if rank.returncode)
                typer.echo(f"rank {failed} ended with {ranks[failed].returncode}", err=True)
                for number in range(1, count):
                    words = Path(logs, str(number)).read_text(encoding="utf-8", errors="replace")
                    typer.echo(words, err=True, nl=False)
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                    rank.wait()
            os.close(held)
            os.close(lifeline)
            del store
    return code


def _ended(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code of all: rank 0's where it failed, else the first that is not 0."""
    until: float | None = None
    while None in (codes := [rank.poll() for rank in ranks]):  # all are asked: a rank may end while rank 0 computes
        time.sleep(_POLL_S)
        if until is None and any(codes):
            until = time.monotonic() + _GRACE_S
        if until is not None and time.monotonic() > until:
            return 1
    code = next((code for code in codes if code), 0)
    return 128 - code if code < 0 else code
