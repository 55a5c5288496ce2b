"""How an optimizer step runs, apart from what is trained."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from forked import in_two
from transpoint.distill.config import Recipe
from transpoint.distill.stages.processes import make_accelerator
from transpoint.distill.train.engines import make_engine

LR, DECAY = 0.1, 0.5


class Products(nn.Module):
    """The loss is the sum of the named parameters times `batch["x"]`; others take no part."""

    def __init__(self, names, side=2, **held):
        super().__init__()
        self.names = names
        for name, value in held.items():
            self.register_parameter(name, nn.Parameter(torch.full((side, side), value)))

    def forward(self, batch):
        loss = sum((getattr(self, name) * batch["x"]).sum() for name in self.names)
        return loss, {"loss": loss}

    def models(self):
        return []

    def compilable(self):
        return []

    def kind(self):
        return ()


def engine_of(module, accumulation=1, clip=1e9, accelerator=None, **options):
    groups = [{"parameters": dict(module.named_parameters()), "lr": LR, "weight_decay": DECAY}]
    return make_engine(module, groups, [0.9, 0.95], clip, accumulation, accelerator or Accelerator(cpu=True), **options)


def step_of_a_process(rank, folder):
    module = Products("ab" if rank else "a", a=1.0 + rank, b=1.0, c=1.0)
    engine = engine_of(module)
    assert engine.accelerator.num_processes == 2
    engine.forward_backward({"x": torch.tensor(3.0 + 2 * rank)}, last=True)
    norm, skipped = engine.step(1.0)
    assert not skipped
    torch.save({"norm": norm, **{name: p.detach() for name, p in module.named_parameters()}}, f"{folder}/{rank}.pt")
    engine.forward_backward({"x": torch.tensor(float("nan") if rank else 1.0)}, last=True)
    assert engine.step(1.0)[1]  # skipped by both


@pytest.mark.slow
def test_processes_average_their_gradients_and_leave_alone_what_none_has(tmp_path):
    in_two(step_of_a_process, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name])
    # Of `a` both begin with the first process's; gradients are 4 = (3 + 5) / 2 and 2.5 = (0 + 5) / 2, four of each.
    assert found[0]["norm"].item() == pytest.approx(2 * (4**2 + 2.5**2) ** 0.5)
    for name in "ab":  # of AdamW the first step is the learning rate, after weight decay
        torch.testing.assert_close(found[0][name], torch.full((2, 2), 1 - LR * DECAY - LR))
    assert torch.equal(found[0]["c"], torch.ones(2, 2))


def step_under_zero(rank):
    module = Products("abc", side=3, a=1.0, b=2.0, c=3.0)
    engine = engine_of(module, accelerator=make_accelerator(Recipe()))
    assert engine.shards and engine.accelerator.num_processes == 2
    for _ in range(2):
        assert not any(parameter.data_ptr() % 16 for parameter in module.parameters())
        engine.forward_backward({"x": torch.tensor(3.0 + 2 * rank)}, last=True)
        norm, skipped = engine.step(1.0)
        assert norm.item() == pytest.approx(4 * 27**0.5) and not skipped
    engine.forward_backward({"x": torch.tensor(float("nan") if rank else 1.0)}, last=True)
    assert engine.step(1.0)[1]
    state = engine.state()
    for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0)) if rank == 0 else ():
        for _ in range(2):
            value -= value * LR * DECAY + LR
        torch.testing.assert_close(state[f"parameter.{name}"], torch.full((3, 3), value))
        assert state[f"optimizer.exp_avg.{name}"].shape == (3, 3)


@pytest.mark.slow
def test_zero_aligns_parameters_as_compiled_layers_take_for_granted():
    """To 16 bytes, also where those before them have an odd count of numbers."""
    in_two(step_under_zero, engine="zero2")


@pytest.mark.parametrize("failing", [0, 1])
def test_a_backward_pass_that_cannot_be_compiled_runs_as_it_is(failing):
    """The second one of a step has added to gradients when it fails: that step is skipped, later ones are not."""
    module, said, passes = Products("ab", a=1.0, b=1.0), [], [0]

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            passes[0] += 1
            if passes[0] == failing + 1:
                raise TorchDynamoException("no such operation")
            return gradient

    forward = module.forward
    module.forward = lambda batch: (Fails.apply(forward(batch)[0]), {})
    engine = engine_of(module, accumulation=2, compile=True, say=said.append)
    for lost in (failing == 1, False):
        for micro in range(2):
            engine.forward_backward({"x": torch.tensor(2.0)}, last=micro == 1)
        norm, skipped = engine.step(1.0)
        assert bool(skipped) == lost
        if not lost:
            assert norm.item() == pytest.approx(2 * 8**0.5)
    assert len(said) == 1 and "no such operation" in said[0]
    engine.close()
