"""Where numbers first stop being finite."""

from contextlib import ExitStack

import torch
from torch import Tensor, nn


def first_nonfinite(module: nn.Module, batches: list[dict[str, Tensor]]) -> str:
    """The first tensor that is not finite when an objective runs again on these batches, in words.

    Looked through in this order: parameters, outputs of submodules as they are computed, the loss, gradients of
    parameters as backpropagation comes to them.
    """
    for name, parameter in module.named_parameters():
        if not _finite(parameter):
            return f"parameter {_public(name)}"
    for batch in batches:
        found: list[str] = []
        order: list[str] = []
        with ExitStack() as stack:
            for name, submodule in module.named_modules():
                stack.callback(submodule.register_forward_hook(_watch(_public(name), found)).remove)
            for name, parameter in module.named_parameters():
                if parameter.requires_grad and parameter.is_leaf:
                    stack.callback(parameter.register_hook(_watch_gradient(_public(name), order)).remove)
            loss, _ = module(batch)
            if found:
                return f"the output of {found[0]}"
            if not _finite(loss):
                return "the loss"
            loss.backward()
        if order:
            return f"the gradient of {order[0]}"
    return "a sum of gradients, each of which is finite"


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
    return bool(torch.isfinite(tensor.detach()).all())


def _public(name: str) -> str:
    """Without the wrappers' part of the name."""
    for wrapper in ("module.", "objective."):
        name = name.removeprefix(wrapper)
    return "" if name in ("module", "objective") else name
