"""Models without a teacher: what their weights start as, and that they learn from there."""

import math

import pytest
import torch
import torch.nn.functional as F

from transpoint.students import HybridForCausalLM, StudentConfig, StudentError, build_student, untrained
from transpoint.teachers import TeacherError, load_teacher

PLANS = [
    {"mixer": "mamba2"},
    {"mixer": "mamba2", "keep_attention": "every:2"},
    {"mixer": "transmamba", "trans_points": [0, 4, 8]},
    {"mixer": "gdn"},
    {"mixer": "gdn", "gate_bias": True},
    {"mixer": "window_mamba2", "window": 4},
    {"mixer": "window_gdn", "window": 4},
    {"keep_attention": 1.0},
    {"mixer": "mamba1"},
    {"mixer": "mamba1", "selection": "x"},
    {"mixer": "s4d", "state_size": 8},
    {"plan": "samba", "attention_window": 4, "keep_attention": None},
    {"plan": "mambaformer", "keep_attention": None},
]
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


def made(plan, family="llama", seed=0, **sizes):
    return untrained(family, StudentConfig(**{"keep_attention": [], **plan}), seed, **SMALL | sizes)


def named(plan):
    return "-".join(map(str, plan.values()))


@pytest.mark.parametrize("plan", PLANS, ids=named)
def test_it_starts_at_chance_and_every_parameter_learns(plan):
    model = made(plan, family="qwen3")
    tokens = torch.randint(0, 259, (4, 24), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=tokens, labels=tokens).loss
    assert abs(loss.item() - math.log(259)) < 0.5
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("plan", PLANS, ids=named)
def test_it_learns_a_text_by_heart(plan):
    model = made(plan)
    tokens = torch.tensor([list(b"to be, or not to be, that is")])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(14):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.5  # one byte in 13 different ones: 2.4 by their frequencies alone


@pytest.mark.parametrize("mixer", ["mamba2", "transmamba", "window_mamba2", "window_gdn", "gdn"])
def test_a_state_starts_as_published(mixer):
    model = made({"mixer": mixer}, hidden_size=512, num_attention_heads=128)
    for layer in model.mixer_layers():
        steps, rates = F.softplus(layer.dt_bias), layer.A_log.exp()
        assert 1e-3 <= steps.min() < 3e-3 and 3e-2 < steps.max() <= 0.1 + 1e-6
        assert abs(steps.log().mean() - math.log(1e-2)) < 0.5
        assert rates.min() < 3 and 14 < rates.max() <= 16 and ("gdn" in mixer or rates.min() >= 1)
        if "gdn" in mixer:
            assert layer.b_bias is None or layer.b_bias.eq(0).all()
        else:
            assert layer.D.eq(1).all()
        if layer.conv1d is not None:
            assert abs(layer.conv1d.weight.std() - 0.5 / 3**0.5) < 0.02  # uniform from -0.5 to 0.5


@pytest.mark.parametrize("plan", PLANS, ids=named)
def test_linear_layers_of_mixers_are_drawn_as_those_of_attention_are(plan):
    model = made(plan, hidden_size=192, num_attention_heads=4, num_hidden_layers=3)
    spread = (3 * 192) ** -0.5
    for name, module in model.named_modules():
        own = plan.get("mixer") == "mamba1" and name.endswith(".dt_proj")  # by its rank
        if isinstance(module, torch.nn.Linear) and not own:
            residual = name.endswith(("o_proj", "out_proj", "down_proj"))
            expected = spread / 6**0.5 if residual else spread
            assert abs(module.weight.std() / expected - 1) < 0.1, name
            assert module.bias is None or not module.bias.any()


def test_a_seed_says_all_of_its_weights_and_nothing_else_does():
    torch.manual_seed(1)
    one = made({"mixer": "mamba2"}, seed=5).state_dict()
    here = torch.random.get_rng_state()
    again = made({"mixer": "mamba2"}, seed=5).state_dict()
    assert torch.equal(torch.random.get_rng_state(), here)
    other = made({"mixer": "mamba2"}, seed=6).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    name = "model.layers.{}.self_attn.in_proj.weight"
    assert not torch.equal(one[name.format(0)], other[name.format(0)])
    assert not torch.equal(one[name.format(0)], one[name.format(1)])


def test_mixers_of_a_student_to_go_on_from_stay():
    model, _ = load_teacher("scratch-llama", sizes=SMALL)
    before = build_student(model, StudentConfig(keep_attention=[1, 2]))
    after = build_student(model, StudentConfig(keep_attention=[2]), before)
    first, second = (student.mixer_layers() for student in (before, after))
    assert torch.equal(first[0].in_proj.weight, second[0].in_proj.weight)
    assert second[1].D.eq(1).all()


def test_it_says_that_it_has_no_teacher(tmp_path):
    made({"mixer": "mamba2"}, seed=3).save_pretrained(tmp_path)
    assert HybridForCausalLM.from_pretrained(tmp_path).config.scratch_seed == 3
    teacher, _ = load_teacher("random-llama")
    assert build_student(teacher, StudentConfig()).config.scratch_seed is None


@pytest.mark.parametrize(
    "family, sizes, message",
    [
        ("lama", {}, "no untrained model 'scratch-lama'; expected one of scratch-llama"),
        ("llama", {"hiden_size": 8}, "a llama model has no size 'hiden_size'; did you mean 'hidden_size'?"),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads does not divide"),
        ("llama", {"hidden_size": "wide"}, "no scratch-llama of these sizes"),
    ],
)
def test_what_no_model_can_be_made_of_is_refused(family, sizes, message):
    with pytest.raises(TeacherError) as caught:
        untrained(family, StudentConfig(), **sizes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(StudentError, match="holds layer 9"):
        made({"keep_attention": [9]})
