"""The figure of a layer plan."""

import math
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from run_files import CONFIGS
from transpoint.distill.cli import main
from transpoint.distill.errors import RunError
from transpoint.distill.report.figure import COLOURS, draw
from transpoint.students import StudentConfig, build_student
from transpoint.teachers.random import random_teacher

MIXERS = ["transmamba", "attention", "transmamba", "mamba2", "transmamba"]
POINTS = [0, math.inf, 16, 0, 64]


def bars(path):
    """[(colour, left, right)] of the drawn rectangles, left to right and bottom to top as drawn, in fractions."""
    found = []
    for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}path"):
        style = element.get("style") or ""
        colour = next((c for c in COLOURS.values() if f"fill: {c}" in style), None)
        if colour and element.get("clip-path"):
            numbers = [float(word) for word in element.get("d").split() if word not in "MLz"]
            found.append((colour, min(numbers[::2]), max(numbers[::2])))
    left, right = min(a for _, a, _ in found), max(b for _, _, b in found)
    return [(c, round((a - left) / (right - left), 3), round((b - left) / (right - left), 3)) for c, a, b in found]


def test_bars_are_the_layer_plan(tmp_path):
    kept, attention, state, _ = COLOURS.values()
    # A logarithmic axis from 8 to 128: 16 is a quarter along it, 64 three quarters.
    assert bars(draw(MIXERS, POINTS, tmp_path / "plan.svg")) == [
        (state, 0, 1),
        (kept, 0, 1),
        (attention, 0, 0.25),
        (state, 0.25, 1),
        (state, 0, 1),
        (attention, 0, 0.75),
        (state, 0.75, 1),
    ]
    assert bars(draw(MIXERS, POINTS, tmp_path / "plan.svg", tokens=32))[-1] == (attention, 0, 1)


@pytest.mark.parametrize("points", [[0, 0], [math.inf, math.inf], [8, 8]])
def test_uniform_plans(points, tmp_path):
    assert len(bars(draw(["transmamba"] * 2, points, tmp_path / "plan.svg"))) == (4 if points == [8, 8] else 2)


def test_the_same_plan_gives_the_same_file(tmp_path):
    files = [draw(MIXERS, POINTS, tmp_path / name).read_bytes() for name in ("a.svg", "b.svg")]
    assert files[0] == files[1] and len(files[0]) < 200_000
    assert draw(MIXERS, POINTS, tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"the figure cannot be written to '.*plan.docx'"):
        draw(MIXERS, POINTS, tmp_path / "plan.docx")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RunError, match=r"figures need matplotlib: pip install 'transpoint\[figure\]'"):
        draw(MIXERS, POINTS, tmp_path / "plan.svg")


def test_figures_of_recipes_and_checkpoints(tmp_path, capsys):
    out = tmp_path / "tiny.svg"
    assert main(["figure", str(CONFIGS / "tiny-transmamba.yaml"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    from_recipe = out.read_bytes()
    assert len(bars(out)) == 7
    config = StudentConfig(mixer="transmamba", keep_attention=[], trans_points=[0, 8, 16, 32])
    build_student(random_teacher("random-llama")[0], config).save_pretrained(tmp_path / "student")
    assert main(["figure", str(tmp_path / "student"), "--out", str(out)]) == 0
    assert out.read_bytes() == from_recipe
    mamba = tmp_path / "mamba"
    build_student(random_teacher("random-llama")[0], StudentConfig()).save_pretrained(mamba)
    assert main(["figure", str(mamba), "--out", str(out)]) == 0
    assert {colour for colour, _, _ in bars(out)} == {COLOURS["attention, kept"], COLOURS["state space"]}
    random_teacher("random-llama")[0].save_pretrained(tmp_path / "plain")
    for name, reason in (("plain", "has no layer plan: name a run"), ("missing", "neither a folder nor a hub id")):
        assert main(["figure", str(tmp_path / name), "--out", str(out)]) == 1
        assert reason in capsys.readouterr().err
