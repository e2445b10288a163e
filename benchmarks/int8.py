"""An int8 model beside the model that it was made of: size, quality and speed.

    python benchmarks/int8.py runs/nano --quick               # to see that it works
    python benchmarks/int8.py runs/nano                       # writes runs/benchmarks/int8.md
    python benchmarks/int8.py runs/nano --out docs/benchmarks # ... to where the docs keep it

Times are ratios within interleaved rounds, at one conversation; single layers of several widths,
with random weights, show from which width on int8 is faster. How it is measured: README.md here.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in linear_attention.py

import torch
from torch import nn

from rxlm.errors import RunError, UserError
from rxlm.evaluation.int8_loss import Int8LossSettings, int8_table, measure_int8_loss
from rxlm.evaluation.tables import Table, markdown_table
from rxlm.evaluation.timing import (
    Call,
    Quartiles,
    interleave,
    load_average,
    machine_name,
    quartiles,
    ratio,
)
from rxlm.nn.int8_linear import Int8Linear
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.int8 import quantize_int8, quantized_share
from rxlm.rxt.models import RxTAlpha
from rxlm.storage.hub import local_folder
from rxlm.storage.model_folder import WEIGHTS_FILE
from rxlm.training.final_evaluation import recipe_of_model

Key = tuple[str, str]  # What is timed, and with which weights.

NEVER = -1e4  # Bias of [EOS]: answers of a chosen length.
GREEDY = SamplingSettings(temperature=0.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print; return the exit status."""
    options = parse(arguments)
    typed = sys.argv[1:] if arguments is None else arguments
    torch.set_num_threads(options.threads)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        page = measure(options, shlex.join(["python", "benchmarks/int8.py", *typed]))
        target = options.out / "int8.md"
        target.write_text(page, encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(page)
    print(f"written: {target}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("model", help="a pipeline's folder, a run, a checkpoint or a model folder (float32)")
    add("--quick", action="store_true", help="few questions, few rounds, narrow layers")
    add("--new", type=int, help="tokens that are written")
    add("--prompt", type=int, help="tokens of the query, and of the turn that is remembered")
    add("--widths", type=int, nargs="*", metavar="N", help="of the single layers")
    add("--rounds", type=int, help="how often each is timed")
    add("--threads", type=int, default=1)
    add("--budget", type=float, default=300.0, help="seconds after which no round begins")
    add("--out", type=Path, default=Path("runs/benchmarks"), help="folder that is written to")
    options = parser.parse_args(arguments)
    for name, quick, full in (
        ("new", 16, 64),
        ("prompt", 32, 64),
        ("widths", [64, 256], [64, 128, 256, 512, 1024, 2048]),
        ("rounds", 3, 15),
    ):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    return options


def measure(options: argparse.Namespace, command: str) -> str:
    """Return the page.

    Raises:
        UserError: if the model cannot be quantised, or is too short for what is asked.
    """
    folder = local_folder(options.model)
    model = RxTAlpha.from_pretrained(folder)
    made = quantize_int8(model)
    with tempfile.TemporaryDirectory() as scratch:
        made.save_pretrained(scratch)
        before, after = ((place / WEIGHTS_FILE).stat().st_size for place in (folder, Path(scratch)))
    loss = measure_int8_loss(model, made, settings(folder, quick=options.quick))
    load = load_average()
    seconds = interleave(
        [*turn_calls(model, made, options), *layer_calls(options.widths)],
        rounds=options.rounds,
        budget=options.budget,
    )
    decoder = model.config.decoder
    facts = {
        "model": f"{type(model).__name__}, {decoder.num_layers} layers of width "
        f"{decoder.embed_dim}, {sum(item.numel() for item in model.parameters()):,} parameters, "
        f"{quantized_share(made):.0%} of them int8",
        "machine": machine_name("cpu"),
        "threads": f"{options.threads} (OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']})",
        "PyTorch": torch.__version__,
        "load average": f"{load:.2f} before the timing",
    }
    parts = [
        "# int8 beside float32",
        "Size, quality and speed of a model with int8 weights, and of the model that it was made "
        "of. What is quantised, and when it pays: [Quantisation](../quantisation.md).",
        f"```bash\n{command}\n```",
        "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts.items())]),
        "## Size and quality",
        markdown_table(int8_table(loss, before, after)).strip(),
        "## Speed of a turn",
        "One conversation, whole operations. The last column is float32 time by int8 time: above "
        "1 x int8 is faster. It is the median of the ratios within each round, with quartiles.",
        markdown_table(speed_table("a turn", names_of(seconds, "turn"), seconds)).strip(),
        "## Speed of a layer",
        "A square layer by itself, random weights: int8 includes quantising the input.",
        markdown_table(speed_table("a layer", names_of(seconds, "layer"), seconds)).strip(),
    ]
    return "\n\n".join(parts) + "\n"


def settings(folder: Path, *, quick: bool) -> Int8LossSettings:
    """Return how much to ask, on the dialogues of the model's recipe."""
    amount = {"dialogues": 4, "turns": 3, "questions": 4, "distances": (1,)} if quick else {
        "dialogues": 200, "questions": 200, "distances": (1, 4, 16)
    }  # fmt: skip
    recipe = recipe_of_model(folder)
    own = {} if recipe is None else {"generator": recipe.data.generator}
    return Int8LossSettings.model_validate({**amount, **own})


def turn_calls(
    model: RxTAlpha, made: RxTAlpha, options: argparse.Namespace
) -> list[dict[Key, Call]]:
    """Return what a turn consists of, with both weights. Changes the bias of [EOS] of both."""
    tokenizer = model.require_tokenizer()
    body = [tokenizer.vocab_size - 1 - n for n in range(options.prompt - 2)]
    prompt = [tokenizer.bos_id, tokenizer.query_id, *body]
    groups: list[dict[Key, Call]] = [{}, {}, {}]
    for form, one in (("float32", model), ("int8", made)):
        one.decoder.head_bias.data[tokenizer.eos_id] = NEVER
        state = one.new_conversation()

        def say(count: int, one: RxTAlpha = one, state=state) -> object:  # type: ignore[no-untyped-def]
            return one.generate(state, [prompt], GREEDY, max_new_tokens=count)

        first = f"turn: first token after {options.prompt}"
        groups[0][first, form] = lambda say=say: say(1)  # type: ignore[misc]
        whole = f"turn: {options.new} tokens after {options.prompt}"
        groups[1][whole, form] = lambda say=say: say(options.new)  # type: ignore[misc]
        turn = f"turn: memory update, {options.prompt} tokens"
        groups[2][turn, form] = lambda one=one, state=state: one.update_memory(state, [prompt])  # type: ignore[misc]
    return groups


def layer_calls(widths: Sequence[int]) -> list[dict[Key, Call]]:
    """Return single layers, at one row and at 64."""
    groups: list[dict[Key, Call]] = []
    generator = torch.Generator().manual_seed(0)
    for width in widths:
        plain = nn.Linear(width, width, bias=False)
        small = Int8Linear.of(plain)
        for rows in (1, 64):
            x = torch.randn(rows, width, generator=generator)
            name = f"layer: {width} x {width}, {rows} row{'s' if rows > 1 else ''}"
            groups.append(
                {
                    (name, form): torch.inference_mode()(lambda layer=layer, x=x: layer(x))
                    for form, layer in (("float32", plain), ("int8", small))
                }
            )
    return groups


def names_of(seconds: dict[Key, list[float]], kind: str) -> list[str]:
    """Return the timed things of a kind, in their order, each once."""
    return [name for name in dict.fromkeys(name for name, _ in seconds) if name.startswith(kind)]


def speed_table(title: str, names: Sequence[str], seconds: dict[Key, list[float]]) -> Table:
    """Return the medians and the ratios."""
    rows = []
    for name in names:
        plain, small = seconds[name, "float32"], seconds[name, "int8"]
        times: Quartiles = ratio(plain, small)
        rows.append(
            (
                name.split(": ", 1)[1],
                f"{quartiles(plain).median * 1e3:.3f} ms",
                f"{quartiles(small).median * 1e3:.3f} ms",
                f"{times.median:.2f} x ({times.lower:.2f} .. {times.upper:.2f})",
            )
        )
    return Table(title, ("", "float32", "int8", "speed of int8"), rows)


if __name__ == "__main__":
    sys.exit(main())
