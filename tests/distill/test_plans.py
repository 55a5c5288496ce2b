"""Layer plans by name, in recipes: each runs through, learns in every layer, and goes out with its code."""

import pytest

from run_files import done, metrics
from transpoint.distill.models import load_config
from transpoint.students import PLANS

QUICK = (
    "align.steps=10",
    "align.log_every=5",
    "distill.steps=2",
    "export.format=custom",
    "data.max_heldout_tokens=256",
)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_a_tiny_run(plan, tmp_path, run_tiny):
    run_tiny(tmp_path, f"student.plan={plan}", *QUICK, until_stage="export")
    lines, config = metrics(tmp_path, "align"), load_config(tmp_path / "export" / "custom")
    layers = {name: error for name, error in lines[0].items() if name.startswith("layer_")}
    assert layers.keys() == {f"layer_{i}" for i, mixer in enumerate(config.mixers) if mixer != "attention"}
    assert all(lines[-1][name] < error or error < 1e-6 for name, error in layers.items())  # or is the teacher's already
    figures = done(tmp_path, "export")["verified"]  # by transformers alone, from the code in the export
    assert 0 <= figures["logits"] < 1e-4 and 0 <= figures["decode"] < 1e-4
