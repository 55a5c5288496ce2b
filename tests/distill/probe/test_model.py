"""Probes of models that are small enough to know what they must find."""

import json
import math

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from transpoint.distill.cli import main
from transpoint.distill.probe.lens import last_norm, lens
from transpoint.distill.probe.linear import Fit, Ridge, sketched
from transpoint.distill.probe.memory import changed, heads, recalled
from transpoint.students import StudentConfig, build_student, untrained
from transpoint.teachers.random import random_teacher


@pytest.fixture(scope="module")
def teacher():
    return random_teacher("random-llama", 0)


@pytest.fixture(scope="module")
def student(teacher):
    return build_student(teacher[0], StudentConfig(keep_attention=[1])).eval()


def tokens(batch=4, length=20, seed=0):
    return torch.randint(3, 250, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_a_ridge_regression_is_that_of_the_whole_data_whatever_the_scale_of_features():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator) * torch.tensor([1e-3, 1, 10, 100, 1])
    y = x @ torch.tensor([[1e3, 0], [1, 1], [0, 0.1], [0.01, 0], [0, 0]]) + 3
    probe, fit = Ridge(1e-9), Fit()
    for part in (slice(0, 100), slice(100, 300)):
        probe.add(x[part], y[part])
    fit.add(probe(x[300:]), y[300:])
    assert fit.r2 == pytest.approx(1, abs=1e-4)
    mean = Fit()
    mean.add(y.mean(0).expand_as(y), y)
    assert mean.r2 == pytest.approx(0, abs=1e-6)


def test_a_sketch_is_linear_keeps_norms_about_and_leaves_small_states_alone():
    a, b = torch.randn(2, 3, 4, 40, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sketched(a), sketched(a, 9000)) is False and sketched(a).shape == (3, 2048)
    assert torch.allclose(sketched(a + 2 * b), sketched(a) + 2 * sketched(b), atol=1e-4)
    assert torch.allclose(sketched(a).norm(dim=1), a.flatten(1).norm(dim=1), rtol=0.1)
    assert torch.equal(sketched(a, 6400), a.flatten(1))


def test_the_lens_of_the_last_layer_is_the_model_and_a_student_that_is_its_teacher_is_beside_it(teacher, student):
    found = lens(student, tokens(), teacher[0])
    assert found["student"][-1] == {"kl": pytest.approx(0, abs=1e-6), "same_top": 1}
    assert len(found["student"]) == len(found["teacher"]) == len(found["beside"]) == 4
    assert found["student"][0]["kl"] > 1e-3 and found["beside"][-1]["kl"] > 0
    assert all(part["kl"] < 1e-6 for part in lens(teacher[0], tokens(), teacher[0])["beside"])


def test_the_norm_before_the_output_is_found_whatever_it_is_called():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=260, **sizes)).eval()
    norm, ids = last_norm(model), tokens(1, 5)
    with torch.no_grad():
        seen = []
        handle = norm.register_forward_hook(lambda module, args, output: seen.append(output))
        assert model.get_decoder()(input_ids=ids).last_hidden_state is seen[0]
        handle.remove()
    assert isinstance(norm, torch.nn.LayerNorm)


def test_half_lives_are_those_of_the_steps_and_rates(student):
    mixer = student.mixer_layers()[0]
    half_life = torch.tensor([2.0, 8.0, 32.0, 128.0])
    before = {name: t.clone() for name, t in mixer.state_dict().items()}
    mixer.set_decay(half_life, torch.ones(4, 1))
    found = heads(student, tokens())
    mixer.load_state_dict(before)
    assert sorted(found) == [0, 2, 3]
    assert found[0]["half_life"] == pytest.approx(half_life.tolist(), rel=1e-3)
    assert len(found[0]["norm"]) == 4 and min(found[0]["norm"]) > 0


@pytest.mark.parametrize("mixer, known", [("mamba1", True), ("s4d", True), ("gdn", False), ("transmamba", True)])
def test_what_is_no_factor_has_no_half_life(teacher, mixer, known):
    points = {"trans_points": 0} if mixer == "transmamba" else {}
    model = build_student(teacher[0], StudentConfig(mixer=mixer, keep_attention=[1], **points)).eval()
    found = heads(model, tokens())[0]
    assert (found["half_life"] is not None) is known and len(found["norm"]) == 4
    assert not known or all(0 < value < math.inf for value in found["half_life"])


def test_a_state_forgets_a_token_by_its_decay_and_a_teacher_has_no_state(teacher, student):
    for mixer in student.mixer_layers():
        if mixer is not None:
            mixer.set_decay(torch.full((4,), 1.0), torch.ones(4, 1))
    found = changed(student, tokens(length=40))
    assert found["distances"] == [1, 2, 4, 8, 16] and sorted(found["state"]) == [0, 2, 3]
    first = found["state"][0]
    assert first[0] > 10 * first[3] > 0 and first[3] / first[4] > 2**6  # of 2^8, and norms of the states differ
    alone = changed(teacher[0], tokens(length=40))
    assert alone["state"] == {} and len(alone["hidden"]) == 4


def test_a_token_is_read_off_its_own_hidden_state_best():
    model = untrained("llama", StudentConfig(keep_attention=[]), hidden_size=16, num_hidden_layers=1).eval()
    found = recalled(model, tokens(8, 40))
    assert found["distances"] == [0, 1, 2, 4, 8]
    assert found["hidden"][0][0] > 0.2 > found["hidden"][0][-1]
    assert len(found["state"][0]) == 5


@pytest.mark.slow
def test_the_command_writes_a_page_and_figures(teacher, student, tmp_path, capsys):
    student.save_pretrained(tmp_path / "student")
    teacher[1].save_pretrained(tmp_path / "student")
    teacher[0].save_pretrained(tmp_path / "teacher")
    teacher[1].save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    words = ["probe", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]
    words += ["--text", str(tmp_path / "text.txt"), "--length", "24", "--sequences", "4"]
    assert main(words) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "student" / "probe" / "probe.json").read_text())
    assert set(found["lens"]) == {"student", "teacher", "beside"} and found["sequences"] == 4
    page = (tmp_path / "student" / "probe" / "probe.html").read_text()
    assert page.count("<svg") == 6 and "Half-life" in page


def test_errors_name_what_to_do(tmp_path, capsys):
    for words, expected in [
        (["othello", "sizes=3"], "othello has no setting 'sizes': expected one of mixer, layers"),
        (["othello", "steps=many"], "steps: expected a number, got 'many'"),
        ([str(tmp_path), "steps=3"], "only othello has settings: leave out steps=3"),
        ([str(tmp_path)], "there is no text to probe on: name some with --text"),
    ]:
        assert main(["probe", *words]) == 1
        assert expected in capsys.readouterr().err
