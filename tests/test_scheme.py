"""Scheme: names, ranges, and what a group costs."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salience.errors import SalienceError
from salience.scheme import Scheme, fitting_group_sizes

schemes = st.builds(
    Scheme,
    bits=st.integers(1, 8),
    group_size=st.one_of(st.just(-1), st.integers(1, 10_000)),
    sym=st.booleans(),
)


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("w4g128", Scheme(4, 128)),
        ("w3g64-sym", Scheme(3, 64, sym=True)),
        ("w4channel", Scheme(4, -1)),
        ("w8channel-sym", Scheme(8, -1, sym=True)),
        ("w1g1", Scheme(1, 1)),
        ("nf4", Scheme(4, 64, codebook="nf4")),
        ("nf4-dq", Scheme(4, 64, codebook="nf4", double_quant=True)),
        ("fp4", Scheme(4, 64, codebook="fp4")),
        ("nf4g128", Scheme(4, 128, codebook="nf4")),
        ("fp4g4096-dq", Scheme(4, 4096, codebook="fp4", double_quant=True)),
    ],
)
def test_parse(text: str, scheme: Scheme) -> None:
    assert Scheme.parse(text) == scheme
    assert str(scheme) == text


@given(schemes)
def test_name_round_trip(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    "text",
    [
        *("", "4", "w4", "g128", "w9g128", "w0g128", "w4g0", "w4g012", "w4g-1", "W4G128"),
        *("w4g128 ", "w4g128\n", "w4g128-SYM", "w4g128-sym-sym", "w4channelg128", "w44g128"),
        *(
            "w4g1.5",
            "q4_0",
            "nf4-sym",
            "nf4-dq-dq",
            "w4g64-dq",
            "NF4",
            "-dq",
            "fp3",
            "nf4g0",
            "nf4channel",
        ),
    ],
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(
        SalienceError, match="w4g128, w3g64-sym or w4channel, or nf4 or nf4-dq"
    ) as error:
        Scheme.parse(text)
    assert repr(text) in str(error.value)


@given(st.text(max_size=12))
def test_parse_fails_in_one_way(text: str) -> None:
    try:
        scheme = Scheme.parse(text)
    except SalienceError:
        return
    assert str(scheme) == text


@pytest.mark.parametrize("bits", [-1, 0, 9])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(SalienceError, match=f"bits is {bits}"):
        Scheme(bits, 128)


@pytest.mark.parametrize("group_size", [-2, 0])
def test_group_size_out_of_range(group_size: int) -> None:
    with pytest.raises(SalienceError, match=f"group_size is {group_size}"):
        Scheme(4, group_size)


def test_levels() -> None:
    assert [Scheme(bits).levels for bits in range(1, 9)] == [1, 3, 7, 15, 31, 63, 127, 255]


def test_groups() -> None:
    assert Scheme(4, 64).groups(576) == 9
    assert Scheme(4, -1).groups(576) == 1
    assert Scheme(4, -1).group_columns(576) == 576
    with pytest.raises(SalienceError, match="group size 128 does not divide in_features 576"):
        Scheme(4, 128).groups(576)


def test_bits_per_weight() -> None:
    assert Scheme(4, 128).bits_per_weight(1024) == 4 + 20 / 128
    assert Scheme(3, 64).bits_per_weight(1024) == 3 + 19 / 64
    assert Scheme(4, -1).bits_per_weight(1000) == 4 + 20 / 1000
    assert Scheme.parse("nf4").bits_per_weight(1024) == 4.5
    assert Scheme.parse("nf4-dq").bits_per_weight(1024) == 4 + 8 / 64 + 32 / (64 * 256)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"codebook": "fp8"}, "codebook is 'fp8'; use nf4 or fp4"),
        ({"codebook": "nf4", "bits": 3}, "nf4 has 4 bits, a group size, and no symm"),
        ({"codebook": "nf4", "group_size": -1}, "nf4 has 4 bits, a group size, and no symm"),
        ({"codebook": "nf4", "sym": True}, "nf4 has 4 bits, a group size, and no symm"),
        ({"double_quant": True}, "use scheme nf4-dq"),
    ],
)
def test_codebooks_have_one_form(values: dict[str, Any], match: str) -> None:
    with pytest.raises(SalienceError, match=match):
        Scheme(**({"bits": 4, "group_size": 64} | values))


def test_fitting_group_sizes() -> None:
    assert fitting_group_sizes({1024}) == [256, 128, 64, 32, 16]
    assert fitting_group_sizes({576, 1536}) == [64, 32, 16]
    assert fitting_group_sizes({576, 20}) == []
