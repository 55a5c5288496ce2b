"""Layer plans of published hybrids, by name."""

import pytest
import torch
from decoding import logits, tokens

from transpoint.students import MIXERS, PLANS, StudentConfig, StudentError, build_student, layer_plan
from transpoint.teachers.random import random_teacher

pytestmark = pytest.mark.stack
LETTERS = {"attention": "A", "softmax": "S", "mamba2": "M"}


@pytest.mark.parametrize(
    ("plan", "layers", "letters"),
    [
        ("jamba", 16, "MMMMAMMM" * 2),
        ("jamba", 14, "MMMMAMMMMMMMAM"),
        ("jamba", 4, "MMAM"),
        ("jamba", 2, "MA"),
        ("samba", 5, "MSMSM"),
        ("samba", 2, "MS"),
        ("mambaformer", 6, "MSMSMS"),
        ("zamba", 16, "MMMMMSMMMMMSMMMM"),
        ("zamba", 9, "MMMSMMMSM"),
        ("zamba", 4, "MSMS"),
    ],
)
def test_which_layers_keep_attention(plan, layers, letters):
    assert "".join(LETTERS[mixer] for mixer in layer_plan(StudentConfig(plan=plan), layers)) == letters


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_takes_every_mixer(plan):
    teacher, _ = random_teacher("random-llama")
    for mixer in MIXERS:
        config = StudentConfig(mixer, plan=plan)
        if PLANS[plan].attention and mixer == "softmax":
            with pytest.raises(StudentError) as caught:
                config.check()
            assert str(caught.value) == (
                f"student.mixer is softmax, which is what student.plan={plan} makes of kept attention: name another "
                "mixer"
            )
        else:
            student = build_student(teacher, config)
            assert student.config.mixers == layer_plan(config, 4)
            assert logits(student, tokens()).isfinite().all()


def test_what_a_plan_makes_of_attention_can_be_said_otherwise_or_without_it():
    teacher, _ = random_teacher("random-llama")
    named = build_student(teacher, StudentConfig(plan="samba"))
    assert named.config.options_of("softmax") == {
        "attention_window": 2048,
        "attention_positions": True,
        "attention_shared_rank": None,
    }
    narrow = StudentConfig(plan="samba", attention_window=5)
    said = StudentConfig(keep_attention="every:2", attention_window=5)
    found, expected = (logits(build_student(teacher, config), tokens()) for config in (narrow, said))
    assert torch.equal(found, expected) and not torch.equal(found, logits(named, tokens()))
    assert build_student(teacher, StudentConfig(plan="jamba")).config.other_options is None
    facts = [StudentConfig(plan=plan).facts() for plan in (None, *PLANS)]
    assert all(facts.count(one) == 1 for one in facts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": "hymba"}, "student.plan is 'hymba'; expected one of jamba, samba, mambaformer, zamba, or null"),
        (
            {"plan": "jamba", "keep_attention": "every:4"},
            "student.keep_attention is 'every:4', and student.plan=jamba says which layers keep attention: set one of "
            "them to null",
        ),
        ({"plan": "samba"}, "student.plan is samba, which takes 2 layers or more, and the teacher has 1"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(options, message):
    teacher, _ = random_teacher("random-llama", num_hidden_layers=1)
    with pytest.raises(StudentError) as caught:
        build_student(teacher, StudentConfig(**options))
    assert str(caught.value) == message
