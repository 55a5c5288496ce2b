"""The comparison of annealing, with hardly any training: it runs, and its columns are different trainings."""

import functools

import pytest

from transpoint.teachers.random import random_teacher


@pytest.mark.slow
def test_a_row_for_each_setting_and_seed(load_script, monkeypatch, capsys):
    script = load_script("compare_annealing")
    # A teacher of 4 layers, each with a TransPoint of its own, in place of 16.
    small = functools.partial(random_teacher, num_hidden_layers=4)
    monkeypatch.setattr(script, "random_teacher", lambda name, num_hidden_layers, **sizes: small(name, **sizes))
    monkeypatch.setattr(script, "CYCLED", "[0, 16, 32, 64]")
    monkeypatch.setattr(script, "SETTINGS", (script.SETTINGS[1], (script.CYCLED, "3e-3")))
    few = ["--steps", "2", "--teacher-steps", "2", "--sequences", "2", "--tokens", "20000"]
    assert script.main(["--seeds", "0", *few]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ") for line in lines[1:]]
    settings = [(name, rate) for name, rate in (("8", "1e-2"), ("0, 16, 32, 64 cycled", "3e-3"))]
    assert [row[:3] for row in rows] == [[*setting, "0"] for setting in settings]
    assert all(float(plain) > 0 and plain != annealed for *_, plain, annealed in rows)
