"""Every exception coterie raises on purpose.

::

    CoterieError
    ├── ConfigError        a file somebody wrote: unknown key, bad value, missing part
    ├── DataError          text that cannot be read, is empty, or lacks a column
    ├── ModelError         a model that cannot be built, split, joined or exchanged
    │   └── PlacementError an expert hosted by nobody, or by two parties
    ├── IdentityError      keys, certificates, the private CA
    │   └── RosterError    the signed list of parties does not fit
    ├── TransportError     the wire: a peer that is gone, late or speaks nonsense
    │   ├── FrameError     a message whose header does not check out
    │   │   └── MessageError a member's message that does not fit what was agreed
    │   └── DeadlineError  nothing came in time
    ├── RoundError         a round that was aborted or cannot be joined
    ├── CheckpointError    saved state that is missing, torn or of another run
    └── PrivacyError       anything that would make a privacy statement untrue
        ├── NoRuleError    a trainable parameter used in a way the engine cannot bound
        ├── BudgetError    an impossible or exhausted privacy budget
        ├── LedgerError    the durable record of privacy spent does not fit
        └── ProvenanceError a starting artefact made from private records

A person sees four lines: what is wrong, where, why it matters, what to do. Codes are stable.
"""

from __future__ import annotations


class CoterieError(Exception):
    """An error a person can act on.

    Args:
        message: one sentence with the real values and names: what is wrong.
        code: stable identifier, e.g. ``config-unknown-key``; defaults to the class's own.
        where: file and line, layer, peer or step.
        why: what would happen if this were ignored.
        fix: what to do about it.
        field: name of the setting or header field at fault. Code and field are all that may cross to a peer.
    """

    code = "error"

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
    code = "config"


class DataError(CoterieError):
    code = "data"


class ModelError(CoterieError):
    code = "model"


class PlacementError(ModelError):
    code = "placement"


class IdentityError(CoterieError):
    code = "identity"


class RosterError(IdentityError):
    code = "roster"


class TransportError(CoterieError):
    code = "transport"


class FrameError(TransportError):
    code = "frame"


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
    code = "deadline"


class RoundError(CoterieError):
    code = "round"


class CheckpointError(CoterieError):
    code = "checkpoint"


class PrivacyError(CoterieError):
    code = "privacy"


class NoRuleError(PrivacyError):
    code = "dp-no-rule"


class BudgetError(PrivacyError):
    code = "dp-budget"


class LedgerError(PrivacyError):
    code = "dp-ledger"


class ProvenanceError(PrivacyError):
    code = "dp-provenance"
