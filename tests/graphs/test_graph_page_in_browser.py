"""The page of a knowledge graph as a visitor uses it: typing, clicking, zooming; nothing is asked of any machine."""

import time

import pytest
from headless_browser import ClosedProxy, headless_browser, requests_of

from graft.graphs.knowledge_graph.corpus_graph import build_knowledge_graph
from graft.graphs.knowledge_graph.graph_building import GraphSettings
from graft.graphs.knowledge_graph.mention_shards import ExtractorChoice
from graft.graphs.knowledge_graph.mentions import TextChunk

pytest.importorskip("networkx")
pytestmark = pytest.mark.slow

TEXTS = (
    "They saw Ada Lovelace with Charles Babbage. Then </script><b> Ada Lovelace & Charles Babbage left London. ",
    "In London lived Charles Babbage. Of Lovelace one knew that she met Charles Babbage and George Boole. ",
    "It is said that George Boole liked Ada Lovelace. And George Boole wrote to Ada Lovelace. ",
)


@pytest.fixture(scope="module")
def visit(tmp_path_factory):
    """A browser at the page, and the proxy that all it asks for would go through."""
    folder = tmp_path_factory.mktemp("page")
    chunks = [TextChunk(f"book {number // 2}", number % 2, text) for number, text in enumerate(TEXTS)]
    build_knowledge_graph(chunks, folder, ExtractorChoice("capitalised"), GraphSettings(min_npmi=-1))
    with ClosedProxy() as proxy, headless_browser(folder, *proxy.flags) as driver:
        yield driver, proxy, (folder / "graph.html").as_uri()


def one(driver, selector):
    return driver.find_element("css selector", selector)


def all_of(driver, selector):
    return driver.find_elements("css selector", selector)


def circle_of(driver, name):
    return next(c for c in all_of(driver, "#kg circle") if one(c, "title").get_attribute("textContent") == name)


def test_a_visitor_searches_clicks_and_reads_the_sentences(visit):
    driver, _, address = visit
    driver.get(address)
    assert not one(driver, "#side").text
    offered = [button.text for button in all_of(driver, "#found button")]
    assert sorted(offered) == ["Ada Lovelace", "Charles Babbage", "George Boole", "London"]  # where to begin
    one(driver, "#search").send_keys("boole")
    buttons = all_of(driver, "#found button")
    assert [button.text for button in buttons] == ["George Boole"]
    buttons[0].click()
    assert one(driver, "#side h2").text == "George Boole"
    circle_of(driver, "Ada Lovelace").click()
    assert one(driver, "#side h2").text == "Ada Lovelace"
    quoted = [quote.text for quote in all_of(driver, "#side blockquote")]
    assert "They saw Ada Lovelace with Charles Babbage." in quoted
    assert "Then </script><b> Ada Lovelace & Charles Babbage left London." in quoted  # as text, not as markup
    said = [button.text for button in all_of(driver, "#side button")]
    assert "George Boole \u2013 like \u2192 Ada Lovelace" in said
    assert [c.get_attribute("class") for c in all_of(driver, "#kg circle")].count("chosen") == 1
    next(button for button in all_of(driver, "#near button") if "Babbage" in button.text).click()
    assert one(driver, "#side h2").text == "Charles Babbage"


def test_return_chooses_the_first_of_what_was_found(visit):
    driver, _, address = visit
    driver.get(address)
    one(driver, "#search").send_keys("lond\n")
    assert one(driver, "#side h2").text == "London"


def test_no_request_leaves_the_machine_and_one_that_tried_would_be_seen(visit):
    driver, proxy, address = visit
    driver.get("about:blank")
    requests_of(driver)
    before = len(proxy.of_pages())
    driver.get(address)
    one(driver, "#search").send_keys("ada\n")
    circle_of(driver, "London").click()
    time.sleep(1)  # for what a page may load late
    assert requests_of(driver) == [address]
    assert not proxy.of_pages()[before:]
    # The same page with a picture from elsewhere: both watchers see it, so their silence above means something.
    driver.execute_script("document.body.append(Object.assign(new Image(), {src: 'http://example.org/seen.png'}))")
    end = time.time() + 20
    while not any("example.org/seen.png" in line for line in proxy.of_pages()) and time.time() < end:
        time.sleep(0.05)
    assert any("example.org/seen.png" in line for line in proxy.of_pages())
    assert "http://example.org/seen.png" in requests_of(driver)


def view_of(driver):
    return [float(number) for number in one(driver, "#kg svg").get_dom_attribute("viewBox").split()]


def test_buttons_wheel_and_hand_move_the_view_and_a_drag_chooses_nothing(visit):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    driver, _, address = visit
    driver.get(address)
    whole, picture = view_of(driver), one(driver, "#kg svg")
    one(driver, "#closer").click()
    near = view_of(driver)
    assert near[2] == pytest.approx(whole[2] / 1.6)
    ActionChains(driver).drag_and_drop_by_offset(picture, -60, -40).perform()
    moved = view_of(driver)
    assert moved[0] > near[0]
    assert moved[1] > near[1]
    assert not one(driver, "#side").text
    one(driver, "#all").click()
    assert view_of(driver) == whole
    ActionChains(driver).scroll_from_origin(ScrollOrigin.from_element(picture), 0, -200).perform()
    assert view_of(driver)[2] < whole[2]
    one(driver, "#farther").click()
    one(driver, "#farther").click()
    assert view_of(driver) == whole


def test_a_click_beside_the_nodes_takes_the_choice_back(visit):
    from selenium.webdriver import ActionChains

    driver, _, address = visit
    driver.get(address)
    circle_of(driver, "London").click()
    assert all_of(driver, "#kg .chosen")
    assert not one(driver, "#found").text
    picture = one(driver, "#kg svg")
    ActionChains(driver).move_to_element_with_offset(picture, -picture.rect["width"] / 2 + 6, 0).click().perform()
    assert not all_of(driver, "#kg .chosen")
    assert not all_of(driver, "#kg .faint")
    assert not one(driver, "#side").text
    assert len(all_of(driver, "#found button")) == 4


def test_of_many_nodes_the_largest_are_named_and_closer_ones_when_zoomed(visit, tmp_path):
    driver, _, _ = visit
    words = ["Alba", "Bern", "Cadiz", "Delft", "Essen", "Faro", "Genoa", "Hull", "Izmir", "Jena", "Kiel", "Lyon"]
    names = [f"{first} {second}" for first in words for second in words if first != second]
    text = " ".join(
        f"It is said that {a} is by {b}. It was {b} and then {a} too." for a, b in zip(names, names[1:], strict=False)
    )
    chunks = [TextChunk("atlas", 0, text)]
    build_knowledge_graph(chunks, tmp_path, ExtractorChoice("capitalised"), GraphSettings(min_npmi=-1, min_weight=1))
    driver.get((tmp_path / "graph.html").as_uri())
    shown = "#kg text:not(.later)"
    total, first = len(all_of(driver, "#kg text")), {word.text for word in all_of(driver, shown)}
    assert total > 100
    assert 10 < len(first) < total / 2
    boxes = [word.rect for word in all_of(driver, shown)]
    for index, box in enumerate(boxes):
        for other in boxes[index + 1 :]:
            apart = abs(box["y"] - other["y"]) > 9 or box["x"] + box["width"] < other["x"] + 4
            assert apart or other["x"] + other["width"] < box["x"] + 4
    for _ in range(3):
        one(driver, "#closer").click()
    assert {word.text for word in all_of(driver, shown)} - first
    one(driver, "#search").send_keys("Lyon Jena\n")
    assert "Lyon Jena" in {word.text for word in all_of(driver, shown)}  # the chosen one is named and in view
