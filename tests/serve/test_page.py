"""The page: its files, and every panel in a real browser (Debian's `chromium` and `chromium-driver`)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from fastapi.testclient import TestClient
from rovrm_cases import png, tiny_llava
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait
from serving_cases import judge, language_model, listening, translator

from eagleray.models.rovrm.scoring import VisualScorer
from eagleray.platform.keys import KeyChecker, add_key
from eagleray.serve import rovrm
from eagleray.serve.fleet import LocalFleet
from eagleray.serve.gateway import gateway_app
from eagleray.serve.page import FOLDER
from eagleray.serve.replica import Served


def test_the_page_is_served_without_a_key_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    add_key(tmp_path / "keys.json", "trainer", per_minute=2)
    with TestClient(gateway_app(LocalFleet([judge()]), keys=KeyChecker(tmp_path / "keys.json"))) as client:
        page = client.get("/")
        assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
        named = re.findall(r'(?:src|href)="(web/[^"]+)"', page.text)
        named += [
            f"web/{name}"
            for path in FOLDER.glob("*.js")
            for name in re.findall(r'"\./(.+\.js)"', path.read_text())
        ]
        assert len(set(named)) == len(list(FOLDER.iterdir())) - 1  # all but the page itself
        assert {client.get(f"/{name}").status_code for name in named} == {200}
        assert client.get("/v1/models").status_code == 401
    for path in FOLDER.iterdir():
        assert not re.search(r"https?://|innerHTML", path.read_text()), path


def _visual() -> Served:
    args = rovrm.Args(model="unused")
    model = rovrm.LoadedModel(VisualScorer(*tiny_llava()), "rovrm", "r")
    service = rovrm.RovrmService(model, args)
    return Served(
        "rovrm", "rovrm", "r", args, args.max_body_bytes, rovrm.rovrm_app(service, args), service.health
    )


class Page:
    """The page in a browser, as a person uses it."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, panel: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, f"nav a[href='#{panel}']").click()
        self.panel = self.driver.find_element(By.ID, panel)
        self.wait(self.panel.is_displayed)

    def fill(self, name: str, text: str) -> None:
        self.panel.find_element(By.NAME, name).send_keys(text)

    def fill_answers(self, *texts: str) -> None:
        for area, text in zip(
            self.panel.find_elements(By.CSS_SELECTOR, ".answer textarea"), texts, strict=True
        ):
            area.send_keys(text)

    def send(self) -> str:
        """Press the button and read the result."""
        button = self.panel.find_element(By.CSS_SELECTOR, "button:not([type=button])")
        self.wait(button.is_enabled)
        button.click()
        output = self.panel.find_element(By.TAG_NAME, "output")
        return self.wait(lambda: output.text)

    def wait(self, condition: Any) -> Any:
        # The page fills its tables anew, so an element may go between being found and being read.
        gone = [StaleElementReferenceException]
        return WebDriverWait(self.driver, 60, 0.05, ignored_exceptions=gone).until(lambda _: condition())


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("no browser: install Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1100,1000",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
    ):  # fmt: skip
        options.add_argument(argument)
    options.binary_location = str(shutil.which("chromium"))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    models = [judge("judge"), _visual(), translator(), language_model("student"), language_model("teacher")]
    with listening(gateway_app(LocalFleet(models))) as url:
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            driver.get(url)
            yield Page(driver)
            logged = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
            assert [entry for entry in logged if entry["source"] != "network"] == []  # a refusal counts there
        finally:
            driver.quit()


def test_the_models_that_are_up(page: Page) -> None:
    page.open("models")
    first_cells = "tbody tr > :first-child"
    names = page.wait(lambda: [cell.text for cell in page.panel.find_elements(By.CSS_SELECTOR, first_cells)])
    assert names == ["judge", "rovrm", "nast", "student", "teacher"]


def test_compare(page: Page) -> None:
    page.open("compare")
    for name, text in {"prompt": "Name a river in Peru.", "a": "The Ucayali.", "b": "<b>Nile</b>"}.items():
        page.fill(name, text)
    result = page.send()
    assert "Answer A is better." in result and "B read first" in result


def test_rank(page: Page) -> None:
    page.open("rank")
    page.fill("prompt", "Name a river in Peru.")
    page.panel.find_element(By.XPATH, ".//button[text()='Another answer']").click()
    page.fill_answers("Nile", "<i>The Ucayali, surely.</i>", "Amazon river")
    lines = page.send().splitlines()
    assert lines[1].startswith("1 Answer 2 <i>The Ucayali") and lines[3].startswith("3 Answer 1")
    assert "3 comparisons." in lines[-1]


def test_picture(page: Page, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(png((32, 32)))
    page.open("picture")
    page.fill("image", str(tmp_path / "red.png"))
    page.fill("prompt", "Which colour?")
    page.fill_answers("Red.", "Blue.")
    assert {line.split()[0] for line in page.send().splitlines()[1:3]} == {"Red.", "Blue."}
    preview = page.panel.find_element(By.TAG_NAME, "img")
    assert page.wait(lambda: preview.get_property("naturalWidth")) == 32


def test_speech(page: Page, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "one.wav", np.zeros(8000), 8000)
    page.open("speech")
    page.fill("audio", str(tmp_path / "one.wav"))
    result = page.send()
    assert result.startswith("T100") and "0:00.0 – 0:01.0 S100 T100" in result


def test_chat_with_two_models(page: Page) -> None:
    page.open("chat")
    select = [Select(page.panel.find_element(By.NAME, name)) for name in ("model", "other")]
    assert [one.first_selected_option.text for one in select] == ["student", "teacher"]
    page.fill("message", "Name a river.")
    page.panel.find_element(By.NAME, "max_tokens").clear()
    page.fill("max_tokens", "8")
    page.panel.find_element(By.XPATH, ".//button[text()='Send']").click()
    for log in page.panel.find_elements(By.CSS_SELECTOR, ".talk"):
        page.wait(lambda log=log: "tokens/s" in log.text)
        assert log.text.startswith("Name a river.") and not log.find_elements(By.CSS_SELECTOR, ".error")


def test_a_refusal_is_shown_in_words(page: Page) -> None:
    page.open("chat")
    page.panel.find_element(By.NAME, "clear").click()
    page.panel.find_element(By.NAME, "max_tokens").clear()
    page.fill("max_tokens", "5000")
    page.fill("message", "Hi")
    page.panel.find_element(By.XPATH, ".//button[text()='Send']").click()
    log = page.panel.find_element(By.CSS_SELECTOR, ".talk")
    assert "this server allows 24" in page.wait(lambda: log.text if "allows" in log.text else "")
