"""How mixers start where there is no teacher to take anything from."""

import torch

from ..teachers.scratch import residual_factor
from .modeling.modeling_hybrid import HybridForCausalLM

_OTHERS = 2**32  # added to a seed: mixers are not to have the numbers again that the rest of the model had


@torch.no_grad()
def start_mixers(student: HybridForCausalLM, seed: int, had: list[str]) -> None:
    """Draws the mixers of a student of an untrained model anew, from a seed, the same on any device.

    had: for each layer what it was in the student that this one goes on from; what was a mixer there stays.
    """
    generator, device = torch.Generator().manual_seed(seed + _OTHERS), student.device
    spread = student.config.initializer_range
    for layer, mixer in enumerate(student.mixer_layers()):
        if mixer is not None and (not had or had[layer] == "attention"):
            mixer.cpu().start(generator, spread)
            mixer.out.weight.div_(residual_factor(student.config))
            mixer.to(device)
