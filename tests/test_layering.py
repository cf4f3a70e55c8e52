"""Who may import whom, and where heavy libraries may be loaded: read with `ast`, not believed."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGES = ("model", "data_prep", "harness", "launch", "results")
MAY_IMPORT = {
    "model": set(),
    "data_prep": set(),
    "harness": {"model", "data_prep"},
    "launch": {"harness", "data_prep"},
    "results": {"harness", "model", "data_prep"},
}
# Another package may import these of `harness`, and nothing else: they load no torch.
TORCH_FREE_HARNESS = {
    "accelerators",
    "attempt",
    "config",
    "confounds",
    "console",
    "cost",
    "ending",
    "estimate",
    "grid",
    "lint",
    "outlook",
    "plan",
    "records",
    "runs",
    "schedule",
    "zero",
}
TORCH_FREE_MODEL = {"size", "ladder", "parametrization"}
# From data_prep, launch and results take only the type of its errors.
DATA_PREP_FOR_OTHERS = {"shards"}
ONLY_IN = {
    "pandas": {"results"},
    "scipy": {"results"},
    "matplotlib": {"results"},
    "jinja2": {"results"},
    "torch": {"harness", "model"},
}


def iter_imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield every imported module of a file, and whether the import stands at its top level."""
    tree = ast.parse(path.read_text())
    top = set(ast.walk(ast.Module(body=[n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)])))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or "", node in top


FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stay_inside_the_walls(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for module, _ in iter_imports(path):
        first, *rest = module.split(".")
        if first in PACKAGES and first != package:
            assert first in MAY_IMPORT[package], f"{path} imports {module}"
            if package in ("launch", "results"):
                allowed = {
                    "harness": TORCH_FREE_HARNESS,
                    "model": TORCH_FREE_MODEL,
                    "data_prep": DATA_PREP_FOR_OTHERS,
                }[first]
                assert rest[0] in allowed, f"{path} imports {module}"
        assert package in ONLY_IN.get(first, {package}), f"{path} imports {module}"
        if first == "torch" and package == "model":
            assert path.stem not in TORCH_FREE_MODEL
        if first == "torch" and package == "harness":
            assert path.stem not in TORCH_FREE_HARNESS


def test_module_names_are_unique() -> None:
    names = [path.stem for path in FILES if not path.stem.startswith("__")]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)


def run_blocked(blocked: list[str], *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m ...` in a process where importing the blocked modules fails."""
    hook = (
        "import sys, runpy\n"
        f"blocked = {blocked!r}\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in blocked: raise ImportError(f'{name} is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        f"sys.argv = {list(arguments)!r}\n"
        f"runpy.run_module({arguments[0]!r}, run_name='__main__', alter_sys=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", hook], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_planning_works_without_torch(data_dir: Path, tmp_path: Path) -> None:
    from test_end_to_end import write_toml

    toml = write_toml(tmp_path, data_dir)
    result = run_blocked(["torch", "deepspeed", "pandas", "scipy"], "harness", "plan", str(toml), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs/tiny/plan.json").exists()
    refused = run_blocked(["pydantic"], "harness", "plan", str(toml), cwd=tmp_path)
    assert "pydantic is blocked" in refused.stderr, "the block itself must work"


@pytest.mark.parametrize("package", PACKAGES)
def test_help_is_light(package: str, tmp_path: Path) -> None:
    heavy = ["torch", "deepspeed", "pandas", "scipy", "matplotlib", "numpy"]
    result = run_blocked(heavy, package, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout
