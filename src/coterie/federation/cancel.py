"""Whether what a party is doing still counts: asked by whoever computes or waits."""

from __future__ import annotations

from collections.abc import Callable

from coterie.errors import RoundError


def cancelled_round() -> RoundError:
    """What ends an attempt that no longer counts."""
    return RoundError("The round was interrupted.", code="round-interrupted")


class CancelToken:
    """Given to a task, which asks it now and then; cheap enough to be asked often.

    Args:
        cancelled: whether the task no longer counts; called from any thread.
    """

    def __init__(self, cancelled: Callable[[], bool] = lambda: False) -> None:
        self._cancelled = cancelled

    @property
    def cancelled(self) -> bool:
        """Whether the task no longer counts."""
        return self._cancelled()

    def check(self) -> None:
        """Go on only while the task counts.

        Raises:
            RoundError: ``round-interrupted``.
        """
        if self._cancelled():
            raise cancelled_round()


NEVER = CancelToken()
"""Of a task that nobody cancels."""
