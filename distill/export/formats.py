"""Which formats a student can be exported to. A new one is a file of its own, with a `Format` in it, and a line here.

`FORMATS` is looked at by recipes and the command line, and loads nothing itself.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DistillError
from .engines import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...students import HybridForCausalLM, StudentConfig

DTYPES = ("float32", "float16", "bfloat16")  # of weights, in any format
QUANTISED = ("q8_0",)  # and where a format has them: see `Format.quantised`


class ExportError(DistillError, ValueError):
    """A student that a format cannot hold, or an export that is not equal to it. One line with the reason."""


@dataclass(frozen=True)
class Format:
    """A format of checkpoints.

    Attributes:
        why_no_student: takes a student's config; why the format can hold no such student, whatever the teacher, or
            None.
        why_not: takes a student; why it cannot hold that one, or None. Weights are not read.
        write: takes a student, a folder with nothing but the tokenizer in it, and the dtype of weights (torch's, or the
            name of a quantised one); writes all but the card.
        check: takes the student, the folder as it will be, the dtype and the tokenizer (or None); loads what was
            written by the format's own means and returns the figures {"logits": largest difference of logits, "decode":
            the same of decoding token by token, "scale": the largest logit}; of quantised weights those before they
            were, and under the dtype's name what it costs: the KL from the student, in nats a token. Raises ExportError
            where they are not equal.
        check_tokenizer: takes a student without weights and the tokenizer; raises ExportError where it would not be
            itself in this format.
        note: takes a student; what its card says of the format, in Markdown.
        engines: takes a student; what is known of other programs with what is written.
        snippet: takes a path or a hub id; lines of code that load it.
        load: takes the folder; the model in it. None where transformers loads it.
        loads: whether torch can run what it writes; else `evaluate` measures the student that it is equal to.
        library: what `check` loads it with, for people.
        quantised: those of `QUANTISED` that it has: takes a student; why that one cannot be so quantised, or None.
    """

    name: str
    why_no_student: Callable[["StudentConfig"], str | None]
    why_not: Callable[["HybridForCausalLM"], str | None]
    write: Callable[["HybridForCausalLM", Path, Any], None]
    check: Callable[["HybridForCausalLM", Path, Any, "PreTrainedTokenizerBase | None"], dict[str, float]]
    check_tokenizer: Callable[["HybridForCausalLM", "PreTrainedTokenizerBase"], None]
    note: Callable[["HybridForCausalLM"], str]
    snippet: Callable[[str], str]
    engines: "Callable[[HybridForCausalLM], tuple[Engine, ...]]" = lambda student: ()
    load: "Callable[[Path], PreTrainedModel] | None" = None
    loads: bool = True
    library: str = "transformers"
    quantised: Mapping[str, Callable[["HybridForCausalLM"], str | None]] = field(default_factory=dict)

    def why_not_dtype(self, name: str, student: "HybridForCausalLM | None" = None) -> str | None:
        """Why it cannot hold weights (of this student) in a dtype; None if it can."""
        if name in self.quantised:
            return self.quantised[name](student) if student is not None else None
        if name in DTYPES:
            return None
        return f"it holds weights in {', '.join([*DTYPES, *self.quantised])}, not in {name}; use one of these"


# By name, a format or where it is: "MODULE.NAME", a module beside this one.
FORMATS: dict[str, Format | str] = {"native": "native.NATIVE", "custom": "custom.CUSTOM", "gguf": "gguf.GGUF"}


def has_model(folder: Path) -> bool:
    """Whether there is a model in a folder, of any format."""
    return (folder / "config.json").is_file() or any(folder.glob("*.gguf"))


def quantising_costs(figures: dict[str, float]) -> str:
    """What `check` found that a quantised dtype costs, for people; empty where nothing is quantised."""
    return "".join(f"{name} costs {figures[name]:.4f} nats" for name in QUANTISED if name in figures)


def find_format(name: str) -> Format:
    """The format of a name. Raises ExportError where there is none."""
    if name not in FORMATS:
        raise ExportError(f"format '{name}' is not known; expected one of {', '.join(FORMATS)}")
    found = FORMATS[name]
    if isinstance(found, Format):
        return found
    module, attribute = found.split(".")
    return getattr(importlib.import_module(f".{module}", __package__), attribute)
