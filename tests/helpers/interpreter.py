"""Triton's interpreter finds out with each operation what does not change: here once.

Each part is left as it is where this version of Triton has no such part.
"""

import dataclasses
import functools
import inspect


def make_quick() -> None:
    """Saves the interpreter most of what it does besides computing."""
    from triton.language import core
    from triton.runtime import interpreter

    _remember_builtins(core, interpreter)
    _patch_once(core, interpreter)
    _remember_shapes(core)
    _broadcast_what_differs(type(interpreter.interpreter_semantic))
    if hasattr(interpreter, "_get_np_dtype"):  # it makes a table of all types each time
        interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    # Checks of overflow are computed, in 64 bits, but looked at only where `debug` is set.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _remember_builtins(core, interpreter) -> None:
    @functools.cache
    def builtins(package):
        return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]

    def patch_builtin(package, *scope):
        for name in builtins(package):
            member = getattr(package, name)
            if core.is_builtin(member):  # not patched already
                interpreter._patch_attr(package, name, member, *scope)

    if hasattr(interpreter, "_patch_attr"):
        interpreter._patch_builtin = patch_builtin


def _patch_once(core, interpreter) -> None:
    """A function that a kernel calls finds the language patched by the kernel's launch."""
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch_lang, compiled = interpreter._patch_lang, core.range

    @functools.cache
    def languages(function):
        return [module for module in function.__globals__.values() if module is interpreter.tl or module is core]

    def patch_once(function):
        if all(language.range is not compiled for language in languages(function)):
            return interpreter._LangPatchScope()
        return patch_lang(function)

    interpreter._patch_lang = patch_once


def _broadcast_what_differs(semantic) -> None:
    broadcast = semantic.broadcast_impl_value

    def quickly(self, lhs, rhs):
        left, right = lhs.type, rhs.type
        if left.is_block() and right.is_block() and [*left.shape] == [*right.shape]:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = quickly


def _remember_shapes(core) -> None:
    make_tensor, make_block = core.tensor.__init__, core.block_type.__init__
    tensors, blocks = {}, {}

    def tensor(self, handle, type):
        if (found := tensors.get(type.name)) is None:
            make_tensor(self, handle, type)
            tensors[type.name] = {k: v for k, v in vars(self).items() if k not in ("handle", "type", "dtype")}
        else:
            vars(self).update(found, handle=handle, type=type, dtype=type.scalar)

    def block(self, element_ty, shape):
        key = element_ty.name, *(size.value if isinstance(size, core.constexpr) else size for size in shape)
        if (found := blocks.get(key)) is None:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        else:
            vars(self).update(found, element_ty=element_ty)

    core.tensor.__init__, core.block_type.__init__ = tensor, block


def _by_name(function):
    found = {}

    def remembered(dtype):
        if dtype.name not in found:
            found[dtype.name] = function(dtype)
        return found[dtype.name]

    return remembered
