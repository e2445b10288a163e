"""A short run of ``scripts/serve_fault_test.py``: killed while it serves, nothing is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "serve_fault_test.py"


def test_a_killed_server_has_every_acknowledged_turn() -> None:
    """Fails if a turn is acknowledged before it is on disk, or an opening throws one away."""
    found = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "2", "--sessions", "6"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "nothing lost: 2 kills" in found.stdout
