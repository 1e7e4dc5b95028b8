"""The page of graft-demo in a headless browser: drop a document, see it read, ask, see what was read.

It needs gradio, selenium and Debian's chromium and chromium-driver, and skips itself without them.
"""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from headless_browser import headless_browser

pytestmark = pytest.mark.slow
pytest.importorskip("gradio")
DOCUMENT = "the cat sat on a mat near the sea while rain fell all night\n\n" * 60


@pytest.fixture
def browser(tmp_path):
    with headless_browser(tmp_path) as driver:
        yield driver


def served(folder, log):
    """The process of graft-demo and its address, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "graft.scripts.demo", folder, "--port", str(port), "--max_new_tokens", "8"]
    command += ["--memory.window", "32", "--memory.keys_per_query", "8"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    for _ in range(600):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return process, f"http://127.0.0.1:{port}"
        assert process.poll() is None, Path(log.name).read_text()
        time.sleep(0.1)
    raise AssertionError(Path(log.name).read_text())


def waited_for(condition, seconds=60):
    end = time.time() + seconds
    while not (found := condition()):
        assert time.time() < end
        time.sleep(0.05)
    return found


def test_a_visitor_drops_a_document_asks_and_sees_what_was_read(make_run, tmp_path, browser):
    make_run("causal")
    (tmp_path / "book.txt").write_text(DOCUMENT)
    with (tmp_path / "log.txt").open("w") as log:
        process, address = served(str(tmp_path / "model"), log)
        try:
            browser.get(address)
            status = lambda: browser.find_element("css selector", "#status").text  # noqa: E731
            waited_for(lambda: browser.find_elements("css selector", "#file input[type=file]"))
            assert not browser.find_element("css selector", "#ask").is_enabled()
            browser.find_element("css selector", "#file input[type=file]").send_keys(str(tmp_path / "book.txt"))
            waited_for(lambda: "book" in browser.find_element("css selector", "#file").text)
            browser.find_element("css selector", "#read").click()
            waited_for(lambda: re.search(r"Read all [\d,]+ tokens", status()))
            browser.find_element("css selector", "#question textarea").send_keys("who sat?")
            waited_for(lambda: browser.find_element("css selector", "#ask").is_enabled())
            browser.find_element("css selector", "#ask").click()
            frame = waited_for(lambda: browser.find_elements("css selector", "#heat iframe"))[0]
            assert browser.find_element("css selector", "#answer textarea").get_property("value")
            browser.switch_to.frame(frame)
            waited_for(lambda: "The document" in browser.find_element("css selector", "body").text)
            assert browser.find_elements("css selector", ".tokens span")  # some of the text is coloured
            browser.switch_to.default_content()
            loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
            elsewhere = [name for name in loaded if not name.startswith((address, "data:", "blob:"))]
            assert not elsewhere
        finally:
            process.terminate()
            process.wait(30)
