"""Every exception coterie raises on purpose.

::

    CoterieError
    ├── ConfigError
    ├── DataError
    ├── ModelError
    │   └── PlacementError
    ├── IdentityError
    │   └── RosterError
    ├── TransportError
    │   ├── FrameError
    │   │   └── MessageError
    │   └── DeadlineError
    ├── RoundError
    ├── RankError
    ├── CheckpointError
    ├── AuditError
    └── PrivacyError
        ├── NoRuleError
        ├── BudgetError
        ├── LedgerError
        └── ProvenanceError

A person sees four lines: what is wrong, where, why it matters, what to do. Codes are stable.
"""

from __future__ import annotations

import shlex
from pathlib import Path


class CoterieError(Exception):
    """An error a person can act on.

    Args:
        message: one sentence with the real values and names: what is wrong.
        code: stable identifier, e.g. ``config-unknown-key``; defaults to the class's own.
        where: file and line, layer, peer or step.
        why: what would happen if this were ignored.
        fix: what to do about it; defaults to the class's own.
        field: name of the setting or header field at fault. Code and field are all that may cross to a peer.
    """

    code = "error"
    fix: str | None = None
    known_to_all = False
    """Of a run's ranks all have heard of it."""

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        where: str | None = None,
        why: str | None = None,
        fix: str | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        self.where = where
        self.why = why
        if fix is not None:
            self.fix = fix
        self.field = field

    def __str__(self) -> str:
        lines = [self.message]
        lines += [f"  {name:<6} {text}" for name, text in self.details() if text]
        return "\n".join(lines)

    def details(self) -> list[tuple[str, str | None]]:
        """The labelled lines under the message, in the order they are printed."""
        return [("where", self.where), ("why", self.why), ("fix", self.fix)]


class ConfigError(CoterieError):
    """A file somebody wrote: unknown key, bad value, missing part."""

    code = "config"


class DataError(CoterieError):
    """Text that cannot be read, is empty, or lacks a column."""

    code = "data"


class ModelError(CoterieError):
    """A model that cannot be built, split, joined or exchanged."""

    code = "model"


class PlacementError(ModelError):
    """An expert hosted by nobody, or by two parties."""

    code = "placement"


class IdentityError(CoterieError):
    """Keys, certificates or the private CA do not fit."""

    code = "identity"


class RosterError(IdentityError):
    """The signed list of parties does not fit."""

    code = "roster"


class TransportError(CoterieError):
    """The wire: a peer that is gone, late or speaks nonsense."""

    code = "transport"


class FrameError(TransportError):
    """A message whose header does not check out."""

    code = "frame"
    fix = "run the same version of coterie everywhere; if it is the same, see the log of the member that sent it"


class MessageError(FrameError):
    """A message that no honest member sends.

    Args:
        peer: who sent it, where it came to this process; None where another member says so of a message of ours.
    """

    code = "message"

    def __init__(self, message: str, *, peer: str | None = None, **details: str | None) -> None:
        super().__init__(message, **details)
        self.peer = peer
        self.counted = False  # against its sender, by the gate of this process


class DeadlineError(TransportError):
    """Nothing came in time."""

    code = "deadline"
    fix = "see whether that member runs and is reachable; a longer `deadline_s` allows for slow lines and machines"


class RoundError(CoterieError):
    """A round that was aborted or cannot be joined."""

    code = "round"
    fix = "nothing at first: the round is tried again; if it keeps failing, see the log of the member that is named"


class RankError(CoterieError):
    """Another process of the same run that is gone, silent, or at something else."""

    code = "ranks"


class CheckpointError(CoterieError):
    """Saved state that is missing, torn, of another run or of a later version."""

    code = "checkpoint"


class AuditError(CoterieError):
    """A measurement that cannot be made from what is there."""

    code = "audit"


class PrivacyError(CoterieError):
    """Anything that would make a privacy statement untrue."""

    code = "privacy"


class NoRuleError(PrivacyError):
    """A trainable parameter is used in a way that the engine cannot bound."""

    code = "dp-no-rule"


class BudgetError(PrivacyError):
    """An impossible or exhausted privacy budget."""

    code = "dp-budget"


class LedgerError(PrivacyError):
    """The durable record of privacy spent does not fit."""

    code = "dp-ledger"


class ProvenanceError(PrivacyError):
    """A starting artefact was made from private records."""

    code = "dp-provenance"


def as_argument(path: Path | str) -> str:
    """A path as a shell takes it, in a command that a message shows: quoted where it has spaces."""
    return shlex.quote(str(path))
