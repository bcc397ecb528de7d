"""`coterie plan`: memory of every party and bytes of a round, before anybody starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    settings: Annotated[Path | None, typer.Argument(help="The federation.yaml to plan, or a train.yaml.")] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", metavar="NAME", help="A published model instead of a file, e.g. OLMoE-1B-7B."),
    ] = None,
    parties: Annotated[int, typer.Option("--parties", metavar="N", help="With --preset: parties that share it.")] = 3,
    gbit: Annotated[
        float, typer.Option(min=0.001, help="Rate of a party's line, in Gbit/s, for the seconds of a round.")
    ] = 1.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to this file.")
    ] = None,
) -> None:
    """Say what a federation will need: device and host memory of every party, bytes, and the cheaper exchange.

    Reads federation.yaml and the model's config, no weights. Memory is that of full training with AdamW, without
    activations, which come on top in every arrangement. For a train.yaml: what `coterie train --dry-run` says, and
    what other lots and budgets would mean.

    Example:
        coterie plan federation.yaml
        coterie plan federation.yaml --gbit 10 --json plan.json
        coterie plan --preset Qwen3-30B-A3B --parties 4
        coterie plan train.yaml
    """
    from coterie.cli.output import big, say, size, table, write_json
    from coterie.config import FederationConfig, TrainConfig, load_yaml
    from coterie.config.load import names_setting
    from coterie.errors import ConfigError
    from coterie.training.planning.plan import make_plan, preset_federation

    if (settings is None) == (preset is None):
        raise ConfigError(
            "name what to plan: a federation.yaml or --preset, one of the two.",
            code="plan-what",
            fix="coterie plan federation.yaml, or coterie plan --preset OLMoE-1B-7B --parties 3",
        )
    if settings is not None and names_setting(settings, "data"):  # one party's training; a federation names no text
        from coterie.cli.training_progress import show_plan

        show_plan(load_yaml(settings, TrainConfig), json_file, others=True)
        return
    federation = load_yaml(settings, FederationConfig) if settings else preset_federation(preset or "", parties)
    plan = make_plan(federation)
    if json_file is not None:
        write_json(json_file, plan.as_json())
    say(
        f"{federation.name}: {big(plan.trunk + plan.experts)} parameters, {plan.expert_share:.1%} in the experts of "
        f"{plan.layers} layers; one place would hold {size(plan.centralised_bytes)}"
    )

    def moved(amount: int | None) -> str | None:
        return None if amount is None else f"{size(amount)} ({8 * amount / gbit / 1e9:.3g} s)"

    table(
        ("party", "exchange", "hosts", "device", "less than one place", "host memory", "down a round", "up a round"),
        [
            (
                each.party,
                each.exchange,
                big(each.hosted),
                size(each.need.device),
                f"{each.saving:.1%}",
                size(each.need.host),
                moved(each.down),
                moved(each.up),
            )
            for each in plan.parties
        ],
    )
    say("memory is state; activations come on top, and rows kept for clipping where `method` is book_keeping")
    say(
        f"tokens: {size(round(plan.bytes_per_token))} for each token; from {plan.break_even_tokens:,} tokens in a "
        "party's round on, experts moves less"
    )
    if federation.evaluate:
        say("tokens: held-out text crosses as well, at every evaluation, for half as much a token")
    seconds = 8 * plan.largest_layer_down / gbit / 1e9
    say(
        f"experts: one layer comes in {seconds:.3g} s at {gbit:g} Gbit/s; fetching hides where the forward of the "
        "first physical batch takes longer than that for each layer"
    )
    if plan.noise:
        parties = len(federation.parties)
        table(
            (
                "noise of each party",
                "holds against",
                "noise in the sum",
                "epsilon",
                "against one",
                "against all others",
            ),
            [
                (
                    "whole" if row.colluding is None else f"shared, colluding: {row.colluding}",
                    f"{row.colluding or parties - 1} of {parties - 1}",
                    f"{row.factor:.2f}",
                    f"{row.epsilon:.3g}",
                    f"{row.epsilon_one:.3g}",
                    "unbounded" if row.epsilon_all is None else f"{row.epsilon_all:.3g}",
                )
                for row in plan.noise
            ],
        )
        say("noise in the sum: over that of one party alone; epsilon: for the largest lot that the noise allows")
    for lines in plan.warnings.values():
        for line in lines:
            say(line)
