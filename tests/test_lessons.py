"""The lessons: published numbers are met, and the page on disk is the page that the points give."""

from pathlib import Path

import pytest
from conftest import ROOT

from harness.config import ConfigError
from results.laws import PUBLISHED
from results.lessons import (
    PORIAN_STEPS,
    fit_exponent,
    fit_five,
    learn_filter,
    learn_hold_out,
    learn_ladder,
    learn_over_training,
    learn_repeated,
    load_chinchilla,
    load_gadre,
    measure_objective,
    read_points,
    render_lessons,
    select_step,
)

PAGE = ROOT / "results" / "published" / "lessons" / "README.md"


def test_printed_constants_miss_the_minimum_by_what_is_known(fixtures: Path) -> None:
    kept = load_chinchilla(fixtures).iloc[:-5]
    hoffmann, besiroglu = (measure_objective(law, kept) for law in PUBLISHED.values())
    assert hoffmann == pytest.approx(4.1210091e-3, rel=1e-6)
    assert besiroglu == pytest.approx(1.0228428e-3, rel=1e-6)


def test_over_training_errors_are_the_published_ones(fixtures: Path) -> None:
    runs = load_gadre(fixtures)
    rpj = runs[runs["dataset"] == "rpj"]
    fit, errors = fit_five(rpj)
    assert fit.n_cells == 5
    by_run = dict(zip(zip(rpj["model"], rpj["token_multiplier"], strict=True), errors, strict=True))
    assert by_run[("open_lm_1b", 640.0)] == pytest.approx(0.7103, abs=1e-4)
    assert by_run[("open_lm_7b", 20.0)] == pytest.approx(0.7320, abs=1e-4)


def test_exponents_of_porian_are_the_published_ones(fixtures: Path) -> None:
    pairs = read_points(fixtures, "porian/porian_optimal_pairs.csv")
    printed = read_points(fixtures, "porian/porian_published_exponents.csv")
    found = []
    for choice in PORIAN_STEPS.values():
        found.append(fit_exponent(select_step(pairs, choice)))
        assert found[-1] == pytest.approx(float(select_step(printed, choice)["a"].iloc[0]), abs=1e-4)
    assert found == pytest.approx([0.835, 0.706, 0.602, 0.571, 0.497], abs=0.003)


def test_the_published_page_says_what_the_points_give(fixtures: Path) -> None:
    """All but the last lesson, which takes a minute: its text is held by a slow test of tests/test_design.py."""
    page = PAGE.read_text()
    lessons = [learn(fixtures) for learn in (learn_filter, learn_ladder, learn_hold_out, learn_repeated, learn_over_training)]
    for number, part in enumerate(lessons, start=1):
        assert f"## {number}. {part.heading}" in page
        assert part.text in page
        assert part.picture.caption in page
        assert (PAGE.parent / f"{part.picture.name}.png").is_file()
    assert render_lessons(lessons[:1]).count("## ") == 1


def test_missing_points_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="HARNESS_FIXTURES"):
        read_points(tmp_path, "chinchilla/svg_extracted_data.csv")
