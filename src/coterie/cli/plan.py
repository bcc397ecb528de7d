"""`coterie plan`: memory of every party and bytes of a round, before anybody starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli.pairs import named_pairs
from coterie.dp.accounting.digits import epsilon_digits

if TYPE_CHECKING:
    from coterie.config import FederationConfig
    from coterie.training.planning.equal_rates import EqualRates
    from coterie.training.planning.round_time import RoundTime


def command(
    settings: Annotated[
        Path | None, typer.Argument(help="The federation.yaml to plan, a party.yaml of it, or a train.yaml.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", metavar="NAME", help="A published model instead of a file, e.g. OLMoE-1B-7B."),
    ] = None,
    parties: Annotated[
        int | None, typer.Option("--parties", metavar="N", help="With --preset: parties that share it; default 3.")
    ] = None,
    gbit: Annotated[
        float, typer.Option(min=0.001, help="Rate of a party's line, in Gbit/s, for the seconds of a round.")
    ] = 1.0,
    records: Annotated[
        list[str] | None,
        typer.Option(
            "--records",
            metavar="NAME=N",
            help="Of a federation with a budget: a party's number of records, once a party; proposes lots.",
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            min=2, help="Of a federation: also what a round and the run take, by made-up records of so many tokens."
        ),
    ] = None,
    speed: Annotated[
        list[str] | None,
        typer.Option(
            "--speed", metavar="NAME=F", help="With --sequence-length: a party's machine is F times as fast; repeat."
        ),
    ] = None,
    device_gb: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="With a train.yaml or party.yaml: memory of a device, or of a rank, in GB; default: this machine's.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to this file.")
    ] = None,
) -> None:
    """Say what a federation will need: device and host memory of every party, bytes, and the cheaper exchange.

    Reads federation.yaml and the model's config, no weights. Memory is that of training with AdamW, all weights and
    adapters alone (LoRA), without activations, which come on top in every arrangement; which of the two suits what
    is said in words. With --records: lots at which every party draws each of its
    records equally often, so that all need the same noise. With --sequence-length: what a round and the run take,
    from computing measured here and bytes over every party's line.

    For a train.yaml: what `coterie train --dry-run` says, what other lots and budgets would mean, and what a round
    takes on this machine and holds at its peak, activations included, from a short calibration with models of few
    layers on synthetic records; whether one device, records over several, or experts over several suits it; and the
    same with adapters in place of full training.

    For a party.yaml, with its federation.yaml: what one process of the party holds, and what each of 2, 4 and 8 ranks
    would (`devices`, `experts_over`), the gateway apart from the others; what the file asks for; and what suits.

    Example:
        coterie plan federation.yaml
        coterie plan federation.yaml --gbit 10 --json plan.json
        coterie plan federation.yaml --sequence-length 512 --gbit 0.5 --speed cedar=0.5
        coterie plan federation.yaml --records alder=1583 --records birch=1100 --records cedar=1155
        coterie plan --preset Qwen3-30B-A3B --parties 4
        coterie plan --preset Switch-base-8
        coterie plan train.yaml
        coterie plan train.yaml --device-gb 80
        coterie plan party.yaml
    """
    from coterie.cli.output import big, say, size, table, write_json
    from coterie.config import FederationConfig, TrainConfig, load_yaml
    from coterie.config.load import names_setting
    from coterie.dp.noise.pooled import fewest_parties
    from coterie.errors import ConfigError
    from coterie.training.planning.outside import is_outside
    from coterie.training.planning.plan import make_plan, preset_federation

    if (settings is None) == (preset is None):
        raise ConfigError(
            "name one thing to plan: a federation.yaml, party.yaml or train.yaml, or a model with --preset.",
            code="plan-what",
            fix="coterie plan federation.yaml, or coterie plan --preset OLMoE-1B-7B --parties 3",
        )
    if settings is not None and parties is not None:
        raise ConfigError(
            f"--parties {parties} is for --preset; {settings} says itself who takes part.",
            code="plan-parties",
            why="a plan for another number of parties than was asked for would be taken for that one",
            fix="leave it out, or change the file",
        )
    given = None if device_gb is None else round(device_gb * 1e9)
    if settings is not None and names_setting(settings, "party"):
        show_ranks(settings, given, json_file)
        return
    if settings is not None and names_setting(settings, "data"):  # one party's training; a federation names no text
        from coterie.cli.training_progress import settled_lot, show_plan

        show_plan(settled_lot(load_yaml(settings, TrainConfig)), json_file, others=True, device_bytes=given)
        return
    if preset is not None and is_outside(preset):
        show_outside(3 if parties is None else parties, json_file)
        return
    federation = (
        load_yaml(settings, FederationConfig)
        if settings
        else preset_federation(preset or "", 3 if parties is None else parties)
    )
    plan = make_plan(federation, numbers_of(records or ()))
    found = other = None
    if sequence_length is not None:
        from coterie.training.party.planned_time import planned_round, the_other_way

        rate, speeds = gbit * 1e9 / 8, speeds_of(speed)
        found = planned_round(federation, plan, sequence_length, bytes_per_second=rate, speeds=speeds)
        other = the_other_way(federation, plan, sequence_length, bytes_per_second=rate, speeds=speeds)
    if json_file is not None:
        write_json(
            json_file,
            {
                **plan.as_json(),
                "time": None if found is None else found.as_json(),
                "time_the_other_way": None if other is None else other.as_json(),
            },
        )
    say(
        f"{federation.name}: {big(plan.trunk + plan.experts)} parameters, {plan.expert_share:.1%} in the experts of "
        f"{plan.layers} layers; one place would hold {size(plan.centralised_bytes)}"
    )

    def moved(amount: int | None) -> str | None:
        return None if amount is None else f"{size(amount)} ({8 * amount / gbit / 1e9:.3g} s)"

    rows = [("all weights", each) for each in plan.parties] + [("adapters", each) for each in plan.lora.parties]
    table(
        (
            "party",
            "exchange",
            "trained",
            "hosts",
            "device",
            "less than one place",
            "host memory",
            "down a round",
            "up a round",
        ),
        [
            (
                each.party,
                each.exchange,
                trained,
                big(each.hosted),
                size(each.need.device),
                f"{each.saving:.1%}",
                size(each.need.host),
                moved(each.down),
                moved(each.up),
            )
            for trained, each in rows
        ],
    )
    once = max(each.once for each in plan.lora.parties)
    how = (
        "federation.yaml has `lora`" if plan.lora.agreed else f"`lora: {{rank: {plan.lora.rank}}}` in federation.yaml"
    )
    say(
        f"adapters ({how}): {big(plan.lora.adapters)} values, in `experts`; frozen experts cross once, in the first "
        f"round: {moved(once)}; one place would hold {size(plan.lora.centralised_bytes)}"
    )
    if plan.factor_bytes:
        say(f"all weights trained: {size(plan.factor_bytes)} of the device are the preconditioner, in one place, too")
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
    if plan.noise.rows:
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
                for row in plan.noise.rows
            ],
        )
        say("noise in the sum: over that of one party alone")
        if federation.colluding == parties - 1:
            say(f"colluding: {parties - 1} is whole noise: against all others together there is nothing to share")
        fewest = fewest_parties(federation.colluding)
        say(
            "a party whose budget is spent contributes no more; the others go on, under the same promise, with the "
            f"shares that fewer parties need, while at least {fewest} contribute"
        )
    for remark in plan.noise.remarks:
        say(remark)
    if plan.equal_rates is not None:
        show_lots(federation, plan.equal_rates)
    if found is not None and sequence_length is not None:
        show_time(found, gbit, sequence_length)
        if other is not None:
            way = "all weights trained instead" if plan.lora.agreed else "adapters instead, in `experts`"
            say(f"with {way} a round takes {other.seconds:.3g} s")
    for line in plan.advice():
        say(line)
    for lines in plan.warnings.values():
        for line in lines:
            say(line)


def show_outside(parties: int, json_file: Path | None) -> None:
    """What a model would need that cannot be trained here, and what is nearest."""
    from coterie.cli.output import big, say, size, table, write_json
    from coterie.training.planning.outside import NAME, WHY, plan_outside
    from coterie.training.planning.plan import check_parties

    check_parties(parties)
    found = plan_outside(parties)
    shape = found.shape
    if json_file is not None:
        write_json(json_file, found.as_json())
    say(WHY)
    say(
        f"{NAME}: {big(shape.trunk + shape.experts)} parameters, {shape.expert_share:.1%} in the experts of "
        f"{shape.layers} layers; one place would hold {size(found.centralised.device)}"
    )
    table(
        ("exchange", "hosts", "device", "host memory"),
        [
            (name, big(shape.hosted), size(need.device), size(need.host))
            for name, need in (("tokens", found.tokens), ("experts", found.experts))
        ],
        title=f"each of {parties} parties, if it could be:",
    )


def show_ranks(settings: Path, device_bytes: int | None, json_file: Path | None) -> None:
    """What the ranks of a party hold, and how many suit.

    Args:
        settings: its party.yaml.
        device_bytes: memory of one rank; None: all share this machine's.
        json_file: for the figures.
    """
    from coterie.cli.output import big, say, size, table, write_json
    from coterie.config import FederationConfig, PartyConfig, load_yaml
    from coterie.training.party.planned_ranks import planned_ranks

    config = load_yaml(settings, PartyConfig)
    found = planned_ranks(config, load_yaml(config.federation, FederationConfig), device_bytes)
    if json_file is not None:
        write_json(json_file, found.as_json())
    budget = "without a budget" if found.isolation is None else f"within a budget, isolation {found.isolation}"
    say(
        f"{found.party} of {found.federation}, exchange {found.exchange}: {big(found.trained)} values "
        f"{'of adapters ' if found.adapters else ''}are trained, {budget}"
    )
    both = "" if found.one_together is None else f"; {size(found.one_together)} where both are one memory"
    say(f"one process: {size(found.one.device)} where it computes, {size(found.one.host)} beside that{both}")
    if found.rows:
        on_gpus = found.one_together is None
        table(
            ("party.yaml", "gateway", "each other rank", "all ranks together", *(["on a GPU"] * on_gpus)),
            [
                (row.setting, *map(size, (row.gateway, row.other, row.together, *([row.device] * on_gpus))))
                for row in found.rows
            ],
        )
        say("several ranks keep fetched layers on disk; the gateway is rank 0, which hosts the party's experts")
    if found.now is not None:
        say(
            f"party.yaml asks for `{found.now.setting}`: {size(found.now.gateway)} at the gateway, "
            f"{size(found.now.other)} at each other rank"
        )
    if found.refused:
        say(f"would be refused: {found.refused}")
    say("memory is state; activations come on top, and rows kept for clipping where `method` is book_keeping")
    chosen = found.chosen
    where = "this machine's" if found.shared else "devices with"
    shared = ", which all ranks share" if found.shared else ""
    say(f"of {where} {size(chosen.device_bytes)}{shared}: {found.advice} ({size(chosen.rank_bytes)}"
        f"{'' if found.shared else ' at the one with the most'})")  # fmt: skip


def numbers_of(given: Sequence[str]) -> dict[str, int]:
    """What ``NAME=N`` options say.

    Raises:
        ConfigError: one of them says something else (code ``plan-records``), or as `named_pairs`.
    """
    from coterie.errors import ConfigError

    example = "--records alder=1583 --records birch=1100"
    pairs = named_pairs("--records", given, example)
    for name, number in pairs.items():
        if not number.isdecimal():
            raise ConfigError(
                f"--records {name}={number} is not a party's name and its number of records.",
                code="plan-records",
                fix=f"for example {example}",
            )
    return {name: int(number) for name, number in pairs.items()}


def speeds_of(given: Sequence[str] | None) -> dict[str, float]:
    """What ``--speed NAME=F`` options say.

    Raises:
        ConfigError: one of them is no speed, or as `named_pairs`.
    """
    from coterie.errors import ConfigError

    example = "--speed cedar=0.5"
    speeds = {}
    for name, number in named_pairs("--speed", list(given or ()), example).items():
        try:
            speeds[name] = float(number)
        except ValueError:
            speeds[name] = 0.0
        if not 0 < speeds[name] < float("inf"):
            raise ConfigError(
                f"--speed {name}={number} is not a party's name and how fast its machine is beside this one.",
                code="plan-speed",
                fix=f"a positive number, 1 for a machine like this one, for example {example}",
            )
    return speeds


def show_lots(federation: FederationConfig, proposed: EqualRates) -> None:
    """Lots at one rate, and the noise that goes with them."""
    from coterie.cli.output import say, table

    table(
        ("party", "records", "lot now", "rate now", "lot at one rate", "rate", "epsilon"),
        [
            (
                each.party,
                each.units,
                federation.lot_of(each.party),
                f"{federation.lot_of(each.party) / each.units:.4f}",
                each.lot_size,
                f"{each.rate:.4f}",
                epsilon_digits(each.epsilon),
            )
            for each in proposed.lots
        ],
    )
    now = (
        "the lots of now do not fit: a party has too few records"
        if proposed.noise_now is None
        else f"with the lots of now the one that needs most needs {proposed.noise_now:g}. As many records are "
        "computed in both"
    )
    say(f"at one rate all parties need noise multiplier {proposed.noise_multiplier:g}; {now}")
    agreed = federation.noise_multiplier
    if agreed is not None and proposed.noise_now is not None and agreed < proposed.noise_now:
        say(f"noise_multiplier {agreed:g} is too little for the lots of now: `coterie up` will refuse it")
    lots = ", ".join(f"{each.party}: {each.lot_size}" for each in proposed.lots)
    say(f"in federation.yaml: lot_sizes: {{{lots}}}")
    if federation.aggregation == "masked":
        say(f"                    noise_multiplier: {proposed.noise_multiplier:g}")


def show_time(found: RoundTime, gbit: float, length: int) -> None:
    """What a round takes at every party, and the run."""
    from coterie.cli.output import say, table
    from coterie.pages.amounts import duration

    table(
        ("party", "computing", "noise and step", "masks", "line", "waiting", "of a round"),
        [
            (
                each.party,
                *(f"{part:.3g} s" for part in (each.computing, each.fixed, each.masks, each.line, each.waiting)),
                f"{found.seconds:.3g} s",
            )
            for each in found.parties
        ],
    )
    say(
        f"a round takes {found.seconds:.3g} s and all {found.rounds} take {duration(found.run_seconds)}, evaluations "
        f"and checkpoints aside; the slowest is {found.slowest}"
    )
    say(
        f"computing was measured here, with models of few layers on made-up records of {length} tokens; lines carry "
        f"{gbit:g} Gbit/s both ways (--gbit); a party whose machine is half as fast: --speed NAME=0.5"
    )
