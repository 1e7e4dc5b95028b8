import re
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.pages import figure, heading, heat_map_png, line_plot_png, page, paragraph, table, token_heat

HOSTILE = "<script>alert('x')</script> & \"quoted\" $x$"


class Reading(HTMLParser):
    """What a browser would make of a page: its tags, its text, and each span's ground."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.addresses: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def strengths(html: str) -> list[float]:
    return [float(share) for share in re.findall(r"rgba\(\d+,\d+,\d+,([\d.]+)\)", html)]


@given(tokens=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=5), max_size=8))
def test_token_heat_shows_exactly_the_text_it_was_given(tokens):
    assert Reading(token_heat(tokens, [1.0] * len(tokens))).text == "".join(tokens) + "\n"


def test_no_function_lets_markup_through(tmp_path):
    png = line_plot_png({HOSTILE: ([0], [1])}, tmp_path / "a.png", title=HOSTILE, axes_names=(HOSTILE, HOSTILE))
    body = "".join(
        [
            heading(HOSTILE),
            paragraph(HOSTILE),
            table([[HOSTILE, 1]], [HOSTILE, "n"]),
            token_heat([HOSTILE, HOSTILE], [1, 0]),
            figure(png, HOSTILE),
        ]
    )
    read = Reading(page(HOSTILE, body))
    assert "script" not in read.tags
    assert read.text.count(HOSTILE) == 9  # each of them, and twice the title


def test_a_page_needs_no_other_file(tmp_path):
    png = heat_map_png([[0.0, 1.0]], tmp_path / "a.png")
    page("Title", figure(png, "caption"), tmp_path / "page.html")
    read = Reading((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [address.partition(",")[0] for address in read.addresses] == ["data:image/png;base64"]
    assert not {"script", "link"} & set(read.tags)


def test_colours_grow_with_weights_up_to_the_largest():
    assert strengths(token_heat(["a", "b", "c"], [1.0, 2.0, 4.0])) == [0.25, 0.5, 1.0]
    assert strengths(token_heat(["a", "b"], [1.0, 9.0], scale=4.0)) == [0.25, 1.0]
    assert strengths(token_heat(["a", "b"], [0.0, 0.0])) == []


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "`weights` must be as many as `tokens`, got 1 for 2"),
        ([1.0, -0.5], "at least 0, got -0.5"),
        ([float("nan"), 1.0], "must be finite and at least 0, got nan"),
    ],
)
def test_wrong_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        token_heat(["a", "b"], weights)


def test_table_sets_numbers_right_and_short():
    html = table([["recall", 0.123456, 1234567, True]], ["name", "share", "keys", "exact"])
    assert "<td class=number>0.1235</td><td class=number>1,234,567</td><td>True</td>" in html


def test_the_same_figures_give_the_same_picture(tmp_path):
    for name in ("a.png", "b.png"):
        line_plot_png({"loss": (range(3), [3, 2, 1])}, tmp_path / name, logarithmic=True)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_leave_matplotlibs_global_state_alone(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    heat_map_png([[0.5]], tmp_path / "a.png", ["x"], ["y"])
    assert ("matplotlib.pyplot" in sys.modules) == before


@pytest.mark.parametrize(
    ("matrix", "labels", "message"),
    [
        ([], {}, r"`matrix` must hold rows of one length above 0, got lengths \[\]"),
        ([[1.0], [1.0, 2.0]], {}, r"got lengths \[1, 2\]"),
        ([[1.0]], {"x_labels": ["a", "b"]}, "`x_labels` must be 1 or none, got 2"),
        ([[1.0]], {"y_labels": ["a", "b"]}, "`y_labels` must be 1 or none, got 2"),
    ],
)
def test_wrong_matrices_are_refused(tmp_path, matrix, labels, message):
    with pytest.raises(ValueError, match=message):
        heat_map_png(matrix, tmp_path / "a.png", **labels)
    assert not list(tmp_path.iterdir())


def test_wrong_series_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one line"):
        line_plot_png({}, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"those of \['loss'\] differ"):
        line_plot_png({"loss": ([1], [])}, tmp_path / "a.png")
