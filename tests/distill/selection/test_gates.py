"""Gates: what a pass gives at 0 and 1, that their gradients are right, and which close first."""

import pytest
import torch

from transpoint.distill.measure.recall import Item
from transpoint.distill.selection.gates import trained_gates
from transpoint.distill.selection.judge import Judge
from transpoint.distill.selection.stand_ins import mixers, windows
from transpoint.students import StudentConfig, build_student
from transpoint.teachers.random import random_teacher

TEXTS = torch.randint(3, 250, (2, 32), generator=torch.Generator().manual_seed(0))
ITEMS = [Item(TEXTS[0], [(20, 23), (28, 30)])]


@pytest.fixture(scope="module")
def judge():
    teacher = random_teacher("random-llama")[0].requires_grad_(False)
    student = build_student(teacher, StudentConfig(keep_attention=[])).requires_grad_(False)
    return Judge(teacher, mixers(student), windows(teacher, 3), TEXTS, ITEMS)


@pytest.mark.parametrize("gates", [(1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 0, 1)])
def test_gates_that_are_open_or_closed_are_a_set(judge, gates):
    score = judge.score(layer for layer, gate in enumerate(gates) if not gate)
    gates = torch.tensor(gates, dtype=torch.float32)
    assert judge.losses(gates, 0)[0].item() == pytest.approx(score.kl, abs=1e-6)
    assert judge.losses(gates, 1)[1].item() == pytest.approx(score.recall, abs=1e-5)
    assert judge.losses(gates, 0)[1] == 0 and judge.losses(gates, 1)[0] == 0


@pytest.mark.parametrize("number", [0, 1])
def test_gradients_of_gates(judge, number):
    gates = torch.tensor([0.3, 0.6, 0.8, 0.5], requires_grad=True)
    sum(judge.losses(gates, number)).backward()
    for layer in range(4):
        step = torch.zeros(4)
        step[layer] = 1e-2
        with torch.no_grad():
            ahead, behind = (sum(judge.losses(gates + sign * step, number)).item() for sign in (1, -1))
        assert gates.grad[layer].item() == pytest.approx((ahead - behind) / 2e-2, rel=0.05, abs=1e-4)
    assert not any("forward" in vars(module) for module in judge.teacher.modules())


def test_a_layer_that_matters_more_closes_later(judge):
    gates = trained_gates(judge, 40, 0.3, 3.0, kl_weight=20.0, recall_weight=0.0)
    alone = {layer: score.kl for layer, score in judge.toggled((), range(4)).items()}
    assert max(gates, key=gates.get) == max(alone, key=alone.get)
    assert all(0 < gate < 1 for gate in gates.values()) and len(set(gates.values())) == 4
