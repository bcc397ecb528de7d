"""What lies on disk: whether it is what coterie writes, and whether this version knows it."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from coterie.errors import CoterieError


def check_known(
    where: object, what: str, found: object, known: Collection[object], error: type[CoterieError]
) -> None:
    """Refuse a file, or a part of one, that a later version may have written.

    Args:
        where: the file, and the line where there is one.
        what: ``format``, ``kind``, ``key``, ...
        found: what the file says.
        known: what this version can read. ``True`` and ``1.0`` are not 1.
        error: what is raised: the class for files of this sort.

    Raises:
        CoterieError: of class ``error``, code ``format-unknown``.
    """
    if any(type(found) is type(each) and found == each for each in known):
        return
    raise error(
        f"{where}: {what} `{str(found)[:80]}` is not known; this version of coterie knows "
        f"{', '.join(sorted(map(str, known)))}.",
        code="format-unknown",
        why="what is not understood and left out would count as if it were not there",
        fix="use the version of coterie that wrote it, or a newer one; nothing in it was changed",
    )


def json_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object in a text.

    Raises:
        ValueError: it is no JSON, not UTF-8, nested without bound, or something else than an object.
    """
    try:
        made = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(made, dict):
        raise ValueError(f"{type(made).__name__} instead of an object")
    return made
