"""Recipes: which linear gets which scheme."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salience.errors import SalienceError
from salience.recipe import Recipe
from salience.scheme import Scheme

W3, W4, W8 = Scheme(3, 64), Scheme(4, 128), Scheme(8, 32)
LOCAL = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
INSIDE = [f"model.layers.{i}.{local}" for i in range(12) for local in LOCAL]
NAMES = [*INSIDE, "lm_head"]


def resolve(**parts: object) -> dict[str, Scheme]:
    return Recipe(W4, **parts).resolve(NAMES, "model.layers")  # type: ignore[arg-type]


def test_the_default_is_for_the_blocks() -> None:
    assert resolve() == dict.fromkeys(INSIDE, W4)
    assert list(resolve()) == INSIDE  # in the order of the model
    assert Recipe().scheme == Scheme.parse("w4g128")


def test_the_prefix_is_a_whole_name() -> None:
    names = ["model.layers.0.a", "model.layers_extra.0.a", "model.layers2.0.a"]
    assert Recipe(W4).resolve(names, "model.layers") == {"model.layers.0.a": W4}


def test_the_first_rule_that_matches_wins() -> None:
    found = resolve(rules=(("layers\\.0\\..*down", W3), ("down_proj$", W8), ("", W4)))
    assert found["model.layers.0.mlp.down_proj"] == W3
    assert found["model.layers.1.mlp.down_proj"] == found["model.layers.10.mlp.down_proj"] == W8
    assert found["model.layers.0.mlp.up_proj"] == W4
    found = resolve(rules=(("down_proj$", W8), ("layers\\.0\\..*down", W3)))
    assert found["model.layers.0.mlp.down_proj"] == W8


def test_patterns_are_searched_for_anywhere() -> None:
    found = resolve(rules=(("mlp", W8), ("^self_attn|q_proj$", W3)))
    assert {found[name] for name in INSIDE if ".mlp." in name} == {W8}
    assert {found[name] for name in INSIDE if "q_proj" in name} == {W3}
    assert {found[name] for name in INSIDE if "k_proj" in name} == {W4}
    dotted = resolve(rules=(("layers\\.1\\.", W3),))
    assert [name for name, scheme in dotted.items() if scheme == W3] == INSIDE[4:8]


def test_rules_reach_outside_the_blocks() -> None:
    found = resolve(rules=(("^lm_head$", W8),))
    assert found == {**dict.fromkeys(INSIDE, W4), "lm_head": W8}
    assert resolve(rules=((".", W8),)) == dict.fromkeys(NAMES, W8)


def test_skip_beats_all() -> None:
    found = resolve(rules=(("mlp", W8), ("lm_head", W8)), skip=("layers\\.0\\.", "head"))
    assert set(found) == set(INSIDE[4:])
    assert resolve(skip=("q_proj",), only=("self_attn",)) == {
        name: W4 for name in INSIDE if "k_proj" in name
    }


def test_only_leaves_the_rest_float() -> None:
    assert set(resolve(only=("layers\\.3\\.",))) == set(INSIDE[12:16])
    assert set(resolve(only=("layers\\.3\\.", "k_proj"))) == set(INSIDE[12:16]) | {
        name for name in INSIDE if "k_proj" in name
    }
    # It names no scheme: what is outside the blocks needs a rule too.
    found = resolve(only=("lm_head|down_proj",))
    assert set(found) == {name for name in INSIDE if "down_proj" in name}
    assert resolve(only=("lm_head",), rules=(("lm_head", W8),)) == {"lm_head": W8}


@pytest.mark.parametrize("option", ["rules", "skip", "only"])
@pytest.mark.parametrize("pattern", ["(", "[a", "*x", "(?P<n", "a{99999999999999999999}"])
def test_patterns_that_are_none(option: str, pattern: str) -> None:
    value = ((pattern, W8),) if option == "rules" else (pattern,)
    message = rf"^pattern {re.escape(repr(pattern))} is no regular expression: "
    with pytest.raises(SalienceError, match=message) as error:
        Recipe(W4, **{option: value})  # type: ignore[arg-type]
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("option", ["rules", "skip", "only"])
def test_patterns_that_match_nothing(option: str) -> None:
    """A misspelt name is told, not passed over: beside others, and hidden by them, too."""
    good = (("mlp", W8),) if option == "rules" else ("mlp",)
    bad = (("mpl", W8),) if option == "rules" else ("mpl",)
    with pytest.raises(SalienceError, match=r"^pattern 'mpl' matches no linear of the model$"):
        resolve(**{option: good + bad})
    assert resolve(**{option: good})


def test_nothing_left() -> None:
    for parts in ({"skip": ("",)}, {"only": ("lm_head",)}, {"skip": ("self",), "only": ("self",)}):
        with pytest.raises(SalienceError, match=r"^the patterns leave no linear to quantize$"):
            resolve(**parts)
    with pytest.raises(SalienceError, match="leave no linear"):
        Recipe(W4).resolve(["lm_head"], "model.layers")


def test_describe() -> None:
    recipe = Recipe(W4, (("a", W8), ("b", Scheme(3, -1, True))), ("c",), ("a", "b"))
    assert recipe.describe() == {
        "scheme": "w4g128",
        "rules": [["a", "w8g32"], ["b", "w3channel-sym"]],
        "skip": ["c"],
        "only": ["a", "b"],
    }
    assert Recipe().describe() == {"scheme": "w4g128", "rules": [], "skip": [], "only": []}


PIECES = st.sampled_from(["mlp", "self_attn", "q_proj$", "layers\\.1\\.", "^lm_head$", "", "."])
RULES = st.lists(st.tuples(PIECES, st.sampled_from([W3, W8])), max_size=3)


@given(rules=RULES, skip=st.lists(PIECES, max_size=2), only=st.lists(PIECES, max_size=2))
def test_resolve_is_scheme_of_for_each(
    rules: list[tuple[str, Scheme]], skip: list[str], only: list[str]
) -> None:
    """And that is: no skip, some only, the first rule, and else the default of the blocks."""
    recipe = Recipe(W4, tuple(rules), tuple(skip), tuple(only))
    expected = {}
    for name in NAMES:
        fits = [scheme for pattern, scheme in rules if re.search(pattern, name)]
        fits += [W4] if name in INSIDE else []
        dropped = [p for p in skip if re.search(p, name)]
        wanted = not only or [p for p in only if re.search(p, name)]
        if fits and not dropped and wanted:
            expected[name] = fits[0]
        scheme = recipe.scheme_of(name, name in INSIDE)
        assert scheme == expected.get(name)
    if expected:
        assert recipe.resolve(NAMES, "model.layers") == expected
    else:
        with pytest.raises(SalienceError, match="leave no linear"):
            recipe.resolve(NAMES, "model.layers")


def test_what_cannot_be_quantized_is_refused_with_the_reason() -> None:
    names = ["model.layers.0.self_attn.q_proj"]
    floats = {"model.layers.0.mlp.experts": "expert", "lm_head": "outside the blocks"}
    for recipe in (Recipe(only=("experts",)), Recipe(rules=(("experts", Scheme(8, 64)),))):
        with pytest.raises(
            SalienceError, match=r"asks for model\.layers\.0\.mlp\.experts.*\(expert"
        ):
            recipe.resolve(names, "model.layers", floats)
    with pytest.raises(SalienceError, match="matches no linear"):
        Recipe(skip=("experts",)).resolve(names, "model.layers", floats)
