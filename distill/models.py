"""Models and tokenizers from anywhere, with one line where they cannot be loaded; how they are to generate."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..students import HybridConfig, HybridForCausalLM
from ..students.modeling.configuration_mixers import have_trans_points, names_with_trans_points
from ..teachers import incomplete, load_teacher
from .errors import RunError
from .run.files import read_json
from .run.seconds import part

if TYPE_CHECKING:
    from .config import Recipe


@part("loading")
def load_model(
    path: str | Path, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False, trans_points=None
) -> PreTrainedModel:
    """Any causal language model: a student's folder, an export, a hub id; a TransMamba student at another schedule.

    Raises:
        RunError: it cannot be loaded, is not all there, or has no TransPoints to set.
        StudentError: `trans_points` is no schedule.
    """
    kwargs: dict[str, Any] = {
        "dtype": dtype,
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    with _naming(path):
        if os.path.isdir(path) and _model_type(Path(path)) == "transpoint_hybrid":
            loaded: Any = HybridForCausalLM.from_pretrained(path, **kwargs)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust_remote_code, **kwargs)
    model, info = cast("tuple[PreTrainedModel, dict]", loaded)  # as output_loading_info asks
    if reason := incomplete(model, info):
        raise RunError(f"model '{path}' is {reason}")
    if trans_points is not None:
        if not has_trans_points(model):
            raise RunError(f"model '{path}' has no TransPoints to set: it has no {names_with_trans_points()} layer")
        cast(HybridForCausalLM, model).set_trans_points(trans_points)
    return model.eval()


@part("loading")
def teacher_of(recipe: "Recipe", device: str | torch.device = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A recipe's teacher, or untrained model, and its tokenizer. Raises TeacherError where there is none."""
    own = recipe.teacher
    seed = recipe.run.seed if recipe.from_scratch else 0
    return load_teacher(own.source, own.dtype, device, own.trust_remote_code, own.revision, own.sizes, seed)


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Raises RunError if it cannot be loaded."""
    with _naming(path):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def load_config(path: str | Path) -> HybridConfig:
    """The config of a student, with its layer plan. Raises RunError for anything else."""
    with _naming(path):
        fields, _ = HybridConfig.get_config_dict(path)
    if "mixers" not in fields:
        raise RunError(f"model '{path}' has no layer plan: name a run, a recipe, a run's student or a custom export")
    return HybridConfig.from_dict(fields)


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Turns whatever loading raises into one line that names the model."""
    if not os.path.isdir(path) and (str(path).count("/") != 1 or str(path).startswith((".", "/", "~"))):
        raise RunError(f"no model '{path}': neither a folder nor a hub id (OWNER/NAME)")
    try:
        yield
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise RunError(f"model '{path}' cannot be loaded: {type(error).__name__}: {line}") from error


@contextmanager
def generating(model: PreTrainedModel, **settings) -> Iterator[None]:
    """Meanwhile `model.generate` knows no settings but these, and the model's own special tokens.

    transformers fills up what is not said with the model's generation config, and many released models have one with
    penalties, sampling or beams.
    """
    own = model.generation_config
    tokens = {f"{name}_token_id": getattr(own, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**tokens | settings)
    try:
        yield
    finally:
        model.generation_config = own


def on_device(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    """`model.to(device)`: transformers' own hides its type."""
    return cast(PreTrainedModel, cast(nn.Module, model).to(device))


def embedding_rows(model: PreTrainedModel) -> int:
    """How many tokens the model has an embedding for."""
    return len(cast(nn.Embedding, model.get_input_embeddings()).weight)


def output_rows(model: PreTrainedModel) -> int:
    """How many tokens the model has a prediction for."""
    return len(cast(nn.Linear, model.get_output_embeddings()).weight)


def generated(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """What `model.generate` gives: tokens, those of the prompt first."""
    return cast(torch.Tensor, cast(GenerationMixin, model).generate(**inputs))


def has_trans_points(model: PreTrainedModel) -> bool:
    return have_trans_points(getattr(model.config, "mixers", ()))


def _model_type(folder: Path) -> str | None:
    return (read_json(folder / "config.json") or {}).get("model_type")
