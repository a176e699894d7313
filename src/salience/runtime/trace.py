"""A decode step as a short list of ops, in place of the modules of Transformers.

    step(ids [rows, 1], positions [rows]) -> logits [rows, vocabulary]

One token takes a GPU some microseconds a layer, and a CPU little more; running the modules takes
Python ten times that. So the step is traced once (`salience.runtime.graph`), the graph is rewritten
to fused ops (`passes`, `attention`), and what is left is written out as one Python function. No
model is known by name: what a rewrite does not recognize stays as it was.

Nothing is taken on trust: the result must give the logits of the step, and write the same state,
on random tokens from the first position on. Otherwise the step itself is returned, and a line is
logged. Rewriting changes nothing but the order of roundings: in fp32 the logits of SmolLM2 (30
layers) stay within 1e-5, and no token of a text has another likeliest successor. In bf16, and where
packed products compute in it, roundings alone are some 1e-2, and the check can be no sharper.
"""

import logging
import math
import statistics

import torch
from torch import Tensor, fx

from salience.runtime.attention import decode_attentions, rotations, value_of_view
from salience.runtime.graph import (
    Known,
    Node,
    Step,
    aten,
    clean,
    fold,
    is_op,
    join_views,
    meta,
    root,
    runner,
    state_of,
    value_of,
    writes,
)
from salience.runtime.lowering import lower
from salience.runtime.passes import gated_activations, residual_norms, rms_norms
from salience.runtime.record import capture

_logger = logging.getLogger(__name__)

_CHECKS = 5  # tokens of a trial
_FEW_IDS = 100  # all vocabularies have these
# What a trace or a rewritten graph may raise: most often for control flow that depends on values.
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError,
             KeyError)  # fmt: skip


@torch.no_grad()
def optimize(step: Step, *example_inputs: Tensor, reference: Step | None = None) -> Step:
    """A step of the same signature that gives the same logits, faster.

    The trace holds on to the tensors of the model and of the cache: it is valid as long as these
    stay where they are, and for as many rows as the example has.

    Args:
        step: ids [rows, 1] and positions [rows] to logits; it may write to a cache in place, at
            its positions.
        example_inputs: two of these. The step is run on them: the cache is left as after one call.
        reference: what gives the same logits at the first positions, and is compared with; the step
            for None. One that reads less of a long cache takes less time.

    Returns:
        The optimized step, or `step` where it cannot be traced or the logits differ.
    """
    try:
        gm = capture(step, example_inputs)
        state = touched(gm)
        counts = rewrite(gm)
        fast = runner(gm)
        error = disagreement(reference or step, fast, gm, state, example_inputs)
    except _FAILURES as failure:
        reason = str(failure).strip().split("\n")[0]
        _logger.warning("the step runs as it is: %s: %s", type(failure).__name__, reason)
        return step
    if error is not None:
        _logger.warning("the step runs as it is: once rewritten, %s", error)
        return step
    _logger.debug("step rewritten: %s", counts)
    return fast


def rewrite(gm: fx.GraphModule) -> dict[str, int]:
    """Rewrite a captured graph in place: how often, by pass."""
    counts = {"clean": clean(gm), "fold": fold(gm)}
    for each in (rms_norms, residual_norms, gated_activations, decode_attentions, rotations,
                 join_views, clean, fold, lower, join_views):  # fmt: skip
        counts[each.__name__] = counts.get(each.__name__, 0) + each(gm)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    return counts


def touched(gm: fx.GraphModule) -> list[Tensor]:
    """What a trial of a step changes of its state: views of the tensors that it writes to.

    Of a cache [slots, heads, length, width] that is written at the positions only, that is the
    first places of as many slots as there are rows. A cache may be larger than what memory is left,
    and on a CPU takes none where it was never written.
    """
    known = Known(gm)
    places: dict[int, bool] = {}  # by memory, whether all writes are at the positions
    for node in gm.graph.nodes:
        for target in writes(node):
            origin = root(target)
            if origin.op == "get_attr":
                memory = value_of(origin).untyped_storage()._cdata
                places[memory] = places.get(memory, True) and _at_positions(node, known)
    found = []
    for tensor in {t.untyped_storage()._cdata: t for t in state_of(gm)}.values():
        small = tensor.ndim == 4 and places.get(tensor.untyped_storage()._cdata, False)
        whole = tensor.storage_offset() == 0 and tensor.nbytes == tensor.untyped_storage().nbytes()
        rows = len(meta(known.positions))
        found.append(tensor[:rows, :, :_CHECKS] if small and whole else _whole(tensor))
    return found


def _at_positions(node: Node, known: Known) -> bool:
    """Whether a node writes to the third axis of a tensor at the positions and nowhere else."""
    if not is_op(node, aten.index_put_.default):
        return False
    target, indices = node.args[:2]
    if meta(target) is None or meta(target).ndim != 4 or len(indices) != 3:
        return False
    begin = value_of_view(target)
    if not known.is_positional(indices[2]) or begin is None or begin.storage_offset():
        return False
    example = meta(known.positions)
    some = torch.arange(len(example), device=example.device).flip(0) + 1
    return torch.equal(known.at(indices[2], some), some)


def disagreement(
    step: Step,
    fast: Step,
    gm: fx.GraphModule,
    state: list[Tensor],
    example_inputs: tuple[Tensor, ...],
) -> str | None:
    """How two steps differ over some random tokens from the first position on; None if they do not.

    How far rounding alone may take them apart differs from model to model: where they differ by
    more than the rounding of one result, it is seen from what the step itself makes of a state that
    is off by a rounding error.
    """
    kept = [tensor.clone() for tensor in state]
    eps, limit = _rounding(gm)
    try:
        expected = _trial(step, state, example_inputs)
        written = [tensor.clone() for tensor in state]
        found = _trial(fast, state, example_inputs)
        error = statistics.median(_error(*pair) for pair in zip(found, expected, strict=True))
        changed = max((_error(*pair) for pair in zip(state, written, strict=True)), default=0.0)
        noise = drift = 0.0
        if not max(error, changed) <= limit:
            noisy = _trial(step, state, example_inputs, eps)
            noise = statistics.median(_error(*pair) for pair in zip(noisy, expected, strict=True))
            drift = max(_error(*pair) for pair in zip(state, written, strict=True))
    finally:
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)
    if (found[0].shape, found[0].dtype) != (expected[0].shape, expected[0].dtype):
        return f"it gives {found[0].dtype} {list(found[0].shape)}"
    if not error <= max(limit, 4 * noise):
        return f"logits differ by {error:.2g}, and from rounding by {noise:.2g}"
    if not changed <= max(limit, 4 * drift):
        return f"the state differs by {changed:.2g}, and from rounding by {drift:.2g}"
    return None


def _trial(
    step: Step, state: list[Tensor], example_inputs: tuple[Tensor, ...], noise: float = 0.0
) -> list[Tensor]:
    """The logits of some tokens at the first positions, from an empty state on, which is off by a
    factor of 1 + noise at each of them.
    """
    ids, positions = example_inputs
    random = torch.Generator().manual_seed(0)
    floats = [tensor for tensor in state if tensor.is_floating_point()]
    for tensor in floats:
        tensor.zero_()
    found: list[Tensor] = []
    for place in range(_CHECKS):
        ids = torch.randint(_FEW_IDS, ids.shape, generator=random).to(ids)
        found.append(step(ids, torch.full_like(positions, place)).clone())
        for tensor in floats if noise else ():
            tensor.mul_(1 + noise)
    return found


def _rounding(gm: fx.GraphModule) -> tuple[float, float]:
    """The relative rounding error of what a step computes with, and what that makes of logits."""
    nodes = gm.graph.nodes
    dtypes = {n.meta["val"].dtype for n in nodes if isinstance(n.meta.get("val"), Tensor)}
    packed = any(is_op(n, torch.ops.salience.qmm.default) for n in nodes)
    if packed or torch.bfloat16 in dtypes:
        return 2**-8, 3e-2
    return (2**-11, 1e-2) if torch.float16 in dtypes else (2**-22, 2e-5)


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor's memory."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((size,), (1,), 0)


def _error(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference|."""
    if value.shape != reference.shape:
        return math.inf
    difference = reference.to(value.device, torch.float32) - value
    return float(difference.norm() / reference.float().norm().clamp_min(1e-30))
