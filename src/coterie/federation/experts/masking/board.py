"""The agreement on a masked push over the wire: every party tells every other, and waits until it has heard from all.

Three times in an attempt something is said: openings, signed keys, and the digest of what will be pushed. The first
word of a party stands; another one in the same attempt is refused.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from coterie.errors import RoundError
from coterie.federation.cancel import CancelToken
from coterie.federation.experts.masking.session import (
    Held,
    KeyMaker,
    MaskSession,
    Opening,
    Scope,
    Signer,
    new_opening,
)
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.wire.transport import Lane, Message, Transport

OPENING, KEY, DIGEST = "mask-opening", "mask-key", "mask-digest"
KINDS = (OPENING, KEY, DIGEST)

_LOOK_S = 0.1
"""How often a wait looks whether the attempt still counts."""


class MaskBoard:
    """What the parties of the open attempt have said to this one.

    Args:
        me: this party.
    """

    def __init__(self, me: str) -> None:
        self._me = me
        self._open: Attempt | None = None
        self._active: tuple[str, ...] = ()
        self._said: dict[str, dict[str, Any]] = {}
        self._changed = threading.Condition()

    def begin(self, attempt: Attempt | None, active: Sequence[str]) -> None:
        """Take what is said for this attempt; the same one again changes nothing."""
        with self._changed:
            if attempt != self._open:
                self._open, self._active = attempt, tuple(active)
                self._said = {kind: {} for kind in KINDS}
            self._changed.notify_all()

    def take(self, peer: str, message: Message) -> Message:
        """Note what a party tells.

        Raises:
            RoundError: another attempt, a party that takes no part, or another word than its first.
        """
        wanted = Attempt.of(message)
        with self._changed:
            if wanted != self._open or peer not in self._active:
                raise RoundError(f"{peer} masks for {wanted}; {self._open or 'none'} is open.", code="push-round")
            if self._said[message.kind].setdefault(peer, message.body) != message.body:
                raise RoundError(f"{peer} tells `{message.kind}` of {wanted} twice.", code="mask-changed")
            self._changed.notify_all()
        return message.reply(message.kind)

    def all_said(self, kind: str, attempt: Attempt, cancel: CancelToken) -> dict[str, dict[str, Any]]:
        """What every active party said, this one included, by party.

        Raises:
            RoundError: the attempt no longer counts.
        """
        with self._changed:
            while not (self._open == attempt and self._said[kind].keys() == set(self._active)):
                if self._open != attempt:
                    raise RoundError(f"{attempt} is no longer open.", code="round-interrupted")
                cancel.check()
                self._changed.wait(_LOOK_S)
            return dict(self._said[kind])

    @property
    def active(self) -> tuple[str, ...]:
        """Who takes part in the open attempt."""
        with self._changed:
            return self._active


class MaskAgreement:
    """One party's steps to a masked push.

    Args:
        board: what others tell this party.
        transport: to them.
        signer: this party's identity.
        deadline_s: of one message; how long a party may take to answer in an attempt is the rounds' business.
    """

    def __init__(self, board: MaskBoard, me: str, transport: Transport, signer: Signer, *, deadline_s: float) -> None:
        self._board, self._me, self._transport, self._signer = board, me, transport, signer
        self._deadline_s = deadline_s
        self._serials = itertools.count(1)

    def agree(self, scope: Scope, grid: str, held: Held, fewest: int, cancel: CancelToken) -> MaskSession | None:
        """Make keys for one push with all active parties.

        Args:
            scope: what for.
            grid: digest of the grids; see `Opening`.
            held: what this party has for the round.
            fewest: parties that have to contribute.
            cancel: ends a wait.

        Returns:
            The session; None where fewer parties can contribute than that, and so nobody does.

        Raises:
            RoundError, TransportError: see `KeyMaker.agree`; or a party cannot be reached.
        """
        opening = new_opening(next(self._serials), grid, held)
        maker = KeyMaker(self._me, scope, opening, self._signer)
        try:
            said = self._tell(OPENING, scope.attempt, {**asdict(opening), "drawn_by": list(opening.drawn_by)}, cancel)
            openings = {
                party: Opening(**{**body, "drawn_by": tuple(body["drawn_by"])}) for party, body in said.items()
            }
            public, signature = maker.sign(openings)
            keys = self._tell(KEY, scope.attempt, {"key": public, "signature": signature}, cancel)
            session = maker.agree(openings, {party: (body["key"], body["signature"]) for party, body in keys.items()})
        finally:
            maker.forget()
        # Not before: a party that told others something else of its budget would leave some of them waiting.
        if len(session.contributors) >= fewest:
            return session
        session.masks.erase()
        return None

    def commit(
        self, attempt: Attempt, session: MaskSession, digests: Mapping[str, str], cancel: CancelToken
    ) -> dict[str, str]:
        """Tell every party the digest of what it will be pushed, and wait for theirs: nobody chooses its push late.

        Args:
            attempt: the open one.
            session: of `agree`.
            digests: by party, over the masked parts that it stores.
            cancel: ends a wait.

        Returns:
            By party, the digest of what it will push here.

        Raises:
            RoundError: ``mask-session``: a party agreed on something else.
        """
        said = self._tell_each(
            DIGEST,
            attempt,
            {party: {"session": session.digest, "digest": digest} for party, digest in digests.items()},
            cancel,
        )
        for party, body in said.items():
            if body["session"] != session.digest:
                raise RoundError(
                    f"{party} agreed on other keys for the masked push than {self._me}.",
                    code="mask-session",
                    why="its masks would not cancel, or somebody told different parties different things",
                    fix="the attempt is given up and tried again",
                )
        return {party: body["digest"] for party, body in said.items()}

    def _tell(
        self, kind: str, attempt: Attempt, body: Mapping[str, Any], cancel: CancelToken
    ) -> dict[str, dict[str, Any]]:
        return self._tell_each(kind, attempt, dict.fromkeys(self._board.active, body), cancel)

    def _tell_each(
        self, kind: str, attempt: Attempt, bodies: Mapping[str, Mapping[str, Any]], cancel: CancelToken
    ) -> dict[str, dict[str, Any]]:
        messages = {party: Message(kind, attempt.address(), dict(body)) for party, body in bodies.items()}
        futures = [
            self._transport.request_async(party, Lane.CONTROL, message, self._deadline_s)
            for party, message in messages.items()
            if party != self._me
        ]
        self._board.take(self._me, messages[self._me])
        for future in futures:
            future.result()
        return self._board.all_said(kind, attempt, cancel)


def parts_digest(digests: Sequence[str]) -> str:
    """One digest for the masked parts that go to one party, in the order of their numbers; also of none."""
    return hashlib.sha256("|".join(["masked", *digests]).encode()).hexdigest()
