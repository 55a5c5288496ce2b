"""The stages of a run, a file each, and what runs them.

What is here is loaded when it is first asked for, so that what needs no torch does not wait for it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .inputs import stage_inputs
    from .pipeline import PIPELINE
    from .runner import run_recipe
    from .stage import Stage

_WHERE = {
    "PIPELINE": "pipeline",
    "Stage": "stage",
    "run_recipe": "runner",
    "stage_inputs": "inputs",
}

__all__ = [
    "PIPELINE",
    "Stage",
    "run_recipe",
    "stage_inputs",
]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
