"""Students that do something, tokens, and the logits of students that get them at once or in pieces."""

import torch

LENGTH = 24  # longer than the window of the tiny Mistral


def tokens(batch=2, length=LENGTH, seed=0):
    return torch.randint(3, 250, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(student, ids, **kwargs):
    return student(ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def in_pieces(student, ids, sizes, mask=None, cache=None):
    """Logits of tokens that come in pieces, with a cache between them."""
    cache, start, found = cache or student.new_cache(), 0, []
    for size in sizes:
        end = start + size
        kwargs = {}
        if mask is not None:  # positions as generate() gives them
            kwargs["attention_mask"] = mask[:, :end]
            kwargs["position_ids"] = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:]
        found.append(student(ids[:, start:end], cache=cache, **kwargs).logits)
        start = end
    return torch.cat(found, 1)


def assert_near(found, expected, tolerance=1e-9):
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()


def assert_decodes_left_padded_rows_as_each_alone(student):
    """At once, token by token, and in pieces."""
    rows = [tokens(1, n, seed=n) for n in (5, 20, 13)]
    ids, mask = torch.full((3, 20), 7), torch.zeros(3, 20, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 20 - row.shape[1] :], mask[i, 20 - row.shape[1] :] = row[0], 1
    whole = logits(student, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for sizes in ([1] * 20, [9, 6, 1, 1, 1, 1, 1]):
        found = in_pieces(student, ids, sizes, mask)
        for i, row in enumerate(rows):
            expected = logits(student, row)[0]
            assert_near(found[i][mask[i] == 1], expected)
            assert_near(whole[i][mask[i] == 1], expected)


def assert_decodes_in_pieces_as_at_once(student, cuts):
    """Cut at these places."""
    ids, edges = tokens(), [0, *sorted(cuts), LENGTH]
    sizes = [end - begin for begin, end in zip(edges, edges[1:], strict=False)]
    assert_near(in_pieces(student, ids, sizes), logits(student, ids))


@torch.no_grad()
def stirred(student, seed=0):
    """What only the state-space form has is set at random: as transferred, much of it does nothing."""
    generator = torch.Generator().manual_seed(seed)
    for mixer in filter(None, student.mixer_layers()):
        for name, parameter in mixer.state_space_parameters().items():
            size = 0.05 if "proj" in name else 0.3
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return student
