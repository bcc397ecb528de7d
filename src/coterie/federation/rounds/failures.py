"""What everybody is told when a run has failed: the same words at the coordinator and at every party."""

from __future__ import annotations

from coterie.errors import CheckpointError, CoterieError, RoundError
from coterie.federation.rounds.state import State

_AGAIN = "then start the coordinator and all parties again: they go on from the newest checkpoint that all hold"


def run_failure(state: State, where: str | None = None) -> CoterieError:
    """The error for a run whose last state is ``state``.

    Args:
        state: the coordinator's last.
        where: what this process knows besides.
    """
    round_no, note = state.committed, state.note  # the messages are literal so that `coterie explain` finds them
    match state.code:
        case "round-party-missing":
            return RoundError(
                f"the run ended at round {round_no}: {note}.",
                code="round-party-missing",
                where=where,
                why="a round needs every party",
                fix=f"start it, or wait longer with `join_deadline_s`; {_AGAIN}",
            )
        case "round-deadline":
            return RoundError(
                f"the run ended at round {round_no}: {note}.",
                code="round-deadline",
                where=where,
                why="a party that is alive but does not get on would hold up everybody for ever",
                fix=f"see what that party is busy with, or allow more with `round_deadline_s`; {_AGAIN}",
            )
        case "round-link-cut":
            return RoundError(
                f"the run ended at round {round_no}: {note}.",
                code="round-link-cut",
                where=where,
                why="every party needs every other: each hosts a share of the experts",
                fix="open the way between the two (firewall, routing, the endpoint in the roster; `coterie doctor` "
                f"at both), or wait longer with `join_deadline_s`; {_AGAIN}",
            )
        case "round-no-progress":
            return RoundError(
                f"the run ended at round {round_no}: {note}.",
                code="round-no-progress",
                where=where,
                why="everybody would repeat the same rounds for ever",
                fix="see in the log of the party that is named why it ends or cannot be reached; a smaller "
                f"`checkpoint_every` loses fewer rounds each time; {_AGAIN}",
            )
        case "sum-wild":
            return RoundError(
                f"the run paused at round {round_no}: {note}.",
                code="sum-wild",
                where=where,
                why="somebody pushed what does not belong into a masked sum, and masks hide who",
                fix="all parties look at their machines, versions and logs, or agree on `aggregation: plain`, under "
                "which a host sees whose sum is wrong; then start the coordinator with --go-on and every party with "
                "`coterie resume`: they go on after that round",
            )
        case "checkpoint-none-common":
            return CheckpointError(
                f"the run ended at round {round_no}: {note}.",
                code="checkpoint-none-common",
                where=where,
                why="the parties would go on from states that do not belong together",
                fix="restore that party's checkpoints from a copy, or begin anew with new run folders everywhere",
            )
        case code:
            return RoundError(
                f"the run ended at round {round_no}: {note}.",
                code=code or "round-failed",
                where=where,
                why="every process of the run was told to end; published checkpoints are kept",
                fix=f"the full reason is in the log of the party that is named; mend it, {_AGAIN}",
            )
