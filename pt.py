"""The research playbook's entry point: ``python pt.py --preset smoke --out out``.

The same as ``rxlm study run``; ``from pt import Trainer`` gives the stages one by one.
"""

from __future__ import annotations

import sys

from rxlm.cli.main import main
from rxlm.study.trainer import Trainer

__all__ = ["Trainer"]

if __name__ == "__main__":
    sys.exit(main(["study", "run", *sys.argv[1:]]))
