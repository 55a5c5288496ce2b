"""The teacher that training has, beside the one that everything else has."""

from types import SimpleNamespace

import pytest
import torch

from run_files import TINY
from transpoint.distill.config import load_recipe
from transpoint.distill.stages import session as session_module
from transpoint.distill.stages.session import Session


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_teacher_of_training(processes, room, dtype, tmp_path, monkeypatch):
    """Afterwards it is what it was: the same one, where it can be kept aside."""
    shared = []
    monkeypatch.setattr(session_module, "share_layers", shared.append)
    if not room:
        monkeypatch.setattr(session_module, "free_memory", lambda: 0)
    options = [f"run.dir={tmp_path}", "teacher.share=true", f"teacher.training_dtype={dtype}", "run.precision=fp32"]
    session = Session(load_recipe(TINY, [*options, "run.device=cpu"]))
    session.accelerator = SimpleNamespace(num_processes=processes, device=torch.device("cpu"))
    teacher = session.teacher
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    shares = processes > 1
    with session.teacher_for_training():
        assert shared == ([teacher] if shares else [])
        assert teacher is session.teacher
        wanted = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        assert {parameter.dtype for parameter in teacher.parameters()} == {wanted}
    assert (session.teacher is teacher) == (not shares and (room or dtype == "auto"))
    assert {parameter.dtype for parameter in session.teacher.parameters()} == {torch.float32}
    assert all(torch.equal(value, before[name]) for name, value in session.teacher.state_dict().items())


@pytest.mark.parametrize(
    "options, precision, wanted",
    [
        ([], "bf16", "bfloat16"),
        ([], "fp32", "float32"),
        (["teacher.dtype=float16"], "fp32", "float16"),
        (["teacher.training_dtype=float32"], "bf16", "float32"),
    ],
)
def test_its_dtype_is_by_default_that_of_products(options, precision, wanted):
    assert load_recipe(TINY, options).training_dtype(precision) == wanted
