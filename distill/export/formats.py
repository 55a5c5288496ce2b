"""Which formats a student can be exported to. A new one is a file of its own, with a `Format` in it, and a line here.

`FORMATS` is looked at by recipes and the command line, and loads nothing itself.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DistillError
from .engines import Engine

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...students import HybridForCausalLM, StudentConfig


class ExportError(DistillError, ValueError):
    """A student that a format cannot hold, or an export that is not equal to it. One line with the reason."""


@dataclass(frozen=True)
class Format:
    """A format of checkpoints.

    Attributes:
        why_no_student: takes a student's config; why the format can hold no such student, whatever the teacher, or
            None.
        why_not: takes a student; why it cannot hold that one, or None. Weights are not read.
        write: takes a student, a folder with nothing but the tokenizer in it, and the dtype of weights; writes all but
            the card.
        check: takes the student, the folder as it will be, the dtype and the tokenizer (or None); loads what was
            written by the format's own means and returns the figures {"logits": largest difference of logits, "decode":
            the same of decoding token by token, "scale": the largest logit}. Raises ExportError where they are not
            equal.
        check_tokenizer: takes a student without weights and the tokenizer; raises ExportError where it would not be
            itself in this format.
        note: takes a student; what its card says of the format, in Markdown.
        engines: takes a student; what is known of other programs with what is written.
        snippet: takes a path or a hub id; lines of code that load it.
        load: takes the folder; the model in it. None where transformers loads it.
        loads: whether torch can run what it writes; else `evaluate` measures the student that it is equal to.
        library: what `check` loads it with, for people.
    """

    name: str
    why_no_student: Callable[["StudentConfig"], str | None]
    why_not: Callable[["HybridForCausalLM"], str | None]
    write: Callable[["HybridForCausalLM", Path, "torch.dtype"], None]
    check: Callable[["HybridForCausalLM", Path, "torch.dtype", "PreTrainedTokenizerBase | None"], dict[str, float]]
    check_tokenizer: Callable[["HybridForCausalLM", "PreTrainedTokenizerBase"], None]
    note: Callable[["HybridForCausalLM"], str]
    snippet: Callable[[str], str]
    engines: "Callable[[HybridForCausalLM], tuple[Engine, ...]]" = lambda student: ()
    load: "Callable[[Path], PreTrainedModel] | None" = None
    loads: bool = True
    library: str = "transformers"


# By name, a format or where it is: "MODULE.NAME", a module beside this one.
FORMATS: dict[str, Format | str] = {"native": "native.NATIVE", "custom": "custom.CUSTOM", "gguf": "gguf.GGUF"}


def has_model(folder: Path) -> bool:
    """Whether there is a model in a folder, of any format."""
    return (folder / "config.json").is_file() or any(folder.glob("*.gguf"))


def find_format(name: str) -> Format:
    """The format of a name. Raises ExportError where there is none."""
    if name not in FORMATS:
        raise ExportError(f"format '{name}' is not known; expected one of {', '.join(FORMATS)}")
    found = FORMATS[name]
    if isinstance(found, Format):
        return found
    module, attribute = found.split(".")
    return getattr(importlib.import_module(f".{module}", __package__), attribute)
