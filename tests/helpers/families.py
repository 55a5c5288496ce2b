"""Tiny random models of any family of transformers, for tests."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from transpoint.teachers.random import SIZES as TINY

SIZES = {**TINY, "vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 64, "n_group": 1, "topk_group": 1}
LARGEST = 3e6  # parameters: of families that need other settings to be tiny, nothing is tried
# What logits have besides a matrix, where the defaults have none of it.
LOGITS = {"granite": {"logits_scaling": 8.0}, "granitemoe": {"logits_scaling": 0.5}, "cohere": {"logit_scale": 0.25}}


def tiny_teacher(family, **sizes):
    """A tiny random model of a family, or None where it cannot be made tiny in this way."""
    try:
        config = AutoConfig.for_model(family, **{**SIZES, **EXPERTS, **LOGITS.get(family, {}), **sizes})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
            return None
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    except Exception:  # its config wants something else: any error of transformers
        return None
    with torch.no_grad():  # biases start at 0 and norms at 1, which would hide mistakes with them
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
