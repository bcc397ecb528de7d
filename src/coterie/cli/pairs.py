"""Options that say NAME=VALUE and can be repeated."""

from __future__ import annotations

from collections.abc import Sequence

from coterie.errors import ConfigError


def named_pairs(option: str, given: Sequence[str] | None, example: str) -> dict[str, str]:
    """What such an option says, by name.

    Args:
        option: as it is written, for messages.
        given: its values.
        example: two of them that are right.

    Raises:
        ConfigError: a name or a value is missing, or a name comes twice.
    """
    found: dict[str, str] = {}
    for text in given or ():
        name, _, value = (part.strip() for part in text.partition("="))
        if not name or not value:
            raise ConfigError(
                f"{option} {text!r} is not NAME=VALUE.", code="option-pair", fix=f"write it as in {example}"
            )
        if name in found:
            raise ConfigError(
                f"{option} names {name} twice.",
                code="option-twice",
                why="only one of the two could count",
                fix=f"name each member once, as in {example}",
            )
        found[name] = value
    return found
