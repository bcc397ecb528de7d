"""`coterie generate` on an export, by a chat template, and through a federation that was not taken up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from coterie.cli import live
from coterie.config import FederationConfig, PartyConfig
from coterie.errors import RoundError
from coterie.models.zoo.tiny import tiny_model
from coterie.training.data.chat import answer_end
from coterie.training.data.tokenizer import train_tokenizer
from coterie.training.single.generate import generate
from helpers.federation_commands import run
from helpers.federations import settings

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    tiny_model("olmoe", vocab_size=300, max_position_embeddings=128).save_pretrained(folder)
    train_tokenizer(["the river and the stone [user] [assistant]"] * 20, 300).save_pretrained(str(folder))
    return folder


ASKED = ("--prompt", "the river", "--tokens", "6", "--temperature", "0")


def test_an_export_goes_on_with_a_prompt(export: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("generate", export, *ASKED) == 0
    first = capfd.readouterr().out
    assert first.startswith("the river")
    assert len(first.strip()) > len("the river")


def test_chat_writes_the_prompt_by_the_template(
    export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", export, *ASKED, "--chat") == 1
    shown = capfd.readouterr().err
    assert "Error data-no-template" in shown
    assert "--template" in shown
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    assert run("generate", export, *ASKED, "--chat", "--template", tmp_path / "chat.jinja") == 0
    answered = capfd.readouterr().out.removesuffix("\n")
    assert run("generate", export, "--prompt", "[user] the river\n[assistant]", *ASKED[2:]) == 0
    assert capfd.readouterr().out.removesuffix("\n") == "[user] the river\n[assistant]" + answered


def test_an_empty_template_is_no_template(export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "chat.jinja").write_text("\n")
    assert run("generate", export, *ASKED, "--chat", "--template", tmp_path / "chat.jinja") == 1
    assert "chat.jinja is empty" in " ".join(capfd.readouterr().err.split())


class Says(torch.nn.Module):
    """Answers with certain tokens, whatever is asked."""

    def __init__(self, ids: list[int], ends: int | list[int] | None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.generation_config = GenerationConfig(eos_token_id=ends)
        self._ids = ids

    def generate(self, asked: torch.Tensor, *, generation_config: GenerationConfig, streamer: Any, **_: Any) -> None:
        streamer.put(asked)
        ends = generation_config.eos_token_id
        for number in self._ids[: generation_config.max_new_tokens]:
            streamer.put(torch.tensor([number]))
            if number in (ends or ()):
                break
        streamer.end()


def test_an_answer_ends_where_the_template_or_the_model_ends_one() -> None:
    """The text's own end is another token, as with base models that learn to chat, and with those of several ends."""
    tokenizer = train_tokenizer(["the river and the stone"] * 20, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|call|>"]})
    turn, call, a, b = tokenizer.convert_tokens_to_ids(["<|turn|>", "<|call|>", "a", "b"])
    template = TEMPLATE.replace("\n", " <|turn|>\n")
    assert answer_end(tokenizer, template) == turn
    assert answer_end(tokenizer, TEMPLATE) is None

    def said(ids: list[int], ends: int | list[int] | None, by_template: tuple[int, ...] = ()) -> str:
        model: Any = Says(ids, ends)
        return generate(model, tokenizer, "the", tokens=9, temperature=0, ends=by_template)

    assert said([a, turn, b], None, (turn,)) == "a"
    assert said([a, call, b], [tokenizer.eos_token_id, call]) == "a"
    assert said([a, tokenizer.eos_token_id, b], None) == "a"
    assert said([a, b], b) == "ab", "an ordinary token: the settings are of another tokenizer"


def test_a_folder_that_is_no_run_and_no_export_is_said_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("generate", tmp_path, *ASKED) == 1
    assert "Error run-dir-none" in capfd.readouterr().err


@pytest.mark.parametrize("asked", [("generate", "--prompt", "a"), ("eval",), ("export",)])
def test_an_absent_folder_is_said_to_be_absent_and_what_would_do(
    asked: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name, *options = asked
    assert run(name, tmp_path / "nowhere", *options, *(["--out", tmp_path / "out"] if name == "export" else [])) == 1
    told = " ".join(capfd.readouterr().err.split())
    assert "There is no folder" in told
    assert "that `coterie export` wrote" in told or name == "export"


def test_a_federation_that_ends_without_being_asked_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator was started without --questions: the run is finished, and everybody is sent home."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "result.json").write_text(json.dumps({"rounds": 4}))
    paths = dict.fromkeys(("federation", "kit", "trunk", "shard"), str(tmp_path / "none"))
    config = PartyConfig.model_validate(
        {"party": "alder", "data": {"train": "text.txt"}, "run_dir": tmp_path, "devices": 4, **paths}
    )

    class Process:
        federation: FederationConfig = settings()

        def __init__(self, given: PartyConfig, *_: object, **__: object) -> None:
            assert given.devices == 1

        def stop(self) -> bool:
            return False

        def run(self) -> None:
            """Ends without an evaluation."""

    monkeypatch.setattr("coterie.training.party.process.settings_of_run", lambda run_dir: config)
    monkeypatch.setattr("coterie.training.party.process.PartyProcess", Process)
    with pytest.raises(RoundError, match="before anything could be asked") as caught:
        live.through_federation(tmp_path, ("a prompt",), lambda model: None, None)
    assert caught.value.code == "questions-not-taken"
