"""The JSON of an audit: its shape, and no number without ground."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from coterie.audit.findings import Finding, Findings, Over, PrivateFigures, TokensFigures, Unit, carried
from coterie.audit.report.shareable import shareable
from helpers.synthetic_findings import estimate, finding, findings, private


def test_the_json_has_the_agreed_shape() -> None:
    found = json.loads(json.dumps(findings().as_json()))
    assert {"recovery", "layers", "prior"} <= set(found["tokens"])
    assert {"recovery", "lots", "prior"} <= set(found["experts"])
    assert {
        "recovery",
        "prior",
        "advantage",
        "auc",
        "epsilon_claimed",
        "epsilon_lower",
        "epsilon_ceiling",
    } <= set(found["experts_dp"])
    assert {"positive", "negative"} <= set(found["controls"])
    assert found["tokens"]["recovery"] == 0.981
    assert found["tokens"]["intervals"]["recovery"] == {"value": 0.981, "low": 0.971, "high": 0.991, "count": 1000}
    assert Findings.model_validate(found) == findings()


def test_a_figure_is_a_number_or_null_with_its_reason() -> None:
    assert private(auc=None).reasons == {"auc": "not run"}
    with pytest.raises(ValidationError, match="auc: a value or the reason"):
        PrivateFigures.model_validate(private().model_dump() | {"auc": None})
    with pytest.raises(ValidationError, match="auc: a value or the reason"):
        PrivateFigures.model_validate(private().model_dump() | {"reasons": {"auc": "why"}})


def test_a_finding_has_a_value_or_the_reason_why_there_is_none() -> None:
    assert finding(None).reason == "too few places"
    with pytest.raises(ValidationError, match="a value or the reason"):
        finding(None, reason="")
    with pytest.raises(ValidationError, match="a value or the reason"):
        finding(0.5, reason="why")


def test_a_finding_that_could_have_been_anything_has_no_value() -> None:
    told = finding(0.9, 1.0, sentence="90 % of tokens", gain=estimate(0.5), roc=((0.0, 1.0),))
    found = carried(told)
    assert (found.value, found.prior, found.gain, found.roc) == (None, None, None, ())
    assert "too few documents" in found.reason
    assert "90" not in found.sentence
    assert Finding.model_validate(found.model_dump()) == found
    for kept in (finding(0.9, 0.899), finding(0.9, 1.0, unit=Unit.BITS), finding(None)):
        assert carried(kept) is kept


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValidationError):
        TokensFigures(recovery=value, layers={}, prior=0.1)


def test_the_edition_to_pass_on_has_no_figure_over_members() -> None:
    owners = findings()
    passed = shareable(owners)
    text = json.dumps(passed.as_json())
    over_members = [f for _, f in owners.every() if f.over is Over.MEMBERS and f.value is not None]
    assert len(over_members) > 20
    for figure in ("0.981", "0.9995", "0.93", "0.75", "0.43", "0.988", "0.171,", "98.1", "0.001"):
        assert figure in json.dumps(owners.as_json()), figure
    for _, found in passed.every():
        assert (found.value is None) == (found.over is Over.MEMBERS or found.reason == "too few places")
        assert found.value is not None or (found.prior, found.gain, found.roc) == (None, None, ())
    for figures in (passed.tokens, passed.experts, passed.experts_dp):
        assert figures.recovery is figures.prior is None
        assert "left out" in figures.reasons["recovery"]
        assert not set(figures.intervals) & {"recovery", "prior", "advantage", "auc"}
    assert passed.experts.auc is passed.experts_dp.auc is passed.experts_dp.advantage is None
    assert passed.tokens.layers == passed.experts.lots == {}
    assert passed.experts.simulated == ()
    assert "98.1" not in text
    assert "0.988" not in text
    assert [v.outcome for v in passed.verdicts] == [v.outcome for v in owners.verdicts]
    assert passed.experts_dp.epsilon_claimed == 8.0
    assert passed.left_out
    assert shareable(passed).findings == passed.findings


def test_an_estimate_keeps_its_interval_in_the_json() -> None:
    found = findings().as_json()
    assert isinstance(found, dict)
    first = found["findings"]["tokens"][0]
    assert first["value"] == {"value": 0.981, "low": 0.971, "high": 0.991, "count": estimate(0.9).count}
