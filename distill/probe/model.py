"""All probes of a model on a text."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import RunError
from .lens import lens
from .memory import changed, heads, recalled


def probe_model(model: PreTrainedModel, ids: Tensor, name: str, teacher: PreTrainedModel | None = None) -> dict:
    """What `lens`, `heads`, `changed` and `recalled` find of a model, beside its teacher where there is one.

    Args:
        ids: tokens (B,L), rows of text.
        name: of the model, for people.
    """
    model.eval()
    found = {"lens": lens(model, ids, teacher), "heads": heads(model, ids)}
    found |= {"changed": changed(model, ids), "recalled": recalled(model, ids)}
    return {"model": name, "sequences": len(ids), "length": ids.shape[1], **found}


def rows_of(tokens: Tensor, length: int, count: int) -> Tensor:
    """At most so many rows (B, length) from all over the tokens of a text. Raises RunError where there are no two."""
    count = min(count, len(tokens) // length)
    if count < 2:
        raise RunError(f"the text has {len(tokens)} tokens: give more, or a --length of at most {len(tokens) // 2}")
    step = (len(tokens) - length) // (count - 1)
    return torch.stack([tokens[i * step :][:length] for i in range(count)]).long()
