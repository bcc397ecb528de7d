"""All attacks on the exchange `tokens`, from the weakest adversary to the strongest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from coterie.audit.adversaries import Adversary, most_received
from coterie.audit.evidence import Evidence
from coterie.audit.findings import Channel, Finding, Unit
from coterie.audit.fitting import unfit
from coterie.audit.metrics import rate
from coterie.audit.tokens.decoders import guesses
from coterie.audit.tokens.known import Known
from coterie.audit.tokens.rows import KeyOf, table
from coterie.audit.tokens.scored import ScoredRows, percent
from coterie.audit.tokens.sizes import row_bytes, rows_by_size, size
from coterie.audit.transcript import Dispatch
from coterie.config import ModelSpec
from coterie.errors import AuditError
from coterie.models.seam import expert_layers
from coterie.models.zoo.build import build_model

_ALIKE = 2000
_FOR_RECORDS_S = 60.0
"""With less time one host alone rebuilds records, and all together are not asked to."""


def attack(evidence: Evidence, *, seed: int, budget_s: float) -> list[Finding]:
    """Attack what all other parties received of one owner, alone and together, and score it by the owner's key.

    Args:
        evidence: of a run with the exchange `tokens`.
        seed: of everything that is drawn.
        budget_s: about so many seconds of one core; decides how much public text is learned from.

    Raises:
        AuditError: ``audit-nothing``: nothing was received; ``audit-answers``: there is no key;
            ``audit-public``: too little public text.
        CheckpointError: ``transcript-damaged``: a transcript does not fit the starting checkpoint.
    """
    if evidence.answers is None:
        raise AuditError(
            f"There is no key to what {evidence.owner} sent.",
            code="audit-answers",
            why="without it nobody can tell whether what an attack read is right",
            fix="agree on `transcript:` in federation.yaml before the run; the owner's run folder then holds it",
        )
    model = build_model(ModelSpec(path=evidence.start, provenance="public"))
    for each in evidence.received.values():
        each.check_start(model)
    experts = [layer.num_experts for layer in expert_layers(model)]
    received = {host: list(found.of(evidence.owner).dispatches()) for host, found in evidence.received.items()}
    received = {host: sent for host, sent in received.items() if sent}
    if not received:
        raise AuditError(
            f"No other party recorded a row of {evidence.owner}.",
            code="audit-nothing",
            why="what was not received cannot be attacked",
            fix="name the folders of the parties that host experts",
        )
    key = KeyOf(evidence.answers.rows, evidence.answers.whole)
    known = Known.of(model, evidence.public, seed=seed, budget_s=budget_s)
    for name, sent in received.items():
        for dispatch in sent:
            if dispatch.hidden_MD.shape[1] != known.views[dispatch.layer].hidden_PD.shape[1]:
                raise unfit(f"What {name} received", "the starting checkpoint's vectors have another width")
    host = most_received({name: sum(len(each.hidden_MD) for each in sent) for name, sent in received.items()})
    rows = table({host: received[host]}, experts, key)
    alone = ScoredRows(known, rows, _hosted(evidence, (host,)), Adversary.HOST_PUBLIC)
    found = [
        network(alone, received[host], experts),
        host_alone(alone),
        *alone.findings(),
        *alone.rebuilt(),
        *taught(alone),
    ]
    if len(received) > 1:
        joined = table(received, experts, key)
        together = ScoredRows(known, joined, _hosted(evidence, tuple(received)), Adversary.ALL_HOSTS)
        found += together.findings()
        if budget_s >= _FOR_RECORDS_S:
            found += together.rebuilt()
    return found


def _hosted(evidence: Evidence, hosts: tuple[str, ...]) -> dict[int, Tensor]:
    placement = next(iter(evidence.received.values())).placement
    return {layer: torch.tensor([by in hosts for by in owners]) for layer, owners in enumerate(placement)}


def network(scored: ScoredRows, sent: Sequence[Dispatch], experts: Sequence[int]) -> Finding:
    """What sizes alone say: how many tokens a forward sends to a host, and never which."""
    told = 0
    for each in sent:
        row, pair = row_bytes(each, experts[each.layer])
        most = int(each.counts_M.max()) if len(each.counts_M) else 1
        told += len(rows_by_size(size(each, experts[each.layer]), row, pair, most)) == 1
    places = scored.places
    value = rate(places.token_P == scored.known.unigram.commonest, places.document_P)
    return Finding(
        name="sizes of encrypted messages",
        adversary=Adversary.NETWORK,
        channel=Channel.TOKENS,
        unit=Unit.TOKENS,
        value=value,
        prior=value,
        sentence=f"Sizes of encrypted messages hold no token; {told / len(sent):.0%} of them tell exactly how many "
        f"tokens a forward sends to a host. Whoever sees nothing else guesses {percent(value)} of the tokens, by the "
        "commonest one.",
    )


def host_alone(scored: ScoredRows) -> Finding:
    """Without the model: which rows are of one token, by the nearest other row. Enough to count words."""
    layer = min(scored.table.layers)
    rows, truth = scored.table.layers[layer], scored.table.truth[layer]
    real = torch.nonzero(truth.place_R >= 0).squeeze(1)[:_ALIKE]
    hidden, token = rows.hidden_RD[real], truth.token_R[real]
    apart = torch.cdist(hidden, hidden)
    apart.fill_diagonal_(float("inf"))
    document = scored.places.document_P[truth.place_R[real]]
    value = rate(token[apart.argmin(1)] == token, document)
    share_V = torch.bincount(token).double() / len(token)
    chance = float(share_V.square().sum())
    return Finding(
        name="equal tokens by the nearest row",
        adversary=Adversary.HOST,
        channel=Channel.ROWS,
        unit=Unit.PLACES,
        value=value,
        layer=layer,
        sentence="A host that knows nothing of the model sees which tokens are equal: the nearest other row is of "
        f"the same token in {percent(value)} of cases ({chance:.1%} by chance), so that words can be counted.",
    )


def taught(scored: ScoredRows) -> Iterator[Finding]:
    """A host that knows the text of half of the owner's documents, and reads the rest in the last round recorded."""
    for layer, rows in scored.table.layers.items():
        truth, number = scored.table.truth[layer], int(rows.round_R.max())
        inside = (rows.round_R == number) & (truth.place_R >= 0)
        document = scored.places.document_P[truth.place_R]
        shown, asked = inside & (document % 2 == 0), inside & (document % 2 == 1)
        if not shown.any() or not asked.any():
            continue
        reader = scored.known.tokens[layer].taught(rows.hidden_RD[shown], truth.token_R[shown])
        value = rate(guesses(reader, rows.hidden_RD[asked])[0] == truth.token_R[asked], document[asked])
        yield Finding(
            name="tokens by discriminants taught with known documents",
            adversary=Adversary.HOST_DOMAIN,
            channel=Channel.ROWS,
            unit=Unit.SEEN,
            value=value,
            layer=layer,
            sentence=f"One host that knows half of the documents reads {percent(value)} of the other half's tokens "
            f"that reach it at MoE layer {layer}, in round {number}.",
        )
