"""Debian's chromium without a window, driven as a visitor would, and a proxy through which it asks for anything."""

import json
import shutil
import socket
import threading
from contextlib import contextmanager

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
FLAGS += ("disable-component-update", "disable-sync", "window-size=1200,1400")

MAKERS_HOSTS = (".google.com:443 ", ".googleapis.com:443 ", ".gvt1.com:443 ")


@contextmanager
def headless_browser(folder, *flags):
    """A selenium driver of chromium with its profile in `folder`; skips the test where a part is not installed."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    for flag in (*FLAGS, *flags, f"user-data-dir={folder / 'profile'}"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def requests_of(driver):
    """The addresses that pages have asked for since the last call, as the browser's own log has them."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]


class ClosedProxy:
    """A proxy on this machine that lets nothing through and keeps the first line of whatever it is asked."""

    def __init__(self):
        self.asked = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.flags = (
            f"proxy-server=http://127.0.0.1:{self._server.getsockname()[1]}",
            "proxy-bypass-list=<-loopback>",  # not even for this machine
            "host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
        )
        threading.Thread(target=self._serve, daemon=True).start()

    def of_pages(self):
        """What was asked, but for the browser's own: whatever page is open, it looks up its maker's hosts at times."""
        return [line for line in self.asked if not any(host in line for host in MAKERS_HOSTS)]

    def _serve(self):
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            with connection:
                connection.settimeout(5)
                try:
                    self.asked.append(connection.recv(4096).split(b"\r\n")[0].decode(errors="replace"))
                    connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                except OSError:
                    continue

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._server.close()
