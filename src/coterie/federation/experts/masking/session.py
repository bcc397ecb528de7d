"""How the parties agree on the keys of one push.

Every attempt at a round makes its own X25519 key, which touches no disk and is forgotten with the push: nothing that
is taken from a process later opens what it masked, and a new agreement costs a round trip and burns nothing.

1. Every party tells every other its `Opening`: a fresh nonce, its push serial, its grids' digest, whether it could
   draw anew, and which set of draws, made by whom, it holds for this round.
2. It signs all openings, run, roster, membership epoch and attempt, with its new public key, by its identity. So no
   party can have told two others different things, and no key of another push can be put in this one's place.
3. The digest of all openings and keys is the session, which all keys are derived with. It stands beside the digest of
   every masked push: parties that disagree notice before any value leaves.

**Draws.** The first session of a round names the set of the parties' draws (their lots and noise). A retry sends the
same noised integers under new masks only if every party still holds its own draw of the same set. If one does not,
all draw anew, and all count both: a sum with old noise and one with new noise of the same party could be compared.

**Who contributes.** A party whose budget is spent says that it cannot draw, and masks are the others' alone. How many
these are decides how much noise each adds, so a set of draws is for the parties that made it and for no others:
where one of them has stopped since, the others draw anew.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from coterie.errors import RoundError
from coterie.federation.experts.masking.streams import Masks, derive
from coterie.federation.rounds.attempt import Attempt

NO_DRAW = "0" * 64
"""In place of a set of draws: this party holds none for the round."""

_PURPOSE = b"coterie mask key\n"
"""Begins what is signed; roster signatures and TLS begin otherwise."""


class Signer(Protocol):
    """A party's identity."""

    def sign(self, text: bytes) -> str:
        """Hexadecimal signature."""
        ...

    def check(self, party: str, text: bytes, signature: str) -> bool:
        """Whether a signature is that party's, by what the roster says of it."""
        ...


@dataclass(frozen=True)
class Opening:
    """What one party says before keys are made.

    Attributes:
        nonce: 256 fresh random bits, hex.
        serial: of this push in this party's process; never said before there.
        grid: digest of its `MaskGrid` for every number of contributing parties.
        can_draw: it can draw for this round. One that cannot contributes nothing but draws that it still holds.
        draw: set of draws that it holds for this round and these weights; `NO_DRAW` where there is none.
        drawn_by: the parties whose draws are in that set, by name in order.
    """

    nonce: str
    serial: int
    grid: str
    can_draw: bool
    draw: str
    drawn_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scope:
    """What a session is for; the same at every party.

    Attributes:
        run: name of the run.
        roster: hash of the signed roster.
        epoch: grows when a party leaves or comes back.
        attempt: at which round.
    """

    run: str
    roster: str
    epoch: int
    attempt: Attempt


@dataclass
class KeyMaker:
    """One party's half of an agreement; for one push, then forgotten.

    Args:
        me: this party.
        scope: see `Scope`.
        opening: what this party said.
        signer: its identity.
    """

    me: str
    scope: Scope
    opening: Opening
    signer: Signer
    _key: X25519PrivateKey | None = field(default_factory=X25519PrivateKey.generate, repr=False)

    def sign(self, openings: Mapping[str, Opening]) -> tuple[str, str]:
        """This party's public key and the signature over it and everything that was said, both hex."""
        public = self._own_key().public_key().public_bytes_raw()
        return public.hex(), self.signer.sign(_signed_text(self.scope, openings, public.hex()))

    def agree(self, openings: Mapping[str, Opening], keys: Mapping[str, tuple[str, str]]) -> MaskSession:
        """The session of everybody's openings and signed keys, this party's own included.

        Raises:
            RoundError: ``mask-signature``: a party's key is not signed over what was said here; who told different
                parties different things is not known from that. ``mask-grid`` where a party's grid is another one,
                ``mask-key`` for a key that is none.
        """
        for party, opening in openings.items():
            if opening.grid != self.opening.grid:
                raise RoundError(
                    f"{party} masks on another grid than {self.me}.",
                    code="mask-grid",
                    why="integers of different steps do not add up: clip norm, noise or model differ, or the "
                    "noise of some parties comes from a seed",
                    fix="all parties run the same version with the same signed settings",
                )
            public, signature = keys[party]
            if not self.signer.check(party, _signed_text(self.scope, openings, public), signature):
                raise RoundError(
                    f"{party} signed other openings of a masked push than {self.me} was told.",
                    code="mask-signature",
                    why="somebody told different parties different things, or speaks for another",
                    fix="the attempt is given up; if it comes again, compare the rosters and the logs",
                )
        said = {party: [asdict(openings[party]), keys[party][0]] for party in sorted(openings)}
        session = hashlib.sha256(b"coterie mask session\n" + _scope_text(self.scope) + _canonical(said)).digest()
        draws = draws_of(openings)
        others = [party for party in draws.parties if party != self.me] if self.me in draws.parties else []
        shared = {party: self._shared(party, keys[party][0], session) for party in others}
        self.forget()
        masks = Masks(self.me, shared, session)
        return MaskSession(session.hex(), draws.name or session.hex(), draws.parties, masks)

    def forget(self) -> None:
        """The attempt is over, or its masks are made: the key serves nothing more."""
        self._key = None

    def _own_key(self) -> X25519PrivateKey:
        if self._key is None:
            raise RoundError("the key of this push was used and is forgotten.", code="mask-used")
        return self._key

    def _shared(self, party: str, public: str, session: bytes) -> bytes:
        try:
            secret = self._own_key().exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(public)))
        except ValueError:  # all zeros: the other side chose a point that gives everybody the same secret
            raise RoundError(f"the key of {party} for a masked push is none.", code="mask-key") from None
        return derive(secret, session, info=f"pair {' and '.join(sorted((self.me, party)))}")


@dataclass(frozen=True)
class MaskSession:
    """What was agreed on for one push.

    Attributes:
        digest: names the session, hex.
        draw: the set of draws that is to be pushed.
        contributors: whose draws these are; only they push, and their masks cancel.
        masks: this party's; none where it does not contribute.
    """

    digest: str
    draw: str
    contributors: tuple[str, ...]
    masks: Masks


@dataclass(frozen=True)
class Held:
    """What one party has for a round before an attempt at it: see `Opening`."""

    can_draw: bool
    draw: str = NO_DRAW
    drawn_by: tuple[str, ...] = ()


def new_opening(serial: int, grid: str, held: Held) -> Opening:
    """What a party says in a new attempt."""
    return Opening(secrets.token_hex(32), serial, grid, held.can_draw, held.draw, held.drawn_by)


@dataclass(frozen=True)
class Draws:
    """What an attempt is to push.

    Attributes:
        name: of the set of draws; None: it is drawn anew.
        parties: who contributes, by name in order.
    """

    name: str | None
    parties: tuple[str, ...]


def draws_of(openings: Mapping[str, Opening]) -> Draws:
    """Which draws are pushed: those that all who made them still hold, if nobody else can draw; else new ones.

    A party reads its own draw's makers in its own opening, so it never pushes what it noised for more parties, or
    fewer, than now contribute.
    """
    able = tuple(party for party in sorted(openings) if openings[party].can_draw)
    for draw in sorted({opening.draw for opening in openings.values()} - {NO_DRAW}):
        holders = tuple(party for party in sorted(openings) if openings[party].draw == draw)
        if set(able) <= set(holders) and all(openings[party].drawn_by == holders for party in holders):
            return Draws(draw, holders)
    return Draws(None, able)


def _signed_text(scope: Scope, openings: Mapping[str, Opening], public: str) -> bytes:
    said = {party: asdict(openings[party]) for party in sorted(openings)}
    return _PURPOSE + _scope_text(scope) + _canonical(said) + public.encode()


def _scope_text(scope: Scope) -> bytes:
    return _canonical([scope.run, scope.roster, scope.epoch, scope.attempt.round, scope.attempt.number])


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"
