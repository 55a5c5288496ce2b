"""A mixer that exists in this file alone: each token reads the mean of all values so far, times a weight.

Its state is their sum. The file travels with an export, so it imports what it needs from beside it there.
"""

import torch
from torch import nn

try:
    from .modeling_mixer import Mixer, Transfer
except ImportError:
    from transpoint.students.modeling.modeling_mixer import Mixer, Transfer


class ToyMixer(Mixer):
    exact = ("weight",)

    def __init__(self, attention, geometry, *, start=1.0, norm_eps=1e-5):
        super().__init__(attention, geometry)
        self.v_proj = nn.Linear(
            geometry.hidden_size, self.num_kv_heads * self.head_dim, bias="v_proj" in geometry.biases
        )
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, geometry.hidden_size, bias="o_proj" in geometry.biases)
        self.weight = nn.Parameter(torch.ones(self.num_kv_heads))
        self.start = start

    @property
    def out(self):
        return self.o_proj

    def transfers(self, view):
        found = [Transfer(f"{view.name}.weight", "constant", value=self.start)]
        for name in ("v_proj", "o_proj"):
            for part in ("weight",) if getattr(view, name).bias is None else ("weight", "bias"):
                found.append(Transfer.taken(f"{view.name}.{name}.{part}", view, name, part))
        return found

    def drops(self, view):
        return [f"{getattr(view, name).name}." for name in ("q_proj", "k_proj")] + ["q_norm.", "k_norm."]

    def flops(self, length):
        return 0.0  # sums alone

    def state_bytes(self):
        return 4 * self.num_kv_heads * self.head_dim

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        cache=None,
        padding_mask=None,
        seq_idx=None,
        **others,
    ):
        padding_mask, seq_idx, *_ = self.told(attention_mask, padding_mask, seq_idx)
        memory = self.memory(cache, others, packed=seq_idx is not None)
        batch, length, _ = hidden_states.shape
        real = hidden_states.new_ones(batch, length) if padding_mask is None else padding_mask[:, -length:].float()
        values = self.v_proj(hidden_states).float() * real[..., None]
        seen = torch.ones(length, length, device=values.device).tril().expand(batch, -1, -1)
        if seq_idx is not None:
            seen = seen * (seq_idx[:, :, None] == seq_idx[:, None, :])
        total, count = seen @ values, seen @ real[..., None]
        if memory is not None:
            if memory.is_initialized:
                total = total + memory.ssm_state[:, None]
                count = count + torch.tensor(memory.tokens, device=count.device)[:, None, None]
            memory.advance(None, total[:, -1], length, count[:, -1, 0].long().tolist())
        mean = (total / count.clamp(min=1)).unflatten(-1, (self.num_kv_heads, self.head_dim))
        read = (mean * self.weight[:, None]).repeat_interleave(self.num_heads // self.num_kv_heads, dim=2)
        return self.o_proj(read.flatten(2).to(hidden_states.dtype)), None
