"""One call that replaces attention in a model in memory."""

import pytest
import torch
from decoding import logits, tokens

from transpoint.students import StudentConfig, StudentError, build_student, swap
from transpoint.teachers.random import random_teacher


def assert_same(student, wanted):
    assert student.config.mixers == wanted.config.mixers
    found, wanted = student.state_dict(), wanted.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_with_attention_to_the_end_it_is_the_model(family):
    teacher = random_teacher(f"random-{family}", 3)[0]
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = swap(teacher, [0, -1], "transmamba", trans_points="inf")
    assert student.config.mixers == ["transmamba", "attention", "attention", "transmamba"]
    torch.testing.assert_close(logits(student, tokens()), logits(teacher, tokens()), rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # nothing of it is the model's own
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize(
    "layers, kept", [([1, -1], [0, 2]), (2, [0, 1, 3]), ("every:2", [0, 2]), (0.5, [0, 2]), (range(4), [])]
)
def test_it_is_a_student_that_keeps_the_others(layers, kept):
    teacher = random_teacher("random-qwen2", 3)[0]
    wanted = build_student(teacher, StudentConfig("mamba2", kept, conv_kernel=2))
    assert_same(swap(teacher, layers, conv_kernel=2), wanted)


@pytest.mark.parametrize("options", [("mamba2", {"rope": True}), ("transmamba", {"trans_points": [5, 6, 7, "inf"]})])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_of_a_student_it_replaces_further_layers(family, options):
    """As if the student had been made in one, and also of what training has made of its own attention."""
    mixer, given = options
    teacher = random_teacher(f"random-{family}", 3)[0]
    student = swap(teacher, [0], mixer, **given)
    assert_same(swap(student, [2], mixer, **given), swap(teacher, [0, 2], mixer, **given))
    with torch.no_grad():
        mixers = {0: student.mixer_layers()[0].out.weight, 2: student.attention_layers()[2].o_proj.weight}
        for weight in mixers.values():
            weight.mul_(3)
    points = {"trans_points": 9} if mixer == "transmamba" else {}
    further = swap(student, [-2], mixer, **points)  # other options are the student's
    for layer, weight in mixers.items():
        assert torch.equal(further.mixer_layers()[layer].out.weight, weight)
    if points:
        assert further.trans_points == [5, float("inf"), 9, float("inf")]
    else:
        assert further.mixer_layers()[2].rope
    assert_same(swap(further, [1, 3], mixer), swap(swap(further, [3], mixer), [1], mixer))


@pytest.fixture(scope="module")
def student():
    return swap(random_teacher("random-llama", 3)[0], 1)


@pytest.mark.parametrize(
    "layers, given, told",
    [
        ([4], {}, "layers holds layer 4, the teacher has 0 to 3"),
        ([True], {}, "layers holds True; expected a list of layer indices, 'every:N'"),
        ("select:2", {}, "layers is 'select:2'; expected a list .* or a fraction from 0 to 1$"),
        ([], {}, r"layers is \[\]: none of 4 layers, so there is nothing to replace"),
        ([0, 1], {}, r"layers is \[0, 1\]: layer 1 has no attention, it is mamba2 already"),
        ([0], {"mixer": "gdn"}, "mixer is 'gdn', and the student's is mamba2: a student has one kind of mixer"),
        ([0], {"mixer": "mamba9"}, "student.mixer is 'mamba9'; expected one of mamba2"),
        ([0], {"taps": 3}, "a mamba2 mixer has no option taps: it has conv_kernel, "),
        ([0], {"trans_points": 3}, "a mamba2 mixer has no option trans_points: it has conv_kernel, "),
        ([0], {"conv_kernel": 9}, "student.conv_kernel is 9; expected 1 to 4"),
        ([0], {"rope": True}, "student.rope is True, and False in the student to start from"),
    ],
)
def test_what_cannot_be_replaced_is_refused(student, layers, given, told):
    with pytest.raises(StudentError, match=told) as caught:
        swap(student, layers, **given)
    assert "\n" not in str(caught.value)


def test_what_is_no_model_is_refused():
    with pytest.raises(StudentError, match="model is a str; expected a causal language model of transformers"):
        swap("smollm2-135m", [0])
