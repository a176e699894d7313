"""Which variant of backend `gpu` is fastest here, kept for all later runs: `bench kernels --save`.

A table of the GPUs that we measured comes with the package. On another one a rule decides, and this
measures; it takes minutes, most of them for compiling every variant's options once.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from salience.errors import SalienceError
from salience.kernels import choice, gpu
from salience.kernels.choice import Shape, Variant
from salience.scheme import Scheme


def tune(
    schemes: Sequence[Scheme],
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    variants: Sequence[Variant] = gpu.VARIANTS,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    folder: Path | None = None,
) -> Path:
    """Measure every variant for some weights, and keep what was fastest.

    Args:
        schemes: of weights that backend `gpu` takes.
        shapes: (in_features, out_features) of each.
        tokens: rows of x; a measurement holds up to the next larger one.
        dtype: of x.
        device: a GPU.
        variants: what is measured.
        progress: called with what is done, how many are, and of how many.
        folder: of the table; None for the user's cache.

    Returns:
        The table.

    Raises:
        SalienceError: not on a GPU, or a scheme of another backend.
    """
    if device.type != "cuda":
        raise SalienceError(f"--save keeps what is fastest on a GPU, not on {device}")
    work = [(scheme, pair) for scheme in schemes for pair in shapes]
    entries = []
    for index, (scheme, (columns, rows)) in enumerate(work):
        if not gpu.Gpu().supports(scheme, device, columns, rows):
            raise SalienceError(f"--save: kernel gpu takes no {scheme} of {columns} columns")
        progress(f"tuning {scheme} {columns}x{rows}", index, len(work))
        shape = Shape(scheme.bits, scheme.group_columns(columns), columns, rows, dtype)
        entries.append(choice.measure(variants, shape, device, tokens))
    path = choice.save(torch.cuda.get_device_name(device), entries, folder)
    gpu.chosen.cache_clear()
    return path
