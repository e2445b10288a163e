"""The playbook's ``Trainer``: the same study, stage by stage, by the playbook's method names.

    from pt import Trainer

    trainer = Trainer("wikitext/", seq_len=256, batch_size=16, lr=5e-4, device="cpu", out="runs/pt")
    trainer.pretrain_all(epochs=1)
    trainer.test_associative_recall()
    trainer.plot_results()

A class or function that is put into ``Trainer.ATTN_CLASSES`` is a mechanism like all others. Every
method measures what has not been measured, writes tables and pages, and returns the rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rxlm.errors import UserError
from rxlm.nn.mixers import MIXERS, Mixer, MixerSettings, register_mixer
from rxlm.study.corpus import open_corpus
from rxlm.study.report import StudyReport
from rxlm.study.results import Row
from rxlm.study.runner import Study
from rxlm.study.settings import Stage, StudySettings, TaskTraining, preset

Builder = Callable[[MixerSettings], nn.Module]


class AttentionClasses(MutableMapping[str, Any]):
    """The table of mixers, as a dictionary that can be added to.

    What is put in is a function of :class:`~rxlm.nn.mixers.MixerSettings`, or a class that is built
    with ``(dim, num_heads)``.
    """

    def __getitem__(self, name: str) -> Builder:
        return MIXERS[name].build

    def __setitem__(self, name: str, value: Any) -> None:
        if not callable(value):
            raise UserError(f"ATTN_CLASSES[{name!r}]: expected a class or a function.")

        def build(settings: MixerSettings) -> nn.Module:
            arguments = (
                (settings.dim, settings.num_heads) if inspect.isclass(value) else (settings,)
            )
            module: nn.Module = value(*arguments)
            return module

        summary = (inspect.getdoc(value) or name).splitlines()[0]
        if name in MIXERS:
            MIXERS[name] = Mixer(build, MIXERS[name].cost, summary)
        else:
            register_mixer(name, cost="linear", summary=summary)(build)

    def __delitem__(self, name: str) -> None:
        del MIXERS[name]

    def __iter__(self) -> Iterator[str]:
        return iter(MIXERS)

    def __len__(self) -> int:
        return len(MIXERS)


class Trainer:
    """One study in one folder, a stage a method."""

    ATTN_CLASSES = AttentionClasses()
    """Mechanisms by name."""

    def __init__(
        self,
        data_dir: str | Path | None = None,
        seq_len: int = 256,
        batch_size: int = 16,
        lr: float = 5e-4,
        device: str = "auto",
        *,
        out: str | Path = "runs/study/pt",
        preset_name: str = "cpu",
        **changes: Any,
    ) -> None:
        """Take the settings of a preset; nothing runs yet.

        Args:
            data_dir: text to pretrain on (the playbook's folder of WikiText parquet files, any
                file or folder of texts); None: the bundled excerpt.
            seq_len: tokens of a row of pretraining.
            batch_size: rows of an update of pretraining.
            lr: peak learning rate of pretraining.
            device: ``auto``, ``cpu``, ``cuda``.
            out: folder of the study.
            preset_name: what is not said comes from there.
            changes: other fields of :class:`~rxlm.study.settings.StudySettings`.

        Raises:
            UserError: for settings that do not exist or do not fit.
        """
        base = preset(preset_name, device=device, **changes)
        text = base.text.model_copy(
            update={
                "data": None if data_dir is None else str(data_dir),
                "seq_len": seq_len,
                "batch_tokens": seq_len * batch_size,
                "learning_rate": lr,
            }
        )
        self.settings: StudySettings = base.model_copy(update={"text": text})
        self.out = Path(out)

    @property
    def MODEL_CONFIGS(self) -> dict[str, dict[str, Any]]:
        """Configuration of the model of every mechanism, all of equal size."""
        study = self._study()
        return {
            name: study.plan(name).config.model_dump(mode="json")
            for name in self.settings.attention
        }

    def calibrate_model_configs(self, target_params: int | None = None) -> dict[str, Any]:
        """Set the size that all models have, and return their configurations.

        Args:
            target_params: parameters without embeddings; None: as it is.
        """
        if target_params is not None:
            self.settings = self.settings.model_copy(update={"params": target_params})
        return self.MODEL_CONFIGS

    def pretrain_all(self, epochs: float | None = None) -> list[Row]:
        """Pretrain a language model of every mechanism.

        Args:
            epochs: over the training text; None: as many updates as the preset says.
        """
        if epochs is not None:
            text = self.settings.text
            rows = open_corpus(text).num_rows(text.seq_len)
            per_step = max(1, text.batch_tokens // text.seq_len)
            steps = max(1, round(epochs * rows / per_step))
            changed = text.model_copy(update={"steps": steps})
            self.settings = self.settings.model_copy(update={"text": changed})
        return self._run("pretrain", "ppl")

    def test_training_efficiency(self, seq_lens: Sequence[int] | None = None) -> list[Row]:
        """Time training steps at several lengths."""
        return self._run("train", "efficiency", seq_lens=seq_lens)

    def test_inference_latency(self, contexts: Sequence[int] | None = None) -> list[Row]:
        """Time prefills and decoding steps after several contexts."""
        return [
            *self._run("prefill", "prefill", contexts=contexts),
            *self._run("decode", "decode", contexts=contexts),
        ]

    def test_memory_scaling(self, seq_lens: Sequence[int] | None = None) -> list[Row]:
        """Measure the memory of the operator at several lengths."""
        return self._run("memory", "memory", memory_lens=seq_lens)

    def test_copy_task(self, lengths: Sequence[int] | None = None) -> list[Row]:
        """Learn to repeat symbols."""
        return self._task("copy", lengths)

    def test_associative_recall(self, pairs: Sequence[int] | None = None) -> list[Row]:
        """Learn multi-query associative recall."""
        return self._task("mqar", pairs)

    def test_task(self, name: str, sizes: Sequence[int] | None = None) -> list[Row]:
        """Learn any task of the table."""
        return self._task(name, sizes)

    def test_perplexity_summary(self) -> list[Row]:
        """Return the perplexities; models that are not pretrained yet are."""
        return self._run("pretrain", "ppl")

    def test_model_scaling(self, params: Sequence[int] | None = None) -> list[Row]:
        """Time training steps of models of several sizes."""
        return self._run("scale", "scaling", scale_params=params)

    def profile_attention(self) -> list[Row]:
        """Profile a training step of every mechanism."""
        return self._run("profile", "profile")

    def profile_attention_detailed(self) -> list[Row]:
        """The same: traces, stacks and flame graphs are written in any case."""
        return self.profile_attention()

    def plot_results(self) -> list[Path]:
        """Write tables, figures, TensorBoard files and the report; returns its pages."""
        return StudyReport(self.out).write()

    def _study(self, settings: StudySettings | None = None) -> Study:
        return Study(settings or self.settings, self.out)

    def _task(self, name: str, sizes: Sequence[int] | None) -> list[Row]:
        training = self.settings.tasks.get(name, TaskTraining())
        if sizes is not None:
            training = training.model_copy(update={"sizes": tuple(sorted(sizes))})
        tasks = {**self.settings.tasks, name: training}
        self.settings = self.settings.model_copy(update={"tasks": tasks})
        only = self.settings.model_copy(update={"tasks": {name: training}})
        return self._run("tasks", "task", only, task=name)

    def _run(
        self,
        stage: Stage,
        kind: str,
        settings: StudySettings | None = None,
        task: str | None = None,
        **lengths: Sequence[int] | None,
    ) -> list[Row]:
        given = {name: tuple(sorted(value)) for name, value in lengths.items() if value is not None}
        self.settings = self.settings.model_copy(update=given)
        chosen = (settings or self.settings).model_copy(update={"stages": (stage,), **given})
        study = self._study(chosen)
        study.run()
        StudyReport(self.out).write()
        wanted = {} if task is None else {"task": task}
        return study.store.rows(kind, **wanted)
