"""What the ledger fixes about a run when it starts, and what a resumed run is held to.

A checkpoint is a file that anybody may edit or mix up; the ledger's chain is not. What bounds the cost of a round
(noise, sampling, clipping, units, whether randomness is secret) is therefore compared with the ledger on resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from coterie.dp.accounting.accountant import Mechanism
from coterie.dp.accounting.ledger import Ledger
from coterie.dp.accounting.lots import Units
from coterie.dp.accounting.provenance import Artefact
from coterie.dp.accounting.texts import Originals
from coterie.dp.per_sample.engine import Engine
from coterie.dp.plan import PrivacyPlan
from coterie.dp.sum_engine import SumEngine
from coterie.errors import LedgerError
from coterie.revision import software

UNCHECKED = (
    "whether the model keeps records apart: it was not compared with one record at a time (self_check=False, or an "
    "engine of one's own)"
)


_UNSAID = {"pooled": None, "bands": None, "order": None}
"""What an entry does not speak of where it is so."""


class RunStart(NamedTuple):
    """The parts of a run that its ledger entry is made from.

    Attributes:
        order: digest of which record has which number, where that decides anything: a unit's block of noise in bands
            follows from its number, and has to stay the same over the run. None elsewhere.
    """

    plan: PrivacyPlan
    mechanism: Mechanism
    units: Units
    engine: SumEngine
    order: str | None = None

    def facts(self) -> dict[str, Any]:
        """Public facts of the entry, JSON values."""
        plan = self.plan
        return {
            "unit": "record" if self.units.starts is None else "user",
            "units": self.units.count,
            "users": grouping_digest(self.units),
            "clip_norm": plan.clip_norm,
            "clipping": repr(self.engine.clipping),
            "groups": len(self.engine.groups),
            "eta": self.engine.eta,
            "adaptive_quantile": plan.adaptive_quantile,
            "seeded": plan.seed is not None,
            "isolation": plan.isolation,
            "half_precision": plan.half_precision,
            **({} if plan.pooled is None else {"pooled": plan.pooled.to_json()}),
            **({} if plan.bands is None else {"bands": plan.bands.to_json()}),
            **({} if self.order is None else {"order": self.order}),
        }

    @property
    def tensor_cores(self) -> bool:
        """Whether norms and sums are taken on tensor cores; promises nothing, so another process may do otherwise."""
        return isinstance(self.engine, Engine) and self.engine.tensor_cores

    def open(
        self,
        ledger: Ledger,
        run: str,
        artefacts: Iterable[Artefact],
        record: Mapping[str, Any],
        self_check: bool,
        originals: Originals,
        trained: str | None = None,
    ) -> None:
        """Write the run into the ledger, before anything is released.

        Args:
            ledger: of the dataset.
            run: identifier.
            artefacts: what the start was made from.
            record: what one record is, in public words and numbers (packing, sequence length).
            self_check: the engine was compared with one record at a time.
            originals: the documents that the records were made from.
            trained: what of the model is, in words, where a part of it is frozen.
        """
        ledger.record_texts(run, originals)
        ledger.start_run(
            run, self.mechanism, self.plan.rounds, **self.facts(),
            budget=asdict(self.plan.budget), provenance=[artefact.to_json() for artefact in artefacts],
            record=dict(record), self_check=self_check, **software(),
            **({"tensor_cores": True} if self.tensor_cores else {}),
            **({} if trained is None else {"trained": trained}),
        )  # fmt: skip

    def check(self, ledger: Ledger, run: str) -> None:
        """Hold a resumed run to its ledger entry.

        Raises:
            LedgerError: noise, sampling, rounds, clipping, units or secrecy are not what the run was started with.
        """
        fixed = ledger.run(run)
        now = {
            "mechanism": self.mechanism.to_json(),
            "rounds": self.plan.rounds,
            **_UNSAID,
            **self.facts(),
        }
        # `eta` follows from the model's shapes and may be stated more tightly by a later version.
        before = {name: fixed.get(name, _UNSAID.get(name, value)) for name, value in now.items()}
        other = [name for name, value in now.items() if name != "eta" and before[name] != value]
        if other:
            raise LedgerError(
                f"the {other[0]} of run {run} is {now[other[0]]}, the ledger says {before[other[0]]}.",
                code="dp-ledger-run",
                where=str(ledger.folder),
                why="noise, sampling, clipping and units are fixed in advance, and the statement speaks of these",
                fix="resume it with the settings and the checkpoint it was started with, or start a new run",
            )


def grouping_digest(units: Units) -> str | None:
    """SHA-256 of which records belong together; None where every record is its own unit."""
    if units.starts is None or units.order is None:
        return None
    owner = np.empty(units.records, np.int64)
    for unit in range(units.count):
        members = units.order[units.starts[unit] : units.starts[unit + 1]]
        owner[members] = members.min()
    return hashlib.sha256(owner.tobytes()).hexdigest()
