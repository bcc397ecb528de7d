"""What the demo does: its parties, its model, how much is trained, and which arms are compared.

All arms start from the same public checkpoint. There are two groups, and arms are compared inside their group only.
Arms without privacy take the same number of rounds, with the same seed, learning-rate schedule and sequences per
party and round, on little text: a party that had enough of its own would have nothing to gain from the others.
Private arms take all the text that there is and few large lots, because each record hides among the others of its
lot. Learning rates, rounds, lots and amounts of text were tuned once; docs/how-to/demo.md says how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from coterie.config import OptimSpec
from coterie.demonstration.corpus import DEFAULT_SIZE, SUBJECTS, Size
from coterie.errors import ConfigError

NAMES = ("alder", "birch", "cedar", "dogwood", "elm", "fir")
"""The parties, in the order in which they join."""
_FEWEST_MASKED = 3
"""Parties whose sums can be masked."""


@dataclass(frozen=True)
class Arm:
    """One way to get a model for every party.

    Attributes:
        kind: ``public``: nothing is trained. ``alone``: one process per party, its own text. ``pooled``: one process,
            all text. ``federation``: one process per party and a coordinator, over the network.
        title: what the table calls it.
        sees: what it trains on in a round.
        exchange: of a federation.
        private: under a privacy budget for each party.
        shared_noise: hosts read only the sum of all parties, and each party adds its share of the noise.
    """

    name: str
    kind: Literal["public", "alone", "pooled", "federation"]
    title: str
    sees: str
    exchange: Literal["tokens", "experts"] | None = None
    private: bool = False
    shared_noise: bool = False

    @property
    def alone(self) -> str:
        """The arm of the same group in which every party trains by itself."""
        return "isolated_dp" if self.private else "isolated"

    @property
    def pooled(self) -> str:
        """The arm of the same group that has everybody's text in one process."""
        return "centralised_dp" if self.private else "centralised"


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("public", "public", "public model as it is", "nothing"),
        Arm("isolated", "alone", "each party alone", "the party's own sequences; the whole model is its own"),
        Arm(
            "tokens",
            "federation",
            "together, tokens",
            "the party's own sequences for its trunk; the sequences of all parties for the shared experts",
            exchange="tokens",
        ),
        Arm(
            "experts",
            "federation",
            "together, experts",
            "the sequences of all parties, for trunk and experts; each party's at that party",
            exchange="experts",
        ),
        Arm("centralised", "pooled", "all text in one place", "as many sequences as all parties together, mixed"),
        Arm(
            "isolated_dp",
            "alone",
            "private: alone",
            "a lot of the party's own records, clipped and noised",
            private=True,
        ),
        Arm(
            "experts_dp",
            "federation",
            "private: together",
            "a lot of every party's records, clipped and noised by that party before anything leaves it",
            exchange="experts",
            private=True,
        ),
        Arm(
            "experts_dp_shared",
            "federation",
            "private: together, shared noise",
            "the same, masked: hosts read only the sum of all parties, and a party adds its share of the noise",
            exchange="experts",
            private=True,
            shared_noise=True,
        ),
        Arm(
            "centralised_dp",
            "pooled",
            "private: in one place",
            "one lot as large as those of all parties together, clipped, and noised once",
            private=True,
        ),
    )
}
"""In the order of the table."""


def _small_model() -> dict[str, Any]:
    return {
        "hidden_size": 96,
        "intermediate_size": 96,
        "moe_intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 24,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "max_position_embeddings": 64,
    }


_OPTIM = OptimSpec(lr=1.5e-3, betas=(0.9, 0.99), schedule="cosine", warmup_rounds=3)
_PUBLIC_OPTIM = OptimSpec(lr=3e-3, betas=(0.9, 0.99), schedule="cosine", warmup_rounds=28)


_PRIVATE_OPTIM = OptimSpec(lr=3e-3, schedule="linear")


@dataclass(frozen=True)
class PrivatePlan:
    """The settings of the private arms.

    Attributes:
        lot_size: expected records per party and round, on the mean: every party draws each of its records equally
            often. The pooled arm takes all their lots together.
        epsilon, delta: what each party may spend in one arm. Noise is calibrated to it.
        physical_batch: records computed at once, where they are not computed alone; evaluated at once.
    """

    rounds: int = 6
    lot_size: int = 144
    epsilon: float = 8.0
    delta: float = 1e-5
    clip_norm: float = 1.0
    physical_batch: int = 128
    eval_every: int = 3
    optim: OptimSpec = _PRIVATE_OPTIM


@dataclass(frozen=True)
class DemoPlan:
    """The settings of one demo.

    Attributes:
        batch: sequences per party and round; the pooled arm takes that many times the parties.
        micro_batch: of the federation, two of them in flight.
        at_once: how many baseline runs go on together, one processor core each. (Two cores for one run of a model
            this small gain nothing: 0.11 s a round on one, 0.22 s of processor time on two.)
        private: of the arms under a privacy budget.
        colluding: parties that shared noise holds against, together.
        units: records of each party for private training; counted when there is text.
        noise_multiplier: that all parties add under shared noise; found when the units are known.
        recorded: rounds that each federation's parties record of what others send them, for the audit; a private one
            with whole noise records all.
        audit_s: seconds that attacks may take; canaries and the least that each attack needs come on top.
        canaries: records made for the audit of epsilon.
        quick: too small to show anything but that it works.
    """

    parties: tuple[str, ...] = NAMES[:3]
    arms: tuple[str, ...] = tuple(ARMS)
    rounds: int = 48
    batch: int = 16
    micro_batch: int = 8
    eval_every: int = 24
    seed: int = 0
    sequence_length: int = 64
    vocab_size: int = 1024
    family: str = "qwen3_moe"
    model: dict[str, Any] = field(default_factory=_small_model)
    optim: OptimSpec = _OPTIM
    public_rounds: int = 520
    public_batch: int = 16
    public_optim: OptimSpec = _PUBLIC_OPTIM
    private: PrivatePlan = PrivatePlan()
    colluding: int = 1
    units: dict[str, int] = field(default_factory=dict)
    noise_multiplier: float | None = None
    size: Size = DEFAULT_SIZE
    at_once: int = 2
    recorded: int = 2
    audit_s: float = 62.0
    canaries: int = 200
    quick: bool = False

    def of_kind(self, *kinds: str) -> list[Arm]:
        """The chosen arms of some kinds, in the order of the table."""
        return [arm for arm in ARMS.values() if arm.name in self.arms and arm.kind in kinds]

    def lot_of(self, party: str) -> int:
        """Expected records of a party in a private round."""
        if not self.units:
            return self.private.lot_size
        lots = self.private.lot_size * len(self.parties)
        return max(1, round(lots * self.units[party] / sum(self.units.values())))

    def rounds_of(self, arm: Arm) -> int:
        return self.private.rounds if arm.private else self.rounds


def make_plan(
    parties: int,
    rounds: int | None = None,
    arms: Sequence[str] | None = None,
    *,
    quick: bool = False,
) -> DemoPlan:
    """The plan behind the demo's options.

    Args:
        parties: members of the federation.
        rounds: of every arm; default: by the demo's size.
        arms: names out of `ARMS`; default: all that so many parties can have.
        quick: a much smaller demo that shows every step and proves nothing.

    Raises:
        ConfigError: an option is out of range, or an arm is not known.
    """
    if not 2 <= parties <= len(SUBJECTS):
        raise ConfigError(
            f"--parties is {parties}; the demo works for 2 to {len(SUBJECTS)}.",
            code="demo-parties",
            why="each party holds the text of one subject, and a federation of one is no federation",
            fix=f"choose a number from 2 to {len(SUBJECTS)}",
        )
    if rounds is not None and rounds < 1:
        raise ConfigError(f"--rounds is {rounds}; at least one is needed.", code="demo-rounds", fix="--rounds 48")
    possible = [name for name in ARMS if parties >= _FEWEST_MASKED or not ARMS[name].shared_noise]
    arms = possible if arms is None else arms
    unknown = [name for name in arms if name not in ARMS]
    if unknown or not arms:
        raise ConfigError(
            f"--arms names {', '.join(unknown) or 'nothing'}, which is no arm of the demo.",
            code="demo-arms",
            fix=f"choose from: {', '.join(ARMS)}",
        )
    if impossible := [name for name in arms if name not in possible]:
        raise ConfigError(
            f"--arms names {impossible[0]}, and --parties is {parties}.",
            code="demo-arms",
            why="of two parties, each subtracts its own sum and has the other's",
            fix=f"leave it out, or let {_FEWEST_MASKED} parties take part",
        )
    plan = DemoPlan(NAMES[:parties], tuple(name for name in ARMS if name in arms))
    if quick:
        plan = replace(
            plan,
            quick=True,
            audit_s=5.0,
            canaries=20,
            rounds=8,
            eval_every=4,
            public_rounds=24,
            private=PrivatePlan(rounds=3, lot_size=16, eval_every=1),
            size=Size(public_train=60_000, public_test=4_000, party_train=12_000, party_test=6_000, party_all=24_000),
        )
    return plan if rounds is None else _shortened(plan, rounds)


def _shortened(plan: DemoPlan, rounds: int) -> DemoPlan:
    """The plan with another number of rounds; private arms keep theirs unless it is smaller still."""
    private = min(rounds, plan.private.rounds)
    return replace(
        plan,
        rounds=rounds,
        eval_every=max(1, min(plan.eval_every, rounds // 4)),
        private=replace(plan.private, rounds=private, eval_every=max(1, min(plan.private.eval_every, private // 3))),
    )
