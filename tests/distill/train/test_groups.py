"""Which parameters train: groups with their own learning rates, and adapters."""

import pytest
import torch
from safetensors.torch import load_file

from transpoint.distill.config import Recipe
from transpoint.distill.errors import RunError
from transpoint.distill.models import load_model
from transpoint.distill.settings import DistillConfig, GroupConfig, LoraSettings
from transpoint.distill.stages.align import groups as groups_of_align
from transpoint.distill.train.groups import distill_groups, group_of
from transpoint.distill.train.lora import attach, merge
from transpoint.students import MIXERS, StudentConfig, build_student
from transpoint.teachers.random import random_teacher

TARGETS = ["q_proj", "in_proj", "out_proj", "down_proj"]
pytestmark = pytest.mark.usefixtures("unverified")


def make(family="llama"):
    teacher, _ = random_teacher(f"random-{family}")
    return build_student(teacher, StudentConfig(keep_attention=[1]))


def by_name(student, **settings):
    return {group["name"]: group for group in distill_groups(student, DistillConfig(**settings))}


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "qwen2"])
def test_every_parameter_is_in_one_group_of_a_known_kind(family):
    student = make(family)
    groups = by_name(student, teacher_lr=1e-4)
    names = [name for group in groups.values() for name in group["parameters"]]
    assert sorted(names) == sorted(name for name, _ in student.named_parameters())
    expected = {"mixers", "attention", "mlp", "norms", "embeddings"}
    assert groups.keys() == expected | ({"head"} if not student.config.tie_word_embeddings else set())
    assert group_of("model.layers.0.self_attn.in_proj.weight", student) == "mixers"
    assert group_of("model.layers.1.self_attn.q_proj.weight", student) == "attention"
    assert group_of("model.norm.weight", student) == group_of("model.layers.0.input_layernorm.weight", student)


def test_a_head_is_known_whatever_it_is_called():
    """As `embed_out`, for one, in GPT-NeoX of earlier versions of transformers."""
    student = make("qwen3")
    student.embed_out = student._modules.pop("lm_head")
    student.get_output_embeddings = lambda: student.embed_out
    assert group_of("embed_out.weight", student) == "head"
    assert group_of("model.embed_tokens.weight", student) == "embeddings"
    with pytest.raises(RunError, match="names embed_out; this student's projections are "):
        attach(student, LoraSettings(rank=4, targets=["embed_out"]), "distill")


def test_learning_rates_and_weight_decay_of_groups():
    groups = DistillConfig().groups
    groups.norms, groups.mlp = GroupConfig(lr=3e-3), GroupConfig(lr=0.0)
    groups.mixers = GroupConfig(weight_decay=0.5)
    found = by_name(make(), lr=1e-3, teacher_lr=1e-4, weight_decay=0.1, groups=groups)
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in found.items()}
    assert rates.pop("mixers") == (1e-3, 0.5) and rates.pop("norms") == (3e-3, 0.1)
    assert "mlp" not in rates and set(rates.values()) == {(1e-4, 0.1)}


def test_what_was_the_teachers_takes_a_tenth_of_the_rate_by_default():
    found = by_name(make(), lr=3e-4)
    assert found["mixers"]["lr"] == 3e-4
    assert all(group["lr"] == pytest.approx(3e-5) for name, group in found.items() if name != "mixers")
    assert by_name(make(), teacher_lr=0.0).keys() == {"mixers"}
    assert by_name(make(), lora=LoraSettings(rank=4)).keys() == {"mixers"}  # adapters are instead of it


def test_adapters_are_a_group_and_what_they_adapt_is_frozen():
    student = make()
    attach(student, LoraSettings(rank=4, targets=TARGETS), "distill")
    found = by_name(student, teacher_lr=1e-4)
    names = {name for group in found.values() for name in group["parameters"]}
    assert found["lora"]["lr"] == 1e-3 and all(".lora_" in name for name in found["lora"]["parameters"])
    assert not any(".base_layer." in name for name in names)
    adapted = {name.split(".lora_")[0].split(".")[-1] for name in found["lora"]["parameters"]}
    assert adapted == set(TARGETS)


def test_merged_adapters_give_the_same_outputs_and_leave_a_plain_student():
    student = make().eval()
    plain = {name: p.shape for name, p in student.named_parameters()}
    ids = torch.arange(3, 27)[None]
    before = student(ids).logits
    attach(student, LoraSettings(rank=4, targets=TARGETS), "distill")
    torch.testing.assert_close(student(ids).logits, before)  # B of an adapter starts at zero
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    adapted = student(ids).logits
    assert (adapted - before).abs().max() > 0.01
    merge(student)
    assert {name: p.shape for name, p in student.named_parameters()} == plain
    torch.testing.assert_close(student(ids).logits, adapted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", ["lm_head", "w_proj"])
def test_a_target_that_is_none_is_refused_with_those_there_are(target):
    with pytest.raises(RunError) as caught:
        attach(make(), LoraSettings(rank=4, targets=["q_proj", target]), "distill")
    assert str(caught.value) == (
        f"distill.lora.targets names {target}; this student's projections are "
        "down_proj, gate_proj, in_proj, k_proj, o_proj, out_proj, q_proj, up_proj, v_proj"
    )


def test_a_run_with_adapters_changes_what_they_adapt_and_nothing_else(tiny_copy, run_tiny):
    rank = ["distill.lora.rank=4", "distill.lora.targets=[q_proj, down_proj]", "distill.groups.mixers.lr=0"]
    run_tiny(tiny_copy, *rank, "distill.teacher_lr=0", "distill.gradient_checkpointing=true")
    before, after = (load_file(tiny_copy / stage / "student" / "model.safetensors") for stage in ("align", "distill"))
    changed = {name.rsplit(".", 2)[1] for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed == {"q_proj", "down_proj"}
    load_model(tiny_copy / "export" / "native")  # as any other student


def test_a_run_that_would_train_nothing_is_refused(tiny_copy, run_tiny):
    with pytest.raises(RunError, match="distill trains nothing: every group's learning rate is 0"):
        run_tiny(tiny_copy, "distill.groups.mixers.lr=0", "distill.teacher_lr=0")


@pytest.mark.parametrize("mixer", MIXERS)
def test_in_align_what_came_from_the_teacher_may_take_another_rate(mixer):
    teacher, _ = random_teacher("random-qwen3")
    student = build_student(teacher, StudentConfig(mixer=mixer, keep_attention=[1]))
    recipe = Recipe()
    (one,) = groups_of_align(student, recipe)
    recipe.align.copied_lr = 1e-5
    *new, copied = groups_of_align(student, recipe)
    assert [one["lr"], copied["lr"], *(group["lr"] for group in new)] == [recipe.align.lr, 1e-5] + [1e-3] * len(new)
    added = {name for group in new for name in group["parameters"]}  # softmax attention has nothing new
    assert one["parameters"].keys() == added | copied["parameters"].keys() and bool(added) == (mixer != "softmax")
    assert not added & copied["parameters"].keys()
    # What the plan takes from the teacher, and the norms that stay.
    sources = {t.target for t in student.transfer_plan.transfers if t.source is not None and ".conv1d." not in t.target}
    norms = {name for name in one["parameters"] if "q_norm" in name or "k_norm" in name}
    assert copied["parameters"].keys() == sources | norms
