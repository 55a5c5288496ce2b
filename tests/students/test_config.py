"""Which layers keep attention, and which student configs are refused."""

import pytest
from hypothesis import given, strategies as st

from transpoint.students import StudentConfig, StudentError, build_student, layer_plan
from transpoint.teachers.random import random_teacher

EXPECTED = "expected a list of layer indices, 'every:N' with N of at least 2, a fraction from 0 to 1, or 'select:K'"


def kept(keep, num_layers):
    """Layers that keep attention."""
    plan = layer_plan(StudentConfig(keep_attention=keep), num_layers)
    assert len(plan) == num_layers and set(plan) <= {"attention", "mamba2"}
    return [layer for layer, mixer in enumerate(plan) if mixer == "attention"]


@pytest.mark.parametrize(
    "keep, num_layers, layers",
    [
        ([], 4, []),
        ([0, 3], 4, [0, 3]),
        ((2,), 4, [2]),
        ([-1, -4], 6, [2, 5]),
        ([5, -1, 5], 6, [5]),
        ("every:2", 6, [1, 3, 5]),
        ("every:2", 5, [1, 3]),
        ("every:4", 12, [3, 7, 11]),
        ("every:12", 8, []),
        (0, 8, []),
        (0.0, 8, []),
        (0.5, 8, [1, 3, 5, 7]),
        (0.25, 8, [2, 6]),
        (0.25, 30, [1, 5, 9, 13, 16, 20, 24, 28]),
        (0.1, 4, []),
    ],
)
def test_layers_that_keep_attention(keep, num_layers, layers):
    if keep == 0.25 and num_layers == 30:
        assert len(kept(keep, num_layers)) == 8  # 7.5, to the even one
    assert kept(keep, num_layers) == layers


@given(st.floats(0, 1), st.integers(1, 80))
def test_a_fraction_keeps_its_share_evenly_spaced(fraction, num_layers):
    count = round(fraction * num_layers)
    if count == num_layers:
        with pytest.raises(StudentError, match=f"all {num_layers} layers keep attention"):
            kept(fraction, num_layers)
        return
    layers = kept(fraction, num_layers)
    assert len(layers) == count
    gaps = [b - a for a, b in zip(layers, layers[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    if layers:  # as far from one end as from the other
        assert abs(layers[0] - (num_layers - 1 - layers[-1])) <= 1


@given(st.data(), st.integers(2, 40))
def test_a_list_keeps_exactly_its_layers(data, num_layers):
    layers = data.draw(st.lists(st.integers(-num_layers, num_layers - 1), max_size=num_layers))
    positive = sorted({layer % num_layers for layer in layers})
    if len(positive) == num_layers:
        with pytest.raises(StudentError, match="nothing to convert"):
            kept(layers, num_layers)
    else:
        assert kept(layers, num_layers) == positive


@pytest.mark.parametrize("keep", [[0, 1, 2, 3], [0, 1, 2, -1], 1, 1.0, 0.9])
def test_keeping_every_layer_is_refused(keep):
    with pytest.raises(StudentError) as caught:
        kept(keep, 4)
    assert str(caught.value) == (
        f"student.keep_attention is {keep!r}: all 4 layers keep attention, so there is nothing to convert"
    )


@pytest.mark.parametrize("layer", [4, 30, -5])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(StudentError) as caught:
        kept([0, layer], 4)
    assert str(caught.value) == f"student.keep_attention holds layer {layer}, the teacher has 0 to 3"


@pytest.mark.parametrize(
    "keep, shown",
    [
        ("every:1", "is 'every:1'"),
        ("every:0", "is 'every:0'"),
        ("every:", "is 'every:'"),
        ("every:-2", "is 'every:-2'"),
        ("every:1.5", "is 'every:1.5'"),
        ("every", "is 'every'"),
        ("all", "is 'all'"),
        ("", "is ''"),
        (1.5, "is 1.5"),
        (-0.1, "is -0.1"),
        (2, "is 2"),
        (float("nan"), "is nan"),
        (True, "is True"),
        ([0, 1.0], "holds 1.0"),
        (["0"], "holds '0'"),
        ([True], "holds True"),
    ],
)
def test_a_malformed_keep_attention_is_refused_with_or_without_a_teacher(keep, shown):
    for refuse in (lambda: kept(keep, 4), StudentConfig(keep_attention=keep).check):
        with pytest.raises(StudentError) as caught:
            refuse()
        assert str(caught.value) == f"student.keep_attention {shown}; {EXPECTED}"


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("mixer", "mamba3", "student.mixer is 'mamba3'; expected one of mamba2"),
        ("mixer", "attention", "student.mixer is 'attention'; expected one of mamba2"),
        ("conv_kernel", 0, "student.conv_kernel is 0; expected 1 to 4"),
        ("conv_kernel", 5, "student.conv_kernel is 5; expected 1 to 4"),
        ("conv_activation", "gelu", "student.conv_activation is 'gelu'; expected silu, null or auto"),
    ],
)
def test_a_value_no_student_can_have_is_refused(field, value, message):
    config = StudentConfig(**{field: value})
    with pytest.raises(StudentError) as caught:
        config.check()
    assert str(caught.value).startswith(message)
    with pytest.raises(StudentError, match=message):
        build_student(random_teacher("random-llama")[0], config)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("activation", ["silu", None])
def test_values_a_student_can_have_pass(kernel, activation):
    StudentConfig(conv_kernel=kernel, conv_activation=activation, keep_attention=[-3, 200]).check()


def test_the_mixers_of_a_student_are_as_planned():
    teacher = random_teacher("random-llama", num_hidden_layers=6)[0]
    config = StudentConfig(keep_attention="every:3", conv_kernel=2, conv_activation=None, norm=False, rope=True)
    student = build_student(teacher, config)
    assert student.config.mixers == layer_plan(config, 6) == ["mamba2", "mamba2", "attention"] * 2
    mixers = student.mixer_layers()
    assert [mixer is None for mixer in mixers] == [False, False, True] * 2
    assert mixers[0].conv1d.weight.shape[-1] == 2 and mixers[0].norm is None and mixers[0].rope and mixers[0].gate
    assert mixers[0].conv_activation is None


def test_what_is_not_set_is_the_mixers_own():
    teacher = random_teacher("random-qwen3")[0]
    plain = build_student(teacher, StudentConfig())
    assert plain.config.mixers == ["mamba2", "attention"] * 2
    expected = {"conv_kernel": 4, "conv_activation": "silu", "gate": True, "norm": True, "rope": False, "qk_norm": True}
    assert {name: plain.config.mixer_options[name] for name in expected} == expected
    plain = build_student(teacher, StudentConfig(mixer="transmamba"))
    assert plain.config.mixers == ["transmamba"] * 4
    expected = {"conv_kernel": 0, "conv_activation": None, "gate": False, "norm": False, "rope": True, "qk_norm": True}
    assert {name: plain.config.mixer_options[name] for name in expected} == expected


@pytest.mark.parametrize("mixer", ["mamba2", "transmamba"])
def test_what_is_set_stays(mixer):
    options = {"conv_kernel": 2, "conv_activation": None, "gate": False, "norm": True, "rope": False, "qk_norm": False}
    config = StudentConfig(mixer=mixer, keep_attention=[2], **options)
    assert {**config.mixer_options, **options} == config.mixer_options == config.resolved().mixer_options
    assert layer_plan(config, 4) == [mixer, mixer, "attention", mixer]


def test_only_transmamba_goes_without_a_convolution():
    StudentConfig(mixer="transmamba", conv_kernel=0).check()
    with pytest.raises(StudentError, match="^student.conv_kernel is 0; expected 1 to 4$"):
        StudentConfig(conv_kernel=0).check()
    with pytest.raises(
        StudentError, match="^student.conv_activation is 'silu' without a convolution; set student.conv_k"
    ):
        StudentConfig(mixer="transmamba", conv_activation="silu").check()
