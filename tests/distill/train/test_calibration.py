"""Calibration finds what is known to be best, on teachers made for it and on random ones."""

import math

import pytest
import torch

from transpoint.distill.train import calibration as module
from transpoint.distill.train.calibration import HALF_LIVES, calibrate, read_fits, save_fits
from transpoint.students import StudentConfig, build_student
from transpoint.students.modeling.documents import Documents
from transpoint.students.modeling.state_space import GATE_OPEN
from transpoint.teachers.random import random_teacher

GRID = tuple(2.0**i for i in range(-1, 7))
VARIANTS = [
    {"gate_bias": True},
    {"norm": False, "gate_bias": True},
    {"norm": False, "gate": False, "rope": True, "conv_activation": None},
    {},
]


def make(family="llama", **options):
    teacher, _ = random_teacher(f"random-{family}")
    student = build_student(teacher, StudentConfig(keep_attention=[0, 2], **options))
    return teacher.requires_grad_(False), student


def batches_of(*lengths, seed=0):
    """One batch of one sequence, packed from documents of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 250, (1, sum(lengths)), generator=generator)
    return [{"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}]


def split(batches, *lengths):
    """The documents of a packed batch as batches of their own."""
    parts = []
    for batch in batches:
        columns = {key: value.split(lengths, dim=1) for key, value in batch.items()}
        parts += [{key: value[i] for key, value in columns.items()} for i in range(len(lengths))]
    return parts


def reads(mixer, *arguments, **keywords):
    """What out_proj is given."""
    taken = []
    handle = mixer.out_proj.register_forward_pre_hook(lambda m, args: taken.append(args[0].float()))
    mixer(*arguments, **keywords)
    handle.remove()
    return taken[0]


def half_lives(mixer):
    return math.log(2) / (mixer.A_log.exp() * torch.nn.functional.softplus(mixer.dt_bias))


@pytest.mark.parametrize("step", [0.001, 0.5, 1.0, 30.0])
@pytest.mark.parametrize("half_life", [0.5, 8.0, 2048.0])
def test_a_decay_is_set(half_life, step):
    _, student = make(gate=False, norm=False)
    mixer = student.mixer_layers()[1]
    mixer.set_decay(torch.full((4,), half_life), torch.full((4, 1), step))
    torch.testing.assert_close(half_lives(mixer), torch.full((4,), half_life), rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.nn.functional.softplus(mixer.dt_bias), torch.full((4,), step), rtol=1e-3, atol=0)
    # Without activation, gate and norm, and before training, an input then halves in so many tokens.
    decay = torch.exp(-mixer.A_log.exp() * torch.nn.functional.softplus(mixer.dt_bias))
    torch.testing.assert_close(decay**half_life, torch.full((4,), 0.5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("options", VARIANTS[:3])
def test_known_half_lives_and_scales_are_recovered(options, monkeypatch):
    """The target is what a mixer of known decay and scale reads."""
    teacher, student = make(**options)
    _, known = make(**options)
    wanted = {1: torch.tensor([0.5, 4.0, 64.0, 16.0]), 3: torch.tensor([8.0, 8.0, 1.0, 32.0])}
    scales = torch.tensor([0.3, 1.0, 2.5, 0.05])
    with torch.no_grad():
        for layer, half_life in wanted.items():
            mixer = known.mixer_layers()[layer]
            channels = scales[:, None] * torch.linspace(0.5, 1.5, 64).view(4, 16)
            mixer.set_decay(half_life, channels if mixer.scales_channels else scales[:, None])

    def attention_heads(view, hidden, position_embeddings, seq_idx):
        mixer = known.mixer_layers()[view.layer]
        return reads(mixer, hidden, position_embeddings, seq_idx=seq_idx), torch.zeros(4)

    monkeypatch.setattr(module, "_attention_heads", attention_heads)
    found = calibrate(teacher, student, batches_of(40, 56) + batches_of(96, seed=1), half_lives=GRID)
    for layer, half_life in wanted.items():
        assert found[layer].half_life.tolist() == half_life.tolist()
        assert found[layer].error < 1e-4
        mixer, truth = student.mixer_layers()[layer], known.mixer_layers()[layer]
        torch.testing.assert_close(half_lives(mixer), half_life, rtol=1e-3, atol=0)
        torch.testing.assert_close(mixer.dt_bias, truth.dt_bias, rtol=1e-2, atol=1e-3)
        if mixer.norm is not None:
            torch.testing.assert_close(mixer.norm.weight, truth.norm.weight, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("options", VARIANTS)
def test_it_is_no_worse_than_any_single_half_life(options):
    teacher, student = make(**options)
    batches = batches_of(64)
    best = calibrate(teacher, student, batches, half_lives=GRID)
    for half_life in GRID:
        single = calibrate(teacher, student, batches, half_lives=(half_life,))
        for layer in best:
            assert best[layer].error <= single[layer].error + 1e-6
            assert single[layer].half_life.tolist() == [half_life] * 4
    assert all(0 < best[layer].error < 1 for layer in best)


@pytest.mark.parametrize("options", VARIANTS[:2])
def test_the_error_is_that_of_the_calibrated_mixer(options):
    """Measured again, from outside: relative to what the teacher's heads read."""
    teacher, student = make(**options)
    batches = batches_of(48)
    found = calibrate(teacher, student, batches)
    for layer in (1, 3):
        attention, mixer = teacher.model.layers[layer].self_attn, student.mixer_layers()[layer]
        taken = {}
        handles = [
            attention.register_forward_hook(lambda m, a, kwargs, o, t=taken: t.update(kwargs), with_kwargs=True),
            attention.o_proj.register_forward_pre_hook(lambda m, args, t=taken: t.update(target=args[0])),
        ]
        teacher(**batches[0], use_cache=False)
        for handle in handles:
            handle.remove()
        target = taken["target"].unflatten(-1, (4, 16))
        read = reads(mixer, taken["hidden_states"], taken["position_embeddings"]).unflatten(-1, (4, 16))
        errors = (read - target).pow(2).sum((0, 1, 3)) / target.pow(2).sum((0, 1, 3))
        expected = found[layer].error.item()
        if "norm" in options:  # one scale for a head, and a step must be positive: then it can only be worse
            assert errors.mean().item() >= expected - 1e-4
        else:
            assert errors.mean().item() == pytest.approx(expected, rel=1e-3)
        assert set(found[layer].half_life.tolist()) <= set(HALF_LIVES)


@pytest.mark.parametrize("options", VARIANTS)
def test_packed_documents_do_not_leak(options):
    teacher, packed = make(**options)
    _, apart = make(**options)
    lengths = (20, 9, 35)
    batches = batches_of(*lengths)
    found = calibrate(teacher, packed, batches)
    expected = calibrate(teacher, apart, split(batches, *lengths))
    for layer in found:
        assert found[layer].half_life.tolist() == expected[layer].half_life.tolist()
        assert found[layer].error.item() == pytest.approx(expected[layer].error.item(), rel=1e-4)
        assert found[layer].lookback.tolist() == pytest.approx(expected[layer].lookback.tolist(), rel=1e-4)
    for (name, a), b in zip(packed.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    joined = [{**batches[0], "position_ids": torch.arange(sum(lengths))[None]}]
    shown = calibrate(teacher, packed, joined)
    assert all(shown[layer].record() != found[layer].record() for layer in found)


def test_documents_are_found_once_a_batch(monkeypatch):
    """It waits for the device, so not in each mixer and at each half-life."""
    teacher, student = make(mixer="transmamba", trans_points="mamba")
    made = []
    find = Documents.__init__
    monkeypatch.setattr(Documents, "__init__", lambda self, *args: (made.append(1), find(self, *args))[1])
    calibrate(teacher, student, batches_of(12, 30) + batches_of(7))
    assert len(made) == 2


def test_the_lookback_is_the_mean_distance_that_attention_looks():
    teacher, student = make()
    batches = batches_of(12, 30)
    found = calibrate(teacher, student, batches)
    teacher.set_attn_implementation("eager")
    expected = {1: 0, 3: 0}
    for document in split(batches, 12, 30):
        length = document["input_ids"].shape[1]
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        attentions = teacher(**document, use_cache=False, output_attentions=True).attentions
        for layer in expected:
            expected[layer] = expected[layer] + (attentions[layer][0] * distance).sum((1, 2)) / 42
    for layer, lookback in expected.items():
        assert found[layer].lookback.tolist() == pytest.approx(lookback.tolist(), rel=1e-4)


@pytest.mark.parametrize("lookback", [0.2, 3.0, 40.0])
def test_decay_from_the_lookback(lookback, monkeypatch):
    """Weights that fall by d a token look back d / (1 - d) tokens: the nearest half-life of the grid, in octaves."""
    teacher, student = make()

    def attention_heads(view, hidden, position_embeddings, seq_idx):
        tokens = hidden.shape[1]
        return torch.ones(1, tokens, 64), torch.full((4,), lookback * tokens)

    monkeypatch.setattr(module, "_attention_heads", attention_heads)
    found = calibrate(teacher, student, batches_of(20), "lookback")
    d = lookback / (1 + lookback)
    wanted = math.log(2) / -math.log(d)
    nearest = min(HALF_LIVES, key=lambda h: abs(math.log(h / wanted)))
    for fit in found.values():
        assert fit.half_life.tolist() == [nearest] * 4
        assert fit.lookback.tolist() == pytest.approx([lookback] * 4)


def test_a_gate_without_a_bias_is_opened_by_its_inputs():
    teacher, student = make(gate_bias=False)
    mixer = student.mixer_layers()[1]
    assert mixer.z_bias is None and not any("z_bias" in name for name in student.state_dict())
    assert torch.count_nonzero(mixer.in_proj.weight[:64]) == 0
    taken = []
    handle = teacher.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: taken.append(kwargs["hidden_states"]), with_kwargs=True
    )
    batches = batches_of(40, 56) + batches_of(96, seed=1)
    calibrate(teacher, student, batches)
    handle.remove()
    h = torch.cat([hidden[0] for hidden in taken[:2]])
    z = h @ mixer.in_proj.weight[:64].T
    assert torch.equal(z, z[:, :1].expand(-1, 64))
    # The residual of least squares is perpendicular to what it is of.
    residual = z[:, 0] - GATE_OPEN
    assert residual.square().mean() < 0.5 * GATE_OPEN**2
    assert (h.T @ residual / len(h)).abs().max() < 1e-2


def test_only_decay_step_and_norm_change():
    teacher, student = make(gate_bias=True)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    taught = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    calibrate(teacher, student, batches_of(32))
    for name, parameter in student.named_parameters():
        changed = not torch.equal(parameter, before[name])
        if name.endswith((".A_log", ".norm.weight")) and "self_attn" in name:
            assert changed, name
        elif not name.endswith(".dt_bias"):
            assert not changed, name
    assert all(torch.equal(p, taught[name]) for name, p in teacher.named_parameters())
    assert not any(mixer.out_proj._forward_pre_hooks for mixer in filter(None, student.mixer_layers()))


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1", "gdn", "window_mamba2", "window_gdn"])
def test_what_was_found_is_kept_and_set_in_another_student(mixer, tmp_path):
    teacher, calibrated = make(mixer=mixer)
    _, other = make(mixer=mixer)
    path = tmp_path / "fits.safetensors"
    found = calibrate(teacher, calibrated, batches_of(48), half_lives=GRID)
    save_fits(found, path)
    for layer, fit in read_fits(path, torch.device("cpu")).items():
        fit.set(other.mixer_layers()[layer])
        assert fit.record() == found[layer].record()
    assert other.state_dict().keys() == calibrated.state_dict().keys()
    for name, value in other.state_dict().items():
        assert torch.equal(value, calibrated.state_dict()[name]), name
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"F32"', b'"I32"'))
    assert read_fits(path, torch.device("cpu")) == {}
    path.write_bytes(whole[:-5])
    assert read_fits(path, torch.device("cpu")) == {} == read_fits(tmp_path / "none", torch.device("cpu"))
