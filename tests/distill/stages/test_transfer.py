"""Runs that go on from the student of another run."""

import pytest
import torch

from run_files import TINY, done
from transpoint.distill.cli import main
from transpoint.distill.config import load_recipe
from transpoint.distill.errors import RunError
from transpoint.distill.models import load_model
from transpoint.distill.run.files import read_json
from transpoint.distill.stages.inputs import stage_inputs


def changed(run, earlier, stage, layer, name="mixer"):
    """Whether a layer's mixer is another than the earlier run left."""
    own, before = (load_model(folder / "student") for folder in (run / stage, earlier / "distill"))
    pairs = zip(*(model.mixer_layers()[layer].parameters() for model in (own, before)), strict=True)
    return any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_a_run_goes_on_from_the_student_of_another(tiny_run, tmp_path, run_tiny):
    assert "transfer" not in read_json(tiny_run / "transfer" / "stage.json")  # runs that start from the teacher hold
    (first,) = {i for i, mixer in enumerate(done(tiny_run, "transfer")["mixers"]) if mixer != "attention"} - {2}
    overrides = [f"transfer.start={tiny_run}", "student.keep_attention=[1]"]
    run_tiny(tmp_path, *overrides, until_stage="align")
    quality = {stage: done(tmp_path, stage)["quality"]["kl"] for stage in ("transfer", "align")}
    assert list(done(tmp_path, "calibrate")["layers"]) == ["layer_3"]
    for stage in ("transfer", "calibrate", "align"):
        assert not changed(tmp_path, tiny_run, stage, first)
    assert quality["align"] < quality["transfer"]
    # What it starts from is part of what its stages depend on; where there is nothing new, nothing is aligned.
    out = run_tiny(tmp_path, f"transfer.start={tiny_run / 'distill' / 'student'}", *overrides[1:], until_stage="align")
    assert out.count("done before, reused") == 3
    out = run_tiny(tmp_path, overrides[0], until_stage="distill")
    assert "align: every mixer is one of transfer.start: there is none to train" in out
    assert (
        done(tmp_path, "transfer")["quality"]
        == done(tmp_path, "align")["quality"]
        == done(tiny_run, "distill")["quality"]
    )
    assert done(tmp_path, "distill")["quality"]["kl"] < done(tiny_run, "distill")["quality"]["kl"]


def test_plan_says_what_of_it_trains(tiny_run, capsys):
    """One mixer of three that there are then."""

    def trained(*overrides):
        assert main(["plan", str(TINY), "student.keep_attention=[1]", *overrides]) == 0
        lines = (line.split() for line in capsys.readouterr().out.splitlines())
        return [int(line[3].replace(",", "")) for line in lines if line[1:2] == ["mixers"]]

    (of_align, of_distill), (every, _) = trained(f"transfer.start={tiny_run}"), trained()
    assert every == of_distill == 3 * of_align > 0


def test_what_is_no_student_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for given in ("nowhere", "empty"):
        with pytest.raises(RunError, match=f"transfer.start is '.*{given}': no run, and no student's folder"):
            stage_inputs(load_recipe(TINY, [f"transfer.start={tmp_path / given}"]))
