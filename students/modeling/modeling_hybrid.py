"""A hybrid student: the teacher's own module tree, with self-attention replaced by a mixer in chosen layers.

So it works for every decoder family whose attention is a module, with no model file per family: `HybridForCausalLM`
becomes, for each teacher, a class that is both itself and the teacher's class. This file travels with exported
checkpoints: it imports torch and transformers only.
"""

import inspect
import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from .cache import HybridCache, can_be_static
from .cache_layers import StateLayer
from .configuration_hybrid import MODEL_TYPE, HybridConfig
from .configuration_mixers import MIXERS, have_trans_points
from .documents import Documents, Spans, document_index
from .errors import StudentError
from .modeling_mixer import Geometry, Mixer, MixerMask
from .packed_sdpa import PACKED

# Keywords of `from_pretrained` that say where a checkpoint is and how to get at it.
HUB = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"}
logger = logging.get_logger(__name__)


if TYPE_CHECKING:
    from transformers import GenerationMixin

    from .documents import Spanned

    class _Teacher(PreTrainedModel, GenerationMixin):
        """What the teacher's class brings, see `hybrid_model_class`."""

        config: HybridConfig
else:
    _Teacher = object


class HybridForCausalLM(_Teacher):
    """A causal language model with mixers among its layers. Make one with `from_pretrained` or `build_student`.

    Everything a transformers model does, it does: `forward`, `generate` (with a `HybridCache`), `save_pretrained`.
    Documents packed in one sequence are told by `position_ids` that restart at 0, without an attention mask and without
    a cache (in training, or with `use_cache=False`), as transformers' own models do.
    """

    _is_stateful = True  # generate() must not roll the cache back
    transfer_plan: Any  # of a student that `build_student` made: the `TransferPlan` that filled it,
    tied_mixers: Mapping[str, str] = {}  # parameters that mixers have in common: all names but the first -> that
    windows_given_up: list[int]  # and the layers whose teacher's attention had a window that their mixer has not

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        if config._attn_implementation == "sdpa":
            config._attn_implementation = PACKED
        exact: set[str] = set()
        for index, (layer, kind) in enumerate(zip(self.get_decoder().layers, config.mixers, strict=True)):
            if kind != "attention":
                name, mixer_class = config.attention_name, MIXERS[kind].load()
                options = config.options_of(kind)
                setattr(layer, name, mixer_class(getattr(layer, name), self.geometry(index), **options))
                exact |= {f"{name}.{parameter}" for parameter in mixer_class.exact}
        self._tie_mixers()
        # As decay, step and skip, which lose too much in bfloat16.
        self._keep_in_fp32_modules_strict = set(self._keep_in_fp32_modules_strict or ()) | exact
        if config.trans_points is not None:
            self.set_trans_points(config.trans_points, warn=False)
        decoder = self.get_decoder()
        decoder.register_forward_pre_hook(partial(_tell_mixers, cache_name(type(decoder))), with_kwargs=True)
        decoder.register_forward_hook(_check_mixers, with_kwargs=True)
        for layer in decoder.layers:
            layer.register_forward_pre_hook(partial(_tell_mixer, config.attention_name), with_kwargs=True)

    def _tie_mixers(self) -> None:
        """Makes one parameter of those that mixers of a kind have in common, and has transformers know of it.

        Raises StudentError where they have not one shape.
        """
        names = {id(module): name for name, module in self.named_modules()}
        first: dict[tuple[str, str], str] = {}
        tied: dict[str, str] = {}
        for kind, mixer in zip(self.config.mixers, self.mixer_layers(), strict=True):
            for name in mixer.in_common if mixer is not None else ():
                whole, (place, _, last) = f"{names[id(mixer)]}.{name}", name.rpartition(".")
                owner = first.setdefault((kind, name), whole)
                if owner == whole:
                    continue
                shared, own = self.get_parameter(owner), self.get_parameter(whole)
                if shared.shape != own.shape:
                    raise StudentError(
                        f"{owner} is {tuple(shared.shape)} and {whole} {tuple(own.shape)}, and layers can only share "
                        "projections of one size: leave student.attention_shared_rank out"
                    )
                setattr(cast("Mixer", mixer).get_submodule(place), last, shared)
                tied[whole] = owner
        self.tied_mixers = tied
        self._tied_weights_keys = {**(self._tied_weights_keys or {}), **tied}
        self.all_tied_weights_keys |= tied

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict:
        # Of a model whose embeddings are not tied it says nothing.
        return super().get_expanded_tied_weights_keys(all_submodels) | dict(self.tied_mixers)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the first parameter has another name
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

    def geometry(self, layer: int) -> Geometry:
        """That of the attention which a layer has or had."""
        if (facts := self.config.layer_geometry(layer)) is not None:
            return Geometry(**facts)
        module = self.attention_layers()[layer]
        return module.geometry if isinstance(module, Mixer) else Geometry.read(module, self.config.attention_name)

    def attention_layers(self) -> list[nn.Module]:
        """For each layer its attention or mixer."""
        return [getattr(layer, self.config.attention_name) for layer in self.get_decoder().layers]

    def mixer_layers(self) -> list[Mixer | None]:
        """For each layer its mixer, or None where attention is kept."""
        return [module if isinstance(module, Mixer) else None for module in self.attention_layers()]

    @property
    def trans_points(self) -> list[int | float]:
        """For each layer up to which token it takes attention: `math.inf` where that is kept, 0 in a Mamba-2 layer."""
        return [math.inf if mixer is None else mixer.trans_point for mixer in self.mixer_layers()]

    def set_trans_points(self, spec: Any, warn: bool = True) -> None:
        """Chooses at which token each transmamba layer passes from attention to the state-space form.

        Takes effect at the next forward pass; a cache that was filled before is refused then.

        Args:
            spec: a number of tokens or "inf" for all layers, a list with one for each layer, or the name of a schedule:
                see `parse_trans_points`. What it says of layers that have no choice is left out.
            warn: whether to warn, with what was measured, of TransPoints that the student was not trained on.

        Raises:
            StudentError: spec is malformed, or no layer has a choice.
        """
        points = self.config.set_trans_points(spec, warn)
        for kind, mixer, point in zip(self.config.mixers, self.mixer_layers(), points, strict=True):
            if have_trans_points([kind]):
                cast("Mixer", mixer).set_trans_point(point)

    def new_cache(self, max_cache_len: int | None = None, mergeable: bool = False) -> HybridCache:
        """An empty cache for this model, to be passed as `cache` (`past_key_values` before transformers 5.24).

        max_cache_len: as `HybridCache` has it, for a static one, which must not be given more tokens than that. A
        transmamba layer takes no part in it before its TransPoint: the prompt has to be past it. mergeable: whether
        `HybridCache.merge` takes it.
        """
        return HybridCache(self.config, max_cache_len, mergeable)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs
    ):
        name, kind = cache_name(type(self.get_decoder())), generation_config.cache_implementation
        positions, given = model_kwargs.get("position_ids"), model_kwargs.get(name)
        if isinstance(given, HybridCache) and given.static_length is not None and not given.fixed:
            if (reason := self._why_not_static(positions)) is not None:
                raise ValueError(f"a static cache was passed, but {reason}: pass new_cache() without max_cache_len")
        if generation_config.use_cache is not False and given is None:
            if kind not in (None, "dynamic", "static"):
                raise ValueError(
                    f"cache_implementation='{kind}' is not possible for a hybrid, whose mixer layers keep a state: "
                    "leave it out, or take 'static'"
                )
            length = None
            if kind == "static" and (reason := self._why_not_static(positions)) is not None:
                logger.warning_once(f"cache_implementation='static': {reason}; the cache that grows is taken instead")
            elif kind == "static":
                # As transformers does: the longest so far, so that what was compiled serves again.
                asked = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
                length = self._longest_static = max(asked, getattr(self, "_longest_static", 0))
            model_kwargs[name] = self.new_cache(length)
            return None
        prepare = super()._prepare_cache_for_generation  # type: ignore[misc]  # wants a protocol of transformers' own
        return prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs)

    def _why_not_static(self, positions: Tensor | None) -> str | None:
        """Why a prompt with these position ids (B, tokens) is not decoded with a static cache; None if it is."""
        if lacking := [mixer for mixer in self.config.mixers if not can_be_static(mixer)]:
            return f"a layer of {lacking[0]} has no static memory"
        points = [point for point, mixer in zip(self.trans_points, self.mixer_layers(), strict=True) if mixer]
        last = max(points, default=0)
        if last > 0 and (tokens := 0 if positions is None else int(positions[..., -1].min()) + 1) < last:
            return f"the shortest prompt has {tokens} tokens, and the last TransPoint is at {last}"
        return None

    # generate() looks in the signature for whether it may take inputs_embeds.
    def prepare_inputs_for_generation(self, *args, attention_mask=None, inputs_embeds=None, **kwargs):
        given = {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        inputs = super().prepare_inputs_for_generation(*args, **given, **kwargs)  # type: ignore[misc]
        # With a static cache attention's mask is made here, of a shape that stays. Mixers want the one it is made from.
        cache = inputs.get(cache_name(type(self.get_decoder())))
        if (
            isinstance(cache, HybridCache)
            and cache.is_compileable
            and not (cache.fixed and _given(inputs).shape[1] == 1)
        ):
            inputs["padding_mask"] = attention_mask
        return inputs


CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before


def cache_name(decoder_class: type[nn.Module]) -> str:
    """The keyword by which a decoder takes its cache. Raises TypeError where it has yet another name."""
    if decoder_class not in _CACHE_NAMES:
        taken = inspect.signature(decoder_class.forward).parameters
        _CACHE_NAMES[decoder_class] = next((name for name in CACHE_NAMES if name in taken), None)
    if (name := _CACHE_NAMES[decoder_class]) is None:
        raise TypeError(
            f"{decoder_class.__name__} takes no cache by the name of {' or '.join(CACHE_NAMES)}: this version of "
            "transformers is not known, use an earlier one"
        )
    return name


_CACHE_NAMES: dict[type, str | None] = {}


class _Told(NamedTuple):
    """What the mixers of a pass are told besides what any attention is told, and what came of it.

    mask: of all mixers. spans: those of single mixers. states: memories of the cache in use. reached: layers that were
    told.
    """

    mask: MixerMask
    spans: dict
    states: list[StateLayer]
    reached: set


def _tell_mixers(name: str, decoder, args, kwargs):
    """Before the teacher's own decoder runs: a cache with states in it, and what the mixers need besides."""
    caches = [kwargs.pop(one) for one in CACHE_NAMES if kwargs.get(one) is not None]
    if kwargs.get("use_cache") is None:
        kwargs["use_cache"] = decoder.config.use_cache and not decoder.training
    if kwargs["use_cache"] and not caches:
        caches = [HybridCache(decoder.config)]
    cache = kwargs[name] = caches[0] if caches else None
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    stepping = isinstance(cache, HybridCache) and cache.fixed and _given(kwargs, *args).shape[1] == 1
    known = "padding_mask" in kwargs or stepping
    mixer_mask, spans = MixerMask(padding_mask=kwargs.pop("padding_mask", None)), {}
    packed = isinstance(mask, BlockMask) and positions is not None and cache is None
    if mask is not None and not packed and not known:
        if not (isinstance(mask, Tensor) and mask.ndim == 2):
            found = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"that is a {type(mask).__name__}"
            raise ValueError(
                f"mixer layers know padding alone: expected an attention_mask of shape (batch, tokens), got one {found}"
            )
        mixer_mask = MixerMask(padding_mask=mask)
    elif cache is None and positions is not None:
        # transformers reads packed documents off position ids under the same condition, for attention layers
        index = document_index(positions)
        mixer_mask = MixerMask(seq_idx=index)
        modules = [getattr(layer, decoder.config.attention_name) for layer in decoder.layers]
        if mixers := [module for module in modules if isinstance(module, Mixer) and module.spanned]:
            seq_idx = index.expand(len(_given(kwargs, *args)), -1)
            if decoder.config._attn_implementation == "flex_attention":
                made = Spans(seq_idx)
                spans = {mixer: made.of(cast("Spanned", mixer)) for mixer in mixers}
            else:
                mixer_mask = mixer_mask._replace(documents=Documents(seq_idx))
    # A cache of another kind is refused by the mixers themselves.
    states = [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, StateLayer)]
    for state in states:
        state.advanced = False
    kwargs["told"] = _Told(mixer_mask, spans, states, set())
    return args, kwargs


def _given(kwargs: dict, *args) -> Tensor:
    """What a model gets for its tokens (B, L, ...): ids or embeddings."""
    inputs = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    return next(tensor for tensor in inputs if tensor is not None)


def _tell_mixer(attention_name: str, layer, args, kwargs):
    """Before a layer runs. From outside of it, so that layers that do the same are compiled once."""
    told = kwargs.pop("told", None)
    if told is None:
        return args, kwargs
    told.reached.add(layer)
    module = getattr(layer, attention_name)
    if isinstance(module, Mixer):
        kwargs["attention_mask"] = told.mask._replace(span=told.spans.get(module))
    return args, kwargs


def _check_mixers(decoder, args, kwargs, output):
    """After a pass: that the mixers were told, and remember what they saw where a cache is in use. A decoder of another
    version of transformers may hand on less, and nothing else would show it."""
    told = kwargs["told"]
    missed = not told.reached
    forgot = not all(state.advanced for state in told.states)
    if missed or forgot:
        raise RuntimeError(
            f"{type(decoder).__name__} hands its layers {'no keywords' if missed else 'no cache, though one is in use'}"
            ": their mixers would compute something else; use another version of transformers"
        )


def hybrid_model_class(config: HybridConfig) -> type[HybridForCausalLM]:
    """The class that is both `HybridForCausalLM` and the teacher's class (one class for each config class)."""
    key = type(config)
    if key not in _CLASSES:
        teacher_config = _teacher_config_class(key)
        teacher_class = cast("type", MODEL_FOR_CAUSAL_LM_MAPPING[teacher_config])
        # The name is the public one: saved checkpoints refer to it. The other is what pickle looks up, see below.
        names = {"__module__": __name__, "__qualname__": f"HybridForCausalLM:{teacher_config.model_type}"}
        fields = {"config_class": key, **names}
        _CLASSES[key] = type("HybridForCausalLM", (HybridForCausalLM, teacher_class), fields)
    return _CLASSES[key]


def __getattr__(name: str) -> type:
    """The class of a pickled student, in a process that has not made it yet."""
    word, _, base_model_type = name.partition(":")
    if word != "HybridForCausalLM" or not base_model_type:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = (one for one in _CLASSES.values() if one.__qualname__ == name)
    return next(made, None) or hybrid_model_class(HybridConfig(base_model_type=base_model_type))


def _teacher_config_class(config_class: type[HybridConfig]) -> type[PreTrainedConfig]:
    # By model type: where the code travels with a checkpoint, transformers loads the config's file twice.
    bases = cast("tuple[type[PreTrainedConfig], ...]", config_class.__bases__)
    return next(base for base in bases if base.model_type != MODEL_TYPE)


_CLASSES: dict[type, type[HybridForCausalLM]] = {}
