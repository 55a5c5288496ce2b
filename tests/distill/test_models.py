"""load_model: a student, an export or any other model is whole, or refused in one line."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from transpoint.distill.errors import RunError
from transpoint.distill.models import load_model
from transpoint.students import StudentConfig, build_student
from transpoint.teachers.random import random_teacher


@pytest.fixture(scope="module", params=["student", "model"])
def saved(request, tmp_path_factory):
    """A folder with a model in it, and that model."""
    model = random_teacher("random-llama")[0]
    model = build_student(model, StudentConfig(keep_attention=[1])) if request.param == "student" else model
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder, model


def refused(folder):
    with pytest.raises(RunError) as caught:
        load_model(folder)
    assert str(caught.value).startswith(f"model '{folder}' ") and "\n" not in str(caught.value)
    return str(caught.value)


BROKEN = {
    "a layer's weights": (lambda w: {n: t for n, t in w.items() if ".layers.2." not in n}, "are missing in it"),
    "other names": (lambda w: {f"module.{n}": t for n, t in w.items()}, "have no place in the model"),
    "another width": (lambda w: w | {"model.norm.weight": torch.ones(7)}, "1 tensors have another shape"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_model_that_is_not_all_there_is_refused(what, saved, tmp_path):
    folder, model = saved
    change, reason = BROKEN[what]
    model.save_pretrained(tmp_path)
    save_file(change(load_file(folder / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})
    assert reason in refused(tmp_path)


@torch.no_grad()
def test_a_model_is_loaded_and_pickled_weights_are_not(saved, tmp_path):
    folder, model = saved
    ids = torch.arange(3, 20)[None]
    assert torch.equal(load_model(folder)(ids).logits, model(ids).logits)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert "model.safetensors" in refused(tmp_path)
