"""Which changes after the noise, or in how it is shared out, learn more at one epsilon.

A small Mixture-of-Experts language model of letters learns public text without privacy, then other text within a
budget, once for each arm, rate and seed. Arms differ in what is done with the clipped, noised sum, or in how clip
norm and noise are shared out; lots, rounds, budget and noise multiplier are the same (those of bands apart).

- ``adamw``: the default, with betas 0.9 and 0.99. ``adamw_half``, ``adamw_none``: with a first beta of 0.5 and of 0.
- ``adamw_corrected``: DP-AdamBC. ``sgd``, ``sgd_bands``: momentum 0.9, noise independent or in bands. ``sgd_none``:
  without momentum.
- ``shrunk``: AdamW on gradients whose matrices' singular values were shrunk by the known size of the noise (Gavish
  and Donoho 2017, arXiv:1405.7511). ``shrunk_mean``: the same of the running mean of gradients.
- ``lora``, ``lora_shrunk``: adapters of rank 4 alone are trained.
- ``groups``: every expert and the rest have a clip norm of their own, all alike. ``by_load``: those of experts follow
  the loads of the public text and of earlier rounds, which are released inside the round's Gaussian; noise follows.

    python benchmarks/private_optimisers.py --private FILE.tsv --public FILE.txt --seeds 0 1 2 --json optimisers.json

Results are written after every run; the same command goes on where an interrupted one stopped. Per-record gradients
are torch.func's, so that groups inside a stack of experts can be formed; optimisers, bands and accounting are
coterie's.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn import functional

from coterie.config import OptimSpec
from coterie.dp.accounting.accountant import noise_multiplier
from coterie.dp.accounting.budget import Budget
from coterie.dp.noise.bands import NoiseBands, block_of
from coterie.training.optim import CorrectedAdamW, make_optimizer

LETTERS = "\0 abcdefghijklmnopqrstuvwxyz0123456789.,;:'\"!?()-\n"
LENGTH, WIDTH, EXPERTS, TOP, INNER = 32, 32, 8, 2, 32
RECORDS, HELD_OUT, LOT, ROUNDS, DELTA, BANDS = 3000, 1000, 128, 40, 1e-5, 8
LOAD_SHARE = 0.1

_ADAMW = (2e-3, 4e-3, 8e-3, 1.6e-2)
RATES = {
    "adamw": _ADAMW,
    "adamw_half": _ADAMW,
    "adamw_none": _ADAMW,
    "adamw_corrected": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "sgd": (0.1, 0.2, 0.4, 0.8),
    "sgd_none": (1.0, 2.0, 4.0, 8.0),
    "sgd_bands": (0.1, 0.2, 0.4, 0.8),
    "shrunk": (2e-3, 4e-3, 8e-3),
    "shrunk_mean": (2e-3, 4e-3, 8e-3),
    "lora": (8e-3, 1.6e-2, 3.2e-2),
    "lora_shrunk": (8e-3, 1.6e-2, 3.2e-2),
    "groups": _ADAMW,
    "by_load": _ADAMW,
}

Weights = dict[str, Tensor]


def start(seed: int) -> Weights:
    """Random weights."""
    chance = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance) / math.sqrt(shape[-1])

    return {
        "embedding": drawn(len(LETTERS), WIDTH), "place": drawn(LENGTH, WIDTH) * 0.1,
        "attention": drawn(3 * WIDTH, WIDTH), "output": drawn(WIDTH, WIDTH),
        "router": drawn(EXPERTS, WIDTH), "up": drawn(EXPERTS, INNER, WIDTH),
        "down": drawn(EXPERTS, WIDTH, INNER), "head": drawn(len(LETTERS), WIDTH),
    }  # fmt: skip


def loss_of(weights: Weights, ids_T: Tensor) -> tuple[Tensor, Tensor]:
    """Mean next-letter cross-entropy of one record, and the share of its tokens that each expert got, [E]."""
    x = weights["embedding"][ids_T] + weights["place"]
    q, k, v = (functional.layer_norm(x, (WIDTH,)) @ weights["attention"].T).chunk(3, -1)
    scores = q @ k.T / math.sqrt(WIDTH)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    x = x + torch.where(causal, scores, -1e9).softmax(-1) @ v @ weights["output"].T
    normed = functional.layer_norm(x, (WIDTH,))
    gates = (normed @ weights["router"].T).softmax(-1)
    least = gates.topk(TOP, -1).values[..., -1:]
    chosen = torch.where(gates >= least, gates, 0.0)
    inner = functional.silu(torch.einsum("td,eid->tei", normed, weights["up"]))
    x = x + torch.einsum("te,tei,edi->td", chosen / chosen.sum(-1, keepdim=True), inner, weights["down"])
    logits = functional.layer_norm(x, (WIDTH,)) @ weights["head"].T
    return functional.cross_entropy(logits[:-1], ids_T[1:]), (gates >= least).float().mean(0).detach()


def merged(base: Weights, factors: Weights) -> Weights:
    """Base weights with adapters."""
    return {
        name: value + 2 * factors[f"{name}.b"] @ factors[f"{name}.a"] if f"{name}.a" in factors else value
        for name, value in base.items()
    }


def adapters(base: Weights, seed: int) -> Weights:
    """Factors of rank 4 of every matrix, of each expert its own; they start as nothing."""
    chance = torch.Generator().manual_seed(seed)
    found = {}
    for name in ("attention", "output", "up", "down", "head"):
        *stack, rows, columns = base[name].shape
        found[f"{name}.a"] = torch.randn(*stack, 4, columns, generator=chance) / math.sqrt(columns)
        found[f"{name}.b"] = torch.zeros(*stack, rows, 4)
    return found


def shrink(matrix: Tensor, std: float) -> Tensor:
    """Singular values as they best are without noise of this size, in the Frobenius norm; stacks matrix by matrix."""
    if matrix.ndim < 2:
        return matrix
    small, large = sorted(matrix.shape[-2:])
    beta = small / large
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    y = s / (std * math.sqrt(large))
    kept = ((y.square() - beta - 1).square() - 4 * beta).clamp_min(0).sqrt() / y.clamp_min(1e-12)
    kept = torch.where(y > 1 + math.sqrt(beta), kept, 0.0) * std * math.sqrt(large)
    return u * kept.unsqueeze(-2) @ v


class Sums:
    """Clipped sums of a lot, and their noise.

    Args:
        arm: see the module.
        sigma: noise multiplier.
        chance: of the noise.
        usage: [E] what is known of the experts' loads before the first round.
    """

    def __init__(self, arm: str, sigma: float, chance: torch.Generator, usage: Tensor) -> None:
        self.arm, self.sigma, self.chance, self.usage = arm, sigma, chance, usage
        self.std: dict[str, Tensor | float] = {}

    def of(self, gradients: Weights, loads_BE: Tensor) -> Weights:
        """Noised sums by name, of [B, ...] gradients; `std` then holds their noise."""
        if self.arm not in ("groups", "by_load"):
            squares = sum(value.flatten(1).square().sum(1) for value in gradients.values())
            factor_B = (1 / squares.sqrt().clamp_min(1e-12)).clamp(max=1.0)  # type: ignore[union-attr]
            self.std = dict.fromkeys(gradients, self.sigma)
            return {
                n: torch.einsum("b,b...->...", factor_B, value) + self._noise(value[0], n)
                for n, value in gradients.items()
            }
        return self._grouped(gradients, loads_BE)

    def _grouped(self, gradients: Weights, loads_BE: Tensor) -> Weights:
        experts = {name: value for name, value in gradients.items() if name in ("up", "down")}
        rest = {name: value for name, value in gradients.items() if name not in experts}
        share_E = torch.full((EXPERTS,), 1.0 / EXPERTS)
        taken = 0.0
        if self.arm == "by_load":
            share_E = 0.5 / EXPERTS + 0.5 * self.usage.clamp_min(0) / self.usage.clamp_min(0).sum()
            taken = LOAD_SHARE**2
        # Half of the squared clip norm for the experts, as their gradients have about half of the squared norm.
        bound_E, bound_rest = (0.5 * share_E).sqrt(), math.sqrt(0.5)
        squares_BE = sum(value.flatten(2).square().sum(2) for value in experts.values())
        factor_BE = (bound_E / squares_BE.sqrt().clamp_min(1e-12)).clamp(max=1.0)  # type: ignore[union-attr]
        squares_B = sum(value.flatten(1).square().sum(1) for value in rest.values())
        factor_B = (bound_rest / squares_B.sqrt().clamp_min(1e-12)).clamp(max=1.0)  # type: ignore[union-attr]
        # sum_k (C_k / s_k)^2 = 1 / sigma^2, each group's part as large as its part of the values: s_k follows C_k.
        values = {
            "rest": sum(v[0].numel() for v in rest.values()),
            "expert": sum(v[0, 0].numel() for v in experts.values()),
        }
        whole = values["rest"] + EXPERTS * values["expert"]
        part = {name: (1 - taken) * count / whole for name, count in values.items()}
        self.std = {
            **dict.fromkeys(rest, self.sigma * bound_rest / math.sqrt(part["rest"])),
            **dict.fromkeys(experts, self.sigma * bound_E / math.sqrt(part["expert"])),
        }
        if taken:
            released = loads_BE.sum(0) + self.sigma * TOP / LOAD_SHARE * torch.randn(
                EXPERTS, generator=self.chance
            ) / math.sqrt(TOP)
            self.usage = 0.7 * self.usage + 0.3 * released / LOT
        sums = {
            n: torch.einsum("be,be...->e...", factor_BE, value) + self._noise(value[0], n)
            for n, value in experts.items()
        }
        return sums | {
            n: torch.einsum("b,b...->...", factor_B, value) + self._noise(value[0], n) for n, value in rest.items()
        }

    def _noise(self, like: Tensor, name: str) -> Tensor:
        std = self.std[name]
        drawn = torch.randn(like.shape, generator=self.chance)
        return drawn * (std.view(-1, *[1] * (like.ndim - 1)) if isinstance(std, Tensor) else std)


def train(
    arm: str, rate: float, seed: int, base: Weights, usage: Tensor, train_RT: Tensor, test_RT: Tensor
) -> dict[str, Any]:
    """One private run."""
    budget, banded = Budget(8.0, DELTA), arm == "sgd_bands"
    share, turns = LOT / RECORDS, ROUNDS
    bands = NoiseBands.of(BANDS, ROUNDS, 0.9) if banded else None
    if banded:
        share, turns = BANDS * share, -(-ROUNDS // BANDS)
    sigma = noise_multiplier(budget, share, turns)
    kind = "sgd" if arm.startswith("sgd") else "adamw_corrected" if arm == "adamw_corrected" else "adamw"
    kept = {"adamw_half": 0.5, "adamw_none": 0.0, "sgd_none": 0.0}.get(arm, 0.9)
    spec = OptimSpec(
        kind=kind, lr=rate, schedule="constant", **({"momentum": kept} if kind == "sgd" else {"betas": (kept, 0.99)})
    )  # type: ignore[arg-type]
    trained = (
        adapters(base, seed) if arm.startswith("lora") else {name: value.clone() for name, value in base.items()}
    )
    named = {name: torch.nn.Parameter(value) for name, value in trained.items()}
    optimizer = make_optimizer(named.values(), spec)
    chance = torch.Generator().manual_seed(1000 + seed)
    sums, blocks = Sums(arm, sigma, chance, usage.clone()), torch.from_numpy(block_of(RECORDS, BANDS))
    past: list[Weights] = []
    mean: Weights = {}

    def loss(weights: Weights, ids_T: Tensor) -> tuple[Tensor, Tensor]:
        return loss_of(merged(base, weights) if arm.startswith("lora") else weights, ids_T)

    gradients_of = vmap(grad_and_value(loss, has_aux=True), in_dims=(None, 0))
    for turn in range(ROUNDS):
        joins = torch.rand(RECORDS, generator=chance) < share
        if banded:
            joins &= blocks == turn % BANDS
        gradients, (_, loads_BE) = gradients_of({n: p.detach() for n, p in named.items()}, train_RT[joins])
        noised = sums.of(gradients, loads_BE) if bands is None else _banded(bands, sums, gradients, loads_BE, past)
        for name, param in named.items():
            value, std = noised[name] / LOT, sums.std[name]
            if arm in ("shrunk", "lora_shrunk") and isinstance(std, float):
                value = shrink(value, std / LOT)
            if arm == "shrunk_mean" and isinstance(std, float):
                mean[name] = 0.9 * mean.get(name, torch.zeros_like(value)) + 0.1 * value
                left = 0.1 * math.sqrt((1 - 0.81 ** (turn + 1)) / (1 - 0.81))
                value = shrink(mean[name], left * std / LOT) / (1 - 0.9 ** (turn + 1))
            param.grad = value
        if isinstance(optimizer, CorrectedAdamW):
            optimizer.expect_noise({p: float(sums.std[n]) / LOT for n, p in named.items()})
        for group in optimizer.param_groups:  # linear decay to zero
            group["lr"] = rate * (1 - turn / ROUNDS)
        optimizer.step()
        optimizer.zero_grad()
    final = {name: param.detach() for name, param in named.items()}
    return {"arm": arm, "rate": rate, "seed": seed, "sigma": sigma, "loss": measured(loss, final, test_RT)}


def _banded(bands: NoiseBands, sums: Sums, gradients: Weights, loads_BE: Tensor, past: list[Weights]) -> Weights:
    """The sums as C^-1 (C G + Z) leaves them."""
    clean = Sums(sums.arm, 0.0, torch.Generator().manual_seed(0), sums.usage).of(gradients, loads_BE)
    fresh = {name: torch.randn(value.shape, generator=sums.chance) * sums.sigma for name, value in clean.items()}
    sums.std = dict.fromkeys(clean, sums.sigma)
    noise = {}
    for name, value in fresh.items():
        earlier = sum((c * row[name] for c, row in zip(bands.coefficients[1:], past, strict=False)), torch.zeros(()))
        noise[name] = (value - earlier) / bands.coefficients[0]
    past.insert(0, noise)
    del past[bands.count :]
    return {name: value + noise[name] for name, value in clean.items()}


def measured(loss: Any, weights: Weights, test_RT: Tensor) -> float:
    """Mean held-out loss."""
    with torch.no_grad():
        return float(vmap(loss, in_dims=(None, 0))(weights, test_RT)[0].mean())


def records(path: Path, count: int) -> Tensor:
    """[count, T] letters of a text file or of a tsv file's columns, cut into records."""
    place = {letter: number for number, letter in enumerate(LETTERS)}
    text = [place[letter] for letter in path.read_text("utf-8").lower() if letter in place][: count * LENGTH]
    return torch.tensor(text).view(-1, LENGTH)


def public_start(public_RT: Tensor) -> tuple[Weights, Tensor]:
    """Weights after public text, and what each expert got of it."""
    named = {name: torch.nn.Parameter(value) for name, value in start(0).items()}
    optimizer = torch.optim.AdamW(named.values(), 3e-3)
    chance = torch.Generator().manual_seed(0)
    for _ in range(400):
        rows = torch.randint(len(public_RT), (64,), generator=chance)
        loss, _ = vmap(loss_of, in_dims=(None, 0))(named, public_RT[rows])
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    base = {name: param.detach() for name, param in named.items()}
    with torch.no_grad():
        return base, vmap(loss_of, in_dims=(None, 0))(base, public_RT[:500])[1].mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--private", type=Path, required=True)
    parser.add_argument("--public", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if chosen.json is not None and chosen.json.is_file():
        rows = json.loads(chosen.json.read_text("utf-8"))
    done = {(row["arm"], row["rate"], row["seed"]) for row in rows}
    torch.manual_seed(0)
    base, usage = public_start(records(chosen.public, 8000))
    private_RT = records(chosen.private, RECORDS + HELD_OUT)
    train_RT, test_RT = private_RT[:RECORDS], private_RT[RECORDS:]
    before = measured(loss_of, base, test_RT)
    print(f"public model: {before:.4f} nats on {len(test_RT)} held-out records; loads {usage.tolist()}", flush=True)
    for seed in chosen.seeds:
        for arm in chosen.arms:
            for rate in RATES[arm]:
                if (arm, rate, seed) in done:
                    continue
                began = time.monotonic()
                row = {**train(arm, rate, seed, base, usage, train_RT, test_RT), "before": before}
                rows.append(row)
                print(f"{arm:>16} rate {rate:<6g} seed {seed}: gain {before - row['loss']:.4f}  "
                      f"{time.monotonic() - began:.1f} s", flush=True)  # fmt: skip
                if chosen.json is not None:
                    chosen.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
