"""The app as a visitor uses it, in headless Chromium: `make test-app`, which asks for chromium and chromium-driver.

Screenshots of every step lie in the folder APP_SCREENSHOTS, if it is given.
"""

import contextlib
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

from modeling_lavit import LavitPipeline
from modeling_lavit.checkpoints import LAVIT_EMOJI


pytestmark = pytest.mark.skipif(not os.environ.get("LAVIT_TEST_APP"), reason="needs Chromium: make test-app")
IMAGES = Path(__file__).resolve().parent.parent / "fixtures/emoji/images/noto"
CAT, CUP = str(IMAGES / "cat-face.png"), str(IMAGES / "cup-with-straw.png")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,1100",
)


@pytest.fixture(scope="module")
def url():
    from modeling_lavit.app_lavit import build_app

    app = build_app(LavitPipeline.from_pretrained(LAVIT_EMOJI, dtype=torch.float32))
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield url
    app.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


class Visitor:
    """Clicks, types, uploads and looks, on one tab of the app."""

    def __init__(self, browser, url: str, tab: str):
        self.browser, self.tab = browser, tab
        browser.get(url)
        self.click("button[role=tab]", tab)
        time.sleep(0.5)

    def find_all(self, selector: str) -> list:
        """What is visible of a CSS selector."""
        return [one for one in self.browser.find_elements("css selector", selector) if one.is_displayed()]

    def wait_for(self, condition, seconds: float = 30):
        """What `condition` returns once it is true."""
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            # the page may draw again what is looked at
            with contextlib.suppress(StaleElementReferenceException):
                if found := condition():
                    return found
            time.sleep(0.1)
        raise AssertionError(f"it did not happen: {self.look('failed')}")

    def look(self, name: str) -> str:
        """Takes a screenshot, if they are wanted."""
        path = os.path.join(os.environ.get("APP_SCREENSHOTS", ""), f"{self.tab}-{name}.png".replace(" ", "-").lower())
        if "APP_SCREENSHOTS" in os.environ:
            time.sleep(0.7)
            self.browser.save_screenshot(path)
        return path

    def click(self, selector: str, text: str) -> None:
        """Clicks what is visible of a CSS selector and has this text, once it is there."""

        def clicked() -> bool:
            found = [one for one in self.find_all(selector) if one.text == text]
            for one in found[:1]:
                one.click()
            return bool(found)

        self.wait_for(clicked)

    def press(self, label: str) -> None:
        self.click("[role=tabpanel] button", label)

    def field(self, label: str):
        return next(
            one.find_element("css selector", "textarea, input")
            for one in self.find_all("label")
            if one.text.split("\n")[0].strip() == label
        )

    def type(self, label: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        field = self.field(label)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE)
        field.send_keys(text)

    def upload(self, *paths: str) -> None:
        """Gives files to the tab's first field for them, which browsers hide."""
        inputs = self.browser.find_elements("css selector", "[role=tabpanel] input[type=file]")
        shown = [one for one in inputs if one.find_element("xpath", "ancestor::*[@role='tabpanel']").is_displayed()]
        shown[0].send_keys("\n".join(paths))

    def images(self) -> list:
        """The images of the tab that have loaded."""
        script = "return arguments[0].complete && arguments[0].naturalWidth > 0"
        return [one for one in self.find_all("[role=tabpanel] img") if self.browser.execute_script(script, one)]

    def complaint(self) -> str:
        """The text of the message that pops up."""
        return " ".join(one.text for one in self.find_all(".toast-body"))


@pytest.fixture
def visit(browser, url):
    return lambda tab: Visitor(browser, url, tab)


def test_a_visitor_draws_images_and_the_same_again_with_the_same_seed(visit):
    visitor = visit("Draw")
    visitor.type("Prompt", "sunflower in noto style")
    visitor.press("Draw")
    visitor.wait_for(lambda: len(visitor.images()) == 4)
    visitor.look("done")
    sources = [one.get_attribute("src") for one in visitor.images()]
    visitor.press("Draw")
    visitor.wait_for(lambda: len(visitor.images()) == 4 and not visitor.find_all(".progress-text"))
    assert [Path(one.get_attribute("src")).name for one in visitor.images()] == [Path(one).name for one in sources]


def test_a_visitor_restyles_several_images(visit):
    visitor = visit("Restyle")
    visitor.upload(CAT, CUP)
    visitor.wait_for(lambda: len(visitor.images()) == 2)
    visitor.type("Text", "in flat style")
    visitor.press("Restyle")
    visitor.wait_for(lambda: len(visitor.images()) == 6)
    visitor.look("done")


def test_a_visitor_reads_images_and_asks_about_one(visit):
    visitor = visit("Read")
    visitor.upload(CAT, CUP)
    visitor.wait_for(lambda: len(visitor.images()) == 2)
    visitor.press("Read")
    captions = visitor.wait_for(lambda: visitor.field("Answer").get_attribute("value")).split("\n")
    assert len(captions) == 2 and all(captions)
    visitor.type("Question", "which style is this?")
    visitor.press("Read")
    visitor.wait_for(lambda: visitor.field("Answer").get_attribute("value") not in ("", "\n".join(captions)))
    visitor.look("done")


def test_a_visitor_sees_the_tokens_of_an_image(visit):
    visitor = visit("Visual tokens")
    visitor.upload(CAT)
    visitor.wait_for(lambda: len(visitor.images()) == 1)
    visitor.press("Tokenize")
    visitor.wait_for(lambda: len(visitor.images()) == 3)
    visitor.look("done")
    assert re.match(r"\d+ of \d+ patches kept: \[", visitor.field("Codes").get_attribute("value"))


def test_a_visitor_chats_in_several_turns(visit):
    from selenium.webdriver.common.keys import Keys

    visitor = visit("Chat")

    def say(text: str) -> None:
        box = visitor.find_all("[role=tabpanel] textarea")[0]
        box.send_keys(text)
        time.sleep(0.3)
        box.send_keys(Keys.ENTER)

    def answers() -> list[str]:
        return [one.text for one in visitor.find_all(".message.bot")]

    visitor.upload(CAT)
    visitor.wait_for(lambda: visitor.find_all(".thumbnail-item, .thumbnail-wrapper img"))
    say("what is it?")
    visitor.wait_for(lambda: answers() and answers()[-1].strip())
    visitor.click("label", "an image")
    say("in flat style")
    visitor.wait_for(lambda: visitor.find_all(".message.bot img"))
    visitor.click("label", "text")
    say("which style is this?")
    visitor.wait_for(lambda: len(answers()) == 3 and answers()[-1].strip())
    visitor.look("done")
    assert not visitor.complaint()


def test_what_is_wrong_is_a_message(visit, tmp_path):
    visitor = visit("Draw")
    visitor.type("Prompt", " ")
    visitor.press("Draw")
    visitor.wait_for(lambda: "write what to draw" in visitor.complaint())
    visitor.look("complaint")
    visitor = visit("Visual tokens")
    visitor.press("Tokenize")
    visitor.wait_for(lambda: "give an image" in visitor.complaint())
    visitor = visit("Read")
    visitor.press("Read")
    visitor.wait_for(lambda: "give an image" in visitor.complaint())
    visitor = visit("Draw")
    visitor.type("Prompt", "word " * 600)
    visitor.press("Draw")
    visitor.wait_for(lambda: "shorten" in visitor.complaint())
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    visitor = visit("Visual tokens")
    visitor.upload(str(broken))
    visitor.press("Tokenize")
    visitor.wait_for(visitor.complaint)
    visitor.look("broken-image")
