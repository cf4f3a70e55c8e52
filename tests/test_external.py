"""Anyone's table: what is mapped, derived, left out and refused, each in one line."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.config import ConfigError
from results.external import load_external
from results.laws import Chinchilla
from results.table import COLUMNS, write_table

LAW = Chinchilla(1.8, 400, 2000, 0.34, 0.37)


def make_points(**columns: object) -> pd.DataFrame:
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 4)))
    return pd.DataFrame({"Params (M)": n / 1e6, "FLOP": 6 * n * d, "ppl": np.exp(LAW.loss(n, d)), **columns})


def write(tmp_path: Path, table: pd.DataFrame, name: str = "points.csv") -> Path:
    path = tmp_path / name
    table.to_csv(path, index=False, sep="\t" if name.endswith("tsv") else ",")
    return path


MAPPING = ["n_params=Params (M) * 1e6", "flops=FLOP", "val_loss=ln(ppl)"]


@pytest.mark.parametrize("name", ["points.csv", "points.tsv"])
def test_columns_are_scaled_unlogged_and_the_third_derived(tmp_path: Path, name: str) -> None:
    read = load_external(write(tmp_path, make_points(), name), MAPPING)
    np.testing.assert_allclose(read.cells["val_loss"], LAW.loss(read.cells["n_params"], read.cells["tokens"]), rtol=1e-12)
    assert read.notes == ("Tokens were derived from FLOPs by C = 6 N D.",)
    assert read.warnings == ()
    assert list(read.cells) == list(COLUMNS)
    assert not read.cells["excluded"].any()
    assert read.cells["run_id"].is_unique


def test_our_own_names_need_no_mapping_and_parquet_is_read(tmp_path: Path) -> None:
    read = load_external(write(tmp_path, make_points()), MAPPING)
    csv, parquet = write_table(read.cells, tmp_path)
    for path in (csv, parquet):
        again = load_external(path).cells
        np.testing.assert_allclose(again["tokens"], read.cells["tokens"])
        np.testing.assert_allclose(again["val_loss"], read.cells["val_loss"])


def test_tokens_and_parameters_are_enough_too(tmp_path: Path) -> None:
    table = pd.DataFrame({"N": [1e7, 2e7], "D": [1e9, 2e9], "L": [3.0, 2.9]})
    cells = load_external(write(tmp_path, table), ["n_params=N", "tokens=D", "val_loss=L"]).cells
    assert cells["flops"].tolist() == [6e16, 2.4e17]
    back = pd.DataFrame({"D": [1e9], "C": [6e16], "L": [3.0]})
    assert load_external(write(tmp_path, back), ["flops=C", "tokens=D", "val_loss=L"]).cells["n_params"].tolist() == [1e7]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (["n_params=Params (M) * 1e6", "flops=FLOP"], "column val_loss is missing; say which one it is"),
        (["n_params=Params (B)", "flops=FLOP", "val_loss=ppl"], r"there is no column Params \(B\); did you mean Params \(M\)"),
        (["n_parms=Params (M)", "flops=FLOP", "val_loss=ppl"], "n_parms is not a column of the table; did you mean n_params"),
        (["n_params"], "is not of the form ours=theirs"),
        (["flops=FLOP", "val_loss=ppl"], "two of n_params, tokens and flops are enough"),
        (["n_params=Params (M)", "val_loss=ppl"], "column tokens is missing"),
    ],
)
def test_a_mapping_that_cannot_be_read_is_one_line(tmp_path: Path, mapping: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        load_external(write(tmp_path, make_points()), mapping)
    assert "\n" not in str(refusal.value)
    assert "points.csv" in str(refusal.value)


@pytest.mark.parametrize(
    ("columns", "meant"),
    [({"Model Size": 1e7}, "n_params=Model Size"), ({"N": 1e7}, "n_params=N"), ({"num_params": 1e7}, "n_params=num_params")],
)
def test_usual_names_are_proposed_and_never_taken(tmp_path: Path, columns: dict[str, float], meant: str) -> None:
    table = pd.DataFrame({"val_loss": [3.0], **columns})
    with pytest.raises(ConfigError, match=f'did you mean --map "{meant}"'):
        load_external(write(tmp_path, table))


def test_files_that_are_no_tables_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("n_params,tokens,val_loss\n")
    (tmp_path / "noise.parquet").write_bytes(b"no parquet")
    for name, message in (
        ("absent.csv", "no such file"),
        ("empty.csv", "cannot be read as a table"),
        ("header.csv", "has no rows"),
        ("noise.parquet", "cannot be read as a table"),
    ):
        with pytest.raises(ConfigError, match=message) as refusal:
            load_external(tmp_path / name)
        assert "\n" not in str(refusal.value)


def test_numbers_that_cannot_be_fitted_are_left_out_with_a_reason(tmp_path: Path) -> None:
    table = make_points().astype(object)
    for row, value in enumerate([np.nan, -1.0, "diverged", np.inf, 0.0]):
        table.loc[row, "ppl"] = value
    cells = load_external(write(tmp_path, table), [*MAPPING[:2], "val_loss=ppl"]).cells
    assert cells["exclusion_reason"].tolist()[:6] == [
        "val_loss is missing or no number",
        "val_loss is -1: not a finite number above 0",
        "val_loss is missing or no number",
        "val_loss is inf: not a finite number above 0",
        "val_loss is 0: not a finite number above 0",
        "",
    ]


def test_conditions_choose_and_hold_out(tmp_path: Path) -> None:
    table = make_points(dataset=["a", "b"] * 10)
    cells = load_external(write(tmp_path, table), MAPPING, ["dataset=a", "val_loss<3"], ["FLOP>=1e20"]).cells
    kept = cells[~cells["excluded"]]
    assert (kept["val_loss"] < 3).all()
    assert (kept["flops"] < 1e20).all()
    assert set(cells["exclusion_reason"]) == {
        "",
        "left out: not dataset=a",
        "left out: not val_loss<3",
        "held out: trained to test a prediction, never fitted",
    }
    assert (cells["role"] == "held_out").sum() == cells["exclusion_reason"].str.startswith("held out").sum() > 0
    for condition, message in (
        ("datset=a", "did you mean dataset"),
        ("dataset<b", "compares texts by size"),
        ("dataset", "is no comparison"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_external(write(tmp_path, table), MAPPING, [condition])


def test_the_same_cell_twice_is_refused_but_a_repeat_with_another_loss_is_not(tmp_path: Path) -> None:
    table = make_points()
    twice = pd.concat([table, table.iloc[[2]]])
    with pytest.raises(ConfigError, match="rows 3 and 21 are the same cell with the same loss") as refusal:
        load_external(write(tmp_path, twice), MAPPING)
    assert "\n" not in str(refusal.value)
    twice.iloc[-1, twice.columns.get_loc("ppl")] *= 1.01
    assert not load_external(write(tmp_path, twice), MAPPING).cells["excluded"].any()
    named = table.assign(name=[*"abcdefghijklmnopqrs", "a"])
    with pytest.raises(ConfigError, match="rows 1 and 20 are the same cell_id"):
        load_external(write(tmp_path, named), [*MAPPING, "cell_id=name"])


def test_another_metric_than_most_is_left_out(tmp_path: Path) -> None:
    cells = load_external(write(tmp_path, make_points(metric=["x"] * 15 + ["y"] * 5)), [*MAPPING, "metric_id=metric"]).cells
    assert cells["excluded"].tolist() == [False] * 15 + [True] * 5
    assert cells["exclusion_reason"].iloc[-1] == "another metric: y, while most cells have x"


def test_numbers_in_other_units_are_told(tmp_path: Path) -> None:
    table = pd.DataFrame({"n_params": [0.1, 0.2, 0.4], "tokens": [2.0, 4.0, 8.0], "val_loss": [25.0, 22.0, 21.0]})
    said = " ".join(load_external(write(tmp_path, table)).warnings)
    assert '--map "n_params=COLUMN * 1e9"' in said
    assert '--map "tokens=COLUMN * 1e9"' in said
    assert '--map "val_loss=ln(COLUMN)"' in said


def test_texts_of_a_foreign_file_cannot_start_formulas(tmp_path: Path) -> None:
    table = make_points(who=["=1+1", "@x"] * 10)
    csv, _ = write_table(load_external(write(tmp_path, table), [*MAPPING, "size=who"]).cells, tmp_path)
    assert "'=1+1" in csv.read_text()
    assert ",=1+1" not in csv.read_text()
