"""What a GGUF file says of its model, held against what transformers makes of it.

transformers takes over the keys that it knows and passes over all others without a word: scaling of the rotary
embedding, sliding windows, scales and caps of logits. So every key of the architecture is compared with the model that
was loaded; scaling of the rotary embedding is set right; what differs, or is not known here, is refused.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGUFReader
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from .errors import TeacherError

# Keys of an architecture, and what a model has for each; several names of a field where families call it differently.
_FIELDS = {
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "expert_count": ("num_experts", "num_local_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "use_parallel_residual": ("use_parallel_residual",),
}
_COMPUTED: dict[str, Callable] = {
    "attention.key_length": lambda model: _attention(model).head_dim,
    "attention.value_length": lambda model: _attention(model).head_dim,
    "attention.scale": lambda model: _attention(model).scaling,
    "attention.causal": lambda model: True,
    "rope.freq_base": lambda model: _rope(model)["rope_theta"],
    "rope.dimension_count": lambda model: 2 * model.get_decoder().rotary_emb.inv_freq.shape[-1],
}
# What changes no result, or is taken care of by itself.
_NO_MATTER = {"context_length", "tensor_data_layout", "pooling_type", "rope.scaling.finetuned"}
_SCALING = "rope.scaling."
_FREQUENCIES = "rope_freqs.weight"  # divisors of the rotary frequencies: Llama 3's scaling


def open_gguf(path: Path) -> GGUFReader:
    """A reader of a file. Reading the header takes seconds, as it holds the vocabulary, so the latest is kept."""
    facts = path.stat()
    return _opened(path.resolve(), facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=1)
def _opened(path: Path, size: int, written: int) -> GGUFReader:
    return _Reader(path)


class _Reader(GGUFReader):
    """With the file as a plain array: each slice of a memory map takes many times as long, and a token takes six."""

    @property  # type: ignore[override]
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = mapped.view(np.ndarray)


@contextmanager
def read_once() -> Iterator[None]:
    """Saves time alone: transformers reads a file's header, and makes the table of all names, again and again."""
    reader, table = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = lambda path: open_gguf(Path(path)), lru_cache(table)  # type: ignore
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, table  # type: ignore


def refuse_part(path: Path) -> None:
    """Raises TeacherError where a file is one of several that a model was split into."""
    count = _facts(open_gguf(path)).get("split.count", 1)
    if count > 1:
        raise TeacherError(
            f"'{path.name}' is one of {count} parts of a model: put them together first, as "
            "`llama-gguf-split --merge FIRST_PART WHOLE.gguf` does"
        )


def complete(model: PreTrainedModel, path: Path) -> None:
    """Gives a model that transformers has loaded from a GGUF file the scaling of its rotary embedding, and checks it.

    Raises:
        TeacherError: the file says something of the model that it is not, or holds tensors that it has no use for.
    """
    reader = open_gguf(path)
    facts = _facts(reader)
    architecture = facts["general.architecture"]
    own = {key.removeprefix(f"{architecture}."): v for key, v in facts.items() if key.startswith(f"{architecture}.")}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _refuse_others(model, path, architecture, tensors)
    scaling = {key.removeprefix(_SCALING): own.pop(key) for key in list(own) if key.startswith(_SCALING)}
    _scale_rotary(model, path, scaling, tensors.get(_FREQUENCIES))
    for key, value in own.items():
        if key in _NO_MATTER:
            continue
        if key not in _FIELDS and key not in _COMPUTED:
            raise TeacherError(f"'{path.name}' says {key} = {value!r}, which is not understood: {_REMEDY}")
        found = _found(model, key)
        if not _equal(found, value):
            raise TeacherError(
                f"'{path.name}' says {key} = {value!r}, and in the model that transformers makes of it that is "
                f"{found!r}: {_REMEDY}"
            )


_REMEDY = "take the model in safetensors instead"


def _facts(reader: GGUFReader) -> dict:
    # Lists of a tokenizer are long, and are not asked for.
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}


def _attention(model: PreTrainedModel):
    return model.get_decoder().layers[0].self_attn


def _rope(model: PreTrainedModel) -> dict:
    """The rotary embedding's parameters: where layers have types, those of full attention."""
    parameters = model.config.rope_parameters or {}
    return parameters.get("full_attention", parameters)


def _found(model: PreTrainedModel, key: str):
    if key in _COMPUTED:
        try:
            return _COMPUTED[key](model)
        except (AttributeError, KeyError, TypeError):  # the family has no such thing
            return None
    return next((value for name in _FIELDS[key] if (value := getattr(model.config, name, None)) is not None), None)


def _equal(found, value) -> bool:
    if isinstance(value, list):  # one for each layer
        return all(_equal(found, one) for one in value)
    if found is None and not value:  # none of what the family does not have
        return True
    if isinstance(found, float) or isinstance(value, float):
        return found is not None and math.isclose(found, value, rel_tol=1e-5)
    return found == value


def _refuse_others(model: PreTrainedModel, path: Path, architecture: str, tensors: dict) -> None:
    """Of experts, transformers puts several tensors into one, and leaves zeros where one of them is missing."""
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    names = get_gguf_hf_weights_map(model, processor).keys() | {_FREQUENCIES}
    used, held = ({name.removesuffix(".weight"): name for name in some} for some in (names, tensors))
    what = type(model).__name__
    if unused := sorted(held.keys() - used.keys()):
        listed = ", ".join(held[name] for name in unused[:3])
        raise TeacherError(
            f"'{path.name}' holds {len(unused)} tensors that a {what} has no use for ({listed}): {_REMEDY}"
        )
    if missing := sorted(name for name in used.keys() - held.keys() if "_exps" in name):
        raise TeacherError(
            f"'{path.name}' is no whole {what}: {len(missing)} tensors are missing in it ({', '.join(missing[:3])}): "
            "fetch it again"
        )


def _scale_rotary(model: PreTrainedModel, path: Path, scaling: dict, divisors) -> None:
    said, factor = dict(scaling), scaling.pop("factor", 0) or 1.0
    kind = scaling.pop("type", "none" if factor == 1 else "linear")  # as llama.cpp takes a factor alone
    context = scaling.pop("original_context_length", None)
    attention = scaling.pop("attn_factor", 1.0) * scaling.pop("yarn_attn_factor", 1.0)
    if kind == "none" and divisors is None and attention == 1 and not scaling:
        return
    base = model.config.rope_parameters or {}
    if "rope_theta" not in base:
        raise TeacherError(
            f"'{path.name}' scales a rotary embedding, and a {type(model).__name__} has not just one: {_REMEDY}"
        )
    plain, parameters = {"rope_type": "default", "rope_theta": base["rope_theta"]}, None
    if divisors is not None and kind == "none" and attention == 1:
        parameters = _llama3(plain, torch.tensor(divisors.data).float(), model)
    elif kind == "linear" and divisors is None and attention == 1:
        parameters = plain | {"rope_type": "linear", "factor": factor}
    elif kind == "yarn" and divisors is None and context is not None:
        parameters = plain | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context}
        parameters["attention_factor"] = attention * (1 + 0.1 * math.log(factor))
        names = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        parameters |= {name: scaling.pop(key) for name, key in names.items() if key in scaling}
    if parameters is None or scaling:
        what = ", ".join(f"{_SCALING}{key} = {value!r}" for key, value in {"type": kind, **said}.items())
        raise TeacherError(f"'{path.name}' says {what}, which is not understood: {_REMEDY}")
    _set_rotary(model, parameters)


def _llama3(plain: dict, divisors: torch.Tensor, model: PreTrainedModel) -> dict | None:
    """Llama 3's scaling, of which a file holds the divisors that come of it; None where they come of something else."""
    settings = {"rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    settings |= {"original_max_position_embeddings": 8192}
    unscaled = model.get_decoder().rotary_emb.inv_freq.float().cpu().clone()
    own = model.config.rope_parameters
    _set_rotary(model, plain | settings)
    found = unscaled / model.get_decoder().rotary_emb.inv_freq.float().cpu()
    if torch.allclose(found, divisors, rtol=1e-4):
        return plain | settings
    _set_rotary(model, own)
    return None


def _set_rotary(model: PreTrainedModel, parameters: dict) -> None:
    model.config.rope_parameters = parameters
    decoder = model.get_decoder()
    device = decoder.rotary_emb.inv_freq.device
    decoder.rotary_emb = type(decoder.rotary_emb)(config=model.config).to(device)
