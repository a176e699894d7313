"""A model larger than what a GPU is allowed: parts of it on the CPU and the disk, the same logits.

    python benchmarks/offload.py -o benchmarks/results/offload_h100.json
    python benchmarks/offload.py --device cpu --layers 2 --shape tinyllama-1.1b

The checkpoint is random, made on the spot and rounded to nearest. Each way of loading runs in a
process of its own, so that its peak memory is its own. The logits of the first, which holds all of
the model where it runs, are the reference.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import salience
from salience.bench.shapes import SHAPES, shape_config, write_checkpoint
from salience.machine import describe
from salience.placement import input_device, resolve_device

TOKENS = 128


def peak_bytes() -> int:
    """The most memory this process had; what getrusage says begins with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def load_and_run(folder: str, out: str, options: dict[str, Any]) -> dict[str, Any]:
    """Load a model, compute logits twice, and keep those of the second time."""
    start = time.perf_counter()
    model = salience.load(folder, **options)
    loaded = time.perf_counter() - start
    ids = torch.randint(512, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        with torch.no_grad():
            logits = model(input_ids=ids.to(input_device(model)), use_cache=False).logits
        torch.save(logits.cpu(), out)  # which waits for them
        seconds.append(time.perf_counter() - start)
    held: dict[str, int] = {}
    for tensor in {id(t): t for t in model.state_dict().values()}.values():
        place = str(tensor.device)
        held[place] = held.get(place, 0) + tensor.nbytes
    places = [str(place) for place in getattr(model, "hf_device_map", {}).values()]
    cuda = torch.cuda.is_available()
    return {
        "load_seconds": loaded,
        "forward_seconds": seconds,
        "parts": {place: places.count(place) for place in sorted(set(places))},
        "held_bytes": held,  # "meta" is what is brought from the CPU or the disk
        "peak_rss_bytes": peak_bytes(),
        "peak_vram_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="fewer blocks than the model has")
    parser.add_argument("--scheme", default="w4g128")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--share", type=float, default=0.5, help="of the model that a limit allows")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        folder, logits, options = args.run
        print(json.dumps(load_and_run(folder, logits, json.loads(options))))
        return
    console = Console(stderr=True)
    on_gpu = resolve_device(args.device).type == "cuda"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        floats, folder = Path(name) / "float", Path(name) / "packed"
        floats.mkdir()
        config = shape_config(args.shape, args.layers)
        write_checkpoint(config, floats, resolve_device("auto"))
        salience.quantize(str(floats), folder, method="rtn", scheme=args.scheme)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        console.print(f"made {size / 2**30:.1f} GiB")
        disk = {"offload_folder": name}
        ways: dict[str, dict[str, Any]] = {"whole": {}, "disk": {"device_map": "disk", **disk}}
        if on_gpu:
            ways["GPU and CPU"] = {"max_memory": 0, **disk}
            ways["GPU, CPU and disk"] = {"device_map": "some disk", **disk}
            ways["CPU but the head"] = {"device_map": {"model": "cpu", "lm_head": 0}}
            ways["sequential"] = {"device_map": "sequential", "max_memory": 0, **disk}
        else:
            ways["CPU and disk"] = {"max_memory": 0, **disk}
        reference, limit = None, 0
        for way, options in ways.items():
            if options.get("device_map") == "some disk":
                blocks = config.num_hidden_layers
                third = {i: ("cpu", "disk", 0)[3 * i // blocks] for i in range(blocks)}
                options["device_map"] = {
                    "": 0,
                    **{f"model.layers.{i}": p for i, p in third.items()},
                }
            if "max_memory" in options:
                options["max_memory"] = limit
            options |= {"device": args.device, "kernel": args.kernel}
            out = str(Path(name) / "logits.pt")
            command = [sys.executable, __file__, "--run", str(folder), out, json.dumps(options)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = {"way": way, **json.loads(done.stdout)}
            logits = torch.load(out).double()
            if reference is None:
                reference, limit = logits, int(args.share * sum(row["held_bytes"].values()))
            row["error"] = ((logits - reference).norm() / reference.norm()).item()
            rows.append(row)
            console.print(row)
    result = {"shape": args.shape, "layers": args.layers, "scheme": args.scheme}
    result |= {"kernel": args.kernel, "tokens": TOKENS, "checkpoint_bytes": size}
    result |= {"limit_bytes": limit, "rows": rows, "machine": describe()}
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
