"""The rows of a study as tables of text, for terminals and pages. No numbers are made here that
are not in the rows, but for medians, slopes and crossings of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rxlm.evaluation.tables import Table
from rxlm.study.bench import samples_by_length
from rxlm.study.claims import best_rows, shares_of, slopes_of
from rxlm.study.fits import find_crossover, mean_interval
from rxlm.study.gates import gates_table
from rxlm.study.mechanisms import title
from rxlm.study.results import OK, ResultStore, Row
from rxlm.study.settings import StudySettings

MISSING = "-"


def study_tables(store: ResultStore, settings: StudySettings) -> dict[str, list[Table]]:
    """Return the tables by section, those that there are rows for."""
    found: dict[str, list[Table]] = {
        "gates": _gates(store),
        "efficiency": [*_times(store, settings, "efficiency", "step", "Training step")],
        "latency": [
            *_times(store, settings, "prefill", "prefill", "Prefill: time to the first token"),
            *_times(store, settings, "decode", "decode", "Decoding: one token after a context"),
        ],
        "operator": [
            *_times(store, settings, "op", "forward+backward", "Operator, forward and backward"),
            *slope_tables(store, settings),
        ],
        "memory": [*_memory(store, settings)],
        "tasks": [*_tasks(store, settings)],
        "ppl": [*_perplexity(store, settings)],
        "scaling": [*_scaling(store, settings)],
        "profile": [*_profile(store)],
        "outcomes": [*_outcomes(store)],
    }
    return {name: tables for name, tables in found.items() if tables}


def _gates(store: ResultStore) -> list[Table]:
    rows = store.rows("gate", outcome=OK) + store.rows("gate", outcome="failed")
    # An error that is not finite was written as null.
    shown = [{**row, "error": float("inf") if row["error"] is None else row["error"]}
             for row in rows if "gate" in row]  # fmt: skip
    shown.sort(key=lambda row: list(dict.fromkeys(r["attention"] for r in rows)).index(
        row["attention"]))  # fmt: skip
    return [gates_table(shown)] if shown else []


def _times(
    store: ResultStore, settings: StudySettings, kind: str, phase: str, name: str
) -> Iterator[Table]:
    rows = [row for row in store.rows(kind, phase=phase) if row.get("step_time_ms")]
    lengths = sorted({row["seq_len"] for row in rows})
    if not rows:
        return
    body = []
    for attention in settings.attention:
        cells = []
        for length in lengths:
            chosen = [
                row for row in rows if (row["attention"], row["seq_len"]) == (attention, length)
            ]
            cells.append(_time_cell(chosen[0]) if chosen else MISSING)
        backends = {row["backend"] for row in rows if row["attention"] == attention}
        body.append((title(attention), *cells, ", ".join(sorted(backends))))
    counts = [row["n"] for row in rows]
    note = (
        f"Median ms of {min(counts)} to {max(counts)} interleaved rounds; in brackets the time "
        f"over that of {title(settings.baseline)} in the same rounds with its 95 % interval, * "
        "where that holds 1. Quartiles, other phases and raw samples: results/, results.jsonl."
    )
    header = ("mechanism", *(f"{length:,} tokens" for length in lengths), "backend")
    yield Table(name, header, body, note)


def _time_cell(row: Row) -> str:
    text = f"{row['step_time_ms']:.3g}"
    if row["outcome"] != OK:
        return f"{text} (once)"
    if row.get("ratio") is None:
        return text
    low, high = row["ratio_low"], row["ratio_high"]
    unsure = "*" if low <= 1 <= high else ""
    return f"{text} ({row['ratio']:.2f} [{low:.2f}, {high:.2f}]{unsure})"


def slope_tables(store: ResultStore, settings: StudySettings) -> Iterator[Table]:
    """Yield the table of exponents and crossings."""
    kinds = {
        "operator time": ("op", "step_time_ms", {"phase": "forward+backward"}),
        "prefill time": ("prefill", "step_time_ms", {"phase": "prefill"}),
        "decode time": ("decode", "step_time_ms", {"phase": "decode"}),
        "memory, counted": ("memory", "counted_total_mb", {}),
        "memory, resident": ("memory", "total_mb", {}),
        "memory, saved": ("memory", "saved_mb", {}),
    }
    body = []
    base = samples_by_length(store.rows("op"), settings.baseline, phase="forward+backward")
    for what, (kind, column, wanted) in kinds.items():
        for name, slope in slopes_of(store, settings, kind, column, **wanted).items():
            crossing = MISSING
            if kind == "op" and name != settings.baseline:
                own = samples_by_length(store.rows("op"), name, phase="forward+backward")
                found = find_crossover(own, base)
                crossing = MISSING if found is None else found.words
            body.append((
                what, title(name), f"{slope.slope:.2f} [{slope.low:.2f}, {slope.high:.2f}]",
                f"{slope.r_squared:.3f}", f"{slope.theil_sen:.2f}", f"{slope.asymptotic:.2f}",
                slope.verdict, crossing,
            ))  # fmt: skip
    if body:
        header = (
            "of", "mechanism", "slope", "R2", "Theil-Sen", "last doublings", "verdict",
            f"cheaper than {title(settings.baseline)} from",
        )  # fmt: skip
        note = "Exponents over the upper decade of lengths, least squares, 95 % intervals."
        yield Table("Slopes and crossings", header, body, note, prose=True)


def _memory(store: ResultStore, settings: StudySettings) -> Iterator[Table]:
    rows = store.rows("memory")
    lengths = sorted({row["seq_len"] for row in rows})
    for column, name in (
        ("counted_total_mb", "Memory of the operator, forward and backward, counted (MB)"),
        ("total_mb", "The same, resident set of a fresh process (MB)"),
    ):
        body = []
        for attention in settings.attention:
            cells = []
            for length in lengths:
                chosen = [r for r in rows if (r["attention"], r["seq_len"]) == (attention, length)]
                cells.append(_memory_cell(chosen[0], column) if chosen else MISSING)
            body.append((title(attention), *cells))
        if rows:
            yield Table(name, ("mechanism", *(f"{n:,} tokens" for n in lengths)), body)


def _memory_cell(row: Row, column: str) -> str:
    if row["outcome"] == "oom":
        fits = row.get("largest_length")
        return "oom" + (f" (fits: {fits:,})" if fits else "")
    value = row.get(column)
    return MISSING if value is None else f"{value:.3g}"


def _tasks(store: ResultStore, settings: StudySettings) -> Iterator[Table]:
    for task in dict.fromkeys(row["task"] for row in store.rows("task") if row.get("task")):
        rows = best_rows(store, task)
        sizes = sorted({row["size"] for row in rows})
        body = []
        for name in settings.attention:
            own = [row for row in rows if row["attention"] == name]
            if not own:
                continue
            cells = []
            for size in sizes:
                share = shares_of(own, size)[name]
                cells.append(f"{share.value:.1f} [{share.low:.1f}, {share.high:.1f}]")
            hardest = [row["accuracy"] for row in own if row["size"] == sizes[-1]]
            exact = [row["exact_match"] for row in own if row["size"] == sizes[-1]]
            every = [
                row["accuracy"]
                for row in store.rows("task", task=task, attention=name)
                if row["outcome"] == OK and row["size"] == sizes[-1]
            ]
            body.append((
                title(name), *cells, f"{sum(exact) / len(exact):.1f}",
                f"{min(hardest):.1f} to {max(hardest):.1f}",
                f"{min(every):.1f} to {max(every):.1f}",
                f"{max(row['steps'] for row in own):,}",
                f"{sum({row['seed']: row['train_seconds'] for row in own}.values()):.0f}",
            ))  # fmt: skip
        if not body:
            continue
        chance = {row["size"]: row["chance"] for row in rows}
        dashes = (MISSING,) * 5
        body.append(("chance", *(f"{chance[size]:.1f}" for size in sizes), *dashes))
        header = (
            "mechanism", *(f"size {size}" for size in sizes), "whole rows", "by seed",
            "over rates and seeds", "steps", "seconds",
        )  # fmt: skip
        note = (
            "Right tokens in % with 95 % Wilson intervals, pooled over seeds, of the learning rate "
            "with the best validation; the last columns are of the largest size."
        )
        yield Table(f"Task {task}", header, body, note)


def _perplexity(store: ResultStore, settings: StudySettings) -> Iterator[Table]:
    body = []
    source: dict[str, Any] = {}
    for name in settings.attention:
        rows = [row for row in store.rows("ppl", attention=name) if row["outcome"] == OK]
        if not rows:
            continue
        source = rows[0]
        ppl, bits = ([row[column] for row in rows] for column in ("final_ppl", "bits_per_byte"))
        loss = mean_interval(rows[0]["samples"])
        body.append((
            title(name), f"{_mean(ppl):.4g}", f"{min(ppl):.4g} to {max(ppl):.4g}",
            f"{min(row['best_ppl'] for row in rows):.4g}", f"{_mean(bits):.4f}",
            f"{loss.value:.4f} [{loss.low:.4f}, {loss.high:.4f}]", f"{len(rows)}",
            f"{_mean([row['tokens_per_second'] for row in rows]):,.0f}",
        ))  # fmt: skip
    if body:
        header = (
            "mechanism", "perplexity", "by seed", "best", "bits per byte",
            "loss of the first seed (nats)", "seeds", "tokens/s",
        )  # fmt: skip
        note = (
            f"{source['source']}, {source['vocab_size']:,} {source['tokens']} tokens, "
            f"{source['unknown_rate']:.2%} of the validation unknown; {source['steps']:,} updates. "
            "Tokens/s are of trainings beside one another."
        )
        yield Table("Perplexity", header, body, note)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _scaling(store: ResultStore, settings: StudySettings) -> Iterator[Table]:
    rows = [row for row in store.rows("scaling") if row.get("step_time_ms")]
    if not rows:
        return
    body = [
        (
            title(row["attention"]), f"{row['target_params']:,}", f"{row['non_embedding']:,}",
            f"{row['non_embedding'] / row['target_params'] - 1:+.2%}", f"{row['hidden_size']}",
            f"{row['num_layers']}", f"{row['step_time_ms']:.3g}", f"{row['throughput']:,.0f}",
            f"{row['memory_mb']:.3g}",
        )
        for row in sorted(
            rows,
            key=lambda row: (row["target_params"], settings.attention.index(row["attention"])),
        )
        if row["attention"] in settings.attention
    ]  # fmt: skip
    header = ("mechanism", "target", "parameters", "of target", "D", "layers", "ms a step",
              "tokens/s", "MB")  # fmt: skip
    yield Table("Scaling of the model", header, body)


def _profile(store: ResultStore) -> Iterator[Table]:
    rows = [row for row in store.rows("profile") if row["outcome"] == OK]
    if not rows:
        return
    body = [
        (
            title(row["attention"]), row["time_of"], f"{row['wall_ms']:.3g}",
            f"{row['profiled_wall_ms']:.3g}", f"{row['cpu_time_ms']:.3g}",
            MISSING if row["cuda_time_ms"] is None else f"{row['cuda_time_ms']:.3g}",
            f"{row['outside_operators_ms']:.3g}", f"{row['num_operators']:,}", row["top"],
        )
        for row in rows
    ]  # fmt: skip
    header = ("mechanism", "time of", "ms a step", "with profiler", "CPU self ms", "CUDA self ms",
              "between operators", "operators", "most time")  # fmt: skip
    note = (
        "Self times of one training step. Traces, tables, stacks and flame graphs: "
        "profiler_results/."
    )
    yield Table("Profile", header, body, note, prose=True)


def _outcomes(store: ResultStore) -> Iterator[Table]:
    rows = [row for row in store.rows() if row["outcome"] != OK]
    if rows:
        body = [
            (
                row["kind"], title(str(row.get("attention"))),
                ", ".join(f"{key} {row[key]}" for key in ("seq_len", "task", "seed",
                          "target_params", "gate") if row.get(key) is not None),
                row["outcome"], row["reason"],
            )
            for row in rows
        ]  # fmt: skip
        header = ("measurement", "mechanism", "where", "outcome", "reason")
        yield Table("What could not be measured", header, body, prose=True)
