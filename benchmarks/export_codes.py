"""Write the codes and zeros that salience reads from a checkpoint, for `interop_autoawq.py`.

python benchmarks/export_codes.py CHECKPOINT_DIR -o CODES.safetensors
~/autoawq/bin/python benchmarks/interop_autoawq.py CHECKPOINT_DIR --check CODES.safetensors
"""

import argparse

from safetensors.torch import save_file
from torch import Tensor

from salience.formats import detect_format
from salience.source import open_source
from salience.structure import linears


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("-o", "--out", required=True)
    args = parser.parse_args()
    source = open_source(args.checkpoint)
    config = source.config.quantization_config
    fmt = detect_format(config)
    codes: dict[str, Tensor] = {}
    for name in linears(source.skeleton()):
        tensors = {part: f"{name}.{part}" for part in fmt.tensors}
        if not all(full in source.stored.names() for full in tensors.values()):
            continue
        stored = {part: source.stored.tensor(full) for part, full in tensors.items()}
        qt = fmt.read(stored, fmt.scheme(config, name))
        codes[f"{name}.codes"], codes[f"{name}.zeros"] = qt.q, qt.zeros
    save_file(codes, args.out)


if __name__ == "__main__":
    main()
