"""Where the documents of packed sequences lie, and attention within them.

There are two ways to attend: `document_mask` for flex_attention, whose shapes do not depend on where documents end, and
which only compiled code on a GPU can run; and `Documents`, which lays them out in rows of their own for any attention.
This file travels with exported checkpoints: it imports torch only.
"""

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def document_index(position_ids: Tensor) -> Tensor:
    """Document index (B,L) of packed sequences, from position ids (B,L) that restart at each document."""
    new = torch.ones_like(position_ids, dtype=torch.bool)
    new[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return new.cumsum(dim=-1, dtype=torch.int32) - 1


def token_position(seq_idx: Tensor) -> Tensor:
    """(B, L) each token's position in its document, from a document index (B, L)."""
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    column = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    return column - torch.where(starts, column, 0).cummax(dim=1).values


def document_mask(
    seq_idx: Tensor,
    window: int | None = None,
    point: Tensor | None = None,
    position: Tensor | None = None,
    sinks: int = 0,
):
    """flex_attention's mask of causal attention within documents.

    Args:
        seq_idx: (B, L) document index.
        window: how many last tokens a query sees; None: all.
        point: scalar, the position (`position`, (B, L)) in a document from which on a query sees nothing; None: none.
        sinks: how many first tokens of its document (by `position`) a query sees, too, where there is a window.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    def mask_mod(row, head, query, key):
        seen = (key <= query) & (seq_idx[row, query] == seq_idx[row, key])
        if window is not None:
            near = key > query - window
            seen = seen & ((near | (position[row, key] < sinks)) if sinks else near)  # type: ignore[index]  # given then
        if point is None:
            return seen
        return seen & (position[row, query] < point)  # type: ignore[index]  # given with a point

    batch, length = seq_idx.shape
    return create_block_mask(mask_mod, batch, None, length, length, seq_idx.device, _compile=True)


def flex_options(head_dim: int, device: torch.device) -> dict[str, int | bool]:
    """flex_attention's kernel options.

    Tiles that are faster than its own choice are given where that was measured: Hopper, heads of 64, under autocast.
    """
    # Its kernels for few queries (torch 2.11) fail at some lengths below 128, and inside of a layer give wrong numbers.
    options: dict[str, int | bool] = {"FORCE_USE_FLEX_ATTENTION": True}
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    if not hopper or head_dim > 64 or not torch.is_autocast_enabled("cuda"):
        return options
    forward = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    backward = {"BLOCK_M1": 64, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 64, "num_warps": 4, "num_stages": 2}
    tiles = {f"fwd_{k}": v for k, v in forward.items()} | {f"bwd_{k}": v for k, v in backward.items()}
    return options | tiles


class Span(NamedTuple):
    """What of packed documents a mixer takes by attention, and what from the state.

    mask: flex_attention's, of the queries before the TransPoint; None where there are none.
    point: the TransPoint, a scalar on the device; None where nothing comes after it.
    position: (B, L) each token's position in its document.
    options: flex_attention's kernel options.
    """

    mask: Any
    point: Tensor | None
    position: Tensor
    options: dict[str, int | bool]


class Spanned(Protocol):
    """What `Spans` asks of a mixer.

    attends: up to which token of a document it takes attention.
    sinks: how many first tokens of a document it sees besides its window.
    point: its TransPoint on the device, which `set_trans_point` keeps up to date.
    """

    window: int | None
    sinks: int
    head_dim: int
    point: Tensor | None

    @property
    def attends(self) -> int | float: ...

    def set_trans_point(self, trans_point: int | float) -> None: ...


class Spans:
    """Makes the spans of packed documents, one for each TransPoint, window and number of sinks.

    No shape depends on where documents end, nor on TransPoints, and nothing waits for the device: what a compiler or a
    CUDA graph has seen once, it has seen for all batches. `Documents` are for where flex_attention does not run.
    """

    def __init__(self, seq_idx: Tensor):
        """`seq_idx` (B, L): a document index, which changes where a new document starts."""
        self.seq_idx, self.position = seq_idx, token_position(seq_idx)
        self._made: dict[tuple, Span] = {}

    def of(self, mixer: Spanned) -> Span:
        """The span of a mixer that takes attention."""
        T, device = mixer.attends, self.seq_idx.device
        kind = (T, mixer.window, mixer.sinks)
        if T < math.inf and (mixer.point is None or mixer.point.device != device):
            with torch.inference_mode(False):  # or it could not be set outside of it
                mixer.point = torch.full((), 0, dtype=torch.long, device=device)
            mixer.set_trans_point(T)
        if kind not in self._made:
            point = mixer.point if T < math.inf else None
            mask = document_mask(self.seq_idx, mixer.window, point, self.position, mixer.sinks) if T > 0 else None
            self._made[kind] = Span(mask, point, self.position, flex_options(mixer.head_dim, device))
        return self._made[kind]


SHORTEST = 16  # tokens of a row of its own that a shorter document gets


class Documents:
    """Where the documents of packed sequences lie. Made once for all layers, as it has to wait for the device.

    Attributes, of documents numbered through the batch:
        count, longest: how many there are, and the tokens of the longest.
        position: (B, L) each token's position in its document.
    """

    def __init__(self, seq_idx: Tensor):
        """`seq_idx` (B, L): a document index, which changes where a new document starts."""
        self.position = token_position(seq_idx)
        # What follows is counted by the host, which has to know the shapes.
        self._start = (self.position == 0).flatten().nonzero().squeeze(1).cpu()
        self._length = torch.diff(self._start, append=torch.tensor([seq_idx.numel()]))
        self.count, self.longest = len(self._start), int(self._length.max())
        self._prefixes: dict[int, tuple[list[tuple[int, int]], Tensor, Tensor]] = {}

    def prefixes(self, length: int) -> tuple[list[tuple[int, int]], Tensor, Tensor]:
        """How to lay out the first `length` tokens of each document in rows of their own, and back.

        Rows are as wide as a power of two, or as `length`: documents of about one size lie together, so there are at
        most about twice as many places as tokens.

        Returns:
            (rows, width) of each group, and two indices for `take`. The first (sum of rows * width) are tokens among
            all B*L; -1 - i is token i, which belongs to another document where one has ended. The second (B*L) are
            places in the first; -1 - i is the last place of a prefix, for a token that comes after it.
        """
        if length not in self._prefixes:
            held = self._length.clamp(max=length)
            width = (2 ** held.double().log2().ceil().long()).clamp(min=SHORTEST).clamp(max=length)
            groups, out, first, places = [], [], torch.empty_like(self._start), 0
            for size in width.unique().tolist():
                group = (width == size).nonzero().squeeze(1)
                slot = torch.arange(size)
                token = (self._start[group, None] + slot).clamp(max=self.position.numel() - 1)
                out.append(torch.where(slot >= self._length[group, None], -1 - token, token).flatten())
                first[group] = places + size * torch.arange(len(group))
                groups.append((len(group), size))
                places += len(group) * size
            number = torch.arange(self.count).repeat_interleave(self._length)
            position = torch.arange(self.position.numel()) - self._start[number]
            last = held[number] - 1
            place = first[number] + torch.minimum(position, last)
            back = torch.where(position > last, -1 - place, place)
            device = self.position.device
            self._prefixes[length] = groups, torch.cat(out).to(device), back.to(device)
        return self._prefixes[length]


class _Take(torch.autograd.Function):
    """x[index] whose gradient is taken, too, and not scattered, which costs more than the attention in between."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, torch.where(index < 0, -1 - index, index))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (back,) = ctx.saved_tensors
        taken = gradient.index_select(0, back.clamp(min=0))
        return taken.masked_fill_((back < 0).view(-1, *[1] * (taken.ndim - 1)), 0), None, None


def take(x: Tensor, index: Tensor, back: Tensor) -> Tensor:
    """Rows of x (n, ...) by the first of two indices of `Documents.prefixes`, where `back` is the other one.

    A row that -1 - i stands for is row i, but gets no gradient: nobody may use what comes of it.
    """
    return _Take.apply(x, index, back)
