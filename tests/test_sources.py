"""Where a table comes from: exactly one source, named by file or folder; a law by its name."""

from pathlib import Path

import pytest

from harness.config import ConfigError
from results.fit import FitError
from results.sources import find_experiment, find_law, fit_loaded, load_table, read_fixed
from results.study import DEFAULT_CHOICES


def test_exactly_one_source_and_conditions_only_for_a_foreign_table(tmp_path: Path) -> None:
    for source, csv in ((None, None), (tmp_path, tmp_path / "x.csv")):
        with pytest.raises(ConfigError, match="and not both"):
            load_table(source, csv, None, None, None, tmp_path)
    with pytest.raises(ConfigError, match="are for a foreign table"):
        load_table(tmp_path, None, None, ["loss<3"], None, tmp_path)
    with pytest.raises(ConfigError, match="neither an experiment file"):
        find_experiment(tmp_path / "absent", tmp_path)


def test_laws_are_found_by_name_and_near_names_are_proposed() -> None:
    assert find_law("kaplan_nd").name == "kaplan_nd"
    with pytest.raises(ConfigError, match="did you mean repeated"):
        find_law("repeat")


def test_a_table_without_a_fit_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("n_params,tokens,val_loss\n1e7,1e9,3.0\n")
    loaded = load_table(None, tmp_path / "x.csv", None, None, None, tmp_path)
    assert (loaded.name, loaded.results_dir) == ("x", None)
    with pytest.raises(FitError, match=r"x\.csv: usable cells=1"):
        fit_loaded(loaded, DEFAULT_CHOICES)


def test_fixed_parameters_are_read_by_name() -> None:
    law = find_law("chinchilla")
    assert read_fixed(law, ["E=1.69", "alpha = 0.34"]) == {"E": 1.69, "alpha": 0.34}
    for text, message in (
        ("E", "NAME=NUMBER"),
        ("gamma=1", "has no parameter gamma"),
        ("E=-1", "above 0"),
        ("E=x", "NAME=NUMBER"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_fixed(law, [text])
