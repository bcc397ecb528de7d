"""Write what docs/reference says of the code: ``python docs/generate_reference.py [config cli wire errors]``.

With ``--check`` nothing is written and the exit code says whether the pages are current.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from coterie.config import FederationConfig, PartyConfig, TrainConfig
from coterie.config.load import specs_in

REFERENCE = Path(__file__).parent / "reference"
HEAD = "<!-- Made by docs/generate_reference.py; change the code, then run it again. -->\n"


def config_page() -> str:
    """Every setting of every file: type, default, meaning."""
    roots = {"train.yaml": TrainConfig, "federation.yaml": FederationConfig, "party.yaml": PartyConfig}
    lines = [
        HEAD,
        "# Settings",
        "",
        "Unknown keys are refused. Relative paths start from the folder of the file they are written in. YAML 1.2",
        "words: only `true` and `false` are booleans, so `off` and `none` are plain words; `1e-5` is a number.",
        "",
    ]
    blocks: list[type[BaseModel]] = []
    for file, root in roots.items():
        lines += [f"## {file}", "", *_block(root)]
        blocks += [spec for spec in _below(root) if spec not in blocks]
    lines += ["## Blocks", ""]
    for spec in blocks:
        lines += [f"### {spec.__name__}", "", *_block(spec)]
    return "\n".join(lines)


def _below(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for field in model.model_fields.values():
        for spec in specs_in(field.annotation):
            yield spec
            yield from _below(spec)


def _block(model: type[BaseModel]) -> list[str]:
    rows = [
        f"| `{name}` | {_type(field)} | {_default(field)} | {field.description} |"
        for name, field in model.model_fields.items()
    ]
    return [
        inspect.cleandoc(model.__doc__ or ""),
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def _type(field: FieldInfo) -> str:
    limits = []
    inner = [getattr(part, "__metadata__", ()) for part in typing.get_args(field.annotation)]
    for item in (*field.metadata, *itertools.chain(*inner)):
        item = next(iter(getattr(item, "metadata", ())), item)
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            if getattr(item, name, None) is not None:
                limits.append(f"{sign} {getattr(item, name)}")
    return _words(field.annotation) + (f", {', '.join(limits)}" if limits else "")


def _words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _words(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_words(part) for part in arguments if part is not type(None))
    if origin is tuple:
        return f"list of {_words(arguments[0])}"
    if origin is dict:
        return f"table {_words(arguments[0])} -> {_words(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path", Any: "any value"}
    return names[annotation]


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if value is None or value in ((), {}):
        return "-"
    if isinstance(value, BaseModel):
        return "its defaults"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def cli_page() -> str:
    """The help of every command."""
    from coterie.cli.app import COMMANDS, help_of

    lines = [
        HEAD,
        "# Commands",
        "",
        "Exit codes: 0 done, 1 an error (explained on standard error), 2 wrong usage, 5 a run was stopped cleanly",
        "before its last round (`coterie resume` goes on), 130 interrupted. `coterie audit` has two of its own.",
        "",
    ]
    lines += ["```", help_of(None), "```", ""]
    for name in COMMANDS:
        lines += [f"## coterie {name}", "", "```", help_of(name), "```", ""]
    return "\n".join(lines)


_HEADER_CHECKS = {
    "magic": "`CTRE`",
    "version": "protocol version, now {version}; another one is refused",
    "type": "1 request, 2 reply, 3 error, 4 one-way, 5 heartbeat",
    "lane": "the stream's",
    "run": "SHA-256 of the run's name, first half; the frame's scope",
    "epoch": "membership epoch; the frame's scope",
    "correlation": "ties a reply to its request; where nobody waits, the frame is dropped",
    "kind": "zero-padded; 1 to 24 of `a-z 0-9 _ . -`",
    "body_length": "<= 64 KiB",
    "tensor_count": "<= 4096",
    "reserved": "0",
    "data_length": "end of the last tensor; <= lane limit, and equal to what the table needs",
}


def header_table() -> str:
    """Every field of a frame's header; the numbers of the address with the words of `Address`."""
    import struct

    from coterie.federation.wire.frame import ADDRESS, HEADER, PROTOCOL_VERSION
    from coterie.federation.wire.transport import Address

    attributes = inspect.cleandoc(Address.__doc__ or "").split("Attributes:", 1)[1]
    described = re.findall(r"^    (\w+): (.*(?:\n {6,}.*)*)", attributes, re.M)
    said = {name: " ".join(text.replace("``", "`").split()) for name, text in described}
    lines, offset = ["| offset | bytes | field | value |", "|---|---|---|---|"], 0
    for name, kind in HEADER.items():
        size = struct.calcsize(f"<{kind}")
        text = said[name].rstrip(".") if name in ADDRESS else _HEADER_CHECKS[name].format(version=PROTOCOL_VERSION)
        lines.append(f"| {offset} | {size} | `{name}` | {text} |")
        offset += size
    return "\n".join([f"Header, {offset} bytes:", "", *lines])


def messages_tables() -> str:
    """Every message between members, from the table that handlers check against."""
    import dataclasses

    from coterie.federation.rounds.directives import Call, Directive, Refusal
    from coterie.federation.rounds.state import Complaint, PartyReport, Saved, State
    from coterie.federation.wire.messages import TABLE, TRANSPORT, Form

    bodies = {"report": Call, "directive": Directive, "refused": Refusal}

    def line(role: str, form: Form, numbers: str) -> str:
        body = form.body
        if body is None:
            said = f"fields of [{bodies[form.kind].__name__}](#bodies-of-the-rounds)"
        else:
            said = "<br>".join(f"`{name}`: {value.words}" for name, value in body.items()) or "-"
        tensors = "<br>".join(
            f"{rule.name} [{', '.join(rule.axes)}] {' or '.join(str(d).removeprefix('torch.') for d in rule.dtypes)}"
            + (", or none" if rule.optional else "")
            for rule in form.tensors
        )
        return f"| {role} `{form.kind}` | {numbers} | {said} | {tensors or '-'} |"

    lines = []
    for topic, title in {"tokens": "Exchange `tokens`", "experts": "Exchange `experts`", "rounds": "Rounds"}.items():
        lines += [f"### {title}", "", "| message | address | body | tensors |", "|---|---|---|---|"]
        for row in TABLE:
            if row.topic == topic:
                role = f"{row.sender} to {row.receiver}, {row.lane.name.lower()}:"
                lines.append(line(role, row.request, ", ".join(row.numbers) or "-"))
                lines += [line("reply:", reply, "the same" if row.numbers else "-") for reply in row.replies]
        lines.append("")
    lines += ["### Between transports", "", "| kind | what it is |", "|---|---|"]
    lines += [f"| `{kind}` | {words} |" for kind, words in TRANSPORT.items()]
    lines += ["", "### Bodies of the rounds", "", "| name | fields |", "|---|---|"]
    for kind in (Call, PartyReport, Complaint, Saved, Directive, State, Refusal):
        lines.append(f"| {kind.__name__} | {', '.join(f'`{f.name}`' for f in dataclasses.fields(kind))} |")
    return "\n".join(lines)


_AREAS = {
    "data eval": "Text",
    "dp hf tune plain": "Privacy",
    "config option plan auto micro file format": "Settings and plans",
    "model upcycle weights tensors spread hub placement expert part": "Models",
    "run checkpoint report purge internal descriptors no not": "Runs, folders and machines",
    "ranks": "Several devices",
    "identity roster invite join install request member party": "Members: keys, roster, joining",
    "round cache exchange tokens push mask sum remote host questions answers coordinator dashboard status": "Rounds",
    "flare": "Inside NVFlare",
    "audit transcript control demo": "Audit and demo",
}
_OTHER_AREA = "Between machines, and the rest"


def codes_tables() -> str:
    """Every code that `coterie explain` knows, by area."""
    from coterie.cli.explain import Raised, raised_errors

    areas = {word: title for words, title in _AREAS.items() for word in words.split()}
    found: dict[str, dict[str, list[Raised]]] = {title: {} for title in (*_AREAS.values(), _OTHER_AREA)}
    for item in raised_errors():
        found[areas.get(item.code.split("-")[0], _OTHER_AREA)].setdefault(item.code, []).append(item)

    def cell(texts: Iterable[str | None]) -> str:
        lines = (" ".join(text.split()).replace("|", "\\|") for text in texts if text)
        return "<br>".join(dict.fromkeys(line.replace("<", "&lt;") for line in lines))

    lines = []
    for title, codes in found.items():
        lines += [f"### {title}", "", "| code | what it says | what to do |", "|---|---|---|"]
        for code, items in codes.items():
            lines.append(f"| `{code}` | {cell(i.message for i in items)} | {cell(i.fix for i in items)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def errors_page() -> str:
    """The page as it is, with its tables made anew."""
    return _with_tables("errors", {"codes": codes_tables()})


def wire_page() -> str:
    """The page as it is, with its tables made anew."""
    return _with_tables("wire", {"header": header_table(), "messages": messages_tables()})


def _with_tables(page: str, tables: dict[str, str]) -> str:
    text = (REFERENCE / f"{page}.md").read_text("utf-8")
    for name, table in tables.items():
        begin, end = f"<!-- {name}: made by docs/generate_reference.py -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n\n{end}{rest.split(end)[1]}"
    return text


PAGES = {"config": config_page, "cli": cli_page, "wire": wire_page, "errors": errors_page}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("pages", nargs="*", choices=[*PAGES, []], help="default: all")
    given = parser.parse_args()
    stale = []
    for name in given.pages or PAGES:
        path, text = REFERENCE / f"{name}.md", PAGES[name]().rstrip() + "\n"
        if given.check:
            if not path.is_file() or path.read_text("utf-8") != text:
                stale.append(path.name)
        else:
            REFERENCE.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"out of date: {', '.join(stale)}; run: python docs/generate_reference.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
