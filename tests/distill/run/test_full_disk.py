"""A disk that really is full, and a run folder that two runs want."""

import subprocess
import sys

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from run_files import ROOT, metrics
from transpoint.distill.errors import RunError

SETTINGS = ("run.precision=fp32", "align.steps=12", "align.checkpoint_every=2", "align.log_every=1")
SHELL = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]  # may mount, whoever runs this
MOUNT = 'mount -t tmpfs -o size=20m none "$1"; '
RUN = """
import sys
from transpoint.distill.config import load_recipe
from transpoint.distill.stages.runner import run_recipe

def fill(step):
    if step == 5:
        with open(sys.argv[1] + "/filler", "wb", buffering=0) as file:
            while True:
                try:
                    file.write(b"0" * 65536)
                except OSError:
                    return

run_recipe(load_recipe("configs/tiny.yaml", [f"run.dir={sys.argv[1]}/run", *sys.argv[2:]]), None, "align", on_step=fill)
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_while_training(run_tiny, tmp_path):
    disk, kept = tmp_path / "disk", tmp_path / "run"
    disk.mkdir()
    if subprocess.run([*SHELL, MOUNT, "sh", disk], capture_output=True).returncode:
        pytest.skip("needs user namespaces that may mount a tmpfs")
    script = MOUNT + '"$3" -c "$4" "$1" $5 && exit 1; cp -r "$1/run" "$2"'
    command = [*SHELL, script, "sh", disk, kept, sys.executable, RUN, " ".join(SETTINGS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert f"checkpoint {disk / 'run/align/checkpoints/step-00000006'} could not be written (" in last
    assert "No space left" in last and last.endswith("free some space, then run the same command to go on")
    assert "align: going on from step 4" in run_tiny(kept, *SETTINGS, until_stage="align")
    run_tiny(tmp_path / "whole", *SETTINGS, until_stage="align")
    found, wanted = (load_file(folder / "align/student/model.safetensors") for folder in (kept, tmp_path / "whole"))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert metrics(kept, "align") == metrics(tmp_path / "whole", "align")


def test_two_runs_do_not_share_a_folder(run_tiny, tiny_copy):
    before = {path: path.read_bytes() for path in tiny_copy.rglob("*.*") if path.is_file()}
    with FileLock(tiny_copy / "run.lock"), pytest.raises(RunError, match="another run is at work in .*set run.dir"):
        run_tiny(tiny_copy, "align.steps=3")
    assert all(path.read_bytes() == content for path, content in before.items())
    assert "align: done before, reused" in run_tiny(tiny_copy)


def test_a_run_that_failed_keeps_nobody_out(run_tiny, tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError):  # and not RunError the second time
            run_tiny(tmp_path / "run", on_step=lambda step: {}[step])
