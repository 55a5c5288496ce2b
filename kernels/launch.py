"""How the Triton kernels of an op are launched: compiled all at once at the first call, and at little cost later.

Triton compiles a kernel when a call reaches it, one after another, and looks at every argument of every launch anew.
Here the function that launches an op's kernels runs twice at the first call of a kind: on memory that is not there, to
find what it launches, which threads then compile; and in earnest. Later calls of that kind launch what was compiled.
"""

import concurrent.futures
import contextlib
import os

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .backend import interpreted

KINDS = 1024  # of calls to remember
_kinds = {}


class Launches:
    """What the function of an op allocates memory and launches kernels with, as Triton would: `run(kernel, grid, ...)`.

    dry: whether this is the run that only finds the launches. It must reach them all, and so use `new` for all memory;
    it may add those of the backward pass, for them to be compiled along with the forward pass. Computing with that
    memory is to be avoided: on the "meta" device, PyTorch imports its decompositions for it, which takes seconds.
    """

    dry = False

    def __init__(self, device, compiled=()):
        self.device, self._next = device, iter(compiled).__next__
        if compiled:
            self._stream = triton.runtime.driver.active.get_current_stream(device.index)

    def new(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.device)

    def like(self, t):
        """Contiguous memory of t's shape and dtype."""
        return torch.empty(t.shape, dtype=t.dtype, device=self.device)

    def __call__(self, kernel, grid, *args, **constants):
        if interpreted():
            kernel[grid](*args, **constants)
            return
        compiled, expected, values = self._next()
        if constants == expected:
            compiled[(*grid, 1, 1)[:3]](*args, *values, stream=self._stream)
        else:  # someone changed the launch parameters
            kernel[grid](*args, **constants)


class _DryRun(Launches):
    dry = True

    def __init__(self):
        super().__init__(torch.device("meta"))
        self.launches = []

    def __call__(self, kernel, grid, *args, **constants):
        self.launches.append((kernel, args, constants))


def launched(function, *args):
    """function(Launches, *args), whose first argument is a tensor and tells the device; all others are hashable."""
    device = args[0].device
    if interpreted():
        return function(Launches(device), *args)
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kind = (function, device, torch.backends.cuda.matmul.allow_tf32, *map(_kind, args))
        compiled = _kinds.get(kind)
        if compiled is None:
            dry_run = _DryRun()
            function(dry_run, *args)
            compiled = _compile(dry_run.launches, device)
            while len(_kinds) >= KINDS:
                _kinds.pop(next(iter(_kinds)), None)
            _kinds[kind] = compiled
        return function(Launches(device, compiled), *args)


def _kind(arg):
    """What Triton's compiler or the choice of launch parameters may depend on."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.shape, arg.stride(), arg.data_ptr() % 16 == 0
    return type(arg), arg


def _compile(launches, device):
    """For each (kernel, args, constants): the compiled kernel, the constants, and their values in its order."""
    alike = {}  # launches that may have one kernel between them; two threads would both compile it
    for number, (kernel, _, constants) in enumerate(launches):
        alike.setdefault((kernel, *constants.items()), []).append(number)
    compiled = [None] * len(launches)

    def compile_alike(numbers):
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            for number in numbers:
                kernel, args, constants = launches[number]
                result, values = _compiled(kernel, args, constants)
                compiled[number] = result, constants, values

    with concurrent.futures.ThreadPoolExecutor(max(1, min(len(alike), os.cpu_count() or 1))) as pool:
        for done in [pool.submit(compile_alike, numbers) for numbers in alike.values()]:
            done.result()
    return compiled


def _compiled(kernel, args, constants):
    """The kernel, loaded, and its constants' values. Where shared memory does not hold it, with fewer stages."""
    while True:
        result = kernel.warmup(*args, grid=(1,), **constants)
        try:
            result.run  # noqa: B018 - loads it, and builds its launcher
        except OutOfResources:
            fewer = {name: constants[name] - 1 for name in ("num_stages", "STAGES") if constants.get(name, 1) > 1}
            if not fewer:
                raise
            constants = constants | fewer
        else:
            return result, tuple(constants[name] for name in kernel.arg_names[len(args) :])
