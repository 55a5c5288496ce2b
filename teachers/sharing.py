"""A teacher whose layers several processes hold together."""

import torch
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel


def share_layers(model: PreTrainedModel) -> None:
    """Leaves each process a share of every decoder layer's weights; a layer is put together while it runs.

    By PyTorch's `fully_shard`, in place: all processes must run the model alike from then on. Embeddings, norm and
    output matrix stay whole, as losses read them. There is no way back.
    """
    decoder = model.get_decoder()
    mesh = torch.distributed.device_mesh.init_device_mesh(model.device.type, (torch.distributed.get_world_size(),))
    in_layers = {id(parameter) for layer in decoder.layers for parameter in layer.parameters()}
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    # So that the next layer is on its way while one runs.
    fully_shard(decoder, mesh=mesh, ignored_params={p for p in decoder.parameters() if id(p) not in in_layers})
