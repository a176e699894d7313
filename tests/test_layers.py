"""A module imports only from lower layers, and each heavy package has its own few files."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import salience

ROOT = Path(salience.__file__).parent

# The tens are the layer of the design; the units order the files inside a package.
LAYERS = {
    "salience": 0,
    "salience.adam": 0,
    "salience.capture": 0,
    "salience.codebook": 0,
    "salience.errors": 0,
    "salience.machine": 1,
    "salience.scheme": 1,
    "salience.monitor": 2,
    "salience.qtensor": 2,
    "salience.recipe": 2,
    "salience.tiles": 2,
    "salience.serving": 3,
    "salience.pt_checkpoint": 9,
    "salience.checkpoint": 10,
    "salience.grid": 10,
    "salience.packing": 10,
    "salience.patterns": 10,
    "salience.writer": 11,
    "salience.conversion": 15,
    "salience.source": 20,
    "salience.containers": 22,
    "salience.modules": 28,
    "salience.folds": 29,
    "salience.groups": 29,
    "salience.calibration": 30,
    "salience.linear": 30,
    "salience.probes": 30,
    "salience.stats": 30,
    "salience.structure": 31,
    "salience.placement": 49,
    "salience.inspection": 50,
    "salience.loading": 50,
    "salience.converting": 60,
    "salience.__main__": 84,
    "salience.gguf": 0,
    "salience.gguf.header": 9,
    "salience.gguf.metadata": 10,
    "salience.gguf.tokenizer": 11,
    "salience.gguf.writer": 12,
    "salience.gguf.exchange": 23,
    "salience.kernels._fragments": 17,
    "salience.kernels.choice": 18,
    "salience.kernels.cuda_program": 18,
    "salience.kernels.fused._dependent": 18,
    "salience.kernels.fused.plain": 18,
    "salience.kernels.fused.argmax_triton": 19,
    "salience.kernels.fused.attention_cuda": 19,
    "salience.kernels.fused.attention_triton": 19,
    "salience.kernels.fused.rope_triton": 19,
    "salience.kernels.fused.rows_triton": 19,
    "salience.kernels.mma_cuda": 19,
    "salience.kernels.wgmma_cuda": 19,
    "salience.kernels.wna16_triton": 19,
    "salience.kernels._codebook": 20,
    "salience.kernels._reference": 20,
    "salience.kernels.cpu": 20,
    "salience.kernels.fused": 20,
    "salience.kernels.gpu": 20,
    "salience.kernels": 21,
    "salience.formats._tensors": 18,
    "salience.formats._awq": 19,
    "salience.formats._bnb": 19,
    "salience.formats.gguf": 19,
    "salience.formats.autoawq": 20,
    "salience.formats.awq_gemv": 20,
    "salience.formats.base": 20,
    "salience.formats.bitsandbytes": 20,
    "salience.formats.bitsandbytes_int8": 20,
    "salience.formats.compressed_tensors": 20,
    "salience.formats.dense": 20,
    "salience.formats.gptq": 20,
    "salience.formats.llm_awq": 20,
    "salience.formats": 21,
    "salience.methods.base": 40,
    "salience.methods.gptq_triton": 40,
    "salience.methods.awq": 41,
    "salience.methods.gptq": 41,
    "salience.methods.nf4": 41,
    "salience.methods.rtn": 41,
    "salience.methods.tuned": 41,
    "salience.methods.learner": 42,
    "salience.methods": 43,
    "salience.blocks": 0,
    "salience.blocks.journal": 12,
    "salience.blocks.blockwise": 30,
    "salience.blocks.search": 45,
    "salience.blocks.block": 52,
    "salience.blocks.job": 52,
    "salience.blocks.window": 52,
    "salience.blocks.hidden": 53,
    "salience.blocks.kinds": 53,
    "salience.blocks.outside": 53,
    "salience.blocks.search_files": 53,
    "salience.blocks.solved": 54,
    "salience.reports": 0,
    "salience.reports.plots": 50,
    "salience.reports.report": 50,
    "salience.reports.html": 51,
    "salience.reports.page": 52,
    "salience.learning": 0,
    "salience.learning.distillation": 31,
    "salience.learning.finished": 53,
    "salience.learning.pupil": 54,
    "salience.learning.student": 55,
    "salience.learning.trainer": 56,
    "salience.learning.end_to_end": 57,
    "salience.runtime.cache": 50,
    "salience.runtime.graph": 50,
    "salience.runtime.graphs": 50,
    "salience.runtime.limits": 50,
    "salience.runtime.merge": 50,
    "salience.runtime.record": 50,
    "salience.runtime.sampling": 50,
    "salience.runtime.text": 50,
    "salience.runtime.attention": 51,
    "salience.runtime.lowering": 51,
    "salience.runtime.passes": 51,
    "salience.runtime.request": 51,
    "salience.runtime.step": 51,
    "salience.runtime.slots": 52,
    "salience.runtime.trace": 52,
    "salience.runtime.runner": 53,
    "salience.runtime.engine": 54,
    "salience.runtime": 55,
    "salience.runtime.timing": 55,
    "salience.pipeline": 0,
    "salience.pipeline.allocation": 10,
    "salience.pipeline.engine": 55,
    "salience.pipeline.assemble": 56,
    "salience.pipeline.sensitivity": 56,
    "salience.pipeline.padding": 57,
    "salience.pipeline.target": 57,
    "salience.pipeline.prepare": 59,
    "salience.pipeline.quantize": 60,
    "salience.planning": 0,
    "salience.planning.checks": 53,
    "salience.planning.bytes": 56,
    "salience.planning.seconds": 57,
    "salience.planning.plan": 58,
    "salience.hf.base": 60,
    "salience.hf.stored": 61,
    "salience.hf.rounding": 62,
    "salience.hf": 63,
    "salience.bench": 60,
    "salience.bench._humming": 60,
    "salience.bench.measure": 60,
    "salience.bench.plot": 60,
    "salience.bench.weights": 60,
    "salience.bench.peers": 61,
    "salience.bench.shapes": 61,
    "salience.bench.kernels": 62,
    "salience.bench.tuning": 62,
    "salience.bench.decode": 75,
    "salience.bench.quantize": 75,
    "salience.chat": 70,
    "salience.chat.prompt": 70,
    "salience.chat.thinking": 70,
    "salience.chat.wrapping": 70,
    "salience.chat.encoding": 71,
    "salience.chat.markdown": 71,
    "salience.chat.talk": 71,
    "salience.chat.session": 72,
    "salience.chat.commands": 73,
    "salience.chat.terminal": 74,
    "salience.doctor": 70,
    "salience.doctor.complaint": 70,
    "salience.doctor.fits": 70,
    "salience.doctor.known": 70,
    "salience.doctor.trials": 70,
    "salience.doctor.machine": 71,
    "salience.doctor.texts": 71,
    "salience.doctor.weights": 71,
    "salience.doctor.runtimes": 74,
    "salience.doctor.checkpoint": 75,
    "salience.evaluation": 70,
    "salience.evaluation.candidates": 70,
    "salience.evaluation.parts": 70,
    "salience.evaluation.receipt": 70,
    "salience.evaluation.speed": 70,
    "salience.evaluation.statistics": 70,
    "salience.evaluation.tasks": 70,
    "salience.evaluation.gate": 71,
    "salience.evaluation.scores": 71,
    "salience.evaluation.comparison": 72,
    "salience.evaluation.perplexity": 72,
    "salience.evaluation.comparison_text": 73,
    "salience.evaluation.comparison_page": 74,
    "salience.evaluation.make": 75,
    "salience.evaluation.measure": 75,
    "salience.evaluation.compare": 76,
    "salience.server.closing": 70,
    "salience.server.schemas": 70,
    "salience.server.tool_formats": 70,
    "salience.server.tool_parser": 70,
    "salience.server.guide": 71,
    "salience.server": 72,
    "salience.server.capacity": 72,
    "salience.server.errors": 72,
    "salience.server.page": 72,
    "salience.server.tools": 72,
    "salience.server.vllm": 73,
    "salience.server.worker": 73,
    "salience.server.metrics": 74,
    "salience.server.service": 74,
    "salience.server.answers": 75,
    "salience.server.guard": 75,
    "salience.server.protocol": 75,
    "salience.server.sse": 75,
    "salience.server.chats": 76,
    "salience.server.responses": 76,
    "salience.server.run": 77,
    "salience.server.texts": 77,
    "salience.server.app": 78,
    "salience.cli.console": 79,
    "salience.cli.loaded": 80,
    "salience.cli.options": 80,
    "salience.cli.bench": 81,
    "salience.cli.chat": 81,
    "salience.cli.compare": 81,
    "salience.cli.doctor": 81,
    "salience.cli.evaluate": 81,
    "salience.cli.models": 81,
    "salience.cli.quantize": 81,
    "salience.cli.serve": 81,
    "salience.cli.app": 82,
    "salience.cli": 83,
}

# Who may import what is heavy or optional. A package named here is imported nowhere else.
WRAPPERS = {
    "transformers": {
        "salience.conversion",
        "salience.source",
        "salience.loading",
        "salience.hf",
        "salience.hf.base",
        "salience.hf.rounding",
        "salience.hf.stored",
        "salience.runtime.cache",
        "salience.runtime.step",
    },
    "accelerate": {"salience.placement", "salience.source"},
    "huggingface_hub": {"salience.source"},
    "gguf": {"salience.checkpoint", "salience.gguf.writer"},
    "datasets": {"salience.calibration", "salience.evaluation.tasks"},
    "humming": {"salience.bench._humming"},
    "matplotlib": {"salience.reports.plots", "salience.bench.plot"},
    "rich": {
        "salience.chat.markdown",
        "salience.chat.terminal",
        "salience.chat.wrapping",
        "salience.cli.bench",
        "salience.cli.compare",
        "salience.cli.console",
        "salience.cli.doctor",
        "salience.cli.models",
        "salience.cli.evaluate",
        "salience.cli.quantize",
    },
    "typer": {
        "salience.cli.app",
        "salience.cli.bench",
        "salience.cli.chat",
        "salience.cli.doctor",
        "salience.cli.compare",
        "salience.cli.evaluate",
        "salience.cli.models",
        "salience.cli.options",
        "salience.cli.quantize",
        "salience.cli.serve",
    },
    "cuda": {"salience.kernels.cuda_program"},
    "triton": {
        "salience.kernels.gpu",
        "salience.kernels.wna16_triton",
        "salience.kernels.fused.argmax_triton",
        "salience.kernels.fused.attention_triton",
        "salience.kernels.fused.rope_triton",
        "salience.kernels.fused.rows_triton",
        "salience.methods.gptq_triton",
    },
    "prompt_toolkit": {"salience.chat.terminal"},
    "markdown_it": {"salience.chat.markdown"},
    "ray": set(),
    "lm_eval": {"salience.evaluation.tasks"},
    "pynvml": {"salience.monitor"},
    "fastapi": {
        "salience.server.app",
        "salience.server.chats",
        "salience.server.responses",
        "salience.server.texts",
    },
    "prometheus_client": {"salience.server.metrics"},
    "pydantic": {
        "salience.server.answers",
        "salience.server.protocol",
        "salience.server.responses",
    },
    "starlette": {"salience.server.app", "salience.server.guard", "salience.server.sse"},
    "uvicorn": {"salience.server.run"},
    "xgrammar": {"salience.server.guide"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run: what is under `if TYPE_CHECKING` does not."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from walk(child)


def imports(source: str) -> set[str]:
    """Full names of the modules a source imports, those inside functions included."""
    found = set()
    for node in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else str(node.module))
    return found


def test_every_module_has_a_layer() -> None:
    missing = sorted(set(MODULES) - set(LAYERS))
    assert not missing, f"give {missing} a layer in LAYERS of {Path(__file__).name}"
    assert not set(LAYERS) - set(MODULES), "LAYERS names modules that are gone"


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_lower_layers(name: str) -> None:
    own = {other for other in imports(MODULES[name].read_text()) if other.startswith("salience")}
    unknown = own - set(LAYERS)
    assert not unknown, f"{name} imports {unknown}, which no layer holds"
    wrong = {other for other in own if LAYERS[other] >= LAYERS[name]}
    assert not wrong, f"{name} (layer {LAYERS[name]}) imports {wrong}, which are not below it"


def test_packages_do_not_need_each_other() -> None:
    needs: dict[str, set[str]] = {}
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"} - {"salience"}
    for name, path in MODULES.items():
        own = name if name in packages else name.rpartition(".")[0]
        others = {other.rpartition(".")[0] for other in imports(path.read_text())} & packages
        needs.setdefault(own, set()).update(others - {own})
    del needs["salience"]
    TopologicalSorter(needs).prepare()  # raises CycleError


@pytest.mark.parametrize("package", WRAPPERS)
def test_heavy_packages_are_wrapped(package: str) -> None:
    users = {
        name
        for name, path in MODULES.items()
        if any(other.split(".")[0] == package for other in imports(path.read_text()))
    }
    assert users == WRAPPERS[package]


def test_the_walk_sees_all_kinds_of_imports() -> None:
    source = """
import torch
from salience import grid, nothing
from salience.loading import load
if TYPE_CHECKING:
    import ray
def f():
    import gguf.quants
    from transformers.models import auto
"""
    assert imports(source) == {
        "torch",
        "salience",
        "salience.grid",
        "salience.loading",
        "gguf.quants",
        "transformers.models",
    }
