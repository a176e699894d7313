"""What is in no block: the embeddings, the norm behind the last block, the head."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from salience.blocks.job import Job
from salience.loading import set_tensor, unload


@contextmanager
def embeddings_loaded(job: Job, head: bool = False) -> Iterator[None]:
    """The model with the weights of all that is in no block, an untied head only if wanted."""
    model = job.skeleton
    last = None if head else model.get_output_embeddings()
    shared = {id(p) for p in model.get_input_embeddings().parameters()}
    unused = {id(p) for p in last.parameters()} - shared if last is not None else set()
    wanted = [
        name
        for name, parameter in model.named_parameters()
        if not name.startswith(f"{job.prefix}.") and id(parameter) not in unused
    ]
    for name in wanted:
        set_tensor(model, name, job.float_tensor(name))
    if head:
        model.tie_weights()
    _move_buffers(model, job.device)
    try:
        yield
    finally:
        unload(model, wanted)
        model.tie_weights()


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, buffer.to(device), persistent=persistent)


class Outside(nn.Module):
    """What is coded of what is in no block, as linears under their full names."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        stored = {id(p): name for name, p in job.skeleton.named_parameters()}
        for name in job.outside:
            owner: nn.Module = self
            *path, leaf = name.split(".")
            for step in path:
                if not hasattr(owner, step):
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            rows, columns = job.weight_shape(name)
            linear = nn.Linear(columns, rows, bias=False, device="meta")
            # A head that is tied to the embeddings has their tensor.
            weight = job.skeleton.get_submodule(name).weight
            set_tensor(linear, "weight", job.float_tensor(stored[id(weight)]))
            owner.add_module(leaf, linear)
