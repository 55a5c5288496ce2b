"""What is known of other programs with an export: whether they load it, and compute what the student does."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """A program that people would load an export with.

    Attributes:
        name: with the version that was looked at.
        does: one of the constants below.
        words: what it takes for that, or why not.
    """

    name: str
    does: str
    words: str = ""


TRIED = "the same"  # compared by running it
READ = "the same, as its code reads"
WRONG = "something else, without a word"
REFUSES = "does not load it"

NO_ONNX = Engine("ONNX", REFUSES, "no exporter has the class (optimum-onnx, and so transformers.js)")
