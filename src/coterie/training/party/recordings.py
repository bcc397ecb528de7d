"""What a party records for an audit, where federation.yaml says so: what it received, and its key to what it sent."""

from __future__ import annotations

from typing import Any

from coterie.federation.wire.recording import ANSWERS, TRANSCRIPT, Recorder
from coterie.training.experts.host import model_parts
from coterie.training.folders import private_folder
from coterie.training.party.answer_key import OWN, AnswerKey
from coterie.training.party.inputs import PartyInputs
from coterie.training.party.own_masks import OwnMasks

_GIB = 1 << 30


class Recordings:
    """Both recordings of one party; neither exists without the agreement.

    Args:
        inputs: what the party brings.
        agreement: hash of what all parties signed.

    Attributes:
        received: keeps what other parties send.
        key: keeps what this party's own messages were made of.
        masks: keeps its masks, where pushes are masked.
    """

    received: Recorder | None = None
    key: AnswerKey | None = None
    masks: OwnMasks | None = None

    def __init__(self, inputs: PartyInputs, agreement: str) -> None:
        self._inputs, self._agreement = inputs, agreement
        self._recorders: dict[str, Recorder] = {}
        spec = inputs.federation.transcript
        if spec is None:
            return
        rounds = None if spec.rounds == "all" else spec.rounds
        for kind, more in ((TRANSCRIPT, ()), (ANSWERS, (OWN,))):
            folder, names = private_folder(inputs.run_dir) / kind, (*inputs.federation.parties, *more)
            self._recorders[kind] = Recorder(folder, names, rounds, int(spec.max_gib * _GIB))
        self.received = self._recorders[TRANSCRIPT]
        self.key = AnswerKey(self._recorders[ANSWERS], inputs.train)
        if inputs.federation.aggregation == "masked":
            self.masks = OwnMasks(self._recorders[TRANSCRIPT], inputs.party)

    def open(self, run: str) -> None:
        """The run has a name: begin to write. Can be repeated.

        Raises:
            CheckpointError: a folder cannot be written.
        """
        for kind, recorder in self._recorders.items():
            recorder.open({"kind": kind, "run": run, **self._facts()})

    def close(self) -> None:
        """Make everything durable."""
        for recorder in self._recorders.values():
            recorder.close()

    def _facts(self) -> dict[str, Any]:
        """What reading a transcript needs, and every party knows."""
        inputs, federation = self._inputs, self._inputs.federation
        experts = federation.exchange == "experts"
        pieces = model_parts(federation, inputs.model, inputs.placement) if experts else ()
        return {
            "party": inputs.party,
            "parties": list(federation.parties),
            "federation": federation.name,
            "agreement": self._agreement,
            "exchange": federation.exchange,
            "placement": [list(layer) for layer in inputs.placement.hosts],
            "parts": [vars(piece) for piece in pieces],
            "push_dtype": federation.push_dtype,
            "aggregation": federation.aggregation,
            "weights_dtype": federation.weights_dtype,
        }
