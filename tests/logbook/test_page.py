"""The page in a real browser: it draws, answers the mouse, prints, and asks the network for nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.logbook.model import Logbook
from orchestrator.logbook.render import write

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
_CHROMIUM = Path("/usr/bin/chromium")

pytestmark = [
    pytest.mark.training,
    pytest.mark.skipif(not _CHROMIUM.exists(), reason=f"{_CHROMIUM} is not installed"),
]

# How many pixels of a chart have a colour of their own: neither grey nor transparent.
_COLOURED = """canvas => {
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let found = 0;
  for (let i = 0; i < data.length; i += 4)
    found += data[i + 3] > 40 && Math.max(data[i], data[i+1], data[i+2]) - Math.min(data[i], data[i+1], data[i+2]) > 40;
  return found;
}"""


@pytest.fixture(scope="module", name="browser")
def _browser() -> Iterator[Any]:
    """The system's own chromium."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(_CHROMIUM))
        yield browser
        browser.close()


@pytest.fixture(scope="module", name="file")
def _file(book: Logbook, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the run that diverged."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    write(book, "html", path)
    return path


class _Seen:
    """A page with everything that it asked for and complained about."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-ready=true]", state="attached")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_it_opens_and_draws(browser: Any, file: Path, width: int, scheme: str) -> None:
    """No error, no request but the file itself, every visible canvas drawn, nothing wider than the screen."""
    seen = _Seen(browser, file, width, scheme)
    assert seen.complaints == []
    assert seen.requests == [file.as_uri()]
    canvases = seen.page.query_selector_all("[data-chart] canvas")
    assert len(canvases) >= 12
    blank = [canvas.evaluate("c => c.closest('[data-chart]').dataset.chart") for canvas in canvases
             if canvas.evaluate(_COLOURED) < 20]  # fmt: skip
    assert blank == []
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    seen.page.close()


def test_the_mouse_shows_values_zooms_and_hides(browser: Any, file: Path) -> None:
    """Values under the cursor; a drag zooms every chart of the run, a double click goes back; a click hides a line."""
    page = _Seen(browser, file).page
    chart = page.query_selector("#loss .u-over")
    box = chart.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.3, middle)
    shown = page.inner_text("#loss .u-legend")
    assert "attempt 1" in shown
    assert any(part.replace(".", "").isdigit() for part in shown.split())
    whole = _range(page)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, middle, steps=5)
    page.mouse.up()
    zoomed = _range(page)
    assert zoomed[0] > whole[0]
    assert zoomed[1] < whole[1]
    page.mouse.dblclick(box["x"] + box["width"] * 0.5, middle)
    assert _range(page) == whole
    before = page.query_selector("#loss canvas").evaluate(_COLOURED)
    page.click("#loss .u-legend tr:nth-child(2) th")
    page.wait_for_function(f"([old]) => ({_COLOURED})(document.querySelector('#loss canvas')) < old", arg=[before])
    page.close()


def _range(page: Any) -> list[float]:
    """What the charts of the loss and of the first signal show of the run."""
    found: list[float] = page.evaluate(
        "[...document.querySelectorAll('#loss [data-chart], #signals [data-chart]')].slice(0, 2)"
        ".flatMap(one => [one.dataset.from, one.dataset.to].map(Number))"
    )
    assert found[:2] == pytest.approx(found[2:])
    return found


def test_by_wall_time_every_attempt_is_there(browser: Any, file: Path) -> None:
    """The same curves along the clock: the rolled back branch comes before the one that replaced it."""
    page = _Seen(browser, file).page
    page.click("#loss button[data-axis=times_s]")
    assert page.get_attribute("#signals button[data-axis=times_s]", "aria-pressed") == "true"
    assert "time" in page.inner_text("#loss .u-legend")
    assert page.query_selector("#loss canvas").evaluate(_COLOURED) > 100
    page.close()


def test_it_prints(browser: Any, file: Path, tmp_path: Path) -> None:
    """As a PDF of several pages, with the black box open and every chart within the paper."""
    page = _Seen(browser, file, scheme="dark").page
    paper = tmp_path / "report.pdf"
    page.pdf(path=str(paper), print_background=True)
    assert paper.read_bytes().count(b"/Type /Page\n") >= 3
    assert page.evaluate("[...document.querySelectorAll('details.print')].every(one => one.open)")
    page.close()


def test_without_scripts_the_words_are_there(browser: Any, file: Path, book: Logbook) -> None:
    """Every incident can be read where no script may run."""
    page = browser.new_page(java_script_enabled=False)
    page.goto(file.as_uri())
    assert book.incidents[0].seen in page.inner_text("body")
    assert "charts need JavaScript" in page.inner_text("body")
    page.close()
