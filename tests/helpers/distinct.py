"""A student in which no mistake of a format can hide."""

import torch

from transpoint.students import StudentConfig, build_student
from transpoint.teachers.random import random_teacher


def distinct_student(family="llama", keep=(1, 3), options=None, **sizes):
    """None of its mixer parameters is zero, one, or the same in two places."""
    teacher, _ = random_teacher(f"random-{family}", **sizes)
    student = build_student(teacher, StudentConfig(keep_attention=list(keep), **(options or {})))
    generator = torch.Generator().manual_seed(7)
    size = {"in_proj.weight": 0.08, "A_log": 0.8, "dt_bias": 0.8, "z_bias": 0.5, "D": 0.5, "norm.weight": 0.3}
    with torch.no_grad():
        for mixer in filter(None, student.mixer_layers()):
            for name, parameter in mixer.named_parameters():
                parameter.add_(size.get(name, 0.1) * torch.randn(parameter.shape, generator=generator))
    return student.eval()
