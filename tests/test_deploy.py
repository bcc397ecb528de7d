"""The deployment examples fit the settings beside them, the image and the commands that there are.

`.ci/deploy` has them read by the tools that know their formats.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser

from coterie.cli.app import app
from coterie.cli.output import EXIT_STOPPED
from coterie.config import FederationConfig, PartyConfig, load_yaml

DEPLOY = Path(__file__).parents[1] / "examples" / "deploy"
IMAGE = (DEPLOY / "Containerfile").read_text("utf-8")
COMPOSE = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
FEDERATION = load_yaml(DEPLOY / "compose" / "federation.yaml", FederationConfig)
MANIFESTS = {
    found["kind"]: found for found in yaml.safe_load_all((DEPLOY / "kubernetes" / "party.yml").read_text("utf-8"))
}
POD = MANIFESTS["Job"]["spec"]["template"]["spec"]
UNIT = (DEPLOY / "systemd" / "coterie-party.service").read_text("utf-8")
BATCH = (DEPLOY / "slurm" / "train.sbatch").read_text("utf-8")
NODES = {
    found["kind"]: found for found in yaml.safe_load_all((DEPLOY / "kubernetes" / "train.yml").read_text("utf-8"))
}
JOB = NODES["Job"]["spec"]
RANKS = JOB["template"]["spec"]["containers"][0]
COMMANDS = {
    **{name: service["command"] for name, service in SERVICES.items()},
    "kubernetes": POD["containers"][0]["args"],
    "systemd": shlex.split(re.findall(r"^ExecStart=/opt/coterie/bin/coterie (.+)$", UNIT, re.MULTILINE)[0]),
    **{f"slurm, {words[0]}": [*words] for words in re.findall(r'^ +coterie (\w+) ("\$\w+") &$', BATCH, re.MULTILINE)},
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_what_is_started_is_a_command_with_options_that_it_has(arguments: list[str]) -> None:
    name, *rest = arguments
    group = typer.main.get_command(app)
    with group.make_context("coterie", [], resilient_parsing=True) as root:
        command = root.command.commands[name]  # type: ignore[attr-defined]
        command.make_context(name, list(rest), parent=root).close()  # raises where an option or argument is wrong


def test_there_is_a_command_of_every_kind() -> None:
    assert {"coordinator", "alder", "kubernetes", "systemd", "slurm, train", "slurm, resume"} <= COMMANDS.keys()


def test_services_are_the_members_and_listen_where_they_are_looked_for() -> None:
    members = {**FEDERATION.parties, "coordinator": FEDERATION.coordinator}
    assert SERVICES.keys() == members.keys()
    for name, member in members.items():
        host, _, port = member.endpoint.partition(":")
        assert host == name
        assert SERVICES[name]["command"][-2:] == ["--listen", f"0.0.0.0:{port}"]


@pytest.mark.parametrize("party", FEDERATION.parties)
def test_a_service_sees_its_own_kit_shard_and_folder_and_nobody_elses(party: str) -> None:
    mounted = [volume.partition(":")[0] for volume in SERVICES[party]["volumes"]]
    others = SERVICES.keys() - {party}
    assert not [path for path in mounted if set(re.split(r"[./-]", path)) & others]
    assert {f"./kits/{party}", f"./parts/experts-{party}.safetensors", f"./{party}", f"ledger-{party}"} <= {*mounted}
    config = load_yaml(DEPLOY / "compose" / party / "party.yaml", PartyConfig)
    inside = {volume.split(":")[1] for volume in SERVICES[party]["volumes"]}
    there = DEPLOY / "compose"
    for path in (config.federation, config.kit, config.trunk, config.shard):
        assert f"/srv/coterie/{path.resolve().relative_to(there)}" in inside
    assert config.party == party


def test_everything_runs_as_the_user_of_the_image_with_a_closed_root() -> None:
    (user,) = re.findall(r"^USER (\d+:\d+)$", IMAGE, re.MULTILINE)
    assert 'ENTRYPOINT ["coterie"]' in IMAGE
    uid, _, gid = user.partition(":")
    assert uid != "0"
    for service in SERVICES.values():
        assert (service["user"], service["read_only"], service["cap_drop"]) == (user, True, ["ALL"])
        assert service["stop_signal"] == "SIGINT"
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert (POD["securityContext"]["runAsUser"], POD["securityContext"]["fsGroup"]) == (int(uid), int(gid))
    for container in (*POD["containers"], *POD["initContainers"]):
        closed = container["securityContext"]
        assert (closed["readOnlyRootFilesystem"], closed["allowPrivilegeEscalation"]) == (True, False)
        assert closed["capabilities"] == {"drop": ["ALL"]}


def test_what_was_stopped_is_not_taken_for_a_failure() -> None:
    assert f"SuccessExitStatus={EXIT_STOPPED}\n" in UNIT
    (rule,) = MANIFESTS["Job"]["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, EXIT_STOPPED])
    assert rule["onExitCodes"]["containerName"] == POD["containers"][0]["name"]
    assert POD["restartPolicy"] == "Never"  # a policy for failures needs it
    assert f'"$ended" -ne {EXIT_STOPPED} ] || scontrol requeue' in BATCH


def test_ledgers_outlive_the_runs() -> None:
    """COTERIE_HOME is a volume of its own wherever a party runs."""
    (home,) = re.findall(r"COTERIE_HOME=(\S+)", IMAGE)
    for party in FEDERATION.parties:
        assert f"ledger-{party}:{home}" in SERVICES[party]["volumes"]
        assert f"ledger-{party}" in COMPOSE["volumes"]
    mounts = {mount["mountPath"]: mount["name"] for mount in POD["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert "persistentVolumeClaim" in volumes[mounts[home]]
    assert f"COTERIE_HOME={home}" in UNIT
    assert "StateDirectory=coterie\n" in UNIT


def test_the_policy_of_the_cluster_lets_the_agreed_ports_through() -> None:
    port = POD["containers"][0]["ports"][0]["containerPort"]
    assert POD["containers"][0]["args"][-1] == f"0.0.0.0:{port}"
    assert MANIFESTS["Service"]["spec"]["ports"][0]["port"] == port
    opened = [entry["port"] for rule in MANIFESTS["NetworkPolicy"]["spec"]["ingress"] for entry in rule["ports"]]
    assert opened == [port]


# -- one run over several nodes -------------------------------------------------------------------------------------


def rendered(command: list[str], folder: Path, **variables: str) -> list[str]:
    """What a script hands to torchrun, with programs of the cluster that only say what they are asked."""
    tools = folder / "tools"
    tools.mkdir()
    for name, content in {
        "srun": 'while [ "$1" != torchrun ]; do shift; done; exec "$@"',
        "scontrol": "printf '%s\\n' node-7 node-8",
        "torchrun": "printf '%s\\n' \"$@\" > asked",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{content}\n")
        (tools / name).chmod(0o755)
    subprocess.run(
        command,
        cwd=folder,
        check=True,
        env={**variables, "PATH": f"{tools}:{os.environ['PATH']}", "HOME": "/home/me"},
    )
    return (folder / "asked").read_text().splitlines()


def on_slurm(folder: Path) -> list[str]:
    slurm = {
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node-[7-8]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "16",
    }
    script = DEPLOY / "slurm" / "train-nodes.sbatch"
    return rendered(["bash", str(script), "train.yaml", "runs/first", "4"], folder, **slurm)


def on_kubernetes(folder: Path) -> list[str]:
    return rendered([*RANKS["command"], *RANKS["args"]], folder)


@pytest.mark.parametrize("render", [on_slurm, on_kubernetes])
@pytest.mark.parametrize(("begun", "command"), [(False, ["train", "train.yaml"]), (True, ["resume", "runs/first"])])
def test_nodes_start_one_run_and_go_on_with_it(render: Any, begun: bool, command: list[str], tmp_path: Path) -> None:
    if begun:
        (tmp_path / "runs/first").mkdir(parents=True)
        (tmp_path / "runs/first/run.json").write_text("{}")
    asked = get_args_parser().parse_args(render(tmp_path))  # torchrun's own; it raises where an option is wrong
    assert (asked.module, asked.training_script, asked.training_script_args) == (True, "coterie", command)
    assert (asked.nnodes, asked.max_restarts, asked.rdzv_backend) == ("2", 0, "c10d")
    host = (
        "node-7"
        if render is on_slurm
        else f"{NODES['Job']['metadata']['name']}-0.{JOB['template']['spec']['subdomain']}"
    )
    assert asked.rdzv_endpoint == f"{host}:29500"
    test_what_is_started_is_a_command_with_options_that_it_has(asked.training_script_args)


def test_pods_of_a_run_are_as_many_as_torchrun_waits_for_and_find_each_other() -> None:
    (nodes,) = re.findall(r"--nnodes=(\d+)", RANKS["args"][0])
    assert (JOB["completionMode"], JOB["completions"], JOB["parallelism"]) == ("Indexed", int(nodes), int(nodes))
    service = NODES["Service"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["metadata"]["name"] == JOB["template"]["spec"]["subdomain"]
    labels = JOB["template"]["metadata"]["labels"]
    policy = NODES["NetworkPolicy"]["spec"]
    assert service["spec"]["selector"] == policy["podSelector"]["matchLabels"] == labels
    assert policy["ingress"] == [{"from": [{"podSelector": {"matchLabels": labels}}]}]


def test_a_run_over_nodes_is_as_closed_as_a_party_and_its_folders_are_seen_by_all() -> None:
    pod = JOB["template"]["spec"]
    assert pod["securityContext"] == POD["securityContext"]
    assert RANKS["securityContext"] == POD["containers"][0]["securityContext"]
    (home,) = re.findall(r"COTERIE_HOME=(\S+)", IMAGE)
    mounts = {mount["mountPath"]: mount["name"] for mount in RANKS["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for place in (home, RANKS["workingDir"]):
        assert "persistentVolumeClaim" in volumes[mounts[place]]
    claims = [
        each
        for each in yaml.safe_load_all((DEPLOY / "kubernetes" / "train.yml").read_text("utf-8"))
        if each["kind"] == "PersistentVolumeClaim"
    ]
    assert {each["metadata"]["name"] for each in claims} == {"coterie-train", "coterie-train-ledger"}
    assert all(each["spec"]["accessModes"] == ["ReadWriteMany"] for each in claims)
