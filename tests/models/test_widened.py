"""Room for one widened matrix at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from coterie.models.widened import room_for

STORED = torch.arange(60, dtype=torch.bfloat16).view(3, 4, 5)


@pytest.mark.parametrize(
    "matrix", [STORED[1], STORED[1].t(), STORED.transpose(1, 2)[2], STORED[:, :, 2], STORED[0, :0]]
)
def test_a_matrix_is_laid_out_as_a_conversion_would_lay_it_out(matrix: Tensor) -> None:
    """So a product reads it in the same order, and rounds alike."""
    converted = matrix.to(torch.float32)
    room = room_for(matrix, torch.float32)
    assert room.stride() == converted.stride()
    assert torch.equal(room.copy_(matrix), converted)


def test_a_thread_has_one_room_for_all_matrices() -> None:
    places = {room_for(STORED[0].repeat(times, 1), torch.float32).data_ptr() for times in (3, 1, 2, 3)}
    with ThreadPoolExecutor(1) as other:
        elsewhere = other.submit(room_for, STORED[0], torch.float32).result().data_ptr()
    assert len(places) == 1
    assert elsewhere not in places


def test_room_that_was_made_for_inference_can_be_written_to_in_training() -> None:
    with torch.inference_mode():
        room_for(torch.zeros(7, 9, dtype=torch.bfloat16), torch.float64).zero_()
    assert not room_for(torch.zeros(7, 9, dtype=torch.bfloat16), torch.float64).fill_(1).is_inference()
