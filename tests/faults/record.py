"""What the fault suite found, by kind of fault, and the page it writes."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
KEPT = Path(__file__).resolve().parents[2] / ".faults.json"


@dataclass
class Row:
    """One kind of fault.

    Attributes:
        tried: how often. happened: what followed, in words, the same each time.
        named_s: seconds until whoever was gone was named. back_s: until everybody went on, once the fault was over.
    """

    part: str
    fault: str
    tried: int = 0
    happened: str = ""
    named_s: list[float] = field(default_factory=list)
    back_s: list[float] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        def worst(seconds: list[float]) -> str:
            return f"{max(seconds):.1f} s" if seconds else ""

        return self.fault, f"{self.tried:,}", self.happened, worst(self.named_s), worst(self.back_s)


class Record:
    """Rows in the order in which they were first tried; kept in a file, so that parts can be run one by one."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def tried(
        self,
        part: str,
        fault: str,
        happened: str,
        times: int = 1,
        named_s: float | None = None,
        back_s: float | None = None,
    ) -> None:
        row = self.rows.setdefault(f"{part}/{fault}", Row(part, fault))
        row.tried += times
        row.happened = happened
        row.named_s += [named_s] if named_s is not None else []
        row.back_s += [back_s] if back_s is not None else []

    def keep(self) -> None:
        """Add to what earlier runs of other parts found, and write the page anew."""
        parts = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        for part in {row.part for row in self.rows.values()}:
            parts[part] = [vars(row) for row in self.rows.values() if row.part == part]
        KEPT.write_text(json.dumps(parts, indent=1))
        PAGE.write_text(page({part: [Row(**row) for row in rows] for part, rows in parts.items()}))


RECORD = Record()

_HEAD = """# Reliability

What was done to federations of real processes, and what happened. `make faults` does it again and writes this page;
a part of it runs with every change. Everything happens on one machine: loopback, or network namespaces that the suite
makes and removes. It is bounded in number and time.

"Named" is how long it took until `coterie status` (at the coordinator, or at a party where the coordinator was at
fault) said who or what is gone. "Back" is how long it took, once the fault was over, until a round was committed that
had not been committed before; for a killed process it begins when the new one has read its files and joins. Both are
the worst of all tries.
"""


def page(parts: dict[str, list[Row]]) -> str:
    """The whole page."""
    load = os.getloadavg()[0]
    text = [_HEAD]
    text.append(
        f"This run: {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, Python "
        f"{platform.python_version()}, {platform.system()} {platform.release()}; load average {load:.0f} when the "
        "page was written. A busy machine makes every time longer.\n"
    )
    for part in sorted(parts):
        text += [f"## {part}\n", "| fault | tried | what happened | named | back |", "|---|---|---|---|---|"]
        text += [f"| {' | '.join(row.cells())} |" for row in parts[part]]
        text.append("")
    return "\n".join(text)
