"""Read a settings file and say everything that is wrong with it at once, with file and line."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import typing
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from coterie.config.base import BASE_FOLDER, Spec
from coterie.errors import ConfigError
from coterie.storage import write_whole

SpecT = TypeVar("SpecT", bound=Spec)
KeyPath = tuple[str | int, ...]

_SHOWN = 200
"""Most characters of a value that an error repeats."""
_MOST_KEYS = 100_000
"""Keys and list items that a settings file may have, aliases written out."""


def load_yaml(path: str | Path, model: type[SpecT]) -> SpecT:
    """Read a YAML file into ``model``. Relative paths in it start from the folder in which the file was named.

    Where the file is a link, that is the link's folder, not the one of the file behind it, which may change its name.

    Raises:
        ConfigError: the file is missing, is not YAML, lies in a folder whose name is not UTF-8, or has settings that
            do not fit; one error lists them all, each with its line, the allowed keys where one is unknown, and a
            guess at what was meant.
    """
    path = Path(path)
    _check_name(path)
    if not path.is_file():
        raise ConfigError(
            f"There is no settings file {path}.",
            code="config-no-file",
            fix="check the path; docs/reference/config.md lists every setting with its default",
        )
    data, lines = _parse(path)
    try:
        return model.model_validate(data, context={BASE_FOLDER: path.absolute().parent})
    except ValidationError as error:
        raise _report(path, model, data, lines, error) from None


def value_of(text: str) -> Any:
    """A value as it is read from a settings file.

    Raises:
        ValueError: it is no YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a safe one
    except (yaml.YAMLError, LookupError, AttributeError) as error:
        raise ValueError(f"`{text}` is not YAML") from error


def names_setting(path: Path, key: str) -> bool:
    """Whether a settings file has this key at its top; False also where it is no settings file at all."""
    try:
        return key in _parse(path)[0]
    except ConfigError:
        return False


def _check_name(path: Path) -> None:
    """Names that are not UTF-8 can be neither written into settings nor handed to the libraries that read weights."""
    whole = os.fsencode(path.absolute())
    try:
        whole.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(
            f"The name {whole.decode('utf-8', 'backslashreplace')} is not UTF-8.",
            code="config-path",
            fix="rename the file or folder, or work in another one",
        ) from None


def dump_yaml(path: str | Path, spec: Spec) -> None:
    """Write settings so that `load_yaml` gives them back: what was given, also where it is the default; a default
    may follow other settings. Paths are written as they are."""
    data = spec.model_dump(mode="json", exclude_unset=True)
    write_whole(Path(path), yaml.safe_dump(data, sort_keys=False, allow_unicode=True).encode())


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: ``off`` and ``no`` are words, ``1e-5`` is a number; PyYAML's own rules say otherwise."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML reads a class attribute
        first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf|\.nan)$"),
    "-+.0123456789",
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^([-+]?(0|[1-9][0-9]{0,30})|0x[0-9a-fA-F]{1,30})$"), "-+0123456789"
)


def _parse(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The file's content and the line of every key in it."""
    lines: dict[KeyPath, int] = {}
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                raise ConfigError(
                    f"{path} holds no settings.",
                    code="config-empty",
                    fix="write `key: value` lines; docs/reference/config.md lists them",
                )
            for key_path, line, merged in _key_lines(loader, node, (), False, ()):
                if key_path in lines and not merged:
                    raise ConfigError(
                        f"`{_dotted(key_path)}` is set twice.",
                        code="config-duplicate-key",
                        where=f"{path}:{lines[key_path]} and {path}:{line}",
                        why="only one of the two would count",
                        fix="remove one",
                    )
                lines.setdefault(key_path, line)
                if len(lines) > _MOST_KEYS:
                    raise ConfigError(
                        f"{path} has more than {_MOST_KEYS:,} settings, counting repeated aliases.",
                        code="config-yaml",
                        fix="write out what is meant; aliases of aliases grow without bound",
                    )
            return loader.construct_document(node), lines
        except (ValueError, LookupError, AttributeError) as error:  # of PyYAML, where a tag is written out
            if isinstance(error, yaml.YAMLError):
                raise
            raise ConfigError(
                f"{path} has a value that does not fit the tag (`!!...`) before it.",
                code="config-yaml",
                fix="leave the tag out",
            ) from None
        finally:
            loader.dispose()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text.",
            code="config-yaml",
            fix="save it as UTF-8 in your editor",
            where=f"byte {error.start}",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}.",
            code="config-yaml",
            fix="check the path, and that you may read the file",
        ) from None
    except RecursionError:
        raise ConfigError(
            f"{path} is nested too deeply.",
            code="config-yaml",
            fix="settings have a few levels; look for brackets or indentation that never close",
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(
            f"{path} is not valid YAML: {getattr(error, 'problem', None) or error}.",
            code="config-yaml",
            where=f"{path}:{mark.line + 1}" if mark else str(path),
            fix="check indentation, colons and quotes on this line and the one before",
        ) from None


def _key_lines(
    loader: _Loader, node: yaml.Node, prefix: KeyPath, merged: bool, above: tuple[yaml.Node, ...]
) -> Iterator[tuple[KeyPath, int, bool]]:
    """Every key with its line, and whether it came by a merge key (``<<``), whose settings others may replace."""
    if any(node is outer for outer in above):
        raise ConfigError(
            f"`{_dotted(prefix)}` refers to itself.",
            code="config-yaml",
            where=f"line {node.start_mark.line + 1}",
            fix="write out what is meant instead of the alias",
        )
    above = (*above, node)
    if isinstance(node, yaml.MappingNode):
        later: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if key_node.tag.endswith(":merge"):
                later += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue
            here = (*prefix, typing.cast("str | int", key))
            yield here, key_node.start_mark.line + 1, merged
            yield from _key_lines(loader, value_node, here, merged, above)
        for source in later:
            yield from _key_lines(loader, source, prefix, True, above)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            here = (*prefix, index)
            yield here, item.start_mark.line + 1, merged
            yield from _key_lines(loader, item, here, merged, above)


@dataclass(frozen=True)
class _Problem:
    """One thing that is wrong, with what pydantic calls it and where the person wrote it."""

    kind: str
    keys: KeyPath
    message: str
    in_union: bool
    hint: str = ""


def _report(
    path: Path, model: type[Spec], data: dict[str, Any], lines: dict[KeyPath, int], error: ValidationError
) -> ConfigError:
    problems = _merge([_problem(model, data, dict(detail)) for detail in error.errors(include_url=False)])
    problems.sort(key=lambda problem: _line(lines, problem.keys) or 0)
    if len(problems) == 1:
        (only,) = problems
        if only.kind == "extra_forbidden":
            return ConfigError(
                f"`{_dotted(only.keys)}` is not a setting.",
                code="config-unknown-key",
                where=_where(path, lines, only.keys),
                why="a setting that is ignored would train something else than you asked for",
                fix=only.hint,
            )
        return ConfigError(
            f"{only.message}.",
            code="config-invalid",
            where=_where(path, lines, only.keys),
            fix=only.hint or "all settings and their defaults: docs/reference/config.md",
        )
    listed = [
        f"{_where(path, lines, problem.keys)}: {problem.message}" + (f"; {problem.hint}" if problem.hint else "")
        for problem in problems
    ]
    return ConfigError(
        "\n  ".join([f"{path.name} has {len(problems)} problems:", *listed]),
        code="config-invalid",
        fix="all settings and their defaults: docs/reference/config.md",
    )


def _problem(model: type[Spec], data: Any, detail: dict[str, Any]) -> _Problem:
    """Turn one pydantic error into words. Union branches in its location (not the person's keys) are dropped."""
    keys: list[str | int] = []
    node, in_union = data, False
    last = len(detail["loc"]) - 1
    for position, part in enumerate(detail["loc"]):
        inside_list = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if inside_list or (isinstance(node, dict) and part in node):
            keys.append(part)
            node = node[part]
        elif position == last and detail["type"] == "missing":
            keys.append(part)
        elif part != "[key]":
            in_union = True
    name = _dotted(tuple(keys))
    if detail["type"] == "extra_forbidden":
        message, hint = f"`{name}` is not a setting", _unknown_key_hint(model, tuple(keys))
        return _Problem("extra_forbidden", tuple(keys), message, in_union, hint)
    if detail["type"] == "missing":
        return _Problem("missing", tuple(keys), f"`{name}` is missing", in_union)
    text = str(detail["msg"]).removeprefix("Value error, ")
    text = re.sub(r"dictionary or instance of \w+", "block of settings", text)
    text = text[0].lower() + text[1:] if text.startswith("Input ") else text
    got = f" (got {_short(node)})" if isinstance(node, (str, int, float)) and detail["type"] != "value_error" else ""
    return _Problem(detail["type"], tuple(keys), (f"`{name}`: " if keys else "") + text + got, in_union)


def _short(value: str | int | float) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _merge(problems: list[_Problem]) -> list[_Problem]:
    """One problem per place: branches of a union that the value was never meant for are noise."""
    kept: dict[KeyPath, _Problem] = {}
    for problem in problems:
        deeper = any(
            len(other.keys) > len(problem.keys) and other.keys[: len(problem.keys)] == problem.keys
            for other in problems
        )
        if problem.in_union and deeper:
            continue
        earlier = kept.get(problem.keys)
        if earlier is not None and problem.in_union:
            tail = problem.message.partition(": ")[2] or problem.message
            problem = _Problem(earlier.kind, earlier.keys, f"{earlier.message}, or: {tail}", True, earlier.hint)
        elif earlier is not None:
            problem = _Problem(earlier.kind, earlier.keys, f"{earlier.message}; {problem.message}", False)
        kept[problem.keys] = problem
    return list(kept.values())


def _unknown_key_hint(model: type[Spec], keys: KeyPath) -> str:
    wrong = str(keys[-1])
    specs = list(_specs_at(model, keys[:-1]))
    allowed = sorted({name for spec in specs for name in spec.model_fields})
    sections = [section for section, spec in _sections(model) if wrong in spec.model_fields]
    close = difflib.get_close_matches(wrong, allowed, n=1, cutoff=0.6)
    guess = f"did you mean `{close[0]}`? " if close else ""
    if sections:
        guess = f"it belongs in `{sections[0]}`. " if sections[0] else "it belongs at the top level. "
    return f"{guess}allowed here: {', '.join(allowed)}"


def _sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    yield prefix, model
    for name, field in model.model_fields.items():
        for spec in specs_in(field.annotation):
            yield from _sections(spec, f"{prefix}.{name}" if prefix else name)


def _specs_at(model: type[BaseModel], keys: KeyPath) -> Iterator[type[BaseModel]]:
    """The settings classes that the value at ``keys`` may be."""
    found: list[type[BaseModel]] = [model]
    for key in keys:
        fields = [spec.model_fields[key] for spec in found if isinstance(key, str) and key in spec.model_fields]
        if fields:
            found = [inner for field in fields for inner in specs_in(field.annotation)]
    yield from found


def specs_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings classes inside a type such as ``A | None`` or ``dict[str, A]``."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from specs_in(inner)


def _line(lines: dict[KeyPath, int], keys: KeyPath) -> int | None:
    """The line of a key, or of the section that should hold it."""
    while keys and keys not in lines:
        keys = keys[:-1]
    return lines.get(keys)


def _where(path: Path, lines: dict[KeyPath, int], keys: KeyPath) -> str:
    line = _line(lines, keys)
    section = _dotted(keys[:-1])
    return f"{path.name}" + (f":{line}" if line else "") + (f", section {section}" if section else "")


def _dotted(keys: KeyPath) -> str:
    return ".".join(str(key) for key in keys)
