"""Answers of the accountant that are kept, because they take seconds.

Several parties of one process ask for the same figure at the same moment: the first computes it, the others wait.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

_Asked = ParamSpec("_Asked")
_Answer = TypeVar("_Answer")

_COMPUTING = threading.RLock()


def kept(most: int) -> Callable[[Callable[_Asked, _Answer]], Callable[_Asked, _Answer]]:
    """Decorate a function of hashable arguments: at most so many answers are kept, the newest.

    One thread computes at a time. All of it is Python, of which one thread runs at a time anyway.
    """

    def keeping(compute: Callable[_Asked, _Answer]) -> Callable[_Asked, _Answer]:
        answers = cast(Callable[_Asked, _Answer], functools.lru_cache(most)(compute))

        @functools.wraps(compute)
        def answer(*args: _Asked.args, **kwargs: _Asked.kwargs) -> _Answer:
            with _COMPUTING:
                return answers(*args, **kwargs)

        return answer

    return keeping
