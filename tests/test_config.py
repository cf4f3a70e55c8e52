"""Every fault of an experiment file ends in one line that names the key, the value and what to type."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, tiny_table

from harness.config import ConfigError, Experiment, list_keys, load_experiment, parse_experiment


def refuse(table: dict[str, Any], *expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_experiment(table, where="x.toml")
    message = str(caught.value)
    assert message.startswith("x.toml: ")
    assert "\n" not in message
    for part in expected:
        assert part in message


def with_key(data_dir: Path, key: str, value: object) -> dict[str, Any]:
    table = tiny_table(data_dir)
    section, _, name = key.rpartition(".")
    (table[section] if section else table)[name] = value
    return table


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("optim.l", 1e-3, "unknown key optim.l; did you mean optim.lr?"),
        ("optim.warmup_tokens", 1, "unknown key optim.warmup_tokens; did you mean schedule.warmup_tokens?"),
        ("seeed", 1, "unknown key seeed; did you mean seed?"),
        ("optim.lr", "3e-4", "optim.lr='3e-4', is refused"),
        ("optim.lr", float("inf"), "optim.lr=inf, is refused"),
        ("optim.global_batch_size", 0, "optim.global_batch_size=0, is refused"),
        ("optim.global_batch_size", 8.5, "optim.global_batch_size=8.5, is refused"),
        ("optim.global_batch_size", True, "optim.global_batch_size=True, is refused"),
        ("precision", "fp16", "precision='fp16', is refused"),
        ("name", "../x", "name='../x', is not a name"),
        ("name", "a\nb", "is not a name"),
        ("name", "-rf", "is not a name"),
        ("name", "x" * 65, "is not a name"),
        ("engine.kind", "jax", "engine.kind='jax', is refused"),
        ("schedule.kind", "constant", "has no cooldown"),
        ("grid.flops", [1e9], "has tokens and flops; give exactly one of"),
        ("grid.sizes", [], "grid.sizes=[], is refused"),
    ],
)
def test_faults_are_named(data_dir: Path, key: str, value: object, expected: str) -> None:
    refuse(with_key(data_dir, key, value), expected)


def test_a_missing_section_and_budget_are_named(data_dir: Path) -> None:
    table = tiny_table(data_dir)
    del table["optim"]
    refuse(table, "optim is missing; add it")
    table = tiny_table(data_dir)
    del table["grid"]["tokens"]
    refuse(table, "grid: has no budget; give exactly one of tokens, flops, tokens_per_param, steps")


def test_files_that_are_not_experiments(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml: there is no such file"):
        load_experiment(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_experiment(tmp_path / "bad.toml")
    (tmp_path / "bin.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_experiment(tmp_path / "bin.toml")


def test_set_overrides_a_key_with_a_toml_value(tmp_path: Path) -> None:
    demo = ROOT / "launch/experiments/demo.toml"
    assert load_experiment(demo, ["optim.lr=3e-4"]).optim.lr == 3e-4
    assert load_experiment(demo, ["optim.grad_clip=false"]).optim.grad_clip is None
    assert load_experiment(demo, ["grid.tokens=[409_600]"]).grid.tokens == (409_600,)
    for bad in ("optim.lr", "optim.lr=", "=3", "optim.lr=abc", "a b=1"):
        with pytest.raises(ConfigError, match="is not key=value"):
            load_experiment(demo, [bad])
    with pytest.raises(ConfigError, match=r"unknown key optim\.l;"):
        load_experiment(demo, ["optim.l=1"])
    with pytest.raises(ConfigError, match="is a value, not a table"):
        load_experiment(demo, ["seed.x=1"])


def test_values_are_frozen(data_dir: Path) -> None:
    experiment = parse_experiment(tiny_table(data_dir), where="x.toml")
    with pytest.raises(ValueError, match="frozen"):
        experiment.seed = 1  # type: ignore[misc]


def test_every_shipped_experiment_parses_and_keys_stay_few() -> None:
    files = sorted((ROOT / "launch/experiments").glob("*.toml"))
    assert files
    for path in files:
        assert load_experiment(path).name == path.stem
        tomllib.loads(path.read_text())
    assert len(list_keys(Experiment)) <= 80
