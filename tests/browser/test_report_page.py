"""The report in a real Chromium: charts, slider, table, hostile names, narrow windows, dark, paper; no request to anyone."""

import base64
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from fake_experiment import change_summary, find_summaries, write_experiment
from headless import CHROMIUM, Browser

from harness.runs import load_plan
from model.ladder import format_count
from results.laws import Chinchilla
from results.page import fit_frontiers
from results.plot import draw_pictures, write_pictures
from results.report import Evidence, write_report
from results.study import Study, describe_study, fit_study
from results.table import Cost, load_cells, load_curves, write_table

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine (apt-get install chromium)")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
COST = Cost(1.0, None, 0, 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    experiment_dir = write_experiment(tmp_path_factory.mktemp("page"), data_dir)
    change_summary(find_summaries(experiment_dir)[3], skipped_steps=1)
    return experiment_dir


@pytest.fixture(scope="module")
def study(finished: Path) -> Study:
    return fit_study("fake", load_cells(finished))


@pytest.fixture(scope="module")
def page(finished: Path, study: Study) -> Path:
    results_dir = finished / "results"
    write_table(study.cells, results_dir)
    pictures = draw_pictures(study, load_curves(finished))
    write_pictures(pictures, results_dir / "figures")
    evidence = Evidence(load_plan(finished), COST, pictures, fit_frontiers(study))
    return write_report(study, evidence, results_dir)[0]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def count(browser: Browser, selector: str) -> int:
    return int(browser.read(f"document.querySelectorAll({selector!r}).length"))


def test_the_page_draws_and_neither_complains_nor_asks(browser: Browser, page: Path) -> None:
    browser.open(page)
    for view, n_lines in (("params", 4), ("tokens", 5), ("flops", 1), ("optimum", 1)):
        browser.choose("view", view)
        assert count(browser, "#chart .law") == n_lines
        assert count(browser, "#chart .cell") == (0 if view == "optimum" else 22)
        assert count(browser, "#chart .stop") == (view in ("flops", "optimum"))
    assert browser.complaints() == []


def test_a_page_that_breaks_its_own_policy_is_caught(browser: Browser, page: Path) -> None:
    """The check itself is checked: a request, an error and a script that the policy does not know are complained of."""
    spoiled = page.with_name("spoiled.html")
    planted = '<img src="https://example.invalid/x.png"><script>alert(1)</script></body>'
    spoiled.write_text(page.read_text().replace("</body>", planted))
    browser.open(spoiled)
    assert len(browser.complaints()) >= 2


def test_marks_name_their_cells(browser: Browser, page: Path, study: Study) -> None:
    browser.open(page)
    browser.read("document.querySelector('#chart .cell').dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))")
    assert study.cells["cell_id"][0] in browser.read("document.getElementById('hovered').textContent")


def test_toggles_change_what_is_drawn(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert count(browser, "#chart .out") == 1
    browser.choose("show-out", False)
    assert count(browser, "#chart .cell") == 21
    browser.choose("show-law", False)
    assert count(browser, "#chart .law") == 0
    browser.choose("show-law", True)
    before = browser.read("document.querySelector('#chart .cell').getAttribute('cx')")
    browser.choose("convention", "non_embedding")
    assert browser.read("document.querySelector('#chart .cell').getAttribute('cx')") != before


@pytest.mark.parametrize("stop", [0, 11, 24])
def test_the_slider_agrees_with_fit_json(browser: Browser, page: Path, study: Study, stop: int) -> None:
    fit = describe_study(study)["fit"]
    browser.open(page)
    browser.choose("compute", stop)
    flops = fit["optimum"]["flops"] * 10 ** (-1 + 4 * stop / 24)
    best = Chinchilla(**fit["law"]).allocate(flops)
    said = {part: browser.read(f"document.getElementById('stop-{part}').textContent") for part in ("flops", "n", "d", "loss")}
    assert said["flops"] == f"{flops:.2e} FLOPs"
    assert said["n"].startswith(f"{format_count(best.n_params)} (")
    assert said["d"].startswith(f"{format_count(best.tokens)} (")
    assert said["loss"].startswith(f"{best.loss:.4f} (")


def test_the_table_sorts_filters_and_downloads(browser: Browser, page: Path, study: Study) -> None:
    browser.open(page)
    column = "[...document.querySelectorAll('#cells-table tbody tr')].map(row => Number(row.cells[3].dataset.v))"
    press = "document.querySelectorAll('#cells-table thead button')[3].click()"
    browser.read(press)
    rising = browser.read(column)
    assert rising == sorted(rising)
    assert browser.read("document.querySelectorAll('#cells-table th')[3].getAttribute('aria-sort')") == "ascending"
    browser.read(press)
    assert browser.read(column) == rising[::-1]
    browser.choose("filter", "l1-h2-d16- 102k-")
    assert browser.read("document.getElementById('rows-shown').textContent") == "1 of 22 cells"
    assert browser.read("[...document.querySelectorAll('#cells-table tbody tr')].filter(row => !row.hidden).length") == 1
    address = browser.read("document.querySelector('a[download]').href")
    assert base64.b64decode(address.split(",")[1]) == (page.parent / "table.csv").read_bytes()


def test_ten_thousand_hostile_cells_open_sort_and_filter_in_time(
    browser: Browser, finished: Path, study: Study, tmp_path: Path
) -> None:
    rows = pd.concat([study.cells] * 455, ignore_index=True).head(10_000)
    rows["cell_id"] = [f"{cell_id}-{i}" for i, cell_id in enumerate(rows["cell_id"])]
    rows["excluded"], rows["exclusion_reason"] = True, HOSTILE
    many = replace(study, name=HOSTILE, cells=rows)
    write_table(rows, tmp_path)
    page, _ = write_report(many, Evidence(load_plan(finished), COST, []), tmp_path)
    took = {"open": browser.open(page)}
    assert HOSTILE in browser.read("document.querySelector('h1').textContent")
    assert HOSTILE in browser.read("document.querySelector('#cells-table .reason').textContent")
    assert count(browser, "script") == 2
    assert browser.complaints() == []
    timed = "(() => {{ const start = performance.now(); {}; document.body.offsetHeight; return performance.now() - start; }})()"
    took["sort"] = browser.read(timed.format("document.querySelectorAll('#cells-table thead button')[3].click()")) / 1e3
    typing = "const node = document.getElementById('filter'); node.value = 'd8- 77'; node.dispatchEvent(new Event('input'))"
    took["filter"] = browser.read(timed.format(typing)) / 1e3
    print(took)
    assert all(seconds < 6 for seconds in took.values()), took  # 2 s on an idle machine; this one may be busy


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 500, 1100])
def test_no_window_is_too_narrow(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.resize(width, 900, dark=dark)
    browser.open(page)
    assert browser.read("document.documentElement.scrollWidth") <= width
    paper, ink = (browser.read(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    assert measure_contrast(paper, ink) > 7


def measure_contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as WCAG 2 defines it."""

    def luminance(color: str) -> float:
        channels = [int(part) / 255 for part in color[4:-1].split(",")]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_it_prints_and_has_one_order_of_headings(browser: Browser, page: Path) -> None:
    browser.open(page)
    pdf = base64.b64decode(browser.call("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF")
    levels = [int(level) for level in browser.read("[...document.querySelectorAll('h1,h2,h3')].map(h => h.tagName[1])")]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    unnamed = "[...document.querySelectorAll('select,input')].filter(node => !node.labels.length).length"
    assert browser.read(unnamed) == 0
