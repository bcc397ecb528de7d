"""FLARE's proof-of-concept mode on loopback: one hub, its sites and an administrator, from FLARE's own commands."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from coterie.federation.identity.provision import free_endpoints

HUB, ADMIN = "server", "admin@nvidia.com"
STARTED_S, JOB_S = 600, 1800
"""Seconds for all to start, and for a job: a busy machine is no failure."""


class Poc:
    """A hub and sites, provisioned with keys of their own; all their processes end with it.

    Args:
        folder: made here: FLARE's workspaces, and a home folder so that nothing is written to anybody's own.
        sites: names.
    """

    def __init__(self, folder: Path, sites: Sequence[str]) -> None:
        self.folder, self.sites = folder, tuple(sites)
        self._workspace = folder / "workspace"
        (folder / "home").mkdir(parents=True)
        self._environment = {
            **os.environ,
            "HOME": str(folder / "home"),
            "NVFLARE_POC_WORKSPACE": str(self._workspace),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if "PYTHONPATH" in os.environ:  # the services have other working folders
            paths = os.environ["PYTHONPATH"].split(os.pathsep)
            self._environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in paths)
        ports = [int(each.rpartition(":")[2]) for each in free_endpoints(2)]
        project = folder / "project.yml"
        project.write_text(yaml.safe_dump(_project(self.sites, *ports), sort_keys=False), "utf-8")
        self._nvflare("poc", "prepare", "-i", str(project))
        for name in (HUB, *self.sites):
            self._admit(name)
        patient = {
            "idle_timeout": 3600.0,
            "login_timeout": 60.0,
            "with_debug": False,
            "authenticate_msg_timeout": 30.0,
        }
        console = {"format_version": 1, "admin": {**patient, "prompt": "> "}}
        (self.place(ADMIN) / "local" / "resources.json").write_text(json.dumps(console), "utf-8")

    def __enter__(self) -> Poc:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        while running := self.pids():  # FLARE's scripts start again what ends
            self.kill(*running)
            time.sleep(0.1)

    def place(self, name: str) -> Path:
        """The workspace of the hub or a site."""
        return self._workspace / "grove" / "prod_00" / name

    def willing(self, site: str, members: Mapping[str, Mapping[str, str]]) -> None:
        """Say what a site runs, in its own file."""
        (self.place(site) / "local" / "coterie.json").write_text(json.dumps({"members": members}), "utf-8")

    def forbid_code(self, site: str) -> None:
        """What docs/how-to/nvflare.md asks of a site: no job brings code, whoever the hub says has submitted it."""
        local = self.place(site) / "local"
        rights = json.loads((local / "authorization.json.default").read_text("utf-8"))
        for role, allowed in rights["permissions"].items():
            everything = {"submit_job": "any", "manage_job": "any", "view": "any", "operate": "any"}
            rights["permissions"][role] = {**(everything if allowed == "any" else allowed), "byoc": "none"}
        (local / "authorization.json").write_text(json.dumps(rights), "utf-8")

    def start(self, environment: Mapping[str, str]) -> None:
        """Start the hub, with more in its environment, and the sites, and wait until all have joined."""
        self._nvflare("poc", "start", "-p", HUB, "--no-wait", environment=environment)
        self._nvflare("poc", "start", "-ex", HUB, "--no-wait")
        until = time.monotonic() + STARTED_S
        while not all(f"Client: New client {site}@" in self.logs(HUB) for site in self.sites):
            assert time.monotonic() < until, self.logs(HUB)[-4000:]
            time.sleep(0.5)

    def submit(self, job: Path) -> str:
        """Submit a job as the administrator does; gives its id."""
        return str(self._nvflare("job", "submit", "-j", str(job))["job_id"])

    def ended(self, job: str) -> str:
        """Wait for a job; gives its status."""
        return str(
            self._nvflare("job", "wait", job, "--timeout", str(JOB_S), timeout=JOB_S + 60, ok=(0, 1))["status"]
        )

    def logs(self, name: str) -> str:
        """Everything that the hub or a site has logged, of all jobs."""
        texts = [path.read_text("utf-8", "replace") for path in sorted(self.place(name).rglob("*log*.txt"))]
        return "\n".join(texts)

    def pids(self, *words: str) -> list[int]:
        """Processes of this workspace whose command has all these words."""
        return pids(self.folder, *words)

    @staticmethod
    def kill(*pids: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _admit(self, name: str) -> None:
        local = self.place(name) / "local"
        own = local / "resources.json"
        resources = json.loads((own if own.exists() else local / "resources.json.default").read_text("utf-8"))
        resources["class_allow_list"].append("coterie.flare.")
        own.write_text(json.dumps(resources), "utf-8")

    def _nvflare(
        self,
        *words: str,
        environment: Mapping[str, str] | None = None,
        timeout: float = STARTED_S,
        ok: Iterable[int] = (0,),
    ) -> dict[str, Any]:
        """One of FLARE's commands, with its answer as JSON."""
        command = [str(Path(sys.executable).with_name("nvflare")), *words, "--format", "json"]
        output = self.folder / "answer"
        with output.open("wb") as out:  # not a pipe: services that it starts would hold it open
            ended = subprocess.run(
                command,
                cwd=self.folder,
                env={**self._environment, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=timeout,
            )
        said = output.read_text("utf-8", "replace")
        assert ended.returncode in ok, f"{' '.join(words)}: {ended.returncode}\n{said}"
        answer: dict[str, Any] = json.loads(said[said.index("{") :])
        return answer["data"]


def pids(folder: Path, *words: str) -> list[int]:
    """Other processes than this one whose command names something in a folder, and has all these words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            if f"{folder}/" in command and all(word in command for word in words):
                found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid()]


def _project(sites: Sequence[str], port: int, admin_port: int) -> dict[str, Any]:
    impl = "nvflare.lighter.impl"
    return {
        "api_version": 3,
        "name": "grove",
        "description": "a hub and its sites on loopback",
        "participants": [
            {"name": HUB, "type": "server", "org": "nvidia", "fed_learn_port": port, "admin_port": admin_port},
            *({"name": site, "type": "client", "org": "nvidia"} for site in sites),
            {"name": ADMIN, "type": "admin", "org": "nvidia", "role": "project_admin"},
        ],
        "builders": [
            {"path": f"{impl}.workspace.WorkspaceBuilder", "args": {"template_file": ["master_template.yml"]}},
            {"path": f"{impl}.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
            {"path": f"{impl}.cert.CertBuilder"},
            {"path": f"{impl}.signature.SignatureBuilder"},
        ],
    }
