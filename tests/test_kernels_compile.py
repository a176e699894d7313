"""The Triton kernels compile for GPUs that are not here, as they are meant to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm80", "sm90", "gfx942"])
def test_compiles(target: str, tmp_path: Path) -> None:
    script = Path(__file__).parent / "compile_kernels.py"
    environment = {name: value for name, value in os.environ.items() if "TRITON" not in name}
    done = subprocess.run(
        [sys.executable, script, target],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 7
    for _, kernel, bits, dtype, counts in lines:
        assert (counts["mma"] > 0) == (kernel == "multiply"), (kernel, bits, dtype)
        if (target, kernel) == ("sm90", "multiply") and dtype != "fp32":
            message = "weights go from registers to the matrix unit, not through shared memory"
            assert counts["st.shared"] == 0, (bits, dtype, message)
