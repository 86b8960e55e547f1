"""The report in a real browser: drawn, quiet, alone, and the keys move the samples."""

import numpy as np
import pytest
from helpers import chromium
from helpers.looked_at_runs import start, whole_run

from twinflow.report import write_report
from twinflow.train.config.run_folder import RunFolder
from twinflow.train.logging.metrics_file import append_records

pytestmark = pytest.mark.skipif(
    chromium.browser() is None, reason="no Chromium: apt-get install chromium, or set TWINFLOW_CHROMIUM"
)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    page = write_report(whole_run(folder / "run"), folder / "report.html")
    with chromium.Tab(page, folder / "profile") as tab:
        yield tab


def lines(tab, chart: str) -> list[int]:
    """How many points each curve has."""
    return tab.ask(f"""[...document.querySelectorAll('[data-chart="{chart}"] path.line')]
        .map(path => path.getAttribute('d').split('L').length)""")


def test_curves_are_drawn(tab):
    assert tab.ask("document.documentElement.dataset.drawn") == "yes"
    assert len(lines(tab, "loss")) == 4 and min(lines(tab, "loss")) == 60, "total and three terms, each of 60 steps"
    for chart in ("norm", "rate", "time"):
        assert lines(tab, chart) == [60], chart
    assert tab.ask("document.querySelectorAll('[data-chart=loss] path.point').length") == 6, "evaluations"
    assert tab.ask("document.querySelectorAll('[data-chart=loss] line.resume').length") == 1
    heights = tab.ask("""[...document.querySelectorAll('[data-chart=loss] path.line')]
        .map(path => path.getBBox().height)""")
    assert max(heights) > 20, "a curve is no flat line"


@pytest.mark.slow
def test_both_signs_are_in_the_scatter(tab):
    dots = [tab.ask(f"document.querySelectorAll('[data-sign=\"{sign}\"] circle').length") for sign in (1, -1)]
    assert min(dots) > 30 and sum(dots) == 240
    colours = tab.ask(
        "[...document.querySelectorAll('[data-sign] circle:first-child')].map(c => getComputedStyle(c).fill)"
    )
    assert len(set(colours)) == 2


@pytest.mark.slow
def test_arrow_keys_and_the_slider_change_the_step(tab):
    def seen():
        return tab.ask("""[document.querySelector('.slider output').textContent,
            document.querySelector('.set').dataset.step, document.querySelector('.slider input').value,
            document.querySelector('.set img').src]""")

    first = seen()
    assert first[:3] == ["Step 60 of 60EMA weights", "60", "2"] and first[3].startswith("data:image/webp;base64,")
    tab.press("ArrowLeft")
    second = seen()
    assert second[:3] == ["Step 40 of 60EMA weights", "40", "1"] and second[3] != first[3]
    tab.press("ArrowLeft"), tab.press("ArrowLeft")
    assert seen()[:2] == ["Step 20 of 60EMA weights", "20"], "it stops at the first"
    tab.ask("document.querySelector('.slider input').focus()")
    tab.press("ArrowRight")
    assert seen() == second, "the slider's own keys do the same, once"
    widths = tab.ask("""Promise.all([...document.querySelectorAll('.set img')]
        .map(image => image.decode().then(() => image.naturalWidth)))""")
    assert widths == [32] * 6, "two prompts, two step counts and the base model"


@pytest.mark.slow
def test_readouts_follow_the_pointer(tab):
    tab.ask("document.querySelector('[data-chart=loss]').scrollIntoView()")
    box = tab.ask("""(() => { const b = document.querySelector('[data-chart=loss] svg').getBoundingClientRect();
        return [b.left, b.top, b.width]; })()""")
    tab.move(box[0] + box[2] * 0.6, box[1] + 100)
    read = "document.querySelector('[data-chart=loss] .read')"
    text = tab.ask(f"{read}.hidden ? '' : {read}.textContent")
    assert text.startswith("Step 3") and "total" in text and "rcgm" in text
    at = tab.ask(f"{read}.getBoundingClientRect().left")
    assert at > box[0] + box[2] * 0.6, "it stands beside the pointer, not on it"
    tab.move(5, 5)
    assert tab.ask(f"{read}.hidden")


@pytest.mark.slow
def test_logarithms_and_changed_settings(tab):
    before = tab.ask("document.querySelector('[data-chart=loss] path.line').getAttribute('d')")
    tab.ask("document.querySelector('[data-scale] [data-kind=log]').click()")
    after = tab.ask("document.querySelector('[data-chart=loss] path.line').getAttribute('d')")
    assert after != before and "NaN" not in after and "Infinity" not in after
    visible = "[...document.querySelectorAll('.tables tr')].filter(row => row.offsetParent).length"
    every = tab.ask(visible)
    tab.ask("document.querySelector('[data-only] [data-kind=changed]').click()")
    assert 5 < tab.ask(visible) < every / 2


@pytest.mark.slow
def test_the_screenshot_is_a_page_in_light_and_in_dark(tab):
    tab.ask("scrollTo(0, 0)")
    for scheme, low, high in (("light", 200, 256), ("dark", 0, 60)):
        tab.prefer(scheme)
        pixels = np.asarray(tab.picture()).astype(int)
        assert low <= np.median(pixels) < high, scheme
        assert (abs(pixels - np.median(pixels)) > 60).any(-1).mean() > 0.02, f"{scheme}: blank"
        spread = pixels.max(-1) - pixels.min(-1)
        assert (spread > 80).mean() > 0.001, f"{scheme}: no colours"


def test_nothing_is_loaded_and_nothing_complains(tab):
    """Last of this tab: after all else was done."""
    asked = [
        event["params"]["request"]["url"] for event in tab.events if event.get("method") == "Network.requestWillBeSent"
    ]
    assert len([url for url in asked if url.startswith("file:")]) == 1
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    complaints = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
    bad = [event["params"] for event in tab.events if event.get("method") in complaints]
    assert not bad
    assert tab.ask("document.title") == "run · twinflow report", "the prompt's script has not run"
    assert tab.ask("document.querySelectorAll('script').length") == 2


@pytest.mark.slow
def test_a_script_that_is_not_the_pages_is_refused(tmp_path):
    """The page's own rule: whatever were to slip through an escape would not run."""
    page = write_report(whole_run(tmp_path / "run", 10), tmp_path / "report.html")
    page.write_text(page.read_text().replace("</main>", "<script>document.title='taken'</script></main>"))
    with chromium.Tab(page, tmp_path / "profile") as tab:
        assert tab.ask("document.title") == "run · twinflow report"
        assert [event for event in tab.events if event.get("method") == "Log.entryAdded"], "it is refused aloud"


@pytest.mark.slow
def test_a_run_that_has_just_begun(tmp_path):
    run = RunFolder(tmp_path / "run")
    append_records(run.metrics, [start(0)])
    with chromium.Tab(write_report(run), tmp_path / "profile") as tab:
        assert tab.ask("document.documentElement.dataset.drawn") == "yes"
        assert tab.ask("document.querySelectorAll('.empty').length") >= 5
        assert not [event for event in tab.events if event.get("method") == "Runtime.exceptionThrown"]
