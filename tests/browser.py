"""A real headless browser for the tests of pages: Chromium, driven by playwright."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def open_browser():
    """Chromium of ``CHROMIUM``, of PATH, or of ``playwright install chromium``; skips the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
        found = found or (own if Path(own).exists() else None)
        if found is None:
            pytest.skip("no Chromium: apt-get install chromium, or python -m playwright install chromium")
        # root has no user namespace for Chromium's sandbox; the pages are the tests' own
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(browser, url, *, width=1200, height=900, scheme="light"):
    """A page; fails the test where the page logged an error, or asked for anything that is not on this host."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    try:
        page = context.new_page()
        errors, requests = [], []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        yield page
        assert not errors, errors
        local = ("file:", "data:", "blob:", "http://127.0.0.1", "ws://127.0.0.1")
        assert not [url for url in requests if not url.startswith(local)]
    finally:
        context.close()
