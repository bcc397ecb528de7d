"""What README and docs show as code is code: settings load, commands and options exist, Python runs as printed.

Python runs on a small model with few records, so lots are smaller than printed; nothing else is changed. What needs a
trained run, a download or other people's text is compiled, and its imports resolved.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import ValidationError

from coterie.cli.app import COMMANDS, _LazyCommand
from coterie.config import FederationConfig, PartyConfig, TrainConfig
from coterie.config.base import BASE_FOLDER

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if "decisions" not in path.parts),
]
NOT_RUN = {
    "docs/concepts/several-devices.md": "needs processes of a launcher: tests/ranks has them",
    "docs/how-to/audit-a-model.md": "trains and attacks a run: tests/audit/model does",
    "docs/how-to/classification.md": "its blocks go on from each other: see below",
}


def blocks(*kinds: str) -> Iterator[tuple[str, str]]:
    """(page and line, text) of the blocks of these languages."""
    for page in PAGES:
        text = page.read_text("utf-8")
        for found in re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```", text, re.M | re.S):
            if found[2] in kinds:
                line = text.count("\n", 0, found.start()) + 1
                lines = found[3].splitlines()
                yield f"{page.relative_to(ROOT)}:{line}", "\n".join(each.removeprefix(found[1]) for each in lines)


@pytest.mark.parametrize(("place", "text"), list(blocks("yaml")))
def test_settings_load(place: str, text: str) -> None:
    """A part of a file may leave out what the page does not speak of, at the top alone."""
    data = yaml.safe_load(text)
    fitting = [
        root for root in (TrainConfig, FederationConfig, PartyConfig) if data.keys() <= root.model_fields.keys()
    ]
    assert fitting, f"{place}: no settings file has all of {sorted(data)}"
    problems = []
    for root in fitting:
        try:
            root.model_validate(data, context={BASE_FOLDER: ROOT})
            return
        except ValidationError as error:
            problems.append([each for each in error.errors() if each["type"] != "missing" or len(each["loc"]) > 1])
    assert [] in problems, (place, problems)


def command_lines() -> Iterator[tuple[str, str]]:
    for place, text in blocks("", "console", "bash", "sh"):
        for line in text.splitlines():
            if found := re.match(r"(?:\w+)?\$? *(coterie [a-z]\S*.*)", line):
                shown = re.split(r"  +|  #| # ", found[1])[0]
                parts = re.split(r"(?:, |\.\.\. |^)coterie ", shown)[1:]
                yield from ((place, f"coterie {part}") for part in parts)


def test_commands_and_their_options_exist() -> None:
    group: Any = typer.main.get_command(importlib.import_module("coterie.cli.app").app)
    options: dict[str, set[str]] = {}
    seen = 0
    for place, line in command_lines():
        name, *words = line.split()[1:]
        assert name in COMMANDS, f"{place}: {line}"
        if name not in options:
            command = group.commands[name]
            assert isinstance(command, _LazyCommand)
            options[name] = {word for parameter in command.load().params for word in parameter.opts}
        unknown = {word.split("=")[0] for word in words if word.startswith("--")} - options[name]
        assert not unknown, f"{place}: {line}"
        seen += 1
    assert seen > 40


@pytest.mark.parametrize(("place", "text"), list(blocks("python")))
def test_python_compiles_and_its_imports_are_there(place: str, text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("coterie"):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}"), place


def runnable() -> list[tuple[str, str]]:
    return [(place, text) for place, text in blocks("python") if place.split(":")[0] not in NOT_RUN]


def test_every_page_that_is_not_run_has_python() -> None:
    assert NOT_RUN.keys() <= {place.split(":")[0] for place, _ in blocks("python")}


@pytest.mark.slow
@pytest.mark.parametrize(("place", "text"), runnable())
def test_python_runs_as_printed(
    place: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import TrainingArguments

    from coterie.dp.losses import default_loss
    from coterie.models.seam import LocalExperts
    from coterie.models.zoo.tiny import tiny_model

    monkeypatch.setenv("COTERIE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model = tiny_model("olmoe")
    ids = torch.randint(3, 90, (16, 6), generator=torch.Generator().manual_seed(0))
    dataset = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]

    def collate_fn(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    known = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), 1e-3),
        "dataset": dataset,
        "public_dataset": dataset,
        "collate_fn": collate_fn,
        "batch": collate_fn(dataset[:4]),
        "loss_fn": default_loss,
        "implementation": LocalExperts(),
        "args": TrainingArguments(
            str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            max_grad_norm=0,
            logging_steps=1,
        ),
    }
    smaller = re.sub(r"(lot_size\W{1,3} ?)\d+", r"\g<1>4", text).replace("epochs=3", "epochs=1")
    exec(compile(smaller, place, "exec"), known)


@pytest.mark.slow
def test_the_classification_page_trains_measures_and_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from coterie.models.zoo.bert_moe import BertMoeConfig, BertMoeForSequenceClassification
    from coterie.training.data.tokenizer import train_tokenizer

    monkeypatch.setenv("COTERIE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    rows = [(f"it was {'good' if n % 3 else 'bad'}, said number {n}", int(n % 3 > 0)) for n in range(24)]
    start = Path("checkpoints/bert-moe")
    tokenizer = train_tokenizer([text for text, _ in rows], 280)
    tokenizer.save_pretrained(str(start))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertMoeConfig(**sizes, vocab_size=len(tokenizer), num_experts=2, pad_token_id=tokenizer.pad_token_id)
    BertMoeForSequenceClassification(config).save_pretrained(start)
    known = {"my_rows": rows[:18], "held_out_rows": rows[18:]}
    for place, text in blocks("python"):
        if place.startswith("docs/how-to/classification.md"):
            exec(
                compile(text.replace("lot_size=2048", "lot_size=9").replace("epochs=3", "epochs=1"), place, "exec"),
                known,
            )
    last = capsys.readouterr().out.splitlines()[-2:]
    assert re.fullmatch(r"\d+\.\d% of 6 right; always the same class: 66\.7%", last[0])
    assert last[1] in ("[0]", "[1]")
