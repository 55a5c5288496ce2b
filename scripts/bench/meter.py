"""Time and memory of a call: CUDA events and graphs on a GPU, a clock on the CPU."""

import contextlib
import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .inputs import randn


class Step:
    """One call of an implementation: forward, or forward and backward."""

    def __init__(self, run: Callable[[], Tensor], leaves: Sequence[Tensor], backward: bool, env: dict[str, str]):
        self.run, self.leaves, self.backward, self.env, self.dy = run, leaves, backward, env, None

    def __call__(self):
        if not self.backward:
            with torch.no_grad():
                return self.run()
        y = self.run()
        if self.dy is None and y.dim():
            self.dy = randn(y.shape, y.device, y.dtype)
        return torch.autograd.grad(y, self.leaves, self.dy)


@dataclass
class Sampler:
    """Takes samples of a call's time, in milliseconds, until there are three that took `patience_ms` in all."""

    elapsed: Callable[[Callable], float]  # milliseconds of `work`
    work: Callable[[], object]
    count: int  # calls inside `work`
    patience_ms: float
    warm_up: bool = False  # run it before each sample: others ran since
    env: dict[str, str] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)

    def sample(self):
        if len(self.times) >= 3 and sum(self.times) * self.count >= self.patience_ms:
            return
        with environment(self.env):
            if self.warm_up:
                self.work()
            self.times.append(self.elapsed(self.work) / self.count)

    def median(self) -> tuple[float, float]:
        """The median, and the spread between quartiles relative to it."""
        times, count = sorted(self.times), len(self.times)
        return times[count // 2], (times[3 * count // 4] - times[count // 4]) / times[count // 2]


class Meter:
    def __init__(self, device: str, patience_ms: float):
        self.device, self.patience_ms = torch.device(device), patience_ms
        self.cuda = self.device.type == "cuda"
        self.l2 = torch.cuda.get_device_properties(self.device).L2_cache_size if self.cuda else 0

    def sync(self):
        if self.cuda:
            torch.cuda.synchronize()

    def elapsed(self, work: Callable[[], object]) -> float:
        """Milliseconds of one call of `work`."""
        self.sync()
        if not self.cuda:
            start = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - start)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def sets(self, inputs: dict[str, Tensor]) -> int:
        """How many sets of such inputs it takes to overflow the L2 cache twice."""
        size = sum(t.nbytes for t in inputs.values())
        return min(8, max(1, math.ceil(2 * self.l2 / size)))

    def eager(self, steps: list[Step]) -> Sampler:
        """Steady-state time of a call, launched from Python."""
        with environment(steps[0].env):
            for step in steps:
                step()
            once = self.elapsed(steps[0])
        count = len(steps) * max(1, round(5 / (once * len(steps) + 1e-3)))
        count = min(max(count, 4), 64)  # more than one: before the first kernel of a sample the GPU waits for Python
        return Sampler(self.elapsed, _in_turn(steps, count), count, 10 * self.patience_ms, env=steps[0].env)

    def graph(self, steps: list[Step]) -> Sampler:
        """Time of a call replayed as part of a CUDA graph of about a millisecond."""
        once = self.elapsed(steps[0])
        torch.cuda.set_sync_debug_mode("error")  # a call that waits for the GPU cannot be captured: find out before
        try:
            steps[0]()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        count = len(steps) * min(8, max(1, round(1 / (once * len(steps)))))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # autograd's first use of a stream must not be in a capture
            for step in steps:
                step()
        torch.cuda.current_stream().wait_stream(side)
        self.sync()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=pool):
                _in_turn(steps, count)()
        except Exception:
            with contextlib.suppress(Exception):  # or the allocator stays in capture
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise
        graph.replay()
        return Sampler(self.elapsed, graph.replay, count, self.patience_ms, warm_up=True)

    def peak_mb(self, step: Step) -> float:
        """What a call allocates at its peak beyond its inputs, in 10^6 bytes."""
        self.sync()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = step()
        self.sync()
        del out
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def kernels(self, step: Step) -> list[list]:
        """[name, launches, microseconds] of each GPU kernel of a call, in the order of their first launch."""
        self.sync()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            self.sync()
        spent = {}
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                count, total = spent.get(event.name, (0, 0.0))
                spent[event.name] = count + 1, total + event.device_time_total
        return [[name, count, total] for name, (count, total) in spent.items()]

    def free(self):
        """Give memory back before others allocate theirs; on the CPU nothing is near its limit."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def poison(self):
        """Fill memory that calls get next with NaN, so that an element nobody wrote shows."""
        if self.cuda:
            large = [torch.full((2**28,), math.nan, device=self.device) for _ in range(4)]
            small = [torch.full((2**17,), math.nan, device=self.device) for _ in range(128)]
            del large, small

    def ceilings(self) -> dict[str, float]:
        """The rates that floors are counted with: a large copy, read and written, and a large bfloat16 product."""
        size, side, dtype = (2**32, 8192, torch.bfloat16) if self.cuda else (2**24, 256, torch.float32)
        source = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        copy_ms = self._median(lambda: target.copy_(source), 1)
        product_ms = self._median(lambda: (a @ b, a @ b, a @ b, a @ b), 4)
        return {"bytes_per_s": 2e3 * size / copy_ms, "flop_per_s": 2e3 * side**3 / product_ms}

    def _median(self, work, count):
        work()
        sampler = Sampler(self.elapsed, work, count, self.patience_ms)
        for _ in range(30):
            sampler.sample()
        return sampler.median()[0]


@contextlib.contextmanager
def environment(variables: dict[str, str]):
    """A context with these environment variables."""
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
        os.environ.update(before)


def _in_turn(steps, count):
    def work():
        for i in range(count):
            steps[i % len(steps)]()

    return work
