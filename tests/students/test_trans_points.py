"""TransPoints: what a recipe or a user may say of them, and what a student then warns of."""

import copy
import math
import warnings

import pytest
from hypothesis import given, strategies as st
from transformers import AutoConfig

from transpoint.students import (
    SCHEDULES,
    HybridConfig,
    HybridForCausalLM,
    StudentConfig,
    StudentError,
    build_student,
    parse_trans_points,
)
from transpoint.teachers.random import random_teacher

INF = math.inf
V9 = [0, 128, 256, 512, 1024, 2048, 4096, 8192]


@pytest.mark.parametrize(
    "spec, layers, points",
    [
        (0, 3, [0, 0, 0]),
        (7, 2, [7, 7]),
        (7.0, 2, [7, 7]),
        ("inf", 2, [INF, INF]),
        (INF, 2, [INF, INF]),
        ([0, "inf", 5, INF], 4, [0, INF, 5, INF]),
        ((3, 4.0), 2, [3, 4]),
        ("teacher", 2, [INF, INF]),
        ("mamba", 2, [0, 0]),
        ("uniform:0", 2, [0, 0]),
        ("uniform:512", 3, [512, 512, 512]),
        ("paper-v9", 10, [*V9, 0, 128]),
        ("paper-v9", 3, V9[:3]),
        ("paper-coarse", 7, [0, 1024, 2048, 6144, 8192, 0, 1024]),
        ("log:8192", 10, [*V9, 0, 128]),
        ("log:100", 8, [0, 1, 3, 6, 12, 25, 50, 100]),
    ],
)
def test_what_may_be_said(spec, layers, points):
    found = parse_trans_points(spec, layers)
    assert found == points and all(point == INF or type(point) is int for point in found)


def test_log_goes_up_to_the_longest_sequence():
    assert parse_trans_points("log", 8, longest=4096) == parse_trans_points("log:4096", 8)
    with pytest.raises(StudentError, match="^trans_points 'log' needs a length here: write log:N"):
        parse_trans_points("log", 8)


@given(st.sampled_from(["paper-v9", "paper-coarse", "log:640", "uniform:3", "teacher", "mamba"]), st.integers(1, 90))
def test_a_schedule_has_a_point_for_each_layer_whatever_comes_after(name, layers):
    points = parse_trans_points(name, layers)
    assert len(points) == layers and points == parse_trans_points(name, 90)[:layers]
    assert parse_trans_points(points, layers) == points


BAD = ["paper-v8", "uniform", "uniform:", "uniform:-1", "uniform:1.5", "log:", "log:x", "", -1, 1.5, True, None, {}]


@pytest.mark.parametrize("spec", BAD + [math.nan, -INF])
def test_anything_else_is_refused_naming_the_schedules(spec):
    with pytest.raises(StudentError) as caught:
        parse_trans_points(spec, 4)
    text = str(caught.value)
    assert text.startswith(f"trans_points is {spec!r}; expected a number of tokens") and "\n" not in text
    assert all(name in text for name in SCHEDULES)


@pytest.mark.parametrize("point", [-1, 1.5, True, None, "7", "paper-v9", [3], math.nan])
def test_an_entry_that_is_no_number_of_tokens_is_refused(point):
    with pytest.raises(StudentError) as caught:
        parse_trans_points([0, point], 2)
    assert str(caught.value) == f"trans_points holds {point!r}; expected a number of tokens, 0 or more, or inf"


@pytest.mark.parametrize("spec", [[], [1], [1, 2, 3]])
def test_a_list_has_an_entry_for_each_layer(spec):
    with pytest.raises(StudentError, match=f"^trans_points has {len(spec)} entries, the model has 2 layers$"):
        parse_trans_points(spec, 2)


@pytest.mark.parametrize("spec", [*BAD, [0, -1]])
def test_a_config_with_malformed_points_is_refused_without_a_teacher_too(spec):
    config = StudentConfig(mixer="transmamba", trans_points=spec)
    for refuse in (config.check, lambda: build_student(random_teacher("random-llama")[0], config)):
        with pytest.raises(StudentError, match="^trans_points "):
            refuse()


def test_a_students_points_are_those_of_its_config(make_student):
    student = make_student(keep_attention=(), mixer="transmamba", trans_points=[0, "inf", 5, INF])
    assert student.trans_points == [0, INF, 5, INF]
    assert student.config.trans_points == [0, "inf", 5, "inf"]
    assert [mixer.trans_point for mixer in student.mixer_layers()] == [0, INF, 5, INF]
    student.set_trans_points("uniform:3", warn=False)
    assert student.trans_points == [3] * 4 and student.config.trans_points == [3] * 4


def test_the_default_is_the_papers_best(make_student):
    assert make_student(keep_attention=(), mixer="transmamba").trans_points == V9[:4]


def test_log_takes_the_models_longest_sequence(make_student):
    student = make_student(keep_attention=(), mixer="transmamba", trans_points="log")
    assert student.config.max_position_embeddings == 512 and student.trans_points == [0, 8, 16, 32]


def test_layers_that_keep_attention_have_infinity_whatever_is_said(make_student):
    student = make_student(keep_attention=(1,), mixer="transmamba", trans_points=4)
    assert student.trans_points == [4, INF, 4, 4] and student.config.trans_points == [4, "inf", 4, 4]
    student.set_trans_points([1, 2, 3, 4], warn=False)
    assert student.trans_points == [1, INF, 3, 4]


def test_a_mamba2_student_has_none_to_set(make_student):
    student = make_student(keep_attention=(1,))
    assert student.trans_points == [0, INF, 0, 0] and student.config.trans_points is None
    with pytest.raises(StudentError, match="^this student has no transmamba layers, so there are no"):
        student.set_trans_points(3)


def test_malformed_points_leave_a_student_as_it_is(make_student):
    student = make_student(keep_attention=(), mixer="transmamba", trans_points=3)
    with pytest.raises(StudentError, match="expected a number of tokens"):
        student.set_trans_points("papr-v9")
    assert student.trans_points == [3] * 4 and student.config.trans_points == [3] * 4


RECORDS = [
    {"trans_points": [3] * 4, "trained": True, "quality": {"kl": 0.25, "perplexity": 30.5}},
    {"trans_points": [0] * 4, "trained": False, "quality": {"kl": 2.5, "perplexity": 99.0, "tokens": 5, "text": "abc"}},
    {"trans_points": [0, 2, 4, 8], "trained": True, "quality": None, "schedule": "steps"},
]
KNOWN = "; trained on 3 in every layer: kl 0.25, perplexity 30.5; trained on steps: unmeasured"
WARNED = {
    "measured": (0, f"this student was not trained on TransPoints 0 in every layer: kl 2.5, perplexity 99{KNOWN}"),
    "unknown": (
        [1, 2, 3, "inf"],
        f"this student was not trained on TransPoints [1, 2, 3, 'inf'], and nothing was measured with them{KNOWN}",
    ),
}


@pytest.fixture
def folder(make_student, tmp_path):
    """A saved student that was trained on two schedules and measured on a third."""
    student = make_student(keep_attention=(), mixer="transmamba", trans_points=3)
    student.config.measured_trans_points = copy.deepcopy(RECORDS)
    student.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("spec, text", WARNED.values(), ids=WARNED.keys())
def test_points_that_were_not_trained_are_warned_of_with_what_was_measured(folder, spec, text):
    def set_later():
        student = HybridForCausalLM.from_pretrained(folder)
        student.set_trans_points(spec)
        return student

    ways = {
        "set_trans_points": set_later,
        "from_pretrained": lambda: HybridForCausalLM.from_pretrained(folder, trans_points=spec),
        "config": lambda: HybridForCausalLM.from_pretrained(
            folder, config=AutoConfig.from_pretrained(folder, trans_points=spec)
        ),
    }
    for name, way in ways.items():
        with pytest.warns(UserWarning) as caught:
            student = way()
        assert [str(w.message) for w in caught if "TransPoints" in str(w.message)] == [text], name
        assert student.trans_points == parse_trans_points(spec, 4)


def test_points_that_were_trained_are_not_warned_of(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert HybridForCausalLM.from_pretrained(folder).trans_points == [3] * 4
        student = HybridForCausalLM.from_pretrained(folder, trans_points=[0, 2, 4, 8])
        student.set_trans_points(3)
        student.set_trans_points(7, warn=False)
    assert student.config.measured_trans_points == RECORDS


def test_without_records_only_other_points_are_warned_of(make_student):
    student = make_student(keep_attention=(), mixer="transmamba", trans_points=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student.set_trans_points("uniform:3")
    with pytest.warns(UserWarning, match="not trained on TransPoints 4 in every layer, and nothing was measured with"):
        student.set_trans_points(4)


def test_malformed_points_in_a_checkpoint_are_refused(folder):
    fields = HybridConfig.from_pretrained(folder).to_dict()
    for points, message in (([3] * 5, "has 5 entries"), ([3, 3, 3, -3], "holds -3"), (None, "trans_points is None")):
        with pytest.raises(ValueError, match=message):
            HybridConfig.from_dict(fields | {"trans_points": points})
