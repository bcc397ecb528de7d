"""Options become a plan, or one clear sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coterie.audit.pieces import CANARIES
from coterie.config import (
    FederationConfig,
    PartyConfig,
    PartyPrivacy,
    PrivacyRules,
    TrainConfig,
    TranscriptSpec,
    load_yaml,
)
from coterie.demonstration.folder import (
    LOCK,
    MADE,
    MARKER,
    SHARD,
    TRUNK,
    Folder,
    check_folder,
    empty_folder,
)
from coterie.demonstration.plan import ARMS, NAMES, DemoPlan, make_plan
from coterie.demonstration.readme import save_readme
from coterie.errors import ConfigError
from coterie.models.split.shards import TRUNK_FILE, shard_file

ENDPOINTS = [f"127.0.0.1:{port}" for port in range(5001, 5008)]


def written(folder: Path, parties: int = 3) -> tuple[Folder, DemoPlan]:
    plan = make_plan(parties)
    units = {party: 1000 + 100 * number for number, party in enumerate(plan.parties)}
    plan = replace(plan, units=units, noise_multiplier=0.8)
    made = Folder(folder, plan)
    made.public()
    for party in plan.parties:
        made.alone(ARMS["isolated"], party)
    made.pooled(ARMS["centralised"])
    made.pooled(ARMS["centralised_dp"])
    for party in plan.parties:
        made.alone(ARMS["isolated_dp"], party)
    for arm in plan.of_kind("federation"):
        made.federation(arm, ENDPOINTS[: parties + 1])
    return made, plan


@pytest.mark.parametrize("parties", [0, 1, 7])
def test_a_number_of_parties_without_text_is_refused(parties: int) -> None:
    with pytest.raises(ConfigError, match="2 to 6") as caught:
        make_plan(parties)
    assert caught.value.code == "demo-parties"


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        make_plan(3, 0)


@pytest.mark.parametrize(("arms", "named"), [(["isolated", "tokns"], "tokns"), ([], "nothing")])
def test_an_unknown_arm_is_named_with_the_known_ones(arms: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        make_plan(3, arms=arms)
    assert "centralised" in str(caught.value.fix)


def test_arms_keep_the_order_of_the_table() -> None:
    assert make_plan(3, arms=["tokens", "public"]).arms == ("public", "tokens")


def test_few_rounds_are_still_evaluated_on_the_way() -> None:
    plan = make_plan(3, 2)
    assert (plan.rounds, plan.eval_every) == (2, 1)


@pytest.mark.parametrize("parties", [2, 6])
def test_all_settings_files_can_be_loaded(tmp_path: Path, parties: int) -> None:
    made, plan = written(tmp_path, parties)
    federation = load_yaml(tmp_path / "tokens" / "federation.yaml", FederationConfig)
    assert tuple(federation.parties) == plan.parties == NAMES[:parties]
    for party in plan.parties:
        own = load_yaml(tmp_path / "tokens" / party / "party.yaml", PartyConfig)
        assert own.federation.resolve() == (tmp_path / "tokens" / "federation.yaml").resolve()
        assert own.data.test[0].resolve() == made.test_file(party).resolve()
        assert own.run_dir.resolve() == made.run_dir(ARMS["tokens"], party).resolve()
        load_yaml(tmp_path / "isolated" / party / "train.yaml", TrainConfig)
    assert load_yaml(tmp_path / "public" / "train.yaml", TrainConfig).run_dir.resolve() == made.run_dir(
        ARMS["public"], ""
    )


def settings_of(
    folder: Path, isolated: str, centralised: str, federated: str
) -> tuple[TrainConfig, TrainConfig, FederationConfig, PartyConfig]:
    """birch alone, everybody's text in one place, the federation, and birch in it; all step alike."""
    alone = load_yaml(folder / isolated / "birch" / "train.yaml", TrainConfig)
    pooled = load_yaml(folder / centralised / "train.yaml", TrainConfig)
    together = load_yaml(folder / federated / "federation.yaml", FederationConfig)
    own = load_yaml(folder / federated / "birch" / "party.yaml", PartyConfig)
    assert alone.optim == pooled.optim == together.optim
    return alone, pooled, together, own


def test_arms_differ_in_nothing_but_who_trains_on_what(tmp_path: Path) -> None:
    _, plan = written(tmp_path)
    alone, pooled, together, own = settings_of(tmp_path, "isolated", "centralised", "tokens")
    model = {config.model.path.resolve() for config in (alone, pooled, together) if config.model.path}
    assert model == {tmp_path / "public" / "run" / "model"}
    lengths = [(c.train.rounds, c.train.seed, c.train.eval_every) for c in (alone, pooled, together)]
    assert len(set(lengths)) == 1
    assert pooled.train.batch_size == len(plan.parties) * alone.train.batch_size
    assert together.train.batch_size == alone.train.batch_size
    resolved = [[path.resolve() for path in data.train] for data in (alone.data, own.data)]
    assert resolved[0] == resolved[1]
    assert alone.data.sequence_length == own.data.sequence_length == pooled.data.sequence_length


def test_private_arms_differ_in_nothing_but_who_trains_on_what(tmp_path: Path) -> None:
    _, plan = written(tmp_path)
    alone, pooled, together, own = settings_of(tmp_path, "isolated_dp", "centralised_dp", "experts_dp")
    assert alone.train.rounds == pooled.train.rounds == together.train.rounds == plan.private.rounds
    assert [path.name for path in (*alone.data.train, *own.data.train)] == ["all.jsonl"] * 2
    assert isinstance(together.privacy, PrivacyRules)
    assert isinstance(own.privacy, PartyPrivacy)
    assert alone.privacy
    assert pooled.privacy
    shared = ("epsilon", "delta", "clip_norm", "clipping", "sampler", "unit")
    for name in shared:
        assert getattr(alone.privacy, name) == getattr(pooled.privacy, name) == getattr(together.privacy, name)
    assert together.lot_sizes == {"alder": 131, "birch": 144, "cedar": 157}  # of 1000, 1100 and 1200
    assert together.lot_sizes["birch"] == alone.privacy.lot_size
    assert pooled.privacy.lot_size == len(plan.parties) * plan.private.lot_size
    ledgers = {path.resolve() for path in (alone.privacy.ledger, pooled.privacy.ledger, own.privacy.ledger) if path}
    assert ledgers == {tmp_path / "ledger"}
    assert not any(spec.seeded for spec in (alone.privacy, pooled.privacy, own.privacy))


def test_what_is_exchanged_without_privacy_says_so(tmp_path: Path) -> None:
    written(tmp_path)
    open_sums = load_yaml(tmp_path / "experts" / "federation.yaml", FederationConfig)
    assert (open_sums.exchange, open_sums.privacy, open_sums.trunk) == ("experts", "none", "shared")
    assert load_yaml(tmp_path / "tokens" / "federation.yaml", FederationConfig).exchange == "tokens"


def test_every_federation_records_rounds_for_its_audit(tmp_path: Path) -> None:
    """A few; of the private one all, because membership is told from all rounds together."""
    written(tmp_path)
    found = {
        arm: load_yaml(tmp_path / arm / "federation.yaml", FederationConfig).transcript
        for arm in ("tokens", "experts", "experts_dp")
    }
    assert {arm: spec and spec.rounds for arm, spec in found.items()} == {
        "tokens": 2, "experts": 2, "experts_dp": "all",
    }  # fmt: skip


def test_shared_noise_is_agreed_on_and_recorded_as_other_federations_are(tmp_path: Path) -> None:
    made, plan = written(tmp_path)
    shared = load_yaml(tmp_path / "experts_dp_shared" / "federation.yaml", FederationConfig)
    assert (shared.aggregation, shared.noise, shared.colluding) == ("masked", "shared", 1)
    assert (shared.noise_multiplier, shared.transcript) == (0.8, TranscriptSpec(rounds=plan.recorded))
    whole = load_yaml(tmp_path / "experts_dp" / "federation.yaml", FederationConfig)
    assert (shared.lot_sizes, shared.privacy, shared.optim) == (whole.lot_sizes, whole.privacy, whole.optim)
    undecided = Folder(tmp_path, replace(plan, noise_multiplier=None))
    draft = undecided.federation(ARMS["experts_dp_shared"], ENDPOINTS[:4])
    assert draft.aggregation == "plain"  # what `coterie plan` finds the noise for
    assert made.noise(ARMS["experts_dp_shared"]).shown == (
        "coterie plan experts_dp_shared/federation.yaml --records alder=1000 --records birch=1100 "
        "--records cedar=1200 --json experts_dp_shared/plan.json"
    )


def test_two_parties_have_no_masked_arm() -> None:
    assert "experts_dp_shared" not in make_plan(2).arms
    assert make_plan(3).arms == tuple(ARMS)
    with pytest.raises(ConfigError, match="experts_dp_shared") as caught:
        make_plan(2, arms=["isolated_dp", "experts_dp_shared"])
    assert caught.value.code == "demo-arms"


def test_settings_name_no_path_outside_the_folder(tmp_path: Path) -> None:
    written(tmp_path)
    for path in tmp_path.rglob("*.yaml"):
        assert str(tmp_path) not in path.read_text("utf-8")


def test_files_of_a_split_are_called_as_split_calls_them() -> None:
    assert TRUNK == TRUNK_FILE
    assert SHARD.format(party="alder") == shard_file("alder")


def test_the_readme_has_every_command(tmp_path: Path) -> None:
    made, plan = written(tmp_path)
    save_readme(plan, made, tmp_path / "README.txt")
    text = (tmp_path / "README.txt").read_text("utf-8")
    commands = [made.public(), made.noise(ARMS["experts_dp_shared"])]
    commands += [made.count(party) for party in plan.parties]
    for arm in plan.of_kind("federation"):
        commands += [made.split(arm), made.provision(arm), made.coordinator(arm)]
        commands += [made.up(arm, party) for party in plan.parties]
    commands += [made.alone(arm, party) for arm in plan.of_kind("alone") for party in plan.parties]
    commands += [made.pooled(arm) for arm in plan.of_kind("pooled")]
    assert all(f"\n  {command.shown}\n" in text for command in commands)


def test_an_earlier_demo_is_removed_whole(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    root.mkdir()
    assert not empty_folder(root)
    written(root)
    (root / "report.html").write_text("old", encoding="utf-8")
    check_folder(root)
    assert empty_folder(root)
    assert [path.name for path in root.iterdir()] == [MARKER]


def test_everything_the_demo_writes_counts_as_its_own(tmp_path: Path) -> None:
    written(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= MADE


@pytest.mark.parametrize("earlier", [False, True])
def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path, earlier: bool) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    if earlier:
        (tmp_path / MARKER).write_text("{}", encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"thesis\.txt") as caught:
        check_folder(tmp_path)
    assert caught.value.code == "demo-folder"
    assert sorted(tmp_path.iterdir()) == before


def test_a_demo_folder_that_has_no_marker_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(ConfigError, match="data"):
        check_folder(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "coterie-demo").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="is a file"):
        check_folder(tmp_path / "coterie-demo")


def test_an_empty_or_locked_folder_may_be_used(tmp_path: Path) -> None:
    check_folder(tmp_path)
    (tmp_path / LOCK).touch()
    check_folder(tmp_path)
    check_folder(tmp_path / "new")


def test_the_audit_has_as_many_canaries_as_the_command_makes_unless_quick() -> None:
    assert make_plan(3).canaries == CANARIES == 200
    assert make_plan(3, quick=True).canaries < CANARIES
