"""What launches do with Triton's compiler and launcher, in whose place there is a stand-in that works on the CPU."""

import pytest
import torch
from triton.runtime.errors import OutOfResources

from transpoint.kernels import launch
from transpoint.kernels.launch import launched


class Scale:
    """out = factor * x, as if it were a compiled kernel."""

    arg_names = ["x", "out", "factor", "BLOCK", "STAGES"]

    def __init__(self):
        self.compiled, self.launches, self.most_stages = [], 0, 9

    def warmup(self, x, out, factor, grid, BLOCK, STAGES, num_warps):
        assert not out.is_cuda and num_warps == 4
        self.compiled.append((x.dtype, BLOCK, STAGES))
        return Compiled(self, STAGES)


class Compiled:
    def __init__(self, kernel, stages):
        self.kernel, self.stages = kernel, stages

    @property
    def run(self):
        if self.stages > self.kernel.most_stages:
            raise OutOfResources(2, 1, "shared memory")

    def __getitem__(self, grid):
        def start(x, out, factor, BLOCK, STAGES, stream):
            assert grid == (1, 1, 1) and stream == 7 and STAGES == self.stages
            self.kernel.launches += 1
            out.copy_(x * factor)

        return start


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "_stream", lambda device: 7)
    launch.forget()
    yield Scale()
    launch.forget()


def scaled(kernel, runs, copies=False, dtype=torch.float32):
    """A function that launches two kernels; `runs` collects whether a run of it was a dry one."""

    def function(run, x, y, factor):
        runs.append(run.dry)
        parts = []
        for t in (x, y):
            t = t.clone() if copies else t
            parts.append(run.like(t))
            run(kernel, (1,), t, parts[-1], factor, BLOCK=len(t), STAGES=3, num_warps=4)
        return tuple(parts)

    return function


def check(function, x, y, factor):
    for got, t in zip(launched(function, x, y, factor), (x, y), strict=True):
        assert torch.equal(got, t * factor)


def test_a_kind_of_call_is_compiled_and_run_once_and_then_repeated(kernel):
    runs = []
    function = scaled(kernel, runs)
    for _ in range(3):  # with other tensors every time, in other memory
        check(function, torch.randn(4), torch.randn(5), 2.0)
    assert runs == [True, False] and kernel.launches == 6
    assert sorted(kernel.compiled, key=str) == [(torch.float32, 4, 3), (torch.float32, 5, 3)]


def test_what_differs_in_kind_is_not_repeated(kernel):
    runs = []
    function = scaled(kernel, runs)
    x = torch.randn(8)
    check(function, x[:4], x[4:], 2.0)
    for other in (x[:3], x[:4].double(), x[::2], x[1:5]):  # shape, dtype, stride, alignment
        before = len(runs)
        check(function, other, x[4:], 2.0)
        assert runs[before:] == [True, False]
    check(function, x[:4], x[4:], 3.0)
    assert runs[-2:] == [True, False]
    launch.forget()
    check(function, x[:4], x[4:], 2.0)
    assert runs[-2:] == [True, False]


def test_a_tensor_in_two_places_does_not_stand_for_both(kernel):
    function = scaled(kernel, [])
    x = torch.randn(4)
    check(function, x, x, 2.0)
    check(function, x, torch.randn(4), 2.0)
    check(function, x, x, 2.0)


def test_functions_that_copy_their_arguments_are_run_every_time(kernel):
    runs = []
    function = scaled(kernel, runs, copies=True)
    for _ in range(3):
        check(function, torch.randn(4), torch.randn(4), 2.0)
    assert runs == [True, False, False, False] and len(kernel.compiled) == 2


def test_fewer_stages_where_shared_memory_is_short(kernel):
    kernel.most_stages = 1
    function = scaled(kernel, [])
    check(function, torch.randn(4), torch.randn(5), 2.0)
    check(function, torch.randn(4), torch.randn(5), 2.0)
    assert {stages for *_, stages in kernel.compiled} == {3, 2, 1}
    kernel.most_stages = 0
    with pytest.raises(OutOfResources):
        check(function, torch.randn(6), torch.randn(5), 2.0)


def test_the_oldest_kind_is_forgotten(kernel, monkeypatch):
    monkeypatch.setattr(launch, "KINDS", 2)
    runs = []
    function = scaled(kernel, runs)
    for length in (1, 2, 3, 3, 2, 1):
        check(function, torch.randn(length), torch.randn(4), 2.0)
    assert len(runs) == 8 and len(launch._kinds) == 2
