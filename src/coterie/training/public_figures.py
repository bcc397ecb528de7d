"""Which figures of a run may leave the machine: those that the model's own promise covers, and no other.

A figure is public where it says nothing of private records (the round, a learning rate that is a function of it), or
where the noise that was accounted for lies in it. Seconds are neither: how long a round takes depends on how many
records its secret lot held and on how long they are. Figures that are not named here stay, whatever they are called.
"""

from __future__ import annotations

from collections.abc import Iterable

from coterie.config import (
    DataSpec,
    FederationConfig,
    ModelSpec,
    PartyConfig,
    PreconditionerSpec,
    TrainConfig,
    party_privacy,
)
from coterie.config.privacy import undeclared_artefacts
from coterie.errors import PrivacyError

OF_EVERY_RUN = frozenset({"lr"})
OF_A_BUDGET = frozenset({"epsilon", "delta", "noise_multiplier"})
"""From the accountant, which knows N and settings and no record; the statement beside the model says them, too."""
OF_RELEASED_LOADS = frozenset({"load_most", "load_least"})
"""Read from noised sums."""
OF_PUBLIC_TEXT = frozenset({"loss", "test_loss", "tokens", "seconds"})


def figures_of_train(config: TrainConfig) -> frozenset[str]:
    """The figures of `coterie train` that may leave.

    A seeded run keeps no promise. A start that was made from private records, or of which nobody says that it was
    not, speaks through every loss and load, which this run's own noise does not cover.
    """
    clean = public_start(config.model, config.data, config.preconditioner)
    clean = clean and not undeclared_artefacts(config.model, config.data)
    if config.privacy is None:
        public = clean and config.data.provenance == "public"
        return OF_EVERY_RUN | OF_PUBLIC_TEXT if public else OF_EVERY_RUN
    if config.privacy.seeded:
        return OF_EVERY_RUN
    return OF_EVERY_RUN | OF_A_BUDGET | (OF_RELEASED_LOADS if clean else frozenset())


def figures_of_party(federation: FederationConfig, party: PartyConfig) -> frozenset[str]:
    """The figures of a party's run that may leave. No loss and no load: the others' text is in the model, too.

    Raises:
        ConfigError: party.yaml does not fit what was agreed.
    """
    privacy = party_privacy(federation, party)
    return OF_EVERY_RUN if privacy is None or privacy.seeded else OF_EVERY_RUN | OF_A_BUDGET


def check_public(asked: Iterable[str], public: frozenset[str]) -> None:
    """Refuse to send what may not leave.

    Args:
        asked: names of figures.
        public: those that may.

    Raises:
        PrivacyError: one of them may not.
    """
    private = sorted(set(asked) - public)
    if private:
        raise PrivacyError(
            f"`report_to.figures` names {', '.join(private)}, which may not leave this machine from this run.",
            code="report-private-figure",
            why="others read a tracker, and no budget covers what losses, lots and times say of private records",
            fix=f"name some of {', '.join(sorted(public))}; the rest is in RUN_DIR/private, for `coterie dashboard`",
        )


def public_start(model: ModelSpec, data: DataSpec, preconditioner: PreconditionerSpec | None = None) -> bool:
    """Whether nothing that a run starts from was declared as made from private records without privacy."""
    declared = (model.provenance, data.tokenizer.provenance, preconditioner and preconditioner.provenance)
    return "private" not in declared and model.overrule_origin is None
