"""`serve`."""

import logging
import sys
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from salience.cli.console import show_serving
from salience.cli.loaded import load_model
from salience.cli.options import (
    DeviceMapOption,
    DeviceOption,
    KernelOption,
    MemoryOption,
    Model,
    OffloadOption,
    TrustOption,
)
from salience.errors import SalienceError

_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "xgrammar")


class EngineName(str, Enum):
    salience = "salience"
    vllm = "vllm"


def serve(
    model: Model,
    extra: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- ARGUMENTS]", help="More of vLLM's own, with --engine vllm."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option("--served-model-name", help="What clients call the model.")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=2, help="Tokens of prompt and reply together.")
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option("--max-batch", min=1, help="Replies made at once (default: by the memory)."),
    ] = None,
    queue: Annotated[
        int, typer.Option("--queue", min=0, help="Replies that may wait; more are refused (429).")
    ] = 256,
    prefill_chunk: Annotated[
        int | None,
        typer.Option("--prefill-chunk", min=1, help="Tokens of prompts between two steps."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", envvar="SALIENCE_API_KEY", help="What clients must send; or a file of it."
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option("--cors", help="Origin whose pages may call the server; repeatable; * all."),
    ] = None,
    max_body: Annotated[
        int, typer.Option("--max-body", min=1, help="Bytes that a request may have.")
    ] = 4 * 2**20,
    drain_seconds: Annotated[
        float, typer.Option("--drain-seconds", min=0, help="For running replies after SIGTERM.")
    ] = 30.0,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="A JSON line on stderr for each request.")
    ] = False,
    engine: Annotated[
        EngineName, typer.Option("--engine", help="Who computes.")
    ] = EngineName.salience,
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", min=1, help="GPUs, with --engine vllm.")
    ] = 1,
    pipeline_parallel: Annotated[
        int, typer.Option("--pipeline-parallel", min=1, help="Stages, with --engine vllm.")
    ] = 1,
    ray: Annotated[
        bool, typer.Option("--ray", help="Over the hosts of a Ray cluster, with --engine vllm.")
    ] = False,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    max_memory: MemoryOption = None,
    offload_folder: OffloadOption = None,
    kernel: KernelOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Serve MODEL to OpenAI's clients, and a page to chat with it."""
    name = served_model_name or _name(model)
    key = _key(api_key)
    if engine is EngineName.vllm:
        from salience.server import vllm

        status = vllm.run(
            model,
            host=host,
            port=port,
            api_key=key,
            context=context,
            served_name=name,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            ray=ray,
            extra=[*(("--max-num-seqs", str(max_batch)) if max_batch else ()), *(extra or ())],
            trust_remote_code=trust_remote_code,
        )
        raise typer.Exit(status)
    only_vllm = {
        "--tensor-parallel": tensor_parallel > 1,
        "--pipeline-parallel": pipeline_parallel > 1,
        "--ray": ray,
        "what follows --": bool(extra),
    }
    for option, given in only_vllm.items():
        if given:
            raise SalienceError(f"{option} needs --engine vllm")
    missing = [package for package in _NEEDED if not find_spec(package)]
    if missing:
        raise SalienceError(f"serve needs {missing[0]}: pip install 'salience[serve]'")

    from salience.runtime.limits import end_tokens
    from salience.server.app import make_app
    from salience.server.guard import Limits
    from salience.server.guide import Guides
    from salience.server.metrics import Metrics
    from salience.server.run import bound, make_server
    from salience.server.service import Service, make_engine
    from salience.server.tools import Tools

    _log(access_log)
    with bound(host, port) as sock:  # before the model, which may take minutes
        loaded, tokenizer = load_model(
            model, device, device_map, max_memory, offload_folder, kernel, trust_remote_code
        )
        made = make_engine(loaded, tokenizer, context, max_batch, prefill_chunk)
        vocabulary = loaded.config.get_text_config().vocab_size
        metrics = Metrics()
        service = Service(
            made,
            tokenizer,
            name,
            queue=queue,
            watch=metrics,
            guides=Guides(tokenizer, vocabulary, end_tokens(loaded, tokenizer)),
            tools=Tools.of,
        )
        limits = Limits(api_key=key, body_bytes=max_body)
        app = make_app(service, metrics, limits, cors or ())
        address, number = sock.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        text = f"{made.max_batch} replies at once of {made.max_context} tokens each"
        show_serving(name, f"http://{shown}:{number}", text, key is not None)
        make_server(app, service, drain_seconds).run(sockets=[sock])


def _name(model: str) -> str:
    """What clients call a model: the last part of its path, or its name on the Hub."""
    return Path(model).resolve().name if Path(model).exists() else model


def _key(given: str | None) -> str | None:
    """A key, or the first line of the file that it names."""
    if given is None:
        return None
    path = Path(given)
    try:
        key = path.read_text(encoding="utf-8").split("\n", 1)[0] if path.is_file() else given
    except (OSError, UnicodeError) as error:
        raise SalienceError(f"--api-key: {path.name} cannot be read: {error}") from error
    if not key.strip():
        raise SalienceError("--api-key is empty")
    return key.strip()


def _log(access: bool) -> None:
    """What the server has to say goes to stderr, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s")
    logging.getLogger("salience.access").setLevel(logging.INFO if access else logging.WARNING)
