"""orient: its loss against matrices written out, what it trains, and its place in a run."""

import pytest
import torch

from run_files import TINY, done
from toy_mixer import ToyMixer
from transpoint.distill.cli import main
from transpoint.distill.config import load_recipe
from transpoint.distill.errors import RunError
from transpoint.distill.objectives import Orientation, attention_pairs
from transpoint.distill.stages import stage_inputs
from transpoint.distill.stages.inputs import lineage
from transpoint.distill.train.flops import orient_flops
from transpoint.distill.train.groups import mixer_parameters, only_these_train
from transpoint.kernels.ssd import ssd_matrix
from transpoint.students import MIXERS, MixerKind, StudentConfig, build_student
from transpoint.students.modeling.documents import document_index
from transpoint.teachers import attention_view
from transpoint.teachers.random import random_teacher

ORIENT = ("orient.steps=20", "orient.batch_size=4", "orient.lr=3e-3", "orient.log_every=5")
VARIANTS = [
    {},
    {"rope": True},
    {"gate": False, "norm": False, "conv_kernel": 1, "conv_activation": None},
    {"mixer": "transmamba", "trans_points": 7},
    {"mixer": "transmamba", "trans_points": 7, "conv_kernel": 3, "rope": False},
]


def make(family="llama", **options):
    teacher = random_teacher(f"random-{family}")[0].requires_grad_(False)
    return teacher, build_student(teacher, StudentConfig(**{"keep_attention": [2], **options}))


def batch_of(*lengths, rows=2):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (rows, sum(lengths)), generator=generator)
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths]).expand(rows, -1)}


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_loss_is_the_distance_of_the_matrices_themselves(family, options):
    """Attention's as a softmax, the mixer's as what the recurrence does."""
    teacher, student = make(family, **options)
    batch = batch_of(21, 9)
    loss, figures = Orientation(teacher, student)(batch)
    views, seq_idx = attention_view(teacher), document_index(batch["position_ids"])
    pairs = attention_pairs(teacher, views, batch)
    same = (seq_idx[:, :, None] == seq_idx[:, None])[:, None]
    wanted = {}
    for layer in (0, 1, 3):
        hidden, _, rotary = pairs[layer]
        q, k, _ = views[layer].project(hidden, rotary)
        attention = views[layer].weights(q, k).masked_fill(~same, 0)
        attention = attention / attention.sum(-1, keepdim=True)
        mixer = student.mixer_layers()[layer]
        own = mixer.mixing(hidden, rotary, seq_idx)
        matrix = ssd_matrix(own["dt"], own["A"], own["B"], own["C"], dt_bias=own["dt_bias"]).masked_fill(~same, 0)
        distance = (matrix - attention).pow(2).sum((2, 3)) / attention.pow(2).sum((2, 3))
        wanted[f"layer_{layer}"] = distance.mean()
        # And that matrix is what the state-space form applies to its values.
        if layer == 0 and options.get("gate") is False:
            taken = []
            handle = mixer.out.register_forward_pre_hook(lambda module, args, taken=taken: taken.append(args[0]))
            mixer(hidden, rotary, seq_idx=seq_idx)
            handle.remove()
            v = torch.cat([views[0].v_proj(hidden)], -1).unflatten(-1, (2, -1)).repeat_interleave(2, dim=2)
            torch.testing.assert_close(taken[0], torch.einsum("bhts,bshp->bthp", matrix, v).flatten(2))
    assert figures.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(figures[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, torch.stack([*wanted.values()]).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_it_trains_what_the_matrix_depends_on_and_nothing_else(options):
    teacher, student = make("qwen3", **options)
    trained = mixer_parameters(student, only="matrix")
    only_these_train(student, [{"parameters": trained}])
    Orientation(teacher, student)(batch_of(30))[0].backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained.values())
    student.requires_grad_(True).zero_grad()
    Orientation(teacher, student)(batch_of(30))[0].backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    reached = {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}
    attention = {name for name in reached if name.split(".")[-2] in ("q_proj", "k_proj", "q_norm", "k_norm")}
    assert trained.keys() == reached - (attention if options.get("mixer") == "transmamba" else set())


@pytest.mark.slow
def test_orient_is_a_stage_of_runs_that_ask_for_it(tiny_run, tiny_copy, run_tiny):
    assert "orient" not in stage_inputs(load_recipe(tiny_run / "recipe.yaml"))
    out = run_tiny(tiny_copy, *ORIENT, until_stage="align")
    assert "transfer: done before, reused" in out and "calibrate: done before, reused" in out
    assert "orient: not run yet" in out and "align: changed: the stage before (calibrate -> orient)" in out
    figures = done(tiny_copy, "orient")
    assert figures["training"]["tokens"] == 20 * 4 * 64
    assert figures["quality"]["kl"] < done(tiny_copy, "calibrate")["quality"]["kl"]
    assert run_tiny(tiny_copy, *ORIENT, until_stage="align").count("done before, reused") == 4
    # What is said of a run that has got as far as orient is of that, not of what came of it before.
    run_tiny(tiny_copy, *ORIENT, "orient.lr=1e-3", until_stage="orient")
    assert list(lineage(tiny_copy)) == ["transfer", "calibrate", "orient"]
    # Left out again, it is as if it had not been.
    out = run_tiny(tiny_copy, until_stage="align")
    assert "align: changed: the stage before (orient -> calibrate)" in out
    assert done(tiny_copy, "align")["quality"]["kl"] == done(tiny_run, "align")["quality"]["kl"]


def test_plan_says_what_orient_will_train(capsys):
    for overrides, count in (((), 0), (ORIENT, 1)):
        assert main(["plan", str(TINY), *overrides]) == 0
        assert capsys.readouterr().out.count("orient: what will run") == count


def test_attention_of_a_transmamba_student_stays_the_teachers():
    teacher, student = make("qwen3", mixer="transmamba", trans_points="inf", keep_attention=[])
    trained = mixer_parameters(student, only="matrix")
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.3)
        ids = batch_of(24)["input_ids"]
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits)
        student.set_trans_points(0, warn=False)
        assert not torch.allclose(student(ids).logits, teacher(ids).logits, atol=1e-2)


def test_a_mixer_without_a_matrix_is_refused(run_tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(MIXERS, "toy", MixerKind("Toy", "Y", ToyMixer))
    with pytest.raises(RunError, match="a toy mixer has no matrix between tokens: set it to 0"):
        run_tiny(tmp_path, *ORIENT, "student.mixer=toy", "export.format=custom", until_stage="orient")


def test_operations():
    """Of one mixer: in_proj forward and backward but to its input, two matrices, and the gradients of one."""
    teacher, student = make(keep_attention=[1, 2, 3])
    only_these_train(student, [{"parameters": mixer_parameters(student, only="matrix")}])
    length, mixer = 32, student.mixer_layers()[0]
    forward = orient_flops(teacher, student, length)
    entries = 2 * 2 * mixer.num_heads * mixer.head_dim * (length + 1) / 2
    whole = forward - 4 * mixer.in_proj.weight.numel() - 2 * entries
    matrices = {name: p.numel() for name, p in teacher.named_parameters() if p.ndim == 2}
    products = sum(count for name, count in matrices.items() if "embed" not in name and "lm_head" not in name)
    scores = 4 * 4 * mixer.num_heads * mixer.head_dim * (length + 1) / 2  # four layers
    assert whole == pytest.approx(2 * products + scores)
