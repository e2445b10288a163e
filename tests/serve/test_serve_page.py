"""The chat page in a real browser: clicked, typed into, reloaded, and after a restart."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rxlm.rxt.models import RxTAlpha

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright (a dev dependency)"
)
if CHROMIUM is None:
    pytest.skip("needs Chromium on PATH", allow_module_level=True)

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
SECONDS = 120
SHORT = {"max_new_tokens": 12}


class Browser:
    """One page, and all that it complained about or asked others for."""

    def __init__(self, context: Any) -> None:
        self.context, self.page = context, context.pages[0]
        self.complaints: list[str] = []
        self.outside: list[str] = []
        self.port = 0
        self.page.set_default_timeout(1000 * SECONDS)
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._asked)

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((f"http://127.0.0.1:{self.port}/", "blob:", "data:")):
            self.outside.append(request.url)

    @contextlib.contextmanager
    def visiting(self, running: contextlib.AbstractContextManager[Any]) -> Iterator[Any]:
        """Run a server inside the block, and leave its page before the server ends.

        An answer is followed by requests for the memory and the names of the conversations: a
        page that outlives its server may complain that they were refused.
        """
        with running as server:
            yield server
            self.page.goto("about:blank")

    def open(self, port: int, path: str = "/") -> Any:
        """Open the page of a server; return it."""
        self.port = port
        self.page.goto(f"http://127.0.0.1:{port}{path}")
        self.page.wait_for_selector("#sessions li")
        return self.page

    def until(self, expression: str) -> None:
        """Wait until an expression is true; the page's policy forbids to evaluate it there."""
        end = time.monotonic() + SECONDS
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(30)

    def say(self, text: str) -> None:
        """Type a message, send it, and wait for the end of the answer."""
        turns = self.page.locator(".turn").count()
        self.page.fill("#query", text)
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector(f".turn:nth-of-type({turns + 1}) .facts")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A browser with a profile of its own; its complaints fail the test."""
    with playwright.sync_playwright() as engine:
        context = engine.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=CHROMIUM,
            args=ARGUMENTS,
            viewport={"width": 1280, "height": 800},
        )
        made = Browser(context)
        yield made
        context.close()
    assert made.complaints == []
    assert made.outside == []


def texts(page: Any, selector: str) -> list[str]:
    """Return what elements say."""
    shown = page.locator(selector).all_inner_texts()
    # What only a screen reader is told.
    return [re.sub(r"\s+", " ", text).strip().removeprefix("You: ") for text in shown]


def test_a_conversation_outlives_the_page_and_the_server(
    browser: Browser, tiny: RxTAlpha, run_server: Any, tmp_path: Path
) -> None:
    """Catches a page that shows what the server does not keep, or the other way round."""
    with browser.visiting(run_server(tiny, tmp_path / "store", SHORT)) as server:
        page = browser.open(server.port)
        assert "None yet" in texts(page, "#sessions")[0]
        browser.say("My name is Ann.")
        browser.say("What is my name?")
        assert texts(page, "#sessions .name") == ["My name is Ann."]
        assert texts(page, ".said p") == ["My name is Ann.", "What is my name?"]
        answers = texts(page, ".answer")
        assert "changed the memory by" in page.inner_text("#memory-text")
        assert "Heat map of 2 layers times 4 slots" in page.get_attribute("#heat", "aria-label")
        assert (
            texts(page, "#memory-rows tr td:first-child") or page.locator("#memory-rows tr").count()
        )
        address = page.url
        page.reload()
        page.wait_for_selector(".turn")
        assert texts(page, ".answer") == answers
    with browser.visiting(run_server(tiny, tmp_path / "store", SHORT)) as server:
        page = browser.open(server.port, "/#" + address.partition("#")[2])
        page.wait_for_selector(".turn")
        assert texts(page, ".answer") == answers
        browser.say("And now?")
        assert texts(page, ".said p")[-1] == "And now?"


def test_undo_retry_fork_rename_and_delete(
    browser: Browser, tiny: RxTAlpha, run_server: Any
) -> None:
    """Catches buttons that do something else than they say."""
    with browser.visiting(run_server(tiny, None, SHORT)) as server:
        page = browser.open(server.port)
        page.click("#new")
        page.fill("#new-name", "First")
        page.fill("#new-system", "Be kind.")
        page.click("#new-dialog button[value=yes]")
        page.wait_for_selector("#system:not([hidden])")
        for text in ("one", "two", "three"):
            browser.say(text)
        page.click("text=Undo")
        browser.until("document.querySelectorAll('.turn').length === 2")
        assert page.input_value("#query") == "three"
        page.fill("#query", "")
        before = texts(page, ".answer")
        with page.expect_response(lambda answer: answer.url.endswith("/turns")):
            page.click("text=Retry")
        page.wait_for_selector("#send", state="visible")
        page.wait_for_selector(".turn:nth-of-type(2) .facts")
        assert texts(page, ".said p") == ["one", "two"]
        assert texts(page, ".answer")[0] == before[0]
        page.hover(".turn:first-of-type")
        page.click("text=Fork from here")
        browser.until("document.querySelector('#title').textContent === 'First (fork)'")
        assert texts(page, ".said p") == ["one"]
        page.click("#rename")
        page.fill("#rename-name", "Second")
        page.keyboard.press("Enter")
        browser.until("document.querySelector('#title').textContent === 'Second'")
        browser.until(
            "document.querySelector('#sessions [aria-current] .name').textContent === 'Second'"
        )
        assert sorted(texts(page, "#sessions .name")) == ["First", "Second"]
        page.click("#delete")
        page.keyboard.press("Escape")
        assert page.locator("#sessions .name").count() == 2
        page.click("#delete")
        page.click("#delete-dialog button[value=yes]")
        browser.until("document.querySelectorAll('#sessions .name').length === 1")
        assert page.inner_text("#title") == "New conversation"
        with page.expect_download() as download:
            page.click("#sessions button")
            page.wait_for_selector(".turn")
            page.click("#export")
        assert download.value.suggested_filename.endswith(".zip")


def test_it_can_be_used_with_the_keyboard_alone(
    browser: Browser, slow_tiny: RxTAlpha, run_server: Any
) -> None:
    """Catches what can only be clicked, and Esc that does not stop the answer."""
    with browser.visiting(run_server(slow_tiny, None)) as server:
        page = browser.open(server.port)
        order = ["query", "send"]
        for name in ("skip", "new", "options", "theme", "memory-toggle", *order):
            assert page.evaluate(f"document.querySelector('#{name}').tabIndex") == 0
        assert page.evaluate("document.activeElement.id") == "query"
        page.focus("#skip")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "new"
        page.focus("#skip")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "query"
        page.keyboard.type("two")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("lines")
        assert page.input_value("#query") == "two\nlines"
        page.keyboard.press("Enter")
        browser.until("document.querySelector('.answer')?.textContent.length > 2")
        assert page.get_attribute(".answer", "aria-busy") == "true"
        page.keyboard.press("Escape")
        page.wait_for_selector(".facts")
        assert "stopped" in page.inner_text(".facts")
        assert page.get_attribute(".answer", "aria-busy") is None
        unnamed = page.evaluate(
            """[...document.querySelectorAll('button, input, textarea, a, canvas, summary')]
            .filter((e) => e.checkVisibility() && !(e.textContent.trim() || e.ariaLabel
              || e.labels?.length || e.getAttribute('aria-hidden') === 'true'
              || e.closest('[aria-hidden=true]'))).map((e) => e.outerHTML)"""
        )
        assert unnamed == [], "a screen reader cannot tell what these are"


def test_themes_narrow_windows_and_errors(
    browser: Browser, tiny: RxTAlpha, run_server: Any
) -> None:
    """Catches dark text on a dark page, a page wider than a phone, and an error nobody sees."""
    with run_server(tiny, None, SHORT) as server:
        page = browser.open(server.port)
        shade = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0]"
        page.emulate_media(color_scheme="dark")
        assert int(page.evaluate(shade)) < 60
        page.click("#theme")  # From the system's to light.
        assert int(page.evaluate(shade)) > 200
        page.click("#theme")
        page.emulate_media(color_scheme="light")
        assert int(page.evaluate(shade)) < 60
        page.reload()
        assert int(page.evaluate(shade)) < 60, "the choice is kept"
        page.set_viewport_size({"width": 360, "height": 640})
        browser.say("Hi")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert not page.is_visible("#new") and not page.is_visible("#memory")
        page.click("#menu")
        page.wait_for_selector("#new", state="visible")
        page.keyboard.press("Escape")
        page.wait_for_selector("#new", state="hidden")
        page.click("#memory-toggle")
        assert page.is_visible("#memory-text")
        page.keyboard.press("Escape")
        page.fill("#query", "long " * 2000)
        page.keyboard.press("Enter")
        page.wait_for_selector("#problem", state="visible")
        assert "tokens" in page.inner_text("#problem-text")
        assert page.input_value("#query").startswith("long long"), "what was typed is lost"
        page.fill("#query", "")
        page.click("#problem-close")
        # The browser itself reports failed requests.
        browser.complaints = [text for text in browser.complaints if "status of 400" not in text]
    page.fill("#query", "Is anybody there?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#problem", state="visible")
    assert "cannot be reached" in page.inner_text("#problem-text")
    assert page.is_visible("#problem-retry")
    page.goto("about:blank")  # No request is left that could be refused later.
    browser.complaints = [text for text in browser.complaints if "net::ERR_" not in text]


def test_answers_cannot_run_anything_and_the_key_is_asked_for(
    browser: Browser, tiny: RxTAlpha, run_server: Any
) -> None:
    """Catches a model's answer that is taken for HTML, and a page that knows no key."""
    with browser.visiting(run_server(tiny, None, SHORT, api_key="right")) as server:
        browser.port = server.port
        page = browser.page
        page.goto(f"http://127.0.0.1:{server.port}/")
        for key in ("wrong", "right"):
            page.wait_for_selector("#key-dialog[open]")
            page.fill("#key", key)
            page.keyboard.press("Enter")
        page.wait_for_selector("#sessions li")
        shown = page.evaluate(
            """() => {
              const box = document.createElement('div');
              box.append(markdown.render(
                '# T\\n\\n<img src=x onerror=alert(1)> **b** `c` [l](javascript:1)'
                + '\\n\\n- a\\n- b\\n\\n3. x\\n\\n```\\n<b>\\n```'));
              return box.innerHTML;
            }"""
        )
        assert shown == (
            "<h3>T</h3><p>&lt;img src=x onerror=alert(1)&gt; <strong>b</strong> <code>c</code> "
            '[l](javascript:1)</p><ul><li>a</li><li>b</li></ul><ol start="3"><li>x</li></ol>'
            "<pre><code>&lt;b&gt;</code></pre>"
        )
        browser.complaints = [text for text in browser.complaints if "status of 401" not in text]
