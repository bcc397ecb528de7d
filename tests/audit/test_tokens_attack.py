"""The attacks on small real models, and a whole run through the real exchange."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coterie.audit.adversaries import Adversary
from coterie.audit.answers import Answers
from coterie.audit.evidence import Evidence
from coterie.audit.findings import Channel, Unit
from coterie.audit.tokens.attack import attack, taught
from coterie.audit.tokens.rows import Truth
from coterie.audit.tokens.scored import ScoredRows
from coterie.audit.tokens.search import beginnings, rebuild
from coterie.audit.tokens.views import views
from coterie.audit.transcript import Transcript
from coterie.models import seam
from coterie.models.zoo.tiny import tiny_model
from coterie.training.party.in_process import run_in_process
from helpers.federations import full_models, make_parts, settings, text


def public(sequences: int) -> list[list[int]]:
    found = text(999, sequences)
    return [found[row]["input_ids"].tolist() for row in range(len(found))]


def test_a_record_is_rebuilt_from_shuffled_rows_of_which_a_host_sees_two_thirds() -> None:
    model = tiny_model("olmoe")
    seam.select(model)
    texts = public(6)
    hosted = {layer: torch.arange(8) % 3 != layer % 3 for layer in range(3)}
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for layer, view in enumerate(views(model, texts, gradients=False)):
        there = view.hidden_PD[hosted[layer][view.experts_PK].any(1)]
        rows[layer] = there[torch.randperm(len(there), generator=generator)]
    starts = beginnings(model, rows, hosted)
    assert set(starts) <= {ids[0] for ids in texts}
    right = total = 0
    for start in starts:
        meant = [ids for ids in texts if ids[0] == start]  # of several with one beginning, any will do
        told = rebuild(model, rows, hosted, [start], words=len(meant[0]), candidates=16, beam=4)
        right += max(sum(a == b for a, b in zip(told, ids, strict=False)) for ids in meant)
        total += len(meant[0])
    assert total > 40
    assert right > 0.9 * total
    unrelated = {layer: torch.randn_like(part) for layer, part in rows.items()}
    assert beginnings(model, unrelated, hosted) == []


def test_whoever_knows_some_documents_is_asked_about_the_others() -> None:
    document_P = torch.arange(6)
    shown: list[torch.Tensor] = []
    asked: list[torch.Tensor] = []

    class Reader:
        def taught(self, rows_RD: torch.Tensor, token_R: torch.Tensor) -> Reader:
            shown.append(rows_RD[:, 0])
            return self

        def log_posterior(self, rows_RD: torch.Tensor) -> torch.Tensor:
            asked.append(rows_RD[:, 0])
            return torch.zeros(len(rows_RD), 9)

    rows = SimpleNamespace(hidden_RD=torch.arange(6.0)[:, None], round_R=torch.tensor([1, 1, 2, 2, 2, 2]))
    truth = Truth(torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64), torch.arange(6))
    scored: Any = SimpleNamespace(
        table=SimpleNamespace(layers={0: rows}, truth={0: truth}),
        places=SimpleNamespace(document_P=document_P),
        known=SimpleNamespace(tokens={0: Reader()}),
    )
    (found,) = taught(scored)
    assert (shown[0].tolist(), asked[0].tolist()) == ([2.0, 4.0], [3.0, 5.0]), "of the last round alone"
    assert found.value is not None
    assert found.value.count == 2


def test_of_two_layers_that_were_received_the_lower_one_speaks() -> None:
    places = torch.tensor([3, 5, 7])
    scored = ScoredRows.__new__(ScoredRows)
    vars(scored).update(
        table=SimpleNamespace(truth={0: Truth(places[:2], places[:2], torch.tensor([0, 1])),
                                     1: Truth(places[1:], places[1:], torch.tensor([1, 2]))}),
        places=SimpleNamespace(token_P=places),
        _read={0: (torch.tensor([3, 5]), torch.ones(2)), 1: (torch.tensor([8, 7]), torch.ones(2))},
    )  # fmt: skip
    guess_P, seen_P = scored.guessed()
    assert guess_P.tolist() == [3, 5, 7]
    assert seen_P.all()


@pytest.mark.slow
def test_a_run_through_the_real_exchange_is_read(tmp_path: Path) -> None:
    config = settings(train__rounds=2, train__eval_every=1, transcript={"rounds": "all", "max_gib": 1.0})
    models = full_models()
    models["alder"].save_pretrained(tmp_path / "start")  # type: ignore[operator]
    parts = make_parts(config, models, tmp_path)
    run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    evidence = Evidence(
        owner="alder",
        exchange="tokens",
        trunk="private",
        privacy=None,
        start=tmp_path / "start",
        public=public(400),
        received={name: Transcript.read(parts[name].run_dir, "alder") for name in ("birch", "cedar")},
        answers=Answers.read(parts["alder"].run_dir),
        run_folder=parts["alder"].run_dir,
    )
    found = attack(evidence, seed=0, budget_s=5)
    one = {(each.name, each.adversary, each.layer): each for each in found}
    assert {each.adversary for each in found} == set(Adversary)
    first = one["tokens by linear discriminants", Adversary.HOST_PUBLIC, 0]
    assert first.value is not None
    assert first.prior is not None
    assert first.gain is not None
    assert first.unit is Unit.SEEN
    assert first.value.value > 0.5
    assert first.prior.value < 0.1
    assert first.gain.low > 0.4
    alone, all_hosts = (one["coverage", who, None].value for who in (Adversary.HOST_PUBLIC, Adversary.ALL_HOSTS))
    assert alone is not None
    assert all_hosts is not None
    assert alone.value < all_hosts.value
    assert "held-out" in one["tokens of held-out text", Adversary.HOST_PUBLIC, None].sentence
    nexts = [each for each in found if each.channel is Channel.GRADIENTS]
    assert len(nexts) == 6
    assert max(each.value.value for each in nexts if each.value) > 0.5
    equal = one["equal tokens by the nearest row", Adversary.HOST, 0].value
    assert equal is not None
    assert equal.low > 0.3
    assert equal.high < 0.95, "no row is its own neighbour"
    (pairs,) = [each.value for each in found if each.unit is Unit.PAIRS and each.adversary is Adversary.ALL_HOSTS]
    assert pairs is not None
    assert pairs.low > 0.1, "by chance one row of a hundred stands behind another"
    assert [each.model_dump() for each in attack(evidence, seed=0, budget_s=5)] == [
        each.model_dump() for each in found
    ]
