"""What the benchmarks of exchanges share: party processes that are told what to do, over real mutual TLS on loopback.

A benchmark writes what all processes agree on (a dataclass, `Workload`) to ``work.json`` and starts `Parties`; the
script of a party calls `serve`. Commands and answers are lines; ``figures`` is answered by a line of JSON.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from coterie.federation.identity.certificates import members_of
from coterie.federation.identity.kit import load_kit
from coterie.federation.identity.provision import free_endpoints, provision
from coterie.federation.identity.roster import load_roster
from coterie.federation.wire.grpc_transport import GrpcTransport
from coterie.models.seam import expert_layers
from coterie.models.split.placement import Placement
from coterie.models.split.shards import expert_key
from delay_proxy import DelayProxy

WORK = "work.json"


@dataclass(frozen=True)
class Workload:
    """What every process of a benchmark agrees on.

    Attributes:
        config: settings of the random model.
        parties: in the order of the roster.
    """

    config: dict[str, Any]
    parties: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path) -> Self:
        found = json.loads((folder / WORK).read_text("utf-8"))
        return cls(**{**found, "parties": tuple(found["parties"])})


class Parties:
    """Processes of one script, one a party, that do what they are told.

    Args:
        script: run as ``python SCRIPT NAME FOLDER ADDRESS``; see `serve`.
        folder: made here; holds `WORK` and ``kits/``.
        proxy: everything on the way to a party passes it, if there is one.
        environment: of the processes, beside this one's.
    """

    def __init__(
        self, script: str, workload: Workload, folder: Path, proxy: DelayProxy | None, environment: Mapping[str, str]
    ) -> None:
        folder.mkdir(parents=True)
        (folder / WORK).write_text(json.dumps(asdict(workload)), encoding="utf-8")
        free = free_endpoints(2 * len(workload.parties))
        seen = dict(zip(workload.parties, free, strict=False))
        listen = dict(seen)
        if proxy is not None:
            for name, behind in zip(workload.parties, free[len(workload.parties) :], strict=True):
                listen[name] = behind
                proxy.forward(_port(seen[name]), _port(behind))
        provision("bench", members_of(seen, None), folder / "kits", config_hash="", placement_hash="")
        path = str(Path(__file__).with_name(script))
        self.names = workload.parties
        self._rounds = 0
        self._children = {
            name: subprocess.Popen(
                [sys.executable, path, name, str(folder), listen[name]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **environment},
            )
            for name in workload.parties
        }
        for child in self._children.values():
            self._answer(child)

    def next_round(self) -> int:
        """The number of a round that is to begin."""
        self._rounds += 1
        return self._rounds

    def tell(self, line: str, names: Sequence[str] | None = None) -> list[str]:
        """The answers of all parties, or of some, to a command that they carry out at the same time."""
        told = [self._children[name] for name in (self.names if names is None else names)]
        for child in told:
            assert child.stdin is not None
            child.stdin.write(line + "\n")
            child.stdin.flush()
        return [self._answer(child) for child in told]

    def figures(self, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """What parties have counted."""
        return [json.loads(answer) for answer in self.tell("figures", names)]

    def close(self) -> None:
        for child in self._children.values():
            assert child.stdin is not None
            child.stdin.close()
        for child in self._children.values():
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()

    def _answer(self, child: subprocess.Popen[str]) -> str:
        assert child.stdout is not None
        answer = child.stdout.readline()
        if not answer:
            self.close()
            raise SystemExit("a party ended with an error; it is printed above")
        return answer


def _port(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


@contextmanager
def parties(
    script: str,
    workload: Workload,
    folder: Path,
    *,
    delay_s: float = 0.0,
    bytes_per_s: float | None = None,
    **environment: str,
) -> Iterator[tuple[Parties, DelayProxy | None]]:
    """Started `Parties`, ended afterwards, and the slow link before them; without a delay there is none."""
    with ExitStack() as stack:
        proxy = stack.enter_context(DelayProxy(delay_s, bytes_per_s)) if delay_s else None
        running = Parties(script, workload, folder, proxy, environment)
        stack.callback(running.close)
        yield running, proxy


class Serving(Protocol):
    """A party of a benchmark, as its process sees it."""

    def figures(self) -> dict[str, Any]:
        """What it has counted."""

    def close(self) -> None: ...


def serve(begin: Callable[[str, Path, str], Serving], words: Collection[str]) -> None:
    """The main function of a party's script: do what standard input says until it ends.

    Args:
        begin: the party from its name, the benchmark's folder and the address to listen on.
        words: the party's methods that may be asked for; the numbers behind a word are their arguments.
    """
    torch.set_num_threads(1)
    party = begin(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    print("ready", flush=True)
    for line in sys.stdin:
        word, *numbers = line.split()
        if word == "figures":
            print(json.dumps(party.figures()), flush=True)
            continue
        assert word in words
        getattr(party, word)(*map(int, numbers))
        print("done", flush=True)
    party.close()


def transport_of(name: str, folder: Path, listen: str) -> GrpcTransport:
    """A party's transport by the kit that was made for it; not started."""
    kit = load_kit(folder / "kits" / name)
    return GrpcTransport(name, load_roster(kit), kit, listen=listen)


def take_out_experts(model: nn.Module, placement: Placement, party: str) -> dict[str, Tensor]:
    """The party's own experts by global key; the model keeps none."""
    hosted = placement.hosted(party)
    found = {}
    for layer in expert_layers(model):
        for name, stacked in layer.parameters().items():
            for expert in hosted.get(layer.index, ()):
                found[expert_key(layer.index, expert, name)] = stacked.detach()[expert].clone()
            setattr(layer.module, name, nn.Parameter(stacked.to("meta"), requires_grad=False))
    return found


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }


def _lines(path: str) -> Sequence[str]:
    try:
        return Path(path).read_text("utf-8").splitlines()
    except OSError:
        return ()


def write_figures(path: Path | None, found: dict[str, Any]) -> None:
    """Write a benchmark's figures where `--json` says."""
    if path is not None:
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
