"""A hybrid student: the teacher's own module tree, with self-attention replaced by a mixer in chosen layers.

So it works for every decoder family whose attention is a module, with no model file per family: `HybridForCausalLM`
becomes, for each teacher, a class that is both itself and the teacher's class. This file travels with exported
checkpoints: it imports torch and transformers only.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .cache import HybridCache
from .configuration_hybrid import MODEL_TYPE, HybridConfig
from .configuration_transmamba import FIXED
from .documents import Documents, Spans, document_index
from .mamba2 import Mamba2Mixer
from .modeling_transmamba import TransMambaMixer

# Keywords of `from_pretrained` that say where a checkpoint is and how to get at it.
HUB = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"}
MIXERS = {"mamba2": Mamba2Mixer, "transmamba": TransMambaMixer}


class HybridForCausalLM:
    """A causal language model with mixers among its layers. Make one with `from_pretrained` or `build_student`.

    Everything a transformers model does, it does: `forward`, `generate` (with a `HybridCache`), `save_pretrained`.
    Documents packed in one sequence are told by `position_ids` that restart at 0, without an attention mask and without
    a cache (in training, or with `use_cache=False`), as transformers' own models do.
    """

    # Decay, step and skip lose too much in bfloat16.
    _keep_in_fp32_modules_strict = {"self_attn.A_log", "self_attn.dt_bias", "self_attn.D"}
    _is_stateful = True  # generate() must not roll the cache back

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        for layer, mixer in zip(self.get_decoder().layers, config.mixers, strict=True):
            if mixer != "attention":
                layer.self_attn = MIXERS[mixer](layer.self_attn, **config.mixer_options)
        if config.trans_points is not None:
            self.set_trans_points(config.trans_points, warn=False)
        self.get_decoder().register_forward_pre_hook(_tell_mixers, with_kwargs=True)
        for layer in self.get_decoder().layers:
            layer.register_forward_pre_hook(_tell_own_span, with_kwargs=True)

    @classmethod
    def from_pretrained(
        cls, path, *args, config: HybridConfig | None = None, trans_points: Any = None, **kwargs
    ) -> "HybridForCausalLM":
        """As `PreTrainedModel.from_pretrained`; with `trans_points`, `set_trans_points` chooses other TransPoints."""
        if cls is HybridForCausalLM:
            config = config or HybridConfig.from_pretrained(path, **{k: kwargs[k] for k in HUB & kwargs.keys()})
            cls = hybrid_model_class(config)
        model = super().from_pretrained(path, *args, config=config, **kwargs)
        if trans_points is not None:
            model.set_trans_points(trans_points)
        return model

    @classmethod
    def _from_config(cls, config: HybridConfig, **kwargs) -> "HybridForCausalLM":
        cls = hybrid_model_class(config) if cls is HybridForCausalLM else cls
        return super()._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModelForCausalLM") -> None:
        """Has `save_pretrained` copy this file and what it imports along with the weights."""
        cls._auto_class = auto_class if isinstance(auto_class, str) else auto_class.__name__

    def mixer_layers(self) -> list[nn.Module | None]:
        """For each layer its mixer, or None where attention is kept."""
        layers = zip(self.get_decoder().layers, self.config.mixers, strict=True)
        return [None if mixer == "attention" else layer.self_attn for layer, mixer in layers]

    @property
    def trans_points(self) -> list[int | float]:
        """For each layer up to which token it takes attention: `math.inf` where that is kept, 0 in a Mamba-2 layer."""
        layers = zip(self.config.mixers, self.mixer_layers(), strict=True)
        return [FIXED[kind] if kind in FIXED else mixer.trans_point for kind, mixer in layers]

    def set_trans_points(self, spec: Any, warn: bool = True) -> None:
        """Chooses at which token each transmamba layer passes from attention to the state-space form.

        Takes effect at the next forward pass; a cache that was filled before is refused then.

        Args:
            spec: a number of tokens or "inf" for all layers, a list with one for each layer, or the name of a schedule:
                see `parse_trans_points`. What it says of layers that are not transmamba is left out.
            warn: whether to warn, with what was measured, of TransPoints that the student was not trained on.

        Raises:
            StudentError: spec is malformed, or no layer is transmamba.
        """
        points = self.config.set_trans_points(spec, warn)
        for kind, mixer, point in zip(self.config.mixers, self.mixer_layers(), points, strict=True):
            if kind == "transmamba":
                mixer.set_trans_point(point)

    def new_cache(self) -> HybridCache:
        """An empty cache for this model, to be passed as `past_key_values`."""
        return HybridCache(self.config)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    f"cache_implementation='{generation_config.cache_implementation}' is not possible for a hybrid: "
                    "its mixer layers keep a state, not keys and values; leave it out"
                )
            model_kwargs["past_key_values"] = self.new_cache()
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


def _tell_mixers(decoder, args, kwargs):
    """Before the teacher's own decoder runs: a cache with states in it, and by keyword what the mixers need besides."""
    if kwargs.get("use_cache") is None:
        kwargs["use_cache"] = decoder.config.use_cache and not decoder.training
    if kwargs["use_cache"] and kwargs.get("past_key_values") is None:
        kwargs["past_key_values"] = HybridCache(decoder.config)
    mixers = [layer.self_attn for layer in decoder.layers if isinstance(layer.self_attn, TransMambaMixer)]
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    packed = isinstance(mask, BlockMask) and positions is not None and kwargs.get("past_key_values") is None
    if mask is not None and not packed:
        if not (isinstance(mask, Tensor) and mask.ndim == 2):
            found = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"that is a {type(mask).__name__}"
            raise ValueError(
                f"mixer layers know padding alone: expected an attention_mask of shape (batch, tokens), got one {found}"
            )
        kwargs["padding_mask"] = mask
    elif kwargs.get("past_key_values") is None and positions is not None:
        # transformers reads packed documents off position ids under the same condition, for attention layers
        kwargs["seq_idx"] = document_index(positions)
        if mixers:
            inputs = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
            batch = next(len(tensor) for tensor in inputs if tensor is not None)
            seq_idx = kwargs["seq_idx"].expand(batch, -1)
            if decoder.config._attn_implementation == "flex_attention":
                spans = Spans(seq_idx)
                kwargs["spans"] = {mixer: spans.of(mixer) for mixer in mixers}
            else:
                kwargs["documents"] = Documents(seq_idx)
    return args, kwargs


def _tell_own_span(layer, args, kwargs):
    """Before a layer runs. From outside of it, so that layers that do the same are compiled once."""
    span = kwargs.pop("spans", {}).get(layer.self_attn)
    return args, kwargs if span is None else kwargs | {"span": span}


def hybrid_model_class(config: HybridConfig) -> type[PreTrainedModel]:
    """The class that is both `HybridForCausalLM` and the teacher's class (one class for each config class)."""
    key = type(config)
    if key not in _CLASSES:
        teacher_class = MODEL_FOR_CAUSAL_LM_MAPPING[_teacher_config_class(key)]
        # The name is the public one: saved checkpoints refer to it.
        fields = {"config_class": key, "__module__": __name__}
        _CLASSES[key] = type("HybridForCausalLM", (HybridForCausalLM, teacher_class), fields)
    return _CLASSES[key]


def _teacher_config_class(config_class: type[HybridConfig]) -> type:
    # By model type: where the code travels with a checkpoint, transformers loads the config's file twice.
    return next(base for base in config_class.__bases__ if base.model_type != MODEL_TYPE)


_CLASSES: dict[type, type[PreTrainedModel]] = {}
