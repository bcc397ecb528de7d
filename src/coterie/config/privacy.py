"""Differential privacy: the budget, the mechanism and what one record is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from coterie.config.base import LocalPath, Spec
from coterie.config.data import DataSpec
from coterie.config.model import ModelSpec
from coterie.config.numbers import Bands, Count, Epsilon, Fraction, Positive, Smoothing

RELEASED_LOADS = ("private_load", "bias")
"""Ways of balance that release the experts' loads within the mechanism."""


class PreconditionerSpec(Spec):
    """Coordinates for the trained weights, from public text; `coterie precondition` writes the file."""

    path: LocalPath = Field(description="File of the factors.")
    provenance: str = Field(
        pattern=r"^(public|private|dp:\S+)$",
        description="What the text was that the file was made from: `public`, `private`, or `dp:LEDGER_ID`.",
    )
    not_covered: str | None = Field(
        default=None,
        min_length=1,
        description="With `provenance: private`: whose records the file was made from. The final statement lists it.",
    )


class PrivacyRules(Spec):
    """The mechanism: in a federation the same for all parties, and public."""

    epsilon: Epsilon = Field(description="Budget of the whole run: smaller is more private.")
    delta: Fraction = Field(default=1e-5, description="Allowed failure probability; well below 1 / records.")
    later_keys = frozenset({"noise_bands", "preconditioner"})

    clip_norm: Positive = Field(default=1.0, description="C: most that one record may move the gradient sum.")
    clipping: Literal["flat", "per_layer", "per_group", "automatic"] = Field(
        default="flat", description="One norm over all parameters, one per layer or group, or normalisation (AUTO-S)."
    )
    isolation: Literal["exact", "fast"] | None = Field(
        default=None,
        description="`exact`: every record is computed alone and added in integers, so that no record moves what "
        "another adds, whatever weights are served. `fast`: up to rounding. Absent: `exact` in a federation and for "
        "models in half precision, else `fast`.",
    )
    lot_size: Count | Literal["auto"] | None = Field(
        default=None,
        description="Expected records per round; absent: `train.batch_size`. Real lots vary around it. `auto`, in "
        "train.yaml: lot and rounds are chosen for the budget, up to `train.rounds` and within `compute_hours`.",
    )
    sampler: Literal["poisson", "truncated_poisson"] = Field(
        default="poisson", description="How a round's records are drawn; truncated never draws more than `max_lot`."
    )
    max_lot: Count | None = Field(default=None, description="Most records of a truncated lot.")
    unit: Literal["record", "user"] = Field(
        default="record", description="What is protected: one sequence of the prepared data, or all of one user's."
    )
    balance: Literal["off", "per_sequence", "private_load", "bias"] = Field(
        default="off",
        description="Keeps experts evenly used; the last two spend part of the mechanism on the expert loads.",
    )
    balance_coefficient: Positive | None = Field(
        default=None,
        description="Weight of the balance loss (absent: 0.02), or step of the bias in every round (absent: 0.003).",
    )
    load_share: Fraction = Field(
        default=0.1, description="Share of the clip norm that goes to the released expert loads."
    )
    load_smoothing: Smoothing = Field(
        default=0.5, description="Running average of released loads over rounds; much of it is slow."
    )

    noise_bands: Bands = Field(
        default=1,
        description="Over how many rounds noise hangs together, each taking back part of earlier ones': 4 to 16 "
        "leave less noise in the weights at epsilon 8, more at 1 (`coterie plan` compares). Needs `optim.kind: sgd`.",
    )

    preconditioner: PreconditionerSpec | None = Field(
        default=None,
        description="Train in coordinates in which gradients are more even: more is learnt from the same budget.",
    )

    @model_validator(mode="after")
    def _bands_fit(self) -> PrivacyRules:
        if self.noise_bands > 1 and self.sampler != "poisson":
            raise ValueError(
                f"`noise_bands` excludes `sampler: {self.sampler}`: each lot is drawn by coins from one fixed block "
                "of the records, and a cut lot is not"
            )
        return self

    @model_validator(mode="after")
    def _lot_fits_sampler(self) -> PrivacyRules:
        if (self.sampler == "truncated_poisson") != (self.max_lot is not None):
            raise ValueError("`max_lot` and `sampler: truncated_poisson` belong together: set both or neither")
        if self.lot_size == "auto" and self.max_lot is not None:
            raise ValueError("`max_lot` needs a number in `lot_size`: with `auto` it is not known yet")
        if self.lot_size == "auto" and self.noise_bands > 1:
            raise ValueError("`noise_bands` needs a number in `lot_size`: `auto` compares lots without bands")
        if self.max_lot is not None and isinstance(self.lot_size, int) and self.max_lot < self.lot_size:
            raise ValueError(f"`max_lot` {self.max_lot} is below `lot_size` {self.lot_size}")
        return self


class LocalPrivacy(Spec):
    """What a party decides for itself: none of it changes what others may rely on, except a smaller budget."""

    later_keys = frozenset({"tensor_cores"})

    method: Literal["auto", "book_keeping", "ghost"] = Field(
        default="auto",
        description="One backward and more memory, two and less, or chosen by an estimate; same result.",
    )
    physical_batch: Count = Field(default=16, description="Records computed at once; never changes the result.")
    tensor_cores: bool = Field(
        default=False,
        description="Norms and clipped sums on the GPU's tensor cores, with the wider bound on rounding that they "
        "need: a record contributes up to half a percent less. Without effect on other devices and with "
        "`isolation: exact`.",
    )
    user_column: str | None = Field(default=None, description="Column that names the user, for `unit: user`.")
    records_per_user: Count = Field(default=16, description="Most sequences of one user per lot, for `unit: user`.")
    ledger: LocalPath | None = Field(
        default=None,
        description="Folder of the privacy ledger; absent: COTERIE_HOME/ledger, else ~/.local/share/coterie/ledger.",
    )
    seeded: bool = Field(
        default=False, description="Noise and lots from the seed. For tests; the run is then NOT private."
    )


class PrivacySpec(PrivacyRules, LocalPrivacy):
    """The `privacy` block of train.yaml: mechanism and local choices together."""

    later_keys = PrivacyRules.later_keys | LocalPrivacy.later_keys | {"compute_hours"}

    compute_hours: Positive = Field(
        default=1.0, description="For `lot_size: auto`: hours that all rounds together may compute on this machine."
    )
    adaptive_quantile: Fraction | None = Field(
        default=None, description="Adapt the clip norms so that this share of units stays unclipped."
    )

    @model_validator(mode="after")
    def _thresholds_stay(self) -> PrivacySpec:
        if self.noise_bands > 1 and self.adaptive_quantile is not None:
            raise ValueError(
                "`noise_bands` excludes `adaptive_quantile`: what a unit adds to a round stands in later rounds, "
                "whose noise would have another size"
            )
        return self

    @model_validator(mode="after")
    def _user_is_named(self) -> PrivacySpec:
        if (self.unit == "user") != (self.user_column is not None):
            raise ValueError("`unit: user` and `user_column` belong together: set both or neither")
        return self


class PartyPrivacy(LocalPrivacy):
    """The `privacy` block of party.yaml: local choices, and a budget of one's own if it is to be smaller."""

    epsilon: Epsilon | None = Field(default=None, description="This party's own budget; absent: the federation's.")
    delta: Fraction | None = Field(default=None, description="This party's own delta; absent: the federation's.")


def undeclared_artefacts(
    model: ModelSpec, data: DataSpec, preconditioner: PreconditionerSpec | None = None
) -> list[str]:
    """What private training has to know of its starting artefacts and the config does not say: where they came
    from, and of private ones from whose records."""
    problems = [
        f"`{name}.provenance` is `private`: say in `{name}.not_covered` whose records it was made from"
        for name, spec in (
            ("model", model),
            ("data.tokenizer", data.tokenizer),
            ("privacy.preconditioner", preconditioner),
        )
        if spec is not None and spec.provenance == "private" and spec.not_covered is None
    ]
    if model.path is not None and model.provenance is None:
        problems.append("private training starts from `model.path`: declare `model.provenance`")
    if data.tokenizer.path is not None and data.tokenizer.provenance is None:
        problems.append("private training uses `data.tokenizer.path`: declare `data.tokenizer.provenance`")
    return problems
