"""The setting `tensor_cores`, from a session to the engine's products: bounded, scoped, recorded, or said to be idle.

Tensor cores are emulated on the processor, see `helpers.tensor_core`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie import dp
from coterie.config.privacy import PartyPrivacy, PrivacySpec
from coterie.dp.accounting.budget import Budget, PrivacyWarning
from coterie.dp.accounting.lots import Lot
from coterie.dp.clipping import Flat
from coterie.dp.per_sample import capture, gram, products
from coterie.dp.per_sample.engine import Engine
from coterie.dp.plan import ComputeOptions
from coterie.dp.session import PrivateSession
from coterie.errors import PrivacyError
from coterie.hf import PrivacyArguments
from helpers.engine_reference import size
from helpers.tensor_core import known_processor

COUNT, WIDTH = 3, 16


class Cancelling(nn.Module):
    """Rows with a large common part, and gradients that sum to zero over them: every lost digit shows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return (F.linear(x, self.weight) * c).flatten(1).sum(1)


def records() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT, 6, WIDTH, generator=generator) + 30 * torch.randn(COUNT, 1, WIDTH, generator=generator)
    c = torch.randn(COUNT, 6, WIDTH, generator=generator)
    c = c - c.mean(1, keepdim=True)
    return [{"x": x[i], "c": c[i]} for i in range(COUNT)]


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in ("x", "c")}


def loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"], batch["c"])


def start(folder: Path, model: nn.Module | None = None, **options: Any) -> PrivateSession:
    model = model or Cancelling()
    given: dict[str, Any] = {
        "budget": Budget(6.0, 1e-3), "lot_size": 2, "rounds": 1, "physical_batch": 2, "seed": 1, "run": "cores",
        "ledger": folder, "self_check": False, "tensor_cores": True,
    }  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return dp.make_private(model, optimizer, records(), collate, loss, **given | options)


def started(folder: Path) -> dict[str, Any]:
    """The facts of the only run of a ledger."""
    (file,) = folder.rglob("ledger.jsonl")
    (entry,) = [line for line in map(json.loads, file.read_text("utf-8").splitlines()) if line["kind"] == "run"]
    return dict(entry["data"])


@pytest.fixture
def hooks_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward runs in a thread of its own, as autograd does it for a GPU."""

    def backward(total: Tensor) -> None:
        failed: list[BaseException] = []

        def run() -> None:
            try:
                total.backward()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]

    monkeypatch.setattr(capture, "backward", backward)


@pytest.mark.parametrize("method", ["book_keeping", "ghost"])
def test_invariant_2_a_session_on_tensor_cores_clips_every_record_with_certain_slack(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hooks_elsewhere: None
) -> None:
    asked: set[tuple[bool, bool]] = set()
    before = gram.certain

    def certain() -> bool:
        asked.add((before(), threading.current_thread() is threading.main_thread()))
        return before()

    monkeypatch.setattr(gram, "certain", certain)
    taken = []
    with known_processor(monkeypatch), start(tmp_path, method=method) as session:
        add = products._add  # noqa: SLF001 - counts what goes through tensor cores
        monkeypatch.setattr(products, "_add", lambda *given: (taken.append(1), add(*given)))
        for unit in range(COUNT):
            sums = session.lot_sums.compute(Lot(1, *(torch.tensor([i]).numpy() for i in (unit, 0))), f"{unit}")
            assert 0.98 <= size(sums) <= 1 + session.lot_sums.engine.eta
            assert not products.certain()
        for lot in session:
            session.step(lot)
    assert taken
    assert {of for of, _ in asked} == {True}
    assert {main for _, main in asked} >= {False}
    assert started(tmp_path)["tensor_cores"] is True


def test_what_a_session_leaves_is_float32_also_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with known_processor(monkeypatch), start(tmp_path) as session:
        engine = session.lot_sums.engine
        assert isinstance(engine, Engine)
        with pytest.raises(KeyError):
            engine.accumulate({"x": torch.ones(2, 3, WIDTH)})
        assert not products.certain()
    assert torch.get_float32_matmul_precision() == "highest"


def test_engines_of_both_kinds_are_not_at_work_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def holding() -> None:
        with products.law(tensor_cores=False):
            inside.set()
            go_on.wait(10)

    batch = collate(records())
    with known_processor(monkeypatch):
        cores, plain = (Engine(Cancelling(), loss, Flat(1.0), tensor_cores=on) for on in (True, False))
        other = threading.Thread(target=holding, daemon=True)
        other.start()
        inside.wait()
        plain.accumulate(batch)
        with pytest.raises(PrivacyError, match="two threads") as caught:
            cores.accumulate(batch)
        assert caught.value.code == "dp-tensor-cores-threads"
        go_on.set()
        other.join()
        cores.accumulate(batch)
        with products.law(tensor_cores=True):  # whoever begins in a thread decides
            plain.norms(batch)
            assert products.certain()
        assert not products.certain()


def without_effect(folder: Path, why: str, **options: Any) -> PrivateSession:
    with pytest.warns(PrivacyWarning, match=f"`tensor_cores` is without effect here.*{why}"):
        return start(folder, **options)


def test_elsewhere_it_is_said_to_be_without_effect_and_has_none(tmp_path: Path) -> None:
    trained = []
    for folder, on in (("on", True), ("off", False)):
        model, where = Cancelling(), tmp_path / folder
        make: Callable[..., PrivateSession] = start if not on else lambda f, **o: without_effect(f, "cpu", **o)
        with make(where, model=model, tensor_cores=on) as session:
            for lot in session:
                session.step(lot)
        assert "tensor_cores" not in started(where)
        trained.append(model.weight.detach())
    assert torch.equal(*trained)


def test_isolation_exact_and_an_engine_of_ones_own_take_no_such_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with known_processor(monkeypatch):
        without_effect(tmp_path / "exact", "isolation", isolation="exact").close()
        model = Cancelling()
        engine = Engine(model, loss, Flat(1.0))
        without_effect(tmp_path / "own", "own", model=model, engine=engine).close()


def test_a_resumed_run_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with known_processor(monkeypatch):
        with start(tmp_path / "ledger") as session:
            session.step(session.next_lot())
            session.save(tmp_path / "saved")
        model = Cancelling()
        again = PrivateSession.resume(
            tmp_path / "saved", model, torch.optim.SGD(model.parameters(), 0.1), records(), collate, loss
        )
        assert isinstance(again.lot_sums.engine, Engine)
        assert again.lot_sums.engine.tensor_cores
        again.close()
    with pytest.warns(PrivacyWarning, match="without effect"):  # a machine without such a GPU can go on
        PrivateSession.resume(
            tmp_path / "saved", model, torch.optim.SGD(model.parameters(), 0.1), records(), collate, loss
        ).close()


def test_settings_files_parties_and_trainer_have_it() -> None:
    spec = PrivacySpec(epsilon=1.0, tensor_cores=True)
    assert ComputeOptions.of_settings(spec).tensor_cores
    assert not ComputeOptions.of_settings(PrivacySpec(epsilon=1.0)).tensor_cores
    assert PartyPrivacy(tensor_cores=True).tensor_cores
    assert PrivacyArguments(1.0, 1e-5, tensor_cores=True).tensor_cores
