"""A teacher's layers, held by two processes together."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from forked import in_two
from transpoint.teachers import load_teacher, share_layers

IDS = torch.arange(24).view(2, 12)


def outputs(teacher):
    with torch.no_grad():
        return teacher(IDS, use_cache=False).logits


def share(rank, folder):
    torch.distributed.init_process_group("gloo")
    teacher = load_teacher("random-llama")[0].requires_grad_(False)
    share_layers(teacher)
    for _ in range(2):  # what a pass put together, it has let go of
        found = outputs(teacher)
        for name, parameter in teacher.named_parameters():
            held = parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()
            assert held == parameter.numel() / (2 if ".layers." in name else 1), name
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_each_has_half_of_the_layers_and_all_of_the_predictions(tmp_path):
    in_two(share, tmp_path)
    wanted = outputs(load_teacher("random-llama")[0])
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), wanted)
