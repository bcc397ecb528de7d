"""Configs whose sizes do not fit each other: refused where a model is read, in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from coterie import dp
from coterie.cli.app import main
from coterie.cli.explain import explained
from coterie.config import ModelSpec
from coterie.dp.losses import default_loss
from coterie.errors import ModelError
from coterie.models.zoo.build import build_model
from coterie.models.zoo.tiny import tiny_model

BASE: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None, "num_experts_per_tok": 2,
}  # fmt: skip
LATENT = {
    "n_routed_experts": 4, "moe_intermediate_size": 8, "n_shared_experts": 1, "first_k_dense_replace": 0,
    "n_group": 2, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 4,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 4},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "deepseek_v3": LATENT,
    "deepseek_v2": {**LATENT, "topk_method": "group_limited_greedy"},
}


def spec(family: str, **changes: object) -> ModelSpec:
    return ModelSpec(family=family, config={**BASE, **FAMILIES[family], **changes})


@pytest.mark.parametrize(
    ("family", "changes", "code"),
    [
        ("olmoe", {"num_experts_per_tok": 5}, "model-top-k"),
        ("olmoe", {"num_experts_per_tok": 0}, "model-top-k"),
        ("olmoe", {"num_experts_per_tok": -1}, "model-top-k"),
        ("mixtral", {"num_experts_per_tok": 5}, "model-top-k"),
        ("deepseek_v3", {"num_experts_per_tok": 3}, "model-expert-groups"),
        ("deepseek_v3", {"n_group": 3}, "model-expert-groups"),
        ("deepseek_v3", {"n_group": 0}, "model-expert-groups"),
        ("deepseek_v3", {"topk_group": 3}, "model-expert-groups"),
        ("deepseek_v3", {"topk_group": 0}, "model-expert-groups"),
        ("deepseek_v3", {"n_group": 4, "topk_group": 4}, "model-expert-groups"),
        ("deepseek_v2", {"num_experts_per_tok": 3}, "model-expert-groups"),
        ("deepseek_v2", {"n_group": None}, "model-expert-groups"),
        ("olmoe", {"num_experts": 0}, "model-sizes"),
        ("olmoe", {"intermediate_size": 0}, "model-sizes"),
        ("olmoe", {"hidden_size": 0}, "model-sizes"),
        ("olmoe", {"vocab_size": 0}, "model-sizes"),
        ("olmoe", {"num_attention_heads": 0}, "model-sizes"),
        ("mixtral", {"num_attention_heads": 4, "num_key_value_heads": 3}, "model-sizes"),
        ("qwen2_moe", {"shared_expert_intermediate_size": -1}, "model-bad-setting"),
        ("qwen2_moe", {"moe_intermediate_size": -3}, "model-bad-setting"),
        ("deepseek_v3", {"n_shared_experts": -1}, "model-bad-setting"),
    ],
)
@pytest.mark.parametrize("meta", [True, False])
def test_sizes_that_do_not_fit_are_one_sentence(family: str, changes: dict[str, Any], code: str, meta: bool) -> None:
    with pytest.raises(ModelError) as caught:
        build_model(spec(family, **changes), meta=meta, seed=0)
    assert caught.value.code == code
    assert explained(code)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("olmoe", {"num_experts_per_tok": 4}),
        ("deepseek_v3", {}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 4}),
        ("deepseek_v2", {"n_group": 4, "topk_group": 2}),
        ("deepseek_v2", {"topk_method": "greedy", "n_group": 3}),
    ],
)
def test_sizes_that_fit_train(family: str, changes: dict[str, Any]) -> None:
    model = build_model(spec(family, **changes), seed=0).train()
    ids = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    default_loss(model, {"input_ids": ids, "labels": ids}).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_a_checkpoint_whose_config_was_changed_by_hand_is_refused_by_every_command_that_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    tiny_model("olmoe", vocab_size=300).save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 9'))
    assert "9" in config.read_text()
    (tmp_path / "text.txt").write_text("river stone wind rain\n" * 20)
    model = {"path": str(folder), "provenance": "public"}
    train = {
        "model": model,
        "data": {
            "train": [str(tmp_path / "text.txt")],
            "sequence_length": 8,
            "tokenizer": {"train": {"files": [str(tmp_path / "text.txt")], "vocab_size": 300}},
        },
        "train": {"rounds": 1},
        "run_dir": str(tmp_path / "run"),
    }
    federation = {
        "name": "grove",
        "model": model,
        "parties": {name: {"endpoint": f"127.0.0.1:{7000 + at}"} for at, name in enumerate(("alder", "birch"))},
        "coordinator": {"endpoint": "127.0.0.1:7999"},
        "train": {"rounds": 1},
        "privacy": "none",
    }
    for name, settings in (("train", train), ("federation", federation)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    for arguments in (
        ["train", f"{tmp_path}/train.yaml"],
        ["plan", f"{tmp_path}/train.yaml"],
        ["plan", f"{tmp_path}/federation.yaml"],
        ["split", "--federation", f"{tmp_path}/federation.yaml", "--out", f"{tmp_path}/parts"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 1, arguments
        said = capsys.readouterr().err
        assert "`num_experts_per_tok` is 9" in said, arguments
        assert "model-top-k" in said, arguments
    assert not (tmp_path / "parts").exists()


def test_make_private_refuses_a_model_of_ones_own_whose_config_was_changed(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    model.config.num_experts_per_tok = 9
    rows = [{"input_ids": torch.arange(6), "labels": torch.arange(6)} for _ in range(8)]
    with pytest.raises(ModelError) as caught:
        dp.make_private(
            model, torch.optim.SGD(model.parameters(), 0.1), rows, budget=dp.Budget(8.0, 1e-3), lot_size=2, rounds=2,
            ledger=tmp_path,
        )  # fmt: skip
    assert caught.value.code == "model-top-k"
    assert not list(tmp_path.glob("**/*.jsonl")), "nothing is spent"
