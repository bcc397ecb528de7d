"""The engine on a GPU: as exact as on the processor, how long a private step takes, and how much it holds.

    bash benchmarks/gpu.sh                              # all of it, under 8 minutes on one GPU
    python benchmarks/gpu.py --only exactness --json exactness.json
    python benchmarks/gpu.py --device cpu --small       # that the script itself runs, without a GPU

Pieces, each with its own time, so that one that fails or takes too long costs no other:

- ``products``: the engine's products of norms and sums in float32 and of parts on tensor cores (``tensor_cores``, see
  ``docs/decisions/0067-products-on-tensor-cores.md``): largest error over what slack allows, and seconds.
- ``exactness``: for every family that transformers has behind its experts interface, norms of three records and sums
  clipped by them, by both methods, against the same engine on the processor. Largest relative difference. The same
  with products on tensor cores.
- ``steps``: the arms and models of ``dp_step.py`` at its shapes, on the device.
- ``mellum``: Mellum's own configuration (28 MoE layers of 64 experts, top-8) with random bfloat16 weights, adapters
  of rank 4 on the experts, records of 512 tokens, a lot of 32 in physical batches: seconds and bytes of a private
  step beside those of a plain one.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import dp_step
from coterie.config import LoraSpec
from coterie.dp.clipping import Flat
from coterie.dp.losses import default_loss
from coterie.dp.noise.discrete_gaussian import add_noise
from coterie.dp.noise.randomness import random_source
from coterie.dp.per_sample import products
from coterie.dp.per_sample.engine import Engine
from coterie.dp.per_sample.gram import rounding_factor
from coterie.models import seam
from coterie.models.lora import attach_adapters
from coterie.models.zoo.catalogue import causal_lm_types
from coterie.models.zoo.tiny import VOCAB, tiny_model
from harness import machine, write_figures

CLIP, SIGMA = 1.0, 0.7
METHODS = ("book_keeping", "ghost")
_CORES = "book_keeping, tensor cores"
_PRODUCTS = {"bfloat16 rows": (False, False), "scaled rows": (True, False), "float32 rows": (True, True)}
"""Which side of a product has all of float32's digits."""
_SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_local_experts": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
_FAMILIES_SMALL = ("olmoe", "qwen3_moe")


class Clock:
    """Seconds and peak bytes of work on a device, whose queue is empty before and after."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds(self, work: Callable[[], object]) -> float:
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """What the allocator held at most; 0 on a processor, which is not asked."""
        if self._device.type != "cuda":
            work()
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        work()
        self._wait()
        return torch.cuda.max_memory_allocated(self._device)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


# ---- products ----


def matrix_products(device: torch.device, sizes: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Square products of numbers of one sign, whose errors all go the same way where sums are cut off."""
    clock, found = Clock(device), {}
    for size in sizes:
        for kind, wide in _PRODUCTS.items():
            sides = [torch.rand(size, size, device=device).to(torch.float32 if all_of_it else torch.bfloat16)
                     for all_of_it in wide]  # fmt: skip
            exact = sides[0].double() @ sides[1].double()
            arms = {}
            for arm, on in (("float32", False), ("tensor cores", True)):
                with products.law(on):
                    left, right = (products.operand(side) for side in sides)
                    off = float(((products.multiply(left, right).double() - exact) / exact).abs().max())
                    seconds = [clock.seconds(lambda a=left, b=right: products.multiply(a, b)) for _ in range(repeats)]
                    arms[arm] = {"over_bound": off / rounding_factor(size), "seconds": statistics.median(seconds)}
            found[f"{kind} {size}"] = arms
    return found


# ---- exactness ----


def exactness(device: torch.device, families: tuple[str, ...]) -> dict[str, Any]:
    """Of every family and method, the largest relative difference of norms and sums, or what went wrong."""
    found: dict[str, Any] = {}
    for family in families:
        try:
            here = {method: _norms_and_sums(family, method, torch.device("cpu")) for method in METHODS}
            there = {method: _norms_and_sums(family, method, device) for method in METHODS}
            with products.law(tensor_cores=True):
                there[_CORES] = _norms_and_sums(family, METHODS[0], device)
            here[_CORES] = here[METHODS[0]]
        except Exception as error:  # one family that does not run is a finding, not the end of the others
            found[family] = {"does_not_run": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            continue
        found[family] = {
            method: {
                "norms": float((there[method][0] / here[method][0] - 1).abs().max()),
                "sums": _largest_difference(there[method][1], here[method][1]),
            }
            for method in there
        }
    ran = [each for each in found.values() if METHODS[0] in each]
    measured = [each[m][what] for each in ran for m in METHODS for what in each[m]]
    return {
        "families": len(families),
        "largest": max(measured, default=math.nan),
        "largest_on_tensor_cores": max((off for each in ran for off in each[_CORES].values()), default=math.nan),
        "do_not_run": sorted(family for family, each in found.items() if "does_not_run" in each),
        "by_family": found,
    }


def _norms_and_sums(family: str, method: str, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Float64 norms [B] on the processor, and the clipped sums."""
    model = tiny_model(family).to(device)
    ids = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(0)).to(device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    engine = Engine(model, clipping=Flat(CLIP), method=method)  # type: ignore[arg-type]
    norms = engine.norms(batch).double().cpu()
    engine.accumulate(batch)
    return norms, {name: value.double().cpu() for name, value in engine.take().items()}


def _largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Over all parameters together: what a sum is off by, over its own size."""
    off = sum(float((ours[name] - value).square().sum()) for name, value in theirs.items())
    return math.sqrt(off / sum(float(value.square().sum()) for value in theirs.values()))


# ---- the shapes of dp_step.py ----


def steps(device: torch.device, shapes: tuple[str, ...], repeats: int) -> dict[str, Any]:
    """Medians over rounds in which all arms take turns; ratios to ``plain``."""
    clock, arms = Clock(device), ("plain", "gaussian_only", "book_keeping", "ghost", "auto", *dp_step.THEIRS)
    found: dict[str, Any] = {}
    for name, make in dp_step.MODELS.items():
        for shape in shapes:
            batch = {key: value.to(device) for key, value in dp_step.batch_of(shape, name == "classifier").items()}

            def of(
                arm: str, make: Callable[[], nn.Module] = make, batch: dict[str, Tensor] = batch
            ) -> Callable[[], dp_step.Step]:
                return lambda: dp_step.make_step(arm, make().to(device), batch)

            makers = {arm: of(arm) for arm in arms} | {_CORES: _on_cores(of("book_keeping"))}
            found[f"{name} {shape}"] = _turns(clock, makers, repeats)
    return found


def _on_cores(make: Callable[[], dp_step.Step]) -> Callable[[], dp_step.Step]:
    """The same step with products on tensor cores."""

    def made() -> dp_step.Step:
        step = make()

        def on_cores() -> None:
            with products.law(tensor_cores=True):
                step()

        return on_cores

    return made


def _turns(clock: Clock, makers: Mapping[str, Callable[[], dp_step.Step]], repeats: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    ready: dict[str, dp_step.Step] = {}
    for arm, make in makers.items():
        try:
            ready[arm] = make()
            clock.seconds(ready[arm])
            found[arm] = {"peak_bytes": clock.peak_bytes(ready[arm])}
        except Exception as error:  # other people's libraries fail in their own ways, and the report says how
            ready.pop(arm, None)
            found[arm] = {"does_not_run": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    taken: dict[str, list[float]] = {arm: [] for arm in ready}
    for _ in range(repeats):
        for arm, step in ready.items():
            taken[arm].append(clock.seconds(step))
    for arm, seconds in taken.items():
        found[arm]["seconds"] = statistics.median(seconds)
        if "plain" in taken:
            ratios = (one / base for one, base in zip(seconds, taken["plain"], strict=True))
            found[arm]["over_plain"] = statistics.median(ratios)
    return found


# ---- a large model with adapters ----


def mellum(device: torch.device, *, small: bool, physical: int, repeats: int) -> dict[str, Any]:
    """A plain and a private step of adapters alone, in physical batches."""
    lot, tokens = (4, 16) if small else (32, 512)
    config = AutoConfig.for_model("mellum", **(_SMALL if small else {}))
    with torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    seam.select(model)
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    adapted = attach_adapters(model, LoraSpec(rank=4), seed=0).train()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)
    ids = torch.randint(3, config.vocab_size, (lot, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    batches = [
        {"input_ids": some, "attention_mask": torch.ones_like(some), "labels": some} for some in ids.split(physical)
    ]

    def finish() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def plain() -> None:
        for batch in batches:
            (default_loss(adapted, batch).sum() / lot).backward()
        finish()

    def private(engine: Engine) -> None:
        for batch in batches:
            engine.accumulate(batch)
        sums = add_noise(engine.take(), SIGMA * CLIP, random_source(None), in_place=True, divisor=lot)
        for name, parameter in trained.items():
            parameter.grad = sums[name].to(parameter)
        finish()

    def of(method: str) -> Callable[[], dp_step.Step]:
        engine = Engine(adapted, clipping=Flat(CLIP), method=method)  # type: ignore[arg-type]
        return lambda: lambda: private(engine)

    arms = {"plain": lambda: plain, **{method: of(method) for method in METHODS}}
    arms[_CORES] = _on_cores(of("book_keeping"))
    return {
        "parameters": sum(parameter.numel() for parameter in adapted.parameters()),
        "trained": sum(parameter.numel() for parameter in trained.values()),
        "weights_bytes": held,
        "lot": lot,
        "tokens": tokens,
        "physical_batch": physical,
        "arms": _turns(Clock(device), arms, repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--only", choices=("products", "exactness", "steps", "mellum"), help="default: all")
    parser.add_argument("--small", action="store_true", help="two families, one small shape, two layers")
    parser.add_argument("--physical", type=int, default=4, help="records in a physical batch of `mellum`")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "torch finds no GPU here; --device cpu --small shows that the script runs\n")
    device = torch.device(options.device)
    families = _FAMILIES_SMALL if options.small else tuple(causal_lm_types())
    shapes = ("4x16",) if options.small else dp_step.SHAPES
    pieces: dict[str, Callable[[], dict[str, Any]]] = {
        "products": lambda: matrix_products(device, (256,) if options.small else (512, 4096), options.repeats),
        "exactness": lambda: exactness(device, families),
        "steps": lambda: steps(device, shapes, options.repeats),
        "mellum": lambda: mellum(
            device, small=options.small, physical=min(options.physical, 2 if options.small else 32),
            repeats=options.repeats,
        ),
    }  # fmt: skip
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"
    figures: dict[str, Any] = {"device": name, "machine": machine()}
    for piece, run in pieces.items():
        if options.only in (None, piece):
            began = time.perf_counter()
            figures[piece] = run()
            figures[piece]["took_s"] = round(time.perf_counter() - began, 1)
            print(piece, figures[piece], flush=True)
            if options.json:
                write_figures(options.json, figures)


if __name__ == "__main__":
    main()
