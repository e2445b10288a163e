"""``--help`` of every verb, at once and without torch."""

from __future__ import annotations

import subprocess
import sys

from rxlm.cli.main import VERBS, Invocation, build_app

CODE = """
import sys, typer.main
from rxlm.cli.main import Invocation, build_app, main
command = typer.main.get_command(build_app(Invocation()))
lines = [[]]
for verb, sub in command.commands.items():
    lines += [[verb], *([verb, name] for name in getattr(sub, "commands", {}))]
for words in lines:
    assert main([*words, "--help"]) == 0, words
print("loaded", sorted({"torch", "numpy", "tokenizers"} & set(sys.modules)))
"""


def test_help_of_no_verb_imports_torch() -> None:
    """Catches an import at the top of a verb, or in its options, that makes help take seconds."""
    result = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "loaded []"
    for verb in VERBS:
        assert f"Usage: rxlm {verb}" in result.stdout


def test_every_verb_is_registered_once() -> None:
    """Catches two modules that register the same name: the second would win silently."""
    app = build_app(Invocation())
    names = [info.name for info in (*app.registered_commands, *app.registered_groups)]
    assert sorted(map(str, names)) == sorted(VERBS)
