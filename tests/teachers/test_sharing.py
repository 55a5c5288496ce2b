"""A teacher's layers, held by two processes together."""

import os
import socket

import torch
from torch.distributed.tensor import DTensor

from transpoint.teachers import load_teacher, share_layers

IDS = torch.arange(24).view(2, 12)


def outputs(teacher):
    with torch.no_grad():
        return teacher(IDS, use_cache=False).logits


def share(rank, port, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    teacher = load_teacher("random-llama")[0].requires_grad_(False)
    share_layers(teacher)
    for _ in range(2):  # what a pass put together, it has let go of
        found = outputs(teacher)
        for name, parameter in teacher.named_parameters():
            held = parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()
            assert held == parameter.numel() / (2 if ".layers." in name else 1), name
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_each_has_half_of_the_layers_and_all_of_the_predictions(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(share, (port, tmp_path), nprocs=2)
    wanted = outputs(load_teacher("random-llama")[0])
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), wanted)
