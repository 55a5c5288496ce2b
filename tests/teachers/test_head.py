"""output_head: the logits of families that have more between their last hidden states and them than a matrix."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from transpoint.kernels.kl import linear_kl
from transpoint.kernels.kl_cached import cached_kl
from transpoint.teachers import TeacherError, output_head
from transpoint.teachers.random import random_teacher

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
FAMILIES = {
    "a matrix": ("llama", {}, {}),
    "divided": ("granite", {"logits_scaling": 8.0}, {"scale": 0.125}),
    "multiplied": ("cohere", {"logit_scale": 0.25}, {"scale": 0.25}),
    "a bias": ("phi", {}, {"bias": True}),
    "capped": ("gemma2", {"final_logit_softcapping": 3.0}, {"softcap": 3.0}),
}


@pytest.fixture(params=FAMILIES)
def case(request):
    family, fields, extras = FAMILIES[request.param]
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **SIZES, **fields)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
        if (bias := model.get_output_embeddings().bias) is not None:
            torch.nn.init.normal_(bias)
        models.append(model)
    return models, extras


def ids():
    return torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_logits_are_the_models_own(case):
    (model, _), extras = case
    head = output_head(model)
    assert head.extras == extras
    hidden, expected = model.get_decoder()(ids()).last_hidden_state, model(ids()).logits
    torch.testing.assert_close(head.logits(hidden), expected, rtol=1e-10, atol=1e-10)
    a, b = head.operands(hidden)
    product = a @ b.T
    capped = product if head.softcap is None else head.softcap * torch.tanh(product / head.softcap)
    torch.testing.assert_close(capped, expected, rtol=1e-10, atol=1e-10)
    assert a.shape[-1] % 8 == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergences_and_their_gradients_are_those_of_the_logits(case, temperature):
    models, _ = case
    teacher, student = (output_head(model) for model in models)
    with torch.no_grad():
        target, hidden = (model.get_decoder()(ids()).last_hidden_state for model in models)
        wanted = (models[0](ids()).logits / temperature).log_softmax(-1)
    hidden = hidden.detach().requires_grad_()
    weight = student.module.weight.requires_grad_()
    q = (student.logits(hidden) / temperature).log_softmax(-1)
    naive = (wanted.exp() * (wanted - q)).sum(-1).mean() * temperature**2
    labels = ids().roll(-1, 1)
    ce = torch.nn.functional.cross_entropy(student.logits(hidden).flatten(0, 1), labels.flatten())
    order = wanted.argsort(-1, descending=True)
    nothing = torch.full(order.shape[:-1], -torch.inf, dtype=torch.float64)
    options = {"softcap": student.softcap, "temperature": temperature, "labels": labels, "ce_weight": 0.5}
    for found in (
        linear_kl(*student.operands(hidden), *teacher.operands(target), **options),
        cached_kl(*student.operands(hidden), order, wanted.gather(-1, order), nothing, **options),
    ):
        torch.testing.assert_close(found, naive + 0.5 * ce, rtol=1e-8, atol=1e-10)
        expected = torch.autograd.grad(naive + 0.5 * ce, (hidden, weight), retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(found, (hidden, weight)), expected, rtol=1e-6, atol=1e-9)


def test_a_cap_is_left_to_the_reference_and_must_be_positive():
    operands = [torch.randn(3, 8), torch.randn(5, 8)] * 2
    with pytest.raises(ValueError, match="softcap|on cpu"):
        linear_kl(*operands, softcap=2.0, backend="triton")
    with pytest.raises(ValueError, match="softcap: expected a positive number or None, got 0"):
        linear_kl(*operands, softcap=0)


def test_logits_that_are_something_else_are_refused():
    model, _ = random_teacher("random-llama")
    model.config.logits_scaling = 4.0  # it does not read it
    with pytest.raises(TeacherError, match="LlamaForCausalLM is not understood: its logits are not its output matrix"):
        output_head(model)
    assert output_head(model, check=False).extras == {"scale": 0.25}


def test_a_model_keeps_its_mode():
    model, _ = random_teacher("random-llama")
    for training in (True, False):
        output_head(model.train(training))
        assert model.training is training
