"""Training a student: gradients reach every parameter of every mixer, with gradient checkpointing too."""

import pytest
import torch

OPTIONS = {
    "llama": {"family": "llama", "gate_bias": True},
    "qwen2, all mixers": {"family": "qwen2", "keep_attention": (), "gate_bias": True},
    "qwen3 with rope": {"family": "qwen3", "rope": True, "gate_bias": True},
    "bare": {"family": "qwen3", "gate": False, "norm": False, "conv_activation": None},
}


def loss_and_gradients(student, **kwargs):
    student.train()
    ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    student.zero_grad()
    loss = student(ids, labels=ids, **kwargs).loss
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in student.named_parameters()}


@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("stirred", [True, False], ids=["stirred", "as transferred"])
def test_gradients_reach_every_parameter(make_student, case, stirred):
    student = make_student(**case, stirred=stirred)
    loss, gradients = loss_and_gradients(student)
    assert torch.isfinite(torch.tensor(loss))
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.isfinite().all() and gradient.norm() > 0, name


def test_gradients_reach_every_part_of_the_input_projection(make_student):
    student = make_student(stirred=False, gate_bias=True)
    _, gradients = loss_and_gradients(student)
    mixer = student.mixer_layers()[0]
    rows = gradients["model.layers.0.self_attn.in_proj.weight"].split(list(mixer.sizes.values()))
    assert list(mixer.sizes) == ["z", "x", "B", "C", "dt"]
    assert all(part.norm(dim=1).min() > 0 for part in rows)


def test_gradients_are_those_of_finite_differences(make_student):
    student = make_student("qwen3", rope=True)
    _, gradients = loss_and_gradients(student)
    parameters = dict(student.named_parameters())
    for part in ("A_log", "dt_bias", "D", "in_proj.weight", "conv1d.weight", "q_norm.weight", "out_proj.weight"):
        name = f"model.layers.0.self_attn.{part}"
        norm = gradients[name].norm()
        size = min(3e-3, 5e-4 / norm.item())  # where the loss is steep, it is curved, too
        step = size * gradients[name] / norm
        losses = []
        for sign in (1, -1):
            parameters[name].data += sign * step
            losses.append(loss_and_gradients(student)[0])
            parameters[name].data -= sign * step
        assert (losses[0] - losses[1]) / (2 * size) == pytest.approx(norm.item(), rel=0.01), part


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("given", ["nothing", "mask", "documents"])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(make_student, case, given):
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    positions = torch.cat([torch.arange(8), torch.arange(12)]).expand(2, -1)
    kwargs = {"nothing": {}, "mask": {"attention_mask": mask}, "documents": {"position_ids": positions}}[given]
    student = make_student(**case)
    calls = []
    student.mixer_layers()[0].register_forward_hook(lambda *args: calls.append(1))
    loss, gradients = loss_and_gradients(student, **kwargs)
    assert len(calls) == 1
    student.gradient_checkpointing_enable()
    loss_again, gradients_again = loss_and_gradients(student, **kwargs)
    assert len(calls) == 3  # once more in the backward pass
    assert loss_again == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-5, atol=1e-6)


def test_a_few_steps_on_one_batch_lower_its_loss(make_student):
    student = make_student(stirred=False)
    mixers = [mixer for mixer in student.mixer_layers() if mixer is not None]
    optimizer = torch.optim.AdamW([p for mixer in mixers for p in mixer.parameters()], lr=1e-2)
    first, _ = loss_and_gradients(student)
    for _ in range(10):
        loss, _ = loss_and_gradients(student)
        optimizer.step()
    assert loss < first - 0.5
