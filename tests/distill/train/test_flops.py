"""Model FLOPs against torch's own counter of what a step computes, and against formulas."""

import math

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from families import tiny_teacher
from transpoint.distill.config import Recipe
from transpoint.distill.stages.preflight import flops_per_token, what_will_run
from transpoint.distill.train.flops import align_flops, distill_flops, peak_flops
from transpoint.students import StudentConfig, build_student
from transpoint.teachers.random import random_teacher

LENGTH = 32


def models(mixer="mamba2", teacher="random-llama", **options):
    teacher = random_teacher(teacher)[0].requires_grad_(False)
    return teacher, build_student(teacher, StudentConfig(mixer=mixer, **options)).train().requires_grad_(False)


def weights(module):
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, torch.nn.Linear))


def mixers_train(student):
    for mixer in student.mixer_layers():
        if mixer is not None:
            mixer.requires_grad_(True)


def products(step) -> float:
    """What torch counts of matrix products in linear layers, per token (attention and state left out)."""
    with FlopCounterMode(display=False) as counter:
        step()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if str(op).endswith(("aten.mm", "aten.addmm"))) / LENGTH


def test_everything_trains_is_six_times_the_weights():
    teacher, student = models(keep_attention=[0, 2, 3])
    student.requires_grad_(True)
    (mixer,) = [mixer for mixer in student.mixer_layers() if mixer is not None]
    heads, size = mixer.num_heads, mixer.head_dim
    state = 4 * heads * size**2 + 2 * 4 * (heads + 2 * mixer.num_kv_heads) * size
    attention = 3 * 4 * heads * size * (LENGTH + 1) / 2
    assert distill_flops(None, student, LENGTH) == pytest.approx(6 * weights(student) + 3 * (attention + state))
    both = distill_flops(teacher, student, LENGTH)
    assert both - distill_flops(None, student, LENGTH) == pytest.approx(2 * weights(teacher) + attention / 3 * 4)


def test_frozen_weights_take_no_gradient_of_their_own():
    _, student = models(keep_attention=[0, 2, 3])
    frozen = distill_flops(None, student, LENGTH)
    mixers_train(student)
    before = weights(student.get_decoder().layers[0])
    flowing = distill_flops(None, student, LENGTH) - frozen
    mixer = weights(student.mixer_layers()[1])
    mixing = (frozen - 2 * weights(student)) - 4 * 64 * (LENGTH + 1) / 2  # of layers 1 to 3
    assert flowing == pytest.approx(2 * (weights(student) - before) + 2 * mixer + 2 * mixing)


@pytest.mark.parametrize("train", ["mixers", "all"])
def test_distillation_is_what_torch_counts(train):
    teacher, student = models(keep_attention=[0, 2])
    student.requires_grad_(True) if train == "all" else mixers_train(student)
    ids = torch.randint(0, 100, (1, LENGTH))

    def step():
        with torch.no_grad():
            teacher(ids, use_cache=False)
        student(ids, use_cache=False).logits.sum().backward()

    counted = products(step)
    attention = sum(4 * 64 * (LENGTH + 1) / 2 * passes for passes in ([1] * 4 + ([3, 3] if train == "all" else [1, 3])))
    state = sum(
        3 * (4 * m.num_heads * m.head_dim**2 + 8 * (m.num_heads + 2 * m.num_kv_heads) * m.head_dim)
        for m in student.mixer_layers()
        if m is not None
    )
    # The input gradients of the first trained layer's own first projections are counted, and not taken where the
    # layers before it are frozen.
    slack = 0.02 if train == "all" else 0.05
    assert distill_flops(teacher, student, LENGTH) - attention - state == pytest.approx(counted, rel=slack)


def test_alignment_trains_each_mixer_in_each_form():
    teacher, student = models(keep_attention=[0, 2, 3])
    mixers_train(student)
    mixer = student.mixer_layers()[1]
    forward = 2 * weights(teacher.get_decoder()) + 4 * 4 * 64 * (LENGTH + 1) / 2
    state = 4 * mixer.num_heads * mixer.head_dim**2 + 8 * (mixer.num_heads + 2 * mixer.num_kv_heads) * mixer.head_dim
    own = 4 * weights(mixer) + 2 * weights(mixer.out) + 3 * state
    assert align_flops(teacher, student, LENGTH) == pytest.approx(forward + own)
    teacher, student = models("transmamba", keep_attention=[0, 2, 3])
    mixers_train(student)
    mixer = student.mixer_layers()[1]
    state = 4 * mixer.num_heads * mixer.head_dim**2
    own = 4 * weights(mixer) + 2 * weights(mixer.out) + 3 * state
    own += 4 * (weights(mixer) - weights(mixer.dt_proj)) + 2 * weights(mixer.out) + 3 * 4 * 64 * (LENGTH + 1) / 2
    assert align_flops(teacher, student, LENGTH) == pytest.approx(forward + own)


def test_a_token_passes_the_feature_maps_of_all_heads():
    found = []
    for feature_map in (None, "softmax"):
        teacher, student = models("window_mamba2", keep_attention=[0, 2, 3], feature_map=feature_map)
        mixers_train(student)
        found.append(align_flops(teacher, student, LENGTH))
    mixer = student.mixer_layers()[1]
    state = 4 * mixer.num_heads * mixer.head_dim**2  # as large again
    assert found[1] - found[0] == pytest.approx(4 * (mixer.q_map.numel() + mixer.k_map.numel()) + 3 * state)


def test_trans_points_count_what_each_form_computes():
    teacher, student = models("transmamba")
    at = {}
    for point in (0, 16, LENGTH, math.inf):
        student.set_trans_points(point, warn=False)
        at[point] = distill_flops(None, student, LENGTH)
    layers, state = 4, 2 * 64 * 16  # 64 wide, heads of 16
    assert at[math.inf] == at[LENGTH] == pytest.approx(2 * weights(student) + layers * 4 * 64 * (LENGTH + 1) / 2)
    assert at[0] == pytest.approx(2 * weights(student) + layers * 2 * state)
    half = 4 * 64 * (16 + 1) / 2 * 16 / LENGTH + state * 1.5
    assert at[16] == pytest.approx(2 * weights(student) + layers * half)


def test_a_window_limits_what_is_seen():
    _, student = models(teacher="random-mistral", keep_attention=[0, 2, 3])
    window = student.config.sliding_window
    assert window
    difference = distill_flops(None, student, 100 * window) - distill_flops(None, student, 50 * window)
    assert 0 < difference < 3 * 4 * 64  # a token sees nearly as many keys in both


def test_peaks_by_device_name():
    tera = 1e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == peak_flops("NVIDIA GH200 480GB")
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989 * tera
    assert peak_flops("NVIDIA H100 PCIe", torch.float16) == 756 * tera
    assert peak_flops("NVIDIA H200 NVL") == 835 * tera
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5 * tera
    assert peak_flops("NVIDIA L40S") == 362 * tera and peak_flops("NVIDIA L40") == 181 * tera
    assert peak_flops("NVIDIA L4") == 121 * tera and peak_flops("NVIDIA B200") == 2250 * tera
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165 * tera
    unknown = ("cpu", "NVIDIA A10G", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU")
    assert [peak_flops(name) for name in (*unknown, "NVIDIA GeForce RTX 4090 D", "NVIDIA X2000")] == [None] * 6
    assert peak_flops("NVIDIA H200", torch.float64) is None


# Mixtures of experts: (weights of a layer besides attention that a token passes), of a hidden size of 64
EXPERTS = {
    "mixtral": 4 * 64 + 2 * 3 * 64 * 128,  # the router, and two of four experts
    "qwen3_moe": 4 * 64 + 2 * 3 * 64 * 64,
    "granitemoe": 4 * 64 + 2 * 3 * 64 * 128,
    "glm4_moe": 4 * 64 + 2 * 3 * 64 * 64 + 3 * 64 * 64,  # and one that all tokens pass
}


@pytest.mark.parametrize("family", EXPERTS)
def test_of_experts_those_count_that_a_token_is_sent_to(family):
    teacher = tiny_teacher(family).requires_grad_(False)
    student = build_student(teacher, StudentConfig(keep_attention="every:2"))
    layer, length = teacher.model.layers[-1], 8
    attention = sum(m.in_features * m.out_features for m in layer.self_attn.modules() if isinstance(m, nn.Linear))
    head = 64 * 259
    dense = [one for one in teacher.model.layers if not any(p.ndim == 3 for p in one.parameters())]
    weights = sum(m.in_features * m.out_features for one in dense for m in one.modules() if isinstance(m, nn.Linear))
    weights += (4 - len(dense)) * (attention + EXPERTS[family]) + head
    mixing = 4 * 4 * layer.self_attn.q_proj.out_features * (length + 1) / 2
    own = distill_flops(None, student.requires_grad_(False), length)
    assert distill_flops(teacher, student, length) - own == 2 * weights + mixing


def test_what_cannot_be_counted_stops_nothing():
    teacher, _ = random_teacher("random-llama")
    student = build_student(teacher, StudentConfig())
    for model in (teacher, student):
        model.model.layers[0].mlp.register_parameter("odd", nn.Parameter(torch.zeros(2, 2, 2, 2)))
    for stage in ("align", "distill"):
        assert flops_per_token(stage, teacher, student, 8) is None
    groups = [{"name": "all", "parameters": dict(student.named_parameters()), "lr": 0.1}]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(
            what_will_run("distill", groups, student, teacher, Recipe(), "bf16", device="NVIDIA H100 80GB HBM3")
        )
    assert "memory of a process" in capture.get() and "time: about" not in capture.get()
