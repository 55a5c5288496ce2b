"""Two processes under every engine, started as a person does: the losses and weights of one process, and its resuming.

With gloo on CPUs; configs/accelerate/*.yaml are those that people use on GPUs.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from run_files import metrics

ROOT = Path(__file__).parents[2]
SMALL = (
    "run.precision=fp32",
    *(f"{stage}.{key}" for stage in ("align", "distill") for key in ("steps=6", "log_every=1", "checkpoint_every=2")),
    "align.micro_batch_size=1",  # two of them make a step of one of two processes
)
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("distributed")]


def start(engine, folder, *more):
    command = [Path(sys.executable).with_name("accelerate"), "launch"]
    command += ["--config_file", f"configs/accelerate/{engine}.yaml", "--num_processes", "2"]
    command += ["--main_process_port", "0", "-m", "transpoint.distill", "configs/tiny.yaml", f"run.dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    return subprocess.Popen([*command, *SMALL, "--until", "distill", *more], cwd=ROOT, env=environment, **pipes)


def launch(engine, folder, *more):
    process = start(engine, folder, *more)
    output = process.communicate(timeout=500)[0].decode()
    assert process.returncode == 0, output[-4000:]
    assert "2 processes (" in output
    return output


def losses(folder):
    return [line["loss"] for stage in ("align", "distill") for line in metrics(folder, stage)]


def assert_same(folder, alone):
    assert losses(folder) == pytest.approx(losses(alone), abs=1e-4)
    found, wanted = (load_file(run / "distill" / "student" / "model.safetensors") for run in (folder, alone))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():  # Adam's first steps are of the size lr whatever the gradient's rounding
        torch.testing.assert_close(found[name], tensor, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def alone(run_tiny, tmp_path_factory):
    """The run of one process. Only to be read."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run_tiny(folder, *SMALL, until_stage="distill")
    return folder


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_two_processes_train_as_one(engine, alone, tmp_path):
    launch(engine, tmp_path / "run")
    assert_same(tmp_path / "run", alone)


def test_killed_under_zero_and_resumed_by_one_process(alone, run_tiny, tmp_path):
    folder = tmp_path / "run"
    process = start("zero2", folder, "align.steps=6")
    deadline = time.monotonic() + 300
    while not list(folder.glob("align/checkpoints/step-*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0].decode()[-4000:]
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    output = run_tiny(folder, *SMALL, until_stage="distill")
    assert "align: going on from step" in output or "align: done before" in output
    assert_same(folder, alone)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_interrupted_in_one_process_and_resumed_by_two(engine, alone, run_tiny, tmp_path):
    folder = tmp_path / "run"
    taken = []

    def interrupt(step):
        taken.append(step)
        if len(taken) == 6 + 5:  # in distill
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tiny(folder, *SMALL, until_stage="distill", on_step=interrupt)
    output = launch(engine, folder)
    assert "align: done before, reused" in output and "distill: going on from step 4" in output
    assert_same(folder, alone)
