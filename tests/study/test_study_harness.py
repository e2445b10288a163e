"""lm-evaluation-harness gets the numbers of this package. Needs lm_eval (extra ``eval``)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rxlm.errors import UserError
from rxlm.lm.language_model import LanguageModel
from rxlm.rxt.models import RxTAlpha
from rxlm.tokenization import Tokenizer, TokenizerTraining, train_tokenizer

TEXTS = ["the cat sat on the mat", "a dog ran over the hill", "cats and dogs"] * 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, TokenizerTraining(vocab_size=280))


@pytest.fixture(scope="module")
def language_model(tokenizer: Tokenizer) -> LanguageModel:
    torch.manual_seed(0)
    config = {"vocab_size": tokenizer.vocab_size, "dim": 16, "depth": 1, "num_heads": 2,
              "max_seq_len": 24, "attention": "gated_deltanet"}  # fmt: skip
    return LanguageModel(config, tokenizer).eval()


def ask(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def test_without_the_harness_the_remedy_is_said() -> None:
    """Catches an ImportError that says nothing of the extra."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"reactive-lm\[eval\]"):
            import rxlm.study.harness
    else:
        import rxlm.study.harness  # noqa: F401


def test_harness_log_likelihoods_are_those_of_the_model(language_model: LanguageModel) -> None:
    """Catches a continuation that is cut wrongly, padding that counts, or another base."""
    pytest.importorskip("lm_eval")
    from rxlm.study.harness import HarnessModel

    harness = HarnessModel(language_model, batch_size=2)
    tokenizer = language_model.require_tokenizer()
    requests = [ask("the cat", " sat"), ask("", "a dog ran over the hill"), ask("cats", " and")]
    found = harness.loglikelihood(requests)
    for request, (value, _) in zip(requests, found, strict=True):
        context, continuation = request.args
        ids = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
        start = 1 + len(tokenizer.encode(context) if context else [])
        with torch.no_grad():
            scores = language_model.logits(language_model(torch.tensor([ids[:-1]]))[0])
        logs = scores[0].log_softmax(dim=-1)
        expected = sum(float(logs[place - 1, ids[place]]) for place in range(start, len(ids)))
        assert value == pytest.approx(expected, abs=1e-4)


def test_harness_windows_predict_every_token_once(language_model: LanguageModel) -> None:
    """Catches tokens of long texts that are left out or counted twice."""
    pytest.importorskip("lm_eval")
    from rxlm.study.harness import HarnessModel

    harness = HarnessModel(language_model)
    text = " ".join(TEXTS)
    count = len(language_model.require_tokenizer().encode(text))
    rows = harness._windows(text)
    assert len(rows) > 2 and sum(len(row.ids) - row.start for row in rows) == count
    assert max(len(row.ids) for row in rows) <= harness.max_length + 1
    (value,) = harness.loglikelihood_rolling([ask(text)])
    assert value == pytest.approx(
        float(sum(losses.sum() for losses, _ in harness._score(rows))), abs=1e-6
    )
    (written,) = harness.generate_until([ask("the cat", {"until": ["zzz"], "max_gen_toks": 4})])
    assert isinstance(written, str)


def test_harness_reads_reactive_models(tokenizer: Tokenizer) -> None:
    """Catches an answer that is scored without its query, or without the initial memory."""
    pytest.importorskip("lm_eval")
    from rxlm.study.harness import HarnessModel

    sizes = {"num_layers": 1, "embed_dim": 16, "att_heads": 2, "stm_size": 4, "seq_len": 32}
    component = {**sizes, "vocab_size": tokenizer.vocab_size, "ff_dim": 24}
    torch.manual_seed(0)
    model = RxTAlpha(component, component, sizes, tokenizer=tokenizer).eval()
    harness = HarnessModel(model)
    first, second = harness.loglikelihood([ask("the cat", "sat"), ask("a dog", "sat")])
    assert first[0] < 0 and first[0] != second[0]
    assert harness.loglikelihood_rolling([ask("cats and dogs")])[0] < 0
    (written,) = harness.generate_until([ask("the cat", {"until": ["."], "max_gen_toks": 3})])
    assert "." not in written


def test_harness_runs_a_task(language_model: LanguageModel, tmp_path: Path) -> None:
    """Catches an adapter that the real harness cannot call."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from rxlm.study.harness import HarnessModel

    rows = "\n".join(f'{{"q": "the {a}", "c": ["sat", "ran"], "a": 0}}' for a in ("cat", "dog"))
    (tmp_path / "rows.jsonl").write_text(rows + "\n")
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path / 'rows.jsonl'}\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\ndoc_to_target: "{{a}}"\n'
        "metric_list:\n  - metric: acc\n"
    )
    found = lm_eval.simple_evaluate(
        model=HarnessModel(language_model), tasks=["tiny"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )  # fmt: skip
    assert 0.0 <= found["results"]["tiny"]["acc,none"] <= 1.0
