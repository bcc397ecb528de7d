"""A private classifier's own head against label words, on one small public language model.

The model is a llama of llama2.c's binary layout (stories260K: 260,000 parameters, trained on children's stories),
turned into a Mixture of Experts with ``--experts``. Both arms train its last layers on the same texts, with the same
lots, budget, rounds and rate; they differ in what is asked: a new head over the last token, or one word for each
class after a prompt. Rows are ``text<TAB>class``. The model's 512 tokens hold few words: those of the classes mean
nothing.

    python benchmarks/label_words.py --model FOLDER --train train.tsv --test test.tsv --seeds 0 1 --json words.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from coterie import dp
from coterie.dp.label_words import LabelWords
from coterie.models.zoo.upcycle import upcycle

RECORDS, HELD_OUT, LOT, ROUNDS, LENGTH, BATCH = 3000, 600, 256, 12, 32, 64
WORDS, PROMPT = (" big", " happy", " day", " they"), " it was"


class Pieces:
    """The tokenizer of llama2.c: the pair of the best score is joined until none is left."""

    def __init__(self, path: Path) -> None:
        self.score: dict[str, float] = {}
        self.id: dict[str, int] = {}
        with path.open("rb") as file:
            file.read(4)
            while head := file.read(8):
                score, size = struct.unpack("fi", head)
                piece = file.read(size).decode("utf-8", "replace")
                self.id.setdefault(piece, len(self.score))
                self.score.setdefault(piece, score)

    def ids(self, text: str) -> list[int]:
        """Tokens of a text; letters that are no piece are left out."""
        pieces = [letter for letter in f" {text.strip()}" if letter in self.id]
        while len(pieces) > 1:
            scores = [self.score.get(a + b, -1e9) for a, b in itertools.pairwise(pieces)]
            best = int(np.argmax(scores))
            if scores[best] <= -1e9:
                break
            pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
        return [self.id[piece] for piece in pieces]


def language_model(folder: Path, experts: int) -> LlamaForCausalLM:
    """The model of a folder."""
    blob = (folder / "stories260K.bin").read_bytes()
    width, inner, layers, heads, groups, vocabulary, places = struct.unpack("7i", blob[:28])
    numbers = torch.from_numpy(np.frombuffer(blob, np.float32, offset=28).copy())
    config = LlamaConfig(
        vocab_size=abs(vocabulary), hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=places, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    at = 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return numbers[at - size : at].view(shape)

    def turned(stack: Tensor, count: int) -> Tensor:  # pairs side by side become halves
        return stack.view(layers, count, -1, 2, width).transpose(2, 3).reshape(layers, -1, width)

    size = width // heads * groups
    state = {"model.embed_tokens.weight": take(abs(vocabulary), width)}
    parts = {
        "input_layernorm": take(layers, width), "self_attn.q_proj": turned(take(layers, width, width), heads),
        "self_attn.k_proj": turned(take(layers, size, width), groups), "self_attn.v_proj": take(layers, size, width),
        "self_attn.o_proj": take(layers, width, width), "post_attention_layernorm": take(layers, width),
        "mlp.gate_proj": take(layers, inner, width), "mlp.down_proj": take(layers, width, inner),
        "mlp.up_proj": take(layers, inner, width),
    }  # fmt: skip
    for name, stack in parts.items():
        state |= {f"model.layers.{layer}.{name}.weight": stack[layer] for layer in range(layers)}
    state["model.norm.weight"] = take(width)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return upcycle(model, experts, 2) if experts else model  # type: ignore[return-value]


def rows(path: Path, count: int, pieces: Pieces, words: tuple[int, ...] | None) -> list[dict[str, Any]]:
    """Records: with a class number, or with a prompt and the class's word behind the text."""
    made = []
    lines = path.read_text("utf-8").splitlines()
    classes = {name: number for number, name in enumerate(sorted({line.rsplit("\t", 1)[1] for line in lines}))}
    for line in lines[:count]:
        text, name = line.rsplit("\t", 1)
        label = classes[name]
        ids = [1, *pieces.ids(text)]
        if words is None:
            ids, labels = ids[:LENGTH], label
        else:
            prompt = pieces.ids(PROMPT)
            ids = [*ids[: LENGTH - 1 - len(prompt)], *prompt, words[label]]
            labels = [*[-100] * (len(ids) - 1), ids[-1]]
        made.append({"input_ids": ids, "labels": labels})
    return made


def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded on the right."""
    longest = max(len(item["input_ids"]) for item in items)

    def padded(name: str, filler: int) -> Tensor:
        return torch.tensor([[*item[name], *[filler] * (longest - len(item[name]))] for item in items])

    ids = padded("input_ids", 0)
    mask = torch.tensor([[1] * len(i["input_ids"]) + [0] * (longest - len(i["input_ids"])) for i in items])
    labels = (
        padded("labels", -100) if isinstance(items[0]["labels"], list) else torch.tensor([i["labels"] for i in items])
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def right(model: nn.Module, test: list[dict[str, Any]], words: LabelWords | None) -> float:
    """Share of texts whose class is found."""
    model.eval()
    found = 0
    with torch.no_grad():
        for at in range(0, len(test), BATCH):
            batch = collate(test[at : at + BATCH])
            if words is None:
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                found += int((logits.argmax(1) == batch["labels"]).sum())
            else:
                found += int((words.scores(model, batch).argmax(1) == words.classes(batch)).sum())
    return found / len(test)


def run(arm: str, seed: int, rate: float, chosen: argparse.Namespace) -> dict[str, Any]:
    """One private training."""
    pieces = Pieces(chosen.model / "tok512.bin")
    classes = len({line.rsplit("\t", 1)[1] for line in chosen.test.read_text("utf-8").splitlines()})
    ids = tuple(pieces.id[word] for word in WORDS[:classes])
    torch.manual_seed(seed)
    model: Any = language_model(chosen.model, chosen.experts)
    if arm == "head":
        config = LlamaConfig(**{**model.config.to_dict(), "num_labels": classes, "pad_token_id": 0})
        head = LlamaForSequenceClassification(config)
        head.model.load_state_dict(model.model.state_dict())
        model = head
    model.requires_grad_(False)
    for part in (*model.model.layers[-chosen.layers :], model.model.norm, *([model.score] if arm == "head" else [])):
        part.requires_grad_(True)
    words = LabelWords(ids) if arm == "words" else None
    train = rows(chosen.train, RECORDS, pieces, ids if words else None)
    test = rows(chosen.test, HELD_OUT, pieces, ids if words else None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as ledger, dp.make_private(
        model, optimizer, train, collate, words.loss if words else None, dp.Budget(8.0, 1e-5), lot_size=LOT,
        rounds=ROUNDS, physical_batch=BATCH, ledger=ledger, schedule=lambda done: rate * (1 - done / ROUNDS),
        provenance={"weights": "public"},
    ) as session:  # fmt: skip
        for lot in session:
            session.step(lot)
        sigma = session.noise_multiplier
    found = right(model, test, words)
    return {"arm": arm, "seed": seed, "rate": rate, "sigma": sigma, "accuracy": found, "s": time.monotonic() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--experts", type=int, default=0, help="0: dense")
    parser.add_argument("--layers", type=int, default=2, help="trained, from the last; with the last norm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    found = []
    for seed in chosen.seeds:
        for rate in chosen.rates:
            for arm in ("words", "head"):
                found.append(run(arm, seed, rate, chosen))
                print(json.dumps(found[-1]), flush=True)
                if chosen.json is not None:
                    chosen.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
