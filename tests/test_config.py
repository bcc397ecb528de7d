"""Settings files: every problem is reported, with its line; what is loaded cannot change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pydantic
import pytest

from coterie.config import (
    DataSpec,
    FederationConfig,
    FederationTrainSpec,
    MemberAddress,
    ModelSpec,
    OptimSpec,
    PartyConfig,
    PrivacyRules,
    PrivacySpec,
    Spec,
    TokenizerSpec,
    TrainConfig,
    TrainSpec,
    content_hash,
    due,
    dump_yaml,
    load_yaml,
    party_privacy,
)
from coterie.errors import ConfigError

TRAIN = """\
model:
  family: olmoe
data:
  train: [private.jsonl]
  tokenizer: {train: {files: [public.txt]}}
train:
  rounds: 10
run_dir: run
"""

FEDERATION = """\
name: trio
model: {path: start}
parties:
  alder: {endpoint: "127.0.0.1:7001"}
  birch: {endpoint: "127.0.0.1:7002"}
coordinator: {endpoint: "127.0.0.1:7000"}
train: {rounds: 5}
"""

PARTY = """\
party: alder
federation: federation.yaml
kit: kit
data: {train: a.jsonl}
trunk: trunk.safetensors
shard: shard.safetensors
run_dir: run
"""


def load(folder: Path, text: str, model: type[Spec]) -> Any:
    path = folder / "settings.yaml"
    path.write_text(text)
    return load_yaml(path, model)


def refusal(folder: Path, text: str, model: type[Spec] = TrainConfig) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, model)
    return caught.value


def test_paths_start_from_the_folder_of_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, TRAIN, TrainConfig)
    assert config.data.train == (tmp_path / "private.jsonl",)
    assert config.data.tokenizer.train.files == (tmp_path / "public.txt",)
    assert config.run_dir == tmp_path / "run"
    absolute = load(tmp_path, TRAIN.replace("private.jsonl", "/data/private.jsonl"), TrainConfig)
    assert absolute.data.train == (Path("/data/private.jsonl"),)


def test_settings_cannot_be_changed_after_loading(tmp_path: Path) -> None:
    config = load(tmp_path, TRAIN, TrainConfig)
    with pytest.raises(pydantic.ValidationError):
        config.train.rounds = 3


def test_an_unknown_key_is_refused_with_line_section_and_guess(tmp_path: Path) -> None:
    error = refusal(tmp_path, TRAIN.replace("  rounds: 10", "  rounds: 10\n  batch_sise: 4"))
    assert error.code == "config-unknown-key"
    assert error.message == "`train.batch_sise` is not a setting."
    assert error.where == "settings.yaml:8, section train"
    assert error.fix is not None
    assert error.fix.startswith("did you mean `batch_size`? allowed here: batch_size, checkpoint_every")


def test_a_key_in_the_wrong_section_is_sent_to_the_right_one(tmp_path: Path) -> None:
    error = refusal(tmp_path, TRAIN.replace("  rounds: 10", "  rounds: 10\n  warmup_rounds: 4"))
    assert error.fix is not None
    assert error.fix.startswith("it belongs in `optim`.")


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    text = (
        TRAIN.replace("rounds: 10", "rounds: 0").replace("family: olmoe", "familly: olmoe").replace("run_dir", "dir")
    )
    message = refusal(tmp_path, text).message
    for part in (
        "settings.yaml:2, section model: `model.familly` is not a setting; did you mean `family`?",
        "settings.yaml:7, section train: `train.rounds`: input should be greater than 0 (got 0)",
        "settings.yaml:8: `dir` is not a setting; did you mean `run_dir`?",
        "`run_dir` is missing",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            ("family: olmoe", "family: olmoe\n  path: x"),
            "exactly one of `path`, `hub`, `family` (found: path and family)",
        ),
        (("family: olmoe", "config: {}"), "exactly one of `path`, `hub`, `family` (found: none)"),
        (("family: olmoe", "family: olmoe\n  revision: main"), "`revision` belongs to `hub`"),
        (("tokenizer: {train: {files: [public.txt]}}", "sequence_length: 1"), "greater than or equal to 2 (got 1)"),
        (("tokenizer: {train: {files: [public.txt]}}", "packing: pages"), "'chunks', 'records' or 'documents'"),
        (("rounds: 10", "rounds: ten"), "must be a whole number"),
        (("run_dir: run", "run_dir: run\noptim: {lr: .nan}"), "`optim.lr`"),
        (("run_dir: run", "run_dir: run\noptim: {betas: [0.9, 1.0]}"), "in [0, 1)"),
        (("run_dir: run", "run_dir: run\nprivacy: {epsilon: 0}"), "greater than 0 (got 0)"),
        (("run_dir: run", "run_dir: run\nprivacy: {epsilon: 8, clip_norm: -1}"), "greater than 0 (got -1)"),
        (("run_dir: run", "run_dir: run\nprivacy: {epsilon: 8, delta: 1}"), "less than 1 (got 1)"),
        (("run_dir: run", "run_dir: run\nprivacy: {epsilon: 8, unit: user}"), "`user_column` belong together"),
        (("run_dir: run", "run_dir: run\nprivacy: {epsilon: 8, max_lot: 9}"), "`sampler: truncated_poisson` belong"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_in_words(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    assert words in refusal(tmp_path, TRAIN.replace(*change)).message


def test_private_training_asks_where_its_starting_weights_come_from(tmp_path: Path) -> None:
    text = TRAIN.replace("family: olmoe", "path: start") + "privacy: {epsilon: 8}\n"
    assert "declare `model.provenance`" in refusal(tmp_path, text).message
    load(tmp_path, text.replace("path: start", "path: start\n  provenance: public"), TrainConfig)


def test_private_training_refuses_sequences_that_mix_documents(tmp_path: Path) -> None:
    text = TRAIN.replace("train: [private.jsonl]", "train: [private.jsonl]\n  packing: documents")
    load(tmp_path, text, TrainConfig)
    assert "mixes records" in refusal(tmp_path, text + "privacy: {epsilon: 8}\n").message


def test_words_that_yaml_11_takes_for_booleans_stay_words(tmp_path: Path) -> None:
    config = load(tmp_path, TRAIN + "privacy: {epsilon: 8, balance: off, delta: 1e-6}\n", TrainConfig)
    assert config.privacy.balance == "off"
    assert config.privacy.delta == 1e-6


@pytest.mark.parametrize(
    ("text", "code", "where"),
    [
        ("model: [1\ntrain: 2", "config-yaml", ":2"),
        ("model: {family: a}\nmodel: {family: b}", "config-duplicate-key", ":1"),
        ("- a\n- b", "config-empty", ""),
        ("", "config-empty", ""),
    ],
)
def test_a_file_that_is_not_settings_is_refused(tmp_path: Path, text: str, code: str, where: str) -> None:
    error = refusal(tmp_path, text)
    assert error.code == code
    assert where in (error.where or "")


def test_a_missing_file_and_binary_noise_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no settings file .*nowhere\.yaml"):
        load_yaml(tmp_path / "nowhere.yaml", TrainConfig)
    noise = tmp_path / "noise.yaml"
    noise.write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_yaml(noise, TrainConfig)


def test_written_settings_are_read_back_equal(tmp_path: Path) -> None:
    text = TRAIN.replace("family: olmoe", "family: olmoe\n  config: {rope_theta: 1e6, tie: false}")
    config = load(tmp_path, text + "privacy: {epsilon: 8, balance: bias, delta: 1e-7}\n", TrainConfig)
    dump_yaml(tmp_path / "again.yaml", config)
    assert load_yaml(tmp_path / "again.yaml", TrainConfig) == config


def test_exchange_defaults_to_experts_which_asks_for_privacy(tmp_path: Path) -> None:
    assert "needs `privacy`: a budget, or the word `none`" in refusal(tmp_path, FEDERATION, FederationConfig).message
    assert load(tmp_path, FEDERATION + "privacy: none\n", FederationConfig).exchange == "experts"
    assert load(tmp_path, FEDERATION + "privacy: {epsilon: 8}\n", FederationConfig).privacy.epsilon == 8.0
    assert load(tmp_path, FEDERATION + "exchange: tokens\n", FederationConfig).privacy is None


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ("exchange: tokens\nprivacy: {epsilon: 8}", "cannot keep a privacy budget"),
        ("exchange: tokens\ntrunk: shared", "`trunk: shared` needs"),
        ("privacy: {epsilo: 8}", "did you mean `epsilon`?"),
        ("privacy: maybe", "block of settings"),
        ("privacy: none\nplacement: {0: {0: elm}}", "placement names elm: no such party"),
        ("privacy: none\nplacement: random", "'round_robin'"),
        ("privacy: none\ndeadline_s: 0", "greater than 0"),
    ],
)
def test_federation_settings_that_contradict_are_refused(tmp_path: Path, added: str, words: str) -> None:
    error = refusal(tmp_path, FEDERATION + added + "\n", FederationConfig)
    assert words in str(error)


def test_a_block_with_a_mistake_is_not_also_reported_as_not_being_another_kind(tmp_path: Path) -> None:
    message = refusal(tmp_path, FEDERATION + "privacy: {epsilo: 8}\n", FederationConfig).message
    assert message.startswith("settings.yaml has 2 problems:")
    assert "'none'" not in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("7002", "7001"), "`alder` and `birch` both listen on 127.0.0.1:7001"),
        (("7002", "70000"), "'127.0.0.1:70000' is not `host:port`"),
        (('"127.0.0.1:7002"', "localhost"), "'localhost' is not `host:port`"),
        (("birch", "Birch"), "'Birch' is not a name"),
    ],
)
def test_addresses_and_names_are_checked(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    text = FEDERATION.replace(*change) + "exchange: tokens\n"
    assert words in refusal(tmp_path, text, FederationConfig).message


def test_an_explicit_placement_is_read_with_integer_layers_and_experts(tmp_path: Path) -> None:
    config = load(tmp_path, FEDERATION + "exchange: tokens\nplacement: {0: {0: alder, 1: birch}}\n", FederationConfig)
    assert config.placement == {0: {0: "alder", 1: "birch"}}


def test_two_hosts_cannot_claim_one_expert(tmp_path: Path) -> None:
    """Wherever the second claim stands, YAML would quietly take the last one."""
    for claims in ("{0: {0: alder, 0: birch}}", "{0: {0: alder}, 0: {0: birch}}"):
        error = refusal(tmp_path, FEDERATION + f"privacy: none\nplacement: {claims}\n", FederationConfig)
        assert error.code == "config-duplicate-key"
        assert "placement.0" in error.message


def test_the_hash_is_the_same_wherever_the_file_lies_and_changes_with_any_setting(tmp_path: Path) -> None:
    text = FEDERATION + "exchange: tokens\n"
    hashes = set()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        hashes.add(load(tmp_path / name, text, FederationConfig).content_hash())
    reordered = "exchange: tokens\n" + FEDERATION
    hashes.add(load(tmp_path, reordered, FederationConfig).content_hash())
    assert len(hashes) == 1
    for change in (("rounds: 5", "rounds: 6"), ("7002", "7003"), ("path: start", "path: other")):
        hashes.add(load(tmp_path, text.replace(*change), FederationConfig).content_hash())
    assert len(hashes) == 4


def federation_and_party(folder: Path, rules: str, own: str, provenance: str = "public") -> tuple[Any, Any]:
    text = FEDERATION.replace("path: start", f"path: start, provenance: {provenance}")
    federation = load(folder, text + rules + "\n", FederationConfig)
    return federation, load(folder, PARTY + own + "\n", PartyConfig)


def test_a_party_trains_under_the_shared_rules_and_its_own_smaller_budget(tmp_path: Path) -> None:
    pair = federation_and_party(
        tmp_path, "privacy: {epsilon: 8, clip_norm: 2}", "privacy: {epsilon: 3, seeded: true}"
    )
    spec = party_privacy(*pair)
    assert isinstance(spec, PrivacySpec)
    assert (spec.epsilon, spec.clip_norm, spec.seeded) == (3.0, 2.0, True)
    assert spec.lot_size == pair[0].train.batch_size


@pytest.mark.parametrize(
    ("rules", "own", "words"),
    [
        ("privacy: {epsilon: 8}", "privacy: {epsilon: 9}", "asks for epsilon 9.0, above the agreed 8.0"),
        ("privacy: {epsilon: 8}", "privacy: none", "did not agree on `mixed_privacy`"),
        ("privacy: none", "privacy: {epsilon: 1}", "trains without privacy"),
        ("privacy: {epsilon: 8, unit: user}", "", "must name `privacy.user_column`"),
    ],
)
def test_a_party_cannot_weaken_the_shared_rules(tmp_path: Path, rules: str, own: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        party_privacy(*federation_and_party(tmp_path, rules, own))
    assert words in caught.value.message


def test_a_party_without_privacy_is_possible_only_where_agreed(tmp_path: Path) -> None:
    pair = federation_and_party(tmp_path, "privacy: {epsilon: 8}\nmixed_privacy: true", "privacy: none")
    assert party_privacy(*pair) is None
    assert party_privacy(*federation_and_party(tmp_path, "privacy: none", "")) is None


def models_below(model: type[pydantic.BaseModel]) -> set[type[pydantic.BaseModel]]:
    from coterie.config.load import specs_in

    inner = {spec for field in model.model_fields.values() for spec in specs_in(field.annotation)}
    return {model}.union(*(models_below(spec) for spec in inner))


@pytest.mark.parametrize("root", [TrainConfig, FederationConfig, PartyConfig])
def test_every_setting_has_a_description_and_refuses_unknown_keys(root: type[Spec]) -> None:
    for model in models_below(root):
        assert model.model_config.get("frozen")
        assert model.model_config.get("extra") == "forbid"
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


def test_the_reference_page_is_current() -> None:
    script = Path(__file__).parent.parent / "docs" / "generate_reference.py"
    subprocess.run([sys.executable, str(script), "--check", "config"], check=True)


def written(folder: Path, more: str, name: str = "train.yaml") -> Path:
    path = folder / name
    path.write_text(TRAIN + more)
    return path


def test_merge_keys_bring_settings_that_the_block_itself_may_replace(tmp_path: Path):
    text = TRAIN.replace("  rounds: 10\n", "  <<: [{rounds: 3, seed: 5}, {rounds: 4, batch_size: 7}]\n  rounds: 10\n")
    path = tmp_path / "train.yaml"
    path.write_text(text)
    train = load_yaml(path, TrainConfig).train
    assert (train.rounds, train.seed, train.batch_size) == (10, 5, 7)
    path.write_text(TRAIN + "optim: &o {lr: 1e-3}\n")
    assert load_yaml(path, TrainConfig).optim.lr == 1e-3
    path.write_text(TRAIN.replace("  rounds: 10\n", "  <<: {rouns: 3}\n  rounds: 10\n"))
    with pytest.raises(ConfigError, match="rouns") as caught:
        load_yaml(path, TrainConfig)
    assert caught.value.where == "train.yaml:7, section train"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("more: &a [*a]\n", "refers to itself"),
        ("more: &a {b: {c: *a}}\n", "refers to itself"),
        ("more: &a\n  <<: *a\n", "refers to itself"),
        ("more: " + "[" * 3000 + "]" * 3000 + "\n", "nested too deeply"),
        ("more: " + "{a: " * 3000 + "1" + "}" * 3000 + "\n", "nested too deeply"),
        ("more: " + "- " * 3000 + "1\n", "not valid YAML"),
        (
            "a: &a [x]\n" + "".join(f"{k}: &{k} [{', '.join(['*' + chr(ord(k) - 1)] * 10)}]\n" for k in "bcdefgh"),
            "100,000",
        ),
        ("? [a, b]\n: 1\n", "not valid YAML"),
        ("? {a: b}\n: 1\n", "not valid YAML"),
        ("more: !!python/object/apply:os.system [x]\n", "not valid YAML"),
    ],
)
def test_a_file_that_never_ends_is_refused_in_a_sentence(tmp_path: Path, more: str, words: str):
    with pytest.raises(ConfigError) as caught:
        load_yaml(written(tmp_path, more), TrainConfig)
    assert words in str(caught.value)


def test_paths_count_from_the_folder_that_was_named(tmp_path: Path):
    for version in ("v1", "v2"):
        (tmp_path / "etc" / version / "deep").mkdir(parents=True)
        written(tmp_path / "etc" / version / "deep", "")
    link = tmp_path / "etc" / "train.yaml"
    link.symlink_to("v1/deep/train.yaml")
    linked_folder = tmp_path / "conf"
    linked_folder.symlink_to("etc/v2/deep")
    assert load_yaml(link, TrainConfig).run_dir == tmp_path / "etc" / "run"
    assert load_yaml(linked_folder / "train.yaml", TrainConfig).run_dir == linked_folder / "run"


def test_a_folder_whose_name_is_not_utf8_is_one_sentence(tmp_path: Path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    with pytest.raises(ConfigError) as caught:
        load_yaml(written(folder, ""), TrainConfig)
    assert caught.value.code == "config-path"
    str(caught.value).encode("utf-8")


def test_a_home_that_does_not_exist_is_said_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    path = tmp_path / "train.yaml"
    path.write_text(TRAIN.replace("run_dir: run", "run_dir: ~/run"))
    with pytest.raises(ConfigError, match="`~` stands for the home folder"):
        load_yaml(path, TrainConfig)


@pytest.mark.parametrize("written", ['""', '" "', '"ru\\0n"', '"\\ud83d"'])
def test_a_path_that_is_empty_or_that_no_file_can_have_is_refused(tmp_path: Path, written: str) -> None:
    (tmp_path / "train.yaml").write_text(TRAIN.replace("run_dir: run", f"run_dir: {written}"))
    with pytest.raises(ConfigError, match=r"`run_dir`") as caught:
        load_yaml(tmp_path / "train.yaml", TrainConfig)
    assert caught.value.code == "config-invalid"
    assert "train.yaml:8" in str(caught.value)


@pytest.mark.parametrize("written", ["9" * 5000, "0x" + "f" * 5000, "-" + "1" * 400])
def test_a_number_without_end_is_one_short_sentence(tmp_path: Path, written: str) -> None:
    (tmp_path / "train.yaml").write_text(TRAIN.replace("rounds: 10", f"rounds: {written}"))
    with pytest.raises(ConfigError, match=r"`train.rounds`") as caught:
        load_yaml(tmp_path / "train.yaml", TrainConfig)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("written", ["!!int ten", '!!int ""', "!!bool maybe", "!!timestamp soon", "!!float x"])
def test_a_tag_that_does_not_fit_its_value_is_one_sentence(tmp_path: Path, written: str) -> None:
    for text in (f"train: {{rounds: {written}}}", f"? {written}\n: 5"):
        (tmp_path / "train.yaml").write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_yaml(tmp_path / "train.yaml", TrainConfig)
        assert caught.value.code == "config-yaml"


@pytest.mark.parametrize(("done", "every", "wanted"), [(4, 2, True), (5, 2, False), (3, 3, True), (6, 0, False)])
def test_what_happens_every_so_many_rounds(done: int, every: int, wanted: bool) -> None:
    assert due(done, every) is wanted


def earlier_settings(**data: object) -> TrainConfig:
    return TrainConfig(
        model=ModelSpec(family="olmoe", config={"a": [1, {"b": 2}]}),
        data=DataSpec(
            train=(Path("/x/a.jsonl"),),
            tokenizer=TokenizerSpec(path=Path("/t/tok"), provenance="public"),
            **data,  # type: ignore[arg-type]
        ),
        train=TrainSpec(rounds=3),
        run_dir=Path("/tmp/r"),
        privacy=PrivacySpec(epsilon=8.0),
        optim=OptimSpec(betas=(0.9, 0.95)),  # as they were under a budget, too
    )


def test_keys_that_came_later_leave_the_hash_of_earlier_settings_as_it_was() -> None:
    """The digests are those of the version before `data.form`; run folders and signed rosters hold them."""
    without = {"run_dir", "device", "devices"}
    assert content_hash(earlier_settings(), without=without) == (
        "41a4b017b670f2fd7ba94556523c4576da2ab76f514059cbc48d9400abedf5a7"
    )
    agreed = FederationConfig(
        name="x",
        model=ModelSpec(family="olmoe"),
        parties={"a": MemberAddress(endpoint="h:1"), "b": MemberAddress(endpoint="h:2")},
        coordinator=MemberAddress(endpoint="h:3"),
        train=FederationTrainSpec(rounds=2),
        privacy=PrivacyRules(epsilon=1.0),
        optim=OptimSpec(betas=(0.9, 0.95)),
        placement={0: {1: "a", 2: "b"}},
    )
    assert agreed.content_hash() == "1bf675721d043f67ebb8d47a52d55ef09138bc2a91886f176ec1238d10e876e0"
    other = content_hash(earlier_settings(form="messages"), without=without)
    assert other != content_hash(earlier_settings(), without=without)
    assert other != content_hash(earlier_settings(packing="records"), without=without)


SHARED = "privacy: {epsilon: 8}\nnoise_multiplier: 1\nnoise: shared"


def masked(folder: Path, more: str, *, parties: int = 3, aggregation: str = "masked") -> FederationConfig:
    names = "".join(f"  party{i}: {{endpoint: 'localhost:{7500 + i}'}}\n" for i in range(parties))
    text = (
        f"name: grove\nmodel: {{family: olmoe}}\nparties:\n{names}"
        "coordinator: {endpoint: 'localhost:7400'}\n"
        f"train: {{rounds: 2, batch_size: 4}}\naggregation: {aggregation}\n{more}\n"
    )
    return load(folder, text, FederationConfig)


def test_masked_pushes_are_agreed_on_with_the_number_that_their_grid_needs(tmp_path: Path) -> None:
    found = masked(tmp_path, "privacy: {epsilon: 8}\nnoise_multiplier: 1.25")
    assert (found.aggregation, found.noise_multiplier) == ("masked", 1.25)
    assert masked(tmp_path, "privacy: none\npush_limit: 7").push_limit == 7.0
    with pytest.raises(ConfigError, match="`push_limit` is for `aggregation: masked`"):
        masked(tmp_path, "privacy: none\npush_limit: 7", aggregation="plain")


@pytest.mark.parametrize(
    ("more", "parties", "words"),
    [
        ("privacy: {epsilon: 8}\nnoise_multiplier: 1", 2, "each subtracts its own sum"),
        ("privacy: {epsilon: 8}", 3, "needs `noise_multiplier` exactly where"),
        ("privacy: none\nnoise_multiplier: 1", 3, "needs `noise_multiplier` exactly where"),
        ("privacy: {epsilon: 8}\nnoise_multiplier: 1\nlost_party: continue", 3, "needs `lost_party: pause`"),
        ("privacy: {epsilon: 8}\nnoise_multiplier: 1\npush_dtype: bfloat16", 3, "leave out `push_dtype`"),
        ("privacy: {epsilon: 8}\nnoise_multiplier: 1\nmixed_privacy: true", 3, "excludes `mixed_privacy`"),
        ("exchange: tokens", 3, "needs `exchange: experts`"),
        ("privacy: {epsilon: 8}\nnoise_multiplier: 1\npush_limit: 7", 3, "`push_limit` is for"),
        (SHARED, 3, "belong together"),
        (f"{SHARED}\ncolluding: 3\ntrunk: shared", 3, "leaves nobody of 3 parties"),
        (f"{SHARED}\ncolluding: 1", 3, "needs `trunk: shared`"),
        (f"{SHARED}\ncolluding: 1\ntrunk: shared\nlost_party: continue", 3, "its share of the noise is missing"),
        ("privacy: none\nnoise: shared\ncolluding: 1", 3, "a share alone is too little"),
        ("privacy: none\ncolluding: 1", 3, "belong together"),
    ],
)
def test_masked_pushes_with_what_they_exclude_are_refused_in_one_sentence(
    tmp_path: Path, more: str, parties: int, words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        masked(tmp_path, more, parties=parties)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("optim", "with_budget"),
    [
        ("{lr: 1e-3}", (0.5, 0.99)),
        ("{betas: [0.9, 0.95]}", (0.9, 0.95)),
        ("{kind: sgd}", (0.9, 0.95)),
    ],
)
def test_averages_of_gradients_are_short_where_these_are_noised_and_nothing_else_is_said(
    tmp_path: Path, optim: str, with_budget: tuple[float, float]
) -> None:
    for text, kind, none in (TRAIN, TrainConfig, ""), (FEDERATION, FederationConfig, "privacy: none\n"):
        private = load(tmp_path, f"{text}privacy: {{epsilon: 8}}\noptim: {optim}\n", kind)
        assert private.optim.betas == with_budget
        dump_yaml(tmp_path / "again.yaml", private)
        assert load_yaml(tmp_path / "again.yaml", kind) == private
        assert load(tmp_path, f"{text}{none}optim: {optim}\n", kind).optim.betas == (0.9, 0.95)


BANDS = "privacy: {epsilon: 8, noise_bands: 4"


def test_noise_in_bands_is_agreed_on_with_an_optimiser_that_adds_up(tmp_path: Path) -> None:
    found = load(tmp_path, TRAIN + BANDS + "}\noptim: {kind: sgd, momentum: 0.8}\n", TrainConfig)
    assert (found.privacy.noise_bands, found.optim.added_momentum) == (4, 0.8)
    dump_yaml(tmp_path / "again.yaml", found)
    assert load_yaml(tmp_path / "again.yaml", TrainConfig) == found
    federation = load(tmp_path, FEDERATION + BANDS + "}\noptim: {kind: sgd}\n", FederationConfig)
    assert federation.privacy.noise_bands == 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("}\n", "needs `optim.kind: sgd`"),
        ("}\noptim: {kind: adamw}\n", "needs `optim.kind: sgd`"),
        (", sampler: truncated_poisson, max_lot: 50}\noptim: {kind: sgd}\n", "excludes `sampler: truncated_poisson`"),
        (", adaptive_quantile: 0.5}\noptim: {kind: sgd}\n", "excludes `adaptive_quantile`"),
        ("}\noptim: {momentum: 0.5}\n", "`momentum` is for `kind: sgd`"),
    ],
)
def test_noise_in_bands_with_what_it_excludes_is_refused_in_one_sentence(
    tmp_path: Path, more: str, words: str
) -> None:
    assert words in str(refusal(tmp_path, TRAIN + BANDS + more))


def test_a_federation_in_bands_excludes_masks_and_adamw(tmp_path: Path) -> None:
    assert "needs `optim.kind: sgd`" in str(refusal(tmp_path, FEDERATION + BANDS + "}\n", FederationConfig))
    with pytest.raises(ConfigError, match=r"excludes `privacy\.noise_bands`"):
        masked(tmp_path, BANDS + "}\noptim: {kind: sgd}\nnoise_multiplier: 1")


def test_an_older_federation_keeps_the_hash_that_its_parties_signed(tmp_path: Path) -> None:
    text = FEDERATION + "privacy: {epsilon: 8}\n"
    plain = load(tmp_path, text, FederationConfig).content_hash()
    assert load(tmp_path, text + "optim: {kind: adamw}\n", FederationConfig).content_hash() == plain
    assert load(tmp_path, text + "optim: {kind: sgd}\n", FederationConfig).content_hash() != plain


def test_a_party_whose_noise_comes_from_a_seed_is_refused_where_others_rely_on_it(tmp_path: Path) -> None:
    federation = masked(tmp_path, f"{SHARED}\ncolluding: 1\ntrunk: shared")
    party = load(tmp_path, PARTY.replace("party: alder", "party: party0") + "privacy: {seeded: true}\n", PartyConfig)
    with pytest.raises(ConfigError, match="the others rely on secret noise"):
        party_privacy(federation, party)
