"""A disk that really is full, and a run folder that two runs want."""

import contextlib
import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from forked import in_one
from run_files import metrics
from transpoint.distill.errors import RunError

SETTINGS = ("run.precision=fp32", "align.steps=12", "align.checkpoint_every=2", "align.log_every=1")
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


def mount_small_disk(folder) -> bool:
    """Mounts a tmpfs there that this process alone sees; whoever it is may do so in a namespace of its own."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNS):
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(text)
    return subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", folder]).returncode == 0


@pytest.mark.slow
def test_a_disk_that_fills_up_while_training(run_tiny, tmp_path):
    disk, kept, said = tmp_path / "disk", tmp_path / "run", tmp_path / "said"
    disk.mkdir()

    def fill(step):
        if step == 5:
            with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(b"0" * 65536)

    def run():
        if not mount_small_disk(disk):
            os._exit(2)
        try:
            run_tiny(disk / "run", *SETTINGS, until_stage="align", on_step=fill)
        except Exception as error:
            said.write_text(str(error))
        shutil.copytree(disk / "run", kept)
        os._exit(0)

    if (code := in_one(run)) == 2:
        pytest.skip("needs user namespaces that may mount a tmpfs")
    assert code == 0
    told = said.read_text()
    assert f"checkpoint {disk / 'run/align/checkpoints/step-00000006'} could not be written (" in told
    assert "No space left" in told and told.endswith("free some space, then run the same command to go on")
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
