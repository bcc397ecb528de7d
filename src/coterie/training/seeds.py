"""Seeds of a seeded run's parts, each from its place in the run: a resumed run repeats the uninterrupted one."""

from __future__ import annotations


def derived_seed(seed: int, *path: int) -> int:
    """The seed of one place in a run, for `torch.manual_seed`; published figures rest on these values.

    Args:
        seed: of the run.
        path: where in it, from the outside in: rounds behind it, then the micro-batch; or the pass over the data.
    """
    for step in path:
        seed = (seed * 1_000_003 + step) % 2**63
    return seed
