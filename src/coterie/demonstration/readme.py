"""README.txt of the run folder: every command of the demo, to be typed again by hand."""

from __future__ import annotations

from pathlib import Path

from coterie.demonstration.folder import Folder
from coterie.demonstration.plan import DemoPlan

_NOISE = "The noise that all parties add alike under shared noise, before federation.yaml names it:"


def save_readme(plan: DemoPlan, folder: Folder, path: Path) -> None:
    """Write what is where and which commands made it."""
    path.write_text(_text(plan, folder), encoding="utf-8")


def _text(plan: DemoPlan, folder: Folder) -> str:
    lines = [
        "What `coterie demo` left here. Every part was made by an ordinary command; all commands are to be run in",
        "this folder. A run folder that is full is not written to again: remove `run/` (or name another run_dir in",
        "the settings file) before you repeat a run.",
        "",
        "  report.html        the verdict, the tables and the picture; results.json has the figures",
        "  audit.html         attacks on what other parties received of the first one, and what they read",
        "  data/              the text: documentation of this Python installation, one subject per party",
        "  public/run/model   the public checkpoint, an ordinary Hugging Face folder with its tokenizer",
        "  */run/private/     metrics.jsonl, tensorboard/, checkpoints/, evaluation.safetensors, result.json",
        "  */run/private/transcript, transcript-answers",
        "                     of federations: what the party received in recorded rounds, the key to what it sent",
        "  */run/public/      where a budget made them: model or statement, to be given away",
        "  logs/              what each process printed",
        "",
    ]
    lines += ["The public checkpoint:", "", *_commands(folder.public().shown)]
    if plan.units:
        lines += ["How many records each party has for private training, from which lots follow:", ""]
        lines += _commands(*(folder.count(party).shown for party in plan.parties))
    for arm in plan.of_kind("alone"):
        lines += ["Each party alone:", "", *_commands(*(folder.alone(arm, party).shown for party in plan.parties))]
    for arm in plan.of_kind("pooled"):
        lines += ["All text in one place:", "", *_commands(folder.pooled(arm).shown)]
    for arm in plan.of_kind("federation"):
        where = arm.name
        first = plan.parties[0]
        lines += [
            *([_NOISE, "", *_commands(folder.noise(arm).shown)] if arm.shared_noise else []),
            f"Together ({where}): model split (once), keys made, then one process each, in as many terminals:",
            "",
            *_commands(folder.split(arm).shown, folder.provision(arm).shown, folder.coordinator(arm).shown),
            *_commands(*(folder.up(arm, party).shown for party in plan.parties)),
            f"To repeat it, remove {where}/coordinator and {where}/*/run, then start the coordinator and all parties",
            "again; weights and kits stay. Ctrl-C in any of them ends the run for all after the round, with a",
            "checkpoint; started again, they go on from there. While they run, this tells how far they are:",
            "",
            *_commands(f"coterie status {where}/{first}/party.yaml"),
            f"The ports in {where}/federation.yaml were free when the demo ran. If one is taken now, change it",
            f"there, remove {where}/kits and provision again: the settings are part of what the parties signed.",
            "",
        ]
    return "\n".join(lines)


def _commands(*shown: str) -> list[str]:
    return [*(f"  {line}" for line in shown), ""]
