"""What is known not to work together: versions, drivers and settings, each with the mend.

Two kinds. What a package itself says it needs is read from its metadata, as `pip check` does. What
no metadata says is in `PAIRS`: someone met it, and the last column is where.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version


@dataclass(frozen=True, slots=True)
class Pair:
    """Two packages that do not go together; the second may be none, then the first is at fault.

    Args:
        one, its: a package and its versions, "" for all.
        other, others: the same of the second.
        problem: what happens.
        mend: what to do.
        seen: where it is told.
    """

    one: str
    its: str
    other: str
    others: str
    problem: str
    mend: str
    seen: str


PAIRS = (
    Pair(
        "autoawq",
        "",
        "transformers",
        ">=4.57",
        "autoawq imports what Transformers no longer has, and what looks for it breaks too",
        "pip uninstall autoawq; salience and gptqmodel read its checkpoints",
        "huggingface/peft#2827",
    ),
    Pair(
        "auto-gptq",
        "",
        "transformers",
        ">=5",
        "Transformers reads GPTQ by gptqmodel now, and auto-gptq is not maintained",
        "pip uninstall auto-gptq; use salience.hf, or pip install gptqmodel optimum",
        "AutoGPTQ's README",
    ),
    Pair(
        "compressed-tensors",
        "<0.15",
        "transformers",
        ">=5",
        "Transformers refuses compressed-tensors checkpoints",
        "pip install -U compressed-tensors",
        "Transformers 5.23, quantizers",
    ),
    Pair(
        "compressed-tensors",
        "<0.17",
        "",
        "",
        "it packs 3, 5, 6 and 7 bits in another way, and reads ours as noise",
        "pip install -U compressed-tensors",
        "compressed-tensors 0.17, pack_quantized",
    ),
    Pair(
        "optimum",
        "<1.24",
        "transformers",
        ">=5",
        "Transformers refuses GPTQ checkpoints",
        "pip install -U optimum, or use salience.hf",
        "Transformers 5.23, quantizers",
    ),
    Pair(
        "gptqmodel",
        "<1.4.3",
        "transformers",
        ">=5",
        "Transformers refuses GPTQ checkpoints",
        "pip install -U gptqmodel, or use salience.hf",
        "Transformers 5.23, quantizers",
    ),
    Pair(
        "vllm",
        ">=0.33",
        "bitsandbytes",
        "",
        "vLLM reads no bitsandbytes checkpoints any more",
        "serve --format awq there",
        "vLLM 0.33, quantization",
    ),
)
# Whose own requirements are looked at.
_NEEDY = (
    *("salience", "torch", "transformers", "tokenizers", "accelerate", "vllm", "gptqmodel"),
    *("optimum", "compressed-tensors", "bitsandbytes", "lm-eval", "cuda-core"),
)
# The oldest driver of each major version of CUDA, by NVIDIA's table of compatibility.
_DRIVERS = {12: 525, 13: 580}


def bad_pairs(versions: Mapping[str, str]) -> list[str]:
    """What does not go together among installed packages, one line each.

    Args:
        versions: of what is installed, by name.
    """
    lines = []
    for pair in PAIRS:
        if _is(versions, pair.one, pair.its) and (
            not pair.other or _is(versions, pair.other, pair.others)
        ):
            which = [f"{name} {versions[name]}" for name in (pair.one, pair.other) if name]
            lines.append(f"{' with '.join(which)}: {pair.problem}; {pair.mend} ({pair.seen})")
    return lines


def unmet(versions: Mapping[str, str], needs: Mapping[str, Sequence[str]]) -> list[str]:
    """What installed packages say they need of each other and do not have, one line each.

    Args:
        versions: of what is installed, by name.
        needs: requirements of packages, as their metadata has them.
    """
    lines = []
    for name, texts in needs.items():
        for text in texts:
            need = _requirement(text)
            if need is None or not need.specifier or need.name not in versions:
                continue
            if not _is(versions, need.name, str(need.specifier)):
                has = f"{need.name} {versions[need.name]} is here"
                mend = f'pip install "{need.name}{need.specifier}"'
                lines.append(f"{name} needs {need.name} {need.specifier}, and {has}; {mend}")
    return lines


def own_needs() -> dict[str, list[str]]:
    """The requirements of the packages that matter here, of those installed."""
    found = {}
    for name in _NEEDY:
        try:
            found[name] = requires(name) or []
        except PackageNotFoundError:
            continue
    return found


def bad_settings(
    versions: Mapping[str, str],
    cuda: str | None,
    driver: str | None,
    gpus: int,
    threads: int,
    cpus: float,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[str]:
    """What a driver or a setting takes from this machine, one line each.

    Args:
        versions: of what is installed, by name.
        cuda: the version torch was made for, None of a torch for CPUs.
        driver: of NVIDIA, None if there is none.
        gpus: how many torch sees.
        threads: of torch.
        cpus: how many processors this process may use.
        environment: its variables.
    """
    torch = f"torch {versions.get('torch', '')}"
    if driver is not None and cuda is None:
        yield (
            f"{torch} is made for CPUs, and there is an NVIDIA driver; install torch by the "
            "command that pytorch.org gives for this CUDA"
        )
    if driver is not None and cuda is not None:
        oldest = _DRIVERS.get(int(cuda.partition(".")[0]), 0)
        if int(driver.partition(".")[0]) < oldest:
            yield f"{torch} for CUDA {cuda} needs driver {oldest} or later, not {driver}; update it"
        elif not gpus:
            hidden = environment.get("CUDA_VISIBLE_DEVICES")
            reason = (
                f"CUDA_VISIBLE_DEVICES is {hidden!r}" if hidden is not None else "run nvidia-smi"
            )
            yield f"there is a driver, {driver}, and torch sees no GPU; {reason}"
    if gpus and environment.get("TRITON_INTERPRET") == "1":
        yield "TRITON_INTERPRET=1 runs the GPU's kernels in Python; unset it"
    if gpus and "triton" not in versions:
        yield "there is a GPU and no Triton, so half of the kernels are missing; pip install triton"
    if threads > max(1.0, cpus):
        yield (
            f"torch has {threads} threads and this process {cpus:g} processors, so that they wait "
            f"for each other; set OMP_NUM_THREADS={max(1, int(cpus))}"
        )


def _is(versions: Mapping[str, str], name: str, specifier: str) -> bool:
    """Whether a package is installed, in one of some versions."""
    if name not in versions:
        return False
    try:
        return SpecifierSet(specifier).contains(Version(versions[name]), prereleases=True)
    except InvalidVersion:
        return False


def _requirement(text: str) -> Requirement | None:
    """A requirement that holds here, without extras."""
    try:
        need = Requirement(text)
    except InvalidRequirement:
        return None
    holds = need.marker is None or need.marker.evaluate({"extra": ""})
    return need if holds else None
