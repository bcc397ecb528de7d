"""A plan as checkpoints keep it, and back. Names in the file are the format's own, whatever the code calls them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from coterie.dp.accounting.budget import Budget
from coterie.dp.accounting.lots import LotPlan
from coterie.dp.balance import Balance
from coterie.dp.clipping import Clipping
from coterie.dp.noise.bands import NoiseBands
from coterie.dp.per_sample.memory_choice import Method
from coterie.dp.plan import ComputeOptions, PrivacyPlan
from coterie.errors import CheckpointError, PrivacyError
from coterie.storage import check_keys

_KNOWN: Mapping[str, tuple[str, ...]] = {
    "settings": (
        "budget", "noise_multiplier", "clip_norm", "rounds", "physical_batch", "adaptive_quantile", "adaptive_share",
        "seed", "isolation", "half_precision", "user_column", "bands",
    ),
    "settings.budget": tuple(field.name for field in fields(Budget)),
    "plan": ("units", "expected_size", "sampler", "limit"),
    "options": ("clipping", "method", "balance", "records_per_user", "self_check", "tensor_cores"),
    "options.balance": tuple(field.name for field in fields(Balance)),
}  # fmt: skip
"""Names in a saved plan, by the block they stand in."""


def plan_to_json(
    plan: PrivacyPlan, options: ComputeOptions, lots: LotPlan, noise_multiplier: float
) -> dict[str, dict[str, Any]]:
    """JSON values from which `plan_from_json` makes the plan again, with the noise that it was calibrated to."""
    return {
        "settings": {
            "budget": asdict(plan.budget),
            "noise_multiplier": noise_multiplier,
            "clip_norm": plan.clip_norm,
            "rounds": plan.rounds,
            "physical_batch": options.physical_batch,
            "adaptive_quantile": plan.adaptive_quantile,
            "adaptive_share": plan.adaptive_share,
            "seed": plan.seed,
            "isolation": plan.isolation,
            "half_precision": plan.half_precision,
            **({} if plan.bands is None else {"bands": plan.bands.to_json()}),
        },
        "plan": {
            "units": lots.units,
            "expected_size": lots.lot_size,
            "sampler": lots.sampler,
            "limit": lots.max_lot,
        },
        "options": {
            "clipping": plan.clipping if isinstance(plan.clipping, str) else None,
            "method": options.method,
            "balance": asdict(plan.balance),
            "records_per_user": plan.records_per_user,
            "self_check": options.self_check,
            **({"tensor_cores": True} if options.tensor_cores else {}),
        },
    }


def check_saved(where: object, facts: Mapping[str, Any]) -> None:
    """Refuse a plan that says more than this version would keep to.

    Args:
        where: the checkpoint.
        facts: see `plan_from_json`.

    Raises:
        CheckpointError: ``format-unknown``.
    """
    for path, known in _KNOWN.items():
        block: Any = facts
        for name in path.split("."):
            block = block[name]
        check_keys(where, f"key of `{path}`", block, known, CheckpointError)


def plan_from_json(
    facts: Mapping[str, Any], clipping: str | Clipping | None = None, method: Method | None = None
) -> tuple[PrivacyPlan, ComputeOptions]:
    """The plan of a checkpoint.

    Args:
        facts: what `plan_to_json` gave; more may be in it.
        clipping: instead of the saved name; needed where the run was started with a policy of its own.
        method: instead of the saved one.

    Raises:
        PrivacyError: the clipping policy is not in the checkpoint and not given.
    """
    settings, lots, options = facts["settings"], facts["plan"], facts["options"]
    clipper = clipping or options["clipping"]
    if clipper is None:
        raise PrivacyError(
            "the session was started with a clipping policy of its own.",
            code="dp-resume-clipping",
            why="it bounds what one record contributes, and a checkpoint does not hold it",
            fix="pass the same policy: PrivateSession.resume(..., clipping=...)",
        )
    plan = PrivacyPlan(
        Budget(**settings["budget"]),
        settings["rounds"],
        lots["expected_size"],
        clip_norm=settings["clip_norm"],
        clipping=clipper,
        adaptive_quantile=settings["adaptive_quantile"],
        adaptive_share=settings["adaptive_share"],
        sampler=lots["sampler"],
        max_lot=lots["limit"],
        records_per_user=options["records_per_user"],
        balance=Balance(**options["balance"]),
        isolation=settings["isolation"],
        half_precision=settings["half_precision"],
        seed=settings["seed"],
        noise_multiplier=settings["noise_multiplier"],
        bands=NoiseBands.from_json(settings.get("bands")),
    )
    how = ComputeOptions(
        method or options["method"], settings["physical_batch"], self_check=options.get("self_check", True),
        tensor_cores=options.get("tensor_cores", False),
    )  # fmt: skip
    return plan, how.repeatable(plan.seed)
