"""What every test shares: one torch thread, hypothesis profiles, hardware marks, real data."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import hypothesis
import pytest
import torch

# The suite runs in several processes: more threads in each only fight for the same cores.
torch.set_num_threads(1)

hypothesis.settings.register_profile("rxlm", deadline=None, max_examples=25)
hypothesis.settings.register_profile(
    "rxlm-ci", deadline=None, max_examples=25, derandomize=True, database=None
)
hypothesis.settings.load_profile("rxlm-ci" if os.environ.get("CI") else "rxlm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, the tests that need hardware or an extra that is not there."""
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    needs = {
        "gpu": (num_devices >= 1, "needs a CUDA device"),
        "multi_gpu": (num_devices >= 2, "needs two CUDA devices"),
        "deepspeed": (
            importlib.util.find_spec("deepspeed") is not None,
            "needs deepspeed: pip install 'reactive-lm[deepspeed]'",
        ),
    }
    for item in items:
        for mark, (is_met, reason) in needs.items():
            if item.get_closest_marker(mark) is not None and not is_met:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real dialogues and text that the environment variable RXLM_DATA names."""
    value = os.environ.get("RXLM_DATA")
    if not value:
        pytest.skip("needs real data: set RXLM_DATA to the folder that holds dialogues/ and text/")
    folder = Path(value)
    assert folder.is_dir(), f"RXLM_DATA={value} is not a folder"
    return folder
