"""Waiting for the replies of several hosts, for as long as they matter."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

from coterie.errors import DeadlineError, RoundError
from coterie.federation.wire.transport import Message

Asked = TypeVar("Asked")

_ALLOWANCE_S = 5.0
"""A transport reports a missed deadline itself; this much later we stop waiting for its report."""


def gather(
    futures: Mapping[Asked, Future[Message]],
    cancelled: Future[None] | None,
    deadline_s: float,
    where: str,
    host: Callable[[Asked], str] = str,
) -> dict[Asked, Message]:
    """Wait for all replies together; the first failure ends the wait.

    Args:
        futures: the replies to come, by host or by whatever was asked for.
        cancelled: its completion or failure ends the wait too.
        deadline_s: seconds for all together.
        where: what was asked for, for error texts.
        host: who was asked.

    Raises:
        DeadlineError: names the host that did not answer in time.
        RoundError: ``cancelled`` was set.
        CoterieError: as the transport or the host reported it.
    """
    names: dict[Future[Any], str] = {future: host(key) for key, future in futures.items()}
    waiting: set[Future[Any]] = set(names)
    until = time.monotonic() + deadline_s + _ALLOWANCE_S
    while waiting:
        either = waiting if cancelled is None else {*waiting, cancelled}
        done, _ = wait(either, timeout=max(0.0, until - time.monotonic()), return_when=FIRST_COMPLETED)
        if cancelled is not None and cancelled in done:
            raise RoundError("The wait for expert hosts was ended.", code="round-cancelled", where=where)
        late = not done
        for future in list(waiting) if late else done:
            try:
                if late:
                    raise DeadlineError("no reply")
                future.result()
            except DeadlineError as error:
                raise DeadlineError(
                    f"{names[future]} did not answer within {deadline_s:g} s.",
                    code="exchange-deadline",
                    where=where,
                    why="a round needs all of its experts",
                    fix=f"see whether {names[future]} is running; raise `deadline_s` if it is only slow",
                ) from error
        waiting -= done
    return {key: future.result() for key, future in futures.items()}
