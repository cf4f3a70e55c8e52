"""Where a command's table comes from: an experiment, a folder of them, or a foreign file; and its fit."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from harness.config import ConfigError

if TYPE_CHECKING:
    import pandas as pd

    from harness.records import Plan
    from results.laws import Law
    from results.study import Choices, Fitted, Study


def find_experiment(source: Path, runs_dir: Path) -> Path:
    """Return an experiment's folder from its file or from itself.

    Raises:
        ConfigError: neither, or the file is not an experiment.
    """
    from harness.config import load_experiment
    from harness.runs import find_experiment_dir

    if source.suffix == ".toml":
        return find_experiment_dir(runs_dir, load_experiment(source).name)
    if source.is_dir():
        return source
    raise ConfigError(f"{source}: is neither an experiment file (*.toml) nor a folder; give one of them")


def read_plan(source: Path, runs_dir: Path) -> "Plan":
    """Plan an experiment file anew, or read the frozen plan of a folder."""
    from harness.config import load_experiment
    from harness.plan import plan_experiment
    from harness.runs import load_plan

    return plan_experiment(load_experiment(source)) if source.suffix == ".toml" else load_plan(find_experiment(source, runs_dir))


def find_law(name: str) -> "Law":
    """Return a law by name.

    Raises:
        ConfigError: there is none of this name.
    """
    import difflib

    from results.repeated import ALL_LAWS

    if name not in ALL_LAWS:
        near = difflib.get_close_matches(name, ALL_LAWS, 1)
        raise ConfigError(
            f"--law {name}: there is no such law{f'; did you mean {near[0]}?' if near else ''} ({', '.join(ALL_LAWS)})"
        )
    return ALL_LAWS[name]


def read_fixed(law: "Law", texts: list[str]) -> dict[str, float]:
    """Read parameters that are to be held fixed.

    Raises:
        ConfigError: not of the form NAME=NUMBER, not of this law, or not above zero.
    """
    fixed = {}
    for text in texts:
        name, _, number = (part.strip() for part in text.partition("="))
        try:
            fixed[name] = float(number)
        except ValueError as error:
            raise ConfigError(f"--fix {text}: is not of the form NAME=NUMBER, for example --fix E=1.69") from error
        if name not in law.parameters:
            raise ConfigError(f"--fix {text}: {law.name} has no parameter {name} (it has {', '.join(law.parameters)})")
        if not 0 < fixed[name] < float("inf"):
            raise ConfigError(f"--fix {text}: must be a finite number above 0")
    return fixed


@dataclass(frozen=True)
class Loaded:
    """A table and where it came from. `results_dir`: where its results go, or None for a foreign table."""

    name: str
    where: Path
    cells: "pd.DataFrame"
    results_dir: Path | None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_table(
    source: Path | None,
    csv: Path | None,
    mapping: list[str] | None,
    where: list[str] | None,
    hold_out: list[str] | None,
    runs_dir: Path,
) -> Loaded:
    """Read an experiment, a folder of them, or a foreign table.

    Raises:
        ConfigError: not exactly one of them is named, or it cannot be read.
    """
    from results.external import load_external
    from results.table import load_runs

    if (source is None) == (csv is None):
        raise ConfigError("results: name an experiment or its folder, or a foreign table with --csv FILE, and not both")
    if csv is not None:
        read = load_external(csv, mapping or [], where or [], hold_out or [])
        return Loaded(csv.stem, csv, read.cells, None, read.warnings, read.notes)
    if mapping or where or hold_out:
        raise ConfigError("--map, --where, --hold-out: are for a foreign table (--csv FILE); an experiment says these itself")
    assert source is not None
    folder = find_experiment(source, runs_dir)
    return Loaded(folder.name, folder, load_runs(folder), folder / "results")


def fit_loaded(loaded: Loaded, choices: "Choices") -> "tuple[Study, Fitted]":
    """Fit a table.

    Raises:
        FitError: the cells support no fit.
    """
    from results.fit import FitError
    from results.study import fit_study

    study = fit_study(loaded.name, loaded.cells, choices, warnings=loaded.warnings, notes=loaded.notes)
    if study.fitted is None:
        raise FitError(f"{loaded.where}: {study.refusal}")
    return study, study.fitted


def load_study(experiment_dir: Path, params: Literal["total", "non_embedding", "matmul"]) -> "Study":
    """Read an experiment's cells and fit them."""
    from harness.runs import load_plan
    from results.study import Choices, fit_study
    from results.table import load_cells

    return fit_study(load_plan(experiment_dir).experiment, load_cells(experiment_dir), Choices(params))
