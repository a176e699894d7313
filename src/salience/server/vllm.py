"""Start vLLM on a checkpoint, for what one machine or one engine of ours does not do.

vLLM reads our checkpoints as they are. What it does not read it finds out after a minute of
starting, by an error deep in its workers; the rules here say it at once, with the mend. They are
those of vLLM 0.33, read in its source:

    awq                   4 bits, groups of 32, 64, 128 or whole rows; odd shapes are padded
    gptq                  4 and 8 bits, symmetric, columns in their own order
    compressed-tensors    2 to 8 bits, columns in their own order; what Marlin does not take goes to
                          Humming's kernels
    bitsandbytes          gone
    gguf                  by the package vllm-gguf-plugin; the tokenizer is better not taken from
                          the file

Older versions read less of some and more of others, so what is refused here may be started by hand.

This process becomes vLLM, so that signals reach it and its exit status is ours. The API key is in
its environment, since arguments are for all users of a machine to see.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from salience.checkpoint import GgufCheckpoint
from salience.errors import SalienceError
from salience.inspection import served
from salience.serving import Finding, Served, findings, summary
from salience.source import Source, open_source
from salience.tiles import KERNELS, TILE_GROUPS, Part, Remark

VERSION = "0.33"
_ONLY = ("vllm",)
_BITSANDBYTES = frozenset(("bitsandbytes", "bitsandbytes-int8"))
# Their scales are fp16, whatever the model was trained in; in bf16 they would be rounded.
_HALF_SCALES = frozenset(("awq", "gptq"))
# What vLLM does not run in fp16: its numbers overflow.
_NO_FLOAT16 = frozenset(("gemma2", "gemma3", "gemma3_text", "glm4"))


@dataclass(frozen=True, slots=True)
class Options:
    """How vLLM is to serve.

    Args:
        host: address to listen on.
        port: to listen on.
        context: tokens of prompt and reply together; None for the model's own.
        served_name: what clients call the model; None for its path.
        tensor_parallel: GPUs that each linear is cut over.
        pipeline_parallel: parts that the layers are shared out to.
        ray: the GPUs are those of a Ray cluster.
        trust_remote_code: let the model's own Python code run.
        extra: further arguments of `vllm serve`; they come last, so that they win.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    context: int | None = None
    served_name: str | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    ray: bool = False
    trust_remote_code: bool = False
    extra: Sequence[str] = ()


def run(
    path: str,
    *,
    host: str,
    port: int,
    api_key: str | None,
    context: int | None,
    served_name: str | None,
    tensor_parallel: int,
    pipeline_parallel: int = 1,
    extra: Sequence[str] = (),
    ray: bool = False,
    trust_remote_code: bool = False,
) -> int:
    """Become vLLM, serving a checkpoint. Does not return: its exit status is that of the process.

    Args:
        path: a folder, a `.gguf` file, a Hub name, or `smollm2-135m`.
        host, port, context, served_name, tensor_parallel, pipeline_parallel, extra, ray,
            trust_remote_code: see `Options`.
        api_key: that clients must have; None for the environment's VLLM_API_KEY, or none.

    Raises:
        SalienceError: vLLM is not installed, would not serve the checkpoint, or the checkpoint is
            malformed.
    """
    options = Options(
        host,
        port,
        context,
        served_name,
        tensor_parallel,
        pipeline_parallel,
        ray,
        trust_remote_code,
        extra,
    )
    executable = find()
    source = open_source(path, trust_remote_code)
    profile = served(source)
    for line in check(source, profile, options):
        print(f"warning: {line}", file=sys.stderr)
    arguments = command(executable, source, profile, options)
    print(f"starts: {shlex.join(arguments)}", file=sys.stderr, flush=True)
    environment = dict(os.environ)
    if api_key is not None:
        environment["VLLM_API_KEY"] = api_key
    sys.stdout.flush()
    os.execve(executable, arguments, environment)


def find() -> str:
    """The path of the program `vllm`.

    Raises:
        SalienceError: it is not on PATH.
    """
    found = shutil.which("vllm")
    if found is None:
        raise SalienceError(
            "--engine vllm needs the program vllm, which is not on PATH; get it with: "
            "uv tool install vllm (an environment of its own, as it pins its version of torch)"
        )
    return found


def command(executable: str, source: Source, profile: Served | None, options: Options) -> list[str]:
    """The command line of `vllm serve`, the API key not in it.

    Args:
        executable: the program.
        source: the checkpoint.
        profile: of the checkpoint, as `inspection.served` has it.
        options: how it is to serve.

    Raises:
        SalienceError: a GGUF file without a tokenizer beside it.
    """
    arguments = [executable, "serve", str(source.stored.path)]
    arguments += ["--host", options.host, "--port", str(options.port)]
    values: dict[str, object] = {
        "--served-model-name": options.served_name,
        "--max-model-len": options.context,
        "--dtype": serving_dtype(source.config, profile),
        "--tensor-parallel-size": _many(options.tensor_parallel),
        "--pipeline-parallel-size": _many(options.pipeline_parallel),
        "--distributed-executor-backend": "ray" if options.ray else None,
    }
    if isinstance(source.stored, GgufCheckpoint):
        values |= _beside(source, options)
    for name, value in values.items():
        if value is not None:
            arguments += [name, str(value)]
    if options.trust_remote_code:
        arguments.append("--trust-remote-code")
    return [*arguments, *options.extra]


def serving_dtype(config: Any, profile: Served | None) -> str | None:
    """What to serve in, where it is not what the config says; None where it is.

    Scales of AWQ and GPTQ are fp16. A config of fp32 would be served in bf16.
    """
    if profile is None or config.model_type in _NO_FLOAT16:
        return None
    wanted = profile.format in _HALF_SCALES or profile.dtype == "float32"
    return "float16" if wanted and profile.dtype != "float16" else None


def check(source: Source, profile: Served | None, options: Options) -> list[str]:
    """What vLLM would take with something to say about it, one line each.

    Raises:
        SalienceError: what it would refuse, the first thing of it.
    """
    refused = list(_refused_splits(source.config, options))
    found: list[Finding] = []
    if profile is not None and profile.format in _BITSANDBYTES:
        refused.append(
            f"vLLM {VERSION} reads no bitsandbytes checkpoints any more; quantize the float model "
            "to --format awq, or salience convert this one to --format dense"
        )
    elif profile is not None:
        dtype = serving_dtype(source.config, profile) or profile.dtype
        found = minded(replace(profile, dtype=dtype), options.tensor_parallel)
        refused += summary([each for each in found if each.severity == "refuse"])
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise SalienceError(f"{source.name}: {refused[0]}{more}")
    lines = summary(found)
    if isinstance(source.stored, GgufCheckpoint):
        lines.append(
            "vLLM reads GGUF files by a package of its own: pip install vllm-gguf-plugin; "
            "salience convert to --format awq is faster there"
        )
    return lines


def minded(profile: Served, tensor_parallel: int) -> list[Finding]:
    """What this version of vLLM would mind of the linears of a checkpoint."""
    rules = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed_tensors}
    reads_embeddings = profile.format == "compressed-tensors"
    return [
        each
        for each in findings(profile, tensor_parallel, rules)
        if each.runtime == "vllm" and not (reads_embeddings and each.linear in profile.embeddings)
    ]


def _awq(part: Part, gpus: int) -> Iterator[Remark]:
    if part.rows % 8 or part.scheme.group_size not in TILE_GROUPS:
        yield from KERNELS["awq"](part, gpus)


def _gptq(part: Part, gpus: int) -> Iterator[Remark]:
    scheme = part.scheme
    again = "quantize the float model to --format awq"
    if part.act_order:
        yield _ONLY, "refuse", "groups in activation order", again
    elif scheme.bits == 4 and not scheme.sym:
        yield _ONLY, "refuse", "asymmetric GPTQ", "salience convert it to --format awq"
    elif scheme.bits not in (4, 8) or not scheme.sym:
        mend = "salience convert it to --format compressed-tensors"
        yield _ONLY, "refuse", f"GPTQ of {scheme}, where w4-sym and w8-sym are read", mend
    elif scheme.group_size not in TILE_GROUPS:
        yield _ONLY, "refuse", f"GPTQ in groups of {scheme.group_size}", again


def _compressed_tensors(part: Part, gpus: int) -> Iterator[Remark]:
    scheme = part.scheme
    if part.act_order:
        again = "quantize the float model without --act-order"
        yield _ONLY, "refuse", "groups in activation order", again
        return
    taken = scheme.bits == 4 or (scheme.bits == 8 and scheme.sym)
    if not taken or scheme.group_size not in TILE_GROUPS:
        problem = f"{scheme}, which only its Humming kernels take"
        yield _ONLY, "warn", problem, "use w4g128, w4g64 or w4g32 where a build refuses it"


def _refused_splits(config: Any, options: Options) -> Iterator[str]:
    """What the numbers of GPUs must divide, or be divided by."""
    text = config.get_text_config()
    gpus, stages = options.tensor_parallel, options.pipeline_parallel
    heads = getattr(text, "num_attention_heads", None)
    kv_heads = getattr(text, "num_key_value_heads", None)
    layers = getattr(text, "num_hidden_layers", None)
    if isinstance(heads, int) and heads % gpus:
        fit = ", ".join(str(n) for n in range(1, heads + 1) if not heads % n)
        yield f"vLLM would refuse --tensor-parallel {gpus}: it has {heads} heads; use one of {fit}"
    elif isinstance(kv_heads, int) and max(kv_heads, gpus) % min(kv_heads, gpus):
        yield (
            f"vLLM would refuse --tensor-parallel {gpus}: it has {kv_heads} heads of keys and "
            "values, of which each GPU has a whole number, or a copy of one"
        )
    if isinstance(layers, int) and stages > layers:
        yield f"vLLM would refuse --pipeline-parallel {stages}: it has {layers} layers"


def _beside(source: Source, options: Options) -> dict[str, object]:
    """The tokenizer and the config of a GGUF file: those that lie beside it."""
    folder = source.stored.path.parent
    values: dict[str, object] = {}
    if not any(each.partition("=")[0] == "--tokenizer" for each in options.extra):
        if not (folder / "tokenizer_config.json").is_file():
            raise SalienceError(
                f"vLLM wants the tokenizer of {source.name} and there is none beside it; name the "
                "float model it was made of: -- --tokenizer OWNER/MODEL"
            )
        values["--tokenizer"] = folder
    if (folder / "config.json").is_file():
        values["--hf-config-path"] = folder
    return values


def _many(count: int) -> int | None:
    return count if count > 1 else None
