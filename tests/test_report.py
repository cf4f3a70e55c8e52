"""The report and the command line: complete, safe with hostile names, honest where nothing can be fitted."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_experiment import GRID, change_summary, find_summaries, write_experiment

from harness.config import run_command_line
from harness.runs import read_json, write_json
from results.__main__ import app
from results.claims import NOT_IDENTIFIED, format_duration, format_to, make_claim
from results.report import escape_markdown
from results.uncertainty import Interval

HOSTILE = "</td><script>alert('x')</script> | **bold** `code` =1+1"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """An experiment with its report, written by the command line as users start it, with torch blocked from import."""
    experiment_dir = write_experiment(tmp_path_factory.mktemp("report"), data_dir)
    block = (
        "import sys, runpy\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'deepspeed'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        f"sys.argv = ['results', 'report', {str(experiment_dir)!r}]\n"
        "runpy.run_module('results', run_name='__main__')"
    )
    command = [sys.executable, "-W", "error", "-c", block]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return experiment_dir


@pytest.fixture
def fake(finished: Path, tmp_path: Path) -> Path:
    """A finished experiment that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "fake"))


Call = Callable[..., str]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run `python -m results` in this process, demand its exit status, and return what it printed (to stderr where it failed)."""

    def call_results(*arguments: object, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["results", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_command_line(app)
        out, err = capsys.readouterr()
        assert (ended.value.code or 0) == status, out + err
        return err if status else out

    return call_results


class Page(HTMLParser):
    """What a browser would find in the page: tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def read_page(experiment_dir: Path) -> Page:
    return Page((experiment_dir / "results/report.html").read_text())


def test_report_writes_everything(finished: Path) -> None:
    written = sorted(str(path.relative_to(finished / "results")) for path in (finished / "results").rglob("*") if path.is_file())
    names = [tag["id"] for tag in read_page(finished).find("figure") if tag.get("id")]
    assert {"learning_curves", "loss_vs_flops", "residuals", "optimum", "throughput"} <= set(names)
    figures = sorted(f"figures/{name}.{suffix}" for name in names for suffix in ("png", "svg", "pdf"))
    assert written == sorted([*figures, "fit.json", "report.html", "report.md", "table.csv", "table.parquet"])
    assert (finished / "results/report.html").stat().st_size < 6_000_000


def test_page_is_one_file_under_a_policy_that_lets_nothing_else_in(finished: Path) -> None:
    page = read_page(finished)
    html = (finished / "results/report.html").read_text()
    (policy,) = [tag["content"] for tag in page.find("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    style = re.search("<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style.group(1).encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert f"style-src 'sha256-{digest}'" in policy
    assert [tag.get("type") for tag in page.find("script")] == ["application/json", None]
    assert not page.find("link")
    assert [tag for tag in page.tags if any(name.startswith("on") or name == "style" for name in tag[1])] == []
    assert all((tag["src"] or "").startswith("data:image/svg+xml;base64,") for tag in page.find("img"))
    assert all(tag["alt"] and any(c.isdigit() for c in tag["alt"]) for tag in page.find("img"))
    assert len(page.find("img")) == 13


def test_answers_come_first_and_agree_with_fit_json(finished: Path) -> None:
    page, fit = read_page(finished), read_json(finished / "results/fit.json")
    interval = fit["fit"]["intervals"]["beta"]
    assert interval["identified"]
    claim = make_claim("beta", "", Interval(**{key: interval[key] for key in ("estimate", "low", "high", "df", "problem")}))
    assert page.text.index("How does the loss fall") < page.text.index(claim.value) < page.text.index("Figures")
    assert f"({claim.interval})" in page.text
    ids = [tag["id"] for tag in page.find("h2")]
    assert ids[:5] == ["answer", "explore", "predictions", "figures", "cells"]
    assert ids[5:] == ["exclusions", "planned", "noise", "checklist", "data", "environment", "receipts"]


def test_fit_json_recovers_the_law_that_made_the_losses(finished: Path) -> None:
    intervals = read_json(finished / "results/fit.json")["fit"]["intervals"]
    assert intervals["alpha"]["low"] <= 0.35 <= intervals["alpha"]["high"]
    assert intervals["beta"]["low"] <= 0.42 <= intervals["beta"]["high"]
    assert read_json(finished / "results/fit.json")["n_cells"] == 22


def test_every_cell_and_what_was_not_recorded_is_on_the_page(finished: Path) -> None:
    page = read_page(finished)
    for path in find_summaries(finished):
        assert path.parent.name in page.text
    assert re.search(r"commit\s*not recorded", page.text)
    assert "of 22 cells read some text more than once" in page.text
    assert "Seed noise: standard deviation of val_loss" in page.text


def test_left_out_cells_are_listed_with_reasons(fake: Path, call: Call) -> None:
    cell_id = change_summary(find_summaries(fake)[0], skipped_steps=3)
    out = call("report", fake)
    assert f"1 excluded from the fit ({cell_id}: skipped steps: 3)" in out
    assert f"{cell_id}: skipped steps: 3" in " ".join(read_page(fake).text.split())


def test_names_are_text_and_never_markup(fake: Path, call: Call) -> None:
    for path in find_summaries(fake):
        change_summary(path, device_name=HOSTILE, commit=HOSTILE)
    plan = read_json(fake / "plan.json")
    plan["data"]["source"] = HOSTILE
    write_json(fake / "plan.json", plan)
    call("report", fake)
    page = read_page(fake)
    assert len(page.find("script")) == 2
    assert page.text.count(HOSTILE) >= 3
    markdown = (fake / "results/report.md").read_text()
    assert "<script" not in markdown
    assert "**bold**" not in markdown


def test_markdown_escape_leaves_nothing_to_interpret() -> None:
    assert escape_markdown("a|b\n<c> *d* _e_ `f` [g](h)") == r"a\|b &lt;c&gt; \*d\* \_e\_ \`f\` \[g\](h)"


def test_fallback_text_is_said_aloud(fake: Path, call: Call) -> None:
    assert "FALLBACK TEXT" not in read_page(fake).text
    plan = read_json(fake / "plan.json")
    plan["data"]["is_fallback"] = True
    write_json(fake / "plan.json", plan)
    call("report", fake)
    assert "FALLBACK TEXT" in read_page(fake).text
    assert "FALLBACK TEXT" in (fake / "results/report.md").read_text()
    assert any("fallback" in warning for warning in read_json(fake / "results/fit.json")["warnings"])


def test_mixed_code_and_devices_are_told(fake: Path, call: Call) -> None:
    change_summary(find_summaries(fake)[0], code_hash="beef", device_name="another")
    page = call("fit", fake)
    assert "Fitted cells were trained by 2 versions of the code (beef, c0de)." in page
    assert "2 devices: a processor, another" in page


def test_summary_has_five_lines(fake: Path, call: Call) -> None:
    lines = call("report", fake).splitlines()[-5:]
    assert [line.split(":")[0] for line in lines] == ["exponents", "E", "cells", "compute", "wall time"]
    assert lines[2] == "cells:      22 of 22 done, 0 failed, 0 excluded from the fit"
    assert lines[4].startswith("wall time:  10 min 0 s")


def test_too_few_cells_still_make_a_report_that_says_so(fake: Path, call: Call) -> None:
    for path in find_summaries(fake)[3:]:
        path.unlink()
    out = call("report", fake)
    assert NOT_IDENTIFIED in out.splitlines()[-5]
    page = read_page(fake)
    assert "No law was fitted." in page.text
    assert "19 planned cell(s) are not done" in page.text
    assert read_json(fake / "results/fit.json")["fit"] is None
    assert "19 planned cell(s)" in call("fit", fake, status=2)


def test_a_plan_without_a_trained_cell_can_be_reported(tmp_path: Path, data_dir: Path, call: Call) -> None:
    experiment_dir = write_experiment(tmp_path, data_dir, grid=GRID)
    for run_dir in experiment_dir.iterdir():
        shutil.rmtree(run_dir / "attempts", ignore_errors=True)
    for path in find_summaries(experiment_dir):
        path.unlink()
    out = call("report", experiment_dir)
    assert "0 of 22 done" in out
    assert "wall time:  not recorded" in out
    assert "nothing to draw" in read_page(experiment_dir).text
    assert "nothing to draw" in call("plot", experiment_dir, status=2)


def test_commands_take_an_experiment_file_or_its_folder(fake: Path, data_dir: Path, tmp_path: Path, call: Call) -> None:
    from test_end_to_end import write_toml

    toml = write_toml(tmp_path, data_dir)
    toml.write_text(toml.read_text().replace('name = "tiny"', 'name = "fake"'))
    by_file = call("table", toml, "--runs-dir", fake.parent)
    by_folder = call("table", fake)
    assert by_file == by_folder
    assert "22 cells, 22 done, 0 left out of a fit" in by_file


@pytest.mark.parametrize("params", ["non_embedding", "matmul"])
def test_fit_prints_json_under_each_convention(fake: Path, params: str, call: Call) -> None:
    printed = json.loads(call("fit", fake, "--json", "--params", params))
    assert printed == read_json(fake / "results/fit.json")
    assert printed["params_column"] == f"n_params_{params}"
    assert set(printed["conventions"]) == {"total", "non_embedding", "matmul"}


@pytest.mark.parametrize("command", ["table", "fit", "plot", "report"])
def test_bad_input_is_one_line_and_status_2(command: str, tmp_path: Path, call: Call) -> None:
    (tmp_path / "empty").mkdir()
    for source in ("nowhere", "nowhere.toml", "empty"):
        said = call(command, tmp_path / source, status=2)
        assert said.startswith("error: ")
        assert len(said.splitlines()) == 1
        assert list((tmp_path / "empty").iterdir()) == []


def test_numbers_carry_the_digits_that_their_interval_supports() -> None:
    assert make_claim("x", "", Interval(0.34731, 0.3245, 0.3724, 40)).phrase == "0.347 (0.325 to 0.372)"
    assert make_claim("x", "", Interval(126.45, 114.0, 140.5, 4)).phrase == "126 (114 to 140)"
    assert make_claim("x", "", Interval(5.0, 5.0, 5.0, 4)).phrase == "5 (5 to 5)"
    unknown = make_claim("x", "", Interval(0.34731, -0.1, 0.9, 2, "its interval holds 0"))
    assert unknown.phrase == f"{NOT_IDENTIFIED} (its interval holds 0)"
    assert "0.347" not in unknown.phrase
    assert format_to(12_345.6, 4_000.0) == "12,300"


def test_durations_read_as_people_say_them() -> None:
    assert [format_duration(s) for s in (5.4, 65, 3 * 3600 + 61)] == ["5 s", "1 min 5 s", "3 h 1 min"]
