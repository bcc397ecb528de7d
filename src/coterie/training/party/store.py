"""One party's checkpoints in a federation: trunk, hosted experts and their optimisers, under the run they belong to.

``RUN_DIR/run.json`` names the run (the coordinator chose it), the party, the agreement and the digest of the text;
``RUN_DIR/private/checkpoints/`` holds `CheckpointStore` folders. A checkpoint counts once the coordinator has
published its record.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from coterie.checkpoints import CheckpointStore
from coterie.errors import CheckpointError
from coterie.federation.rounds.state import Saved
from coterie.models.split.origins import origin_of
from coterie.models.split.trainings import Training
from coterie.revision import software
from coterie.storage import check_keys, check_known, json_object, write_json
from coterie.training.folders import private_folder

_MARKER = "run.json"
_MARKED = ("kind", "run", "party", "agreement", "data", "coterie", "revision")
_KEPT = 3
"""Published checkpoints that stay; the older ones in case newer ones are torn or lost somewhere."""

_UNSEEN = ("checkpoint-read", "format-unknown", "checkpoint-base")
"""Errors that say nothing about whether a checkpoint is whole."""

FileTensors = Mapping[str, Mapping[str, Tensor]]


class PartyStore:
    """Checkpoints in a party's run folder.

    Args:
        run_dir: exists.
        party: this party's name.
        agreement: hash of the settings all parties signed.
        text: digest of the training text; empty when only looking.

    Attributes:
        run: name of the run; empty until `adopt`.

    Raises:
        CheckpointError: the folder is another party's, or was used under another agreement or with other text.
    """

    def __init__(self, run_dir: Path, party: str, agreement: str, text: str = "") -> None:
        self._run_dir, self._party, self._agreement, self._text = run_dir, party, agreement, text
        self._bad: set[Saved] = set()
        self._stale: set[int] = set()
        self._published: list[int] = []
        self.run = self._read_marker()

    def adopt(self, run: str) -> None:
        """Remember the run's name, on first contact with the coordinator.

        Raises:
            CheckpointError: the folder belongs to another run.
        """
        if self.run == run:
            return
        if self.run:
            raise self._foreign(f"run {self.run[:8]}, not of {run[:8]}")
        self.run = run
        marker = {"kind": "federation", "run": run, "party": self._party, "agreement": self._agreement}
        marker["data"] = self._text
        write_json(self._run_dir / _MARKER, {**marker, **software()})

    def held(self) -> tuple[Saved, ...]:
        """Checkpoints whose manifests can be read and that did not fail to load, oldest first.

        Raises:
            CheckpointError: one cannot be looked at now (``checkpoint-read``), or is not known to this version
                (``format-unknown``): nothing may follow from its absence.
        """
        if not self.run:
            return ()
        checkpoints = []
        store = self._store()
        for round_no in store.rounds():
            try:
                saved = Saved(round_no, store.get(round_no).digest)
            except CheckpointError as error:
                if error.code in _UNSEEN:
                    raise
                continue
            if saved not in self._bad:
                checkpoints.append(saved)
        return tuple(checkpoints)

    def save(
        self,
        round_no: int,
        tensors: FileTensors,
        lora: Mapping[str, Any] | None = None,
        trainings: tuple[Training, ...] = (),
        bases: Mapping[str, str] = MappingProxyType({}),
    ) -> str:
        """Write a checkpoint so that it survives a crash. What others may still need stays: see `published`.

        Args:
            round_no: finished rounds.
            tensors: file stem to named tensors.
            lora: settings of the adapters among them.
            trainings: what is behind the weights.
            bases: by stem, the content digest of the file with the frozen weights that are left out.

        Returns:
            The digest of its manifest, and so of everything in it.
        """
        store = self._store()
        state = {"party": self._party, "agreement": self._agreement}
        digest = store.write(
            round_no, tensors, state, named=self.run, lora=lora, trainings=trainings, bases=bases
        ).digest
        self._stale.discard(round_no)
        return digest

    def published(self, newest: int) -> None:
        """The coordinator says which published checkpoint is the newest. Call it with everything it says.

        Only now may older ones go, and those of a history that was given up: all parties hold this one. Two
        published before it stay, too. A new process does not know which they were, and keeps all until then.
        """
        if self._published and newest == self._published[-1]:
            return
        self._published = [round_no for round_no in self._published if round_no < newest] + (
            [newest] if newest else []
        )
        if len(self._published) < 2:
            return
        self._published = self._published[-_KEPT:]
        oldest = self._published[0] if len(self._published) == _KEPT else 0
        store = self._store()
        stale = self._stale - set(self._published)
        for round_no in store.rounds():
            if round_no < oldest or round_no in stale:
                store.remove(round_no)
        self._stale -= stale

    def went_back_to(self, round_no: int) -> None:
        """The run goes on from ``round_no``: later checkpoints belong to a history that was given up.

        They go once the next one is `published`. Until then they stay, in case going back was a mistake.
        """
        self._stale = {later for later in self._store().rounds() if later > round_no} if self.run else set()

    def trunk_file(self, round_no: int) -> Path:
        """The trunk in the checkpoint of a round."""
        return self._store().get(round_no).path / "trunk.safetensors"

    def load(
        self, source: Saved, stems: tuple[str, ...], bases: Mapping[str, str] = MappingProxyType({})
    ) -> dict[str, dict[str, Tensor]]:
        """The named files of a checkpoint, every byte verified.

        Args:
            source: as it was published.
            stems: the files.
            bases: as `save` was given them.

        Raises:
            CheckpointError: it is not the one that was published, or is damaged; it is not offered again. Or it goes
                with other frozen weights.
        """
        store = self._store()
        try:
            checkpoint = store.get(source.round)
            if checkpoint.digest != source.digest:
                raise CheckpointError(
                    f"{checkpoint.path} is not the checkpoint that was published for round {source.round}.",
                    code="checkpoint-digest",
                    why="parties would go on from states that do not belong together",
                    fix="an older checkpoint that all hold will be taken",
                )
            loaded = {stem: checkpoint.load(stem) for stem in stems}
            for stem in stems:
                _check_base(checkpoint.path / f"{stem}.safetensors", bases.get(stem, ""))
            return loaded
        except CheckpointError as error:
            if error.code not in _UNSEEN:
                self._bad.add(source)
            raise

    def _store(self) -> CheckpointStore:
        return CheckpointStore(private_folder(self._run_dir) / "checkpoints", f"{self.run}/{self._party}")

    def _read_marker(self) -> str:
        path = self._run_dir / _MARKER
        if not path.exists():
            return ""
        try:
            marker = json_object(path.read_bytes())
            kind, run, party, agreement = (marker.get(key) for key in ("kind", "run", "party", "agreement"))
            text = marker.get("data")
        except (OSError, ValueError):
            raise CheckpointError(
                f"{path} cannot be read.",
                code="checkpoint-torn",
                fix="restore it from a copy, or name another run_dir to begin anew",
            ) from None
        if kind is None:
            raise self._foreign("`coterie train`")
        check_known(path, "kind", kind, {"federation"}, CheckpointError)
        check_keys(path, "key", marker, _MARKED, CheckpointError)
        if party != self._party:
            raise self._foreign(f"party {party}, not of {self._party}")
        if agreement != self._agreement:
            raise self._foreign("other settings than those that are signed now")
        if self._text and text != self._text:
            raise CheckpointError(
                f"The training text of {self._run_dir} changed since the run was started.",
                code="run-changed",
                why="the rest of the run would not continue what was begun",
                fix="put it back, or name another run_dir to begin anew",
            )
        return str(run)

    def _foreign(self, whose: str) -> CheckpointError:
        return CheckpointError(
            f"{self._run_dir} holds a run of {whose}.",
            code="checkpoint-other-run",
            why="its checkpoints do not fit this run",
            fix="name another run_dir in party.yaml to begin anew, or bring the old settings back",
        )


def _check_base(path: Path, base: str) -> None:
    """Make sure that the frozen weights which a file goes with are those that are here.

    Raises:
        CheckpointError: they are others.
    """
    found = origin_of(path).base
    if found != base:
        raise CheckpointError(
            f"{path} holds adapters of other frozen weights than trunk and shard hold now."
            if found
            else f"{path} holds frozen weights beside the adapters, as an earlier version wrote them.",
            code="checkpoint-base",
            why="adapters mean nothing without the weights that they were trained on",
            fix="put back the trunk and shard that the run began with, or name another run_dir to begin anew",
        )
