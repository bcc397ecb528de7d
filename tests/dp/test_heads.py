"""The default loss of every head is the model's own loss on a batch of each record alone, or it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from coterie import dp
from coterie.dp.losses import check_own_loss, default_loss
from coterie.errors import PrivacyError

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
    "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "n_embd": 16, "n_layer": 1, "n_head": 2, "emb_dim": 16,
    "n_positions": 64, "max_position_embeddings": 64, "d_inner": 24, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 0, "num_labels": 3,
}  # fmt: skip
IDS = torch.tensor([[5, 9, 7, 3, 8, 2], [11, 4, 4, 30, 6, 2]])
TOKENS = torch.tensor([[-100, 9, 7, -100, 8, 2], [11, 4, 4, 30, -100, -100]])
HERE = {"start_positions": torch.tensor([0, 3]), "end_positions": torch.tensor([2, 5])}
TAGS = torch.tensor([[0, 1, 2, -100, 0, 1], [-100, 2, 2, 1, 0, -100]])


def model(name: str, **more: Any) -> Any:
    cls = getattr(transformers, name)
    known = set(dir(cls.config_class())) | {"num_labels", "decoder_start_token_id"}
    if name.startswith("XLNet"):
        known.discard("max_position_embeddings")
    if "Answering" in name:
        more = {"num_labels": 2} | more
    config = cls.config_class(**{k: v for k, v in (SIZES | more).items() if k in known or k in more})
    config.pad_token_id = 0
    torch.manual_seed(0)
    return cls(config).eval()


def batch(**targets: Tensor) -> dict[str, Tensor]:
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **targets}


def own(net: Any, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.stack([net(**{k: v[i : i + 1] for k, v in given.items()}).loss.float() for i in range(2)])


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("Qwen3MoeForCausalLM", {"labels": TOKENS}),
        ("GPT2LMHeadModel", {"labels": TOKENS}),
        ("BartForCausalLM", {"labels": TOKENS}),
        ("XLNetLMHeadModel", {"labels": TOKENS}),
        ("BertForMaskedLM", {"labels": TOKENS}),
        ("XLMWithLMHeadModel", {"labels": TOKENS}),
        ("T5ForConditionalGeneration", {"labels": TOKENS}),
        ("MBartForConditionalGeneration", {"labels": TOKENS.abs() % 59 + 1}),
        ("MarianMTModel", {"labels": TOKENS}),
        ("Qwen3MoeForTokenClassification", {"labels": TAGS}),
        ("DistilBertForTokenClassification", {"labels": TAGS}),
        ("T5ForTokenClassification", {"labels": TAGS}),
        ("MixtralForQuestionAnswering", HERE),
        ("BartForQuestionAnswering", {name: value[:, None] for name, value in HERE.items()}),
        ("XLMForQuestionAnsweringSimple", HERE),
        ("BertForNextSentencePrediction", {"labels": torch.tensor([0, 1])}),
        ("BartForSequenceClassification", {"labels": torch.tensor([2, 0])}),
        ("DebertaV2ForSequenceClassification", {"labels": torch.tensor([2, 0])}),
    ],
)  # fmt: skip
def test_the_default_loss_is_the_model_s_own(name: str, targets: dict[str, Tensor]) -> None:
    net, given = model(name), batch(**targets)
    assert torch.allclose(default_loss(net, given), own(net, given), atol=1e-4)
    check_own_loss(net, {k: v[:1] for k, v in given.items()})


@pytest.mark.parametrize("cls", ["Qwen3MoeForSequenceClassification", "BertForSequenceClassification"])
@pytest.mark.parametrize(
    ("problem", "outputs", "labels"),
    [
        (None, 1, torch.tensor([0.5, -2.0])),
        (None, 3, torch.tensor([2, 0])),
        (None, 3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
        ("regression", 1, torch.tensor([[0.5], [-2.0]])),
        ("regression", 2, torch.tensor([[0.5, 3.0], [-2.0, 1.0]])),
        ("multi_label_classification", 1, torch.tensor([[1.0], [0.0]])),
        ("multi_label_classification", 2, torch.tensor([[1.0, 0.0], [1.0, 1.0]])),
        ("single_label_classification", 2, torch.tensor([1, 0])),
        ("single_label_classification", 2, torch.tensor([[1], [0]])),
    ],
)
def test_a_classifier_s_loss_is_what_its_problem_type_says(
    cls: str, problem: str | None, outputs: int, labels: Tensor
) -> None:
    net, given = model(cls, num_labels=outputs, problem_type=problem), batch(labels=labels)
    ours = default_loss(net, given)
    assert net.config.problem_type == problem
    assert torch.allclose(ours, own(net, given), atol=1e-5)


def test_multiple_choice_is_cross_entropy_over_the_choices() -> None:
    net = model("BertForMultipleChoice")
    ids = torch.stack([IDS, IDS.flip(1), IDS.roll(1, 1)], 1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([2, 0])}
    assert torch.allclose(default_loss(net, given), own(net, given), atol=1e-5)


def test_an_answer_s_loss_does_not_depend_on_padding() -> None:
    net = model("BertForQuestionAnswering")
    given = batch(**HERE)
    longer = dict(given)
    for name in ("input_ids", "attention_mask"):
        longer[name] = torch.cat([given[name], torch.zeros(2, 5, dtype=torch.long)], 1)
    assert torch.allclose(default_loss(net, longer), own(net, given), atol=1e-4)


@pytest.mark.parametrize(
    "name", ["BertForPreTraining", "ElectraForPreTraining", "BertModel", "FSMTForConditionalGeneration"]
)
def test_a_head_without_a_loss_for_each_record_is_refused(name: str) -> None:
    with pytest.raises(PrivacyError, match=f"{name} has no default loss") as caught:
        default_loss(model(name), batch(labels=IDS))
    assert caught.value.code == "dp-loss-head"


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("Qwen3MoeForCausalLM", torch.tensor([1, 0])),  # class numbers in front of a language model
        ("BertForTokenClassification", torch.tensor([1, 0])),
        ("BertForSequenceClassification", TAGS),
        ("BertForSequenceClassification", torch.tensor([1.0, 0.0])),
    ],
)
def test_labels_of_another_head_are_refused(name: str, labels: Tensor) -> None:
    with pytest.raises(PrivacyError, match=r"`labels` .* do not fit outputs"):
        default_loss(model(name), batch(labels=labels))


def test_a_question_answerer_without_positions_is_told_which() -> None:
    with pytest.raises(PrivacyError, match="has no `start_positions`"):
        default_loss(model("BertForQuestionAnswering"), batch(labels=IDS))


class Own(transformers.BertForMaskedLM):
    """Named like a masked language model, with a loss of its own."""

    def forward(self, labels: Any = None, **inputs: Any) -> Any:
        outputs = super().forward(labels=labels, **inputs)
        outputs.loss = 2 * outputs.loss if labels is not None else None
        return outputs


def test_a_loss_of_its_own_under_a_common_name_is_found_before_training() -> None:
    net = Own(model("BertForMaskedLM").config)
    with pytest.raises(PrivacyError, match="not what Own itself computes"):
        check_own_loss(net, {k: v[:1] for k, v in batch(labels=TOKENS).items()})


@pytest.mark.parametrize("name", ["Qwen3MoeForTokenClassification", "BertForQuestionAnswering"])
def test_taggers_and_answerers_train_with_exact_norms(name: str, tmp_path: Any) -> None:
    net = model(name)
    data = [
        {"input_ids": row, "attention_mask": torch.ones_like(row)}
        | ({"labels": row % 3} if "Token" in name else {"start_positions": row[0] % 3, "end_positions": row[1] % 5})
        for row in torch.randint(3, 60, (24, 6), generator=torch.Generator().manual_seed(0))
    ]
    session = dp.make_private(
        net, torch.optim.SGD(net.parameters(), 0.1), data, budget=dp.Budget(8.0, 1e-3), lot_size=6, rounds=1,
        ledger=tmp_path,
    )  # fmt: skip
    with session:
        session.step(session.next_lot())
    given = transformers.default_data_collator(data[:2])
    trained = [p for p in net.eval().parameters() if p.requires_grad]
    found = []
    for i in range(2):
        loss = net(**{k: v[i : i + 1] for k, v in given.items()}).loss
        grads = torch.autograd.grad(loss, trained, allow_unused=True)
        found.append(torch.stack([g.square().sum() for g in grads if g is not None]).sum().sqrt())
    assert torch.allclose(dp.per_sample_norms(net, given), torch.stack(found), rtol=1e-4)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 3)

    def forward(self, input_ids: Tensor) -> Any:
        return transformers.modeling_outputs.ModelOutput(logits=self.table(input_ids).mean(1))


def test_a_module_of_one_s_own_with_a_row_of_outputs_is_a_classifier() -> None:
    net, labels = Plain(), torch.tensor([2, 0])
    expected = nn.functional.cross_entropy(net.table(IDS).mean(1), labels, reduction="none")
    assert torch.allclose(default_loss(net, {"input_ids": IDS, "labels": labels}), expected)
