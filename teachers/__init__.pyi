from .attention import (
    AttentionView as AttentionView,
    attention_view as attention_view,
    decoder_layers as decoder_layers,
)
from .errors import TeacherError as TeacherError
from .families import READERS as READERS
from .head import OutputHead as OutputHead, output_head as output_head
from .hub import teacher_commit as teacher_commit
from .loading import incomplete as incomplete, load_teacher as load_teacher, teacher_info as teacher_info
from .names import REGISTRY as REGISTRY, TeacherInfo as TeacherInfo, is_hub_id as is_hub_id
from .sharing import share_layers as share_layers
