"""Progress: rates and time left, a bar on a terminal and plain lines elsewhere."""

import os
import pty
import subprocess
import sys

from conftest import ROOT

from data_prep import meter as meter_module
from data_prep.meter import Meter, metered


def test_a_line_says_rates_and_time_left():
    meter = Meter("map", n_units=40, n_done=10)
    meter.advance(30_000_000, 8_000_000, 10)
    line = meter.line(meter.started + 2.0)
    assert line == "map: 20 of 40 units, 30 MB at 15.0 MB/s, 4.00 M tokens/s, 4 s left"
    assert "left" not in Meter("map", 40).line(0.0), "nothing is known before a unit is done"


def test_without_a_terminal_lines_come_now_and_then(capsys, monkeypatch):
    with metered("map", 4) as meter:
        meter.advance(1, 1, 1)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(meter_module, "PLAIN_EVERY_S", 0.0)
        meter.advance(1, 1, 1)
    err = capsys.readouterr().err
    assert err.startswith("map: 2 of 4 units")
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_on_a_terminal_there_is_a_bar():
    script = (
        "import time\nfrom data_prep.meter import metered\n"
        "with metered('map', 4) as meter:\n    meter.advance(10**6, 10**5, 2)\n    time.sleep(0.5)\n"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", script], stderr=theirs, cwd=ROOT, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    assert process.wait(20) == 0
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "2 of 4 units" in shown
    assert "\x1b[" in shown
