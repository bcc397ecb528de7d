"""The party as a process: settings, identity, text, trunk and shard put together and taken to the federation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from coterie.config import (
    FederationConfig,
    PartyConfig,
    PartyPrivacy,
    PrivacySpec,
    dump_yaml,
    load_yaml,
)
from coterie.config.base import content_hash
from coterie.config.federation import check_devices, check_task, party_privacy
from coterie.dp.accounting.dataset import dataset_digest
from coterie.dp.accounting.ledger import default_root
from coterie.dp.accounting.texts import Keyring
from coterie.dp.noise.pooled import PooledNoise
from coterie.errors import CheckpointError, ModelError, PlacementError, RankError, RosterError, as_argument
from coterie.federation.identity.certificates import Role
from coterie.federation.identity.identify import identify
from coterie.federation.identity.roster import Roster
from coterie.federation.identity.signing import KeySigner
from coterie.federation.rounds.settings import transport_settings
from coterie.federation.wire import unreachable
from coterie.federation.wire.grpc_transport import GrpcTransport
from coterie.models.lora import attach_adapters
from coterie.models.preconditioner import attached
from coterie.models.seam import expert_layers
from coterie.models.split.origins import check_content, origin_of
from coterie.models.split.partial import build_partial
from coterie.models.split.placement import Placement
from coterie.models.split.shards import TRUNK_FILE, StoredTensors, parse_expert_key, shard_file, stored_shapes
from coterie.models.split.trainings import Training
from coterie.models.spread.beside import spread_beside
from coterie.models.spread.spread import check_over
from coterie.models.zoo.build import torch_dtype
from coterie.ranks.ranks import Alone, Ranks, ranks_or_alone
from coterie.revision import software
from coterie.storage import file_digest
from coterie.training.data.documents import Documents, read_documents
from coterie.training.data.packing import Sequences
from coterie.training.data.tokenizer import get_tokenizer, load_tokenizer_from, tokenize
from coterie.training.experts.gateway import dismiss
from coterie.training.folders import TOKENIZER_FOLDER, kept_private, no_run, private_folder
from coterie.training.loop import use_checkpointing
from coterie.training.party.after_private import check_after_private
from coterie.training.party.agreed_limits import party_noise_limit
from coterie.training.party.helping import HelpingRank
from coterie.training.party.inputs import PartyInputs, PrivacyInputs, Weights, party_plan, trunk_tensors
from coterie.training.party.questions import Questions
from coterie.training.party.run import PartyResult, PartyRun, Watch
from coterie.training.party.store import PartyStore
from coterie.training.planning.forecast import Forecast, forecast
from coterie.training.provenance import artefacts, originals, record_facts, trainings_before
from coterie.training.public_figures import figures_of_party
from coterie.training.single.setup import check_fit, pick_device
from coterie.training.trackers import check_report, reporting

PARTY_FILE, FEDERATION_FILE = "party.yaml", "federation.yaml"


class PartyProcess:
    """One party, from its files to the end of the run.

    Args:
        config: party.yaml.
        watch: see `Watch`.
        listen: address to listen on, where it differs from the agreed endpoint.
        dial: addresses of members to dial in place of their endpoints.
        ranks: that share this party's lots, where this is rank 0; the others `help_party`.
        questions: that this party asks of the finished model.

    Raises:
        ConfigError, IdentityError, RosterError: settings, kit and roster do not fit each other.
    """

    def __init__(
        self,
        config: PartyConfig,
        watch: Watch | None = None,
        listen: str | None = None,
        dial: Mapping[str, str] | None = None,
        ranks: Ranks | None = None,
        questions: Questions | None = None,
    ) -> None:
        self.config, self._watch, self._listen, self._dial = config, watch, listen, dial
        self._questions = questions
        self._ranks = ranks_or_alone(ranks)
        self.federation = load_yaml(config.federation, FederationConfig)
        check_member(config, self.federation)
        self._kit, self.roster = identify(self.federation, config.kit, config.party, Role.PARTY)
        self._run: PartyRun | None = None

    def certificate_warning(self) -> str:
        """What a person should know of this party's certificates; empty while there is nothing."""
        return self._kit.ends_soon()

    def stop(self) -> bool:
        """Ask for a clean end after the round in progress. Safe in a signal handler.

        Returns:
            False: the coordinator has not been heard of yet, so there is nothing to end cleanly.
        """
        return self._run is not None and self._run.stop()

    def run(self) -> PartyResult:
        """Read the files, join, take part until the end.

        Raises:
            CoterieError: of any kind; see `PartyRun.run` and `prepare_party`.
        """
        config, federation = self.config, self.federation
        settings = transport_settings(federation, carried=bool(self._dial))
        transport = GrpcTransport(
            config.party, self.roster, self._kit, listen=self._listen, dial=self._dial, settings=settings
        )
        unreachable.check_free(config.party, transport.address)  # before a large model is read
        public = figures_of_party(federation, config)
        check_report(config.report_to, public)
        with (
            kept_private(config.run_dir) as private,
            reporting(config.report_to, public, private, config.party) as trackers,
        ):
            signer = KeySigner.of_kit(self._kit, self.roster)
            inputs = prepare_party(config, federation, self.roster, self._ranks)
            inputs = replace(inputs, signer=signer, questions=self._questions, trackers=trackers)
            if self._watch is not None and self._watch.announce is not None and inputs.privacy is not None:
                self._watch.announce(party_forecast(inputs, inputs.privacy))
            self._run = PartyRun(inputs, transport, federation.content_hash(), self._watch, self.certificate_warning)
            keep_settings(config, federation)
            result = self._run.run()
            dismiss(self._ranks)
            return result


def check_member(config: PartyConfig, federation: FederationConfig) -> None:
    """Make sure that a party is one of the federation's.

    Raises:
        RosterError: it is not.
    """
    if config.party not in federation.parties:
        raise RosterError(
            f"{config.party} is not a party of {federation.name}.",
            code="roster-unknown-member",
            where=str(config.federation),
            fix=f"parties: {', '.join(federation.parties)}",
        )


def help_party(config: PartyConfig, ranks: Ranks) -> None:
    """Take part as another rank than the first: compute a part of every lot, and speak to no other party.

    Raises:
        CoterieError: what any rank of the party raises; see `PartyProcess.run`.
    """
    federation = load_yaml(config.federation, FederationConfig)
    HelpingRank(prepare_party(config, federation, ranks=ranks)).run()


def prepare_party(
    config: PartyConfig, federation: FederationConfig, roster: Roster | None = None, ranks: Ranks | None = None
) -> PartyInputs:
    """Read a party's text, trunk and shard, and check that all fit together and what was signed.

    Args:
        config: party.yaml.
        federation: federation.yaml.
        roster: what was signed.
        ranks: of the party, all of which call this; None: this process alone.

    Raises:
        RankError: they do not read the same, or are no whole groups that hold every expert once.
        DataError: the text cannot be used.
        LedgerError: hosts would read text that was trained on privately before.
        ModelError: trunk or shard are of another model, or its experts cannot be spread over ranks.
        PlacementError: the shard holds other experts than this party is to host, or the placement was not signed.
    """
    ranks = ranks or Alone()
    check_devices(config, federation)
    check_compared(config, federation)
    # Of an earlier start of this run; it wins over the settings. Rank 0 puts it there.
    kept = private_folder(config.run_dir) / TOKENIZER_FOLDER
    is_kept = ranks.tell("the tokenizer", kept.is_dir)
    with ranks.all_well("the party's files"):
        inputs = _read_party(config, federation, roster, ranks, kept if is_kept else None)
    ranks.agree("the party's files", lambda: {
        "the text": inputs.train.digest(),
        "federation.yaml": federation.content_hash(),
        "party.yaml": content_hash(config),
        "versions": {**software(), "torch": torch.__version__},
    })  # fmt: skip
    if config.experts_over == 1:
        return inputs
    return replace(inputs, spread=spread_beside(inputs.model, ranks, config.experts_over))


def check_compared(config: PartyConfig, federation: FederationConfig) -> None:
    """Keep ranks of a party on GPUs to runs in which they compare what they compute together.

    With whole layers at each rank nothing but weights goes from GPU to GPU: sums are added up in host memory.

    Raises:
        RankError: rows would travel between GPUs, and nothing is compared, as there is no budget.
    """
    if config.experts_over == 1 or pick_device(config.device).type == "cpu":
        return
    if party_privacy(federation, config) is None:
        raise RankError(
            f"`experts_over` is {config.experts_over}, and without a budget experts are spread over CPUs only.",
            code="ranks-device",
            where=f"party.yaml of {config.party}",
            why="ranks have not been tried on GPUs, and only training within a budget compares what they compute "
            "together with one record at a time, which is what guards ranks elsewhere",
            fix="use `devices: N`, with whole layers at each rank, or say `device: cpu`",
        )


def check_experts_over(config: PartyConfig, model: nn.Module) -> None:
    """Make sure that the experts of every layer are enough for the ranks that they are to be spread over.

    Args:
        config: party.yaml.
        model: without adapters; its weights may be elsewhere.

    Raises:
        ModelError: see `coterie.models.spread.spread.check_over`.
    """
    if config.experts_over > 1:
        check_over(expert_layers(model), config.experts_over)


def _read_party(
    config: PartyConfig, federation: FederationConfig, roster: Roster | None, ranks: Ranks, earlier: Path | None
) -> PartyInputs:
    """Args: ``earlier`` is the tokenizer of an earlier start of the run."""
    data = config.data
    tokenizer = load_tokenizer_from(earlier) if earlier else get_tokenizer(data.tokenizer, federation.model, data)
    spec = party_privacy(federation, config)
    if spec is not None and spec.ledger is None:
        spec = spec.model_copy(update={"ledger": default_root(config.run_dir)})
    check_task(config)
    documents = read_documents(data.train, data, user_column=spec.user_column if spec else None)
    if ranks.rank == 0:
        check_after_private(config, federation, documents)
    train = tokenize(documents, data, tokenizer)
    test = tokenize(read_documents(data.test, data), data, tokenizer) if data.test else None
    device = pick_device(config.device)
    frozen = federation.lora is not None
    model = build_partial(federation.model, config.trunk, device=device, frozen=frozen)
    check_coordinates(bool(attached(model).factors), federation, config.trunk)
    check_fit(model, tokenizer, data)
    check_experts_over(config, model)
    if federation.model.gradient_checkpointing:
        use_checkpointing(model)
    adapted = _with_adapters(model, federation)
    placement = Placement.of_spec(federation.placement, list(federation.parties), model)
    if roster is not None:
        check_placement_signed(placement, roster)
    experts = StoredTensors(config.shard, None if frozen else torch_dtype(federation.model))  # before it is checked
    check_shard(config.shard, placement, config.party)
    check_starting_weights(config, roster)
    if ranks.rank == 0:
        kept = private_folder(config.run_dir) / TOKENIZER_FOLDER
        kept.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(str(kept))
    first = trunk_tensors(adapted)

    def again() -> Weights:
        nonlocal first
        trunk, first = first, {}
        if not trunk:
            anew = build_partial(federation.model, config.trunk, device=device, frozen=frozen)
            trunk = trunk_tensors(_with_adapters(anew, federation))
        return Weights(trunk, experts)

    privacy = None if spec is None else _privacy_inputs(config, federation, spec, documents, train)
    return PartyInputs(
        party=config.party,
        federation=federation,
        model=adapted,
        weights=again,
        placement=placement,
        train=train,
        test=test,
        run_dir=config.run_dir,
        device=device,
        cache=config.cache,
        privacy=privacy,
        roster=roster.content_hash() if roster is not None else "",
        trainings=(
            *trainings_before(
                federation.model,
                data,
                f"{federation.name}-{config.party}",
                config.trunk,
                config.shard,
                preconditioner=federation.preconditioner,
            ),
            _training(config, federation, privacy),
        ),
        ranks=ranks,
        bases=_bases(config) if frozen else {},
    )


def check_coordinates(found: bool, federation: FederationConfig, trunk: Path) -> None:
    """Make sure that a trunk is in other coordinates if, and only if, that was agreed.

    Args:
        found: it holds factors.
        federation: what was agreed.
        trunk: its file.

    Raises:
        ModelError: it was split without the preconditioner that was agreed, or with one that was not.
    """
    agreed = federation.preconditioner is not None
    if found is not agreed:
        raise ModelError(
            f"{trunk} was split {'with' if found else 'without'} a preconditioner, and the federation agreed on "
            f"{'one' if agreed else 'none'}.",
            code="model-coordinates",
            why="its statement would be about other text, or less would be learnt than was agreed",
            fix="split the checkpoint again: `coterie split --federation federation.yaml` takes what is agreed",
        )


def party_forecast(inputs: PartyInputs, privacy: PrivacyInputs) -> Forecast:
    """What a party's run will spend, before it joins.

    Raises:
        BudgetError: no noise reaches the budget, or lots are larger than the data.
    """
    pieces = privacy.originals.pieces if privacy.originals is not None else 1
    plan, parties = party_plan(privacy, inputs.model), len(inputs.federation.parties)
    return forecast(privacy.spec, plan, inputs.train, pieces, tested=inputs.test is not None, parties=parties)


def _training(config: PartyConfig, federation: FederationConfig, privacy: PrivacyInputs | None) -> Training:
    """What the weights of this run's checkpoints are made under, for whoever exports them."""
    name = f"{federation.name}-{config.party}"
    if privacy is None:
        return Training(name, "public" if config.data.provenance == "public" else "none")
    kind: Literal["budget", "seeded"] = "budget" if privacy.seed is None else "seeded"
    ledger = Keyring(privacy.spec.ledger or default_root(config.run_dir)).public_name(privacy.digest or "")
    return Training(name, kind, ledger, privacy.spec.epsilon, privacy.spec.delta)


def _bases(config: PartyConfig) -> dict[str, str]:
    """Digests of the files with the frozen weights, which were read and compared with what they say of themselves."""
    return {"trunk": origin_of(config.trunk).content, "experts": origin_of(config.shard).content}


def _with_adapters(model: nn.Module, federation: FederationConfig) -> nn.Module:
    """The model, with adapters where the federation trains those; they start alike at every party."""
    return model if federation.lora is None else attach_adapters(model, federation.lora, federation.train.seed)


def _privacy_inputs(
    config: PartyConfig, federation: FederationConfig, spec: PrivacySpec, documents: Documents, train: Sequences
) -> PrivacyInputs:
    return PrivacyInputs(
        spec,
        federation.train.rounds,
        seed=federation.train.seed if spec.seeded else None,
        artefacts=artefacts(
            federation.model, config.data, config.trunk, config.shard, preconditioner=federation.preconditioner
        ),
        digest=dataset_digest(documents.texts),
        push_after_s=federation.push_after_s,
        sequence_length=config.data.sequence_length,
        record=record_facts(config.data),
        originals=originals(documents, train, config.data),
        agreed_noise=federation.noise_multiplier,
        pooled=pooled_noise(federation),
        largest_lot=federation.largest_lot,
        largest_noise=party_noise_limit(federation),
        momentum=federation.optim.added_momentum,
        recorded=federation.transcript is not None,
        trained=None if federation.lora is None else federation.lora.words(),
    )


def pooled_noise(federation: FederationConfig) -> PooledNoise | None:
    """Whose noise lies in all that others see of a party; None: its own alone. What a private trunk makes of a
    party's own noise shows in its later pushes."""
    summed = federation.aggregation == "masked" and federation.trunk == "shared"
    return PooledNoise(len(federation.parties), federation.colluding) if summed else None


def check_placement_signed(placement: Placement, roster: Roster) -> None:
    """Make sure that a placement is the one in the roster.

    Raises:
        PlacementError: it is not.
    """
    if placement.content_hash() != roster.placement_hash:
        raise PlacementError(
            "The placement that federation.yaml describes is not the one that was signed.",
            code="placement-unsigned",
            where=f"{placement.content_hash()[:8]} here, {roster.placement_hash[:8]} in the roster",
            why="parties would disagree on who hosts which expert",
            fix="check `model` and `placement`, and that all use the same version of transformers",
        )


def check_shard(path: Path, placement: Placement, party: str) -> None:
    """Make sure, from the header alone, that a shard file holds the experts that the placement gives a party.

    Raises:
        PlacementError: it holds others, or lacks one.
        ModelError: it is no shard file.
    """
    stored = {parse_expert_key(key)[:2] for key in stored_shapes(path)}
    expected = {(layer, expert) for layer, experts in placement.hosted(party).items() for expert in experts}
    if stored == expected:
        return
    lacking, foreign = sorted(expected - stored), sorted(stored - expected)
    problems = [
        f"{words} layer {keys[0][0]} expert {keys[0][1]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
        for words, keys in (("lacks", lacking), ("holds", foreign))
        if keys
    ]
    raise PlacementError(
        f"{path.name} does not hold the experts of {party}: it {' and '.join(problems)}.",
        code="placement-shard",
        where=str(path),
        why="tokens would be sent to an expert that is not there",
        fix="take the shard that `coterie split` wrote for this party and this placement",
    )


def check_starting_weights(config: PartyConfig, roster: Roster | None) -> str:
    """Read trunk and shard, and make sure that they are whole, of one round, and what everybody signed.

    Returns:
        What was found, in words.

    Raises:
        ModelError: a file was changed after it was written, the two do not belong together, or they are not those
            whose digests are in the roster.
    """
    trunk, shard = check_content(config.trunk), check_content(config.shard)
    if (trunk.run, trunk.round) != (shard.run, shard.round):
        raise ModelError(
            f"{config.trunk} is of {trunk.words()}, and {config.shard} of {shard.words()}.",
            code="model-parts-mixed",
            why="training would go on from a model that nobody trained",
            fix="take both from one split, or from one round of one run",
        )
    agreed = roster.weights if roster is not None else {}
    if not agreed:
        return f"trunk and shard are whole, {trunk.words()}"
    for path, name in ((config.trunk, TRUNK_FILE), (config.shard, shard_file(config.party))):
        if file_digest(path) != agreed.get(name):
            raise ModelError(
                f"{path} is not the `{name}` whose digest is in the roster.",
                code="weights-unsigned",
                why="parties would start from different weights",
                fix="copy it again from where `coterie split` wrote it, or sign a roster for these weights",
            )
    return f"trunk and shard are those of the roster, {trunk.words()}"


def keep_settings(config: PartyConfig, federation: FederationConfig) -> None:
    """Put both settings files into the run folder, with absolute paths: the run can be taken up from there."""
    folder = config.run_dir.absolute()
    dump_yaml(folder / FEDERATION_FILE, _absolute_model(federation))
    moved: dict[str, Any] = {"federation": folder / FEDERATION_FILE, "run_dir": folder}
    moved |= {name: getattr(config, name).absolute() for name in ("kit", "trunk", "shard")}
    data = config.data
    files: dict[str, Any] = {
        name: tuple(path.absolute() for path in getattr(data, name)) for name in ("train", "test")
    }
    tokenizer = data.tokenizer
    if tokenizer.path is not None:
        files["tokenizer"] = tokenizer.model_copy(update={"path": tokenizer.path.absolute()})
    elif tokenizer.train is not None:
        public = tuple(path.absolute() for path in tokenizer.train.files)
        trained = tokenizer.train.model_copy(update={"files": public})
        files["tokenizer"] = tokenizer.model_copy(update={"train": trained})
    moved["data"] = data.model_copy(update=files)
    if isinstance(config.privacy, PartyPrivacy) and config.privacy.ledger is not None:
        moved["privacy"] = config.privacy.model_copy(update={"ledger": config.privacy.ledger.absolute()})
    if config.ledger is not None:
        moved["ledger"] = config.ledger.absolute()
    if config.report_to is not None and config.report_to.prometheus is not None:
        textfile = config.report_to.prometheus.absolute()
        moved["report_to"] = config.report_to.model_copy(update={"prometheus": textfile})
    dump_yaml(folder / PARTY_FILE, config.model_copy(update=moved))


def _absolute_model(federation: FederationConfig) -> FederationConfig:
    if federation.model.path is None:
        return federation
    model = federation.model.model_copy(update={"path": federation.model.path.absolute()})
    return federation.model_copy(update={"model": model})


def settings_of_run(run_dir: Path) -> PartyConfig:
    """The settings of a party's run that has a checkpoint to go on from.

    Raises:
        CheckpointError: no federated run is here, or it has no checkpoint yet.
    """
    path = run_dir / PARTY_FILE
    if not path.is_file():
        raise no_run(run_dir, " of `coterie up`")
    config = load_yaml(path, PartyConfig)
    federation = load_yaml(config.federation, FederationConfig)
    if not PartyStore(run_dir, config.party, federation.content_hash()).held():
        raise CheckpointError(
            f"{run_dir} has no checkpoint yet.",
            code="checkpoint-none",
            fix=f"`coterie up {as_argument(path)}` begins from the split model",
        )
    return config.model_copy(update={"run_dir": run_dir})
