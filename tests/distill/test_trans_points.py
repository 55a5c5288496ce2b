"""Which TransPoints each step trains at, against their definitions written out, and what a schedule costs."""

import math

import pytest
import torch
from hypothesis import given, strategies as st

from transpoint.distill.measure.cost import cache_bytes, measure_cost
from transpoint.distill.settings import AnnealConfig, DistillConfig
from transpoint.distill.trans_points import annealed, at_trans_points, describe, resolve, trans_points_in_step
from transpoint.students import StudentConfig, StudentError, build_student
from transpoint.teachers.random import random_teacher

LENGTH = 512
targets = st.integers(0, 2 * LENGTH) | st.just(math.inf)
shapes = st.sampled_from(["linear", "log"])


@pytest.fixture(scope="module")
def student():
    """Layers: TransMamba at 0, kept attention, TransMamba at 16, TransMamba at 32."""
    teacher, _ = random_teacher("random-llama")
    config = StudentConfig(mixer="transmamba", keep_attention=[1], trans_points=[0, "inf", 16, 32])
    return build_student(teacher, config)


# Annealing


@given(targets, shapes)
def test_annealing_is_exact_at_both_ends(target, shape):
    assert annealed(target, LENGTH, 0.0, shape) == math.inf
    assert annealed(target, LENGTH, 1.0, shape) == target == annealed(target, LENGTH, 1.5, shape)


@given(targets, shapes, st.floats(0.001, 1), st.floats(0.001, 1))
def test_annealing_falls_from_the_length_to_the_target(target, shape, a, b):
    early, late = (annealed(target, LENGTH, progress, shape) for progress in (min(a, b), max(a, b)))
    assert early >= late
    assert all(point == target if target >= LENGTH else target <= point <= LENGTH for point in (early, late))
    assert all(isinstance(point, int) or point == math.inf for point in (early, late))


def test_the_shapes_of_annealing():
    assert [annealed(0, 1000, p, "linear") for p in (0.1, 0.25, 0.5, 0.9)] == [900, 750, 500, 100]
    assert [annealed(100, 1000, p, "linear") for p in (0.1, 0.5)] == [910, 550]
    halves = [annealed(0, 1023, p / 10, "log") + 1 for p in range(1, 11)]
    assert halves == [512, 256, 128, 64, 32, 16, 8, 4, 2, 1]
    assert annealed(255, 1023, 0.5, "log") + 1 == 512


def settings_of(fraction=None, shape="log", steps=101):
    return DistillConfig(steps=steps, anneal=AnnealConfig(fraction, shape))


def test_annealing_over_a_run():
    own = [0, math.inf, 16, 1024]
    path = [trans_points_in_step(step, [own], LENGTH, settings_of(0.5, "linear"), 0) for step in range(101)]
    assert path[0] == [math.inf] * 4
    assert path[25] == [256, math.inf, 264, 1024]
    assert path[50:] == [own] * 51 and path[49] != own
    to_the_end = [trans_points_in_step(step, [own], LENGTH, settings_of(1.0), 0) for step in range(101)]
    assert to_the_end[-1] == own and to_the_end[-2] != own
    assert trans_points_in_step(0, [own], LENGTH, settings_of(None), 0) == own


# Drawing


def test_drawing_depends_on_seed_and_step_alone():
    schedules = [[0], [16], [math.inf]]
    drawn = [trans_points_in_step(step, schedules, LENGTH, settings_of(), 3) for step in range(300)]
    again = [trans_points_in_step(step, schedules, LENGTH, settings_of(), 3) for step in reversed(range(300))]
    assert drawn == again[::-1]
    assert drawn != [trans_points_in_step(step, schedules, LENGTH, settings_of(), 4) for step in range(300)]
    assert all(70 < drawn.count(schedule) < 130 for schedule in schedules)


def test_drawing_and_annealing_together():
    schedules, settings = [[0], [math.inf]], settings_of(0.5)
    path = [trans_points_in_step(step, schedules, LENGTH, settings, 0)[0] for step in range(101)]
    plain = [trans_points_in_step(step, schedules, LENGTH, settings_of(), 0)[0] for step in range(101)]
    for step, (point, target) in enumerate(zip(path, plain, strict=True)):
        assert point == annealed(target, LENGTH, step / 50, "log")
    assert {0, math.inf} == set(path[50:])


# Of a student


def test_what_specs_mean_for_a_student(student):
    own = [0, "inf", 16, 32]
    found = resolve(student, [own, "mamba", "teacher", "uniform:8", 0, [0, 5, 16, 32]])
    assert found == {
        "[0, inf, 16, 32]": [0, math.inf, 16, 32],
        "mamba": [0, math.inf, 0, 0],
        "teacher": [math.inf] * 4,
        "uniform:8": [8, math.inf, 8, 8],
    }
    assert student.trans_points == [0, math.inf, 16, 32]
    with pytest.raises(StudentError, match="paper-v10"):
        resolve(student, ["paper-v10"])
    assert student.trans_points == [0, math.inf, 16, 32]


def test_another_schedule_for_a_while(student):
    with pytest.raises(KeyError), at_trans_points(student, "mamba"):
        assert student.trans_points == [0, math.inf, 0, 0]
        raise KeyError
    assert student.trans_points == [0, math.inf, 16, 32] and student.config.trans_points == [0, "inf", 16, 32]
    with at_trans_points(student):
        student.set_trans_points("teacher", warn=False)
    assert student.trans_points == [0, math.inf, 16, 32]
    mamba = build_student(random_teacher("random-llama")[0], StudentConfig())
    with at_trans_points(mamba, "teacher"):  # nothing to set
        assert mamba.config.mixers == ["mamba2", "attention"] * 2


def test_names():
    assert describe("paper-v9") == "paper-v9" and describe(64) == "64"
    assert describe([0, 8, 0, 8]) == "[0, 8] cycled" and describe([0, 8, 0, 8, 0]) == "[0, 8] cycled"
    assert describe([0, 8, "inf"]) == "[0, 8, inf]" and describe([4, 4]) == "[4] cycled"


# Cost


def test_cost_follows_the_schedule(student):
    length, costs = 64, {}
    for name in ("teacher", "own", "mamba"):
        with at_trans_points(student, None if name == "own" else name):
            costs[name] = measure_cost(student, length, tokens=4, trans_points=student.trans_points)
    assert [costs[name].attention for name in costs] == [1.0, (0 + 64 + 16 + 32) / (4 * 64), 0.25]
    token = 2 * 2 * 16 * 4  # keys and values, key/value heads, head_dim, float32
    state = 4 * 16 * 16 * 4
    assert costs["mamba"].cache_bytes == token * length + 3 * state == costs["own"].cache_bytes
    # Up to T = infinity a layer keeps keys and values alone.
    assert costs["teacher"].cache_bytes == 4 * token * length
    for cost in costs.values():
        assert cost.prefill_seconds > 0 and cost.decode_seconds > 0
        assert (cost.length, cost.dtype, cost.device) == (64, "float32", "cpu")


def test_cache_bytes_counts_memory_not_views(student):
    cache = student.new_cache()
    assert cache_bytes(cache) == 0
    student(torch.arange(3, 43)[None], cache=cache, use_cache=True)
    held = cache_bytes(cache)
    cache.layers[1].keys = cache.layers[1].keys[:, :, :5]  # a view holds on to all of it
    assert cache_bytes(cache) == held
