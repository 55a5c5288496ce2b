"""Torch custom ops that eager calls reach without the dispatcher."""

import contextlib

import torch
from torch import Tensor


class CustomOp:
    """The custom op transpoint::<name of function>, for compilers, tracers and tensors of other types.

    Eager calls with plain tensors go straight to the function, or to a plain autograd function around it: the way
    through the dispatcher takes longer than many a kernel.

    Args:
        function: makes the outputs, none of which may share memory with an input or another one. Annotated.
        fake: their shapes and dtypes, from the same arguments.
        mutates: names of arguments that are written to.
        save: (ctx, inputs, outputs) for the backward pass, and
        gradients: (ctx, *gradients of the outputs), those of the inputs; None if the op has no inputs that need one.
    """

    def __init__(self, function, fake, *, mutates=(), save=None, gradients=None):
        name = f"transpoint::{function.__name__}"
        self.function = function
        self.op = torch.library.custom_op(name, function, mutates_args=mutates)
        self.op.register_fake(fake)
        self.autograd = None
        if gradients is not None:
            self.op.register_autograd(gradients, setup_context=save)
            self.autograd = _autograd_function(function, save, gradients)

    def __call__(self, *args):
        if torch.compiler.is_compiling() or type(args[0]) is not Tensor:
            with torch.no_grad() if self.autograd is None else contextlib.nullcontext():
                return self.op(*args)
        if self.autograd is not None and torch.is_grad_enabled():
            return self.autograd.apply(*args)
        return self.function(*args)


def once(name, remedy=""):
    """save and gradients of an op that is itself a backward pass, and has none: see CustomOp."""

    def refuse(ctx, *gradients):
        raise RuntimeError(f"{name}: differentiable once only, so not with create_graph=True{remedy}")

    return {"save": lambda ctx, inputs, output: None, "gradients": refuse}


def _autograd_function(function, save, gradients):
    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            outputs = function(*inputs)
            save(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            return gradients(ctx, *grads)

    return Eager
