"""federation.yaml, which all parties share, and party.yaml, which is one party's own."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from coterie.config.base import LocalPath, Spec, content_hash
from coterie.config.data import DataSpec
from coterie.config.model import LoraSpec, ModelSpec
from coterie.config.numbers import Count, Positive
from coterie.config.privacy import (
    RELEASED_LOADS,
    PartyPrivacy,
    PreconditionerSpec,
    PrivacyRules,
    PrivacySpec,
    undeclared_artefacts,
)
from coterie.config.report import ReportSpec
from coterie.config.train import Device, Devices, OptimSpec, TrainSpec, check_adds_up, check_groups
from coterie.errors import ConfigError
from coterie.ranks.world import auto_devices


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", name):
        raise ValueError(f"{name!r} is not a name: use a lowercase letter, then up to 31 of a-z 0-9 _ -")
    return name


def is_endpoint(text: str) -> bool:
    """Whether it is ``host:port`` or ``[v6]:port``, with a port from 1 to 65535."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})", text)
    return match is not None and 0 < int(match[2]) < 65536


def _check_endpoint(endpoint: str) -> str:
    if not is_endpoint(endpoint):
        raise ValueError(f"{endpoint!r} is not `host:port` with a port from 1 to 65535")
    return endpoint


PartyName = Annotated[str, AfterValidator(_check_name)]
Endpoint = Annotated[str, AfterValidator(_check_endpoint)]


class MemberAddress(Spec):
    """Where a process of the federation listens."""

    endpoint: Endpoint = Field(description="`host:port` that the other parties connect to.")


class FederationTrainSpec(TrainSpec):
    """How much is trained; `batch_size` counts one party's sequences."""

    in_flight: int = Field(
        default=2, ge=1, le=8, description="Micro-batches on the way at once, so that waiting overlaps."
    )


class TranscriptSpec(Spec):
    """What every party keeps of what others send to it, and a key to what it sends itself, for an audit to attack.
    Of masked pushes its own masks, too."""

    rounds: Count | Literal["all"] = Field(
        description="How many rounds are recorded, from the first; with their evaluations."
    )
    max_gib: float = Field(
        default=1.0,
        gt=0,
        description="Most that transcript and key may each take on a disk; then recording stops, training goes on.",
    )


class FederationConfig(Spec):
    """federation.yaml: what all parties agree on. Its hash is in the roster that every party signs."""

    later_keys = frozenset({"aggregation", "noise", "colluding", "noise_multiplier", "push_limit", "lot_sizes"})

    name: PartyName = Field(description="Short name of the federation.")
    model: ModelSpec = Field(description="The model whose experts are shared.")
    parties: dict[PartyName, MemberAddress] = Field(min_length=1, description="Every party by name.")
    coordinator: MemberAddress = Field(description="The keeper of rounds; sees no tensor and no text.")
    optim: OptimSpec = Field(default=OptimSpec(), description="The optimiser, of experts and trunks alike.")
    train: FederationTrainSpec = Field(description="Length and batch.")
    exchange: Literal["experts", "tokens"] = Field(
        default="experts",
        description="`experts`: weights travel to the data, noised sums back. `tokens`: hidden vectors travel, and "
        "their hosts can read the text.",
    )
    privacy: PrivacyRules | Literal["none"] | None = Field(
        default=None, description="For `experts`: a budget, or the word `none`. Each party keeps its own ledger."
    )
    lot_sizes: dict[PartyName, Count] | None = Field(
        default=None,
        description="With a budget: every party's own `privacy.lot_size`, by name. Where each is the same share of "
        "the party's records, all need the same noise; `coterie plan --records` proposes such lots.",
    )
    mixed_privacy: bool = Field(
        default=False, description="Allow parties that write `privacy: none` beside private ones."
    )
    trunk: Literal["private", "shared"] = Field(
        default="private", description="Whether the non-expert weights stay each party's own or are trained together."
    )
    placement: Literal["round_robin"] | dict[int, dict[int, PartyName]] = Field(
        default="round_robin",
        description="Who hosts which expert: dealt in turn, or a table layer -> expert -> party.",
    )
    combine: Literal["host", "owner"] = Field(
        default="host", description="For `tokens`: who weights and sums a token's expert outputs; `host` sends less."
    )
    lora: LoraSpec | None = Field(
        default=None,
        description="For `experts`: train adapters only. Base weights cross once, each round moves adapters alone.",
    )
    weights_dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="For `experts`: what weights travel as; hosts keep float32."
    )
    push_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="For `experts`: what sums travel as; bfloat16 is rounded stochastically."
    )
    aggregation: Literal["plain", "masked"] = Field(
        default="plain",
        description="For `experts`: `masked` hides each party's sum from hosts, which read only what all parties' "
        "sums add up to. Needs three parties, all of them in every round; one whose budget is spent hosts on.",
    )
    noise: Literal["whole", "shared"] = Field(
        default="whole",
        description="For `aggregation: masked`: whether each party adds all the noise that its promise needs, or "
        "with `trunk: shared` only its share, so that all shares together are that noise.",
    )
    colluding: Count | None = Field(
        default=None,
        description="For `noise: shared`: t, how many of the other parties may pool what they know, or lack their "
        "noise, under the promise; each adds 1 / sqrt(parties - t) of the noise. Where budgets are spent, parties "
        "are those that still contribute; with t of them or fewer nobody does.",
    )
    noise_multiplier: Positive | None = Field(
        default=None,
        description="For `aggregation: masked` with a budget: sigma of every party's noise, so that all lie on one "
        "grid; the largest that a party's budget needs (`coterie up` names it where this is too small).",
    )
    push_limit: Positive = Field(
        default=1e4,
        description="For `aggregation: masked` with `privacy: none`: largest size of a value in one party's sum; the "
        "grid follows from it.",
    )
    push_after_s: float | None = Field(
        default=None,
        gt=0,
        description="For private `experts`: constant-work mode. Lots are padded to the same work and sums leave this "
        "many seconds after the round began, so that timing tells less; needs `sampler: truncated_poisson`.",
    )
    deadline_s: float = Field(
        default=60.0, gt=0, description="Seconds a party may keep another waiting for one message."
    )
    round_deadline_s: float = Field(default=1800.0, gt=0, description="Seconds one try at a round may take in all.")
    join_deadline_s: float = Field(
        default=300.0, gt=0, description="Seconds to wait for a missing party; then the run ends."
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        description="Failed tries after which the run ends, unless it got further meanwhile than ever before; more "
        "interruptions by lost parties than that end it, too.",
    )
    lost_party: Literal["pause", "continue"] = Field(
        default="pause", description="When a party is gone: wait for it, or go on without its experts."
    )
    value_limit: float = Field(
        default=1e5,
        gt=0,
        allow_inf_nan=False,
        description="Largest size of a weight, hidden vector, expert output or gradient that crosses, and of a sum "
        "without privacy for each token or record in it. Noised sums have a bound of their own.",
    )
    max_refusals: int = Field(
        default=2,
        ge=1,
        description="Attempts or other phases in which a member sends what does not fit what was agreed, or values "
        "beyond it, after which it is treated as lost until it is started again; less than `max_attempts` in effect.",
    )

    evaluate: bool = Field(
        default=True,
        description="Measure every party's held-out text, each `train.eval_every` rounds and at the end. In `tokens` "
        "all of it goes to the hosts of its experts every time; `false`: none of it crosses, and no loss is known.",
    )
    transcript: TranscriptSpec | None = Field(
        default=None,
        description="For an audit: every party records what others send it, in the private part of its run folder. "
        "In `tokens`, and without a budget, their text can be read from that. Each also keeps a key to what it sent: "
        "token ids of its own text and, under a budget, which records the secret lots held.",
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> FederationConfig:
        if self.exchange == "experts" and self.privacy is None:
            raise ValueError("`exchange: experts` (the default) needs `privacy`: a budget, or the word `none`")
        if self.exchange == "tokens" and isinstance(self.privacy, PrivacyRules):
            raise ValueError("`exchange: tokens` cannot keep a privacy budget: hosts see every token's hidden vector")
        if self.exchange == "tokens" and self.trunk == "shared":
            raise ValueError("`trunk: shared` needs `exchange: experts`")
        if self.push_after_s is not None and (
            not isinstance(self.privacy, PrivacyRules) or self.privacy.sampler != "truncated_poisson"
        ):
            raise ValueError("`push_after_s` needs `privacy.sampler: truncated_poisson`, which bounds a lot's work")
        if self.mixed_privacy and isinstance(self.privacy, PrivacyRules) and self.privacy.balance in RELEASED_LOADS:
            raise ValueError(
                f"`privacy.balance: {self.privacy.balance}` needs every party to release its expert loads: leave out "
                "`mixed_privacy`, or use `balance: per_sequence`"
            )
        self._check_masked()
        self._check_lots()
        if self.optim.kind == "adamw_corrected":
            raise ValueError(
                "`optim.kind: adamw_corrected` is for one party's training: hosts step with the sum of all parties' "
                "noise, whose size each party's own budget decides; use `adamw`"
            )
        if isinstance(self.privacy, PrivacyRules):
            check_adds_up(self.optim, self.privacy)
            object.__setattr__(self, "optim", self.optim.under_a_budget())
        if self.lora is not None and self.preconditioner is not None:
            raise ValueError(
                "`privacy.preconditioner` is for training all weights: leave it out, or leave out `lora`"
            )
        if self.lora is not None and self.exchange != "experts":
            raise ValueError("`lora` needs `exchange: experts`")
        listening = [*self.parties.items(), ("coordinator", self.coordinator)]
        for index, (name, address) in enumerate(listening):
            for other, elsewhere in listening[:index]:
                if address.endpoint == elsewhere.endpoint:
                    raise ValueError(f"`{other}` and `{name}` both listen on {address.endpoint}")
        if isinstance(self.placement, dict):
            hosts = {party for experts in self.placement.values() for party in experts.values()}
            unknown = sorted(hosts - set(self.parties))
            if unknown:
                raise ValueError(f"placement names {', '.join(unknown)}: no such party")
        return self

    def _check_masked(self) -> None:
        with_budget = isinstance(self.privacy, PrivacyRules)
        self._check_shared_noise(with_budget)
        bounded = self.push_limit != FederationConfig.model_fields["push_limit"].default
        if bounded and (self.aggregation == "plain" or with_budget):
            raise ValueError(
                "`push_limit` is for `aggregation: masked` with `privacy: none`: under a budget the clip norm bounds "
                "a push, and in plain ones `value_limit` does"
            )
        if self.aggregation == "plain":
            if self.noise_multiplier is not None:
                raise ValueError("`noise_multiplier` is for `aggregation: masked`; else each party finds its own")
            return
        if self.exchange != "experts":
            raise ValueError("`aggregation: masked` needs `exchange: experts`: only sums can be masked")
        if isinstance(self.privacy, PrivacyRules) and self.privacy.noise_bands > 1:
            raise ValueError(
                "`aggregation: masked` excludes `privacy.noise_bands`: a masked sum can be decoded only if all "
                "parties took back the same earlier rounds, and one that restarts has lost its own"
            )
        if len(self.parties) < 3:
            raise ValueError(
                "`aggregation: masked` needs three parties: of two, each subtracts its own sum and has the other's"
            )
        if self.lost_party == "continue":
            raise ValueError(
                "`aggregation: masked` needs `lost_party: pause`: without one party's masks no sum can be read, and "
                "one over fewer parties hides less"
            )
        if self.push_dtype != "float32":
            raise ValueError("`aggregation: masked` sends integers of a grid: leave out `push_dtype`")
        if self.mixed_privacy:
            raise ValueError("`aggregation: masked` excludes `mixed_privacy`: all sums lie on the noise's one grid")
        if with_budget != (self.noise_multiplier is not None):
            raise ValueError(
                "`aggregation: masked` needs `noise_multiplier` exactly where `privacy` is a budget: all parties add "
                "the same noise, on one grid"
            )

    def _check_lots(self) -> None:
        if isinstance(self.privacy, PrivacyRules) and self.privacy.lot_size == "auto":
            raise ValueError(
                "`privacy.lot_size: auto` is for train.yaml: in a federation all divide by numbers that were agreed "
                "on, so let `coterie plan --records` propose them"
            )
        if self.lot_sizes is None:
            return
        if not isinstance(self.privacy, PrivacyRules):
            raise ValueError("`lot_sizes` is for a budget: without one, `train.batch_size` is every party's")
        if self.privacy.lot_size is not None:
            raise ValueError("`lot_sizes` and `privacy.lot_size` say the same thing twice: leave out one")
        different = sorted(set(self.lot_sizes) ^ set(self.parties))
        if different:
            raise ValueError(f"`lot_sizes` names every party once, and differs from `parties` in {different[0]}")
        if self.privacy.max_lot is not None and self.privacy.max_lot < self.largest_lot:
            raise ValueError(f"`privacy.max_lot` {self.privacy.max_lot} is below a lot of {self.largest_lot}")

    def _check_shared_noise(self, with_budget: bool) -> None:
        if (self.noise == "shared") != (self.colluding is not None):
            raise ValueError("`noise: shared` and `colluding` belong together: set both or neither")
        if self.colluding is None:
            return
        if self.aggregation != "masked" or not with_budget:
            raise ValueError(
                "`noise: shared` needs `aggregation: masked` and a budget: a share alone is too little for a push "
                "that somebody can read"
            )
        if self.lost_party == "continue":
            raise ValueError(
                "`noise: shared` excludes `lost_party: continue`: without a party its share of the noise is missing"
            )
        if self.trunk != "shared":
            raise ValueError(
                "`noise: shared` needs `trunk: shared`: what a party applies to its own trunk shows in its later "
                "pushes, with its own share of the noise alone"
            )
        if self.colluding >= len(self.parties):
            raise ValueError(
                f"`colluding: {self.colluding}` leaves nobody of {len(self.parties)} parties whose noise would hide "
                "a record: it is at most one less"
            )

    def lot_of(self, party: str) -> int:
        """Expected units of a private party's round."""
        if self.lot_sizes is not None:
            return self.lot_sizes[party]
        agreed = self.privacy.lot_size if isinstance(self.privacy, PrivacyRules) else None
        return agreed if isinstance(agreed, int) else self.train.batch_size

    @property
    def preconditioner(self) -> PreconditionerSpec | None:
        """`privacy.preconditioner`; None also without a budget."""
        return self.privacy.preconditioner if isinstance(self.privacy, PrivacyRules) else None

    @property
    def largest_lot(self) -> int:
        """Of all parties; bounds and grids follow from it."""
        return max(self.lot_of(party) for party in self.parties)

    def content_hash(self) -> str:
        """Hex SHA-256 of the settings: the same on every party's machine. Paths count by their last component."""
        return content_hash(self)


class PartyConfig(Spec):
    """party.yaml: what one party keeps to itself."""

    later_keys = frozenset({"experts_over", "report_to"})

    party: PartyName = Field(description="This party's name in the federation.")
    federation: LocalPath = Field(description="The shared federation.yaml.")
    kit: LocalPath = Field(description="Folder with this party's key, certificate, the CA's and the signed roster.")
    data: DataSpec = Field(description="This party's text; it never leaves.")
    trunk: LocalPath = Field(description="Trunk file written by `coterie split`.")
    shard: LocalPath = Field(description="Shard file written by `coterie split`: the experts this party hosts.")
    run_dir: LocalPath = Field(description="Folder for metrics, checkpoints and the log.")
    cache: Literal["memory", "disk"] = Field(
        default="memory", description="For `experts`: where fetched layers lie; `disk` is below `run_dir`."
    )
    device: Device = Field(default="auto", description="`auto` takes the GPU when there is one.")
    devices: Devices = Field(
        default=1,
        description="Processes of this machine that share this party's lots, on GPUs each with its own; for "
        "`experts`. Fetched layers then lie on disk, where all read them. `auto`: one for each GPU of the machine, "
        "in whole groups; one where there is none, and with `device: cpu`.",
    )
    experts_over: Count = Field(
        default=1,
        description="Processes that the experts of every layer are spread over; each borrows the rows of its own, "
        "and tokens travel to them. Where `devices` is a multiple of it, there are several such groups.",
    )
    privacy: PartyPrivacy | Literal["none"] | None = Field(
        default=None, description="Local choices and own budget; `none` only where the federation allows mixing."
    )
    after_private: Literal["refuse", "reveal"] = Field(
        default="refuse",
        description="Without a budget, with text that was trained on privately before: refuse, or let hosts read it "
        "all the same; the ledger then says that no epsilon holds for it any more.",
    )
    ledger: LocalPath | None = Field(
        default=None,
        description="Without a budget: folder of this party's privacy ledgers, where earlier private runs are looked "
        "for; absent: as for `privacy.ledger`.",
    )
    report_to: ReportSpec | None = Field(
        default=None, description="Trackers that hear the figures that may be public; absent: none."
    )

    @property
    def ranks(self) -> int:
        """Processes that share this party's lots."""
        return max(self.device_count, self.experts_over)

    @property
    def device_count(self) -> int:
        """`devices`, where `auto` counts the GPUs of this machine."""
        if self.devices != "auto":
            return self.devices
        return 1 if self.device == "cpu" else auto_devices(self.experts_over)

    @property
    def ranks_by(self) -> str:
        """The setting that says so."""
        return "devices" if self.device_count > 1 else "experts_over"

    @model_validator(mode="before")
    @classmethod
    def _layers_are_lent(cls, given: Any) -> Any:
        if isinstance(given, dict) and "layers_over" in given:
            raise ValueError(
                "`layers_over` is for train.yaml: a party's layers are lent to the tokens one at a time anyway, and "
                "`devices: N` shares out the records; `experts_over: N` lets tokens travel instead"
            )
        return given

    @model_validator(mode="after")
    def _whole_groups(self) -> PartyConfig:
        check_groups(self.device_count, "experts_over", self.experts_over)
        return self


def check_task(party: PartyConfig) -> None:
    """Refuse what only `coterie train` does.

    Raises:
        ConfigError: the party's text is to be learnt by label words.
    """
    if party.data.task != "text":
        raise ConfigError(
            f"party {party.party}: `data.task: {party.data.task}` is for `coterie train`.",
            code="config-task",
            why="in a federation all parties train one loss, that of the next token",
            fix="leave it out; with `form: prompt_completion` and a class's word as completion a federation learns "
            "classes, too",
        )


def check_devices(party: PartyConfig, federation: FederationConfig) -> None:
    """Refuse several ranks where they could not share a party's work.

    Raises:
        ConfigError: another exchange than `experts`; experts over ranks with settings that need whole models.
    """
    if party.ranks > 1 and federation.exchange != "experts":
        name = party.ranks_by
        raise ConfigError(
            f"party {party.party}: `{name}` is {party.ranks}, and several ranks take part in "
            "`exchange: experts` alone.",
            code="config-devices",
            why="in `tokens` every hidden state crosses between the parties, and one process of a party alone may "
            "speak to the others",
            fix=f"leave out `{name}`, or agree on `exchange: experts`",
        )
    rules = party_privacy(federation, party) if party.experts_over > 1 else None
    if rules is None:
        return
    if rules.isolation != "fast":
        raise _whole_only(
            party, "`isolation: exact`, which holds where nothing is said", code="dp-spread-exact",
            fix="agree on `isolation: fast`, or use `devices: N`, with whole layers at each rank",
        )  # fmt: skip
    if rules.unit == "user":
        raise _whole_only(party, "`unit: user`", code="dp-spread-users")
    if rules.noise_bands > 1:
        raise _whole_only(party, "`noise_bands`", code="dp-spread-bands")
    if rules.preconditioner is not None:
        raise _whole_only(party, "`preconditioner`", code="dp-spread-coordinates")


def _whole_only(
    party: PartyConfig, setting: str, code: str, fix: str = "use `devices: N`, with whole layers at each rank"
) -> ConfigError:
    return ConfigError(
        f"party {party.party}: `experts_over` is not possible with {setting}.",
        code=code,
        why="a rank sees rows of several records, and a part of each record's gradient",
        fix=fix,
    )


def party_privacy(federation: FederationConfig, party: PartyConfig) -> PrivacySpec | None:
    """The privacy settings one party trains under: the shared mechanism with its own choices. None: without privacy.

    Returns:
        The settings with `lot_size` filled in, because the others divide by it.

    Raises:
        ConfigError: the party's block does not fit the federation's: a budget above the agreed one, `none` where
            mixing was not agreed, an undeclared starting artefact.
    """
    rules, own = federation.privacy, party.privacy
    if not isinstance(rules, PrivacyRules):
        if isinstance(own, PartyPrivacy):
            raise _misfit(party, "has a `privacy` block, but the federation trains without privacy")
        return None
    if own == "none":
        if not federation.mixed_privacy:
            raise _misfit(party, "says `privacy: none`, but the federation did not agree on `mixed_privacy`")
        return None
    local = own.model_dump(exclude_none=True) if isinstance(own, PartyPrivacy) else {}
    for name in ("epsilon", "delta"):
        if local.get(name, 0.0) > getattr(rules, name):
            raise _misfit(party, f"asks for {name} {local[name]}, above the agreed {getattr(rules, name)}")
    if (rules.unit == "user") != ("user_column" in local):
        raise _misfit(party, "must name `privacy.user_column` exactly when the federation's `unit` is `user`")
    if federation.noise == "shared" and local.get("seeded"):
        raise _misfit(party, "says `seeded`, but with `noise: shared` the others rely on secret noise")
    undeclared = undeclared_artefacts(federation.model, party.data, federation.preconditioner)
    if undeclared:
        raise _misfit(party, "; ".join(undeclared))
    return PrivacySpec(**{**rules.model_dump(), "lot_size": federation.lot_of(party.party), **local})


def _misfit(party: PartyConfig, problem: str) -> ConfigError:
    return ConfigError(
        f"party {party.party}: party.yaml {problem}.",
        code="config-privacy-misfit",
        why="the privacy statement is made for all parties together, from the agreed rules",
        fix="change party.yaml, or agree on a new federation.yaml and sign the roster again",
    )
