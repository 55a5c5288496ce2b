"""How the Triton kernels of an op are launched: compiled all at once at the first call, and at little cost later.

Triton compiles a kernel when a call reaches it, one after another, and looks at every argument of every launch anew.
Here the function that launches an op's kernels runs twice at the first call of a kind: on memory that is not there, to
find what it launches, which threads then compile; and in earnest, when what it allocates and launches is recorded.
Later calls of that kind do not run the function, but what was recorded.
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

    def __init__(self, device):
        self.device = device

    def new(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.device)

    def like(self, t):
        """Contiguous memory of t's shape and dtype."""
        return self.new(*t.shape, dtype=t.dtype)

    def __call__(self, kernel, grid, *args, **constants):
        kernel[grid](*args, **constants)


class _DryRun(Launches):
    dry = True

    def __init__(self):
        super().__init__(torch.device("meta"))
        self.launches = []

    def __call__(self, kernel, grid, *args, **constants):
        self.launches.append((kernel, args, constants))


class _Compiled(Launches):
    """Runs compiled kernels."""

    def __init__(self, device, compiled):
        super().__init__(device)
        self._compiled = iter(compiled)
        self._stream = _stream(device)

    def __call__(self, kernel, grid, *args, **constants):
        compiled, values = next(self._compiled)
        compiled[(*grid, 1, 1)[:3]](*args, *values, stream=self._stream)


class _Recorded(_Compiled):
    """Records what can be run again with other tensors of the same kind.

    The tensors of a call are numbered: first the arguments of the function, then what it allocates.
    """

    def __init__(self, device, compiled, args):
        super().__init__(device, compiled)
        self._tensors = list(args)
        self.allocations, self.launches, self.outputs = [], [], None
        # Whether all tensors that kernels get are arguments or allocated here, and which one is certain.
        tensors = [id(arg) for arg in args if isinstance(arg, Tensor)]
        self.complete = len(set(tensors)) == len(tensors)

    def new(self, *shape, dtype=torch.float32):
        tensor = super().new(*shape, dtype=dtype)
        self._tensors.append(tensor)
        self.allocations.append((shape, dtype))
        return tensor

    def __call__(self, kernel, grid, *args, **constants):
        compiled, values = next(self._compiled)
        args, grid = [*args, *values], (*grid, 1, 1)[:3]
        launch = compiled[grid]
        launch(*args, stream=self._stream)
        tensors = [(place, self._number(arg)) for place, arg in enumerate(args) if isinstance(arg, Tensor)]
        for place, _ in tensors:
            args[place] = None  # not to be kept alive
        self.launches.append((launch, args, tensors))

    def finish(self, outputs):
        several = isinstance(outputs, tuple)
        numbers = [self._number(t) for t in (outputs if several else (outputs,))]
        self.outputs = numbers if several else numbers[0]
        del self._tensors

    def again(self, args):
        tensors = list(args)
        for shape, dtype in self.allocations:
            tensors.append(torch.empty(shape, dtype=dtype, device=self.device))
        stream = _stream(self.device)
        for launch, template, places in self.launches:
            arguments = template.copy()
            for place, number in places:
                arguments[place] = tensors[number]
            launch(*arguments, stream=stream)
        if isinstance(self.outputs, list):
            return tuple([tensors[number] for number in self.outputs])
        return tensors[self.outputs]

    def _number(self, tensor):
        for number, known in enumerate(self._tensors):
            if known is tensor:
                return number
        self.complete = False
        return -1


def launched(function, *args, record=True):
    """function(Launches, *args), whose first argument is a tensor and tells the device; those not tensors are hashable.

    record: whether the function does nothing but allocate and launch, and copy arguments where they need it.
    """
    device = args[0].device
    if interpreted():
        return function(Launches(device), *args)
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kind = (function, device, torch.backends.cuda.matmul.allow_tf32, *map(_kind, args))
        recorded, compiled = _kinds.get(kind, (None, None))
        if recorded is not None:
            return recorded.again(args)
        if compiled is not None:
            return function(_Compiled(device, compiled), *args)
        dry_run = _DryRun()
        function(dry_run, *args)
        compiled = _compile(dry_run.launches, device)
        run = _Recorded(device, compiled, args) if record else _Compiled(device, compiled)
        outputs = function(run, *args)
        if record:
            run.finish(outputs)
        while len(_kinds) >= KINDS:
            _kinds.pop(next(iter(_kinds)), None)
        _kinds[kind] = run if record and run.complete else None, compiled
        return outputs


def forget():
    """Forget all kinds of calls, for launch parameters that have been changed since."""
    _kinds.clear()


def _kind(arg):
    """What Triton's compiler or the choice of launch parameters may depend on."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.shape, arg.stride(), arg.data_ptr() % 16 == 0
    return type(arg), arg


def _stream(device):
    return triton.runtime.driver.active.get_current_stream(device.index)


def _compile(launches, device):
    """For each (kernel, args, constants): the compiled kernel, and the constants' values in its order."""
    alike = {}  # launches that may have one kernel between them; two threads would both compile it
    for number, (kernel, _, constants) in enumerate(launches):
        alike.setdefault((kernel, *constants.items()), []).append(number)
    compiled = [None] * len(launches)

    def compile_alike(numbers):
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            for number in numbers:
                compiled[number] = _compiled(*launches[number])

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
