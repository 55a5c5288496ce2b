"""Training steps that leave Python out: layers compiled by torch.compile, and passes recorded as CUDA graphs."""

import gc
from collections.abc import Callable, Hashable
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor, nn

from ..run.files import one_line
from .protocols import Objective

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

FLEX = "flex_attention"
SPECIALISED = 64  # kinds of calls that one function is compiled for: layers of a model differ, and so do batches
SEEN = 3  # times that a kind of batch comes before its passes are recorded; compilers are done by then
RECORDED = 8  # kinds at most: each holds the memory of its gradients, and what it needs more than others meanwhile


@contextmanager
def compiled(objective: Objective, backend: str = "inductor"):
    """Compiles what `objective.compilable()` names, [(object, name of its function)], until it is left.

    Each is compiled whole: what would break its graph raises torch's TorchDynamoException at the first call. Functions
    that do the same, as those of a model's layers, are compiled once. Attention is flex_attention meanwhile, where the
    models have it: other kernels take packed documents as a dense mask only.
    """
    with ExitStack() as stack:
        options = {"recompile_limit": SPECIALISED, "accumulated_recompile_limit": 16 * SPECIALISED}
        stack.enter_context(torch._dynamo.config.patch(options))
        # What follows from saved tensors number by number is computed again in the backward pass, also where a product
        # reads it: a sixth of a layer's memory, for next to no time.
        stack.enter_context(torch._functorch.config.patch(ban_recompute_materialized_backward=False))
        for model in objective.models():
            before = model.config._attn_implementation
            if before != FLEX and model._supports_flex_attn:
                model.set_attn_implementation(FLEX)
                stack.callback(model.set_attn_implementation, before)
        for owner, name in objective.compilable():
            own, function = vars(owner).get(name), getattr(owner, name)
            setattr(owner, name, torch.compile(function, fullgraph=True, dynamic=False, backend=backend))
            # Without an attribute of its own, an object has the class's method again.
            stack.callback(*((delattr, owner, name) if own is None else (setattr, owner, name, own)))
        yield


class Recorded:
    """Forward and backward passes that are replayed as CUDA graphs, one for each kind of batch.

    A graph is the GPU's work alone: the host does nothing in between.

    Args:
        run: takes a batch, returns its loss and metrics, and adds to gradients.
        parameters: those that get gradients.
        adds: whether there may be gradients already. Otherwise those of a graph stay where it leaves them, until it is
            replayed.
        kind: whatever else the work depends on.
        say: takes one line, where recording turns out to be impossible; `run` goes on as it is then.
    """

    def __init__(
        self,
        run: Callable,
        parameters: list[nn.Parameter],
        adds: bool,
        kind: Callable[[], Hashable],
        say: Callable[[str], None],
    ):
        self._run, self._parameters, self._adds, self._kind, self._say = run, parameters, adds, kind, say
        self._seen: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, _Graph] = {}
        self._pool: _POOL_HANDLE | None = None

    def __len__(self) -> int:
        """How many kinds of batch are recorded."""
        return len(self._graphs)

    def __call__(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        kind = (self._kind(), *((name, tensor.shape, tensor.dtype) for name, tensor in batch.items()))
        if kind not in self._graphs:
            self._seen[kind] = self._seen.get(kind, 0) + 1
            if self._seen[kind] <= SEEN or len(self._graphs) == RECORDED:
                return self._run(batch)
            try:
                self._graphs[kind] = self._record(batch)
            except RuntimeError as error:
                self._seen[kind] = -(1 << 62)
                # The end of a recording fails too, and hides what went wrong before.
                line = one_line(error.__context__ or error)
                self._say(f"a step could not be recorded as a CUDA graph ({line}): it is launched from Python")
        if kind not in self._graphs:  # out of the handler, whose traceback holds the memory of the recording
            gc.collect()
            torch.cuda.empty_cache()
            return self._run(batch)
        recorded = self._graphs[kind]
        for name, tensor in batch.items():
            recorded.inputs[name].copy_(tensor)
        recorded.graph.replay()
        pairs = [(p, g) for p, g in zip(self._parameters, recorded.gradients, strict=True) if g is not None]
        if there := [(parameter.grad, gradient) for parameter, gradient in pairs if parameter.grad is not None]:
            torch._foreach_add_(*map(list, zip(*there, strict=True)))
        for parameter, gradient in pairs:
            if parameter.grad is None:
                parameter.grad = gradient.clone() if self._adds else gradient
        return recorded.outputs

    def _record(self, batch: dict[str, Tensor]) -> "_Graph":
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        before = [parameter.grad for parameter in self._parameters]
        torch.cuda.empty_cache()  # the graph has memory of its own, and what ran before it left as much behind
        try:
            for parameter in self._parameters:
                parameter.grad = None  # so that the graph makes its own
            # Other threads make batches ready meanwhile, in pinned memory.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                loss, metrics = self._run(inputs)
            gradients = [parameter.grad for parameter in self._parameters]
        finally:  # nothing was computed yet
            torch.cuda.set_stream(stream)  # a recording that fails leaves its own
            for parameter, gradient in zip(self._parameters, before, strict=True):
                parameter.grad = gradient
        self._pool = graph.pool()
        return _Graph(graph, inputs, (loss, metrics), gradients)


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, dict[str, Tensor]]
    gradients: list[Tensor | None]
