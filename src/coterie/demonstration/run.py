"""The demo from the first line to the last process: text, public checkpoint, baselines, federation.

This process computes nothing until all others have ended: it writes settings, starts commands, reads their figures.
It does not import torch before, because a process hands its own peak size on to those it starts.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

from coterie.demonstration.corpus import PUBLIC, Corpus, build
from coterie.demonstration.folder import Folder
from coterie.demonstration.plan import ARMS, Arm, DemoPlan
from coterie.demonstration.processes import Processes, Running
from coterie.demonstration.screen import Follow, Screen, megabytes
from coterie.federation.identity.provision import free_endpoints

PHASES = 6


@dataclass(frozen=True)
class Finished:
    """What the processes cost together.

    Attributes:
        plan: with what was found on the way.
        seconds: from the first to the last.
        cpu_s: processor seconds of all of them.
    """

    plan: DemoPlan
    corpus: Corpus
    seconds: float
    cpu_s: float


def run(plan: DemoPlan, root: Path, screen: Screen) -> Finished:
    """Do everything but audit and comparison, inside ``root``.

    Raises:
        DataError: this Python carries no documentation.
        CoterieError: a command failed; all others are ended.
    """
    began = time.monotonic()
    processes = Processes(root)
    with processes:
        screen.phase(1, PHASES, "text")
        corpus = build(plan.parties, plan.size)
        corpus.write(root / "data")
        _tell_text(corpus, screen)
        screen.phase(2, PHASES, "public")
        _public(plan, Folder(root, plan), processes, screen)
        screen.phase(3, PHASES, "alone and pooled")
        plan = _counted(plan, Folder(root, plan), processes, screen)
        _baselines(plan, Folder(root, plan), processes, screen)
        screen.phase(4, PHASES, "together")
        federations = plan.of_kind("federation")
        for arm in federations:
            if arm.shared_noise:
                plan = _common_noise(arm, plan, Folder(root, plan), processes, screen)
            _federation(arm, plan, Folder(root, plan), processes, screen, first=arm is federations[0])
    return Finished(plan, corpus, time.monotonic() - began, processes.cpu_s)


def _tell_text(corpus: Corpus, screen: Screen) -> None:
    screen.line("documentation inside this Python installation; little per party, so that pooling can matter")
    for name, part in {PUBLIC: corpus.public, **corpus.parties}.items():
        counts = [f"{sum(len(d.text) for d in some) / 1000:.0f} kB {side}" for side, some in part.sides()]
        subject = "the language reference and other modules" if name == PUBLIC else part.subject
        screen.line(f"{name:<8} {subject}: {', '.join(counts)}")


def _public(plan: DemoPlan, folder: Folder, processes: Processes, screen: Screen) -> None:
    follow = Follow((folder.root / PUBLIC / "run",), plan.public_rounds)
    processes.run_all([folder.public()], 1, lambda: screen.progress(f"training it: {follow.text()}"))
    result = _result(folder.root / PUBLIC / "run")
    model = plan.model
    screen.line(
        f"{plan.family}, {model['num_hidden_layers']} layers of {model['num_experts']} experts, "
        f"{model['num_experts_per_tok']} per token; held-out loss on public text {result['loss']:.2f}"
    )


def _counted(plan: DemoPlan, folder: Folder, processes: Processes, screen: Screen) -> DemoPlan:
    """The plan with every party's number of records, where an arm is private; lots follow from it."""
    if not any(ARMS[arm].private for arm in plan.arms):
        return plan
    commands = [folder.count(party) for party in plan.parties]
    processes.run_all(commands, plan.at_once, lambda: screen.progress("counting records"))
    counted = replace(plan, units={party: folder.counted(party) for party in plan.parties})
    lots = ", ".join(f"{counted.lot_of(party)} of {party}'s {count:,}" for party, count in counted.units.items())
    screen.line(f"private lots draw every record equally often: {lots}")
    return counted


def _common_noise(arm: Arm, plan: DemoPlan, folder: Folder, processes: Processes, screen: Screen) -> DemoPlan:
    """The plan with the noise that every party's budget allows, which all of them sign."""
    folder.federation(arm, free_endpoints(len(plan.parties) + 1))
    processes.run_all([folder.noise(arm)], 1, lambda: screen.progress(f"{arm.title}: the noise that all agree on"))
    return replace(plan, noise_multiplier=folder.noise_multiplier(arm))


def _baselines(plan: DemoPlan, folder: Folder, processes: Processes, screen: Screen) -> None:
    """First without privacy, then with. Longest first: the pooled run takes as long as all parties alone together."""
    for private in (False, True):
        arms = [arm for arm in plan.of_kind("pooled", "alone") if arm.private == private]
        if not arms:
            continue
        commands = [folder.pooled(arm) for arm in arms if arm.kind == "pooled"]
        commands += [folder.alone(arm, party) for arm in arms if arm.kind == "alone" for party in plan.parties]
        run_dirs = dict.fromkeys(folder.run_dir(arm, party) for arm in arms for party in plan.parties)
        rounds = plan.rounds_of(arms[0])
        follow = Follow(tuple(run_dirs), rounds)
        what = f"{len(commands)} {'private ' if private else ''}runs"
        processes.run_all(commands, plan.at_once, lambda f=follow, w=what: screen.progress(f"{w}: {f.text()}"))  # type: ignore[misc]
        budget = f", each within epsilon {plan.private.epsilon:g}" if private else ""
        screen.line(f"{', '.join(c.name for c in commands)}: {rounds} rounds each{budget}")
        losses = [f"{where.parent.name} {_result(where)['loss']:.2f}" for where in run_dirs]
        screen.line(f"held-out loss: {', '.join(losses)}")


def _federation(
    arm: Arm, plan: DemoPlan, folder: Folder, processes: Processes, screen: Screen, *, first: bool
) -> None:
    config = folder.federation(arm, free_endpoints(len(plan.parties) + 1))
    # In this order: the roster holds the digests of the split.
    ready = [*([folder.split(arm)] if first else []), folder.provision(arm)]
    processes.run_all(ready, 1, lambda: screen.progress(f"{arm.title}: splitting the model, making keys"))
    names = ", ".join(plan.parties)
    screen.line(f"{len(plan.parties) + 1} keys made here; roster signed by all; {names}: TLS both ways")
    commands = [folder.coordinator(arm), *(folder.up(arm, party) for party in plan.parties)]
    follow = Follow(tuple(folder.run_dir(arm, party) for party in plan.parties), config.train.rounds)

    def watch() -> None:
        sent = sum(_sent(folder.run_dir(arm, party)) for party in plan.parties)
        screen.progress(f"{arm.title}: {follow.text(f'sent {megabytes(sent)}' if sent else '')}")

    ended = processes.run_all(commands, len(commands), watch)
    budget = f", each party within epsilon {plan.private.epsilon:g}" if arm.private else ""
    screen.line(f"{arm.title}: {config.train.rounds} rounds{budget} in {_span(ended):.0f} s of processor time")


def _span(ended: list[Running]) -> float:
    return sum(running.usage.cpu_s for running in ended)


def _result(run_dir: Path) -> dict[str, float]:
    figures: dict[str, float] = json.loads((run_dir / "private" / "result.json").read_text("utf-8"))
    return figures


def _sent(run_dir: Path) -> int:
    """Bytes a party has sent so far, from the status file it leaves for others to read."""
    try:
        wire = json.loads((run_dir / "status.json").read_text("utf-8"))["wire"]
        return sum(int(peer["sent"]) for peer in wire.values())
    except (OSError, ValueError, KeyError):
        return 0  # not written yet
