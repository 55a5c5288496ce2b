"""A teacher with stand-ins: the same from below and from the middle, and afterwards as before."""

import itertools

import pytest
import torch

from families import tiny_teacher
from transpoint.distill.measure.recall import Item, answered
from transpoint.distill.selection.judge import POSITIONS, Judge
from transpoint.distill.selection.stand_ins import mixers, windows
from transpoint.students import StudentConfig, build_student
from transpoint.teachers.random import random_teacher

TEXTS = torch.randint(3, 250, (3, 40), generator=torch.Generator().manual_seed(0))
ITEMS = [Item(TEXTS[0, :30], [(20, 23), (28, 30)]), Item(TEXTS[1, :25], [(20, 25)])]


def judge_of(teacher, stand_ins, *args, **options):
    return Judge(teacher, stand_ins, stand_ins, *args, **options)


@pytest.fixture(scope="module")
def teacher():
    return random_teacher("random-llama")[0].requires_grad_(False)


def test_with_nothing_replaced_nothing_is_lost(teacher):
    score = judge_of(teacher, windows(teacher, 4), TEXTS, ITEMS).score(())
    assert score.kl == pytest.approx(0, abs=1e-6) and score.recall == 0
    right = [ok for one in answered(teacher, ITEMS) for ok, _ in one]
    assert score.accuracy == sum(right) / len(right)


def test_windows_that_see_everything_lose_nothing(teacher):
    score = judge_of(teacher, windows(teacher, 64), TEXTS, ITEMS).score(range(4))
    assert score.kl == pytest.approx(0, abs=1e-6) and score.recall == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "olmo2"])
def test_a_layer_toggled_is_the_set_itself(family):
    """Layers below the one that is toggled are not computed again: what comes of it is the same."""
    teacher = tiny_teacher(family).requires_grad_(False)
    judge = judge_of(teacher, windows(teacher, 3), TEXTS, ITEMS, batch_tokens=64)
    layers = range(len(judge.layers))
    for replaced in ((), (1,), tuple(layers)):
        for layer, found in judge.toggled(replaced, layers).items():
            wanted = judge.score(frozenset(replaced) ^ {layer})
            assert found.kl == pytest.approx(wanted.kl, abs=1e-6)
            assert found.recall == pytest.approx(wanted.recall, abs=1e-5)
    some = [judge.score(set(pair)).kl for pair in itertools.combinations(layers, 2)]
    assert len({round(kl, 6) for kl in some}) == len(some)  # they do differ


def test_mixers_in_all_layers_are_the_student(teacher):
    student = build_student(teacher, StudentConfig(keep_attention=[]))
    found = judge_of(teacher, mixers(student), TEXTS, ITEMS).score(range(4))
    p, q = (model(TEXTS, use_cache=False).logits.log_softmax(-1) for model in (teacher, student))
    at = torch.arange(0, 40, max(1, 40 // POSITIONS))
    kl = (p.exp() * (p - q)).sum(-1)[:, at].mean().item()
    assert found.kl == pytest.approx(kl, rel=1e-4)
    own, students = ([logprob for one in answered(model, ITEMS) for _, logprob in one] for model in (teacher, student))
    assert found.recall == pytest.approx((sum(own) - sum(students)) / 10, rel=1e-4)


def test_each_measure_has_its_own_stand_ins(teacher):
    student = build_student(teacher, StudentConfig(keep_attention=[]))
    near, mixed = windows(teacher, 3), mixers(student)
    found = Judge(teacher, mixed, near, TEXTS, ITEMS).toggled((1,), [0, 1, 3])
    for layer, score in found.items():
        assert score.kl == judge_of(teacher, mixed, TEXTS, ITEMS).score({1} ^ {layer}).kl
        assert score.recall == judge_of(teacher, near, TEXTS, ITEMS).score({1} ^ {layer}).recall


def test_it_says_whenever_a_set_is_measured(teacher):
    told = []
    near = windows(teacher, 3)
    judge = Judge(teacher, near, near, TEXTS, ITEMS, on_measured=lambda: told.append(1))
    judge.toggled((), range(4))
    assert len(told) == 4 * len(judge.passes) == 8


def test_errors_of_mixers_add_up(teacher):
    near = windows(teacher, 3)
    judge = Judge(teacher, near, near, TEXTS, ITEMS, {0: 0.5, 2: 0.25})
    assert judge.score((0, 1, 2)).error == 0.75 and judge.score(()).error == 0
    assert {layer: score.error for layer, score in judge.toggled((0,), range(4)).items()} == {
        0: 0, 1: 0.5, 2: 0.75, 3: 0.5
    }  # fmt: skip
    assert judge_of(teacher, near, TEXTS, ITEMS).score((0,)).error is None


def test_the_teacher_is_as_before_whatever_happens(teacher):
    before = teacher(TEXTS, use_cache=False).logits
    judge = judge_of(teacher, windows(teacher, 3), TEXTS, ITEMS)
    judge.toggled((0, 2), range(4))
    assert torch.equal(teacher(TEXTS, use_cache=False).logits, before)

    def fails(hidden, rotary):
        raise MemoryError

    judge.passes[0].stand_ins[2] = fails
    with pytest.raises(MemoryError):
        judge.toggled((1,), [2])
    assert torch.equal(teacher(TEXTS, use_cache=False).logits, before)
    assert not any("forward" in vars(module) for module in teacher.modules())
