"""From a student to a folder that others load: the formats there are, what writes and verifies them, the model card.

What is here is loaded when it is first asked for, so that what needs no torch does not wait for it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .formats import FORMATS, ExportError, Format
    from .write import export

_WHERE = {
    "ExportError": "formats",
    "FORMATS": "formats",
    "Format": "formats",
    "export": "write",
}

__all__ = [
    "ExportError",
    "FORMATS",
    "Format",
    "export",
]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
