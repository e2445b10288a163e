"""What a pipeline does with each stage, and where a stage finds its inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rxlm.errors import UserError
from rxlm.rxt.models import RxTAlpha
from rxlm.tokenization import Tokenizer
from rxlm.training.pipeline import PlannedStage, plan_pipeline, run_pipeline
from rxlm.training.recipes import read_recipe
from rxlm.training.run_folder import read_status
from rxlm.training.stage import changes, find_inputs, run_stage


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the pipeline runs."""
    return tmp_path / "runs"


def actions(planned: list[PlannedStage]) -> list[str]:
    """Return what is to be done with each stage."""
    return [item.action for item in planned]


def test_plan_follows_what_is_there(recipes: Path, out: Path) -> None:
    """Catches a stage trained twice, and one that is skipped unfinished."""
    assert actions(plan_pipeline(recipes, out)) == ["run", "run", "run"]
    assert not out.exists(), "a plan writes nothing"
    run_pipeline(plan_pipeline(recipes, out, stop_after="joint_lm"))
    assert actions(plan_pipeline(recipes, out)) == ["skip", "skip", "run"]
    file = out / "2_joint" / "run.json"
    status = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**status, "status": "running"}), encoding="utf-8")
    assert actions(plan_pipeline(recipes, out)) == ["skip", "resume", "run"]
    assert actions(plan_pipeline(recipes, out, redo="1_tok")) == ["run", "run", "run"]


def test_results_say_what_was_skipped(recipes: Path, out: Path) -> None:
    """Catches a skipped stage whose metrics are lost to the caller."""
    first = run_pipeline(plan_pipeline(recipes, out))
    second = run_pipeline(plan_pipeline(recipes, out))
    assert [result.skipped for result in second.stages] == [True] * 3
    assert [item.metrics for item in second.stages] == [item.metrics for item in first.stages]
    assert second.interrupted is None


def test_stage_trained_again_makes_the_later_ones_stale(recipes: Path, out: Path) -> None:
    """Catches a pipeline that reports on weights which its earlier stage no longer has."""
    run_pipeline(plan_pipeline(recipes, out))
    longer = read_recipe(recipes / "2_joint.yaml", ["train.steps=3"])
    run_stage(longer, out / "2_joint")
    with pytest.raises(UserError, match="3_sft: init_from: 2_joint was trained again since"):
        plan_pipeline(recipes, out, ["joint_lm.train.steps=3"])


def test_settings_added_by_a_newer_version_are_no_change(recipes: Path, out: Path) -> None:
    """Catches an update of rxlm after which every finished run has to be trained again."""
    run_pipeline(plan_pipeline(recipes, out, stop_after="2_joint"))
    config = out / "2_joint" / "config.yaml"
    lines = config.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.strip().startswith("drop_probability")]
    assert len(kept) == len(lines) - 1
    config.write_text("\n".join(kept), encoding="utf-8")
    assert changes(read_recipe(recipes / "2_joint.yaml"), out / "2_joint") == []


def test_redo_deletes_runs_only(recipes: Path, out: Path) -> None:
    """Catches --redo deleting a folder that is not a run, or leaving later runs stale."""
    run_pipeline(plan_pipeline(recipes, out))
    mine = out / "3_sft" / "checkpoints" / "mine.txt"
    (out / "3_sft" / "run.json").unlink()
    mine.write_text("precious", encoding="utf-8")
    planned = plan_pipeline(recipes, out, redo="2_joint")
    with pytest.raises(UserError, match="is not empty"):
        run_pipeline(planned, redo="2_joint")
    assert mine.read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["1_tok.stage=sft", "1_tok.objective={}"], "the recipe before it trains no model"),
        (["2_joint.init_from=previous"], "the recipe before it trains no model"),
        (["2_joint.model=null"], "'model' must be described"),
    ],
)
def test_pipeline_that_cannot_work_is_refused_at_once(
    recipes: Path, out: Path, overrides: list[str], message: str
) -> None:
    """Catches an hour of training before an error that was visible from the start."""
    with pytest.raises(UserError, match=message):
        plan_pipeline(recipes, out, overrides)


def test_unknown_stage_names_the_near_one(recipes: Path, out: Path) -> None:
    """Catches --stop-after with a typo that runs everything."""
    with pytest.raises(UserError, match=r"'2_join' is no stage.*did you mean '2_joint'"):
        plan_pipeline(recipes, out, stop_after="2_join")


def test_new_weights_depend_on_the_seed_only(recipes: Path, tmp_path: Path) -> None:
    """Catches weights that depend on what ran before in the process."""
    shapes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = tmp_path / name
        run_pipeline(plan_pipeline(recipes, out, [f"train.seed={seed}"], stop_after="joint_lm"))
        model = RxTAlpha.from_pretrained(out)
        shapes.append(model.encoder.embedding.weight.detach())
    assert shapes[0].equal(shapes[1])
    assert not shapes[0].equal(shapes[2])


def test_unfinished_run_goes_on_without_what_it_began_with(recipes: Path, out: Path) -> None:
    """Catches a resumed run that needs the earlier stages, or takes a tokenizer trained since."""
    run_pipeline(plan_pipeline(recipes, out))
    (out / "2_joint").rename(out / "elsewhere")
    stage = read_recipe(recipes / "3_sft.yaml", ["train.steps=3"])
    assert find_inputs(stage, out / "3_sft").model_folder == (
        out / "3_sft" / "checkpoints" / "step-000002"
    )
    result = run_stage(stage, out / "3_sft")
    assert result.status == "complete"
    status = read_status(out / "3_sft")
    assert status is not None
    assert status.step == 3


def test_folders_can_be_named_instead_of_previous(recipes: Path, out: Path, tmp_path: Path) -> None:
    """Catches paths of init_from and tokenizer_from that are ignored."""
    run_pipeline(plan_pipeline(recipes, out))
    other = tmp_path / "other"
    words = [f"init_from={out / '2_joint'}", "train.steps=1"]
    run_stage(read_recipe(recipes / "3_sft.yaml", words), other / "from_model")
    words = ["init_from=null", f"tokenizer_from={out / '3_sft'}", "train.steps=1"]
    run_stage(read_recipe(recipes / "3_sft.yaml", words), other / "new")
    tokenizers = {
        Tokenizer.load(path.parent).fingerprint for path in other.rglob("tokenizer_config.json")
    }
    assert tokenizers == {Tokenizer.load(out / "1_tok").fingerprint}
    with pytest.raises(UserError, match="holds no tokenizer"):
        words = ["init_from=null", f"tokenizer_from={tmp_path}"]
        find_inputs(read_recipe(recipes / "3_sft.yaml", words), other / "none")
