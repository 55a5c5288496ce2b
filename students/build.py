"""From a teacher and a config to a student with the teacher's weights."""

import logging
from dataclasses import asdict

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.initialization import no_init_weights

from ..teachers import attention_view, decoder_layers, load_teacher, output_head
from ..teachers.names import SCRATCH
from .config import SOFTMAX, StudentConfig, layer_plan
from .modeling.configuration_hybrid import HybridConfig
from .modeling.configuration_mixers import MIXERS, have_trans_points
from .modeling.errors import StudentError
from .modeling.modeling_hybrid import HybridForCausalLM, hybrid_model_class
from .modeling.modeling_mixer import Geometry
from .scratch import start_mixers
from .transfer import TransferPlan, transfer_plan

logger = logging.getLogger(__name__)


def build_student(
    teacher: PreTrainedModel, config: StudentConfig, start: HybridForCausalLM | None = None
) -> HybridForCausalLM:
    """A student with the teacher's weights transferred, on its device and in its dtype (A_log, dt_bias, D in float32).

    The teacher stays as it is. `student.transfer_plan` is the `TransferPlan` that was executed; print it. Where the
    teacher is an untrained model (`scratch-llama`), the mixers are then started anew, as `untrained` does.

    Args:
        teacher: or a student, of which further layers are converted, as if it were its own `start`.
        start: another student of this teacher, to go on from: its mixers stay as they are, and what is transferred to
            the others is its own attention. (Mamba in the Llama calls it progressive distillation, arXiv 2408.15237.)

    Raises:
        StudentError: the config is impossible for this teacher, or to go on to from `start`.
        TeacherError: the teacher's attention, or how its logits come about, is not understood.
    """
    student, plan = plan_student(teacher, config, None if start is None else start.config)
    student = student.to_empty(device=teacher.device)
    student.tie_weights()
    plan.execute(teacher, student, start)
    if student.config.scratch_seed is not None:
        start_mixers(student, student.config.scratch_seed, [] if start is None else start.config.mixers)
    _restore_buffers(student, teacher)
    student.generation_config = hybrid_generation_config(teacher.generation_config)
    student.transfer_plan = plan
    return student.train(teacher.training)


def untrained(family: str, config: StudentConfig, seed: int = 0, **sizes) -> HybridForCausalLM:
    """A model of any layer plan to train from scratch; its tokens are those of `teachers.random.byte_tokenizer`.

    What is no mixer starts as `teachers.scratch.untrained_teacher` has it, with the same standard deviation the linear
    layers of mixers; steps and decays of a state as published (`Mixer.start`). All layers may keep attention.

    Args:
        family: whose layers it has: llama, mistral, qwen2 or qwen3.
        config: its layer plan.
        seed: of the weights; the global generator is left as it was.
        sizes: any field of the family's config: hidden_size, num_hidden_layers, num_attention_heads, ...

    Raises:
        StudentError: the config is impossible for this model.
        TeacherError: no such family or field, or sizes that do not go together.
    """
    model, _ = load_teacher(f"{SCRATCH}{family}", sizes=sizes, seed=seed)
    return build_student(model, config).train()


def hybrid_generation_config(generation: GenerationConfig) -> GenerationConfig:
    """The same without what no hybrid can do, what has no effect, and what transformers would not save.

    A state cannot be rolled back, as drafts need it, and has no fixed size to be filled. What samples has no effect
    where nothing is sampled, and is not saved there; many released models have it.
    """
    drop = {name for name in vars(generation) if name.startswith(_NO_HYBRID)}
    if not generation.do_sample:
        drop |= _SAMPLING
    kept = {name: value for name, value in generation.to_dict().items() if name not in drop}
    try:
        found = GenerationConfig.from_dict(kept)
        found.validate(strict=True)
    except ValueError as error:
        reason = " ".join(str(error).split())
        logger.warning("of the teacher's generation config only its tokens are taken over: %s", reason)
        found = GenerationConfig(**{name: kept.get(name) for name in _TOKENS})
    return found


_CHANCE = ("dropout", "dropout_prob", "_pdrop")  # not jitter, by which a Phi-MoE chooses experts in evaluation, too
_NO_HYBRID: tuple[str, ...] = ("cache_", "max_cache", "prompt_lookup", "assistant", "is_assistant", "num_assistant")
_NO_HYBRID += ("target_look", "max_matching", "speculation", "use_mtp", "dola", "penalty_alpha", "compile")
_NO_HYBRID += ("continuous_batching",)
_SAMPLING = {"temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def plan_student(
    teacher: PreTrainedModel, config: StudentConfig, start: HybridConfig | None = None
) -> tuple[HybridForCausalLM, TransferPlan]:
    """The student on the meta device (no memory, no weights), and the plan that would fill it.

    Args:
        start: of the student that it goes on from.
    """
    config.check()
    own = teacher.config if isinstance(teacher, HybridForCausalLM) else None
    start = own if start is None else start
    geometries = _geometries(teacher)
    output_head(teacher)  # refused now rather than when it is first measured or trained
    scratch = getattr(teacher.config, "scratch_seed", None) is not None
    mixers = layer_plan(config, len(geometries), from_scratch=scratch)
    _check_memory(teacher)
    windows = [
        layer
        for layer, (geometry, mixer) in enumerate(zip(geometries, mixers, strict=True))
        if geometry.window is not None and mixer != "attention" and not MIXERS[mixer].load().spanned
    ]
    if teacher.config.get_text_config(decoder=True) is not teacher.config:
        raise StudentError(
            f"no student can be made of a {type(teacher).__name__}: it is more than a language model, as its config "
            "says; take the language model alone"
        )
    fields = teacher.config.to_dict()
    base = teacher.config.model_type if own is None else own.base_model_type
    for name in _NOT_TAKEN_OVER:
        fields.pop(name, None)
    # A student learns a teacher that leaves nothing to chance; mixers have no dropout, either.
    fields |= {name: 0.0 for name, value in fields.items() if name.endswith(_CHANCE) and value}
    # As it is, whatever its config says: some checkpoints have an output matrix of their own all the same.
    fields["tie_word_embeddings"] = teacher.get_output_embeddings().weight is teacher.get_input_embeddings().weight
    options = config.mixer_options | {"norm_eps": fields.get("rms_norm_eps", 1e-5)}
    if have_trans_points(mixers):
        fields["trans_points"] = config.trans_points
    if config.attention_options is not None:
        fields["other_options"] = {SOFTMAX: config.attention_options}
    hybrid = HybridConfig(base_model_type=base, mixers=mixers, mixer_options=options, **fields)
    if own is not None and own.trans_points is not None:
        pairs = zip(own.mixers, own.trans_points, hybrid.trans_points, strict=True)
        hybrid.set_trans_points([new if was == "attention" else point for was, point, new in pairs], warn=False)
    hybrid.set_geometry([asdict(geometry) for geometry in geometries])
    hybrid.architectures = ["HybridForCausalLM"]
    hybrid._attn_implementation = teacher.config._attn_implementation
    try:
        with torch.device("meta"), no_init_weights():
            student = hybrid_model_class(hybrid)._from_config(hybrid, dtype=teacher.dtype)
        student.tie_weights()
    except (KeyError, TypeError) as error:
        raise StudentError(f"no student can be made of a {type(teacher).__name__}: {error}") from error
    for name, parameter in student.named_parameters():  # `from_pretrained` minds these, `_from_config` does not
        if name.endswith(tuple(student._keep_in_fp32_modules_strict or ())):
            parameter.data = parameter.data.float()
    student.windows_given_up = windows
    if start is not None:
        _check_start(start, hybrid)
    return student, transfer_plan(teacher, student, start)


# Of a teacher's config; and of a student's, what is made anew or was measured of another.
_NOT_TAKEN_OVER: tuple[str, ...] = ("model_type", "architectures", "auto_map", "transformers_version")
_NOT_TAKEN_OVER += ("quantization_config", "base_model_type", "mixers", "mixer_options", "geometry", "trans_points")
_NOT_TAKEN_OVER += ("measured_trans_points",)


def _geometries(teacher: PreTrainedModel) -> list[Geometry]:
    """That of each layer's attention, which is checked; where a student has a mixer, of what was there."""
    if not isinstance(teacher, HybridForCausalLM):
        return [Geometry.of(view) for view in attention_view(teacher)]
    attention_view(teacher, layers=[layer for layer, mixer in enumerate(teacher.mixer_layers()) if mixer is None])
    return [teacher.geometry(layer) for layer in range(len(decoder_layers(teacher)))]


def _check_start(start: HybridConfig, hybrid: HybridConfig) -> None:
    """Raises StudentError where a student cannot go on from another one."""
    sizes = "num_hidden_layers hidden_size intermediate_size vocab_size num_attention_heads num_key_value_heads"
    if other := [
        name
        for name in ("base_model_type", *sizes.split())
        if getattr(start, name, None) != getattr(hybrid, name, None)
    ]:
        raise StudentError(f"the student to start from is not one of this teacher: its {other[0]} is another")
    for layer, (was, mixer) in enumerate(zip(start.mixers, hybrid.mixers, strict=True)):
        if was not in ("attention", mixer):
            is_now = "keeps attention" if mixer == "attention" else f"is to be {mixer}"
            raise StudentError(
                f"layer {layer} {is_now}, and is {was} in the student to start from: leave it so in "
                "student.keep_attention and student.mixer, or name another transfer.start"
            )
    for mixer in sorted(set(start.mixers) - {"attention"}):
        had = start.options_of(mixer)
        for name, value in hybrid.options_of(mixer).items():
            if name in had and had[name] != value:
                raise StudentError(f"student.{name} is {value}, and {had[name]} in the student to start from")


def _check_memory(teacher: PreTrainedModel) -> None:
    """Raises StudentError where layers remember more than keys and values: a student's cache would not hold it."""
    held = {type(layer) for layer in DynamicCache(config=teacher.config).layers}
    if others := sorted(kind.__name__ for kind in held - {DynamicLayer, DynamicSlidingWindowLayer}):
        raise StudentError(
            f"no student can be made of a {type(teacher).__name__}: its layers remember more than keys and values "
            f"({', '.join(others)})"
        )


@torch.no_grad()
def _restore_buffers(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Buffers that no checkpoint holds (rotary frequencies) are the teacher's."""
    source = dict(teacher.named_buffers())
    for name, buffer in student.named_buffers():
        buffer.copy_(source[name])
