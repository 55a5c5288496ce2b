"""Writing an export aside, checking it by its format's own means, and only then putting it in its place."""

import os
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ...students import HybridForCausalLM
from ...students.build import hybrid_generation_config
from ..run.seconds import part
from ..tokenizers import save_tokenizer
from .card import CardFacts, write_card
from .formats import ExportError, find_format, has_model


@part("exporting")
def export(
    student: HybridForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    format: str = "native",
    dtype: torch.dtype | str = torch.float32,
    facts: CardFacts | None = None,
) -> dict[str, float]:
    """Writes the student to `folder` and verifies it.

    Args:
        format: a name in `FORMATS`.
        dtype: of the weights written, torch's or its name; or one of the format's quantised ones.
        facts: what the model card says besides.

    Returns:
        {"logits": largest difference of the reloaded model's logits from the student's, "decode": of its logits token
        by token with a cache from those all at once, "scale": the largest logit}, in float32. See `Format.check` for
        quantised weights.

    Raises:
        ExportError: the format cannot hold this student, or what was written is not equal to it. `folder` is then as it
            was before.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not is_export(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"'{folder}' is there and is no earlier export: name another folder, or remove it")
    kind = find_format(format)
    name = str(dtype).removeprefix("torch.")
    if reason := kind.why_not(student) or kind.why_not_dtype(name, student):
        raise ExportError(f"{format} cannot hold this student: {reason}")
    student.generation_config = hybrid_generation_config(student.generation_config)  # one of an earlier version may not
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_tokenizer(tokenizer, partial)
        dtype = getattr(torch, name, name)
        kind.write(student, partial, dtype)
        with part("verifying"):
            figures = kind.check(student, partial, dtype, tokenizer)
        write_card(partial, student, kind, figures, facts or CardFacts())
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    return figures


def is_export(folder: Path) -> bool:
    """Whether a folder was written by `export`."""
    card = folder / "README.md"
    return has_model(folder) and card.is_file() and "transpoint" in card.read_text(encoding="utf-8")
