"""Two processes under every engine: the losses and weights of one process, and its resuming.

With gloo on CPUs; configs/accelerate/*.yaml are those that people use on GPUs.
"""

import json
import os
import re
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

FEW = ("run.precision=fp32", "data.max_train_tokens=4000", "data.max_heldout_tokens=500")
SMALL = (
    *FEW,
    *(f"{stage}.{key}" for stage in ("align", "distill") for key in ("steps=4", "log_every=1", "checkpoint_every=2")),
    "align.micro_batch_size=1",  # two of them make a step of one of two processes
)
SCRATCH = (
    *FEW,
    "teacher.source=scratch-llama",
    "teacher.sizes={hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}",
    "student.keep_attention=[1]",
    *(f"train.{key}" for key in ("steps=4", "log_every=1", "checkpoint_every=2", "micro_batch_size=1")),
)
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
pytestmark = pytest.mark.slow


def losses(folder, stages=("align", "distill")):
    return [line["loss"] for stage in stages for line in metrics(folder, stage)]


def assert_same(folder, alone, stages=("align", "distill")):
    assert losses(folder, stages) == pytest.approx(losses(alone, stages), abs=1e-4)
    found, wanted = (load_file(run / stages[-1] / "student" / "model.safetensors") for run in (folder, alone))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():  # Adam's first steps are of the size lr whatever the gradient's rounding
        torch.testing.assert_close(found[name], tensor, atol=1e-3, rtol=0)


def launch(engine, arguments):
    """As a person does."""
    command = [Path(sys.executable).with_name("accelerate"), "launch", "--main_process_port", "0"]
    command += ["--config_file", f"configs/accelerate/{engine}.yaml", "-m", "transpoint.distill", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_checkpoint(process, folder):
    """Until a launch has left a checkpoint in its run folder."""
    deadline = time.monotonic() + 300
    while not list(folder.glob("align/checkpoints/step-*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0].decode()[-4000:]
        time.sleep(0.002)


def workers(process):
    """The processes that a launch started, by rank; each has a process group of its own."""
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        for variable in Path(f"/proc/{child}/environ").read_text().split("\0"):
            if variable.startswith("RANK="):
                found[int(variable.removeprefix("RANK="))] = int(child)
    return found


def kill_all(process):
    """A launch and what it started."""
    if process.poll() is None:
        for pid in (*workers(process).values(), process.pid):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def runs(run_tiny, tmp_path_factory):
    """A run folder for each name, with what the run printed: one process ("alone"), two under every engine, two that go
    on where one stopped in distill ("resumed ENGINE"), two that share a teacher (under DDP; under FSDP2, unless
    resumed, they do anyway), and without a teacher ("scratch alone", "scratch ENGINE"). Of those beside "alone", DDP's
    alone transfer and calibrate themselves. Only to be read."""
    root = tmp_path_factory.mktemp("distributed")
    taken = []

    def interrupt(step):
        taken.append(step)
        if len(taken) == 4 + 3:  # in distill
            raise KeyboardInterrupt

    jobs = {engine: engine for engine in ENGINES} | {"shared teacher": "ddp"}
    run_tiny(root / "alone", *SMALL, until_stage="calibrate")
    for name in [*jobs][1:]:
        shutil.copytree(root / "alone", root / name)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(root / "alone", *SMALL, until_stage="distill", on_step=interrupt)
    for engine in ("zero3", "fsdp2"):
        jobs[f"resumed {engine}"] = engine
        shutil.copytree(root / "alone", root / f"resumed {engine}")
    run_tiny(root / "alone", *SMALL, until_stage="distill")
    run_tiny(root / "scratch alone", *SCRATCH, until_stage="train")
    scratch = {f"scratch {engine}": engine for engine in ("ddp", "fsdp2")}

    def arguments(name):
        if name in scratch:
            return [*SCRATCH, "--until", "train"]
        return [*SMALL, "--until", "distill", f"teacher.share={name in ('shared teacher', 'fsdp2')}"]

    jobs |= scratch
    outputs = run_all(
        [
            {
                "engine": engine,
                "arguments": ["run", "configs/tiny.yaml", *arguments(name), f"run.dir={root / name}"],
                "log": root / f"{name}.log",
            }
            for name, engine in jobs.items()
        ]
    )
    return {name: (root / name, "") for name in ("alone", "scratch alone")} | {
        name: (root / name, output) for name, output in zip(jobs, outputs, strict=True)
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one(engine, runs):
    folder, output = runs[engine]
    kinds = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}
    assert f": 2 processes ({kinds.get(engine, 'DEEPSPEED')}) on cpu" in output
    shares = ("optimizer", "optimizer, gradients", "optimizer, gradients, parameters")
    shares = dict(zip(ENGINES[1:], (*shares, "parameters, gradients, optimizer"), strict=True))
    said = re.findall(r"\(([a-z, ]+) sharded\)", " ".join(output.split()))
    assert said == ([shares[engine]] * 2 if engine in shares else [])  # in both stages
    assert_same(folder, runs["alone"][0])


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_train_from_scratch_as_one(engine, runs):
    folder, output = runs[f"scratch {engine}"]
    assert "2 processes" in output
    assert_same(folder, runs["scratch alone"][0], ("train",))


def test_a_teacher_that_processes_hold_together_teaches_the_same(runs):
    folder, output = runs["shared teacher"]
    assert_same(folder, runs["alone"][0])
    quality = [json.loads((run / "distill" / "done.json").read_text())["quality"] for run in (folder, runs["alone"][0])]
    assert quality[0]["kl"] == pytest.approx(quality[1]["kl"], abs=1e-4)

    def megabytes(text):
        return float(re.search(r"without activations: ([0-9.]+) MB", " ".join(text.split()))[1])

    assert megabytes(output) < megabytes(runs["ddp"][1])


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_interrupted_in_one_process_and_resumed_by_two(engine, runs):
    folder, output = runs[f"resumed {engine}"]
    assert "align: done before, reused" in output and "distill: going on from step 2" in output
    assert_same(folder, runs["alone"][0])


def test_a_process_that_dies_ends_the_others_and_one_alone_goes_on(runs, run_tiny, tmp_path):
    """Killed for want of memory, say, in a run that was launched as a person does."""
    folder = tmp_path / "run"
    process = launch("zero2", ["configs/tiny.yaml", f"run.dir={folder}", *SMALL, "--until", "distill"])
    try:
        wait_for_checkpoint(process, folder)
        os.kill(workers(process)[1], signal.SIGKILL)
        output = process.communicate(timeout=60)[0].decode()
    finally:
        kill_all(process)
    assert process.returncode != 0 and "Signal 9 (SIGKILL) received" in output
    assert not (folder / "distill" / "done.json").exists()
    output = run_tiny(folder, *SMALL, until_stage="distill")
    assert "align: going on from step" in output or "align: done before" in output
    assert_same(folder, runs["alone"][0])
