"""Collators that draw at random: each record's draws are its own, or the collator couples records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from coterie.dp.checks.draws import RowDraws
from coterie.errors import NoRuleError
from coterie.hf import PrivateTrainer

SPECIAL = ["[PAD]", "[UNK]", "[MASK]", "[CLS]", "[SEP]"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(55))])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", cls_token="[CLS]",
        sep_token="[SEP]",
    )  # fmt: skip


def masked(tokenizer: PreTrainedTokenizerFast, folder: Path, collator: Any, **options: Any) -> PrivateTrainer:
    config = BertConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    rows = [{"input_ids": torch.randint(5, 60, (6 + i % 7,)).tolist()} for i in range(24)]
    privacy = {"epsilon": 6.0, "delta": 1e-3, "lot_size": 8, "ledger": folder / "ledger"}
    arguments = TrainingArguments(
        str(folder / "out"), max_steps=2, per_device_train_batch_size=4, save_strategy="no", use_cpu=True,
        disable_tqdm=True, max_grad_norm=0,
    )  # fmt: skip
    return PrivateTrainer(
        BertForMaskedLM(config), arguments, train_dataset=datasets.Dataset.from_list(rows), data_collator=collator,
        privacy=privacy | {"provenance": {"weights": "public"}} | options,
    )  # fmt: skip


def test_a_masked_language_model_trains_with_the_collator_of_transformers(tokenizer, tmp_path: Path):
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.4)
    trainer = masked(tokenizer, tmp_path, collator)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_collator_whose_draws_follow_the_first_record_is_still_refused(tokenizer, tmp_path: Path):
    plain = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.4)

    def coupled(records: list[Any]) -> dict[str, Any]:
        batch = dict(plain(records))
        keep = torch.arange(batch["labels"].shape[1]) % (2 + int(records[0]["input_ids"][0]) % 3) == 0
        batch["labels"] = batch["labels"].masked_fill(~keep, -100)
        return batch

    with pytest.raises(NoRuleError, match="changes with"):
        masked(tokenizer, tmp_path, coupled).train()


def test_a_row_draws_the_same_beside_others_and_at_any_length():
    def draw(seeds: list[int], length: int) -> list[torch.Tensor]:
        shape = (len(seeds), length)
        with RowDraws(seeds):
            return [
                torch.rand(shape),
                torch.bernoulli(torch.full(shape, 0.3)),
                torch.randint(60, shape),
                torch.randint(5, 60, shape),
                torch.empty(shape).uniform_(-1, 1),
            ]

    for together, alone in zip(draw([3, 8, 5], 19), draw([8], 7), strict=True):
        assert torch.equal(together[1, :7], alone[0])


def test_rows_are_drawn_as_the_operation_says():
    with RowDraws([1, 2]):
        chance, whole, low = (
            torch.bernoulli(torch.full((2, 40_000), 0.15)),
            torch.randint(60, (2, 40_000)),
            torch.randint(5, 9, (2, 40_000)),
        )
    assert abs(float(chance.mean()) - 0.15) < 0.01
    assert set(whole.unique().tolist()) == set(range(60))
    assert low.unique().tolist() == [5, 6, 7, 8]
    assert not torch.equal(chance[0], chance[1])
