"""Freed memory stays with the process: large blocks cause no page faults once they were used."""

import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """
import resource, sys, torch
from harness.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for step in range(60):
    if step == 40:  # by then the heap has found its size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(16_000_000).fill_(1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_kept_memory_is_not_faulted_in_again() -> None:
    faults = {}
    for mode in ("keep", "default"):
        command = [sys.executable, "-c", PROGRAM, mode]
        faults[mode] = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert faults["default"] > 4 * (faults["keep"] + 10), faults
