"""Loading a teacher, and one view of its attention for every model family."""

from .attention import AttentionView, attention_view, decoder_layers
from .loading import REGISTRY, TeacherError, TeacherInfo, load_teacher, teacher_info
from .sharing import share_layers

__all__ = [
    "REGISTRY",
    "AttentionView",
    "TeacherError",
    "TeacherInfo",
    "attention_view",
    "decoder_layers",
    "load_teacher",
    "share_layers",
    "teacher_info",
]
