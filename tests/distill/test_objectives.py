"""Alignment and distillation against their definitions written out, and what they train."""

import math
from functools import partial

import pytest
import torch

from transpoint.distill.objectives import Alignment, Distillation, attention_pairs, next_tokens, predictions_loss
from transpoint.distill.settings import DistillConfig
from transpoint.kernels.kl import linear_kl
from transpoint.kernels.kl_cached import cached_kl
from transpoint.students import StudentConfig, build_student
from transpoint.students.modeling.documents import document_index
from transpoint.teachers import attention_view
from transpoint.teachers.random import random_teacher


def make(family="llama", keep=(0, 2), **options):
    """A teacher, and a student whose mixers are not what transfer made of them."""
    teacher, _ = random_teacher(f"random-{family}")
    student = build_student(teacher, StudentConfig(keep_attention=list(keep), **options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for mixer in filter(None, student.mixer_layers()):
            for parameter in mixer.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return teacher.requires_grad_(False), student


@pytest.fixture
def batch():
    """Two sequences of 20 tokens, one of them packed from two documents."""
    ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.arange(20), torch.cat([torch.arange(8), torch.arange(12)])])
    return {"input_ids": ids, "position_ids": positions}


def documents(batch):
    """The same tokens, one document at a time, and the sequence each is of."""
    for sequence, (ids, positions) in enumerate(zip(batch["input_ids"], batch["position_ids"], strict=True)):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for a, b in zip(starts, starts[1:], strict=False):
            yield sequence, {"input_ids": ids[None, a:b], "position_ids": positions[None, a:b]}


@pytest.mark.parametrize("family, options", [("llama", {}), ("qwen3", {"rope": True}), ("qwen2", {"norm": False})])
def test_alignment_is_relative_l2_to_attention_on_the_teachers_input(family, options, batch):
    teacher, student = make(family, **options)
    loss, figures = Alignment(teacher, student)(batch)
    assert list(figures) == ["layer_1", "layer_3"]
    for layer, mixer in enumerate(student.mixer_layers()):
        if mixer is None:
            continue
        error, size = torch.zeros(2), torch.zeros(2)
        attention = teacher.model.layers[layer].self_attn
        for sequence, document in documents(batch):  # so that nothing can leak from one to another
            taken = {}

            def hook(module, args, kwargs, output, taken=taken):
                taken.update(kwargs, output=output[0])

            handle = attention.register_forward_hook(hook, with_kwargs=True)
            teacher(**document, use_cache=False)
            handle.remove()
            found = mixer(taken["hidden_states"], taken["position_embeddings"])[0]
            error[sequence] += (found - taken["output"]).pow(2).sum()
            size[sequence] += taken["output"].pow(2).sum()
        torch.testing.assert_close(figures[f"layer_{layer}"], (error / size).mean(), rtol=1e-4, atol=0)
        assert figures[f"layer_{layer}"] > 0.01
    torch.testing.assert_close(loss, (figures["layer_1"] + figures["layer_3"]) / 2)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_alignment_of_transmamba_is_that_of_both_forms(family, batch):
    """Each form's error is what the student has there at that TransPoint; afterwards it is at its own again."""
    teacher, student = make(family, mixer="transmamba", trans_points=8)
    loss, figures = Alignment(teacher, student)(batch)
    assert student.trans_points == [math.inf, 8, math.inf, 8]
    assert list(figures) == ["layer_1", "attention_1", "layer_3", "attention_3"]
    torch.testing.assert_close(loss, sum(figures.values()) / 2)
    views = [view for view in attention_view(teacher) if view.layer in (1, 3)]
    pairs = attention_pairs(teacher, views, batch)
    for name, point in (("layer", 0), ("attention", "inf")):
        student.set_trans_points(point, warn=False)
        for layer in (1, 3):
            inputs, output, positions = pairs[layer]
            found = student.mixer_layers()[layer](inputs, positions, seq_idx=document_index(batch["position_ids"]))[0]
            error = (found - output).pow(2).sum((1, 2)) / output.pow(2).sum((1, 2))
            torch.testing.assert_close(figures[f"{name}_{layer}"], error.mean())
    with torch.no_grad():  # as transferred, the attention form is the teacher's
        untouched = build_student(teacher, StudentConfig(mixer="transmamba"))
        _, figures = Alignment(teacher, untouched)(batch)
    for layer in range(4):
        assert figures[f"attention_{layer}"] < 1e-10 and figures[f"layer_{layer}"] > 0.1


def test_a_failing_mixer_keeps_its_trans_point(batch, monkeypatch):
    teacher, student = make(mixer="transmamba", trans_points=8)
    objective = Alignment(teacher, student)
    monkeypatch.setattr(type(student.mixer_layers()[1]), "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        objective(batch)
    assert student.trans_points == [math.inf, 8, math.inf, 8]


def test_alignment_trains_the_mixers_alone(batch):
    teacher, student = make()
    objective = Alignment(teacher, student)
    loss, _ = objective(batch)
    loss.backward()
    mixers = {id(p) for mixer in filter(None, student.mixer_layers()) for p in mixer.parameters()}
    assert {id(p) for p in objective.parameters()} == mixers
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in mixers), name
        if id(parameter) in mixers:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_each_mixer_is_aligned_alone(batch):
    """A mixer's figure does not depend on the other mixers."""
    teacher, student = make()
    _, before = Alignment(teacher, student)(batch)
    with torch.no_grad():
        student.mixer_layers()[1].out_proj.weight.mul_(3)
    _, after = Alignment(teacher, student)(batch)
    assert after["layer_3"] == before["layer_3"] and after["layer_1"] > 2 * before["layer_1"]


def test_attention_pairs_leaves_no_hooks(batch):
    teacher, _ = make()
    views = attention_view(teacher)
    attention_pairs(teacher, views, batch)
    with pytest.raises(KeyError, match="input_ids"):
        attention_pairs(teacher, views, {"position_ids": batch["position_ids"]})
    assert not any(view.module._forward_hooks for view in views)


def naive_kl(teacher, student, batch, temperature=1.0):
    """Mean over tokens, one document at a time, from whole logits in float64."""
    total = tokens = 0
    for _, document in documents(batch):
        p, q = (
            (model(**document, use_cache=False).logits.double() / temperature).log_softmax(-1)
            for model in (teacher, student)
        )
        total += (p.exp() * (p - q)).sum()
        tokens += document["input_ids"].numel()
    return total / tokens * temperature**2


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_kl_from_the_teachers_logits(family, temperature, batch):
    teacher, student = make(family)
    loss, figures = Distillation(teacher, student, DistillConfig(temperature=temperature))(batch)
    expected = naive_kl(teacher, student, batch, temperature)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    assert figures["kl"] == loss and loss > 0.05


def test_distillation_has_the_gradients_of_the_kl(batch):
    teacher, student = make()
    naive_kl(teacher, student, batch).backward()
    expected = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    objective = Distillation(teacher, student, DistillConfig())
    objective(batch)[0].backward()
    for name, parameter in student.named_parameters():
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < 1e-3, name
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not {id(p) for p in objective.parameters()} & {id(p) for p in teacher.parameters()}
    assert {id(p) for p in objective.parameters()} == {id(p) for p in student.parameters()}


@pytest.mark.parametrize("of", [Alignment, lambda *models: Distillation(*models, DistillConfig())])
def test_the_teacher_is_not_part_of_the_objective(of):
    """It is not moved, saved, counted or put in training mode with it."""
    teacher, student = make()
    objective = of(teacher, student)
    inside = {id(module) for module in objective.modules()}
    assert not inside & {id(module) for module in teacher.modules()}
    objective.train()
    assert not teacher.training


# What the settings add


def parts(batch, student, teacher):
    """Cross-entropy per token of text and relative error of hidden states, written out, a document at a time."""
    ce = tokens = 0
    for _, document in documents(batch):
        logits = student(**document, use_cache=False).logits.double()
        ids = document["input_ids"]
        ce += torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum") if ids.numel() > 1 else 0
        tokens += ids.numel()
    found, wanted = (
        model.get_decoder()(**batch, use_cache=False, output_hidden_states=True).hidden_states[1:]
        for model in (student, teacher)
    )
    errors = [((a - b).pow(2).sum((1, 2)) / b.pow(2).sum((1, 2))).mean() for a, b in zip(found, wanted, strict=True)]
    return ce / tokens, torch.stack(errors).mean()


def test_cross_entropy_and_hidden_states_are_added(batch):
    teacher, student = make()
    ce, hidden = parts(batch, student, teacher)
    kl = naive_kl(teacher, student, batch)
    loss, figures = Distillation(teacher, student, DistillConfig(ce_weight=0.3, hidden_weight=0.7))(batch)
    torch.testing.assert_close(loss.double(), kl + 0.3 * ce + 0.7 * hidden.double(), rtol=1e-4, atol=0)
    for name, value in (("kl", kl), ("ce", ce), ("hidden", hidden)):
        torch.testing.assert_close(figures[name].double(), value.double(), rtol=1e-4, atol=0)


def test_cross_entropy_is_that_of_tokens_with_a_next_one_times_their_fraction():
    ids = torch.arange(32).view(2, 16)
    batch = {"input_ids": ids, "position_ids": torch.stack([torch.arange(16), torch.arange(16) % 2])}
    labels = next_tokens(batch)
    assert labels[0].tolist() == [*range(1, 16), -100]
    assert labels[1].tolist() == [label for odd in range(17, 32, 2) for label in (odd, -100)]
    fraction = 23 / 32
    generator = torch.Generator().manual_seed(0)
    hidden, weight, other, head = (torch.randn(s, generator=generator) for s in [(2, 16, 8), (40, 8)] * 2)
    logprobs, top = (other @ head.T).log_softmax(-1).topk(4, -1)
    rest = (1 - logprobs.exp().sum(-1)).log()
    for divergence in (
        partial(linear_kl, hidden, weight, other, head),
        partial(cached_kl, hidden, weight, top, logprobs, rest),
    ):
        _, kl, ce = divergence(labels=labels, return_parts=True)
        loss, figures = predictions_loss(divergence, DistillConfig(ce_weight=0.3), batch)
        torch.testing.assert_close(figures, {"kl": kl, "ce": ce * fraction})
        torch.testing.assert_close(loss, kl + 0.3 * fraction * ce)
        assert list(predictions_loss(divergence, DistillConfig(), batch)[1]) == ["kl"]


@pytest.mark.parametrize("options", [{"divergence": "reverse"}, {"divergence": "jsd", "beta": 0.2}])
def test_other_divergences(options, batch):
    teacher, student = make()
    loss, _ = Distillation(teacher, student, DistillConfig(**options))(batch)
    p, q = (
        torch.cat([m(**d, use_cache=False).logits[0].double().log_softmax(-1) for _, d in documents(batch)])
        for m in (teacher, student)
    )

    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1).mean()

    mixture = (0.2 * p.exp() + 0.8 * q.exp()).log()
    expected = kl(q, p) if options["divergence"] == "reverse" else 0.2 * kl(p, mixture) + 0.8 * kl(q, mixture)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)


def test_gradients_of_micro_batches_add_up_however_many_documents_they_hold():
    """Sequences with 1 and 8 documents: the tokens that have a label count, not the micro-batches."""
    teacher, student = make()
    ids = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.arange(16), torch.arange(16) % 2])
    objective = Distillation(teacher, student, DistillConfig(ce_weight=1.0, hidden_weight=1.0))

    def gradient(*rows):
        student.zero_grad()
        for row in rows:
            loss, _ = objective({"input_ids": ids[row], "position_ids": positions[row]})
            (loss / len(rows)).backward()
        return torch.cat([p.grad.flatten() for p in student.parameters()])

    whole, pieces = gradient(slice(0, 2)), gradient(slice(0, 1), slice(1, 2))
    assert (whole - pieces).norm() / whole.norm() < 1e-4
