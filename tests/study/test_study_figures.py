"""Figures of a study whose measurements do not fit their axes."""

from __future__ import annotations

from pathlib import Path

from rxlm.study.figures import draw_study, png
from rxlm.study.results import ResultStore
from rxlm.study.settings import preset


def test_memory_too_little_to_be_seen(tmp_path: Path) -> None:
    """Catches a report that fails where a process held enough already: no resident memory is added
    at any length, and a logarithmic axis without a point cannot be drawn."""
    settings = preset("smoke")
    store = ResultStore(tmp_path)
    for name in settings.attention:
        for length in settings.memory_lens:
            row = {"attention": name, "seq_len": length, "counted_total_mb": 1.0, "total_mb": 0.0}
            store.add(f"memory/{name}/{length}", "memory", [row])
        row = {
            "attention": name, "seq_len": 64, "non_embedding": 1000, "step_time_ms": 1.0,
            "memory_mb": 0.0,
        }  # fmt: skip
        store.add(f"scaling/{name}", "scaling", [row])
    figures = draw_study(store, settings, {})
    for name in ("memory", "scaling"):
        assert png(figures[name])
        full, empty = figures[name].axes
        assert full.get_yscale() == "log"
        assert [text.get_text() for text in empty.texts] == ["too little to be seen"]
