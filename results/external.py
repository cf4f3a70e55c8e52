"""Anyone's table: a CSV, TSV or Parquet file whose columns are mapped by hand to ours, with units said and nothing guessed.

A mapping is `ours=theirs`, and theirs may be scaled or unlogged: "n_params=Params (B) * 1e9", "val_loss=ln(ppl)". Of parameters,
tokens and FLOPs two are enough: C = 6 N D gives the third.
"""

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.config import ConfigError
from results.table import COLUMNS, HELD_OUT, conform

MAPPABLE = [
    "n_params",
    "n_params_non_embedding",
    "n_params_matmul",
    "tokens",
    "unique_tokens",
    "flops",
    "flops_per_token",
    "val_loss",
    "val_bpb",
    "lr",
    "global_batch_size",
    "seed",
    "run_id",
    "cell_id",
    "size",
    "role",
    "metric_id",
    "tokenizer",
    "code_hash",
    "schedule",
]
# Names under which others keep what we call by the key; used only to say "did you mean".
OTHERS = {
    "n_params": {"params", "parameters", "n", "nparams", "num_params", "model_size", "modelsize", "size_params", "model_params"},
    "tokens": {"d", "n_tokens", "num_tokens", "train_tokens", "training_tokens", "total_tokens", "tokens_seen"},
    "flops": {"c", "compute", "training_flop", "training_flops", "train_flops", "flop", "total_flops"},
    "val_loss": {"loss", "final_loss", "valid_loss", "validation_loss", "eval_loss", "test_loss", "l", "nll", "cross_entropy"},
}
TEXTS = {name for name in MAPPABLE if COLUMNS.get(name) == "str"}
COMPARISON = re.compile(r"^(.*?)\s*(<=|>=|!=|=|<|>)\s*(.*)$")


@dataclass(frozen=True)
class External:
    """A table as read. `notes`: what was derived; `warnings`: what looks like another unit."""

    cells: pd.DataFrame
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def load_external(path: Path, mapping: Sequence[str] = (), where: Sequence[str] = (), hold_out: Sequence[str] = ()) -> External:
    """Read a table of one finished cell a row.

    `where`: conditions such as "dataset=rpj" or "val_loss<4" that a cell must meet to be fitted; `hold_out`: conditions that
    make it a held-out cell. Both may name columns of the file or ours.

    Raises:
        ConfigError: the file, a mapping or a condition cannot be read, a column is missing, or two rows are the same cell.
    """
    theirs = read_table(path)
    ours = pd.DataFrame(index=theirs.index)
    for name, expression in {**{n: n for n in MAPPABLE if n in theirs}, **parse_mapping(path, mapping)}.items():
        ours[name] = read_column(path, theirs, name, expression)
    notes = derive_third(path, theirs, ours)
    cells = fill_columns(path, ours)
    cells["exclusion_reason"] = explain_exclusions(ours, cells)
    for condition in where:
        fails = ~meet(path, theirs, ours, condition) & (cells["exclusion_reason"] == "")
        cells.loc[fails, "exclusion_reason"] = f"left out: not {condition}"
    for condition in hold_out:
        held = meet(path, theirs, ours, condition) & (cells["exclusion_reason"] == "")
        cells.loc[held, "role"] = "held_out"
        cells.loc[held, "exclusion_reason"] = HELD_OUT
    cells["excluded"] = (cells["exclusion_reason"] != "").astype("boolean")
    check_duplicates(path, cells)
    return External(cells, tuple(notes), tuple(list_odd_units(cells[~cells["excluded"]])))


def read_table(path: Path) -> pd.DataFrame:
    """Read the file by its suffix.

    Raises:
        ConfigError: it is not there, not such a file, or has no rows.
    """
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", skipinitialspace=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
        raise ConfigError(f"{path}: cannot be read as a table: {str(error).splitlines()[0]}") from error
    if table.empty:
        raise ConfigError(f"{path}: has no rows; one finished cell a row is needed, with parameters, tokens or FLOPs, and a loss")
    table.columns = [str(column).strip() for column in table.columns]
    return table


def parse_mapping(path: Path, mapping: Sequence[str]) -> dict[str, str]:
    """Split "ours=theirs".

    Raises:
        ConfigError: no equals sign, or a name that is not ours.
    """
    pairs = {}
    for text in mapping:
        name, equals, expression = (part.strip() for part in text.partition("="))
        if not equals or not expression:
            raise ConfigError(f'{path}: --map {text}, is not of the form ours=theirs, for example --map "n_params=Model Size"')
        if name not in MAPPABLE:
            near = difflib.get_close_matches(name, MAPPABLE, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{path}: --map {text}: {name} is not a column of the table{hint} (one of {', '.join(MAPPABLE)})")
        pairs[name] = expression
    return pairs


def read_column(path: Path, theirs: pd.DataFrame, name: str, expression: str) -> "pd.Series[float]":
    """Evaluate one mapping: a column, a column times or over a number, or ln() or exp() of one.

    Raises:
        ConfigError: there is no such column.
    """
    found = re.fullmatch(r"(ln|exp)\((.*)\)", expression) if expression not in theirs else None
    column, factor = (found[2].strip(), 1.0) if found else split_factor(theirs, expression)
    if column not in theirs:
        near = difflib.get_close_matches(column, [str(known) for known in theirs], 1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{path}: --map {name}={expression}: there is no column {column}{hint} ({list_names(theirs)})")
    if name in TEXTS:
        return theirs[column]
    values = pd.to_numeric(theirs[column], errors="coerce").astype(float) * factor
    if not found:
        return values
    with np.errstate(all="ignore"):  # what has no logarithm becomes no number, and the cell is left out
        return pd.Series(np.log(values) if found[1] == "ln" else np.exp(values), index=values.index)


def split_factor(theirs: pd.DataFrame, expression: str) -> tuple[str, float]:
    """Split "Params (B) * 1e9" into column and factor; a column that is called so wins."""
    found = None if expression in theirs else re.fullmatch(r"(.*?)\s*([*/])\s*([0-9.eE+_-]+)", expression)
    if not found:
        return expression, 1.0
    try:
        number = float(found[3])
    except ValueError:
        return expression, 1.0
    return found[1], number if found[2] == "*" else 1 / number


def derive_third(path: Path, theirs: pd.DataFrame, ours: pd.DataFrame) -> list[str]:
    """Complete parameters, tokens and FLOPs by C = 6 N D; return what was derived.

    Raises:
        ConfigError: the loss, or two of the three, are missing.
    """
    loss = "val_loss" if "val_loss" in ours or "val_bpb" not in ours else "val_bpb"
    missing = [name for name in ("n_params", "tokens", "flops") if name not in ours]
    if loss not in ours or len(missing) > 1:
        absent = [loss] if loss not in ours else missing[:1]
        hint = suggest(theirs, absent[0])
        enough = "" if loss not in ours else " (two of n_params, tokens and flops are enough: C = 6 N D gives the third)"
        raise ConfigError(f"{path}: column {absent[0]} is missing{hint}{enough} ({list_names(theirs)})")
    if missing == ["flops"]:
        ours["flops"] = 6 * ours["n_params"] * ours["tokens"]
        return ["FLOPs were derived as C = 6 N D."]
    if missing:
        other = "tokens" if missing == ["n_params"] else "n_params"
        ours[missing[0]] = ours["flops"] / 6 / ours[other]
        return [f"{'Parameters' if other == 'tokens' else 'Tokens'} were derived from FLOPs by C = 6 N D."]
    return []


def suggest(theirs: pd.DataFrame, name: str) -> str:
    """Say which of their columns might be meant."""
    columns = [str(column) for column in theirs]
    near = [column for column in columns if re.sub(r"[^a-z]+", "_", column.lower()).strip("_") in OTHERS.get(name, set())]
    near = near or difflib.get_close_matches(name, columns, 1)
    return f'; did you mean --map "{name}={near[0]}"?' if near else f'; say which one it is: --map "{name}=..."'


def list_names(theirs: pd.DataFrame) -> str:
    """List the file's columns, not too many."""
    names = [str(name) for name in theirs]
    return "it has " + ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def fill_columns(path: Path, ours: pd.DataFrame) -> pd.DataFrame:
    """Give the table all our columns; what a file does not say stays empty, but every cell has an id and a run."""
    line = [f"row-{i + 1}" for i in range(len(ours))]
    given = ours.assign(
        experiment=path.stem,
        cell_id=ours["cell_id"].astype(str) if "cell_id" in ours else line,
        run_id=ours["run_id"].astype(str) if "run_id" in ours else line,
        role=ours.get("role", "grid"),
        state="done",
        size=ours["size"].astype(str) if "size" in ours else [f"{n:.4g}" for n in ours["n_params"]],
        planned_tokens=ours["tokens"],
        flops_6nd=6 * ours["n_params"] * ours["tokens"],
    )
    cells = conform(given, COLUMNS)
    for name in ("n_params", "n_params_non_embedding", "n_params_matmul", "tokens", "unique_tokens", "planned_tokens"):
        if name in given:  # numbers read off a figure are not whole, and rounding them would move the fit
            cells[name] = given[name].astype(float)
    return cells


def explain_exclusions(ours: pd.DataFrame, cells: pd.DataFrame) -> "pd.Series[str]":
    """Say why a row cannot be fitted; empty where it can."""
    reasons = [explain_row(row) for row in ours.to_dict("records")]
    metrics = pd.Series([m for m, reason in zip(cells["metric_id"], reasons, strict=True) if not reason], dtype="str").dropna()
    if len(metrics):
        most = metrics.mode()[0]
        for i, (metric, reason) in enumerate(zip(cells["metric_id"], reasons, strict=True)):
            if not reason and metric != most:
                reasons[i] = f"another metric: {metric}, while most cells have {most}"
    for i, role in enumerate(cells["role"]):
        if not reasons[i] and role == "held_out":
            reasons[i] = HELD_OUT
    return pd.Series(reasons, index=cells.index, dtype="str")


def explain_row(row: Mapping[Hashable, Any]) -> str:
    """Say why the numbers of a row cannot be fitted, or nothing."""
    for name in ("val_loss" if "val_loss" in row else "val_bpb", "n_params", "tokens"):
        if np.isnan(row[name]):
            return f"{name} is missing or no number"
        if not 0 < row[name] < np.inf:
            return f"{name} is {row[name]:g}: not a finite number above 0"
    return ""


def meet(path: Path, theirs: pd.DataFrame, ours: pd.DataFrame, condition: str) -> "pd.Series[bool]":
    """Evaluate "column OP value" on each row.

    Raises:
        ConfigError: it is not a comparison, or of no column.
    """
    found = COMPARISON.match(condition)
    column = found[1].strip() if found else ""
    table = theirs if column in theirs else ours
    if found is None or column not in table:
        near = difflib.get_close_matches(column, [str(known) for known in (*theirs, *ours)], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f'{path}: condition "{condition}", is no comparison of a column with a value{hint} ({list_names(theirs)})'
        )
    operator, value = found[2], found[3].strip()
    numbers = pd.to_numeric(table[column], errors="coerce")
    try:
        number = float(value)
    except ValueError:
        number = np.nan
    is_number = not np.isnan(number) and bool(numbers.notna().any())
    if not is_number and operator not in ("=", "!="):
        raise ConfigError(f'{path}: condition "{condition}", compares texts by size; use = or !=')
    left, right = (numbers, number) if is_number else (table[column].astype(str), value)
    compare = {"=": "eq", "!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge"}[operator]
    return pd.Series(getattr(left, compare)(right), index=table.index)


def check_duplicates(path: Path, cells: pd.DataFrame) -> None:
    """Refuse rows that are the same cell twice: they would be counted as two findings.

    Raises:
        ConfigError: naming the first two.
    """
    kept = cells[~cells["excluded"]]
    keys = ["n_params", "tokens", "seed", "lr", "global_batch_size", "schedule", "val_loss", "val_bpb", "metric_id"]
    for columns, what in ((["cell_id"], "the same cell_id"), (keys, "the same cell with the same loss")):
        group = kept.groupby(columns, dropna=False, sort=False).ngroup()
        again = group[group.duplicated(keep=False)]
        if len(again):
            twins = again.index[again == again.iloc[0]][:2]
            raise ConfigError(
                f"{path}: rows {twins[0] + 1} and {twins[1] + 1} are {what} ({int(group.duplicated().sum())} row(s) too "
                "many); remove the copies, or map a seed or cell_id that tells them apart"
            )


def list_odd_units(kept: pd.DataFrame) -> list[str]:
    """Say which numbers look like another unit; they are taken as they are."""
    said = []
    for name, least, words in (("n_params", 1e4, "parameters"), ("tokens", 1e4, "tokens")):
        middle = float(kept[name].median()) if len(kept) else np.nan
        if middle < least:
            unit = "billions" if middle < (500 if name == "tokens" else 50) else "millions"
            factor = "1e9" if unit == "billions" else "1e6"
            said.append(
                f"The median of {name} is {middle:.4g}, taken as {words}. If these are {unit}, say so: "
                f'--map "{name}=COLUMN * {factor}".'
            )
    loss = float(kept["val_loss"].median()) if len(kept) else np.nan
    if loss > 15:
        said.append(
            f"The median of val_loss is {loss:.4g}, which no loss in nats per token is. If it is a perplexity, say so: "
            '--map "val_loss=ln(COLUMN)"; if it is in percent, the law is of that and E is a percentage.'
        )
    return said
