"""The README is true: its commands parse, its tree is the tree, its links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
INLINE = re.findall(r"`((?:python -m|make|torchrun) [^`\n]+)`", README)
COMMANDS = [line.split("#")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()] + INLINE
VERBS = [command for command in COMMANDS if command.startswith("python -m") and "<verb>" not in command]
TARGETS = [command for command in COMMANDS if command.startswith("make ")]


def test_the_readme_has_commands() -> None:
    assert len(VERBS) >= 15
    assert {"make demo", "make test"} <= set(TARGETS)


def run_python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("command", sorted(set(VERBS)))
def test_every_command_parses(command: str, tmp_path: Path) -> None:
    """The sub-command exists, knows every option that the README gives it, and refuses one that it does not know."""
    words = shlex.split(command)[2:]
    module, verb, options = words[0], words[1], [word.split("=")[0] for word in words if word.startswith("--")]
    result = run_python("-m", module, verb, "--help")
    assert result.returncode == 0, result.stderr
    for option in options:
        assert option in result.stdout, f"{command}: {option} is not an option of {module} {verb}"
    for word in words:
        if word.startswith("launch/") or (word.endswith(".toml") and "/" in word):
            assert (ROOT / word).exists(), word
    assert run_python("-m", module, verb, "--no-such-option", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize("target", sorted({command.split()[1] for command in TARGETS}))
def test_every_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_tree_is_the_tree() -> None:
    """Every module stands in the README's tree, and everything in the tree exists."""
    (tree,) = [text for kind, text in BLOCKS if kind == "" and text.startswith("README.md")]
    told, folder = set(), ""
    for line in tree.splitlines():
        names = line.split("  ")[0].split() if not line.startswith(" ") else [folder + line.split()[0]]
        told |= {name for name in names if name not in ("data/", "runs/")}
        if line[0] != " " and names[0].endswith("/"):
            folder = names[0]
    assert {name for name in told if not (ROOT / name).exists()} == set()
    modules = {
        str(path.relative_to(ROOT))
        for package in ("model", "data_prep", "harness", "launch", "results")
        for path in (ROOT / package).glob("*.py")
        if not path.stem.startswith("__")
    }
    assert modules - told == set()


def test_links_lead_somewhere() -> None:
    for path in ("README.md", "CONTRIBUTING.md", "DECISIONS.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / path).read_text()):
            if not target.startswith("http"):
                assert (ROOT / target.split("#")[0]).exists(), f"{path}: {target}"


def test_nothing_names_a_machine() -> None:
    """No absolute path of a developer's machine, no token of a notebook, in any tracked text file."""
    listing = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout: there is no list of tracked files")
    pattern = re.compile(r"(?<![\w.])/(?:home|Users|root|work)/\w")
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".json", ".csv", ".html", ".j2", ".svg") and path.exists():
            assert not pattern.search(path.read_text()), name


def test_help_is_quick() -> None:
    """Under 0.3 s on an idle machine; the bound here leaves room for a busy one."""
    import time

    for verb in ("data_prep", "model", "harness", "launch", "results"):
        best = 9.0
        for _ in range(3):
            started = time.perf_counter()
            run_python("-m", verb, "--help")
            best = min(best, time.perf_counter() - started)
        assert best < 0.6, f"python -m {verb} --help took {best:.2f} s"
