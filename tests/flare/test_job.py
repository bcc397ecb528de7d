"""A job says who runs where; everything else is the site's own."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from coterie.cli.output import EXIT_STOPPED
from coterie.cli.pairs import named_pairs
from coterie.cli.plan import numbers_of
from coterie.cli.up import dialled
from coterie.config import FederationConfig, PartyConfig, dump_yaml
from coterie.errors import ConfigError
from coterie.flare.job import sites_of, write_job
from coterie.flare.local import (
    REFUSALS,
    STOPPED,
    LocalMember,
    environment_of,
    members_here,
    note_refusal,
    refuse_code,
)
from coterie.flare.supported import check_version


def federation(**changes: object) -> FederationConfig:
    values = {
        "name": "grove",
        "model": {"family": "olmoe"},
        "parties": {"alder": {"endpoint": "alder.example:7001"}, "birch": {"endpoint": "birch.example:7001"}},
        "coordinator": {"endpoint": "alder.example:7000"},
        "privacy": {"epsilon": 3.0},
        "train": {"rounds": 2},
    }
    return FederationConfig.model_validate({**values, **changes})


SITES = {"alder": "alder", "birch": "clinic-2", "coordinator": "alder"}


def site(folder: Path, agreed: FederationConfig) -> Path:
    """The local folder of alder's site."""
    dump_yaml(folder / "federation.yaml", agreed)
    party = {
        "party": "alder",
        "federation": folder / "federation.yaml",
        "kit": folder / "kit",
        "data": {"train": (folder / "own.txt",)},
        "trunk": folder / "trunk.safetensors",
        "shard": folder / "experts.safetensors",
        "run_dir": folder / "run",
    }
    dump_yaml(folder / "party.yaml", PartyConfig.model_validate(party))
    local = folder / "local"
    local.mkdir()
    members = {
        "alder": {"settings": str(folder / "party.yaml")},
        "coordinator": {"settings": str(folder / "federation.yaml"), "kit": "kits/c", "run_dir": "c"},
    }
    (local / "coterie.json").write_text(json.dumps({"members": members}), encoding="utf-8")
    return local


def test_a_party_runs_at_the_site_of_its_name_unless_another_is_named() -> None:
    assert sites_of(federation(), {"coordinator": "alder", "birch": "clinic-2"}) == SITES


@pytest.mark.parametrize(
    ("named", "code"), [({}, "flare-no-coordinator"), ({"coordinator": "x", "elm": "y"}, "flare-unknown-member")]
)
def test_sites_that_do_not_fit_are_refused(named: dict[str, str], code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sites_of(federation(), named)
    assert caught.value.code == code


def test_a_job_holds_places_and_a_hash_and_no_code_text_endpoint_or_budget(tmp_path: Path) -> None:
    config = federation()
    write_job(config, SITES, tmp_path / "job")
    files = {
        str(path.relative_to(tmp_path / "job")): path for path in (tmp_path / "job").rglob("*") if path.is_file()
    }
    assert set(files) == {"meta.json", "hub/config/config_fed_server.json", "site/config/config_fed_client.json"}
    meta = json.loads(files["meta.json"].read_text("utf-8"))
    assert meta["deploy_map"] == {"hub": ["server"], "site": ["alder", "clinic-2"]}
    assert meta["min_clients"] == 2
    (workflow,) = json.loads(files["hub/config/config_fed_server.json"].read_text("utf-8"))["workflows"]
    assert workflow["args"] == {"sites": SITES, "agreement": config.content_hash()}
    (executor,) = json.loads(files["site/config/config_fed_client.json"].read_text("utf-8"))["executors"]
    assert executor["executor"] == {"path": "coterie.flare.site.CoterieExecutor", "args": {}}
    text = " ".join(path.read_text("utf-8") for path in files.values())
    assert not [word for word in ("epsilon", "example:7001", "party.yaml", "data") if f'"{word}"' in text]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_job_is_not_written_over_anything(kind: str, tmp_path: Path) -> None:
    job = tmp_path / "job"
    if kind == "folder":
        job.mkdir()
        (job / "mine").touch()
    elif kind == "file":
        job.write_text("mine")
    else:
        job.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="not an empty folder") as caught:
        write_job(federation(), SITES, job)
    assert caught.value.code == "flare-job-folder"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_job_takes_the_place_of_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    write_job(federation(), SITES, tmp_path / "job")
    assert (tmp_path / "job" / "meta.json").is_file()


def test_what_a_member_prints_is_closed_to_other_accounts(tmp_path: Path) -> None:
    member = LocalMember("alder", tmp_path / "party.yaml")
    before = os.umask(0)
    try:
        with member.open_log() as log:
            log.write(b"one ")
        path = tmp_path / "flare-alder.log"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o644)  # as an earlier version left it
        with member.open_log() as log:
            log.write(b"two")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == "one two"


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (["coordinator"], "option-pair"),
        (["coordinator="], "option-pair"),
        (["=alder"], "option-pair"),
        (["coordinator= "], "option-pair"),
        (["alder=a", "alder=a"], "option-twice"),
    ],
)
def test_what_is_said_of_a_member_is_whole_and_said_once(given: list[str], code: str) -> None:
    for said in (lambda: dialled(given), lambda: named_pairs("--site", given, "..."), lambda: numbers_of(given)):
        with pytest.raises(ConfigError) as caught:
            said()
        assert caught.value.code == code
    assert dialled(["alder=127.0.0.1:1", "birch=a=b"]) == {"alder": "127.0.0.1:1", "birch": "a=b"}
    assert dialled(None) == {}


def test_a_site_starts_ordinary_commands_with_its_own_settings(tmp_path: Path) -> None:
    local = site(tmp_path, federation())
    alder, coordinator = members_here(local, ["alder", "coordinator"], federation().content_hash())
    start = [sys.executable, "-P", "-m", "coterie"]
    dial = ["--listen", "127.0.0.1:1", "--dial", "birch=127.0.0.1:2"]
    command = alder.command("127.0.0.1:1", {"birch": "127.0.0.1:2"})
    assert command == [*start, "up", str(tmp_path / "party.yaml"), *dial]
    command = coordinator.command("127.0.0.1:1", {"birch": "127.0.0.1:2"})
    own = ["--kit", "kits/c", "--run-dir", "c"]
    assert command == [*start, "coordinator", str(tmp_path / "federation.yaml"), *dial, *own]


def test_a_job_of_another_agreement_starts_nothing(tmp_path: Path) -> None:
    local = site(tmp_path, federation())
    other = federation(privacy={"epsilon": 300.0})
    for member in ("alder", "coordinator"):
        with pytest.raises(ConfigError) as caught:
            members_here(local, [member], other.content_hash())
        assert caught.value.code == "flare-agreement"


@pytest.mark.parametrize(
    "content", [None, "{", "[" * 99_999, "[]", '{"members": 3}', '{"members": {"alder": 3}}', '{"members": {}}']
)
def test_a_site_that_names_nothing_of_its_own_runs_nothing(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "coterie.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="a job cannot name settings") as caught:
        members_here(tmp_path, ["alder"], "x")
    assert caught.value.code == "flare-local"


def test_a_site_whose_party_file_is_gone_runs_nothing(tmp_path: Path) -> None:
    local = site(tmp_path, federation())
    (tmp_path / "party.yaml").unlink()
    with pytest.raises(ConfigError, match=r"party\.yaml"):
        members_here(local, ["alder"], federation().content_hash())


def test_a_job_with_code_is_refused_and_one_without_is_not(tmp_path: Path) -> None:
    refuse_code(tmp_path / "custom")
    (tmp_path / "custom").mkdir()
    with pytest.raises(ConfigError, match="brings code of its own") as caught:
        refuse_code(tmp_path / "custom")
    assert caught.value.code == "flare-code"


def test_members_import_nothing_from_flares_own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = tmp_path / "site"
    custom = workspace / "job-1" / "app_alder" / "custom"
    custom.mkdir(parents=True)
    (tmp_path / "link").symlink_to(custom)
    own = tmp_path / "packages"
    paths = [str(custom), str(own), str(workspace), "", str(tmp_path / "link")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("OTHER", "stays")
    environment = environment_of(workspace)
    assert environment["PYTHONPATH"] == str(own)
    assert environment["OTHER"] == "stays"


def test_why_a_site_started_nothing_is_closed_to_other_accounts(tmp_path: Path) -> None:
    note_refusal(tmp_path, ConfigError("one.", code="a", fix="more"))
    note_refusal(tmp_path, ConfigError("two.", code="b"))
    assert (tmp_path / REFUSALS).read_text() == "a: one.\n  fix    more\nb: two.\n"
    assert stat.S_IMODE((tmp_path / REFUSALS).stat().st_mode) == 0o600


def test_the_end_of_a_member_that_was_stopped_is_known() -> None:
    assert STOPPED == EXIT_STOPPED


@pytest.mark.parametrize("found", ["2.8.1", "2.10.0", "2.90", "3.0"])
def test_another_flare_is_refused_in_one_sentence(found: str, tmp_path: Path) -> None:
    """Not by what it lacks: here it lacks everything."""
    (tmp_path / "nvflare.py").touch()
    about = tmp_path / f"nvflare-{found}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nvflare\nVersion: {found}\n")
    for module in ("hub", "site"):
        asked = subprocess.run(
            [sys.executable, "-c", f"import coterie.flare.{module}"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
            capture_output=True,
            text=True,
        )
        assert f"ConfigError: coterie's job runs in NVIDIA FLARE 2.9, and here is {found}.\n" in asked.stderr
        assert "pip install 'coterie[nvflare]'" in asked.stderr


@pytest.mark.parametrize("found", ["2.9", "2.9.0", "2.9.3", "2.9.0rc1", "2.9.0.dev3"])
def test_every_flare_of_the_right_version_is_taken(found: str) -> None:
    check_version(found)
