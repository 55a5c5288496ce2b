"""Floating-point operations that training takes by its definition, for the model FLOP utilisation (MFU) of a device.

MFU is these, times tokens a second, by what the device could do (Chowdhery et al. 2022, arXiv 2204.02311, appendix B):
what an implementation computes again, or computes and throws away, does not count. A multiplication with its addition
is two operations; norms, activations, softmax, rotary embedding, the loss and the optimizer are left out.

Where gradients flow is read off `requires_grad` of the parameters, so ask when that is set.
"""

import math
import re
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ...students import Geometry, HybridForCausalLM, Mixer
from ...students.modeling.modeling_mixer import attention_flops
from ...teachers import attention_view
from .groups import trained_mixers

# Dense peaks in TFLOP/s: bfloat16 with float32 accumulation on tensor cores, and float32 without TF32. From NVIDIA's
# and AMD's data sheets, half of the figures "with sparsity". The first pattern found in a device's name counts.
_PEAKS = (
    (r"GB200", 2500, 80),
    (r"B[23]00", 2250, 75),
    (r"H[12]00 NVL", 835, 60),
    (r"H100 PCIe", 756, 51),
    (r"G?H[12]00|H800", 989, 67),
    (r"A[18]00", 312, 19.5),
    (r"A30", 165, 10.3),
    (r"A40", 150, 37.4),
    (r"A10", 125, 31.2),
    (r"L40S", 362, 91.6),
    (r"L40", 181, 90.5),
    (r"L4", 121, 30.3),
    (r"RTX A6000", 155, 38.7),
    (r"RTX 6000 Ada", 364, 91.1),
    (r"RTX 5090", 209.5, 104.8),
    (r"RTX 4090", 165, 82.6),
    (r"RTX 3090", 71, 35.6),
    (r"MI300X", 1307, 163.4),
)
_PARTIAL = re.compile(r"\b(MIG|Laptop|Max-Q)\b|\bRTX \d+ (D|Ti|SUPER)\b")  # other peaks than the card of that name


def distill_flops(teacher: PreTrainedModel | None, student: HybridForCausalLM, length: int) -> float:
    """Operations per token of a step of distillation, on sequences of `length` tokens that are one document each.

    The teacher forward (None: it is read from a cache), the student forward and backward, both with their heads:

        forward   2 N + the mixing of each layer    N: weights of the linear layers, the output head's among them
        backward  2 N from the first layer on that trains, for the gradients that flow through
                  + 2 N_trained for the weights' own + twice the mixing

    So with nothing frozen it is the well-known 6 N and 12 x hidden x keys seen.
    """
    total = 0.0 if teacher is None else _forward(teacher, length)
    flows = any(parameter.requires_grad for parameter in student.get_input_embeddings().parameters())
    for layer, mixing in zip(_layers(student), _mixing(student, length), strict=True):
        flows |= any(parameter.requires_grad for parameter in layer.parameters())
        weights, trained = _weights(layer), _weights(layer, trained=True)
        total += 2 * weights + mixing + 2 * trained + flows * (2 * weights + 2 * mixing)
    head = student.get_output_embeddings()
    return total + 2 * _weights(head) + 2 * _weights(head, trained=True) + flows * 2 * _weights(head)


def align_flops(teacher: PreTrainedModel, student: HybridForCausalLM, length: int) -> float:
    """Operations per token of a step of alignment, on sequences of `length` tokens that are one document each.

    The teacher forward without its head, and each mixer that trains, in each of its forms, forward and backward:
    gradients flow back to its first projections, whose input is the teacher's and needs none.
    """
    total = _forward(teacher, length) - 2 * _weights(teacher.get_output_embeddings())
    for mixer in trained_mixers(student).values():
        for form in mixer.forms():
            products = _weights(mixer) - sum(_weights(getattr(mixer, name, None)) for name in form.unused)
            with mixer.at(form.trans_point):
                total += 2 * products + 2 * products + 2 * _weights(mixer.out) + 3 * mixer.flops(length)
    return total


def orient_flops(teacher: PreTrainedModel, student: HybridForCausalLM, length: int) -> float:
    """Operations per token of a step of orientation, on sequences of `length` tokens that are one document each.

    The teacher forward without its head; the first projections of each mixer that trains, forward and backward,
    but not to their input; and of each head two matrices, entry by entry, and the gradients of one.
    """
    total = _forward(teacher, length) - 2 * _weights(teacher.get_output_embeddings())
    for mixer in trained_mixers(student).values():
        if mixer.matrix:
            matrices = 2 * attention_flops(mixer.num_heads * mixer.head_dim, length, None) / 2
            total += 4 * (_weights(mixer) - _weights(mixer.out)) + 2 * matrices
    return total


def peak_flops(device_name: str, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """Published dense operations a second of a device, by the name that `torch.cuda.get_device_name` gives.

    None where it is not known: another device, a part of one (MIG), a laptop's, or another dtype than bfloat16, float16
    (the same) and float32.
    """
    if _PARTIAL.search(device_name):
        return None
    for pattern, half, full in _PEAKS:
        if re.search(rf"\b({pattern})\b", device_name):
            return {torch.bfloat16: half * 1e12, torch.float16: half * 1e12, torch.float32: full * 1e12}.get(dtype)
    return None


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    return cast(nn.ModuleList, model.get_decoder().layers)


def _forward(model: PreTrainedModel, length: int) -> float:
    """Operations per token of a forward pass with the output head."""
    layers = sum(2 * _weights(layer) for layer in _layers(model)) + sum(_mixing(model, length))
    return layers + 2 * _weights(model.get_output_embeddings())


def _weights(module: nn.Module | None, trained: bool = False) -> float:
    """Weights of the products that a token passes in a module, by their shape: tensors may be spread over processes.

    Of experts, those that a token is sent to: transformers keeps all of a layer's in tensors of three dimensions. A
    mixer's are of its heads, which a token passes all.
    Raises ValueError where there are weights of another form.
    """
    if module is None or isinstance(module, nn.Embedding | nn.Conv1d):
        return 0
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features if module.weight.requires_grad or not trained else 0
    total = 0.0
    for name, parameter in module.named_parameters(recurse=False):
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if len(shape) > 3:
            raise ValueError(f"{type(module).__name__}.{name} has {len(shape)} dimensions")
        if len(shape) > 1 and (parameter.requires_grad or not trained):
            of_experts = len(shape) == 3 and not isinstance(module, Mixer)
            total += math.prod(shape) * (_share_of_experts(module, shape[0]) if of_experts else 1)
    for child in module.children():
        # Experts may be one module each, in code of its own.
        experts = len(child) if isinstance(child, nn.ModuleList) else 1
        total += _weights(child, trained) * (_share_of_experts(module, experts) if experts > 1 else 1)
    return total


def _share_of_experts(module: nn.Module, count: int) -> float:
    """Of `count` experts, the fraction that a token is sent to. Raises ValueError where the module does not say."""
    config = getattr(module, "config", None)
    for owner in (module, getattr(module, "gate", None), getattr(module, "router", None), config):
        for name in ("top_k", "num_experts_per_tok", "moe_topk"):
            if isinstance(chosen := getattr(owner, name, None), int):
                return chosen / count
    raise ValueError(f"{type(module).__name__} has {count} experts, and does not say how many a token is sent to")


def _mixing(model: PreTrainedModel, length: int) -> list[float]:
    """For each layer, operations per token, forward, of what passes between tokens."""
    if not isinstance(model, HybridForCausalLM):
        attention = [Geometry.of(view) for view in attention_view(model, check=False)]
        return [_attention(geometry, length) for geometry in attention]
    return [
        _attention(model.geometry(layer), length) if mixer is None else mixer.flops(length)
        for layer, mixer in enumerate(model.mixer_layers())
    ]


def _attention(geometry: Geometry, length: int) -> float:
    return attention_flops(geometry.num_heads * geometry.head_dim, length, geometry.window)
