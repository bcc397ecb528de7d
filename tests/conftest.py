"""What all tests share: one thread, small models, real text where it is present."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import none
from transformers import PreTrainedModel

import coterie.federation  # noqa: F401 - before anything imports gRPC, as in every command
from coterie.models import seam
from coterie.models.zoo.tiny import tiny_model
from helpers.forked import ForkedProcesses, Starter

settings.register_profile("coterie", deadline=None)  # a busy machine is no failure
settings.load_profile("coterie")

_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Several test processes share the machine; small matrices are faster on one thread anyway."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_python_while_garbage_is_collected() -> None:
    """Hypothesis asks for the time whenever garbage is collected, from its first test on; that is taken off here.

    `torch.get_rng_state` may collect garbage under a lock for which `torch.set_rng_state` waits without letting other
    Python run. Where the first one's thread loses its turn in the middle to the second one's, a process stands still
    for good. Parties that are threads of one process do both all the time.
    """
    given(none())(lambda nothing: None)()
    gc.callbacks.clear()


@pytest.fixture
def make_tiny() -> Callable[..., PreTrainedModel]:
    """``make_tiny("olmoe", seed=1, vocab_size=64)``: a tiny random model whose experts go through the seam."""

    def make(family: str = "olmoe", **settings: object) -> PreTrainedModel:
        model = tiny_model(family, **settings)
        seam.select(model)
        return model

    return make


@pytest.fixture(scope="session")
def real_text_dir() -> Path:
    """Folder of real text: COTERIE_TEST_DATA, or shared/data beside the repository. Skips the test when absent."""
    named = os.environ.get("COTERIE_TEST_DATA")
    folder = Path(named) if named else _ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(
            f"no real text in {folder}; set COTERIE_TEST_DATA to a folder that holds tiny_shakespeare/ and others"
        )
    return folder


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    """What `processes` are forked from."""
    made = Starter()
    yield made
    made.close()


@pytest.fixture
def processes(starter: Starter, tmp_path: Path) -> Iterator[ForkedProcesses]:
    """Commands of a federation as processes; none outlives the test."""
    made = ForkedProcesses(starter, tmp_path / "grove")
    yield made
    made.end()
