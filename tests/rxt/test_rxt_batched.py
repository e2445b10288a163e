"""Held batches: modes, the ``batch_interact`` protocol, rows that idle, stop, restart or are left.

That every attention type gives the same in a batch as alone is in test_rxt_batch_equality.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.ops.sampling import GREEDY, SamplingSettings
from rxlm.rxt.batch_rows import seeds_of_rows
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.models import RxTAlpha

ModelBuilder = Callable[..., RxTAlpha]

TEXTS = ["My name is Ann.", "Hello", "I live in Oslo, and how are you?"]
MD_GDN: dict[str, Any] = {"use_linear_self_attn": True, "linear_attn_type": "md_gdn"}
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2},
]


@pytest.fixture
def model(make_model: ModelBuilder) -> RxTAlpha:
    """In batch mode with three conversations that carry a state, answers of different lengths."""
    model = make_model(eos_bias=5.0, **MD_GDN)
    # [PAD] is an id like any other to random weights; here it says that a row has ended.
    model.decoder.head_bias.data[0] = -1e4
    model.set_batch_mode(True, batch_size=3, seed=7)
    return model


def talk(model: RxTAlpha, texts: list[Any] = TEXTS, **options: Any) -> list[list[int]]:
    """Each step as a list."""
    steps = model.batch_interact(**model.tokenize_batch(texts), **options)
    return [step.tolist() for step in steps]


def per_row(name: str) -> list[Any]:
    defaults = {"temperature": 1.0, "repetition_penalty": 1.0}
    return [row.get(name, defaults.get(name)) for row in SAMPLING]


DRAWN: dict[str, Any] = {name: per_row(name) for name in ("temperature", "top_k", "top_p")} | {
    "repetition_penalty": per_row("repetition_penalty")
}


def ids_of(model: RxTAlpha, text: str) -> list[int]:
    return model.tokenize_query(text)["input_ids"][0].tolist()


def turn_of(model: RxTAlpha, text: str, steps: list[list[int]], row: int) -> list[int]:
    """The whole turn as it must enter memory."""
    answer = [step[row] for step in steps if step[row] > 0 and step[row] != 3]
    return [*ids_of(model, text), 6, *answer, 3]


def same(one: ConversationState, other: ConversationState) -> bool:
    """Whether two states are equal bit for bit."""
    assert one.carried is not None and other.carried is not None
    return (
        torch.equal(one.slots, other.slots)
        and torch.equal(one.carried.states, other.carried.states)
        and torch.equal(one.carried.started, other.carried.started)
        and (one.seeds, one.draws, one.num_turns) == (other.seeds, other.draws, other.num_turns)
    )


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# The protocol.


def test_each_step_has_an_id_a_row_then_the_two_marks(model: RxTAlpha) -> None:
    """Catches a broken protocol, tokens after a row's end, and memories that miss their turn."""
    before = model.export_conversation()
    steps = talk(model, **DRAWN)
    assert steps[-2:] == [[-1] * 3, [-2] * 3]
    settings = [SamplingSettings(**row) for row in SAMPLING]
    result = model.generate(before, TEXTS, settings)
    assert len({len(answer.ids) for answer in result.answers}) > 1, "all rows end at once"
    for row, answer in enumerate(result.answers):
        column = [step[row] for step in steps[:-2]]
        expected = [*answer.ids, *([3] if answer.reason == "eos" else [])]
        assert column == expected + [0] * (len(column) - len(expected))
    expected_state = model.update_memory(result.state, [answer.turn for answer in result.answers])
    assert same(model.export_conversation(), expected_state)
    assert model.export_conversation().num_turns == (1, 1, 1)


def test_steps_are_tensors_of_integers(model: RxTAlpha) -> None:
    """Catches steps of another type than the marks, which readers compare with them."""
    for step in model.batch_interact(**model.tokenize_batch(TEXTS)):
        assert step.dtype == torch.int64 and step.shape == (3,)
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("memory_update", ["inline", "background"])
def test_a_row_is_a_single_conversation(model: RxTAlpha, memory_update: Any) -> None:
    """Catches draws, settings, seeds or memories that depend on the neighbours, over two turns,
    and an update in the background that is lost."""
    seeds = [3, None, 11]
    turns = [
        talk(model, TEXTS, **DRAWN, seed=seeds, memory_update=memory_update),
        talk(model, TEXTS[::-1], **DRAWN, memory_update=memory_update),
    ]
    model.wait_for_memory()
    after = model.export_conversation()
    model.set_batch_mode(False)
    for row, settings in enumerate(SAMPLING):
        model.reset_stm_state(seed=7 + row)
        for turn, texts in enumerate((TEXTS, TEXTS[::-1])):
            alone = list(
                model.interact(
                    **model.tokenize_query(texts[row]),
                    **settings,
                    seed=seeds[row] if turn == 0 else None,
                )
            )[:-2]
            together = [step[row] for step in turns[turn] if step[row] > 0]
            assert alone == together
        single = model.export_conversation()
        assert (single.seeds[0], single.draws[0]) == (after.seeds[row], after.draws[row])
        close(single.slots[:, 0], after.slots[:, row])


def test_other_neighbours_change_no_sample(model: RxTAlpha) -> None:
    """Catches one generator shared by the rows: its draws depend on who else is there."""
    start = model.export_conversation()
    first = [step[1] for step in talk(model, [None, TEXTS[1], "Hello"], **DRAWN) if step[1] > 0]
    model.load_stm_state(start)
    options = {**DRAWN, "temperature": [2.0, 1.3, 0.0]}
    again = [step[1] for step in talk(model, TEXTS, **options) if step[1] > 0]
    assert first == again


@pytest.mark.parametrize("seed", [range(5, 8), torch.tensor([5, 6, 7]), torch.tensor(5), [5, 6, 7]])
def test_seeds_of_any_kind_of_sequence(seed: Any) -> None:
    """Catches a range or a tensor that ends in an assertion."""
    assert seeds_of_rows(seed, 3) == [5, 6, 7]


@pytest.mark.parametrize("seed", [3.0, "3", [1.5, 2, 3]])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    """Catches 1.5 taken for 1, and an assertion in place of a message."""
    with pytest.raises(UserError, match="expected a whole number"):
        seeds_of_rows(seed, 3)


def test_what_is_exported_can_be_loaded_after_a_conversion(make_model: ModelBuilder) -> None:
    """Catches a held memory of the type before, which the model itself refuses."""
    model = make_model()
    list(model.interact(**model.tokenize_query("Hello"), temperature=0))
    model.to(torch.bfloat16)
    model.load_stm_state(model.export_stm_state())
    model.set_batch_mode(True, state=model.export_conversation().repeat(2))
    assert model.export_stm_state().dtype == torch.bfloat16


def test_one_seed_gives_each_row_its_own_stream(model: RxTAlpha) -> None:
    """Catches rows that all draw the same, and a seed that the next turn starts again."""
    assert talk(model, ["Hello"] * 3, seed=40, temperature=1.5)
    state = model.export_conversation()
    assert state.seeds == (40, 41, 42) and min(state.draws) > 0
    talk(model, ["Hello"] * 3, temperature=1.5)
    later = model.export_conversation()
    assert later.seeds == (40, 41, 42)
    assert all(new > old for new, old in zip(later.draws, state.draws, strict=True))
    # A new seed starts its stream at the beginning, whatever was drawn before.
    said = model.batch_interactions(
        **model.tokenize_batch(["Hello"] * 3), seed=40, temperature=1.5, max_seq_len=60
    )
    # An answer that is cut was drawn one token further.
    lengths = said.mask.sum(dim=1).tolist()
    for draws, length in zip(model.export_conversation().draws, lengths, strict=True):
        assert draws - length in (0, 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_queries_changes_nothing(model: RxTAlpha, side: str) -> None:
    """Catches padded ids that are read as part of a query, in answers or in memory."""
    start = model.export_conversation()
    queries = model.tokenize_batch(TEXTS)
    expected = [step.tolist() for step in model.batch_interact(**queries, temperature=0)]
    after = model.export_conversation()
    model.load_stm_state(start)
    width = (4, 0) if side == "left" else (0, 4)
    wider = {
        "input_ids": torch.nn.functional.pad(queries["input_ids"], width, value=9),
        "attention_mask": torch.nn.functional.pad(queries["attention_mask"].long(), width),
    }
    assert [step.tolist() for step in model.batch_interact(**wider, temperature=0)] == expected
    assert same(model.export_conversation(), after)


def test_a_row_without_query_stays_as_it_is(model: RxTAlpha) -> None:
    """Catches idle rows that forget, draw or count a turn, and rows that cannot join later."""
    talk(model)
    before = model.export_conversation()
    steps = talk(model, [None, "Hello", None], seed=5)
    assert all(step[0] == step[2] == 0 for step in steps[:-2])
    after = model.export_conversation()
    assert same(after.select([0, 2]), before.select([0, 2]))
    assert not same(after.select([1]), before.select([1]))
    talk(model, ["Hello", None, "Hello"])
    assert model.export_conversation().num_turns == (2, 2, 2)


# Rows that stop, restart, or are left.


def test_a_stopped_row_ends_and_the_others_go_on(model: RxTAlpha) -> None:
    """Catches a stop that ends all rows, loses what was said, or changes a neighbour."""
    model.decoder.head_bias.data[3] = -1e4
    start = model.export_conversation()
    free = talk(model, temperature=0, max_seq_len=40)
    expected = model.export_conversation()
    model.load_stm_state(start)
    steps = []
    for step in model.batch_interact(**model.tokenize_batch(TEXTS), temperature=0, max_seq_len=40):
        steps.append(step.tolist())
        if len(steps) == 2:
            model.stop_answers([1])
    for row in (0, 2):
        said = [[step[row] for step in given if step[row] > 0] for given in (steps, free)]
        assert said[0] == said[1] and len(said[0]) > 4
    assert all(step[1] == 0 for step in steps[2:-2])
    after = model.export_conversation()
    close(after.slots[:, [0, 2]], expected.slots[:, [0, 2]])
    alone = model.update_memory(start.select([1]), [turn_of(model, TEXTS[1], steps, 1)])
    close(after.slots[:, 1], alone.slots[:, 0])
    assert after.draws[1] == 2


def test_a_row_starts_anew_between_turns(model: RxTAlpha) -> None:
    """Catches a reset that keeps a carried state or draws, or touches the other rows."""
    talk(model)
    before = model.export_conversation()
    model.reset_stm_state(seed=20, rows=[2, 0])
    after = model.export_conversation()
    assert same(after.select([1]), before.select([1]))
    assert after.seeds == (20, before.seeds[1], 22)
    for row in (0, 2):
        assert same(after.select([row]), model.new_conversation(seed=20 + row))
    model.reset_stm_state(seed=20)
    assert same(model.export_conversation(), model.new_conversation(3, seed=20))


@pytest.mark.parametrize("stay", [True, False], ids=["read on", "leave"])
def test_a_row_starts_anew_in_the_middle_of_an_answer(model: RxTAlpha, stay: bool) -> None:
    """Catches an old answer written into the new conversation, and neighbours cut short."""
    model.decoder.head_bias.data[3] = -1e4
    start = model.export_conversation()
    steps = []
    for step in model.batch_interact(**model.tokenize_batch(TEXTS), temperature=0):
        steps.append(step.tolist())
        if len(steps) == 2:
            model.reset_stm_state(seed=90, rows=[0])
        if len(steps) == 4 and not stay:
            break
    after = model.export_conversation()
    assert all(step[0] == 0 for step in steps[2:4])
    assert same(after.select([0]), model.new_conversation(seed=90))
    for row in (1, 2):
        turn = turn_of(model, TEXTS[row], steps, row)
        alone = model.update_memory(start.select([row]), [turn])
        close(after.slots[:, row], alone.slots[:, 0])


def test_a_turn_of_which_every_row_was_reset_ends_quietly(model: RxTAlpha) -> None:
    """Catches an update of nothing that fails when the last reader's row is gone."""
    steps = []
    for step in model.batch_interact(**model.tokenize_batch(TEXTS)):
        steps.append(step.tolist())
        if len(steps) == 1:
            model.reset_stm_state(seed=1, rows=[0, 1, 2])
    assert steps[1:] == [[-1] * 3, [-2] * 3]
    assert same(model.export_conversation(), model.new_conversation(3, seed=1))


@pytest.mark.parametrize("on_early_stop", ["commit", "discard"])
def test_a_reader_who_leaves_early(model: RxTAlpha, on_early_stop: Any) -> None:
    """Catches ended answers that are lost, unfinished ones kept against the wish, or reversed."""
    model.decoder.head_bias.data[3] = -1e4
    start = model.export_conversation()
    steps = []
    for step in model.batch_interact(
        **model.tokenize_batch(TEXTS), temperature=0, on_early_stop=on_early_stop
    ):
        steps.append(step.tolist())
        if len(steps) == 2:
            model.stop_answers([1])  # this one has ended
        if len(steps) == 3:
            break
    after = model.export_conversation()
    for row in range(3):
        if row == 1 or on_early_stop == "commit":
            turn = turn_of(model, TEXTS[row], steps, row)
            alone = model.update_memory(start.select([row]), [turn])
            close(after.slots[:, row], alone.slots[:, 0])
            assert after.num_turns[row] == 1
        else:
            assert same(after.select([row]), start.select([row]))


def test_the_next_turn_ends_one_that_is_still_being_read(model: RxTAlpha) -> None:
    """Catches two turns mixed up, or the first lost, while its iterator is still held."""
    model.decoder.head_bias.data[3] = -1e4
    first = model.batch_interact(**model.tokenize_batch(TEXTS))
    next(first)
    talk(model, [None, "Hello", None])
    assert model.export_conversation().num_turns == (1, 2, 1)
    with pytest.raises(UserError, match="went on without it"):
        next(first)


def test_a_failed_update_is_tried_again(model: RxTAlpha, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches turns of a batch that are lost with an update that failed."""
    before, write = model.export_conversation(), model.write_memory

    def failing(*args: Any) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "write_memory", failing)
    iterator = model.batch_interact(**model.tokenize_batch(TEXTS), temperature=0)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(iterator)
    monkeypatch.setattr(model, "write_memory", write)
    answers = model.generate(before, TEXTS, GREEDY)
    expected = model.update_memory(answers.state, [answer.turn for answer in answers.answers])
    assert same(model.export_conversation(), expected)


# Many turns at once.


def test_interactions_are_those_of_interact(model: RxTAlpha) -> None:
    """Catches answers that are cut, shifted between rows or turns, or not written to memory."""
    dialogues = [["Hello", "How are you?", "Hello"], [None, "My name is Ann."], ["Hello"]]
    twin = copy.deepcopy(model)
    queries = model.tokenize_dialogues(dialogues)
    assert queries["attention_mask"].any(dim=2).tolist() == [
        [True, False, True], [True, True, False], [True, False, False],
    ]  # fmt: skip
    ids, mask = model.batch_interactions(**queries, **DRAWN, seed=50)
    assert ids.shape == mask.shape == (3, 3, ids.shape[2])
    whole = copy.deepcopy(twin).batch_interactions(
        **queries, **DRAWN, seed=50, return_interactions_with_queries=True
    )
    seeds: list[int | None] = [50, None, 52]
    for turn in range(3):
        texts = [dialogue[turn] if turn < len(dialogue) else None for dialogue in dialogues]
        steps = talk(twin, texts, **DRAWN, seed=seeds)
        seeds = [None, 51 if turn == 0 else None, None]
        for row, text in enumerate(texts):
            said = [step[row] for step in steps if step[row] > 0]
            assert ids[turn, row][mask[turn, row]].tolist() == said
            expected = [] if text is None else turn_of(twin, text, steps, row)
            assert whole.ids[turn, row][whole.mask[turn, row]].tolist() == expected
            assert not ids[turn, row][~mask[turn, row]].any()
    assert same(model.export_conversation(), twin.export_conversation())


def test_a_turn_that_cannot_be_answered_stops_the_turns_before_it(model: RxTAlpha) -> None:
    """Catches a batch that is left half way through its turns by a query that never fitted."""
    before = model.export_conversation()
    dialogues = [["Hello", "Hello " * 60], ["Hello"], ["Hello"]]
    with pytest.raises(UserError, match="row 0: the query has"):
        model.batch_interactions(**model.tokenize_dialogues(dialogues, max_seq_len=1000))
    with pytest.raises(UserError, match="no row has a query"):
        model.batch_interactions(**model.tokenize_dialogues([["Hello", None], [None], [None]]))
    with pytest.raises(UserError, match="no turns"):
        model.batch_interactions(torch.zeros(0, 3, 4, dtype=torch.long))
    assert model.export_conversation() is before


# Modes.


def test_the_single_conversation_waits_for_the_end_of_batch_mode(make_model: ModelBuilder) -> None:
    """Catches a memory that is wiped by set_batch_mode, in either direction."""
    model = make_model(eos_bias=5.0, **MD_GDN)
    list(model.interact(**model.tokenize_query("Hello")))
    single = model.export_conversation()
    assert model.batch_size is None
    model.set_batch_mode(True, batch_size=2, seed=4)
    assert model.batch_size == 2
    assert same(model.export_conversation(), model.new_conversation(2, seed=4))
    talk(model, ["Hello", "Hello"])
    batch = model.export_conversation()
    for _ in range(2):
        model.set_batch_mode(True, batch_size=2)
        model.set_batch_mode(True)
        model.share_components()
        assert model.export_conversation() is batch
    with pytest.raises(UserError, match=r"batch of 2.*batch_interact"):
        model.interact(**model.tokenize_query("Hello"))
    model.set_batch_mode(False)
    assert model.export_conversation() is single and model.batch_size is None


def test_a_larger_batch_keeps_the_rows_that_there_are(model: RxTAlpha) -> None:
    """Catches memories lost to a change of size, and new rows that equal old ones."""
    talk(model)
    before = model.export_conversation()
    model.set_batch_mode(True, batch_size=5, seed=30)
    after = model.export_conversation()
    assert same(after.select([0, 1, 2]), before)
    assert same(after.select([4]), model.new_conversation(seed=34))
    model.set_batch_mode(True, state=after.select([4, 1]))
    assert model.batch_size == 2
    assert same(model.export_conversation(), after.select([4, 1]))


def test_a_batch_may_start_as_copies_of_a_conversation(make_model: ModelBuilder) -> None:
    """Catches copies that share one memory or one stream, and a state without carried part."""
    model = make_model(eos_bias=5.0, **MD_GDN)
    state = model.update_memory(model.new_conversation(), [[2, 5, 40, 6, 41, 3]])
    model.set_batch_mode(True, state=state.repeat(2).replaced(seeds=(1, 2)))
    talk(model, ["Hello", None])
    assert same(model.export_conversation().select([1]), state.replaced(seeds=(2,)))
    bare = ConversationState.start(state.slots.repeat(1, 2, 1, 1), 0)
    model.set_batch_mode(True, state=bare)
    talk(model, [None, "Hello"])
    carried = model.export_conversation().carried
    assert carried is not None and carried.started.tolist() == [False, True]


def test_an_answer_of_a_batch_that_is_gone_is_refused(model: RxTAlpha) -> None:
    """Catches answers that are written into another batch, or computed for nobody."""
    model.decoder.head_bias.data[3] = -1e4
    begun, unread = (model.batch_interact(**model.tokenize_batch(TEXTS)) for _ in range(2))
    next(begun)
    model.set_batch_mode(False)
    model.set_batch_mode(True, batch_size=3)
    before = model.export_conversation()
    with pytest.raises(UserError, match="went on without it"):
        next(begun)
    with pytest.raises(UserError, match="ended or replaced"):
        next(unread)
    assert model.export_conversation() is before


@pytest.mark.parametrize(
    ("use", "arguments", "message"),
    [
        (True, {"batch_size": 0}, "batch_size=0 must be positive"),
        (True, {"batch_size": 2}, r"forget 1 of 3.*select\(\[0, 1\]\)"),
        (True, {"batch_size": 3, "seed": 4}, "seed=4 has no effect"),
        (True, {"batch_size": 3, "state": 2}, "state holds 2 conversations"),
        (True, {"seed": 3, "state": 2}, "leave batch_size=None and seed=3 out"),
        (False, {"batch_size": 3}, "takes no batch_size"),
    ],
)
def test_modes_that_make_no_sense_are_refused(
    model: RxTAlpha, use: bool, arguments: dict[str, Any], message: str
) -> None:
    """Catches conversations that are lost, and arguments that are ignored."""
    before = model.export_conversation()
    if "state" in arguments:
        arguments = {**arguments, "state": model.new_conversation(arguments["state"])}
    with pytest.raises(UserError, match=message):
        model.set_batch_mode(use, **arguments)
    assert model.export_conversation() is before


def test_without_batch_mode_the_batch_methods_say_so(make_model: ModelBuilder) -> None:
    """Catches a batch of which one row is answered, and an AttributeError."""
    model = make_model()
    queries = model.tokenize_batch(TEXTS)
    for call in (
        lambda: model.batch_interact(**queries),
        lambda: model.batch_interactions(**queries),
        lambda: model.stop_answers([0]),
        lambda: model.reset_stm_state(rows=[0]),
    ):
        with pytest.raises(UserError, match=r"set_batch_mode\(True, batch_size=B\)"):
            call()
    with pytest.raises(UserError, match="needs the number of conversations"):
        model.set_batch_mode(True)


# Bad input.


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (TEXTS[:2], {}, r"input_ids has shape \[2, \d+\].*holds 3"),
        ([*TEXTS[:2], "Hello " * 60], {}, "row 2: the query has .*seq_len is 48"),
        (TEXTS, {"max_seq_len": 4}, "row 0: .*max_seq_len is 4"),
        ([None] * 3, {}, "no row has a query"),
        (TEXTS, {"attention_mask": None}, r"holds \[PAD\] \(0\) but attention_mask is None"),
        (TEXTS, {"attention_mask": torch.ones(3, 2)}, r"attention_mask has shape \[3, 2\]"),
        (TEXTS, {"input_ids": torch.zeros(3, 4)}, "torch.float32; expected integers"),
        (TEXTS, {"input_ids": torch.tensor([5, 6, 7])}, r"input_ids has shape \[3\]"),
        (TEXTS, {"temperature": [1.0, 0.5]}, "temperature has 2 values for 3"),
        (TEXTS, {"temperature": [1.0, -1.0, 0.5]}, "row 1.*temperature=-1"),
        (TEXTS, {"top_p": 2.0}, r"top_p=2\.0"),
        (TEXTS, {"seed": [1, 2, 3, 4]}, "seed has 4 values for 3"),
        (TEXTS, {"memory_update": "later"}, "memory_update='later'"),
        (TEXTS, {"on_early_stop": "panic"}, "on_early_stop='panic'"),
    ],
)
def test_what_cannot_be_answered_changes_nothing(
    model: RxTAlpha, texts: list[Any], options: dict[str, Any], message: str
) -> None:
    """Catches padding that is read as text, rows that are cut or repeated, late errors."""
    before = model.export_conversation()
    given = {**model.tokenize_batch(texts, max_seq_len=1000), **options}
    with pytest.raises(UserError, match=message):
        model.batch_interact(**given)
    assert model.export_conversation() is before


@pytest.mark.parametrize("rows", [[], [3], [-1], [1, 1]])
def test_rows_that_do_not_exist_are_refused(model: RxTAlpha, rows: list[int]) -> None:
    """Catches Python's negative index resetting the last user's memory."""
    before = model.export_conversation()
    with pytest.raises(UserError, match="rows="):
        model.reset_stm_state(rows=rows)
    with pytest.raises(UserError, match="rows="):
        model.stop_answers(rows)
    assert model.export_conversation() is before


def test_settings_of_a_stream_are_for_all_or_one_each(model: RxTAlpha) -> None:
    """Catches settings that are cut or repeated to the number of rows."""
    with pytest.raises(UserError, match="2 sampling settings for 3"):
        model.generate(model.new_conversation(3), TEXTS, [GREEDY] * 2)
    with pytest.raises(UserError, match="0 sampling settings for 3"):
        model.generate(model.new_conversation(3), TEXTS, [])


# Memory and text of a batch.


def test_memories_of_a_batch_are_read_and_written_as_one(model: RxTAlpha) -> None:
    """Catches a system prompt for the first row only, and updates of rows that said nothing."""
    prompt = model.tokenize_full_interaction("Your name is Ann.", "")
    seeds = model.export_conversation().seeds
    model.init_stm_state(**prompt)
    started = model.export_conversation()
    expected = model.update_memory(
        model.new_conversation(3, seed=7), prompt["input_ids"].tolist() * 3
    )
    assert started.seeds == seeds and same(started, expected.replaced(num_turns=(0, 0, 0)))
    turns = {
        "input_ids": torch.tensor([[2, 5, 40, 6, 3], [0] * 5, [2, 5, 41, 6, 3]]),
        "attention_mask": torch.tensor([[1] * 5, [0] * 5, [1] * 5]),
    }
    model.update_stm(**turns)
    after = model.export_conversation()
    assert after.num_turns == (1, 0, 1)
    assert same(after.select([1]), started.select([1]))
    memory = model.export_stm_state()
    assert torch.equal(memory, after.slots) and memory.shape[1] == 3
    model.init_stm_state(**turns)
    assert same(model.export_conversation().select([1]), model.new_conversation(seed=8))
    model.load_stm_state(memory)
    loaded = model.export_conversation()
    assert torch.equal(loaded.slots, memory) and loaded.seeds == seeds
    for wrong in (memory[:, :2], after.select([0])):
        with pytest.raises(UserError, match="the batch holds 3"):
            model.load_stm_state(wrong)
    assert model.export_conversation() is loaded


def test_rows_of_ids_become_rows_of_text(model: RxTAlpha) -> None:
    """Catches padding or marks that end up in the text, and rows that are mixed up."""
    queries = model.tokenize_batch([TEXTS[0], None, "Hello"])
    assert queries["attention_mask"].any(dim=1).tolist() == [True, False, True]
    assert model.stringify_batch(queries["input_ids"]) == [TEXTS[0], "", "Hello"]
    spelled = model.stringify_batch(ids=queries["input_ids"], skip_special_tokens=False)
    assert spelled[1].startswith("[PAD]") and spelled[0].startswith("[BOS]")
    masked = model.stringify_batch(
        queries["input_ids"], queries["attention_mask"], skip_special_tokens=False
    )
    assert masked[1] == "" and "[PAD]" not in masked[2]
    ids = ids_of(model, "Hello")
    assert model.stringify_tokens([*ids, -1, -2]) == "Hello"
    assert "memory updated" in model.stringify_tokens([*ids, -1, -2], show_memory_update=True)
    assert model.stringify_tokens(torch.tensor(ids)) == "Hello"
    assert torch.equal(model.tokenize_batch([""])["input_ids"], torch.tensor([[2, 5]]))
    with pytest.raises(UserError, match="no dialogues"):
        model.tokenize_dialogues([[], []])
