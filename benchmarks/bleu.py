"""BLEU of a batch of answers: `rxlm.ops.bleu` beside NLTK, sentence by sentence.

    python benchmarks/bleu.py --out docs/benchmarks

Prints and writes bleu.md. Rounds are interleaved; the ratio is the median of the ratios of rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from nltk.translate.bleu_score import SmoothingFunction
from nltk.translate.bleu_score import sentence_bleu as nltk_sentence_bleu

from rxlm.evaluation.tables import Table, markdown_table
from rxlm.ops.bleu import sentence_bleu
from rxlm.storage.files import write_bytes

SIZES = ((8, 64), (64, 128), (256, 256))
VOCABULARY = 32_000
GOAL = 10.0


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def compare(batch: int, tokens: int, rounds: int) -> tuple[str, ...]:
    """Return a row of the table: both times, their ratio, and the largest difference of scores."""
    generator = torch.Generator().manual_seed(0)
    references = torch.randint(0, VOCABULARY, (batch, tokens), generator=generator)
    # Three tokens of four are those of the reference, so that all orders match somewhere.
    kept = torch.rand(references.shape, generator=generator) < 0.75
    other = torch.randint(0, VOCABULARY, references.shape, generator=generator)
    candidates = torch.where(kept, references, other)
    texts, answers = references.tolist(), candidates.tolist()
    smoothing = SmoothingFunction().method4

    def nltk() -> list[float]:
        return [
            float(nltk_sentence_bleu([text], answer, smoothing_function=smoothing))
            for text, answer in zip(texts, answers, strict=True)
        ]

    def ours() -> torch.Tensor:
        return sentence_bleu(candidates, references, smoothing="method4")

    error = float((ours() - torch.tensor(nltk(), dtype=torch.float64)).abs().max())
    times = [(seconds(ours), seconds(nltk)) for _ in range(rounds)]
    ratios = sorted(theirs / mine for mine, theirs in times)
    return (
        f"{batch} x {tokens}",
        f"{1e3 * statistics.median(mine for mine, _ in times):.1f} ms",
        f"{1e3 * statistics.median(theirs for _, theirs in times):.1f} ms",
        f"{statistics.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f})",
        f"{error:.0e}",
    )


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder of bleu.md; default: print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    load = os.getloadavg()[0]
    rows = [compare(batch, tokens, options.rounds) for batch, tokens in SIZES]
    header = ("batch x tokens", "rxlm", "NLTK", "ratio (range)", "largest difference")
    table = markdown_table(Table("", header, rows))
    text = f"""# Speed of BLEU

Written by `python benchmarks/bleu.py --out docs/benchmarks` on {date.today()}: {os.cpu_count()} CPU
cores, {options.threads} thread, torch {torch.__version__}, load average {load:.1f} before;
{options.rounds} interleaved rounds, medians. Sentence BLEU with smoothing method 4, one reference
each. Nothing was measured on a GPU.

{table}
Asked for: at least {GOAL:.0f} times at 256 x 256 on a CPU.
"""
    print(text)
    if options.out is not None:
        write_bytes(options.out / "bleu.md", text.encode())


if __name__ == "__main__":
    main()
