"""Compiled layers and recorded passes: the same numbers as without them."""

import copy
import math
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention import flex_attention
from transformers import masking_utils

from forked import in_two
from transpoint.distill.config import Recipe
from transpoint.distill.objectives import Alignment, Distillation, decoder_inputs, hidden_states
from transpoint.distill.settings import DistillConfig
from transpoint.distill.stages.processes import make_accelerator
from transpoint.distill.train import engines as engine_module
from transpoint.distill.train.compiled import SEEN, compiled
from transpoint.distill.train.engines import make_engine
from transpoint.distill.train.groups import distill_groups, mixer_parameters, only_these_train
from transpoint.distill.train.trainer import InPrecision
from transpoint.students import StudentConfig, build_student
from transpoint.teachers import load_teacher

GPU = torch.cuda.is_available()
SCHEDULE = [0, 8, 20, "inf"]
MIXERS = {
    "mamba2": {"gate_bias": True},  # else nothing but the gate has a gradient at first
    "mamba1": {},
    "transmamba": {"trans_points": SCHEDULE},
    "window_gdn": {"window": 6, "sinks": 2, "feature_map": "softmax"},
    "gdn": {},
    "s4d": {"state_size": 8},
    "softmax": {"attention_window": 6, "attention_positions": False},
}
pytestmark = pytest.mark.slow  # all compile: seconds each


@pytest.fixture
def flex(monkeypatch):
    """Lets flex_attention train on CPUs, where it is not to be used: here it is its numbers that count."""
    if not GPU:
        monkeypatch.setattr(flex_attention, "_validate_device", lambda *args: None)


def plain_mask(*args, make_mask=flex_attention.create_block_mask, **options):
    return make_mask(*args, **{**options, "_compile": False})


@pytest.fixture
def plain_masks(monkeypatch, flex):
    """Block masks from Python, of which each kind takes seconds to compile; numbers are the same."""
    if not GPU:
        for module in (flex_attention, masking_utils):  # ours, and those of transformers
            monkeypatch.setattr(module, "create_block_mask", plain_mask)


@pytest.fixture
def traced_masks(monkeypatch, flex):
    """Block masks compiled, but by no compiler of C++."""
    if not GPU:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def make(family="llama", mixer="mamba2", seed=0, device="cpu"):
    torch.manual_seed(seed)
    teacher = load_teacher(f"random-{family}", "float32", device)[0].requires_grad_(False)
    keep = "every:2" if mixer == "mamba2" else []
    student = build_student(teacher, StudentConfig(mixer=mixer, keep_attention=keep, **MIXERS[mixer]))
    return teacher, student.float().to(device).train()


def packed(rows=2, length=64, seed=0, device="cpu", vocabulary=256):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    starts = torch.rand(rows, length, generator=generator) < 1 / 15
    starts[:, 0] = True
    column = torch.arange(length)
    positions = column - torch.where(starts, column, 0).cummax(1).values
    return {"input_ids": ids.to(device), "position_ids": positions.to(device)}


def gradients(objective, batch):
    objective.zero_grad()
    loss, figures = objective(batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def assert_compiled_gives(objective, wanted, wanted_gradients, rtol, atol, gradient_atol, backend="aot_eager"):
    """The loss and, by name, the gradients of the first batch, from compiled layers."""
    with compiled(objective, backend=backend):
        loss, found = gradients(objective, packed())
    torch.testing.assert_close(loss, wanted, rtol=rtol, atol=atol)
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=gradient_atol, msg=name)


def share_of_attention(points, batch):
    return sum((batch["position_ids"] < float(point)).float().mean() for point in points) / len(points)


@pytest.mark.parametrize(
    ("kind", "mixer", "backend"),
    [
        ("align", "window_gdn", "eager"),
        ("distill", "transmamba", "aot_eager"),
        ("hidden", "mamba2", "eager"),
    ],
)
def test_compiled_is_as_before_and_leaves_nothing_behind(kind, mixer, backend, request):
    """Layers that do the same are compiled once, whatever their TransPoints, whose figure follows a schedule that moves
    on; afterwards all is as it was."""
    request.getfixturevalue("traced_masks" if kind == "hidden" else "plain_masks")  # once with masks that are compiled
    teacher, student = make(mixer=mixer)
    settings = DistillConfig(hidden_weight=0.5 if kind == "hidden" else 0.0)
    objective = Alignment(teacher, student) if kind == "align" else Distillation(teacher, student, settings)
    before = [model.config._attn_implementation for model in (teacher, student)]
    own = {name: set(vars(module)) for name, module in objective.named_modules()}
    wanted, wanted_gradients = gradients(objective, packed())
    with compiled(objective, backend=backend):
        loss, found = gradients(objective, packed())
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if mixer == "transmamba" and kind == "distill":
            batch = packed(seed=1)
            for points in ([0, 5, 31, "inf"], SCHEDULE):
                student.set_trans_points(points, warn=False)
                torch.testing.assert_close(objective(batch)[1]["attention"], share_of_attention(points, batch))
            # As a recorded pass sees it: TransPoints are read where the device has them.
            student.mixer_layers()[1].point.fill_(0)
            moved = objective(batch)[1]["attention"]
            torch.testing.assert_close(moved, share_of_attention([0, 0, *SCHEDULE[2:]], batch))
            student.set_trans_points(SCHEDULE, warn=False)
        gradients(objective, packed(seed=2))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs <= 8
        assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-7)
    assert found.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=2e-6, msg=name)
    assert [model.config._attn_implementation for model in (teacher, student)] == before
    assert {name: set(vars(module)) for name, module in objective.named_modules()} == own
    again, _ = gradients(objective, packed())
    assert torch.equal(again, wanted)


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_families_compile_with_their_own_masks(family, plain_masks):
    """Windows, norms of queries and keys; and where a config names no head_dim: what dynamo traces."""
    teacher, student = make(family)
    if family == "mistral":
        for model in (teacher, student):
            model.config.head_dim = None
    objective = Distillation(teacher, student, DistillConfig())
    wanted = gradients(objective, packed())
    assert_compiled_gives(objective, *wanted, rtol=1e-4, atol=1e-6, gradient_atol=1e-5, backend="eager")


def test_layers_computed_again_in_the_backward_pass_are_compiled_in_parts(plain_masks):
    teacher, student = make()
    objective = Distillation(teacher, student, DistillConfig())
    wanted, wanted_gradients = gradients(objective, packed())
    enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    assert_compiled_gives(objective, wanted, wanted_gradients, rtol=1e-5, atol=1e-7, gradient_atol=2e-6)


def test_two_batches_on_their_way_know_their_own_documents(plain_masks):
    """Also where layers are computed again, after the next batch came."""
    teacher, student = make(mixer="transmamba")
    objective = Distillation(teacher, student, DistillConfig())
    batches = [packed(seed=seed) for seed in range(2)]
    wanted: dict = {}
    for batch in batches:
        for name, gradient in gradients(objective, batch)[1].items():
            wanted[name] = wanted.get(name, 0) + gradient
    enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    with compiled(objective, backend="eager"):
        objective.zero_grad()
        sum(objective(batch)[0] for batch in batches).backward()
    for name, gradient in wanted.items():
        found = dict(objective.named_parameters())[name].grad
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=4e-6, msg=name)


def test_measured_under_inference_mode_first(plain_masks):
    """A TransPoint that the device holds can still be moved."""
    _, student = make(mixer="transmamba")
    student.set_attn_implementation("flex_attention")
    batch = packed()
    with torch.inference_mode():
        student(**batch, use_cache=False)
    student.set_trans_points([0, 3, 5, "inf"], warn=False)
    assert student.mixer_layers()[1].point == 3


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch):
    """Without flex_attention, packed documents are laid out by the host: the engine says so and goes on."""
    teacher, student = make(mixer="transmamba")
    for model in (teacher, student):
        monkeypatch.setattr(type(model), "_supports_flex_attn", False)
    monkeypatch.setattr(engine_module, "compiled", partial(compiled, backend="eager"))
    settings = DistillConfig(teacher_lr=1e-3)
    groups = distill_groups(student, settings)
    said = []
    objective = InPrecision(Distillation(teacher, student, settings), "fp32", "cpu")
    wanted = objective(packed())[0]
    engine = make_engine(objective, groups, [0.9, 0.95], 1.0, 1, Accelerator(cpu=True), compile=True, say=said.append)
    for _ in range(2):
        assert torch.equal(engine.forward_backward(packed(), last=True)[0], wanted)
    assert len(said) == 1 and said[0].startswith("layers could not be compiled")
    engine.close()


def task(stage, mixer, device="cpu"):
    """What is trained in a stage: the student, its objective and groups of parameters."""
    teacher, student = make(mixer=mixer, device=device)
    settings = DistillConfig(teacher_lr=1e-3, lr=1e-3)
    if stage == "align":
        objective = Alignment(teacher, student)
        groups = [{"name": "mixers", "parameters": mixer_parameters(student), "lr": 1e-3}]
    else:
        objective, groups = Distillation(teacher, student, settings), distill_groups(student, settings)
    only_these_train(objective, groups)
    return student, objective, [{"weight_decay": 0.1, **group} for group in groups]


def both_stages_under_fsdp2(rank):
    flex_attention._validate_device = lambda *args: None
    flex_attention.create_block_mask = plain_mask
    engine_module.compiled = partial(compiled, backend="aot_eager")
    accelerator, said = make_accelerator(Recipe()), []
    wanted = {"align": ["mixers.0", "mixers.2"], "distill": [f"student.model.layers.{layer}" for layer in range(4)]}
    for stage in wanted:
        _, objective, groups = task(stage, "mamba2")
        engine = make_engine(objective, groups, [0.9, 0.95], 1.0, 1, accelerator, True, said.append)
        units = [name for name, module in objective.named_modules() if name and isinstance(module, FSDPModule)]
        assert sorted(units) == wanted[stage]
        if stage == "align":
            engine.forward_backward(packed(), last=True)
            engine.step(1.0)
        assert not said
        engine.close()


def test_stages_after_each_other_compile_under_fsdp2():
    """What is gathered together is never part of what is compiled: each stage has its own."""
    in_two(both_stages_under_fsdp2, engine="fsdp2")


def steps(device, mixer, stage, compile, accumulation=1, precision="fp32", count=SEEN + 4):
    """Losses, norms and weights of a few optimizer steps of an engine; what it said."""
    student, objective, groups = task(stage, mixer, device)
    said, losses = [], []
    module = InPrecision(objective, precision, device)
    engine = make_engine(module, groups, [0.9, 0.95], 1.0, accumulation, Accelerator(), compile, said.append)
    for step in range(count):
        if mixer == "transmamba" and stage == "distill":  # a schedule that moves on, as annealing does
            student.set_trans_points([0, 8 + step, 20 + step, "inf"], warn=False)
        for micro in range(accumulation):
            rows = 3 if step == count - 2 else 2  # one batch of another shape
            batch = packed(rows=rows, length=128, seed=100 * step + micro, device=device)
            loss, figures = engine.forward_backward(batch, last=micro == accumulation - 1)
            losses.append(loss.item())
            assert all(math.isfinite(value.item()) for value in figures.values())
        losses.append(engine.step(1.0)[0].item())
    weights = {name: copy.deepcopy(p.detach()) for group in groups for name, p in group["parameters"].items()}
    recorded = len(engine._recorded or ())
    engine.close()
    return losses, weights, said, recorded


@pytest.mark.gpu
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", ["align", "distill"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_recorded_steps_are_as_those_launched_from_python(mixer, stage, accumulation):
    losses, weights, said, recorded = steps("cuda", mixer, stage, True, accumulation)
    assert not said and recorded == 1
    wanted, wanted_weights, *_ = steps("cuda", mixer, stage, False, accumulation)
    for place, rel in [
        *((micro, 2e-3) for micro in range(accumulation)),
        (accumulation, 2e-2),
    ]:  # losses, then a step's norm
        assert losses[place :: accumulation + 1] == pytest.approx(wanted[place :: accumulation + 1], rel=rel)
    untouched = dict(make(mixer=mixer, device="cuda")[1].named_parameters())
    for name, weight in wanted_weights.items():  # AdamW turns rounding in tiny gradients into steps
        error = (weights[name] - weight).norm() / weight.norm().clamp(min=1e-3)
        assert error < 2e-2, (name, error)
        # What no pass has a gradient for is not decayed either.
        assert torch.equal(weight, untouched[name]) == torch.equal(weights[name], untouched[name]), name


@pytest.mark.gpu
def test_recorded_steps_in_bfloat16_learn_as_others():
    wanted, *_ = steps("cuda", "mamba2", "distill", False, precision="bf16", count=20)
    losses, _, said, _ = steps("cuda", "mamba2", "distill", True, precision="bf16", count=20)
    # Rounding is another one, and norms of tiny gradients mostly that: it is the losses that must fall alike.
    assert not said and losses[::2] == pytest.approx(wanted[::2], rel=5e-2)


@pytest.mark.gpu
def test_a_step_that_waits_for_the_device_is_launched_from_python():
    teacher, student = make(device="cuda")
    objective = Distillation(teacher, student, DistillConfig(teacher_lr=1e-3))
    forward = objective.forward
    objective.forward = lambda batch: forward(batch) if batch["input_ids"].sum().item() else None
    said = []
    groups = distill_groups(student, DistillConfig(teacher_lr=1e-3))
    module = InPrecision(objective, "fp32", "cuda")
    engine = make_engine(module, groups, [0.9, 0.95], 1.0, 1, Accelerator(), True, said.append)
    losses = []
    for _ in range(SEEN + 3):
        losses.append(engine.forward_backward(packed(device="cuda"), last=True)[0].item())
        engine.step(0.0)
    assert len(said) == 1 and "CUDA graph" in said[0]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)
    engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("length", [40, 64, 100, 128])
def test_short_sequences(length):
    """Where all is attention, student and teacher are one, by whichever kernels."""
    teacher, student = make(mixer="transmamba", device="cuda")
    student.set_trans_points([length] * 4, warn=False)
    objective = Distillation(teacher, student, DistillConfig())
    batch = packed(length=length, device="cuda")
    with torch.no_grad():
        wanted = hidden_states(teacher, {**batch, "use_cache": False}, every=False)[-1]
    with compiled(objective):
        assert objective(batch)[0] < 1e-6
        with torch.no_grad():
            found = hidden_states(teacher, decoder_inputs(batch, teacher, student), every=False)[-1]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
