import copy

import pytest
import torch
from torch import nn

from transpoint.students import StudentConfig, build_student
from transpoint.teachers.random import random_teacher


@pytest.fixture(scope="session")
def make_student():
    """A tiny student whose mixers are stirred: as transferred, their convolutions and skips would do nothing."""

    made = {}  # by their arguments: a copy takes a sixth of the time

    def make(*args, **options):
        key = repr((args, sorted(options.items())))
        if key not in made:
            made[key] = build(*args, **options)
        return copy.deepcopy(made[key])

    def build(family="llama", keep_attention=(1,), sizes=None, seed=0, stirred=True, **options):
        teacher, _ = random_teacher(f"random-{family}", seed, **(sizes or {}))
        student = build_student(teacher, StudentConfig(keep_attention=list(keep_attention), **options))
        if stirred:
            for mixer in student.mixer_layers():
                if mixer is not None:
                    stir(mixer, torch.Generator().manual_seed(seed))
        return student

    return make


@torch.no_grad()
def stir(mixer: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in mixer.named_parameters():
        size = 0.05 if "proj" in name else 0.3
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))
