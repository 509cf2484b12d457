"""A report in a real browser: Debian's packages chromium and chromium-driver, without which these tests are skipped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reports import save_everything
from train.report.write import write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with its driver")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    config = save_everything(folder)
    write_report(config)
    return config.out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # In containers there is neither a sandbox for it nor much shared memory.
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900")
    for flag in flags:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    return reopen(browser, page)


def reopen(browser: Any, page: Path, *, width: int = 1280, scheme: str = "light") -> Any:
    """Open a page afresh, of some width, for someone who prefers light or dark."""
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme_feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme_feature]})
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.as_uri())
    return browser


def network(browser: Any, event: str) -> list[dict[str, Any]]:
    """What the browser's network log says of events of a kind since it was last asked."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [message["params"] for message in messages if message["method"] == f"Network.{event}"]


def requests_of(browser: Any) -> list[str]:
    """Addresses that were asked for since the page was opened."""
    return [request["request"]["url"] for request in network(browser, "requestWillBeSent")]


def test_the_page_opens_in_silence_and_asks_for_nothing(opened: Any, page: Path) -> None:
    assert opened.execute_script("return document.readyState") == "complete"
    assert opened.execute_script("return document.compatMode") == "CSS1Compat"
    assert opened.get_log("browser") == []
    assert requests_of(opened) == [page.as_uri()]
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_a_page_that_asks_for_something_is_seen(browser: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.html"
    other.write_text("<!DOCTYPE html><img src='missing.png'><script>console.error('x')</script>")
    reopen(browser, other)
    assert (tmp_path / "missing.png").as_uri() in requests_of(browser)
    assert browser.get_log("browser")


def test_the_policy_refuses_requests_scripts_and_handlers(opened: Any) -> None:
    refused = opened.execute_async_script(
        """
        const done = arguments[0], seen = [];
        document.addEventListener("securitypolicyviolation", (event) => {
          seen.push(event.effectiveDirective);
          if (seen.length === 3) done(seen);
        });
        const holder = document.createElement("div");
        holder.innerHTML = "<img src='file:///missing.png'><p onclick='window.hacked=5'>x</p>";
        document.body.append(holder);
        holder.querySelector("p").click();
        const script = document.createElement("script");
        script.textContent = "window.hacked = 6";
        document.body.append(script);
        setTimeout(() => done(seen), 3000);
        """
    )
    assert sorted(refused) == ["img-src", "script-src-attr", "script-src-elem"]
    assert opened.execute_script("return window.hacked") is None
    assert [failed.get("blockedReason") for failed in network(opened, "loadingFailed")] == ["csp"]


def test_hostile_text_does_nothing(opened: Any) -> None:
    opened.execute_script(
        "for (const kind of ['mouseover', 'click', 'focus'])"
        " for (const e of document.querySelectorAll('td, th, bdi, svg text'))"
        "  e.dispatchEvent(new Event(kind, {bubbles: true}));"
    )
    assert opened.execute_script("return window.hacked") is None
    assert opened.execute_script("return document.scripts.length") == 1
    assert opened.execute_script("return document.images.length") == 0
    assert "<script>window.hacked=1</script>" in opened.execute_script("return document.body.innerText")


def test_plots_are_there_with_names_and_sizes(opened: Any) -> None:
    opened.execute_script("for (const details of document.querySelectorAll('details')) details.open = true")
    plots = opened.find_elements("css selector", "svg.plot")
    assert len(plots) > 15
    boxes = opened.execute_script(
        "return [...document.querySelectorAll('svg.plot')].map((svg) => {"
        " const box = svg.getBoundingClientRect(), shapes = svg.querySelectorAll('path, use').length;"
        " const words = [...svg.querySelectorAll('text')].filter((t) => t.getBoundingClientRect().height > 4).length;"
        " return [box.width, box.height, shapes, words]; })"
    )
    assert all(width > 200 and height > 50 and shapes > 3 and words > 4 for width, height, shapes, words in boxes)
    assert all(plot.accessible_name for plot in plots[:3])
    assert plots[0].accessible_name.startswith("Bytes by array")


def test_tables_are_sorted_by_their_headings(opened: Any) -> None:
    table = next(t for t in opened.find_elements("css selector", "table") if "Bytes by array" in t.text)
    heading = next(h for h in table.find_elements("css selector", "thead th") if h.text.startswith("size"))
    column = "return [...arguments[0].tBodies[0].rows].map((row) => Number(row.cells[2].dataset.number))"
    before = opened.execute_script(column, table)
    heading.find_element("css selector", "button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    rising = opened.execute_script(column, table)
    assert rising == sorted(before) != before
    heading.find_element("css selector", "button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert opened.execute_script(column, table) == rising[::-1]
    names = "return [...arguments[0].tBodies[0].rows].map((row) => row.cells[0].textContent)"
    table.find_element("css selector", "thead th button").click()
    found = opened.execute_script(names, table)
    assert found == sorted(found)


COLOURS = (
    "const of = (e, name) => getComputedStyle(document.querySelector(e))[name];"
    " return [of('body', 'backgroundColor'), of('body', 'color'), of('svg.plot text', 'fill')]"
)


def test_light_and_dark_follow_the_reader_and_the_switch(browser: Any, page: Path) -> None:
    light = reopen(browser, page, scheme="light").execute_script(COLOURS)
    dark = reopen(browser, page, scheme="dark").execute_script(COLOURS)
    assert all(a != b for a, b in zip(light, dark, strict=True))
    assert light[0] == "rgb(255, 255, 255)"
    for name, colours in (("light", light), ("dark", dark), ("auto", dark)):
        browser.find_element("css selector", f"button[data-theme={name}]").click()
        assert browser.execute_script(COLOURS) == colours
    browser.find_element("css selector", "button[data-theme=light]").click()
    browser.refresh()
    assert browser.execute_script(COLOURS) == light
    browser.execute_script("localStorage.clear()")


def test_a_phone_scrolls_no_page_sideways(browser: Any, page: Path) -> None:
    reopen(browser, page, width=375)
    browser.execute_script("for (const details of document.querySelectorAll('details')) details.open = true")
    assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [375, 375]
    wider = "return [...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth).length"
    assert browser.execute_script(wider) > 0
