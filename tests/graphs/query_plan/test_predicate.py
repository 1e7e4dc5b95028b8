import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.configuration.configuration_query_graph import COMPARISONS
from graft.graphs.query_plan.predicate import names_in, predicate_shape

NAMES = (*COMPARISONS, "texts", "numbers")


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("(b > 3)", {"range": 1, "numbers": 1}),
        ("(b >= 3.5) AND (b <> 4)", {"range": 1, "unequal": 1, "and": 1, "numbers": 2}),
        ("b != 'it''s = > LIKE'", {"unequal": 1, "texts": 1}),
        ("a = a", {"equal": 1}),
        ("contains(s, 'x')", {"like": 1, "call": 1, "texts": 1}),
        ("(o.region ~~ 'no%'::text)", {"like": 1, "texts": 1}),
        ("NOT (x IN (1, 2, 3)) OR y IS NULL", {"not": 1, "in_list": 1, "or": 1, "null_test": 1, "numbers": 3}),
        ('"a = b" < 2', {"range": 1, "numbers": 1}),
        ("column12 = #3", {"equal": 1}),
    ],
)
def test_shapes(text, shape):
    assert {name: count for name, count in zip(NAMES, predicate_shape(text), strict=True) if count} == shape


@given(st.text(alphabet="abz_09 =<>'\"", min_size=1), st.text(alphabet="abz_09 =<>'\"", min_size=1))
def test_names_change_nothing(one, other):
    first, second = (f'"{name.replace(chr(34), chr(34) * 2)}"' for name in (one, other))
    # A single quote inside a quoted name is read as the start of a literal by nobody.
    first, second = first.replace("'", "_"), second.replace("'", "_")
    assert predicate_shape(f"{first} >= 3 AND lower({second}) LIKE 'a%'") == predicate_shape(
        f"{second} >= 3 AND lower({first}) LIKE 'a%'"
    )
    assert predicate_shape(f"{first} = 3") == predicate_shape("q = 3")


def test_names_are_found_outside_of_literals():
    assert names_in("(t.one > 'two') AND \"th ree\" = four") == {"t", "one", "AND", "th ree", "four"}
