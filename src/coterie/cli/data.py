"""`coterie data`: what would be trained, before anything is."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli.output import say, write_json

if TYPE_CHECKING:
    from coterie.config import DataSpec, ModelSpec, PrivacySpec
    from coterie.training.data.check import DataReport


class DataAction(StrEnum):
    CHECK = "check"


def command(
    action: Annotated[DataAction, typer.Argument(help="What to do.")],
    settings: Annotated[Path, typer.Argument(help="train.yaml or party.yaml.")],
    shown: Annotated[int, typer.Option("--show", min=0, help="How many records to write out.")] = 2,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures, no text, to this file.")
    ] = None,
) -> None:
    """Show what a train.yaml or a party.yaml would train on: counts, lengths, what is cut off, duplicates, and the
    first records; and read its held-out text.

    Tokens stand between bars; those that are only read, such as a prompt, between brackets. No model is loaded, and
    nothing is written. The text shown is your own: do not pass it on.

    Example:
        coterie data check train.yaml --show 3
        coterie data check party.yaml
    """
    from coterie.training.data.check import HeldOut, check_data
    from coterie.training.data.documents import read_documents
    from coterie.training.data.tokenizer import get_tokenizer, tokenize

    data, model, privacy = _what_is_read(settings)
    documents = read_documents(data.train, data, user_column=privacy.user_column if privacy else None)
    tokenizer = get_tokenizer(data.tokenizer, model, data)
    report = check_data(documents, tokenize(documents, data, tokenizer), data, tokenizer, shown)
    if data.test:
        test = read_documents(data.test, data)
        report = replace(report, held_out=HeldOut.of(test, tokenize(test, data, tokenizer), documents))
    for line in lines(report, data, privacy):
        say(line)
    if json_file is not None:
        write_json(json_file, report.as_json())


def _what_is_read(settings: Path) -> tuple[DataSpec, ModelSpec, PrivacySpec | None]:
    """Text, the model whose tokenizer may be the one, and what is promised; of a run of one party or of several."""
    from coterie.config import FederationConfig, PartyConfig, TrainConfig, load_yaml, party_privacy
    from coterie.config.load import names_setting
    from coterie.training.party.process import check_member

    if names_setting(settings, "party"):
        party = load_yaml(settings, PartyConfig)
        federation = load_yaml(party.federation, FederationConfig)
        check_member(party, federation)
        return party.data, federation.model, party_privacy(federation, party)
    if names_setting(settings, "parties"):
        raise typer.BadParameter("a federation.yaml names no text: give the party.yaml of one of its parties")
    config = load_yaml(settings, TrainConfig)
    return config.data, config.model, config.privacy


def lines(report: DataReport, data: DataSpec, privacy: PrivacySpec | None) -> list[str]:
    """The report in words."""
    said = [
        f"documents   {report.documents} ({data.form}), as {report.records} records (packing {data.packing})",
        f"tokens      {report.tokens}, of which {report.predicted} are predicted",
        f"lengths     {report.shortest} to {report.longest}, median {report.median}; at most {data.sequence_length}",
    ]
    if report.cut:
        said.append(
            f"cut off     {report.cut_tokens} tokens of {report.cut} documents: data.sequence_length is short"
        )
    if report.blank:
        said.append(f"blank       {report.blank} more say nothing, and are left out")
    if report.left_out:
        said.append(f"left out    {report.left_out} documents, of which nothing could be predicted")
    if report.held_out is not None:
        held, blank = report.held_out, report.held_out.blank
        more = f"; {blank} more say nothing" if blank else ""
        said.append(
            f"held out    {held.documents} documents, as {held.records} records with {held.predicted} tokens to "
            f"predict{more}"
        )
        if held.trained:
            said.append(
                f"NOTE: {held.trained} of them {'is' if held.trained == 1 else 'are'} in the text to train on, too, "
                "word for word: their loss says nothing about new text"
            )
    if privacy is not None:
        unit = "one record"
        if privacy.unit == "user":
            unit = f"everything of one user ({report.users} users, of up to {report.most_of_one} records)"
        said.append(f"unit        {unit}: what the privacy budget protects")
    if privacy is not None and report.most_pieces > 1:
        said.append(f"NOTE: a document is up to {report.most_pieces} records; its epsilon is that of such a group")
    if report.duplicates:
        said.append(f"duplicates  {report.duplicates} documents repeat an earlier one word for word")
    if report.alike:
        count, groups = sum(report.alike), len(report.alike)
        said.append(
            f"alike       {count} documents in {groups} {'group' if groups == 1 else 'groups'} say nearly the same, "
            f"up to {report.alike[0]}"
        )
    if report.alike and privacy is not None:
        said.append("NOTE: the epsilon of what such documents share is that of a group of so many records")
    return [*said, *(f"record {number}    {text}" for number, text in enumerate(report.first, 1))]
