"""What a private run starts from, and whether its guarantee covers that.

A model that starts from weights trained on private records without noise reveals those records, whatever happens
afterwards; so does a vocabulary counted on them, or a filter fitted to them. Every starting artefact therefore
declares where it comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from torch import nn

from coterie.errors import ProvenanceError
from coterie.models.split.trainings import Training, trainings_of

Origin = Literal["public", "dp", "private", "undeclared"]


@dataclass(frozen=True)
class Artefact:
    """A thing that existed before the run.

    Attributes:
        kind: weights, tokenizer, vocabulary, filter, or another word that says what it is.
        origin: public; dp (made under a budget of its own); private; undeclared.
        ledger: for dp, the ledger that counts what it cost.
        uncovered: for private, whose records it was made from: accepted only with this sentence, which the final
            statement repeats.
        overruled: why the origin holds although the saved model's own record speaks against it.
    """

    kind: str
    origin: Origin
    ledger: str | None = None
    uncovered: str | None = None
    overruled: str | None = None

    @classmethod
    def parse(cls, kind: str, text: str | None, uncovered: str | None = None) -> Artefact:
        """From a config's word: ``public``, ``private``, ``dp:LEDGER_ID``, or None for undeclared.

        Raises:
            ProvenanceError: another word, or ``dp`` without a ledger.
        """
        if text is None:
            return cls(kind, "undeclared", uncovered=uncovered)
        if text in ("public", "private"):
            return cls(kind, text, uncovered=uncovered)  # type: ignore[arg-type]
        if text.startswith("dp:") and len(text) > 3:
            return cls(kind, "dp", ledger=text[3:])
        raise ProvenanceError(
            f"the {kind}'s provenance is `{text}`.",
            code="dp-provenance-word",
            why="the final statement has to say what it covers",
            fix="write public, private, or dp: and the ledger that counts it",
        )

    def to_json(self) -> dict[str, str | None]:
        return asdict(self)

    def as_saved(self, trainings: Sequence[Training]) -> Artefact:
        """What it really is, where the saved model itself says what it was trained under.

        Raises:
            ProvenanceError: it was trained on private text without privacy, and that is neither declared nor
                overruled.
        """
        open_ones = [training for training in trainings if not training.protected]
        ledgers = sorted({str(training.ledger) for training in trainings if training.privacy == "budget"})
        if open_ones and self.origin != "private" and not self.overruled:
            raise ProvenanceError(
                f"the {self.kind} are declared {self.origin}, but run {open_ones[0].run} trained them on private "
                f"text {'with noise from a seed' if open_ones[0].privacy == 'seeded' else 'without privacy'}.",
                code="dp-private-start",
                why="what they reveal about that text was never noised, and nothing in this run can take it back",
                fix="start from another model, declare `provenance: private` with `not_covered`, or say in "
                "`overrule_origin` why they may be taken for what is declared; the statement repeats it",
            )
        if self.origin in ("public", "undeclared") and ledgers and not self.overruled:
            return replace(self, origin="dp", ledger=", ".join(ledgers))
        return self


def declared(provenance: Mapping[str, str] | Iterable[Artefact] | None) -> tuple[Artefact, ...]:
    """Artefacts from what a caller passes: words by kind, artefacts, or nothing (weights undeclared)."""
    if provenance is None:
        return (Artefact("weights", "undeclared"),)
    if isinstance(provenance, Mapping):
        return tuple(Artefact.parse(kind, text) for kind, text in provenance.items())
    return tuple(provenance)


def as_loaded(artefacts: Iterable[Artefact], model: nn.Module) -> tuple[Artefact, ...]:
    """The artefacts, held to what the folder that the model was loaded from says of it.

    Raises:
        ProvenanceError: see `Artefact.as_saved`.
    """
    trainings = trainings_of(model)
    if not trainings:
        return tuple(artefacts)
    given = list(artefacts)
    if not any(artefact.kind == "weights" for artefact in given):
        given.append(Artefact("weights", "undeclared"))
    return tuple(a.as_saved(trainings) if a.kind == "weights" else a for a in given)


def not_covered(artefacts: Iterable[Artefact]) -> list[str]:
    """What the statement must list as outside the guarantee because of where the run started.

    Raises:
        ProvenanceError: an artefact made from private records, without a sentence that says whose.
    """
    lines = []
    for artefact in artefacts:
        if artefact.overruled:
            lines.append(
                f"whether the starting {artefact.kind} were made from private records: what was saved with them was "
                f"overruled: {artefact.overruled}"
            )
        if artefact.origin == "private":
            if not artefact.uncovered:
                raise ProvenanceError(
                    f"the {artefact.kind} was made from private records.",
                    code="dp-private-start",
                    why="what it reveals about them was never noised, and nothing in this run can take it back",
                    fix="start from public or differentially private artefacts, or name the records it was made "
                    "from as not covered (`not_covered` beside `provenance`; Artefact(..., uncovered='...'))",
                )
            lines.append(f"records behind the starting {artefact.kind}: {artefact.uncovered}")
        elif artefact.origin == "dp":
            lines.append(
                f"what the starting {artefact.kind} cost: counted in ledger {artefact.ledger}, to be added where "
                "it was made from the same records"
            )
        elif artefact.origin == "undeclared":
            lines.append(f"records behind the starting {artefact.kind}: its provenance was not declared")
    return lines
