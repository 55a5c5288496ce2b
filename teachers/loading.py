"""From a name to a teacher: `load_teacher("smollm2-135m")` gives the model and its tokenizer.

A *source* is a registry name, a hub id, a folder, or a `.gguf` file. Weights come from safetensors or GGUF only;
code that travels with a checkpoint runs only with `trust_remote_code=True`.
"""

import difflib
import importlib.util
import logging
import re
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .errors import TeacherError
from .gguf_files import complete, open_gguf, read_once, refuse_part
from .hub import TIMEOUT, teacher_commit
from .names import REGISTRY, SCRATCH, TeacherInfo, is_hub_id, is_scratch
from .random import RANDOM_FAMILIES, random_teacher
from .scratch import untrained_teacher

logger = logging.getLogger(__name__)

_MADE = ("random-", SCRATCH)  # models that no file holds
# Tensors of a checkpoint that a causal language model rightly has no use for.
_HARMLESS = (
    r"\.rotary_emb\.inv_freq$",  # computed from the config
    r"\.(masked_bias|attn\.bias)$",  # causal masks of older models
    r"(^|\.)mtp(\.|_)",  # heads for further tokens, which only speculative decoding reads
)


def load_teacher(
    source: str,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
    sizes: dict | None = None,
    seed: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model and its tokenizer.

    Args:
        source: registry name (`smollm2-135m`), `random-FAMILY` (a tiny random model, for tests), `scratch-FAMILY` (an
            untrained one), hub id, folder with a `config.json`, folder with one `.gguf` file, or a `.gguf` file.
        dtype: of the weights (`torch.bfloat16` or `"bfloat16"`).
        device: where the weights go.
        trust_remote_code: whether code that travels with the checkpoint may run.
        revision: branch, tag or commit of a hub teacher (None: its default branch). All its files are of one commit.
        sizes: of a random or untrained model, fields of its config.
        seed: of its weights.

    Returns:
        The model, in eval mode, and the tokenizer. A model from a GGUF file is dequantised and can be saved again.

    Raises:
        TeacherError: nothing is found under that name, or what is found cannot be loaded.
    """
    dtype, source = _dtype(dtype), str(source)
    commit = teacher_commit(source, revision)
    tokenizer: PreTrainedTokenizerBase
    if source.startswith(_MADE):
        make = untrained_teacher if is_scratch(source) else random_teacher
        model, tokenizer = make(source, seed, **sizes or {})
        for parameter in model.parameters():  # alone: rotary frequencies stay in float32, as in `from_pretrained`
            parameter.data = parameter.data.to(dtype)
        return model.to(device).eval(), tokenizer  # type: ignore[arg-type]  # transformers wraps `to`
    folder, gguf = _locate(source)
    kwargs = {"trust_remote_code": trust_remote_code} | ({"gguf_file": gguf} if gguf else {})
    kwargs |= {"revision": commit} if commit else {}
    try:
        if gguf:
            refuse_part(Path(folder) / gguf)
        with read_once() if gguf else nullcontext():
            # `use_safetensors`: a pickled checkpoint is refused, never opened. Of other sizes, `incomplete` says which.
            loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
                **({} if gguf else {"use_safetensors": True}),
            )
            model, info = cast("tuple[PreTrainedModel, dict]", loaded)
            if reason := incomplete(model, info):
                raise TeacherError(f"teacher '{source}' is {reason}")
            if gguf:
                complete(model, Path(folder) / gguf)
            tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
    except TeacherError:
        raise
    except Exception as error:
        raise TeacherError(f"teacher '{source}' cannot be loaded: {_one_line(error)}") from error
    _say_whether_tied(model)
    if gguf:
        _forget_quantization(model)
        _name_special_tokens(tokenizer, model)
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]  # transformers wraps `to`


def incomplete(model: PreTrainedModel, info: dict) -> str | None:
    """Why a model that was loaded is not just what its checkpoint holds; None where it is.

    transformers fills up what is missing with random numbers. `info` is its `output_loading_info`.
    """
    unexpected = [name for name in info["unexpected_keys"] if not any(re.search(known, name) for known in _HARMLESS)]
    mismatched = [name if isinstance(name, str) else name[0] for name in info["mismatched_keys"]]
    wrong = [
        f"{len(names)} tensors {what} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for names, what in (
            (info["missing_keys"], "are missing in it"),
            (unexpected, "of it have no place in the model"),
            (mismatched, "have another shape there"),
        )
        if names
    ]
    if not (reasons := wrong or info.get("error_msgs")):
        return None
    return (
        f"no whole {type(model).__name__}: {'; '.join(reasons)}: check that it is the checkpoint of a causal language "
        "model, saved under its own names, and fetch it again"
    )


def teacher_info(source: str, commit: str | None = None) -> TeacherInfo:
    """What is known of a teacher without loading its weights: name, licence, hub id; `commit`: of a hub teacher.

    Nothing cosmetic is an error: of a card that cannot be read, a warning says so, and the licence is unknown.
    """
    if source in REGISTRY:
        return TeacherInfo(source, REGISTRY[source]["license"], REGISTRY[source]["hub"])
    if source.startswith(_MADE):
        return TeacherInfo(source, "apache-2.0")
    path = Path(source).expanduser()
    try:
        if path.exists():
            gguf = path if path.is_file() else next(iter(sorted(path.glob("*.gguf"))), None)
            if gguf is None or (path / "config.json").exists():  # as `load_teacher` chooses
                return TeacherInfo(path.resolve().name, _licence(_card_license(path / "README.md")))
            return TeacherInfo(path.resolve().name, _licence(_gguf_license(gguf)))
    except Exception as error:  # a card is whatever somebody wrote
        logger.warning("the card of teacher '%s' cannot be read (%s): its licence is unknown", source, _one_line(error))
        return TeacherInfo(path.resolve().name)
    if not is_hub_id(source):
        return TeacherInfo(path.name)
    try:
        from huggingface_hub import model_info

        card = model_info(source, revision=commit, timeout=TIMEOUT).card_data
        return TeacherInfo(source, _licence(card.license if card else None), source, commit)
    except Exception:  # offline, private, or no card: the licence is then unknown, which the card says
        return TeacherInfo(source, None, source, commit)


def _licence(stated: object) -> str | None:
    """An identifier as the hub has them; None for anything else that a card may hold there."""
    stated = stated[0] if isinstance(stated, list) and len(stated) == 1 else stated
    return stated if isinstance(stated, str) and re.fullmatch(r"[A-Za-z0-9][\w.+-]*", stated) else None


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise TeacherError(f"dtype '{dtype}' is no floating-point type; expected float32, bfloat16 or float16")
    return found


def _locate(source: str) -> tuple[str, str | None]:
    """Folder (or hub id) and, if the weights are in GGUF, the name of the file in it."""
    if source in REGISTRY:
        return _locate_registered(source)
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise TeacherError(f"teacher '{source}' is a file but not .gguf; give a .gguf file or a folder")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise TeacherError(f"teacher '{source}' is damaged: it does not begin as a GGUF file does")
        return str(path.parent), path.name
    if path.is_dir():
        if (path / "config.json").exists():
            return str(path), None
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return str(path), ggufs[0].name
        found = f"{len(ggufs)} .gguf files: name one" if ggufs else "neither config.json nor a .gguf file"
        raise TeacherError(f"teacher folder '{source}' holds {found}")
    if is_hub_id(source):
        return source, None
    names = [*REGISTRY, *(kind + family for kind in _MADE for family in RANDOM_FAMILIES)]
    near = difflib.get_close_matches(source, names, n=1)
    raise TeacherError(
        f"no teacher '{source}': not a file or folder, not a hub id (OWNER/NAME), not one of {', '.join(names)}"
        + (f"; did you mean '{near[0]}'?" if near else "")
    )


def _locate_registered(name: str) -> tuple[str, str | None]:
    entry = REGISTRY[name]
    spec = importlib.util.find_spec(entry["package"])
    for place in (spec.submodule_search_locations if spec else None) or ():
        for file in sorted(Path(place).glob("*.gguf")):
            return str(file.parent), file.name
    raise TeacherError(
        f"teacher '{name}' needs its weights: `{entry['install']}`, or give the hub id {entry['hub']} instead"
    )


def _say_whether_tied(model: PreTrainedModel) -> None:
    """Some configs say that the output matrix is the embedding's, while the file has one of its own, which counts."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False


def _forget_quantization(model: PreTrainedModel) -> None:
    """A GGUF teacher is dequantised on loading; transformers still refuses to save it while this is recorded."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False  # type: ignore[assignment]  # torch's stubs: a tensor or a module


def _name_special_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Begin, end and padding as the model has them: some transformers versions read them off GGUF wrongly."""
    for name in ("bos_token", "eos_token", "pad_token"):
        index = getattr(model.config, f"{name}_id")
        if isinstance(index, int):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(index))


def _gguf_license(file: Path) -> str | None:
    field = open_gguf(file).fields.get("general.license")
    return field.contents() if field else None


def _card_license(card: Path) -> str | None:
    if not card.is_file():
        return None
    from huggingface_hub import ModelCard

    return ModelCard.load(card).data.license


def _one_line(error: Exception) -> str:
    if "`CONVERSION` entries" in str(error):  # of a report that transformers logs
        return "tensors that belong together, as those of experts, are not all there or do not fit each other"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
