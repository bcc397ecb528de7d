"""A script around `PrivateTrainer` under the launchers themselves; its parts are tested in tests/hf without them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers.comparing import relative

SCRIPT = """
import os, signal, sys
from pathlib import Path
from helpers import trainer_tasks
from transformers import TrainerCallback

class Dies(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if "DIES" in os.environ and first and state.global_step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

trainer = trainer_tasks.made(Path(sys.argv[1]))
trainer.add_callback(Dies())
trainer.train()
trainer.save_model()
"""
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi-gpu", "--num-processes", "2"]
FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def run(launcher: list[str], folder: Path, name: str, **variables: str) -> None:
    (folder / "train.py").write_text(SCRIPT)
    helpers = str(Path(__file__).parents[1])
    places = os.pathsep.join(filter(None, (helpers, os.environ.get("PYTHONPATH"))))
    ended = subprocess.run(
        [sys.executable, *launcher, "train.py", name],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": places} | variables,
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("launcher", "variables"),
    [(TORCHRUN, {}), (TORCHRUN, {"DIES": "1"} | FRESH_STORE), (ACCELERATE, {})],
    ids=["torchrun", "torchrun, one killed and all started again", "accelerate"],
)
def test_a_launched_script_trains_what_one_process_trains(
    launcher: list[str], variables: dict[str, str], tmp_path: Path
) -> None:
    run([], tmp_path, "alone")
    run(launcher, tmp_path, "both", **variables)
    expected, found = (load_file(tmp_path / name / "out/model.safetensors") for name in ("alone", "both"))
    assert max(relative(found[name], value) for name, value in expected.items()) <= 1e-6
    (ledger,) = tmp_path.glob("both/ledger/*/ledger.jsonl")
    kinds = [json.loads(line)["kind"] for line in ledger.read_text().splitlines()]
    assert (kinds.count("run"), kinds.count("release")) == (1, 4)
