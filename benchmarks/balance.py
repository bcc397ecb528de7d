"""Do experts collapse under differential privacy, and what keeps them in use at the same epsilon?

A small language model with a top-1 router is trained from random weights on bytes of text, once for each mode,
with the same budget, lots, clip norm and starting weights. Measured on held-out text: how many experts are in use
(the exponential of the load's entropy, and the largest share), and the loss.

    python benchmarks/balance.py --json balance.json [--rounds 80] [--seeds 3] [--text FILE]

Results are written after every run; the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from coterie import dp
from coterie.dp.balance import Balance, BalanceMode
from coterie.dp.losses import default_loss
from coterie.dp.router_watch import RouterWatch

MODES: tuple[BalanceMode, ...] = ("off", "per_sequence", "private_load", "bias")
TOKENS, EXPERTS = 32, 8


class BiasedRouter(Qwen3MoeTopKRouter):
    """The family's router with a bias that decides who is chosen and never weighs what comes back.

    At zero, where it stays unless `balance: bias` moves it, it changes nothing: all modes train the same model.
    """

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__(config)
        self.register_buffer("choice_bias", torch.zeros(config.num_experts))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
        chosen = torch.topk(probabilities + self.choice_bias, self.top_k, dim=-1).indices
        return logits, probabilities.gather(-1, chosen).to(logits.dtype), chosen


def model_of(seed: int, top_k: int) -> Qwen3MoeForCausalLM:
    """Two layers, eight experts each; routing weights are the router's own probabilities, so it learns from them."""
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        head_dim=16,
        moe_intermediate_size=64, num_experts=EXPERTS, num_experts_per_tok=top_k, norm_topk_prob=False,
        max_position_embeddings=TOKENS, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(config)
    for layer in model.model.layers:
        router = BiasedRouter(config)
        router.load_state_dict(layer.mlp.gate.state_dict(), strict=False)
        layer.mlp.gate = router
    return model


def records_of(text: bytes) -> list[dict[str, Tensor]]:
    """Non-overlapping pieces of TOKENS bytes."""
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    pieces = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def made_up_text(size: int) -> bytes:
    """Words in random order, where no file is given."""
    generator = torch.Generator().manual_seed(0)
    words = [bytes(torch.randint(97, 123, (3 + i % 6,), generator=generator).tolist()) for i in range(200)]
    order = torch.randint(0, len(words), (size // 4,), generator=generator)
    return b" ".join(words[i] for i in order.tolist())[:size]


@torch.no_grad()
def measure(model: Qwen3MoeForCausalLM, held_out: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Loss and load on held-out text, layer by layer."""
    model.eval()
    watch = RouterWatch(model)
    batch = {name: torch.stack([record[name] for record in held_out]) for name in held_out[0]}
    with watch.watching() as seen:
        loss = float(default_loss(model, batch).mean())
    loads = [torch.bincount(seen.ids[layer.index].flatten(), minlength=EXPERTS).double() for layer in watch.layers]
    shares = [load / load.sum() for load in loads]
    return {
        "loss": loss,
        "experts_in_use": [float(torch.exp(-(s * s.clamp_min(1e-12).log()).sum())) for s in shares],
        "largest_share": [float(s.max()) for s in shares],
        "unused": [int((s < 0.01).sum()) for s in shares],
    }


def run(mode: BalanceMode, seed: int, train: list, held_out: list, folder: Path, args: argparse.Namespace) -> dict:
    """One private run."""
    model = model_of(seed, args.top_k)
    before = measure(model, held_out)
    coefficient = args.bias_step if mode == "bias" else args.coefficient
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    began = time.perf_counter()
    with dp.make_private(
        model, optimizer, train, budget=dp.Budget(args.epsilon, 1e-5), clip_norm=args.clip, lot_size=args.lot,
        rounds=args.rounds, physical_batch=64, method="book_keeping", seed=seed, ledger=folder, self_check=False,
        balance=Balance(mode, coefficient, args.load_share, args.smoothing), digest=f"{mode}-{seed}",
    ) as session:  # fmt: skip
        for lot in session:
            session.step(lot)
        sigma = session.noise_multiplier
    result = {"mode": mode, "seed": seed, "noise_multiplier": sigma, "seconds": time.perf_counter() - began}
    return {**result, "before": before, "after": measure(model, held_out)}


def earlier(path: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Results that an interrupted run with the same settings left."""
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text("utf-8"))
    return found["results"] if found["settings"] == settings else []


def summary(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, smallest and largest over seeds, for each mode; of a run its mean over layers, or its worst layer."""
    modes = list(dict.fromkeys(result["mode"] for result in results))
    out: dict[str, dict[str, dict[str, float]]] = {}
    for mode in modes:
        after = [result["after"] for result in results if result["mode"] == mode]
        figures = {
            "experts_in_use": [math.fsum(found["experts_in_use"]) / len(found["experts_in_use"]) for found in after],
            "fewest_in_use": [min(found["experts_in_use"]) for found in after],
            "largest_share": [max(found["largest_share"]) for found in after],
            "loss": [found["loss"] for found in after],
        }
        out[mode] = {
            name: {"mean": math.fsum(values) / len(values), "min": min(values), "max": max(values)}
            for name, values in figures.items()
        }
        out[mode]["seeds"] = {"count": len(after)}
    return out


def write(path: Path, settings: dict[str, Any], results: list[dict[str, Any]]) -> None:
    machine = {"system": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    figures = {"settings": settings, "machine": machine, "results": results, "summary": summary(results)}
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def tell(result: dict[str, Any]) -> None:
    after = result["after"]
    used = ", ".join(f"{value:.1f}" for value in after["experts_in_use"])
    largest = ", ".join(f"{value:.0%}" for value in after["largest_share"])
    print(
        f"{result['mode']:<13} seed {result['seed']}  loss {after['loss']:.3f}  experts in use {used}  "
        f"largest {largest}  ({result['seconds']:.0f} s)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file; default: made-up words")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--lot", type=int, default=256)
    parser.add_argument("--records", type=int, default=12000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--clip", type=float, default=0.5)
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--coefficient", type=float, help="of the balance loss; default: the library's")
    parser.add_argument("--bias-step", type=float, help="of `bias`; default: the library's")
    parser.add_argument("--load-share", type=float, default=0.1)
    parser.add_argument("--smoothing", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    args = parser.parse_args()
    size = (args.records + 256) * TOKENS
    text = args.text.read_bytes()[:size] if args.text else made_up_text(size)
    records = records_of(text)
    train, held_out = records[:-256], records[-256:]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    fixed = {name: settings[name] for name in settings.keys() - {"json", "modes", "seeds"}}
    results = earlier(args.json, fixed)
    done = {(result["mode"], result["seed"]) for result in results}
    with TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for mode in args.modes:
                if (mode, seed) in done:
                    continue
                result = run(mode, seed, train, held_out, Path(folder), args)
                results.append(result)
                tell(result)
                if args.json:
                    write(args.json, fixed, results)
    print(json.dumps(summary(results), indent=1))


if __name__ == "__main__":
    main()
