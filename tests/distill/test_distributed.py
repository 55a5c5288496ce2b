"""Two processes under every engine: the losses and weights of one process, and its resuming.

With gloo on CPUs; configs/accelerate/*.yaml are those that people use on GPUs.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from forked import ROOT, run_all
from run_files import metrics

SMALL = (
    "run.precision=fp32",
    *(f"{stage}.{key}" for stage in ("align", "distill") for key in ("steps=6", "log_every=1", "checkpoint_every=2")),
    "align.micro_batch_size=1",  # two of them make a step of one of two processes
)
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
pytestmark = pytest.mark.slow


def losses(folder):
    return [line["loss"] for stage in ("align", "distill") for line in metrics(folder, stage)]


def assert_same(folder, alone):
    assert losses(folder) == pytest.approx(losses(alone), abs=1e-4)
    found, wanted = (load_file(run / "distill" / "student" / "model.safetensors") for run in (folder, alone))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():  # Adam's first steps are of the size lr whatever the gradient's rounding
        torch.testing.assert_close(found[name], tensor, atol=1e-3, rtol=0)


@pytest.fixture(scope="session")
def runs(run_tiny, tmp_path_factory):
    """A run folder for each name: one process ("alone"), two under every engine, and two that go on where one stopped
    in distill ("resumed ENGINE"), with what they printed. Only to be read."""
    root = tmp_path_factory.mktemp("distributed")
    taken = []

    def interrupt(step):
        taken.append(step)
        if len(taken) == 6 + 5:  # in distill
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tiny(root / "alone", *SMALL, until_stage="distill", on_step=interrupt)
    jobs = {engine: engine for engine in ENGINES} | {f"resumed {engine}": engine for engine in ("zero3", "fsdp2")}
    for name in jobs:
        if name.startswith("resumed"):
            shutil.copytree(root / "alone", root / name)
    run_tiny(root / "alone", *SMALL, until_stage="distill")
    command = ["run", "configs/tiny.yaml", *SMALL, "--until", "distill"]
    outputs = run_all(
        [
            {"engine": engine, "arguments": [*command, f"run.dir={root / name}"], "log": root / f"{name}.log"}
            for name, engine in jobs.items()
        ]
    )
    return {"alone": (root / "alone", "")} | {
        name: (root / name, output) for name, output in zip(jobs, outputs, strict=True)
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one(engine, runs):
    folder, output = runs[engine]
    kinds = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}
    assert f": 2 processes ({kinds.get(engine, 'DEEPSPEED')}) on cpu" in output
    assert_same(folder, runs["alone"][0])


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_interrupted_in_one_process_and_resumed_by_two(engine, runs):
    folder, output = runs[f"resumed {engine}"]
    assert "align: done before, reused" in output and "distill: going on from step 4" in output
    assert_same(folder, runs["alone"][0])


def test_launched_as_a_person_does_killed_and_resumed_by_one_process(runs, run_tiny, tmp_path):
    folder = tmp_path / "run"
    command = [Path(sys.executable).with_name("accelerate"), "launch", "--config_file", "configs/accelerate/zero2.yaml"]
    command += ["--main_process_port", "0", "-m", "transpoint.distill", "configs/tiny.yaml", f"run.dir={folder}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *SMALL, "--until", "distill"], cwd=ROOT, env=environment, **pipes)
    deadline = time.monotonic() + 300
    while not list(folder.glob("align/checkpoints/step-*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0].decode()[-4000:]
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    output = run_tiny(folder, *SMALL, until_stage="distill")
    assert "align: going on from step" in output or "align: done before" in output
    assert_same(folder, runs["alone"][0])
