"""A head that predicts masked words, for an encoder that came without one, trained on public text.

    python benchmarks/masked_language_model.py --encoder minilm --text valid.txt test.txt --out mlm

Sentence encoders are published without the head of their language model, so classes cannot be asked of them as words.
Here encoder and head are trained to predict masked tokens (15 %, as BERT was) and written as an ordinary checkpoint,
`BertForMaskedLM`, which `coterie upcycle` takes and `sst2.py --reads words` trains privately. Embeddings stay frozen;
the head's words are theirs. The last twentieth of the text is held out and measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, BertForMaskedLM, DataCollatorForLanguageModeling

from sst2_text import checkpoint_folder

LENGTH, BATCH, HELD_OUT = 128, 32, 0.05


def pieces(tokenizer: Any, files: list[Path]) -> list[list[int]]:
    """Texts of files, cut into sequences of LENGTH tokens; headings and blank lines are left out."""
    ids: list[int] = []
    for file in files:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
        text = [line for line in lines if line and not line.startswith("=")]
        ids += [token for own in tokenizer(text, add_special_tokens=False)["input_ids"] for token in own]
    size = LENGTH - 2
    return [
        [tokenizer.cls_token_id, *ids[at : at + size], tokenizer.sep_token_id]
        for at in range(0, len(ids) - size + 1, size)
    ]


def masked(collate: Any, sequences: list[list[int]], order: list[int]) -> Iterator[dict[str, Tensor]]:
    for at in range(0, len(order), BATCH):
        yield collate([{"input_ids": sequences[i]} for i in order[at : at + BATCH]])


def loss_and_right(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the masked tokens, and the share of them that is the likeliest word."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden_BTD = model.bert(input_ids=batch["input_ids"]).last_hidden_state
    is_masked = batch["labels"] != -100
    logits_MV, words_M = model.cls(hidden_BTD[is_masked].float()), batch["labels"][is_masked]
    return F.cross_entropy(logits_MV, words_M), (logits_MV.argmax(1) == words_M).float().mean()


@torch.no_grad()
def measure(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    model.eval()
    found = torch.tensor([[float(value) for value in loss_and_right(model, batch)] for batch in batches]).mean(0)
    return {"loss": float(found[0]), "right": float(found[1])}


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="a BERT checkpoint folder, or minilm")
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="public text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(given)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    folder, _ = checkpoint_folder(args.encoder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = BertForMaskedLM.from_pretrained(folder)
    model.bert.embeddings.requires_grad_(False)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    sequences = pieces(tokenizer, args.text)
    held = max(1, round(HELD_OUT * len(sequences)))
    training, tested = sequences[:-held], sequences[-held:]
    test = list(masked(collate, tested, list(range(held))))
    reports = [measure(model, test)]
    print(f"{len(training)} sequences of {LENGTH} tokens; held out {held}; before: {reports[0]}", flush=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], args.lr, weight_decay=0.01)
    steps = args.epochs * -(-len(training) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / (0.1 * steps), 1 - done / steps)
    )
    began = time.process_time()
    for epoch in range(args.epochs):
        model.train()
        for batch in masked(collate, training, torch.randperm(len(training)).tolist()):
            loss, _ = loss_and_right(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        reports.append(measure(model, test))
        print(f"epoch {epoch + 1}: {reports[-1]}  ({time.process_time() - began:.0f} CPU s)", flush=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    if args.json:
        args.json.write_text(json.dumps({"epochs": reports, "lr": args.lr, "seed": args.seed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
