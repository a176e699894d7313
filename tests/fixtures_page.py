"""A plugin of the page's tests: the stand-in for the server, and a browser that visits it."""

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from helpers_page import FakeServer, Open

ARGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-sync", "--disable-background-networking", "--disable-component-update"),
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser a module; it must not outlive it, for playwright's event loop runs meanwhile."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def fake(running: FakeServer) -> FakeServer:
    running.reset()
    return running


@pytest.fixture
def visit(chromium: Any, fake: FakeServer) -> Iterator[Open]:
    """`visit(**of the context)`; `allow` are patterns of console errors that the test is about."""
    contexts, wrong = [], []

    def visit(allow: str = "(?!)", url: str = fake.url, **options: Any) -> Any:
        context = chromium.new_context(**options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()

        def logged(message: Any) -> None:
            if message.type in ("error", "warning") and not re.search(allow, message.text):
                wrong.append(message.text)

        def asked(request: Any) -> None:
            if not request.url.startswith((url, "data:", "blob:")):
                wrong.append(f"asked for {request.url}")

        page.on("console", logged)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", asked)
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not wrong
