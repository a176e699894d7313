"""Where the marks of a plot are, read back from its SVG."""

from xml.etree import ElementTree

import numpy as np


def marks(svg: str, variable: str) -> np.ndarray:
    """Positions of the marks of one colour, [marks, 2]."""
    found = [
        use
        for use in ElementTree.fromstring(svg).iter("use")
        # The band around a line is a <use> too, and translucent.
        if f"var({variable})" in use.get("style", "") and "opacity: 0." not in use.get("style", "")
    ]
    return np.array([[float(use.get(axis, "")) for axis in "xy"] for use in found])


def assert_affine(positions: np.ndarray, values: np.ndarray, sign: int) -> None:
    """Positions are the values on a linear axis; `sign` says which way it runs."""
    slope, offset = np.polyfit(values, positions, 1)
    assert np.sign(slope) == sign
    np.testing.assert_allclose(slope * values + offset, positions, atol=1e-3)
