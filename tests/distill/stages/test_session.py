"""The teacher that training has, beside the one that everything else has."""

from types import SimpleNamespace

import pytest
import torch

from run_files import TINY
from transpoint.distill.config import load_recipe
from transpoint.distill.stages import session as session_module
from transpoint.distill.stages.session import Session


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_teacher_of_training(processes, dtype, tmp_path, monkeypatch):
    shared = []
    monkeypatch.setattr(session_module, "share_layers", shared.append)
    options = [f"run.dir={tmp_path}", "teacher.share=true", f"teacher.training_dtype={dtype}", "run.device=cpu"]
    session = Session(load_recipe(TINY, options))
    session.accelerator = SimpleNamespace(num_processes=processes, device=torch.device("cpu"))
    teacher = session.teacher
    changes = processes > 1 or dtype == "bfloat16"
    with session.teacher_for_training():
        assert shared == ([teacher] if processes > 1 else [])
        assert teacher is session.teacher
        wanted = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        assert {parameter.dtype for parameter in teacher.parameters()} == {wanted}
    assert (session.teacher is teacher) != changes
    assert {parameter.dtype for parameter in session.teacher.parameters()} == {torch.float32}
