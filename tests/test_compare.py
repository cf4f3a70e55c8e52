"""Two studies side by side: alike, different, and what may not be compared."""

from dataclasses import replace
from pathlib import Path

import pytest
from fake_experiment import write_experiment

from results.compare import compare_studies, judge_difference
from results.study import Study, fit_study
from results.table import load_cells
from results.uncertainty import Interval


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Study:
    return fit_study("one", load_cells(write_experiment(tmp_path_factory.mktemp("compare"), data_dir)))


def test_a_study_is_like_itself(study: Study) -> None:
    page = compare_studies(study, study)
    assert "Nothing recorded differs." in page
    assert "22 cells stand in both: val_loss differs by 0 on average" in page
    assert "within both intervals" in page


def test_what_differs_is_said(study: Study) -> None:
    cells = study.cells.assign(metric_id="other", val_loss=study.cells["val_loss"] * 1.01)
    page = compare_studies(study, replace(study, name="two", cells=cells))
    assert "validation metric: losses do not compare, exponents may: " in page
    assert "differs by 0.02" in page


def test_a_study_without_a_law_is_shown_with_its_reason(study: Study) -> None:
    assert "too few" in compare_studies(study, replace(study, fitted=None, refusal="too few"))


def test_numbers_are_told_apart_by_both_intervals() -> None:
    one = Interval(1.0, 0.9, 1.1, 9)
    assert "within" in judge_difference(one, Interval(1.13, 1.03, 1.23, 9))
    assert "beyond" in judge_difference(one, Interval(1.15, 1.05, 1.25, 9))
    assert "beyond" in judge_difference(Interval(1.15, 1.05, 1.25, 9), one)
    assert judge_difference(one, Interval(1.0, 0.9, 1.1, 9, "unknown")) == ""
