"""One smoke study that the tests of this folder look at, and helpers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rxlm.cli.main import main
from rxlm.study.runner import Study
from rxlm.study.settings import preset

TINY_TEXT = {
    "seq_len": 16, "batch_tokens": 64, "steps": 4, "validate_every": 2, "validation_tokens": 128,
    "vocab_size": 60,
}  # fmt: skip
TINY_TASK = {
    "sizes": (2,), "vocab_size": 16, "steps": 4, "tokens_per_step": 64, "validate_every": 2,
    "test_rows": 8,
}  # fmt: skip
TINY = {
    "params": 12_000, "head_dim": 8, "dim": 16, "tolerance": 0.02, "seq_lens": (16, 32),
    "contexts": (8, 16), "op_lens": (16, 32, 64), "memory_lens": (32, 64, 128),
    "batch_tokens": 32, "scale_params": (12_000,), "scale_tolerance": 0.05, "profile_len": 16,
    "text": TINY_TEXT, "timing": {"rounds": 2, "fewest_rounds": 2, "group_seconds": 0.2},
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of the smoke study in one process, so that it runs once."""
    for item in items:
        if "smoke" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("smoke study"))


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``rxlm study run --preset smoke``."""
    folder = tmp_path_factory.mktemp("study") / "smoke"
    status = main(["study", "run", "--preset", "smoke", "--out", str(folder)])
    assert status == 0
    return folder


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """What a tiny study changes of the smoke preset, and the settings of a tiny task (``task``)."""
    return {**TINY, "task": TINY_TASK}


@pytest.fixture(scope="session")
def tiny_study() -> Callable[..., Study]:
    """Return a builder of studies of two mechanisms that take a second or two a stage."""

    def build(folder: Path, **changes: Any) -> Study:
        values = {"attention": ("softmax", "gated_deltanet"), "tasks": {"mqar": TINY_TASK}, **TINY}
        return Study(preset("smoke", **{**values, **changes}), folder)

    return build
