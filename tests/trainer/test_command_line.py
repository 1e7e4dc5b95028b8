"""A command line gives typed values, whatever they look like as text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.trainer.command_line import Override, describe, fits, split_overrides, typed_value


def test_tokens_are_grouped_by_option():
    tokens = ["--a.b", "1", "2", "--c.d=x=y", "--switch", "--e", "-5"]
    assert split_overrides(tokens) == [
        Override("a.b", ("1", "2")),
        Override("c.d", ("x=y",)),
        Override("switch", ()),
        Override("e", ("-5",)),
    ]


@pytest.mark.parametrize("tokens", [["x"], ["1", "--a"], ["--"], ["--=x"]])
def test_a_value_without_an_option_is_refused(tokens):
    with pytest.raises(ValueError, match="option"):
        split_overrides(tokens)


@pytest.mark.parametrize(
    ("values", "hint", "expected"),
    [
        (["1e-5"], float, 1e-5),
        (["3"], float, 3),
        (["3"], str, "3"),
        (["2024"], str | None, "2024"),
        (["null"], str | None, None),
        (["None"], int | None, None),
        (["True"], bool, True),
        (["false"], bool, False),
        ([], bool, True),
        (["[0,6]"], list[int] | None, [0, 6]),
        (["0", "6"], list[int] | None, [0, 6]),
        (["0"], list[int] | None, [0]),
        (["rouge", "f1"], list[str], ["rouge", "f1"]),
        (["a.jsonl"], str | list[str] | None, "a.jsonl"),
        (["a", "b"], str | list[str] | None, ["a", "b"]),
        (['{"x": 1}'], dict[str, int], {"x": 1}),
        (["abc"], int, "abc"),  # fits nothing: left for the caller to refuse
    ],
)
def test_values_become_what_the_option_takes(values, hint, expected):
    value = typed_value(values, hint)
    assert value == expected
    assert type(value) is type(expected)


@given(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text())
def test_a_json_value_survives_the_command_line_where_its_type_is_taken(value):
    hint = type(value) if value is not None else None
    raw = value if isinstance(value, str) else json.dumps(value)
    assert typed_value([raw], hint) == value


@pytest.mark.parametrize(
    ("value", "hint", "answer"),
    [
        (1, float, True),
        (True, int, False),
        (True, float, False),
        (1.0, int, False),
        ([1, "a"], list[int], False),
        ({"a": 1}, dict[str, str], False),
        (None, int | None, True),
    ],
)
def test_fits_is_strict_about_types_but_takes_whole_numbers_for_numbers(value, hint, answer):
    assert fits(value, hint) is answer


def test_types_are_described_in_words():
    assert describe(int | None) == "a whole number or null"
    assert describe(float | int) == "a number"
    assert describe(list[str]) == "a list of text"
    assert describe(str | list[str] | None) == "text or a list of text or null"
