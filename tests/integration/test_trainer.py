"""transformers' Trainer against our loop's `micro_batch` mode: the same gradients, losses and weights, on one process and on two."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.integration.trainer_script import measure, sequences, with_sft_trainer
from tests.tiny import save_parts

from metamorph.errors import AlignmentError
from metamorph.model import initialize, load

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    model, processor = initialize(*save_parts(root), num_visual_tokens=4)
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    return root / "model"


def run(mode: str, model_dir: Path, out: Path, processes: int) -> dict:
    if processes == 1:
        measure(mode, model_dir, out)
    else:
        launch(mode, model_dir, out, processes)
    return {"losses": json.loads((out / "losses.json").read_text()), **load_file(out / "tensors.safetensors")}


def launch(mode: str, model_dir: Path, out: Path, processes: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-addr=127.0.0.1"]
    command += [f"--master-port={port}", "-m", measure.__module__, mode, str(model_dir), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.multiprocess])])
def test_trainer_computes_what_our_loop_computes(model_dir, tmp_path, processes):
    """Rows of other numbers of targets in every micro-batch, some without an image to draw and one without any image."""
    theirs, ours = (run(mode, model_dir, tmp_path / mode, processes) for mode in ("trainer", "loop"))
    same_training(theirs, ours)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # TRL's own
def test_sft_trainer_computes_it_with_the_models_loss(model_dir, tmp_path):
    theirs, ours = (run(mode, model_dir, tmp_path / mode, 1) for mode in ("sft", "loop"))
    same_training(theirs, ours)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_sft_trainer_as_it_is_is_refused(model_dir, tmp_path):
    """It computes a loss of its own, from the text alone."""
    model, processor = load(model_dir)
    with pytest.raises(AlignmentError, match="images to predict but no labels"):
        with_sft_trainer(model, sequences(processor), tmp_path, own_loss=False)


def same_training(theirs: dict, ours: dict) -> None:
    assert theirs.keys() == ours.keys()
    assert len(theirs["losses"]) == 2
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-6)  # in particular not times the number of processes
    gradients = [name for name in ours if name.startswith("gradient")]
    assert {name.split()[2].split(".")[0] for name in gradients} == {"language_model", "projector", "vision_head"}
    for step in ("gradient 1", "gradient 2"):
        names = [name for name in gradients if name.startswith(step)]
        size = torch.stack([ours[name].norm() for name in names]).norm()
        distance = torch.stack([(theirs[name] - ours[name]).norm() for name in names]).norm()
        assert distance < 1e-6 * size, step
    for name in ours:
        if name.startswith("weight"):
            torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=1e-6, msg=name)
