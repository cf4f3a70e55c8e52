"""The report: one self-contained page, and the same in Markdown. Every number comes from a record; none is written by hand.

The page loads nothing (figures are inside it, its policy forbids the rest) and escapes every text that a user could have chosen.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness.records import Plan
from results.checklist import NOT_RECORDED, fill_checklist
from results.claims import (
    NOT_IDENTIFIED,
    describe_seed_noise,
    list_claims,
    list_excluded,
    render_summary,
)
from results.explore import describe_charts, explain_split
from results.frontier import Frontier
from results.hindsight import compare_forecast, compare_scratch, list_doubts
from results.page import render_method
from results.plot import Picture
from results.predict import CAVEAT, Score, describe_outcome, summarise_scores
from results.study import CONVENTIONS, LEGEND, LOSSES, Study
from results.table import Cost

TEMPLATES = Path(__file__).parent / "templates"
MOST_ROWS = 500  # of a table that are laid out at once: a browser takes seconds over ten thousand
BEYOND_ASKED = 10.0  # the compute whose best split is quoted, over the largest fitted
SORTED_AS_NUMBERS = (
    "n_params",
    "val_loss",
    "planned_tokens",
    "tokens",
    "unique_tokens",
    "epochs",
    "flops",
    "val_bpb",
    "train_loss",
)
# What the environment section lists: column and words.
ENVIRONMENT = {
    "device_name": "device",
    "device": "kind of device",
    "n_threads": "threads",
    "world_size": "ranks",
    "engine": "engine",
    "precision": "precision",
    "torch_version": "torch",
    "python_version": "Python",
    "code_hash": "code (hash of its files)",
    "commit": "commit",
    "dirty": "uncommitted changes",
    "attempts": "attempts of a run",
}


@dataclass(frozen=True)
class Evidence:
    """What a report tells besides the study itself."""

    plan: Plan
    cost: Cost
    pictures: Sequence[Picture]
    frontiers: Mapping[str, Frontier | str] = field(default_factory=dict)
    scores: Sequence[Score] = ()


def write_report(study: Study, evidence: Evidence, results_dir: Path) -> list[Path]:
    """Write report.html and report.md; table.csv and the figures already lie in `results_dir`."""
    facts = collect_facts(study, evidence, results_dir)
    html, markdown = results_dir / "report.html", results_dir / "report.md"
    html.write_text(render_html(facts), encoding="utf-8")
    markdown.write_text(render_markdown(facts), encoding="utf-8")
    return [html, markdown]


def render_html(facts: dict[str, Any]) -> str:
    """Render the page; the policy admits its one style sheet and one script by hash and images that are part of the page."""
    style, script = ((TEMPLATES / f"report.{suffix}").read_text(encoding="utf-8") for suffix in ("css", "js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{hash_source(style)}'; script-src '{hash_source(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        facts, style=Markup(style), script=Markup(script), policy=policy, chart_json=Markup(embed_json(facts["charts"]))
    )


def hash_source(text: str) -> str:
    """Return what a content-security policy calls an inline text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def embed_json(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Write JSON that cannot end the element it stands in, whatever its texts hold."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def render_markdown(facts: dict[str, Any]) -> str:
    """Render the Markdown; every value is escaped as it is put in."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=False,  # not HTML: `finalize` escapes for Markdown
        finalize=escape_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.md.j2").render(facts)


def escape_markdown(value: Any) -> str:  # noqa: ANN401 - whatever a template puts out
    """Keep a text from being read as Markdown or HTML; Markup, which is ours, stays as it is."""
    if isinstance(value, Markup):
        return str(value)
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", " ".join(text.split("\n")))


def collect_facts(study: Study, evidence: Evidence, results_dir: Path) -> dict[str, Any]:
    """Gather what the templates show, as texts."""
    plan, cost, pictures = evidence.plan, evidence.cost, evidence.pictures
    data, cells = plan.data, study.cells
    charts = describe_charts(study, evidence.frontiers)
    stops = charts["conventions"][charts["default"]]["stops"]
    return {
        "charts": charts,
        "estimators": sorted(charts["conventions"][charts["default"]]["estimators"]),
        "has_stops": bool(stops),
        "n_stops": len(stops),
        "first_stop": next((i for i, stop in enumerate(stops) if stop["beyond"] > BEYOND_ASKED / 1.01), 0),
        "most_rows": MOST_ROWS,
        "answers": list_answers(study, stops),
        "predictions": [describe_score(one) for one in evidence.scores],
        "prediction_summary": Markup("") if not evidence.scores else summarise_scores(evidence.scores),
        "caveat": CAVEAT,
        "checklist": fill_checklist(study, plan),
        "csv_address": Markup(f"data:text/csv;base64,{base64.b64encode((results_dir / 'table.csv').read_bytes()).decode()}"),
        "name": study.name,
        "summary": [line.split(":", 1) for line in render_summary(study, cost).splitlines()],
        "is_fallback": data.is_fallback,
        "data_source": data.source,
        "equation": study.choices.law.equation,
        "legend": f"{LOSSES[study.choices.loss]}; {LEGEND}",
        "convention": f"N counts {study.convention.words} ({study.convention.column})",
        "refusal": study.refusal,
        "claims": list_claims(study.fitted) if study.fitted is not None else [],
        "not_identified": NOT_IDENTIFIED,
        "method": render_method(study.fitted) if study.fitted is not None else [],
        "warnings": study.warnings,
        "notes": study.notes,
        "figures": [describe_picture(picture, results_dir) for picture in pictures],
        "conventions": list_conventions(study),
        "cells": [describe_cell(row) for row in cells.to_dict("records")],
        "n_cells": len(cells),
        "excluded": list_excluded(cells),
        "n_repeating": int((cells["epochs"] > 1).sum()),
        "doubts": list_doubts(plan),
        "hindsight": [*compare_forecast(plan, cells), *compare_scratch(cells)],
        "seed_noise": describe_seed_noise(study),
        "data": describe_data(plan),
        "environment": describe_environment(cells),
        "receipts": [
            (row["cell_id"], text_of(row["receipt"]), text_of(row["weights_sha256"])) for row in cells.to_dict("records")
        ],
        "plan_created": plan.created_utc,
        "source": json.dumps(plan.source, indent=1, sort_keys=True),
    }


def list_answers(study: Study, stops: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say the best split of ten times the fitted compute, and the loss to expect there."""
    asked = next((stop for stop in stops if stop["beyond"] > BEYOND_ASKED / 1.01), None)
    if asked is None or study.fitted is None:
        return []
    text, problem = asked["text"], explain_split(study.fitted)
    if problem:
        return [
            f"The best split of {text['flops']} ({text['reach']}) is {NOT_IDENTIFIED}: {problem}. The loss expected there is "
            f"{text['loss']} nats per token."
        ]
    return [
        f"For {text['flops']} ({text['reach']}) the law would train {text['n']} parameters on {text['d']} tokens and expects "
        f"a loss of {text['loss']} nats per token."
    ]


def describe_score(one: Score) -> dict[str, str]:
    """Return a prediction's line as texts."""
    return {
        "cell_id": one.cell_id,
        "predicted": f"{one.predicted:.4f} ({one.low:.4f} to {one.high:.4f})",
        "outcome": describe_outcome(one),
        "when": one.when,
    }


def describe_picture(picture: Picture, results_dir: Path) -> dict[str, str]:
    """Return a figure for the templates: its SVG as an address that holds the data itself."""
    svg = (results_dir / "figures" / f"{picture.name}.svg").read_bytes()
    return {
        "name": picture.name,
        "file": Markup(f"figures/{picture.name}.png"),  # a name of ours: an address, not a text to escape
        "title": picture.title,
        "caption": picture.caption,
        "address": f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}",
    }


def list_conventions(study: Study) -> list[dict[str, str]]:
    """Return one row for each way to count parameters: the exponents beside each other."""
    rows = []
    for name, fitted in ({study.convention.name: study.fitted} | study.others).items():
        claims = {claim.name: claim for claim in list_claims(fitted)} if fitted is not None else {}
        said = {key: claims[key].phrase if claims else "no law was fitted" for key in ("alpha", "beta", "optimum_exponent")}
        rows.append({"words": CONVENTIONS[name].words, "column": CONVENTIONS[name].column, **said})
    return rows


def describe_cell(row: dict[Any, Any]) -> dict[str, Any]:
    """Return a cell's line of the table as texts."""
    return {
        "cell_id": row["cell_id"],
        "role": row["role"],
        "state": row["state"],
        "reason": row["exclusion_reason"],
        "excluded": row["excluded"],
        "repeats": bool(row["epochs"] > 1),
        "n_params": text_of(row["n_params"], ","),
        "planned_tokens": text_of(row["planned_tokens"], ","),
        "tokens": text_of(row["tokens"], ","),
        "unique_tokens": text_of(row["unique_tokens"], ","),
        "epochs": text_of(row["epochs"], ".2f"),
        "val_loss": text_of(row["val_loss"], ".4f"),
        "val_bpb": text_of(row["val_bpb"], ".4f"),
        "train_loss": text_of(row["train_loss"], ".4f"),
        "flops": text_of(row["flops"], ".3g"),
        "v": {name: "" if pd.isna(row[name]) else f"{row[name]:.10g}" for name in SORTED_AS_NUMBERS},
    }


def text_of(value: Any, spec: str = "") -> str:  # noqa: ANN401 - a cell of a table
    """Write a value, or that there is none."""
    return NOT_RECORDED if pd.isna(value) else format(value, spec)


def describe_data(plan: Plan) -> list[tuple[str, str]]:
    """Return where the text came from and how it was cut."""
    data = plan.data
    return [
        ("text", data.source + (" (the fallback, not the corpus asked for)" if data.is_fallback else "")),
        ("tokenizer", f"{data.tokenizer}, {data.vocab_size:,} tokens in its vocabulary"),
        ("training tokens", f"{data.train_tokens:,}, of which one epoch reads {data.epoch_tokens:,}"),
        ("validation tokens", f"{data.val_tokens:,} ({data.val_bytes:,} bytes)"),
        ("sequence length", f"{data.seq_len:,}"),
        ("content id", data.content_id),
        ("metric id", data.metric_id),
    ]


def describe_environment(cells: pd.DataFrame) -> list[tuple[str, str]]:
    """Return what the finished cells ran on: each value with its number of cells where they differ."""
    done = cells[cells["state"] == "done"]
    return [(words, describe_values(done[column])) for column, words in ENVIRONMENT.items()]


def describe_values(values: "pd.Series[Any]") -> str:
    """Write the one value of a column, or each with its count."""
    counts = values.map(text_of).value_counts()
    if len(counts) <= 1:
        return str(counts.index[0]) if len(counts) else NOT_RECORDED
    return ", ".join(f"{value} ({count} cells)" for value, count in counts.items())
