"""Attention whose projections several layers share, with a LoRA in each, as in Zamba."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from decoding import in_pieces, logits, tokens
from safetensors import safe_open

from transpoint.distill.errors import RunError
from transpoint.distill.export import custom, native
from transpoint.distill.settings import DistillConfig, LoraSettings
from transpoint.distill.train.engines import make_engine
from transpoint.distill.train.flops import distill_flops
from transpoint.distill.train.groups import distill_groups, mixer_parameters
from transpoint.distill.train.lora import attach
from transpoint.students import HybridForCausalLM, StudentConfig, StudentError, build_student
from transpoint.teachers.random import random_teacher

pytestmark = pytest.mark.stack
WHOLE = 64  # a rank that every matrix of the tiny teachers has at most
KEPT = {"keep_attention": "every:2"}


def build(family="llama", rank=WHOLE, start=None, **options):
    teacher, _ = random_teacher(f"random-{family}", 0)
    return build_student(teacher, StudentConfig(attention_shared_rank=rank, **(options or KEPT)), start)


@torch.no_grad()
def stirred(student):
    """What is each layer's own is made different from the teacher's."""
    generator = torch.Generator().manual_seed(0)
    for parameter in student.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return student


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_at_full_rank_it_is_what_keeping_attention_is(family):
    teacher, _ = random_teacher(f"random-{family}", 0)
    every = build(family, mixer="softmax", keep_attention=[])
    torch.testing.assert_close(logits(every, tokens()), logits(teacher, tokens()), rtol=1e-4, atol=1e-4)
    found, kept = build(family), build_student(teacher, StudentConfig(**KEPT))
    torch.testing.assert_close(logits(found, tokens()), logits(kept, tokens()), rtol=1e-4, atol=1e-4)


def test_matrices_are_the_mean_and_what_is_nearest_to_each_difference():
    teacher, _ = random_teacher("random-llama", 0)
    student = build(rank=3)
    own = [teacher.model.layers[layer].self_attn.k_proj.weight for layer in (1, 3)]
    for layer, weight in zip((1, 3), own, strict=True):
        held = student.mixer_layers()[layer].k_proj
        torch.testing.assert_close(held.weight, (own[0] + own[1]) / 2)
        left, values, right = torch.linalg.svd(weight - (own[0] + own[1]) / 2, full_matrices=False)
        nearest = left[:, :3] @ values[:3].diag() @ right[:3]
        torch.testing.assert_close(held.up.weight @ held.down.weight, nearest, rtol=1e-4, atol=1e-5)
    errors = [(logits(build(rank=rank), tokens()) - logits(build(), tokens())).norm() for rank in (0, 8, 16, 31)]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0
    assert "mean" in str(student.transfer_plan) and "less the mean" in str(student.transfer_plan)


@pytest.mark.parametrize("untied", [False, True])
def test_shared_matrices_are_stored_once_and_shared_again(untied, tmp_path):
    teacher, _ = random_teacher("random-llama", 0, tie_word_embeddings=not untied)
    student = stirred(build_student(teacher, StudentConfig(attention_shared_rank=2, **KEPT)))
    student.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = [name for name in file.keys() if ".q_proj." in name]  # noqa: SIM118, it is no mapping
    parts = {f"model.layers.{i}.self_attn.q_proj.{part}.weight" for i in (1, 3) for part in ("up", "down")}
    assert set(stored) == parts | {"model.layers.1.self_attn.q_proj.weight"}
    loaded = HybridForCausalLM.from_pretrained(tmp_path)
    for one in (student, loaded, copy.deepcopy(loaded), HybridForCausalLM._from_config(loaded.config)):
        first, second = one.mixer_layers()[1::2]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert getattr(first, name).weight is getattr(second, name).weight
            assert getattr(first, name).up.weight is not getattr(second, name).up.weight
    assert torch.equal(logits(loaded, tokens()), logits(student, tokens()))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (not untied)


def test_a_shared_matrix_learns_from_all_its_layers_and_is_trained_once():
    student = build(rank=2, **KEPT, gate_bias=True).train()
    student(tokens(), labels=tokens()).loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name
    names = [name for name in mixer_parameters(student) if name.endswith("q_proj.weight")]
    assert names == ["model.layers.1.self_attn.q_proj.weight"]
    grouped = [p for group in distill_groups(student, DistillConfig()) for p in group["parameters"].values()]
    assert len({id(p) for p in grouped}) == len(grouped) == len(list(student.parameters()))
    shared, both = student.mixer_layers()[1].q_proj.weight, student.mixer_layers()[3]
    together = shared.grad.clone()
    student.zero_grad()
    both.q_proj.weight = torch.nn.Parameter(shared.detach().clone())
    student(tokens(), labels=tokens()).loss.backward()
    torch.testing.assert_close(shared.grad + both.q_proj.weight.grad, together, rtol=1e-4, atol=1e-6)


def test_what_is_shared_is_computed_in_each_layer_all_the_same():
    shared, own = build(rank=2), build(rank=None)
    width, hidden = 64 + 32 + 32 + 64, 64
    terms = 2 * sum(2 * (hidden + out) for out in (64, 32, 32, 64))  # of two layers, at rank 2
    assert distill_flops(None, shared.eval(), 8) - distill_flops(None, own.eval(), 8) == 6 * terms
    assert own.num_parameters() - shared.num_parameters() == width * hidden - terms


def test_decoding_token_by_token_equals_a_full_forward():
    student = stirred(build("qwen2", rank=2)).double()
    torch.testing.assert_close(in_pieces(student, tokens(), [9, *[1] * 15]), logits(student, tokens()))


def test_what_cannot_be_shared_is_refused_in_one_line():
    start = build(mixer="softmax", keep_attention=[0, 2], rank=2)
    with pytest.raises(StudentError) as caught:
        build(mixer="softmax", keep_attention=[0], rank=2, start=start)
    assert str(caught.value) == (
        "layers [1, 3] of the student to start from share projections with further ones now: convert all of them at "
        "once, or leave student.attention_shared_rank out"
    )
    again = build(mixer="softmax", keep_attention=[0, 2], rank=2, start=stirred(start))
    assert torch.equal(logits(again, tokens()), logits(start, tokens()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_holds_what_is_one_once(dtype, tmp_path):
    student = build(rank=2)
    custom.write(student, tmp_path, dtype)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(dict(student.named_parameters()))


def test_native_and_fsdp_refuse_it():
    student = build(rank=2)
    assert native.why_not(student) == "its attention has no projections that layers share; use format custom"
    config = StudentConfig(plan="zamba")
    assert (
        native.why_no_student(config) == "its attention has no projections that layers share; use export.format=custom"
    )
    groups = distill_groups(student, DistillConfig())
    with pytest.raises(RunError, match="fully_shard cannot share projections between the layers that it shards"):
        make_engine(student, groups, [0.9, 0.95], 1.0, 1, SimpleNamespace(distributed_type=DistributedType.FSDP))


def test_adapters_go_to_what_is_not_shared():
    student = build(mixer="transmamba", keep_attention=[1, 3], rank=2)
    attach(student, LoraSettings(rank=2, targets=["q_proj"]), "distill")
    adapted = {name.split(".lora_")[0] for name, _ in student.named_parameters() if ".lora_" in name}
    assert adapted == {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 2)}
