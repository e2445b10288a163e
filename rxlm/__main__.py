"""``python -m rxlm``: the command line, for launchers that start a module (torchrun)."""

from __future__ import annotations

import sys

from rxlm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
