import os
import shutil

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("starlette")
pytest.importorskip("selenium")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from st_fpsloss import DocumentIndex
from tests.serving.conftest import corpus
from tests.serving.models import feature_model
from tests.serving.running import serving

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no chromium and chromedriver: apt-get install chromium chromium-driver"
)


@pytest.fixture
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,1100"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def test_a_person_fills_the_features_and_sees_the_documents(browser, feature_folder, tmp_path):
    model, documents = (
        feature_model(),
        [*corpus(), ("odd", "<img src=x onerror=document.title='hacked'> red", {"year": 1})],
    )
    index = DocumentIndex.build(model, documents, tmp_path / "index", columns=["year", "colour"])
    with serving("--query_encoder", feature_folder, "--index", tmp_path / "index", log=tmp_path / "log") as (_, port):
        browser.get(f"http://127.0.0.1:{port}/")
        wait = WebDriverWait(browser, 30)

        def fill(**values):
            for name, value in values.items():
                found = browser.find_element(By.CSS_SELECTOR, f"#{name}, [data-name='{name}']")
                found.clear()
                found.send_keys(value)

        def search():
            shown = browser.find_elements(By.CSS_SELECTOR, "#results li")
            browser.find_element(By.ID, "go").click()
            wait.until(lambda _: browser.find_element(By.ID, "go").is_enabled())
            wait.until(lambda _: not shown or browser.find_elements(By.CSS_SELECTOR, "#results li")[:1] != shown[:1])
            return [one.text for one in browser.find_elements(By.CSS_SELECTOR, "#results .text")]

        wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#features input"))
        fill(text="red shoes", user="u1", age="35", likes="a, b", seen="item 1, item 2")
        query = {"text": "red shoes", "user": "u1", "age": 35, "likes": ["a", "b"], "seen": ["item 1", "item 2"]}
        (expected,) = index.search(model, [query], 10)
        assert search() == [index.document(one) for one, _ in expected]
        scores = [one.text for one in browser.find_elements(By.CSS_SELECTOR, "#results .score span")]
        assert scores == [f"{score:.3f}" for _, score in expected]
        if folder := os.environ.get("SCREENSHOTS"):  # to look at the page
            browser.save_screenshot(os.path.join(folder, "page.png"))

        browser.find_element(By.TAG_NAME, "summary").click()
        wait.until(lambda _: browser.find_element(By.ID, "k").is_displayed())
        fill(k="3", exclude=f"{expected[0][0]}, d9999", year="1995..1999")
        allowed = [one for one, _ in index.search(model, [query], 301)[0] if 1995 <= index.fields(one)["year"] <= 1999]
        assert search() == [index.document(one) for one in allowed if one != expected[0][0]][:3]

        fill(exclude="", year="1")
        assert search() == [documents[-1][1]]
        assert browser.title == "Search"  # what a document holds is shown, not run
        fill(year="old")
        assert search() == []
        assert "year" in browser.find_element(By.CSS_SELECTOR, "#status.bad").text
        serious = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert all("400 (Bad Request)" in entry["message"] for entry in serious), serious
