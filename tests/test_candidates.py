"""What is compared, from the words of the command line."""

import pytest

from salience.errors import SalienceError
from salience.evaluation.candidates import parse_candidates


def parsed(*texts: str, schemes: tuple[str, ...] = ("w4g64", "w3g64")) -> list[tuple[str, str]]:
    return [(c.name, str(c.recipe or "")) for c in parse_candidates(texts, schemes)]


def test_the_command_of_the_manual() -> None:
    names = [name for name, _ in parsed("smollm2-135m", "@rtn", "@awq", "@gptq", "@balanced")]
    assert names == [
        "smollm2-135m",
        *("rtn w4g64", "rtn w3g64", "awq w4g64", "awq w3g64"),
        *("gptq w4g64", "gptq w3g64", "balanced w4g64", "balanced w3g64"),
    ]


def test_recipes() -> None:
    texts = ("org/A", "org/A@w4g64:gptq", "B@nf4", "@w3g64:fast", "A@w3g128:balanced", "B@nf4-dq")
    found = parse_candidates(texts, ("w4g64",))
    assert [
        (c.model, c.recipe and (c.recipe.scheme, c.recipe.method, c.recipe.effort)) for c in found
    ] == [
        ("org/A", None),
        ("org/A", ("w4g64", "gptq", "fast")),
        ("B", ("nf4", "nf4", "fast")),
        ("org/A", ("w3g64", "awq", "fast")),
        ("A", ("w3g128", "awq", "balanced")),
        ("B", ("nf4-dq", "nf4", "fast")),
    ]
    assert [c.recipe.format for c in found if c.recipe][:2] == [
        "compressed-tensors",
        "bitsandbytes",
    ]
    names = [c.name for c in found]
    assert len(set(names)) == len(names)


def test_models_of_one_folder_name_are_told_apart() -> None:
    assert [name for name, _ in parsed("a/model", "b/model")] == ["a/model", "b/model"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["A"], "at least one other MODEL"),
        (["@awq", "A"], "the first MODEL is the reference"),
        (["A@awq", "B"], "the first is the reference, one"),
        (["A", "A@w4g64:finest"], "no method 'finest'; use awq or gptq or rtn or nf4 or fast"),
        (["A", "A@w9g64"], "scheme 'w9g64' is not understood"),
        (["A", "A@w4g64:nf4"], "method nf4 makes no w4g64"),
        (["A", "A@nf4:awq"], "method awq makes no nf4"),
        (["A", "B", "B"], "B is there twice"),
        (["A", "@awq", "@fast"], "is there twice"),
    ],
)
def test_what_is_not_understood(texts: list[str], message: str) -> None:
    with pytest.raises(SalienceError) as caught:
        parse_candidates(texts, ("w4g64", "w3g64"))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
