"""A decode step as a short list of ops, in place of the modules of Transformers.

    step(ids [rows, 1], positions [rows]) -> logits [rows, vocabulary]

One token takes a GPU some microseconds a layer, and a CPU little more; running the modules takes
Python ten times that. So the step is traced once (`salience.runtime.graph`), the graph is rewritten
to fused ops (`passes`, `attention`), and what is left is written out as one Python function. No
model is known by name: what a rewrite does not recognize stays as it was.

Nothing is taken on trust: the result must give the logits of the step, and write the same state,
on random tokens, positions and states. Otherwise the step itself is returned, and a line is logged.
"""

import logging

import torch
from torch import Tensor, fx

from salience.runtime.attention import decode_attentions, rotations
from salience.runtime.graph import Step, capture, clean, fold, join_views, runner, state_of
from salience.runtime.passes import gated_activations, open_products, residual_norms, rms_norms

_logger = logging.getLogger(__name__)

_CHECKS = 3
# What a trace or a rewritten graph may raise: most often for control flow that depends on values.
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError,
             KeyError)  # fmt: skip


@torch.no_grad()
def optimize(step: Step, example_inputs: tuple[Tensor, ...], length: int | None = None) -> Step:
    """A step of the same signature that gives the same logits, faster.

    The trace holds on to the tensors of the model and of the cache: it is valid as long as these
    stay where they are, and for as many rows as the example has.

    Args:
        step: ids [rows, 1] and positions [rows] to logits; it may write to a cache in place, at
            its positions.
        example_inputs: two of these. The step is run on them: the cache is left as after one call.
        length: positions below it are tried; by default up to those of the example.

    Returns:
        The optimized step, or `step` where it cannot be traced or the logits differ.
    """
    try:
        gm = capture(step, example_inputs)
        counts = rewrite(gm)
        fast = runner(gm)
        error = disagreement(step, fast, gm, example_inputs, length)
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
                 join_views, clean, fold):  # fmt: skip
        counts[each.__name__] = counts.get(each.__name__, 0) + each(gm)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    return counts


def disagreement(
    step: Step,
    fast: Step,
    gm: fx.GraphModule,
    example_inputs: tuple[Tensor, ...],
    length: int | None = None,
) -> str | None:
    """How two steps differ on random tokens, positions and states; None if they do not."""
    state = list({t.untyped_storage()._cdata: t for t in state_of(gm)}.values())
    state = [_whole(t) for t in state]
    kept = [t.to("cpu", copy=True) for t in state]
    ids, positions = example_inputs
    random = torch.Generator().manual_seed(0)
    vocabulary = 0
    try:
        for check in range(_CHECKS + 1):
            if check:
                ids = torch.randint(vocabulary, ids.shape, generator=random).to(ids)
                top = length or int(example_inputs[1].max()) + 1
                positions = torch.randint(top, positions.shape, generator=random).to(positions)
                for tensor in state:
                    if tensor.is_floating_point():
                        tensor.copy_(torch.randn(tensor.shape, generator=random))
            before = [t.to("cpu", copy=True) for t in state]
            logits = step(ids, positions).clone()
            after = [t.to("cpu", copy=True) for t in state]
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
            found = fast(ids, positions)
            vocabulary = logits.shape[-1]
            limit = tolerance(logits, gm)
            if found.shape != logits.shape or found.dtype != logits.dtype:
                return f"it gives {found.dtype} {list(found.shape)}"
            if not (error := _error(found, logits)) <= limit:
                return f"logits differ by {error:.2g}"
            for tensor, value in zip(state, after, strict=True):
                if not (error := _error(tensor, value.to(tensor.device))) <= limit:
                    return f"the state differs by {error:.2g}"
    finally:
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)
    return None


def tolerance(logits: Tensor, gm: fx.GraphModule) -> float:
    """How far rounding alone may take two steps apart, of those that compute in some dtype."""
    dtypes = {n.meta["val"].dtype for n in gm.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    if torch.bfloat16 in dtypes:
        return 5e-2
    return 1e-2 if torch.float16 in dtypes else 1e-4


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor's memory."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((size,), (1,), 0)


def _error(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference|."""
    value, reference = value.double(), reference.double()
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))
