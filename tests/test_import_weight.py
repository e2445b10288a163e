"""Importing the light parts of the package, and asking for help, must not load torch.

Each case runs in a fresh interpreter: in this one torch is long since imported.
"""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import rxlm.cli

HEAVY = ("torch", "matplotlib", "tensorboard", "pyarrow", "datasets", "numpy")
# numpy is allowed where text is handled; torch is allowed in none of these.
LIGHT_MODULES = (
    "rxlm",
    "rxlm.errors",
    "rxlm.configuration",
    "rxlm.tokenization",
    "rxlm.data",
    "rxlm.training.recipe",
)


def loaded_modules(code: str) -> set[str]:
    """Run ``code`` in a fresh interpreter; return which heavy modules it has loaded at the end."""
    report = f"import sys; print('loaded', *(set(sys.modules) & set({HEAVY!r})))"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1].split()
    assert last[0] == "loaded"
    return set(last[1:])


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_light_module_imports_no_torch(module: str) -> None:
    """Catches a top-level torch import, or an __init__ that pulls in a tensor file."""
    assert "torch" not in loaded_modules(f"import {module}")


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Catches an __init__ that starts to re-export things: `import rxlm` must stay instant."""
    assert loaded_modules("import rxlm") == set()


def test_every_cli_module_is_light() -> None:
    """Catches a verb that imports a heavy library at the top instead of inside its command."""
    names = [f"rxlm.cli.{module.name}" for module in pkgutil.iter_modules(rxlm.cli.__path__)]
    assert "rxlm.cli.main" in names
    assert loaded_modules("\n".join(f"import {name}" for name in names)) == set()


def test_help_imports_nothing_heavy() -> None:
    """Catches a verb whose registration, not its import, loads torch: help would take seconds."""
    code = "from rxlm.cli.main import main; assert main(['--help']) == 0"
    assert loaded_modules(code) == set()


def test_python_m_rxlm_starts_the_command_line() -> None:
    """Catches a broken __main__, which torchrun needs and nobody else would notice."""
    result = subprocess.run(
        [sys.executable, "-m", "rxlm", "--version"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, f"rxlm {rxlm.__version__}\n")
