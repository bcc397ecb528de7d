"""What somebody on the wire reads from encrypted messages: their sizes, and so how many tokens went where.

No text is in a size. How many tokens a forward had at each host is, and with it how long the batch was and how its
tokens spread over the hosts.
"""

from __future__ import annotations

from coterie.audit.transcript import Dispatch


def row_bytes(dispatch: Dispatch, num_experts: int) -> tuple[int, int]:
    """Bytes of one row with its count, and of one expert that a row chose: public, as the model is."""
    weights = 0 if dispatch.weights_P is None else dispatch.weights_P.element_size()
    return dispatch.hidden_MD.shape[1] * dispatch.hidden_MD.element_size() + 1, (
        1 if num_experts <= 256 else 4
    ) + weights


def size(dispatch: Dispatch, num_experts: int) -> int:
    """Bytes of the tensors of a dispatch; the head around them tells nothing more."""
    row, pair = row_bytes(dispatch, num_experts)
    return len(dispatch.counts_M) * row + len(dispatch.ids_P) * pair


def rows_by_size(bytes_seen: int, row: int, pair: int, most: int) -> list[int]:
    """Every number of rows that a message of this size can have.

    Args:
        bytes_seen: of its tensors.
        row: bytes of one row with its count.
        pair: bytes of one chosen expert of a row.
        most: experts that one row can choose at a host.
    """
    found = []
    for rows in range(bytes_seen // (row + most * pair), bytes_seen // (row + pair) + 1):
        rest = bytes_seen - rows * row
        if rest % pair == 0 and rows <= rest // pair <= rows * most:
            found.append(rows)
    return found
