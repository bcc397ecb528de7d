"""What differential privacy costs a training step: time and peak memory, side by side.

    python benchmarks/dp_step.py --json dp_step.json
    python benchmarks/dp_step.py --shapes 4x64 --repeats 3        # short

A step is forward, backward and AdamW (``foreach=False``) for every arm; for the private arms also clipping, the
noise of every parameter, and what a session puts on disk: the ledger's entry, synced before it steps, and the noised
values, synced beside the next step (``--no-record`` leaves these out; ``--folder`` names the disk, by default that of
temporary files). Arms:
``plain``; ``gaussian_only``, the plain step plus ``torch.randn`` of every parameter without clipping (the least that
private training costs with ordinary floating-point noise); ours by ``book_keeping``, by ``ghost`` and by ``auto``,
these with ``isolation: fast``; ``exact``, with ``isolation: exact``; ``loop``, one record at a time by autograd.
``opacus`` and ``opake``, with transformers' own experts and noise of their own (neither writes anything), change
classes of transformers for a whole process, so each is asked for in a run of its own:

    pip install --no-deps --target DIR opacus==1.6.0 opt_einsum optree torchopt opake==0.16.1 opake-base==0.16.1 \\
        opake-engine==0.16.1 opake-dpsgd==0.16.1 opake-optimizers==0.16.1 opake-patches==0.16.1
    PYTHONPATH=DIR python benchmarks/dp_step.py --arms plain opake

Times are medians over rounds in which all arms take turns in one process; memory is the peak resident size of a
fresh process that runs one arm only, beside the one of ``plain``. Anything else that runs on the machine makes these
figures worse (processor time less than wall time); ``machine`` says what it was. ``--no-noise`` leaves the noise out,
to see what clipping alone costs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, Qwen3MoeConfig

from coterie.dp.accounting.accountant import Mechanism
from coterie.dp.accounting.ledger import open_ledger
from coterie.dp.accounting.lots import LotPlan, Units, draw_lot
from coterie.dp.accounting.releases import Pending, Releases
from coterie.dp.accounting.spool import Spool
from coterie.dp.clipping import Flat
from coterie.dp.isolation.exact_engine import ExactEngine
from coterie.dp.losses import default_loss
from coterie.dp.noise.discrete_gaussian import GRID_SIGMA, add_noise
from coterie.dp.noise.randomness import random_source
from coterie.dp.per_sample.engine import Engine
from coterie.models import seam
from coterie.training.planning.measured import peak_rss_bytes

SHAPES = ("4x64", "16x64", "32x64", "4x512")
ARMS = ("plain", "gaussian_only", "book_keeping", "ghost", "auto", "exact", "loop")
THEIRS = ("opacus", "opake")
CLIP, SIGMA = 1.0, 0.7
VOCABULARY = 4096
Step = Callable[[], None]


def language_model() -> nn.Module:
    """Qwen3-MoE shape: 6 layers, hidden 256, 16 experts of width 512, top-4, vocabulary 4096; 41M parameters."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, moe_intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32, num_experts=16, num_experts_per_tok=4,
        max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    return _ready(AutoModelForCausalLM.from_config(config))


def classifier() -> nn.Module:
    """A MiniLM-shaped encoder, upcycled to 8 experts a layer."""
    from transformers import BertForSequenceClassification

    from coterie.models.zoo.upcycle import upcycle

    dense = BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        num_labels=2,
    )  # fmt: skip
    return _ready(upcycle(BertForSequenceClassification(dense), experts=8, top_k=1))


def _ready(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    if seam.expert_layers(model):
        seam.select(model)
    return model.train()


def batch_of(shape: str, labelled: bool) -> dict[str, Tensor]:
    """Random ids; ``labelled``: a class for each record instead of next tokens."""
    records, tokens = (int(part) for part in shape.split("x"))
    ids = torch.randint(3, VOCABULARY, (records, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 0] % 2 if labelled else ids.clone()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Record:
    """A run's ledger and spool, in a folder that is gone afterwards."""

    def __init__(self, folder: Path | None) -> None:
        place, run, rounds = Path(tempfile.mkdtemp(dir=folder)), "benchmark", 10**6
        weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
        self._units, self._plan = Units.of_records(1024), LotPlan.of(1024, 32)
        ledger = open_ledger("0" * 64, place / "ledger")
        ledger.start_run(run, Mechanism(SIGMA, self._plan.rate), rounds)
        self._releases, self._round = Releases(ledger, Spool(place / "spool"), run), 0

    def __call__(self, noised: dict[str, Tensor]) -> None:
        """One round of a session that has a checkpoint; the round before it is dropped, as by the next checkpoint."""
        self._releases.spool.drop_releases(self._round)
        self._round += 1
        pending = self._releases.begin(
            self._round, {"parent": str(self._round)},
            lambda _: draw_lot(self._round, self._plan, self._units, random_source(None)),
        )  # fmt: skip
        assert isinstance(pending, Pending)
        self._releases.publish(pending, noised, durable="behind")


def make_step(
    arm: str, model: nn.Module, batch: dict[str, Tensor], noise: bool = True, folder: Path | None = None,
    recorded: bool = True,
) -> Step:  # fmt: skip
    """One whole step of an arm; raises where the arm does not run on this model.

    Args:
        arm: of `ARMS` or `THEIRS`.
        model: on the device.
        batch: on the device.
        noise: add it; without it nothing is released, so nothing is recorded either.
        folder: where private arms put ledger and spool; None: with the temporary files.
        recorded: private arms of ours write both.
    """
    if arm in THEIRS:
        if not _installed(arm):
            raise RuntimeError(f"{arm} is not installed")
        model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
        return (_opacus if arm == "opacus" else _opake)(model, batch, noise)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    records = len(batch["input_ids"])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain_arm = arm in ("plain", "gaussian_only")
    record = Record(folder) if noise and recorded and not plain_arm else None

    def finish(sums: dict[str, Tensor]) -> None:
        if noise:
            # As a session does it: over the sums, and divided in the same pass.
            sums = add_noise(sums, SIGMA * CLIP, random_source(None), in_place=True, divisor=records)
        if record is not None:
            record(sums)
        for name, parameter in parameters.items():
            parameter.grad = sums[name]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def plain() -> None:
        default_loss(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def loop() -> None:
        sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for record in range(records):
            one = {name: value[record : record + 1] for name, value in batch.items()}
            found = torch.autograd.grad(default_loss(model, one).sum(), list(parameters.values()), allow_unused=True)
            norm = torch.stack([g.square().sum() for g in found if g is not None]).sum().sqrt()
            for (_, total), gradient in zip(sums.items(), found, strict=True):
                if gradient is not None:
                    total.add_(gradient, alpha=min(1.0, CLIP / float(norm)))
        finish(sums)

    def gaussian_only() -> None:
        default_loss(model, batch).mean().backward()
        for parameter in parameters.values():
            parameter.grad.add_(torch.randn_like(parameter), alpha=SIGMA * CLIP / records)  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if plain_arm:
        return plain if arm == "plain" else gaussian_only
    if arm == "loop":
        return loop
    if arm == "exact":
        alone = ExactEngine(model, clipping=Flat(CLIP))
        alone.use_grid(lambda name: SIGMA * CLIP / GRID_SIGMA)

        def exact() -> None:
            for record in range(records):
                alone.accumulate({name: value[record : record + 1] for name, value in batch.items()})
            finish(alone.take())

        return exact
    engine = Engine(model, clipping=Flat(CLIP), method=arm)  # type: ignore[arg-type]
    engine.prepare(batch)

    def ours() -> None:
        engine.accumulate(batch)
        finish(engine.take())

    return ours


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def _opacus(model: nn.Module, batch: dict[str, Tensor], noise: bool) -> Step:
    """Hooks collect per-sample gradients; its optimizer clips, adds ordinary floating-point noise, and steps."""
    from opacus.grad_sample import GradSampleModule  # type: ignore[import-not-found]
    from opacus.optimizers import DPOptimizer  # type: ignore[import-not-found]

    wrapped = GradSampleModule(model, loss_reduction="sum", strict=True)
    optimizer = DPOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False), noise_multiplier=SIGMA if noise else 0.0,
        max_grad_norm=CLIP, expected_batch_size=len(batch["input_ids"]), loss_reduction="sum",
    )  # fmt: skip

    def step() -> None:
        default_loss(wrapped, batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _opake(model: nn.Module, batch: dict[str, Tensor], noise: bool) -> Step:
    """``vmap`` over per-sample gradients of the functional model with the model's own loss, then AdamW."""
    from opake.dpsgd.clipping import clipped_grad  # type: ignore[import-not-found]
    from opake.dpsgd.noise import gaussian_noise  # type: ignore[import-not-found]
    from opake.functional import make_functional  # type: ignore[import-not-found]
    from opake.patches import apply_model_patches, apply_runtime_patches  # type: ignore[import-not-found]
    from opake.random import key  # type: ignore[import-not-found]

    apply_runtime_patches()
    apply_model_patches(model)
    functional, trained, frozen = make_functional(model, disable_autograd_tracking=True, partition_trainable=True)

    def loss(parameters: dict[str, Tensor], *columns: Tensor) -> Tensor:
        found: Tensor = functional({**frozen, **parameters}, **dict(zip(batch, columns, strict=True)))["loss"]
        return found

    clipped, clip_state = clipped_grad(
        loss, clipping_norm=CLIP, batch_argnums=tuple(range(1, 1 + len(batch))), normalize_by=len(batch["input_ids"])
    )
    add, noise_state = gaussian_noise(noise_multiplier=SIGMA, key=key(0))
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4, foreach=False)

    def step() -> None:
        nonlocal clip_state, noise_state
        gradients, clip_state = clipped(trained, *batch.values(), state=clip_state)
        if noise:
            gradients, noise_state = add(gradients, noise_state)
        for name, parameter in trained.items():
            parameter.grad = gradients.pytree[name]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure_times(model_name: str, shape: str, repeats: int, arms: list[str], **options: Any) -> dict[str, Any]:
    """Median seconds a step of each arm, all arms taking turns; the reason where one does not run."""
    found: dict[str, Any] = {}
    steps: dict[str, Step] = {}
    batch = batch_of(shape, model_name == "classifier")
    for arm in arms:
        try:
            steps[arm] = make_step(arm, MODELS[model_name](), batch, **options)
            steps[arm]()
        except Exception as error:  # other people's libraries fail in their own ways, and the report says how
            steps.pop(arm, None)
            found[arm] = {"does_not_run": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    seconds: dict[str, list[float]] = {arm: [] for arm in steps}
    cpu: dict[str, list[float]] = {arm: [] for arm in steps}
    for _ in range(repeats):
        for arm, step in steps.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            step()
            seconds[arm].append(time.perf_counter() - start)
            cpu[arm].append(time.process_time() - cpu_start)
    for arm in steps:
        found[arm] = {
            "seconds": statistics.median(seconds[arm]),
            "cpu_seconds": statistics.median(cpu[arm]),
            "over_plain": _median_ratio(seconds[arm], seconds["plain"]),
            "cpu_over_plain": _median_ratio(cpu[arm], cpu["plain"]),
        }
    if "exact" in steps and "book_keeping" in steps:
        found["exact"] |= {
            "over_book_keeping": _median_ratio(seconds["exact"], seconds["book_keeping"]),
            "cpu_over_book_keeping": _median_ratio(cpu["exact"], cpu["book_keeping"]),
        }
    return found


def _median_ratio(values: list[float], bases: list[float]) -> float:
    return statistics.median(value / base for value, base in zip(values, bases, strict=True))


def peak_bytes(model_name: str, shape: str, arm: str) -> int:
    """Peak resident bytes of a fresh process that runs three steps of one arm."""
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--one", model_name, shape, arm]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    return int(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.split() else 0


def run_one(model_name: str, shape: str, arm: str) -> None:
    step = make_step(arm, MODELS[model_name](), batch_of(shape, model_name == "classifier"))
    for _ in range(3):
        step()
    print(peak_rss_bytes())


MODELS: dict[str, Callable[[], nn.Module]] = {"language_model": language_model, "classifier": classifier}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="RECORDSxTOKENS")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=[*ARMS, *THEIRS])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-noise", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="without spool and ledger")
    parser.add_argument("--folder", type=Path, help="for spool and ledger")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "SHAPE", "ARM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        run_one(*options.one)
        return
    report: dict[str, Any] = {
        "machine": {"cpu": platform.processor(), "cores": os.cpu_count(), "torch": torch.__version__,
                    "threads": options.threads, "load": os.getloadavg()},
        "results": [],
    }  # fmt: skip
    for model_name in options.models:
        for shape in options.shapes:
            arms = measure_times(
                model_name, shape, options.repeats, options.arms,
                noise=not options.no_noise, folder=options.folder, recorded=not options.no_record,
            )  # fmt: skip
            for arm, figures in arms.items():
                if "seconds" in figures and not options.no_memory:
                    figures["peak_bytes"] = peak_bytes(model_name, shape, arm)
                if figures.get("peak_bytes") and arms["plain"].get("peak_bytes"):
                    figures["memory_over_plain"] = figures["peak_bytes"] / arms["plain"]["peak_bytes"]
                print(model_name, shape, arm, json.dumps(figures), flush=True)
            report["results"].append({"model": model_name, "shape": shape, "arms": arms})
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
