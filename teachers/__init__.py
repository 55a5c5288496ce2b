"""Loading a teacher, and one view of its attention and of its predictions for every model family.

What is here is loaded when it is first asked for, so that what needs no torch does not wait for it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attention import AttentionView, attention_view, decoder_layers
    from .errors import TeacherError
    from .families import READERS
    from .head import OutputHead, output_head
    from .loading import incomplete, load_teacher, teacher_info
    from .names import REGISTRY, TeacherInfo, is_hub_id
    from .sharing import share_layers

_WHERE = {
    "AttentionView": "attention",
    "OutputHead": "head",
    "READERS": "families",
    "REGISTRY": "names",
    "TeacherError": "errors",
    "TeacherInfo": "names",
    "attention_view": "attention",
    "decoder_layers": "attention",
    "incomplete": "loading",
    "is_hub_id": "names",
    "load_teacher": "loading",
    "output_head": "head",
    "share_layers": "sharing",
    "teacher_info": "loading",
}

__all__ = [
    "AttentionView",
    "OutputHead",
    "READERS",
    "REGISTRY",
    "TeacherError",
    "TeacherInfo",
    "attention_view",
    "decoder_layers",
    "incomplete",
    "is_hub_id",
    "load_teacher",
    "output_head",
    "share_layers",
    "teacher_info",
]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
