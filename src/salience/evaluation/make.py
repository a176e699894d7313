"""Candidates quantized, in a process of their own: `python -m salience.evaluation.make REQUEST`.

Those of one model read its calibration text together (`pipeline.quantize_all`). The request is a
JSON file: `model`, `variants` (`out`, `scheme`, `method`, `effort`, `format`) and the options of
`quantize`. Progress goes to stdout, a line of JSON each.
"""

import json
import sys
from pathlib import Path

from salience.calibration import Calibration
from salience.checkpoint import read_json
from salience.errors import SalienceError
from salience.pipeline.quantize import Variant, quantize_all


def main() -> None:
    """Make what the request in argv says."""
    request = read_json(Path(sys.argv[1]))

    def say(phase: str, done: int, total: int) -> None:
        print(json.dumps([phase, done, total]), flush=True)

    try:
        quantize_all(
            request["model"],
            [Variant(**each) for each in request["variants"]],
            calibration=Calibration(**request["calibration"]),
            device=request["device"],
            trust_remote_code=request["trust_remote_code"],
            progress=say,
        )
    except SalienceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
