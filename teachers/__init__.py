"""Loading a teacher, and one view of its attention and of its predictions for every model family."""

from .attention import AttentionView, attention_view, decoder_layers
from .head import OutputHead, output_head
from .loading import REGISTRY, TeacherError, TeacherInfo, incomplete, is_hub_id, load_teacher, teacher_info
from .sharing import share_layers

__all__ = [
    "REGISTRY",
    "AttentionView",
    "OutputHead",
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
