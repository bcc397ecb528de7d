"""Text that every Python installation carries: the documentation inside the standard library.

Modules are read as source with `ast` and never imported or run. A document is the documentation of one top-level
definition (a class with its methods, a function, or the module's own introduction). Parties get documents by
*subject*, so that their texts differ the way the texts of different organisations do; documents of the subjects that
no party has are dealt out among all, as organisations of one trade also write about the same things. The language
reference (`pydoc_data.topics`) and the modules of no subject are the public part.

What text there is follows from the Python version; on one version the result is the same on every machine.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from coterie.errors import DataError

PUBLIC = "public"
MIN_CHARACTERS = 80
"""A shorter document says too little to be worth a place."""
TEST_SHARE = 0.35
"""Share of a subject's documents that is held out, before both sides are cut to size: there is more text than needed
for training, and a larger test shows smaller differences."""
PUBLIC_TEST_SHARE = 0.06
OWN_SHARE = 0.4
"""Share of a party's text that is of its own subject, where there are subjects that no party has."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Missing in some distributions' packages (tkinter, distutils, idlelib), removed from later versions of Python
# (the rest of the second line), or no documentation of Python (test data): left out, so that versions differ less.
LEFT_OUT = _words(
    "tkinter turtle turtledemo idlelib lib2to3 distutils ensurepip test tests site-packages dist-packages "
    "aifc asynchat asyncore cgi cgitb chunk crypt imghdr imp mailcap msilib nntplib pipes smtpd sndhdr sunau "
    "telnetlib uu xdrlib pydoc_data __pycache__ __phello__ this antigravity"
)


@dataclass(frozen=True)
class Topic:
    """A field of knowledge: its name, and the top-level modules whose documentation belongs to it."""

    name: str
    modules: frozenset[str]


SUBJECTS: tuple[Topic, ...] = tuple(
    Topic(name, _words(modules))
    for name, modules in (
        (
            "networking",
            "email http urllib xmlrpc smtplib wsgiref imaplib ssl socketserver ftplib mailbox socket poplib "
            "mimetypes ipaddress netrc webbrowser",
        ),
        (
            "files and the system",
            "os shutil subprocess tarfile zipfile pathlib tempfile gzip bz2 lzma fileinput glob fnmatch filecmp stat "
            "posixpath ntpath genericpath platform site sysconfig signal pwd shelve dbm sqlite3 ctypes _pyio io "
            "pickle pickletools wave venv zipapp zipimport compileall py_compile locale getpass _osx_support",
        ),
        (
            "concurrency",
            "asyncio threading multiprocessing concurrent queue sched contextlib contextvars selectors "
            "_threading_local _pyrepl logging",
        ),
        (
            "text and formats",
            "json csv xml html configparser codecs encodings re sre_parse string textwrap argparse optparse getopt "
            "base64 binascii quopri plistlib tomllib gettext shlex cmd pprint stringprep _strptime",
        ),
        (
            "numbers and data structures",
            "_pydecimal decimal statistics fractions random datetime _pydatetime calendar collections "
            "_collections_abc heapq bisect numbers enum dataclasses graphlib operator copy reprlib functools hashlib "
            "hmac secrets uuid colorsys difflib types weakref _weakrefset array",
        ),
        (
            "testing and debugging",
            "unittest doctest pdb bdb trace traceback tracemalloc timeit profile cProfile pstats faulthandler "
            "warnings inspect pydoc dis code codeop rlcompleter linecache",
        ),
    )
)
"""In the order in which parties take them: party i gets subject i."""


@dataclass(frozen=True)
class Document:
    """One piece of documentation. ``title`` is where it comes from, e.g. ``heapq.merge``."""

    title: str
    text: str


@dataclass(frozen=True)
class TextPart:
    """What one party holds, or what is public.

    Attributes:
        train: to train on, cut to size.
        test: held out: no document is in any other list.
        all: everything that is not held out, for private training, which needs many records; begins with ``train``.
    """

    subject: str
    train: tuple[Document, ...]
    test: tuple[Document, ...]
    all: tuple[Document, ...] = ()

    def sides(self) -> tuple[tuple[str, tuple[Document, ...]], ...]:
        """The lists that hold something, with the names of their files."""
        sides = (("train", self.train), ("all", self.all), ("test", self.test))
        return tuple((name, documents) for name, documents in sides if documents)


@dataclass(frozen=True)
class Size:
    """How many characters each part may have at most. Little text per party, so that pooling can matter; the private
    arms take ``party_all``."""

    public_train: int = 600_000
    public_test: int = 30_000
    party_train: int = 100_000
    party_test: int = 50_000
    party_all: int = 300_000


DEFAULT_SIZE = Size()


@dataclass(frozen=True)
class Corpus:
    """The public part, and each party's own."""

    public: TextPart
    parties: dict[str, TextPart]

    def write(self, folder: Path) -> dict[str, dict[str, Path]]:
        """Write ``NAME/train.jsonl``, ``NAME/test.jsonl`` and, of a party, ``NAME/all.jsonl`` (columns title, text).

        Returns:
            {"public" or party: {"train": file, "test": file, ...}}.
        """
        files: dict[str, dict[str, Path]] = {}
        for name, part in {PUBLIC: self.public, **self.parties}.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            files[name] = {side: folder / name / f"{side}.jsonl" for side, _ in part.sides()}
            for side, documents in part.sides():
                lines = [json.dumps({"title": d.title, "text": d.text}, ensure_ascii=False) for d in documents]
                files[name][side].write_text("\n".join(lines) + "\n", encoding="utf-8")
        return files


def build(parties: Sequence[str], size: Size = DEFAULT_SIZE, library: Path | None = None) -> Corpus:
    """Gather, clean and split the documentation.

    Args:
        parties: names, 1 to 6: one subject each.
        size: the most text each part may have.
        library: folder of the standard library's source; default: the running Python's.

    Raises:
        DataError: more parties than subjects, or an installation without the source of its library.
    """
    if not 1 <= len(parties) <= len(SUBJECTS):
        raise DataError(
            f"the demo's text has {len(SUBJECTS)} subjects, which is too few for {len(parties)} parties.",
            code="demo-parties",
            why="each party holds the text of one subject",
            fix=f"choose --parties between 2 and {len(SUBJECTS)}",
        )
    by_subject = _by_subject(library or Path(sysconfig.get_paths()["stdlib"]))
    public = _split(PUBLIC, by_subject[PUBLIC], size.public_train, size.public_test, PUBLIC_TEST_SHARE)
    common = [document for subject in SUBJECTS[len(parties) :] for document in by_subject[subject.name]]
    held = {}
    for number, (party, subject) in enumerate(zip(parties, SUBJECTS, strict=False)):
        dealt = [document for document in common if _rank(document)[-1] % len(parties) == number]
        documents = _own_share(by_subject[subject.name], dealt) + dealt
        held[party] = _split(subject.name, documents, size.party_train, size.party_test, TEST_SHARE, size.party_all)
    return Corpus(public, held)


def _own_share(own: list[Document], dealt: list[Document]) -> list[Document]:
    """As much of a party's own subject as makes `OWN_SHARE` of its text; all of it when nothing was dealt."""
    if not dealt:
        return own
    room = sum(len(document.text) for document in dealt) * OWN_SHARE / (1 - OWN_SHARE)
    return list(_prefix(sorted(own, key=_rank), int(room)))


def _rank(document: Document) -> bytes:
    """Where a document stands in an order that has nothing to do with its content."""
    return hashlib.sha256(document.title.encode()).digest()


def _by_subject(library: Path) -> dict[str, list[Document]]:
    """All documents, cleaned, in a fixed order, by subject. A paragraph is kept where it is met first."""
    subject_of = {module: subject.name for subject in SUBJECTS for module in subject.modules}
    found: dict[str, list[Document]] = {PUBLIC: [], **{subject.name: [] for subject in SUBJECTS}}
    seen: set[str] = set()
    for module, document in [*_topics(library), *_docstrings(library)]:
        text = _without_repeats(document.text, seen)
        if len(text) >= MIN_CHARACTERS:
            found[subject_of.get(module, PUBLIC)].append(Document(document.title, text))
    if any(not documents for documents in found.values()):
        raise DataError(
            f"this Python has too little documentation in {library}.",
            code="demo-no-library-source",
            why="the demo trains on the docstrings of the standard library's source files and on pydoc_data",
            fix="use a Python whose standard library is installed as .py files (python.org, a Linux distribution's "
            "full package, pyenv, conda or uv)",
        )
    return found


def _topics(library: Path) -> Iterator[tuple[str, Document]]:
    """The language reference, one document a topic; read as a literal, not imported."""
    path = library / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            for name in sorted(topics):
                yield PUBLIC, Document(f"topic {name}", topics[name])


def _docstrings(library: Path) -> Iterator[tuple[str, Document]]:
    """(top-level module, document) for every documented top-level definition under ``library``."""
    for path in sorted(_sources(library)):
        parts = path.relative_to(library).with_suffix("").parts
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for title, text in _definitions(name, tree):
            yield parts[0], Document(title, text)


def _sources(library: Path) -> Iterator[Path]:
    for folder, inner, files in os.walk(library):
        inner[:] = [name for name in inner if name not in LEFT_OUT and not name.startswith("config-")]
        for name in files:
            stem, dot, suffix = name.rpartition(".")
            if suffix == "py" and dot and stem not in LEFT_OUT:
                yield Path(folder, name)


def _definitions(module: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    own = ast.get_docstring(tree)
    if own:
        yield module, f"{module}\n\n{own}"
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            pieces = list(_pieces(node, node.name))
            if pieces:
                yield f"{module}.{node.name}", "\n\n".join(pieces)


def _pieces(node: ast.AST, name: str) -> Iterator[str]:
    """The documentation of a definition and of what is defined directly inside it."""
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return
    doc = ast.get_docstring(node)
    if doc:
        yield f"{name}: {doc}"
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            yield from _pieces(child, f"{name}.{getattr(child, 'name', '')}")


def _without_repeats(text: str, seen: set[str]) -> str:
    """Even out white space; drop paragraphs already ``seen`` anywhere, and add the new ones to it."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        clean = "\n".join(line.rstrip() for line in paragraph.expandtabs(4).splitlines()).strip("\n")
        letters = re.sub(r"\W+", " ", clean).strip().lower()
        # A paragraph of signs only (a ruler, a picture) teaches nothing. "Method: same words" is the same paragraph.
        key = letters.partition(" ")[2] if re.match(r"[\w.]+: ", clean) else letters
        if letters and key not in seen:
            seen.add(key)
            kept.append(clean)
    return "\n\n".join(kept)


def _split(
    subject: str, documents: list[Document], train: int, test: int, share: float, everything: int = 0
) -> TextPart:
    """Hold out by document and cut both sides to size, in an order fixed by the titles' digests."""
    ranked = sorted((_rank(d), d) for d in {d.title: d for d in documents}.values())
    border = int(share * 2**32)
    held_out = [d for rank, d in ranked if int.from_bytes(rank[:4], "big") < border]
    kept = [d for rank, d in ranked if int.from_bytes(rank[:4], "big") >= border]
    return TextPart(subject, _prefix(kept, train), _prefix(held_out, test), _prefix(kept, everything))


def _prefix(documents: list[Document], characters: int) -> tuple[Document, ...]:
    """Documents from the front; the one that would pass the limit is cut there."""
    taken: list[Document] = []
    for document in documents:
        if characters < MIN_CHARACTERS:
            break
        taken.append(Document(document.title, document.text[:characters]))
        characters -= len(taken[-1].text)
    return tuple(taken)
