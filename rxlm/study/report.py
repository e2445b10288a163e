"""All files that are made of a study's rows: tables, figures, curves, pages, TensorBoard.

Made anew from ``results.jsonl`` and the run folders whenever asked; nothing is measured here.
"""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rxlm.evaluation.pages import Block, Heading, Picture, render_html, render_markdown
from rxlm.evaluation.tables import Table
from rxlm.storage.files import json_bytes, read_json, write_bytes
from rxlm.study.calibration import calibration_table
from rxlm.study.claims import OPPOSITE, Claim, best_rows, claims_of, claims_table
from rxlm.study.figures import caption_of, draw_study, pdf, png
from rxlm.study.manifest import MANIFEST_FILE, open_settings
from rxlm.study.mechanisms import title
from rxlm.study.results import OK, ResultStore, csv_text, write_tables
from rxlm.study.runner import MODELS_FILE
from rxlm.study.settings import StudySettings
from rxlm.study.tables import study_tables
from rxlm.study.training import RUNS, read_history

HISTORY_FILE = "history.json"
SECTIONS = {
    "claims": "Claims",
    "gates": "Before any number",
    "models": "Models of equal size",
    "tasks": "Synthetic tasks",
    "ppl": "Perplexity",
    "efficiency": "Training",
    "latency": "Prefill and decoding",
    "operator": "The operator, slopes and crossings",
    "memory": "Memory",
    "scaling": "Scaling",
    "profile": "Profile",
    "outcomes": "Outcomes",
}
"""Section of the report -> its heading, in reading order."""
_FIGURES_OF = {
    "claims": ("ratio_comparison",),
    "tasks": ("associative_recall", "copy_task"),
    "ppl": ("perplexity", "training_curves"),
    "efficiency": ("efficiency",),
    "latency": ("latency",),
    "operator": ("complexity",),
    "memory": ("memory",),
    "scaling": ("scaling",),
    "profile": ("profiler_summary",),
}


class StudyReport:
    """What a study folder says."""

    def __init__(self, folder: str | Path) -> None:
        """Read it.

        Raises:
            UserError: if there is no study in the folder.
        """
        self.folder = Path(folder)
        self.settings: StudySettings = open_settings(folder)
        self.manifest = read_json(self.folder / MANIFEST_FILE)
        self.store = ResultStore(self.folder)
        models = self.folder / MODELS_FILE
        found = read_json(models)["models"] if models.is_file() else {}
        self.models: list[dict[str, Any]] = list(found.values())
        self.claims: list[Claim] = claims_of(self.store, self.settings)

    def section_tables(self) -> dict[str, list[Table]]:
        """Return the tables by section, in reading order."""
        tables = study_tables(self.store, self.settings)
        tables["claims"] = [claims_table(self.claims)]
        if self.models:
            tables["models"] = [calibration_table(self.models)]
        return {name: tables[name] for name in SECTIONS if name in tables}

    def history(self) -> dict[str, Any]:
        """Return the curves of all trainings, by ``mechanism/what/seed``."""
        found = {}
        for run in sorted((self.folder / RUNS).glob("*/config.yaml")):
            from rxlm.training.recipe import load_mapping

            job = load_mapping(run)["study"]
            what = job["task"] or "pretrain"
            name = f"{job['attention']}/{what}/seed{job['seed']}/lr{job['learning_rate']:g}"
            about = {"attention": job["attention"], "what": what, "seed": job["seed"]}
            found[name] = {**about, **read_history(run.parent)}
        return found

    def write(self) -> list[Path]:
        """Write everything; returns the pages."""
        history = self.history()
        results = self.folder / "results"
        write_tables(self.store, results)
        for folder in (self.folder, results):
            write_bytes(folder / HISTORY_FILE, json_bytes(history))
        if (self.folder / MODELS_FILE).is_file():
            shutil.copyfile(self.folder / MODELS_FILE, results / MODELS_FILE)
        self._write_profile_summary()
        drawn = draw_study(self.store, self.settings, history)
        figures = self.folder / "figures"
        figures.mkdir(exist_ok=True)
        pictures = {}
        for name, figure in drawn.items():
            pictures[name] = png(figure)
            write_bytes(figures / f"{name}.png", pictures[name])
            write_bytes(figures / f"{name}.pdf", pdf(figure))
        blocks = list(self.blocks(set(pictures)))
        pages = [self.folder / "report.md", self.folder / "report.html"]
        write_bytes(pages[0], render_markdown(self._title(), blocks).encode("utf-8"))
        write_bytes(pages[1], render_html(self._title(), blocks, pictures).encode("utf-8"))
        self._write_metrics()
        write_tensorboard(self.folder / "tb", self.store, history)
        return pages

    def publish(self, folder: Path, name: str) -> Path:
        """Write the page and its figures where the docs keep them; returns the page."""
        drawn = draw_study(self.store, self.settings, self.history())
        (folder / name).mkdir(parents=True, exist_ok=True)
        for figure_name, figure in drawn.items():
            write_bytes(folder / name / f"{figure_name}.png", png(figure))
        page = folder / f"{name}.md"
        text = render_markdown(self._title(), self.blocks(set(drawn)), name)
        write_bytes(page, text.encode("utf-8"))
        return page

    def blocks(self, pictures: set[str]) -> Iterator[Block]:
        """Yield the content of the page, in reading order."""
        yield self._about()
        yield self._verdict()
        sections = self.section_tables()
        for name, heading in SECTIONS.items():
            shown = [figure for figure in _FIGURES_OF.get(name, ()) if figure in pictures]
            if name == "tasks":
                shown += sorted(figure for figure in pictures if figure.startswith("task_"))
            if name not in sections and not shown:
                continue
            yield Heading(heading)
            if name == "models":
                yield self._matched()
            for figure in shown:
                yield Picture(figure, caption_of(figure))
            yield from sections.get(name, ())
        yield Heading("How it was measured")
        yield from self._provenance()

    def _title(self) -> str:
        return f"Attention mechanisms at equal parameters ({self.settings.preset})"

    def _about(self) -> str:
        settings, names = self.settings, [title(name) for name in self.settings.attention]
        return (
            f"{len(names)} mechanisms ({', '.join(names)}) in models of "
            f"{settings.params:,} parameters without embeddings, within {settings.tolerance:.0%} "
            f"of one another. Made by '{command_of(self.manifest)}' on "
            f"{self.manifest['hardware']['machine']}."
        )

    def _verdict(self) -> str:
        failed = [row for row in self.store.rows("gate") if not row.get("passed", True)]
        gates = (
            f"{len(failed)} validity gates FAILED: what those mechanisms show is not comparable. "
            if failed
            else "All validity gates hold. "
            if self.store.rows("gate")
            else "The validity gates were not run. "
        )
        counts = {
            verdict: sum(claim.verdict == verdict for claim in self.claims)
            for verdict in ("supported", "not supported", "not testable here")
        }
        text = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        recall = [claim for claim in self.claims if claim.test.startswith("MQAR")]
        against = [
            f"{claim.claim} ({claim.effect})" for claim in recall if OPPOSITE in claim.effect
        ]
        order = ""
        if recall:
            sure = sum(claim.verdict == "supported" for claim in recall)
            order = f" On MQAR {sure} of {len(recall)} pairs show the published order; " + (
                f"against it: {'; '.join(against)}." if against else "none contradicts it."
            )
        return f"{gates}Of {len(self.claims)} claims: {text}.{order}"

    def _matched(self) -> str:
        settings = self.settings
        convolution = (
            f"a short convolution of {settings.conv_size} tokens for every mechanism (those that "
            "are published without one get one in front)"
            if settings.equal_convolution
            else "short convolutions for those mechanisms only that are published with one"
        )
        return (
            "Equal for all: width, depth, heads, vocabulary, RMS norms before every part, SwiGLU "
            "feed-forward networks (whose width makes up for the mixers), no dropout, "
            f"{convolution}. Rotary positions in softmax and window attention (window "
            f"{settings.window}); recurrences and feature maps know no positions. States are not "
            "equal: see the column."
        )

    def _provenance(self) -> Iterator[Block]:
        manifest = self.manifest
        environment, hardware = manifest["environment"], manifest["hardware"]
        git = manifest["git"]
        facts = [
            ("commands", "; ".join(dict.fromkeys(
                " ".join(_shown(item["command"])) for item in manifest["sessions"]))
                or command_of(manifest)),
            ("wall time", f"{manifest['wall_seconds'] / 60:.1f} minutes in "
             f"{max(1, len(manifest['sessions']))} session(s)"),
            ("machine", hardware["machine"]),
            ("device, type", f"{self.settings.device}, {self.settings.dtype}"),
            ("threads", f"{hardware['threads'] or 'as torch chooses'} when timing, one a training, "
             f"{self.settings.processes} trainings at a time"),
            ("load average", self._loads()),
            ("versions", f"rxlm {environment['rxlm']}, torch {environment['packages']['torch']}, "
             f"Python {environment['python']}"),
            ("git", f"{git['sha'] or 'unknown'}{' (changed)' if git['dirty'] else ''}"),
            ("seeds", ", ".join(map(str, manifest["seeds"]))),
        ]  # fmt: skip
        if manifest.get("data"):
            data = manifest["data"]
            counts = f"{data['train_tokens']:,} and {data['valid_tokens']:,} tokens"
            facts.append(("text", f"{data['source']}, sha256 {data['sha256'][:16]}, {counts}"))
        yield Table("This run", ("", "value"), facts, prose=True)
        yield (
            "Times: all mechanisms of a length in interleaved rounds, in an order drawn anew, "
            f"until the quartiles lie within {self.settings.timing.target_spread:.0%} of the "
            f"median or {self.settings.timing.group_seconds:g} s are over; ratios within rounds; "
            "intervals by bootstrap. Memory: operator alone, one sequence. Tasks: loss on answers "
            "only, test rows are never trained on; intervals are over questions, not over seeds."
        )

    def _loads(self) -> str:
        loads = [
            row[key]
            for row in self.store.rows()
            for key in ("load_before", "load_after")
            if row.get(key) is not None
        ]
        return f"{min(loads):g} to {max(loads):g} while timing" if loads else "nothing was timed"

    def _write_profile_summary(self) -> None:
        rows = self.store.rows("profile")
        if rows:
            folder = self.folder / "profiler_results"
            folder.mkdir(exist_ok=True)
            write_bytes(folder / "profile_summary.csv", csv_text(rows).encode("utf-8"))

    def _write_metrics(self) -> None:
        """Write what TorchBench and lm-evaluation-harness call their results."""
        metrics = {
            f"{row['kind']}/{row['attention']}/{row['seq_len']}/{row['phase']}": row["step_time_ms"]
            for row in self.store.rows()
            if row.get("step_time_ms") and row.get("seq_len") and row.get("phase")
        }
        for stale in self.folder.glob("metrics-*.json"):
            stale.unlink()
        stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d%H%M%S")
        torch_bench = {
            "name": "rxlm-study",
            "environ": self.manifest["environment"],
            "metrics": metrics,
        }
        write_bytes(self.folder / f"metrics-{stamp}.json", json_bytes(torch_bench))
        results: dict[str, dict[str, Any]] = {}
        for row in self.store.rows("ppl", outcome=OK):
            name = f"{row['attention']}/seed{row['seed']}"
            results.setdefault(name, {})["text"] = {
                "perplexity": row["final_ppl"], "bits_per_byte": row["bits_per_byte"],
            }  # fmt: skip
        for task in self.settings.tasks:
            for row in best_rows(self.store, task):
                name = f"{row['attention']}/seed{row['seed']}"
                share = row["accuracy"] / 100
                results.setdefault(name, {})[f"{task}-{row['size']}"] = {
                    "acc": share,
                    "acc_stderr": (share * (1 - share) / row["asked"]) ** 0.5,
                    "exact_match": row["exact_match"] / 100,
                }
        path = self.folder / "results.json"
        write_bytes(path, json_bytes({"results": results, "config": self.manifest["config"]}))


def command_of(manifest: Mapping[str, Any]) -> str:
    """Return the command that made a study, without the folders of the machine."""
    return " ".join(_shown(manifest["command"]))


def _shown(command: list[str]) -> list[str]:
    words = [os.path.basename(command[0]), *command[1:]]
    if words[0] in ("__main__.py", "rxlm"):
        words[0] = "rxlm"
    return [os.path.basename(word) if os.path.isabs(word) else word for word in words]


def write_tensorboard(folder: Path, store: ResultStore, history: Mapping[str, Any]) -> None:
    """Write scalars and hyperparameters of every training, and of the timings."""
    from torch.utils.tensorboard import SummaryWriter

    if folder.is_dir():
        for stale in folder.rglob("events.out.tfevents.*"):
            stale.unlink()
    for name, part in history.items():
        with SummaryWriter(str(folder / name)) as writer:
            for curve, steps in _STEPS.items():
                for step, value in zip(part[steps], part[curve], strict=False):
                    if value is not None:
                        writer.add_scalar(curve, value, step)
            finals = {
                f"final/{curve}": part[curve][-1]
                for curve in ("train_loss", "val_loss", "val_ppl", "val_accuracy")
                if part[curve] and part[curve][-1] is not None
            }
            settings = {key: part[key] for key in ("attention", "what", "seed")}
            writer.add_hparams(settings, finals, run_name=".")
    with SummaryWriter(str(folder / "study")) as writer:
        for row in store.rows():
            if row.get("step_time_ms") and row.get("seq_len"):
                phase = row.get("phase", "step")
                tag = f"{row['kind']}/{phase}/{row['attention']} (ms by tokens)"
                writer.add_scalar(tag, row["step_time_ms"], row["seq_len"])
            elif row["kind"] == "memory" and row.get("counted_total_mb"):
                tag = f"memory/{row['attention']} (MB by tokens)"
                writer.add_scalar(tag, row["counted_total_mb"], row["seq_len"])


_STEPS = {
    "train_loss": "step",
    "grad_norm": "step",
    "clip_fraction": "step",
    "lr": "step",
    "val_loss": "val_step",
    "val_ppl": "val_step",
    "val_accuracy": "val_step",
}
