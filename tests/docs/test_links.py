"""What `zensical build --strict` does not see: links to folders, pictures and files outside, the navigation, README.

It does see links to pages and anchors that are missing, undefined references and Python names without an entry.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OTHERS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def broken_links(page: Path, root: Path) -> Iterator[str]:
    """Targets of a page that are no file below ``root``, or no heading of that file."""
    for target in LINK.findall(CODE.sub("", page.read_text("utf-8"))):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        inside = path.is_relative_to(root.resolve())
        if not (inside and path.is_file() and (not anchor or anchor in anchors(path))):
            yield target


def anchors(page: Path) -> set[str]:
    """The headings' anchors that the site and a repository browser agree on."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {site for heading in HEADING.findall(text) for site in [on_site(heading)] if site == in_browser(heading)}


def on_site(heading: str) -> str:
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def in_browser(heading: str) -> str:
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def listed_pages(nav: Any) -> list[str]:
    """The pages of a navigation, in its order."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in listed_pages(entry)]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    root = DOCS if page.is_relative_to(DOCS) else ROOT
    assert not [target for target in broken_links(page, root) if not target.partition("#")[2].startswith("coterie.")]


def test_the_navigation_lists_every_page_once_and_nothing_else() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    assert sorted(listed_pages(nav)) == [str(page.relative_to(DOCS)) for page in PAGES]


def test_the_index_of_decisions_has_a_line_for_each() -> None:
    folder = DOCS / "decisions"
    rows = re.findall(
        r"^\| \[(\d{4})\]\((\1-[\w-]+\.md)\) \|", (folder / "index.md").read_text("utf-8"), re.MULTILINE
    )
    assert [name for _, name in rows] == sorted(page.name for page in folder.glob("0*.md"))


@pytest.mark.parametrize(
    "link",
    [
        "[x](folder)",
        "![x](none.png)",
        "[x](../outside.md)",
        "[x](none.md)",
        "[x](page.md#none)",
        "[x](#none)",
        "[x](/a)",
    ],
)
def test_the_check_sees_a_link_that_leads_nowhere(tmp_path: Path, link: str) -> None:
    root = tmp_path / "docs"
    (root / "folder").mkdir(parents=True)
    (tmp_path / "outside.md").write_text("# Outside\n")
    (root / "page.md").write_text(f"# Page\n\n{link} [fine](#page) `[code](none)`\n")
    assert len(list(broken_links(root / "page.md", root))) == 1
