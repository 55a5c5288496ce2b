"""One call from a model in memory to the same with mixers in some of its layers."""

from typing import Any

from transformers import PreTrainedModel

from ..teachers import decoder_layers
from .build import build_student
from .config import StudentConfig, kept_layers
from .modeling.errors import StudentError
from .modeling.modeling_hybrid import HybridForCausalLM


def swap(model: PreTrainedModel, layers: Any, mixer: str = "mamba2", **options: Any) -> HybridForCausalLM:
    """A student that is the model with other layers' attention replaced by a mixer, filled as `build_student` does.

    The model stays as it is: what both have is copied, so there has to be room for a second one. Of a student further
    layers are replaced; the mixers it has stay as they are, with their options and TransPoints.

    Args:
        model: a causal language model of transformers, or a student.
        layers: which to replace: an index or a list of these (negative ones from the end), "every:N" (the last layer of
            every N), or a fraction of the layers, evenly spaced.
        mixer: a name in `MIXERS`.
        options: of the mixer, and `trans_points`, as in `StudentConfig`; what is not given is as in the mixers that a
            student has, or else the mixer's own default.

    Raises:
        StudentError: the layers, the mixer or an option is not possible, or a layer has a mixer already.
        TeacherError: the model's attention, or how its logits come about, is not understood.
    """
    if not isinstance(model, PreTrainedModel):
        raise StudentError(f"model is a {type(model).__name__}; expected a causal language model of transformers")
    count = len(decoder_layers(model))
    chosen = kept_layers([layers] if isinstance(layers, int) else layers, count, "layers")
    if not chosen:
        raise StudentError(f"layers is {layers!r}: none of {count} layers, so there is nothing to replace")
    kind = StudentConfig(mixer).kind
    known = [*kind.options, *(["trans_points"] if kind.trans_points else [])]
    if strange := [name for name in options if name not in known]:
        raise StudentError(f"a {mixer} mixer has no option {strange[0]}: it has {', '.join(known) or 'none'}")
    had = {}
    if isinstance(model, HybridForCausalLM):
        had = {layer: name for layer, name in enumerate(model.config.mixers) if name != "attention"}
    if twice := sorted(chosen & had.keys()):
        raise StudentError(f"layers is {layers!r}: layer {twice[0]} has no attention, it is {had[twice[0]]} already")
    if others := set(had.values()) - {mixer}:
        raise StudentError(f"mixer is '{mixer}', and the student's is {others.pop()}: a student has one kind of mixer")
    if had:
        options = {name: value for name, value in model.config.mixer_options.items() if name in kind.options} | options
    kept = [layer for layer in range(count) if layer not in chosen | had.keys()]
    return build_student(model, StudentConfig(mixer, kept, **options))
