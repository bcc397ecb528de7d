"""Coverage-guided inputs (atheris) for everything that reads a peer's bytes: ``fuzz_decoders.py [ATHERIS OPTIONS]``.

What `decoders` does not take as a value or an error of coterie ends the program. ``--corpus DIR`` before the options
writes seeds and uses that folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["coterie.federation"]):
    from decoders import one_input, seeds

if __name__ == "__main__":
    options = sys.argv[1:]
    if options[:1] == ["--corpus"]:
        folder, options = Path(options[1]), [*options[2:], options[1]]
        for number, seed in enumerate(seeds()):
            (folder / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *options], one_input)
    atheris.Fuzz()
