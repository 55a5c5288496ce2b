"""What the training stages minimise: modules whose `forward(batch)` gives a loss and named figures.

The teacher is held beside the module, not in it: it is never wrapped, moved, optimised or saved with it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..kernels.kl import linear_kl
from ..students import HybridForCausalLM
from ..students.cache import document_index
from ..students.modeling_transmamba import Documents
from ..teachers import attention_view


class Alignment(nn.Module):
    """Each mixer alone, all layers at once: the teacher's attention output from the teacher's own input.

    The loss is the mean over layers and sequences of ||mixer(h) - attention(h)||^2 / ||attention(h)||^2: relative L2,
    as in MOHAWK's second stage (arXiv 2408.10189), which takes whole blocks. Figures: one `layer_N` for each mixer.

    A TransMamba mixer has two forms of one set of weights: to the loss of the state-space form (T = 0) it adds that of
    the attention form (T = infinity), so that this stays the teacher's while the weights learn to serve both; further
    figures `attention_N`. Training only what the state-space form has for itself is left far behind
    (docs/transmamba.md).
    """

    def __init__(self, teacher: PreTrainedModel, student: HybridForCausalLM):
        super().__init__()
        layers = {layer: mixer for layer, mixer in enumerate(student.mixer_layers()) if mixer is not None}
        self.mixers = nn.ModuleDict({str(layer): mixer for layer, mixer in layers.items()})
        self.beside = (teacher, [view for view in attention_view(teacher) if view.layer in layers])

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        teacher, views = self.beside
        pairs = attention_pairs(teacher, views, batch)
        seq_idx = document_index(batch["position_ids"])
        documents = Documents(seq_idx)  # once for all mixers, as it waits for the device
        figures = {}
        for view in views:
            inputs, output, position_embeddings = pairs[view.layer]
            mixer = self.mixers[str(view.layer)]
            for name, trans_point in _forms(mixer):
                with _at(mixer, trans_point):
                    found = mixer(inputs, position_embeddings, seq_idx=seq_idx, documents=documents)[0]
                error, size = (t.float().pow(2).sum((1, 2)) for t in (found - output, output))
                # Per sequence, so that the loss does not depend on how a step is cut into micro-batches and processes.
                figures[f"{name}_{view.layer}"] = (error / size).mean()
        return sum(figures.values()) / len(views), figures


def _forms(mixer: nn.Module) -> tuple[tuple[str, int | float | None], ...]:
    """For each form of a mixer its name in the figures, and the TransPoint that gives it."""
    return (("layer", 0), ("attention", math.inf)) if hasattr(mixer, "trans_point") else (("layer", None),)


@contextmanager
def _at(mixer: nn.Module, trans_point: int | float | None) -> Iterator[None]:
    if trans_point is None:
        yield
        return
    own, mixer.trans_point = mixer.trans_point, trans_point
    try:
        yield
    finally:
        mixer.trans_point = own


class Distillation(nn.Module):
    """End to end: KL(teacher || student) of the next-token distributions, mean per token.

    Figures: `kl`, and of a TransMamba student `attention`, the fraction of tokens and layers that took it.
    """

    def __init__(self, teacher: PreTrainedModel, student: HybridForCausalLM, temperature: float = 1.0):
        super().__init__()
        self.student = student
        self.beside = (teacher,)
        self.temperature = temperature

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        (teacher,) = self.beside
        with torch.no_grad():
            target = teacher.get_decoder()(**batch, use_cache=False).last_hidden_state
        hidden = self.student.get_decoder()(**batch, use_cache=False).last_hidden_state
        kl = linear_kl(
            hidden,
            self.student.get_output_embeddings().weight,
            target,
            teacher.get_output_embeddings().weight,
            temperature=self.temperature,
        )
        figures = {"kl": kl}
        if "transmamba" in self.student.config.mixers:
            points = torch.tensor(self.student.trans_points, device=kl.device)
            figures["attention"] = (batch["position_ids"][..., None] < points).float().mean()
        return kl, figures


@torch.no_grad()
def attention_pairs(teacher: PreTrainedModel, views: list, batch: dict[str, Tensor]) -> dict[int, tuple]:
    """Runs the teacher and takes down, for each view's layer: attention's input, its output, position embeddings.

    In float32, as mixers are, whatever the teacher is in.
    """
    pairs = {}

    def take(layer: int):
        def hook(module, args, kwargs, output):
            cos_sin = kwargs.get("position_embeddings")
            cos_sin = tuple(table.float() for table in cos_sin) if cos_sin is not None else None
            pairs[layer] = (kwargs["hidden_states"].float(), output[0].float(), cos_sin)

        return hook

    handles = [view.module.register_forward_hook(take(view.layer), with_kwargs=True) for view in views]
    try:
        teacher.get_decoder()(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return pairs
