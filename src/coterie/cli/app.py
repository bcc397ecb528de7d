"""The `coterie` command: a table of commands, each loaded when it is used, so that `--help` answers at once."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from coterie import __version__
from coterie.cli.output import check_writable, error_console, fail, show_error
from coterie.cli.stopping import ending_on_request
from coterie.cli.streams import guarded_output
from coterie.errors import CoterieError
from coterie.models.streaming.heap import share_heaps
from coterie.revision import revision

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "Several parties train together on this machine; then a report."),
    "train": ("train", "Train one party's model on its own text."),
    "tune": ("tune", "Try a few settings within one budget, and train with the best."),
    "precondition": ("precondition", "Coordinates for private training, from public text."),
    "data": ("data", "What would be trained: counts, lengths, duplicates, the first records."),
    "resume": ("resume", "Go on with a run that was stopped."),
    "eval": ("eval", "Held-out loss of a trained run."),
    "predict": ("predict", "Classes of texts, by a run that learnt label words."),
    "generate": ("generate", "Continue a prompt with a trained run's model."),
    "provision": ("provision", "The CA and a kit for every member, from one hand."),
    "request": ("request", "Make a party's own key and ask for its certificate."),
    "approve": ("approve", "Certify a party's key (keeper of the CA)."),
    "install": ("install", "Put certificate, CA and roster into a party's kit."),
    "invite": ("invite", "Codes by which the other members come in; certify them and hand out parts."),
    "join": ("join", "Come into a federation by a code: key, certificate, parts, roster."),
    "roster": ("roster", "Make, sign, join, verify and show the list of members."),
    "doctor": ("doctor", "Whether a party could start: keys, files, text, who can be reached."),
    "coordinator": ("coordinator", "Keep the rounds of a federation."),
    "up": ("up", "Take part in a federation as one party."),
    "audit": ("audit", "Attack your own run, and say plainly what leaked."),
    "report": ("report", "A run's training as one page."),
    "ledger": ("ledger", "What was spent on which text; ledgers of two machines put together."),
    "purge": ("purge", "Remove what a finished run left of its text."),
    "status": ("status", "Where a federation is: round, commits, who is missing."),
    "dashboard": ("dashboard", "Runs on this machine as a local page that renews itself."),
    "plan": ("plan", "Memory of every party and bytes of a round, before anybody starts."),
    "split": ("split", "Turn a checkpoint into a trunk and shards of experts."),
    "export": ("export", "Join a trunk and shards into a checkpoint again."),
    "export-nvflare": ("export_nvflare", "Write a federation as a job of NVIDIA FLARE."),
    "upcycle": ("upcycle", "Turn a dense checkpoint into a Mixture-of-Experts one."),
    "models": ("models", "Families of models that can be trained, and why others cannot."),
    "explain": ("explain", "What an error code means and what to do."),
}
"""Command name to (module in coterie.cli, one-line help), in the order of the help page."""

_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


class _LazyCommand(TyperCommand):
    """Stands for a command in the help page; imports its module when the command itself is called."""

    def __init__(self, name: str, module: str, summary: str) -> None:
        super().__init__(name, help=summary)
        self._module = module

    def load(self) -> TyperCommand:
        """The command with its options."""
        function = importlib.import_module(f"coterie.cli.{self._module}").command
        text, _, example = inspect.cleandoc(function.__doc__ or "").partition("\nExample:")
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        epilog = "\b\nExample:\n" + example.strip("\n") if example else None
        single.command(self.name, help=text, epilog=epilog, context_settings=_SETTINGS)(function)
        command = typer.main.get_command(single)
        assert isinstance(command, TyperCommand)
        return command

    def make_context(self, *args: Any, **extra: Any) -> Any:
        context = self.load().make_context(*args, **extra)
        for parameter in context.command.params:
            given = context.params.get(parameter.name)
            if "--json" in parameter.opts and isinstance(given, Path):
                check_writable(given)
        return context


class _LazyGroup(TyperGroup):
    """The group of all commands in the table."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, (module, summary) in COMMANDS.items():
            self.commands[name] = _LazyCommand(name, module, summary)


app = typer.Typer(
    cls=_LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=_SETTINGS,
)


def _print_version(asked: bool) -> None:
    if asked:
        built = revision()
        typer.echo(f"{__version__} ({built})" if built else __version__, file=sys.stdout)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train Mixture-of-Experts language models on private text, alone or together."""


def help_of(name: str | None) -> str:
    """The help page of one command, or of `coterie` itself, 100 columns wide."""
    group = typer.main.get_command(app)
    with group.make_context("coterie", [], resilient_parsing=True, terminal_width=100, max_content_width=100) as root:
        if name is None:
            return group.get_help(root)
        assert isinstance(group, _LazyGroup)
        command = group.commands[name]
        with command.make_context(name, [], parent=root, resilient_parsing=True) as context:
            return context.command.get_help(context)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done, 1 an error, 2 wrong usage, 5 stopped, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given  # accepted anywhere: people add it to the end of the line that failed
    if arguments is None:  # otherwise the process is somebody else's
        share_heaps()
    try:
        with guarded_output(), ending_on_request():
            _run(given, debug)
    except SystemExit as end:
        if arguments is None and isinstance(end.code, int) and end.code > 128:
            os._exit(end.code)  # asked to end: wait for no thread that still waits for somebody else
        raise


def _run(given: list[str], debug: bool) -> None:
    # Each of five tries of an absent hub says so; the error that follows says it once.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.DEBUG if debug else logging.ERROR)
    try:
        try:
            app([argument for argument in given if argument != "--debug"], prog_name="coterie")
        except CoterieError as error:
            if debug:
                traceback.print_exc()
            fail(error)
        except OSError as error:
            if debug or error.filename is None:
                raise
            fail(_of_a_file(error))
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except KeyboardInterrupt:
        error_console().print("interrupted")
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        from coterie.storage import disk_refusal

        bug = CoterieError(
            f"{type(error).__name__}: {error}", code="internal", fix="add --debug for the traceback and report it"
        )
        show_error(disk_refusal(error) or bug)
        sys.exit(1)


def _of_a_file(error: OSError) -> CoterieError:
    """What the operating system refused, where no place of the code expected it to."""
    name = os.fsencode(error.filename).decode("utf-8", "backslashreplace")
    return CoterieError(
        f"{name} cannot be used: {error.strerror}.",
        code="file-access",
        fix="make room, mend its permissions, or name another place; --debug shows where it was needed",
    )


if __name__ == "__main__":
    main()
