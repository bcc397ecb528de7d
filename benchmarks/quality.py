"""What training together is worth: seven text sets as seven parties' private domains.

    python benchmarks/quality.py --out quality            # everything; about three hours on two idle cores
    python benchmarks/quality.py --out quality --quick    # every arm in minutes; its losses show nothing
    python benchmarks/quality_tasks.py quality           # commonsense questions; needs coterie[eval]
    python benchmarks/quality_report.py quality --out docs

One line of JSON per finished job goes to ``jobs.jsonl``; a rerun goes on with what is missing. ``--only`` takes
jobs whose names hold a word. The sets are looked for in --data, COTERIE_TEST_DATA or shared/data beside the
repository.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from coterie.demonstration.plan import DemoPlan, make_plan
from coterie.demonstration.processes import interrupt_on_signals
from coterie.revision import software
from harness import machine
from quality_jobs import Job, Sizes, Worker, asked_job, jobs_of, keep_model, prepare, public_run
from quality_text import data_folder

JOBS = "jobs.jsonl"


def sizes_of(quick: bool) -> Sizes:
    """The whole comparison, or a small one that shows every step."""
    if quick:
        plan = replace(make_plan(3, quick=True), rounds=4, eval_every=2, public_rounds=8)
        return Sizes(plan, 12_000, 3_000, 60_000, counts=(3, 2), repeated=(3,), seeds=(0,), epsilons=(8.0,))
    return Sizes(replace(DemoPlan(), eval_every=12))


def finished(path: Path) -> set[str]:
    """Keys of the jobs whose lines are there; a line that was cut short is dropped, and its job runs again."""
    if not path.exists():
        return set()
    lines = path.read_text("utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if whole != lines:
        path.write_text("".join(whole), encoding="utf-8")
    return {json.loads(line)["key"] for line in whole}


def run_all(jobs: Iterable[Job], arguments: argparse.Namespace) -> None:
    """Each job in a process of its own, some at once; the checkpoint that the others start from before them."""
    path: Path = arguments.out / JOBS
    done = finished(path)
    waiting = [job for job in jobs if job.key not in done and all(word in job.key for word in arguments.only)]
    running: dict[str, subprocess.Popen[bytes]] = {}
    total, began = len(waiting), time.monotonic()
    try:
        while waiting or running:
            ready = next((job for job in waiting if _may_start(job, done)), None)
            if ready is not None and len(running) < arguments.at_once:
                waiting.remove(ready)
                running[ready.key] = _start(ready, arguments)
                continue
            if ready is None and not running:
                raise SystemExit(f"{waiting[0].key} needs the public checkpoint of its seed: leave out --only")
            time.sleep(0.2)
            for key in [key for key, process in running.items() if process.poll() is not None]:
                if running.pop(key).returncode:
                    raise SystemExit(f"{key} failed; {arguments.out / 'logs' / key}.log says why")
                found = _work(arguments.out, key) / "line.json"
                with path.open("a", encoding="utf-8") as lines:
                    lines.write(found.read_text("utf-8") + "\n")
                shutil.rmtree(found.parent)
                done.add(key)
                seconds = time.monotonic() - began
                print(f"{seconds:6.0f} s  {key}: {total - len(waiting) - len(running)} of {total}", flush=True)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _may_start(job: Job, done: set[str]) -> bool:
    return job.arm == "public" or Job("public", 0, job.seed).key in done


def _work(out: Path, key: str) -> Path:
    return out / "work" / key


def _start(job: Job, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    log = arguments.out / "logs" / f"{job.key}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    quick = ["--quick"] if arguments.quick else []
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, __file__, "--out", str(arguments.out), "--job", job.key, *quick],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        )


def run_one(key: str, sizes: Sizes, out: Path) -> None:
    """The process of a job: leave its line in its folder."""
    job = next(job for job in jobs_of(sizes) if job.key == key)
    where = _work(out, key)
    with contextlib.suppress(FileNotFoundError):  # what an interrupted try left
        shutil.rmtree(where)
    if job.arm == "public":
        shutil.rmtree(public_run(out, job.seed), ignore_errors=True)
    where.mkdir(parents=True)
    line = Worker(out, sizes).run(job, where)
    if job == asked_job(sizes):
        keep_model(where / "run", out)
    (where / "line.json").write_text(json.dumps(line), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--at-once", type=int, default=2, help="processes; one core each")
    parser.add_argument("--only", action="append", default=[], help="jobs whose name holds this; repeat: all of them")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = sizes_of(arguments.quick)
    if arguments.job is not None:
        run_one(arguments.job, sizes, arguments.out)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = {"quick": arguments.quick, "sizes": sizes.as_json(), "jobs": [job.key for job in jobs_of(sizes)]}
    (arguments.out / "about.json").write_text(
        json.dumps({**about, "machine": machine(), **software()}, indent=2) + "\n", encoding="utf-8"
    )
    prepare(arguments.out, data_folder(arguments.data), sizes)
    with interrupt_on_signals():
        run_all(jobs_of(sizes), arguments)


if __name__ == "__main__":
    main()
