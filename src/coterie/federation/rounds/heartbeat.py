"""A party's heartbeat: reports out, directives in, and the answer to "is this still the newest directive?"."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from coterie.errors import (
    CheckpointError,
    ConfigError,
    CoterieError,
    DeadlineError,
    RosterError,
    RoundError,
    TransportError,
)
from coterie.federation.identity.certificates import COORDINATOR
from coterie.federation.rounds.directives import Call, Directive, Refusal, decode, encode, is_kind
from coterie.federation.rounds.state import Complaint, PartyReport
from coterie.federation.wire.messages import check_request
from coterie.federation.wire.transport import Lane, Message, Transport

_ANSWER_S = 4.0
_UNREACHABLE_S = 1.0
"""A connection between two parties is dialled anew several times in this time before it is reported as cut."""


class Heartbeat:
    """Keeps one party in touch with the coordinator from a thread of its own.

    Args:
        transport: started by the caller, whose handler passes the coordinator's messages to `handle`.
        agreement: hash of what the party signed.
        run: the run its checkpoints belong to; empty for none.
        heartbeat_s: time between heartbeats.
        patience_s: silence of the coordinator after which the party gives up.
        check: looks at every directive; one for which it raises is not taken.
        on_change: called from the heartbeat or a transport thread whenever the directive changed or the heartbeat
            failed; must return at once.
        on_beat: called from the heartbeat thread after every heartbeat, with the seconds that the coordinator has
            been silent; what it raises ends the heartbeat.
    """

    def __init__(
        self,
        transport: Transport,
        agreement: str,
        *,
        run: str = "",
        heartbeat_s: float = 2.0,
        patience_s: float = 300.0,
        check: Callable[[Directive], None] = lambda directive: None,
        on_change: Callable[[], None] = lambda: None,
        on_beat: Callable[[float], None] = lambda silent_s: None,
    ) -> None:
        self._transport, self._agreement, self._run = transport, agreement, run
        self._heartbeat_s, self._patience_s, self._on_change = heartbeat_s, patience_s, on_change
        self._on_beat, self._check = on_beat, check
        self._report = PartyReport(secrets.token_hex(8))
        self._directive: Directive | None = None
        self._error: CoterieError | None = None
        self._unsent = True
        self._tried = -1
        self._stop = False
        self._closed = False
        self._changed = threading.Condition()
        self._heard_at = time.monotonic()
        self._down_since: dict[str, float] = {}
        self._met: frozenset[str] = frozenset()
        self._thread = threading.Thread(target=self._beat, name="coterie-heartbeat", daemon=True)

    def start(self) -> None:
        self._heard_at = time.monotonic()
        self._thread.start()

    @property
    def directive(self) -> Directive | None:
        """What the coordinator wants now."""
        return self._directive

    def wait(self, after: int) -> Directive:
        """The first directive newer than ``after``.

        Raises:
            CoterieError: the coordinator is gone for longer than the patience, or refused this party.
        """
        with self._changed:
            while True:
                if self._directive is not None and self._directive.state.seq > after:
                    return self._directive
                if self._error is not None:
                    raise self._error
                self._changed.wait(1.0)

    def is_newest(self, seq: int) -> bool:
        """Whether directive ``seq`` is still the newest one and nothing failed. Cheap: ask it often."""
        directive = self._directive
        return self._error is None and directive is not None and directive.state.seq == seq

    def update(self, **changes: Any) -> None:
        """Change fields of the report and send it now."""
        with self._changed:
            self._report = replace(self._report, count=self._report.count + 1, **changes)
            self._unsent = True
            self._changed.notify_all()

    def complain(self, about: str, code: str) -> None:
        """Tell the coordinator that another party's messages do not fit what was agreed. Returns at once."""
        with self._changed:
            seq = 0 if self._directive is None else self._directive.state.seq
            others = [each for each in self._report.complaints if each.about != about]
            self.update(complaints=(*others, Complaint(about, seq, code)))

    def ask_to_stop(self) -> None:
        """Ask for a clean end after the round in progress. Safe in a signal handler: takes no lock."""
        self._stop = True

    def cancel(self) -> None:
        """Make `wait` raise: this process is to end without a goodbye."""
        self._fail(
            RoundError(
                "this party was told to end at once.",
                code="round-abandoned",
                fix="see the log of the coordinator for why; `coterie resume` takes part again",
            )
        )

    def handle(self, message: Message) -> None:
        """Take a directive the coordinator sent on its own."""
        check_request("rounds", self._transport.me, COORDINATOR, Lane.CONTROL, message)
        self._take_directive(decode(message, Directive, COORDINATOR))

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)

    def flush(self, timeout_s: float) -> None:
        """Wait until the last report was sent once, for a clean goodbye, at most ``timeout_s``.

        Whether it was answered does not matter: the coordinator may leave as soon as everybody has said goodbye.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._tried >= self._report.count or self._error is not None, timeout_s)

    def _beat(self) -> None:
        while True:
            with self._changed:
                if not self._unsent and not self._closed:
                    self._changed.wait(self._heartbeat_s)
                if self._closed:
                    return
                if self._stop and not self._report.stop:
                    self._report = replace(self._report, count=self._report.count + 1, stop=True)
                unreachable = self._unreachable(time.monotonic())
                if unreachable != self._report.unreachable:
                    count = self._report.count + 1
                    self._report = replace(self._report, count=count, unreachable=unreachable)
                call = Call(self._report, self._agreement, self._run)
            try:
                try:
                    reply = self._transport.request(COORDINATOR, Lane.CONTROL, encode(call), _ANSWER_S)
                    self._take_reply(call, reply)
                except TransportError as error:
                    self._note_silence(error)
                self._on_beat(time.monotonic() - self._heard_at)
            except CoterieError as error:
                self._fail(error)
                return
            except Exception as error:  # a bug of ours must not leave a party that looks alive to itself
                self._fail(
                    RoundError(
                        f"the heartbeat failed: {error!r}.",
                        code="heartbeat-failed",
                        fix="start this party again with `coterie resume`, and report what its run/coterie.log says",
                    )
                )
                return
            finally:
                with self._changed:
                    self._tried = call.report.count
                    self._changed.notify_all()
            if self._error is not None:
                return

    def _unreachable(self, now: float) -> tuple[str, ...]:
        """Peers without a connection: at once those never met, so that nothing begins before they are."""
        connected = self._transport.connected()
        self._met |= connected
        down = [peer for peer in self._transport.peers if peer != COORDINATOR and peer not in connected]
        self._down_since = {peer: self._down_since.get(peer, now) for peer in down}
        overdue = now - _UNREACHABLE_S
        return tuple(peer for peer, since in self._down_since.items() if since <= overdue or peer not in self._met)

    def _take_reply(self, call: Call, reply: Message) -> None:
        if is_kind(reply, Refusal):
            raise _refused(decode(reply, Refusal, COORDINATOR), self._agreement)
        directive = decode(reply, Directive, COORDINATOR)
        self._check(directive)
        with self._changed:
            self._heard_at = time.monotonic()
            if self._report.count == call.report.count:
                self._unsent = False
            self._changed.notify_all()
        self._take_directive(directive)

    def _take_directive(self, directive: Directive) -> None:
        self._check(directive)
        with self._changed:
            if self._run and directive.run != self._run:
                self._error = _refused(Refusal("checkpoint-other-run", directive.run), self._agreement)
            elif self._directive is not None and directive.state.seq < self._directive.state.seq:
                return
            else:
                fresh = self._directive is None or directive.state.seq > self._directive.state.seq
                self._run, self._directive = directive.run, directive
                if not fresh:
                    return
            self._changed.notify_all()
        self._on_change()

    def _note_silence(self, error: TransportError) -> None:
        waited = time.monotonic() - self._heard_at
        if waited < self._patience_s:
            with self._changed:
                self._changed.wait(min(self._heartbeat_s, 1.0))
            return
        self._fail(
            DeadlineError(
                f"the coordinator has not answered for {waited:.0f} s.",
                code="coordinator-gone",
                where=error.message,
                why="without it no round can be committed",
                fix="start `coterie coordinator` again, then this party: it goes on from the newest checkpoint",
            )
        )

    def _fail(self, error: CoterieError) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
        self._on_change()


def _refused(refusal: Refusal, agreement: str) -> CoterieError:
    match refusal.code:
        case "config-mismatch":
            return ConfigError(
                f"our federation.yaml ({agreement[:8]}) differs from the coordinator's ({refusal.here[:8]}).",
                code="config-mismatch",
                why="parties with different settings would not train the same model",
                fix="compare the two files, agree on one, and have everybody sign the roster again",
            )
        case "checkpoint-other-run":
            return CheckpointError(
                f"our run folder belongs to another run than the coordinator's ({refusal.here[:8]}).",
                code="checkpoint-other-run",
                why="its checkpoints do not fit the rounds of this run",
                fix="name another run_dir in party.yaml to begin anew, or start the coordinator with its old folder",
            )
        case "round-superseded":
            return RoundError(
                "a newer process of this party has taken its place.",
                code="round-superseded",
                fix="end one of the two: a party takes part once",
            )
        case "member-dropped":
            return RoundError(
                "the others dropped this process: what it sent does not fit what was agreed.",
                code="member-dropped",
                why="they compute with nothing that was not agreed on",
                fix="see the coordinator's log for who refused what; check that all run the same version, then start "
                "again",
            )
        case "roster-stranger":
            return RosterError(
                "the coordinator's federation.yaml does not list this party.",
                code="roster-stranger",
                fix="compare the two files, agree on one, and have everybody sign the roster again",
            )
        case _:
            return RoundError(
                f"the coordinator turned this party away (`{refusal.code}`).",
                code=refusal.code,
                fix="see the coordinator's log; run the same version of coterie everywhere",
            )
