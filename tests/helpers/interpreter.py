"""Triton's interpreter looks for its builtins among all names of its modules at each call of a function: here once."""

import functools
import inspect


def remember_builtins() -> None:
    """Saves the interpreter that search, where it is one that makes it."""
    from triton.language import core
    from triton.runtime import interpreter

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
