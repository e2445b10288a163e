"""When a step is compiled anew: nothing guards the code that was made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rxlm.rxt import decode_compile
from rxlm.rxt.decode_compile import compiled_step, signature
from rxlm.rxt.decode_step import StepInputs, decode_step
from rxlm.rxt.models import RxTAlpha

ModelBuilder = Callable[..., RxTAlpha]


def inputs_of(rows: int = 1, **changed: Any) -> StepInputs:
    ids, real = torch.ones(rows, 1, dtype=torch.long), torch.ones(rows, 1, dtype=torch.bool)
    return StepInputs(ids, real, None, None, (), None)._replace(**changed)


def test_all_that_code_takes_for_granted_makes_new_code(
    make_model: ModelBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches code that is called with other shapes, strides, types or threads than it was made
    for: it would read the wrong memory."""
    made: list[Any] = []

    def compile_it(step: Any, decoder: Any, inputs: Any) -> Any:
        made.append(signature(inputs))
        return step

    monkeypatch.setattr(decode_compile, "_compile", compile_it)
    monkeypatch.setattr(decode_compile, "check_compiler", lambda device: None)
    decoder = make_model().decoder.eval()

    def count(inputs: StepInputs) -> int:
        compiled_step(decode_step, decoder, inputs)
        return len(made)

    assert count(inputs_of()) == count(inputs_of()) == 1
    assert count(inputs_of(2)) == 2
    assert count(inputs_of(real=None)) == 3
    wide = torch.ones(1, 2, dtype=torch.float32)
    assert count(inputs_of(phases=wide)) == 4
    assert count(inputs_of(phases=wide.double())) == 5
    assert count(inputs_of(phases=torch.ones(1, 4)[:, ::2])) == 6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert count(inputs_of()) == 7
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert count(inputs_of()) == 8
    finally:
        torch.set_num_threads(threads)
    decoder.double()
    assert count(inputs_of()) == 9
    assert count(inputs_of(2)) == 10
    decoder.float()
    assert count(inputs_of()) == 10
