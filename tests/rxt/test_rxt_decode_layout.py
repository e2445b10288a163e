"""Matrices kept by columns: the same parameters, answers and files, and training that goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rxlm.ops.sampling import GREEDY
from rxlm.rxt import decode_layout
from rxlm.rxt.decode_layout import keep_by_columns
from rxlm.rxt.models import RxTAlpha
from rxlm.storage.weights import weights_fingerprint

ModelBuilder = Callable[..., RxTAlpha]


@pytest.mark.parametrize("tied", [True, False])
def test_nothing_changes_but_the_order_in_memory(
    tied: bool, make_model: ModelBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches values that move, parameters that are replaced or no longer shared, an output layer
    that is left out, and files that hold another order."""
    monkeypatch.setattr(decode_layout, "SMALL", 0)
    model = make_model(tie_embeddings=tied)
    decoder = model.decoder
    before = {name: item.detach().clone() for name, item in decoder.named_parameters()}
    parameters = {name: id(item) for name, item in decoder.named_parameters()}
    digest = weights_fingerprint(model)
    prompts = [[2, 5, 40, 41, 6]]
    answers = model.generate(model.new_conversation(1, seed=1), prompts, GREEDY).answers
    model.save_pretrained(tmp_path / "rows")
    with torch.inference_mode():
        keep_by_columns(decoder)
    head = decoder.embedding.weight if tied else decoder.head_weight
    linear = [part.weight for part in decoder.modules() if isinstance(part, nn.Linear)]
    assert all(weight.stride() == (1, len(weight)) for weight in (head, *linear))
    assert {name: id(item) for name, item in decoder.named_parameters()} == parameters
    for name, item in decoder.named_parameters():
        assert torch.equal(item, before[name]), name
    assert weights_fingerprint(model) == digest
    assert model.generate(model.new_conversation(1, seed=1), prompts, GREEDY).answers == answers
    model.save_pretrained(tmp_path / "columns")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("rows", "columns"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_small_matrices_stay_by_rows(make_model: ModelBuilder) -> None:
    """Catches matrices that are read along their rows by sums, and lie across."""
    decoder = make_model().decoder
    keep_by_columns(decoder)
    assert all(item.is_contiguous() for item in decoder.parameters())


def test_what_was_laid_out_can_be_trained(
    make_model: ModelBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches weights that came out of inference mode, and an optimizer that mixes up the order."""
    monkeypatch.setattr(decode_layout, "SMALL", 0)
    rows, columns = make_model(), make_model()
    columns.load_state_dict(rows.state_dict())
    with torch.inference_mode():
        keep_by_columns(columns.decoder)

    def trained(model: Any) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3, fused=True)
        ids, mask = torch.tensor([[2, 5, 40, 41, 6]]), torch.ones(1, 5, dtype=torch.bool)
        for _ in range(3):
            memory = model.decoder.read_memory(model.new_conversation(1).slots)
            hidden, _ = model.decoder(ids, mask, memory=memory)
            model.decoder.logits(hidden).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    for model in (rows, columns):
        trained(model)
    for left, right in zip(rows.parameters(), columns.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
