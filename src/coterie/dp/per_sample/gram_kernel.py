"""Squared norms of sums of outer products over segments of rows, in one compiled pass on a CPU.

What `coterie.dp.per_sample.gram` does with batched matrix products, for many short segments of different lengths:
nothing is gathered or padded, only the lower half of each Gram matrix is formed, four rows by four at a time, and
none of it is stored. numba is optional (``pip install coterie[fast]``).

Shape letters: R rows, S segments, I inputs, O outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coterie.dp.threads import run_in_threads

PIECE = 512
"""Terms of a dot product that are added up in float32; the sums of such pieces are added up in double."""

_WORTH_STARTING = 1 << 23
"""Multiplications below which the pass costs more than it saves (compiling: about two seconds, once in a process)."""

_SHARE = 1 << 22
"""Multiplications that a thread takes at a time."""

Kernel = Callable[..., None]


class SegmentNorms:
    """Squared norm of ``sum_t outer(g_t, a_t)`` over each segment's rows, still to be taken by `take_all`.

    Args:
        a_RI: float32 rows that entered, on the CPU.
        row_R: row of ``a_RI`` that belongs to row r of ``g_RO``; None: the same one.
        g_RO: float32 gradients at the output.
        start_S, stop_S: int64, first row of each segment and one past its last; none is empty.

    Attributes:
        value_S: float64 squared norms, or None as long as they are not taken. A row that is not finite makes its own
            segment not finite, and no other.
        crude_S: float64 ``sum_t |a_t| |g_t|``, or None.
        reach_S: float64 ``T (O sum_t |a_t|^2 + I sum_t |g_t|^2)``, see `scaling.bounded`, or None.
    """

    def __init__(self, a_RI: Tensor, row_R: Tensor | None, g_RO: Tensor, start_S: Tensor, stop_S: Tensor) -> None:
        self._a, self._g = (rows.detach().contiguous().numpy() for rows in (a_RI, g_RO))
        self._row = np.arange(g_RO.shape[0], dtype=np.int64) if row_R is None else row_R.numpy()
        self._start, self._stop = start_S.numpy(), stop_S.numpy()
        self.value_S: Tensor | None = None
        self.crude_S: Tensor | None = None
        self.reach_S: Tensor | None = None

    @staticmethod
    def possible(a_RI: Tensor, g_RO: Tensor) -> bool:
        """Whether these tensors are of the type and on the device that the pass is for."""
        return all(rows.device.type == "cpu" and rows.dtype == torch.float32 for rows in (a_RI, g_RO))

    @property
    def rows_S(self) -> Tensor:
        """[S] int64, rows of each segment."""
        return torch.from_numpy(self._stop - self._start)

    def work_S(self) -> np.ndarray:
        """[S] multiplications."""
        rows = self._stop - self._start
        work: np.ndarray = rows * (rows + 4) // 2 * (self._a.shape[1] + self._g.shape[1])
        return work

    def shares(self) -> list[slice]:
        """Segments that a thread takes together."""
        done = self.work_S().cumsum()
        cuts = np.flatnonzero(np.diff(done // _SHARE)) + 1
        return [slice(int(a), int(b)) for a, b in zip([0, *cuts], [*cuts, done.shape[0]], strict=True)]

    def prepare(self) -> None:
        count = self._start.shape[0]
        self.value_S, self.crude_S, self.reach_S = (torch.empty(count, dtype=torch.float64) for _ in range(3))

    def take(self, compiled: Kernel, share: slice) -> None:
        assert self.value_S is not None
        assert self.crude_S is not None
        assert self.reach_S is not None
        compiled(
            self._a, self._row, self._g, self._start[share], self._stop[share],
            self.value_S.numpy()[share], self.crude_S.numpy()[share], self.reach_S.numpy()[share],
        )  # fmt: skip


def take_all(norms: Iterable[SegmentNorms]) -> None:
    """Take those that are not taken yet, all in one pass; none without numba, or if there is too little to do."""
    left = [each for each in norms if each.value_S is None]
    if sum(int(each.work_S().sum()) for each in left) < _WORTH_STARTING or (compiled := kernel()) is None:
        return
    for each in left:
        each.prepare()
    run_in_threads(lambda job: job[0].take(compiled, job[1]), [(n, share) for n in left for share in n.shares()])


def compile_now() -> None:
    """Compile the pass, where numba is installed: forks of this process need not."""
    if (compiled := kernel()) is not None:
        row = torch.zeros(1, 1)
        one = SegmentNorms(row, None, row, torch.tensor([0]), torch.tensor([1]))
        one.prepare()
        one.take(compiled, slice(0, 1))


@functools.cache
def kernel() -> Kernel | None:
    """``kernel(a, rows, g, start, stop, value, crude, reach)``, see `SegmentNorms`; None without numba."""
    if find_spec("numba") is None:
        return None
    import numba

    # Sums may be taken in any order, and products fused into them; nothing is assumed of NaN and infinity.
    jit: Any = numba.njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})
    # Unsigned indices count from the front alone; signed ones would cost vector loads.
    u = np.uint64
    zero, one, four, piece = u(0), u(1), u(4), u(PIECE)

    def dots(x: np.ndarray, i: Any, j: Any, out: np.ndarray) -> None:
        """[4, 4] products of the rows ``i`` with the rows ``j``, added to ``out``."""
        i0, i1, i2, i3 = i
        j0, j1, j2, j3 = j
        width = u(x.shape[1])
        for start in range(zero, width, piece):
            s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = np.float32(0)
            s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = np.float32(0)
            for k in range(start, min(start + piece, width)):
                a0, a1, a2, a3 = x[i0, k], x[i1, k], x[i2, k], x[i3, k]
                b0, b1, b2, b3 = x[j0, k], x[j1, k], x[j2, k], x[j3, k]
                s00, s01, s02, s03 = s00 + a0 * b0, s01 + a0 * b1, s02 + a0 * b2, s03 + a0 * b3
                s10, s11, s12, s13 = s10 + a1 * b0, s11 + a1 * b1, s12 + a1 * b2, s13 + a1 * b3
                s20, s21, s22, s23 = s20 + a2 * b0, s21 + a2 * b1, s22 + a2 * b2, s23 + a2 * b3
                s30, s31, s32, s33 = s30 + a3 * b0, s31 + a3 * b1, s32 + a3 * b2, s33 + a3 * b3
            for q, s in enumerate((s00, s01, s02, s03, s10, s11, s12, s13, s20, s21, s22, s23, s30, s31, s32, s33)):
                out[q] += s

    compiled_dots = jit(dots)

    def four_from(first: Any, last: Any) -> Any:
        """Four rows; places beyond the last repeat it."""
        return first, min(first + one, last), min(first + u(2), last), min(first + u(3), last)

    compiled_four = jit(four_from)

    def whole(
        a: np.ndarray, rows: np.ndarray, g: np.ndarray, start: np.ndarray, stop: np.ndarray,
        value: np.ndarray, crude: np.ndarray, reach: np.ndarray,
    ) -> None:  # fmt: skip
        by_a, by_g = np.empty(16), np.empty(16)
        for s in range(start.shape[0]):
            begin, end = u(start[s]), u(stop[s])
            total = length = a_squares = g_squares = 0.0
            for i in range(begin, end, four):
                i4 = compiled_four(i, end - one)
                a4 = (u(rows[i4[0]]), u(rows[i4[1]]), u(rows[i4[2]]), u(rows[i4[3]]))
                for j in range(begin, i + one, four):
                    j4 = compiled_four(j, end - one)
                    b4 = (u(rows[j4[0]]), u(rows[j4[1]]), u(rows[j4[2]]), u(rows[j4[3]]))
                    by_a[:] = 0.0
                    by_g[:] = 0.0
                    compiled_dots(a, a4, b4, by_a)
                    compiled_dots(g, i4, j4, by_g)
                    for p in range(min(four, end - i)):
                        for q in range(min(four, end - j)):
                            product = by_a[four * p + q] * by_g[four * p + q]
                            if j + q < i + p:
                                total += 2.0 * product
                            elif j + q == i + p:
                                total += product
                                length += np.sqrt(product)
                                a_squares += by_a[four * p + q]
                                g_squares += by_g[four * p + q]
            value[s], crude[s] = total, length
            reach[s] = float(end - begin) * (a_squares * g.shape[1] + g_squares * a.shape[1])

    compiled: Kernel = jit(whole)
    return compiled
