"""The documentation says what is so: its links, commands, settings and code are tried out.

Covers every Markdown page of the repository. What marks code as runnable is the line
``<!-- runnable -->`` above its fence; the blocks of a page then run one after the other.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from typer.main import get_command

from rxlm.cli.evaluate import with_overrides
from rxlm.cli.main import Invocation, build_app
from rxlm.configuration import Config
from rxlm.data.generator import GeneratorConfig
from rxlm.data.sources import parse_conversation, parse_text
from rxlm.evaluation.language_model import LMEvaluationSettings
from rxlm.evaluation.perplexity import PerplexitySettings
from rxlm.evaluation.recall_plan import RecallSettings
from rxlm.evaluation.suite.settings import SuiteSettings
from rxlm.rxt.models import RxTAlpha
from rxlm.tokenization import TokenizerTraining, train_tokenizer
from rxlm.training.described_model import described_model
from rxlm.training.objectives.curriculum import Phase
from rxlm.training.objectives.episode_rewards import RewardSettings
from rxlm.training.objectives.memory_aware import MemoryAwareSettings
from rxlm.training.recipes import STAGES, MemoryAwareRecipe, read_folder, read_recipe
from rxlm.training.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
RUNNABLE = "<!-- runnable -->"

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page; ``line`` is where its content begins, from 1."""

    page: Path
    line: int
    language: str
    text: str
    runnable: bool


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path, language: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        marked = before.rstrip("\n").endswith(RUNNABLE)
        found.append(Block(page, before.count("\n") + 2, match[1], match[2], marked))
    return [block for block in found if block.language == language]


def all_blocks(language: str) -> list[Any]:
    return [
        pytest.param(block, id=f"{name_of(block.page)}:{block.line}")
        for page in PAGES
        for block in blocks_of(page, language)
    ]


def prose_of(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = _HEADING.findall(prose_of(page))
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


# --- links ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    """A page or a heading that was renamed, and the links to it were not."""
    broken = []
    for target in _LINK.findall(prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else (page.parent / path).resolve()
        if not file.exists():
            broken.append(f"{target}: no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors_of(file):
            broken.append(f"{target}: no such heading")
    assert not broken, f"{name_of(page)}: {broken}"


def test_the_start_page_lists_every_page() -> None:
    """A new page that nobody finds."""
    linked = set(_LINK.findall((DOCS / "index.md").read_text(encoding="utf-8")))
    pages = {page.name for page in DOCS.glob("*.md")} - {"index.md"}
    assert pages <= linked, f"not linked: {sorted(pages - linked)}"


def test_the_readme_tree_lists_every_package() -> None:
    """A package that was added, renamed or removed while the file tree stayed as it was."""
    trees = [
        block.text for block in blocks_of(ROOT / "README.md", "text") if "rxlm/\n" in block.text
    ]
    assert len(trees) == 1
    listed = set(re.findall(r"^  (\w+)/ ", trees[0], re.MULTILINE))
    present = {path.parent.name for path in (ROOT / "rxlm").glob("*/__init__.py")}
    assert listed == present
    for folder in re.findall(r"^(\w+)/", trees[0], re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


# --- commands ---------------------------------------------------------------------------------


class CommandLine(NamedTuple):
    """A command in a page: whole (in a bash block), or perhaps in part (in a sentence)."""

    where: str
    words: list[str]
    whole: bool


def command_lines(program: str) -> Iterator[CommandLine]:
    """Yield the command lines of ``program`` in all pages."""
    for page in PAGES:
        for block in blocks_of(page, "bash"):
            # A backslash goes on with the next line.
            for offset, line in enumerate(block.text.replace("\\\n", " ").splitlines()):
                words = shlex.split(line, comments=True)
                words = words[1:] if words[:1] == ["$"] else words
                words = [Path(words[0]).name, *words[1:]] if words else []
                ends = [index for index, word in enumerate(words) if word in ("|", "<", ">", "&&")]
                if words[:1] == [program]:
                    where = f"{name_of(page)}:{block.line + offset}"
                    yield CommandLine(where, words[1 : min([*ends, len(words)])], whole=True)
        for code in re.findall(rf"`{program} ([^`]+)`", prose_of(page).replace("\n", " ")):
            yield CommandLine(name_of(page), shlex.split(code), whole=False)


def parser() -> Any:
    """Return the command line with commands that only return what they were given."""
    root = get_command(build_app(Invocation()))
    waiting = [root]
    while waiting:
        command = waiting.pop()
        if hasattr(command, "commands"):
            command.callback = lambda **values: None
            waiting += command.commands.values()
        else:
            command.callback = lambda **values: values
    return root


def follow(root: Any, words: list[str]) -> tuple[Any, list[str], list[str]]:
    """Return the command that ``words`` lead to, its names, and the words that are left."""
    command, names, rest = root, [], list(words)
    while hasattr(command, "commands") and rest:
        if not rest[0].startswith("-"):
            if rest[0] not in command.commands:
                break
            command = command.commands[rest[0]]
            names.append(rest[0])
        rest = rest[1:]
    return command, names, rest


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, id=f"{line.where} {' '.join(line.words)}")
        for line in command_lines("rxlm")
    ],
)
def test_every_command_can_be_typed(line: CommandLine) -> None:
    """A command, an option or a setting that does not exist (any more)."""
    root = parser()
    if line.whole:
        # Usage errors are raised, with what is wrong.
        values = root.main(args=line.words, prog_name="rxlm", standalone_mode=False)
        if isinstance(values, dict):
            _, names, _ = follow(root, line.words)
            check_overrides(names, values)
        return
    command, names, rest = follow(root, line.words)
    known = {"--help", "-h", *(option for item in command.params for option in item.opts)}
    known |= {option for item in root.params for option in item.opts}
    options = [word.partition("=")[0] for word in line.words if word.startswith("--")]
    assert names or options or line.words == ["..."], f"no such command: {line.words}"
    assert not hasattr(command, "commands") or all(word.startswith(("-", ".")) for word in rest)
    assert set(options) <= known, f"no such option: {set(options) - known}"


def check_overrides(names: list[str], values: dict[str, Any]) -> None:
    """Raise if the settings of a command line are none of the recipe's or the test's."""
    overrides = list(values.get("overrides") or [])
    recipe = values.get("recipe") or values.get("recipes") or values.get("path")
    if recipe is not None and values.get("params"):
        described_model(ROOT / recipe, overrides)
    elif recipe is not None and (ROOT / recipe).is_file():
        read_recipe(ROOT / recipe, overrides)
    elif recipe is not None and (ROOT / recipe).is_dir():
        read_folder(ROOT / recipe, overrides)
    elif names[:1] == ["eval"] and overrides:
        settings = {
            "recall": RecallSettings(),
            "perplexity": PerplexitySettings(),
            "lm": LMEvaluationSettings(),
            "suite": SuiteSettings(),
        }[names[1]]
        with_overrides(settings, overrides)


def test_every_make_target_exists() -> None:
    """A target of the Makefile that was renamed."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    lines = list(command_lines("make"))
    assert any(line.words[:1] == ["quickstart"] for line in lines)
    unknown = [
        f"{line.where}: make {word}"
        for line in lines
        for word in line.words[:1]
        if "=" not in word and word not in targets and word != "..."
    ]
    assert not unknown


def test_the_readme_names_every_command() -> None:
    """A new command that the README keeps to itself."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in parser().commands if f"`{name}`" not in text]
    assert not missing


# --- code and data ----------------------------------------------------------------------------


@pytest.mark.parametrize("block", all_blocks("python"))
def test_python_can_be_parsed(block: Block) -> None:
    """A typing error in an example that does not run here."""
    ast.parse(block.text, filename=f"{block.page}:{block.line}")


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``runs/nano``: a random model that answers briefly, as a pipeline leaves it."""
    folder = tmp_path_factory.mktemp("docs")
    tokenizer = train_tokenizer(["Hello, my name is Ann."] * 4, TokenizerTraining(vocab_size=300))
    memory = {"num_layers": 1, "embed_dim": 16, "att_heads": 2, "stm_size": 4, "seq_len": 64}
    part = {
        **memory,
        "vocab_size": tokenizer.vocab_size,
        "ff_dim": 16,
        "self_att_type": "mha",
        "cross_att_type": "mha",
    }
    attention = {**memory, "variant": "simple", "att_type": "mha"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RxTAlpha(part, part, attention, tokenizer=tokenizer)
    model.decoder.head_bias.data[tokenizer.eos_id] = 3.0
    run = folder / "runs" / "nano" / "50_memory_aware"
    checkpoint = run / "checkpoints" / "step-000001"
    model.save_pretrained(checkpoint)
    (checkpoint / "COMPLETE").write_text('{"step": 1, "score": null}', encoding="utf-8")
    line = {"kind": "validation", "step": 1, "loss": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    return folder


RUNNABLE_PAGES = [
    page for page in PAGES if any(block.runnable for block in blocks_of(page, "python"))
]


@pytest.mark.parametrize("page", RUNNABLE_PAGES, ids=name_of)
def test_runnable_python_runs(page: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example that calls what is not there (any more), or whose claim is wrong."""
    monkeypatch.chdir(tiny_run)
    names: dict[str, Any] = {}
    for block in blocks_of(page, "python"):
        if block.runnable:
            # Line numbers of a traceback are then those of the page.
            code = "\n" * (block.line - 1) + block.text
            exec(compile(code, str(page), "exec"), names)


def test_some_pages_have_runnable_python() -> None:
    """The marker was misspelt everywhere, and nothing is tried out."""
    assert {"sessions.md", "data.md", "checkpoints.md"} <= {page.name for page in RUNNABLE_PAGES}


@pytest.mark.parametrize("block", all_blocks("jsonl"))
def test_example_data_can_be_read(block: Block) -> None:
    """An example of a data format that the loader refuses."""
    for number, line in enumerate(block.text.splitlines()):
        row, where = json.loads(line), f"{name_of(block.page)}:{block.line + number}"
        if "text" in row:
            parse_text(row, where)
        else:
            parse_conversation(row, where)


@pytest.mark.parametrize("block", all_blocks("yaml"))
def test_example_recipes_are_valid(block: Block) -> None:
    """A part of a recipe that names what does not exist."""
    values = yaml.safe_load(block.text)
    if "phases" in values.get("objective", {}):
        MemoryAwareSettings.parse(values["objective"], f"{name_of(block.page)}:{block.line}")


# --- tables of settings -----------------------------------------------------------------------


class Setting(NamedTuple):
    """A row of a table: names, and the text of the cell with their defaults."""

    names: list[str]
    defaults: str


def settings_in(page: Path, heading: str, name_column: int, default_column: int) -> list[Setting]:
    """Return the rows of the first table under a heading."""
    text = page.read_text(encoding="utf-8")
    section = re.split(rf"^#+ {re.escape(heading)}$", text, flags=re.MULTILINE)[1]
    section = re.split(r"^#+ ", _FENCE.sub("", section), flags=re.MULTILINE)[0]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table is not None, f"{page.name}: no table under '{heading}'"
    rows = [line.strip("|").split("|") for line in table[0].splitlines()]
    return [
        Setting(re.findall(r"`([\w.]+)`", row[name_column]), row[default_column].strip())
        for row in rows[2:]
    ]


def default_of(schema: type[Config], dotted: str) -> Any:
    """Return the default of a field, JSON-like; raises KeyError for a field that is not there."""
    first, _, rest = dotted.partition(".")
    default = schema.model_fields[first].default
    if rest:
        return default_of(type(default), rest)
    return list(default) if isinstance(default, tuple) else default


def documented(text: str) -> list[Any]:
    """Return the values of a cell such as ``4, 16`` or ``1e-3, [0.9, 0.95]``."""

    def number(value: Any) -> Any:
        # YAML 1.1 takes 1e-3 for text.
        return float(value) if isinstance(value, str) and re.match(r"\d+e-?\d+$", value) else value

    return [number(value) for value in yaml.safe_load(f"[{text.replace('`', '')}]")]


OBJECTIVE = {
    name: type(recipe.model_fields["objective"].default) for name, recipe in STAGES.items()
}
TABLES: list[tuple[str, str, type[Config], tuple[int, int]]] = [
    ("stages.md", "1. Tokenizer", STAGES["tokenizer"], (0, 1)),
    ("stages.md", "2. Joint LM", OBJECTIVE["joint_lm"], (0, 1)),
    ("stages.md", "4. Memory pretraining", OBJECTIVE["memory_pretraining"], (0, 1)),
    ("stages.md", "5. Memory-aware training", OBJECTIVE["memory_aware"], (0, 1)),
    ("stages.md", "Phases", Phase, (0, 1)),
    ("stages.md", "Settings of training", TrainSettings, (0, 1)),
    ("stages.md", "Your own recipes", MemoryAwareRecipe, (0, 1)),
    ("reinforcement.md", "Memory reinforcement", OBJECTIVE["memory_reinforcement"], (0, 1)),
    ("reinforcement.md", "The reward", RewardSettings, (0, 1)),
    ("reinforcement.md", "Preferences", OBJECTIVE["preference"], (0, 1)),
    ("checkpoints.md", "Which checkpoints are kept", TrainSettings, (0, 1)),
    ("data.md", "The built-in dialogues", GeneratorConfig, (1, 2)),
    ("data.md", "Values", GeneratorConfig, (0, 1)),
]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table[0]}: {table[1]}")
def test_documented_settings_exist_with_their_defaults(
    table: tuple[str, str, type[Config], tuple[int, int]],
) -> None:
    """A setting that was renamed, or whose default was changed, and the page was not."""
    page, heading, schema, columns = table
    rows = [row for row in settings_in(DOCS / page, heading, *columns) if row.names]
    assert rows, "the table was not found"
    for row in rows:
        actual = [default_of(schema, name) for name in row.names]
        if not row.defaults or row.defaults in ("see below", "required") or "(" in row.defaults:
            continue
        if any(isinstance(value, Config) for value in actual) or "init_from" in row.defaults:
            continue
        assert documented(row.defaults) == actual, row.names


def test_documented_sft_defaults() -> None:
    """The defaults of SFT that differ from joint LM's are named in a sentence."""
    text = (DOCS / "stages.md").read_text(encoding="utf-8")
    sft = OBJECTIVE["sft"]()
    sentence = (
        f"with `turns: {sft.turns}`, `dialogues: {sft.dialogues}` and `context: {sft.context}`"
    )
    assert sentence in " ".join(text.split())
