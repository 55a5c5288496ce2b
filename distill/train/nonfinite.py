"""Where numbers first stop being finite."""

from contextlib import ExitStack

import torch
from torch import Tensor, nn


def first_nonfinite(module: nn.Module, batches: list[dict[str, Tensor]], alone: bool = True) -> str:
    """The first tensor that is not finite when an objective runs again on these batches, in words.

    Looked through in this order: parameters, outputs of submodules as they are computed, the loss, gradients of
    parameters as backpropagation comes to them.

    Args:
        alone: whether there is one process. Others each see numbers of their own, but have to run the same passes as
            the rest; so they all run forward to the end, and gradients, which are sums over processes, are left out.
    """
    for name, parameter in module.named_parameters():
        if not _finite(parameter):
            return f"parameter {_public(name)}"
    outputs: list[str] = []
    losses = []
    with ExitStack() as stack:
        for name, submodule in module.named_modules():
            stack.callback(submodule.register_forward_hook(_watch(_public(name), outputs)).remove)
        for batch in batches:
            losses.append(module(batch)[0])
            if alone and outputs:
                break
    if outputs:
        return f"the output of {outputs[0]}"
    if not all(_finite(loss) for loss in losses):
        return "the loss"
    if not alone:
        return "a gradient, or the numbers of another process"
    gradients: list[str] = []
    with ExitStack() as stack:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_hook(_watch_gradient(_public(name), gradients)).remove)
        for loss in losses:
            loss.backward()
    return f"the gradient of {gradients[0]}" if gradients else "a sum of gradients, each of which is finite"


def _watch(name: str, found: list[str]):
    def hook(module, args, output):
        tensors = output if isinstance(output, tuple | list) else (output,)
        if name and not all(_finite(t) for t in tensors if isinstance(t, Tensor)):
            found.append(name)

    return hook


def _watch_gradient(name: str, found: list[str]):
    def hook(gradient):
        if not _finite(gradient):
            found.append(name)

    return hook


def _finite(tensor: Tensor) -> bool:
    found = torch.isfinite(tensor.detach()).all()
    return bool(found.full_tensor() if hasattr(found, "full_tensor") else found)  # of a tensor in pieces: of all


def _public(name: str) -> str:
    """Without the wrappers' part of the name."""
    for wrapper in ("module.", "objective."):
        name = name.removeprefix(wrapper)
    return "" if name in ("module", "objective") else name
