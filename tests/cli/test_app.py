"""The command line: quick help, lazy commands, errors a person can act on."""

from __future__ import annotations

import ast
import errno
import importlib
import json
import os
import re
import stat
import subprocess
import sys
from enum import EnumType
from pathlib import Path

import pytest
import typer

import coterie
from coterie.cli import app as cli
from coterie.cli import output
from coterie.cli.explain import raised_errors
from coterie.errors import ConfigError


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_help_and_wrong_usage_do_not_load_torch() -> None:
    code = (
        "import sys\nfrom coterie.cli.app import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    print(end.code)\n"
        "assert not {'torch', 'transformers', 'grpc', 'datasets'} & set(sys.modules), sorted(sys.modules)"
    )
    for arguments in (
        ["--help"],
        ["train", "--help"],
        ["nonsense"],
        ["train", "/nowhere.yaml"],
        ["explain", "--help"],
    ):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name, (_, summary) in cli.COMMANDS.items():
        assert f" {name} " in out
        assert summary[:30] in out


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_a_help_page_with_an_example(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert "Example:" in out
    assert f"coterie {name}" in out.partition("Example:")[2]


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_command_modules_load_torch_only_inside_the_command(name: str) -> None:
    module = importlib.import_module(f"coterie.cli.{cli.COMMANDS[name][0]}")
    source = Path(str(module.__file__)).read_text("utf-8")
    top = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in top for alias in node.names} | {
        str(node.module) for node in top if isinstance(node, ast.ImportFrom)
    }
    assert not {found for found in names if found.split(".")[0] in ("torch", "transformers", "datasets", "grpc")}


def test_an_unknown_command_is_wrong_usage_with_a_guess(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "trian")
    assert code == 2
    assert "Did you mean 'train'" in err


def test_an_error_is_four_lines_on_standard_error_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "t.yaml").write_text("model: {family: olmoe}\nrun_dir: r\ndata: {train: x.txt}\ntrain: {rouns: 3}\n")
    code, out, err = run(capsys, "train", str(tmp_path / "t.yaml"))
    assert code == 1
    assert out == ""
    assert err.startswith("Error config-invalid: t.yaml has 2 problems:")
    assert "did you mean `rounds`?" in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("--debug", "train", "/nowhere.yaml"), ("train", "/nowhere.yaml", "--debug")):
        code, _, err = run(capsys, *arguments)
        assert code == 1
        assert "Traceback" in err
        assert "Error config-no-file" in err


def test_a_bug_is_one_line_without_debug(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("[red]odd[/red]")

    monkeypatch.setattr("coterie.config.load_yaml", broken)
    code, _, err = run(capsys, "train", "x.yaml")
    assert code == 1
    assert "Error internal: RuntimeError: [red]odd[/red]" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "said",
    [
        Exception("No space left on device (os error 28)"),  # as tokenizers does
        OSError(errno.ENOSPC, "No space left on device"),  # as a write to an open file does
    ],
)
def test_a_full_disk_is_no_bug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, said: Exception
) -> None:
    def full(*args: object) -> None:
        raise said

    monkeypatch.setattr("coterie.config.load_yaml", full)
    code, _, err = run(capsys, "train", "x.yaml")
    assert code == 1
    assert "Error file-access: A file could not be written: No space left on device." in err


def test_ctrl_c_ends_with_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("coterie.config.load_yaml", interrupted)
    assert run(capsys, "train", "x.yaml")[0] == 130


def test_explain_knows_every_fixed_code_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", "run-dir-taken")
    assert code == 0
    assert "already holds a run" in out
    assert "fix" in out
    code, _, err = run(capsys, "explain", "run-dir-take")
    assert (code, "did you mean `run-dir-taken`" in " ".join(err.split())) == (1, True)
    assert run(capsys, "explain", "no-such-code")[0] == 1
    listed = run(capsys, "explain")[1].split()
    assert {item.code for item in raised_errors()} == set(listed)
    assert run(capsys, "explain", "config-unknown-key")[1].startswith("config-unknown-key: `...` is not a setting.\n")
    assert [item for item in raised_errors() if not item.message.strip(".")] == []


def test_every_code_in_the_source_is_explained_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    """Codes are looked for as text, in another way than `explain` does: whatever stands after `code=`, and a case."""
    found = raised_errors()
    known = {item.code.removesuffix("...") for item in found}
    sources = [path.read_text("utf-8") for path in Path(coterie.__file__).parent.rglob("*.py")]
    written = {
        code for text in sources for said in re.findall(r"\bcode=([^,)]*)", text)
        for code in re.findall(r'"([a-z]+(?:-[a-z]+)+)-?', said)
    }  # fmt: skip
    written |= {
        code for text in sources for code in re.findall(r'(?:\bcase|Refusal\()\s*"([a-z]+(?:-[a-z]+)+)"', text)
    }
    assert len(written) > 300
    assert not {code for code in written if not any(code.startswith(each) for each in known)}
    assert not {item.code for item in found if not item.fix}
    for code in (
        "config-unknown-key",
        "config-invalid",
        "internal",
        "cache-full",
        "dp-trained-changed",
        "upcycle-read",
    ):
        assert "fix" in run(capsys, "explain", code)[1], code
    assert "run the same version" in run(capsys, "explain", "frame-magic")[1]


@pytest.mark.parametrize(("built", "shown"), [("c0ffee012345", "0.1.0 (c0ffee012345)"), (None, "0.1.0")])
def test_version_is_printed_with_its_commit_where_it_is_known(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, built: str | None, shown: str
) -> None:
    monkeypatch.setattr(cli, "revision", lambda: built)
    assert run(capsys, "--version")[:2] == (0, f"{shown}\n")


def test_json_is_whole_and_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "figures.json"
    output.write_json(path, {"loss": float("nan"), "list": (1, float("inf")), 3: "x"})
    assert json.loads(path.read_text()) == {"loss": None, "list": [1, None], "3": "x"}
    assert [found.name for found in path.parent.iterdir()] == ["figures.json"]


def test_figures_go_into_a_pipe_and_through_a_link_and_replace_neither(tmp_path: Path) -> None:
    pipe, link, real = tmp_path / "pipe", tmp_path / "link.json", tmp_path / "real.json"
    os.mkfifo(pipe)
    link.symlink_to(real.name)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    for path in (pipe, link):
        output.write_json(path, {"loss": 1.5})
    assert json.loads(reader.communicate(timeout=30)[0]) == json.loads(real.read_text()) == {"loss": 1.5}
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert link.is_symlink()


def test_figures_that_cannot_be_written_leave_nothing_and_name_their_file(tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    folder.mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        output.write_json(folder, {})
    assert caught.value.filename == str(folder)
    with pytest.raises(TypeError):
        output.write_json(tmp_path / "new.json", {"no": object()})
    assert list(tmp_path.iterdir()) == [folder]


def test_a_table_without_a_terminal_is_aligned_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("party", "loss"), [("alder", 2.34567), ("birch", None)], title="Result")
    assert capsys.readouterr().out == "Result\nparty   loss\nalder  2.346\nbirch      -\n"


def test_progress_without_a_terminal_is_a_few_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress("round", 10, lines=5) as advance:
        for _ in range(10):
            advance("loss 1")
    assert capsys.readouterr().err.splitlines() == [f"round {n}/10  loss 1" for n in (2, 4, 6, 8, 10)]


def test_text_in_brackets_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    output.say("[bold]not markup[/bold]")
    assert capsys.readouterr().out == "[bold]not markup[/bold]\n"
    with pytest.raises(typer.Exit):
        output.fail(ConfigError("a [list] of\nlines", fix="use [x]"))
    assert "a [list] of" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_figures_that_cannot_be_written_are_refused_before_the_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command that has --json; what else it is given is not looked at before."""
    parameters = typer.main.get_command(cli.app).commands[name].load().params  # type: ignore[attr-defined]
    if not any("--json" in each.opts for each in parameters):
        return
    needed = []
    for each in parameters:
        if each.required:
            kind = each.type_descriptor.annotation
            option = [each.opts[0]] if each.opts[0].startswith("--") else []
            needed += [*option, next(iter(kind)).value if isinstance(kind, EnumType) else str(tmp_path / "x")]
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "figures.json", tmp_path):
        code, _, err = run(capsys, name, *needed, "--json", str(place))
        assert (code, "option-json" in err) == (1, True), err


def test_figures_are_refused_in_a_folder_that_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output.check_writable(tmp_path / "new" / "figures.json")
    output.check_writable(Path(os.devnull))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(ConfigError, match="cannot be written"):
        output.check_writable(tmp_path / "new" / "figures.json")
    assert not (tmp_path / "new").exists()


def test_the_reference_pages_are_current() -> None:
    script = Path(__file__).parents[2] / "docs" / "generate_reference.py"
    subprocess.run([sys.executable, str(script), "--check", "cli", "errors"], check=True)


def test_every_code_is_on_the_page_of_errors_with_what_to_do() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "errors.md").read_text("utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert sorted(row[0].strip("|` ") for row in rows) == sorted({item.code for item in raised_errors()})
    assert all(len(row) == 3 and len(row[2].strip("| ")) > 5 for row in rows)
