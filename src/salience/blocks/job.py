"""One quantization: what is made of what, and how. All the steps share it, none changes it."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from salience.blocks.search import Search
from salience.checkpoint import Checkpoint
from salience.conversion import stored_owner
from salience.formats import Format
from salience.loading import check_finite, read_tensor, set_tensor, unload
from salience.methods import Method
from salience.modules import embeddings, shape_of, shapes_of
from salience.recipe import Recipe
from salience.reports.report import BlockReport, versions
from salience.scheme import Scheme
from salience.serving import Served, kv_heads, skip_list
from salience.source import Source
from salience.structure import kept, linears

Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class Job:
    """What every step needs to know.

    Args:
        source: the model.
        skeleton: its modules, weights on meta.
        weights: its tensors by the skeleton's names.
        prefix: name of the decoder's list of blocks.
        blocks: that list.
        method: how to search.
        schemes: of each linear to quantize, by its full name.
        fmt: how to store.
        device: where to compute.
        dtype: of what is stored float.
        search: scales and grids found before, in place of a search.
        save_search: keep what is found.
        target_bits: stored bits a weight that the linears in the blocks may have on the average;
            `schemes` is then what they would have without, until the choice is made.
        options: the schemes to choose from for each linear that is free.
        progress: called with (phase, done, total).
        on_block: called with the report of each block when it is done.
        on_phase: called with the name of a phase when it begins, and with "" when it ends.
        seconds: spent in each phase so far.
    """

    source: Source
    skeleton: Any
    weights: Checkpoint
    prefix: str
    blocks: nn.ModuleList
    method: Method
    schemes: Mapping[str, Scheme]
    fmt: Format
    device: torch.device
    dtype: torch.dtype = torch.float16
    search: Search | None = None
    save_search: bool = False
    target_bits: float | None = None
    options: Mapping[str, tuple[Scheme, ...]] = field(default_factory=dict)
    progress: Progress = lambda _phase, _done, _total: None
    on_block: Callable[[BlockReport], None] = lambda _report: None
    on_phase: Callable[[str], None] = lambda _name: None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of what happens inside to a phase."""
        start = time.perf_counter()
        self.on_phase(name)
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.on_phase("")

    def block_name(self, index: int) -> str:
        """The full name of a block."""
        return f"{self.prefix}.{index}"

    @property
    def kept(self) -> list[str]:
        """What stays float beside norms and embeddings: linears, routers, experts, convolutions."""
        left = [name for name in linears(self.skeleton) if name not in self.schemes]
        return list(
            dict.fromkeys([*left, *(n for n in kept(self.skeleton) if n not in self.schemes)])
        )

    @property
    def float_names(self) -> list[str]:
        """`kept`, by the names of the model's modules and by those other runtimes may go by."""
        stored = [stored_owner(self.weights, name) for name in self.kept]
        return list(dict.fromkeys([*self.kept, *stored]))

    @property
    def served(self) -> Served:
        """The checkpoint that will be, as other runtimes see it."""
        act_order = self.method.act_order
        config = self.fmt.config(self.schemes, self.float_names, self.outside, act_order)
        return Served(
            format=self.fmt.name,
            schemes=self.schemes,
            shapes=shapes_of(self.skeleton, self.schemes),
            kept=self.kept,
            skips=skip_list(config),
            kv_heads=kv_heads(self.source.config),
            embeddings=[name for name in embeddings(self.skeleton) if name in self.schemes],
            act_order=act_order,
        )

    def weight_shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a linear."""
        return shape_of(self.skeleton.get_submodule(name))

    @property
    def outside(self) -> list[str]:
        """What to quantize that is in no block: the head, the embeddings."""
        return [name for name in self.schemes if not name.startswith(f"{self.prefix}.")]

    def is_tied(self, name: str) -> bool:
        """Whether a linear's weight is the embeddings'."""
        shared = {id(p) for p in self.skeleton.get_input_embeddings().parameters()}
        return id(self.skeleton.get_submodule(name).weight) in shared

    def parted_heads(self) -> list[str]:
        """A head that stays float while the embeddings it is tied to are coded."""
        head = self.skeleton.get_output_embeddings()
        names = [n for n, m in self.skeleton.named_modules() if head is not None and m is head]
        coded = any(n not in names and self.is_tied(n) for n in self.outside)
        return [n for n in names if coded and self.is_tied(n) and n not in self.schemes]

    def peak_vram_bytes(self) -> int:
        """Most GPU memory of tensors so far, 0 on CPUs."""
        on_gpu = self.device.type == "cuda"
        return torch.cuda.max_memory_allocated(self.device) if on_gpu else 0

    def float_tensor(self, name: str) -> Tensor:
        """A parameter in fp32 on the device.

        Raises:
            SalienceError: missing, of another shape, or with values that are not finite.
        """
        like = self.skeleton.get_parameter(name)
        tensor = read_tensor(self.weights, name, like).to(self.device).float()
        check_finite(self.weights, name, tensor)
        return tensor

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """A block with its weights in fp32, and back to nothing."""
        block, name = self.blocks[index], self.block_name(index)
        names = [local for local, _ in block.named_parameters()]
        for local in names:
            set_tensor(block, local, self.float_tensor(f"{name}.{local}"))
        try:
            yield block
        finally:
            unload(block, names)

    def digest(self, index: int) -> str:
        """A hash of a block's stored weights; after the last block, of the linears in no block."""
        if index < len(self.blocks):
            parameters = dict(self.blocks[index].named_parameters())
            names = {local: f"{self.block_name(index)}.{local}" for local in parameters}
        else:
            stored = {id(p): name for name, p in self.skeleton.named_parameters()}
            names = {
                name: stored[id(self.skeleton.get_submodule(name).weight)] for name in self.outside
            }
        total = hashlib.sha256()
        for local, name in names.items():
            tensor = self.weights.tensor(name)
            total.update(f"{local} {list(tensor.shape)} {tensor.dtype}".encode())
            total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()


def identity(
    job: Job, recipe: Recipe, options: Mapping[str, Any], tokens: Tensor | None
) -> dict[str, Any]:
    """All that decides the bytes of the result, by the name a user knows it by."""
    text = None if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    search = {}
    if job.search is not None:
        status = job.search.path.stat()
        search = {"the file of --from-search": f"{status.st_size} bytes of {status.st_mtime_ns}"}
    threads = torch.get_num_threads() if job.device.type == "cpu" else None
    return {
        **options,
        **{f"--{key}": value for key, value in recipe.describe().items()},
        **search,
        "the calibration tokens": text,
        "--device": job.device.type,
        "the number of threads": threads,
        **{f"the model's {file}": value for file, value in job.source.fingerprint().items()},
        **{f"the version of {name}": value for name, value in versions().items()},
    }
