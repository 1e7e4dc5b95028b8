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
    next(button for button in all_of(driver, "#found button") if "Babbage" in button.text).click()  # a neighbour
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
    before = len(proxy.asked)
    driver.get(address)
    one(driver, "#search").send_keys("ada\n")
    circle_of(driver, "London").click()
    time.sleep(1)  # for what a page may load late
    assert requests_of(driver) == [address]
    assert not proxy.asked[before:]
    # The same page with a picture from elsewhere: both watchers see it, so their silence above means something.
    driver.execute_script("document.body.append(Object.assign(new Image(), {src: 'http://example.org/seen.png'}))")
    end = time.time() + 20
    while not any("example.org/seen.png" in line for line in proxy.asked) and time.time() < end:
        time.sleep(0.05)
    assert any("example.org/seen.png" in line for line in proxy.asked)
    assert "http://example.org/seen.png" in requests_of(driver)
