"""The built-in dialogues: reproducible, consistent with their own history, honest about splits."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxlm.data import Conversation, DialogueGenerator, GeneratorConfig, Interaction
from rxlm.data.dialogue import ALL_VALUES, Dialogue, capitalised
from rxlm.data.fact_values import POOLS
from rxlm.data.facts import (
    DISTRACTORS,
    FACT_KINDS,
    KINDS_BY_NAME,
    SMALL_TALK,
    STATEMENT_PREFIXES,
)
from rxlm.data.wordings import WORDINGS
from rxlm.errors import UserError

GENERATOR = DialogueGenerator(GeneratorConfig(seed=3))
TALKATIVE = DialogueGenerator(GeneratorConfig(seed=3, wordings="many"))
FINGERPRINT_CODE = """
import hashlib, json
from rxlm.data import DialogueGenerator
generator = DialogueGenerator()
rows = [generator.conversation(index, 8).to_dict() for index in range(20)]
rows += [generator.probe(index, distance=5, num_facts=4).to_dict() for index in range(20)]
fingerprint = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
"""
FINGERPRINT = "ff8d5ea4ca10c0707b0a5fed31e1393b1c10d0b4d0b7a67afd98df8e8efdcd19"


def replay(conversation: Conversation) -> None:
    """Assert that every answer, value, stale list and distance follows from the turns before."""
    told: dict[str, tuple[str, int, tuple[str, ...]]] = {}
    for turn, interaction in enumerate(conversation.interactions):
        check_question(interaction, told, turn)
        assert bool(interaction.told) == (interaction.kind in ("fact", "update"))
        for kind, value in interaction.told:
            assert value in interaction.query
            assert value in interaction.query
            assert (kind in told) == (interaction.kind == "update")
            stale: tuple[str, ...] = ()
            if kind in told:
                old, _, older = told[kind]
                stale = (*older, old)
                assert interaction.stale == stale and value not in stale
            told[kind] = (value, turn, stale)


def check_question(
    interaction: Interaction, told: dict[str, tuple[str, int, tuple[str, ...]]], turn: int
) -> None:
    """Assert that a question at ``turn`` has the answer that ``told`` dictates."""
    if interaction.kind == "question":
        assert interaction.fact is not None
        value, when, stale = told[interaction.fact]
        assert interaction.answer == KINDS_BY_NAME[interaction.fact].answer.format(value)
        assert (interaction.value, interaction.stale) == (value, stale)
        assert interaction.distance == turn - when
        assert value not in interaction.query
    if interaction.kind == "unknown":
        assert interaction.fact is not None and interaction.fact not in told
        assert interaction.answer == KINDS_BY_NAME[interaction.fact].unknown


def test_the_answer_to_a_told_fact_follows_from_its_wording() -> None:
    """Catches answers drawn at random: nothing can predict them, so they are noise in the loss."""
    generator = DialogueGenerator()
    answers: dict[str, set[str]] = {}
    for index in range(300):
        for turn in generator.conversation(index, 10).interactions:
            if len(turn.told) != 1:
                continue
            value = turn.told[0][1]
            wording = turn.query.replace(value, "{}")
            for prefix in STATEMENT_PREFIXES:
                wording = capitalised(wording.removeprefix(prefix))
            said = turn.answer.replace(value, "{}")
            answers.setdefault(f"{turn.kind} {wording}", set()).add(said)
    assert len(answers) > 50
    assert all(len(given) == 1 for given in answers.values()), answers
    echoes = sum("{}" in answer for given in answers.values() for answer in given)
    assert 0.25 < echoes / len(answers) < 0.75


def test_dialogues_are_pinned_and_the_same_in_another_process() -> None:
    """Catches hash(), set order or version-dependent random methods in the making of dialogues."""
    here: dict[str, str] = {}
    exec(FINGERPRINT_CODE, here)
    assert here["fingerprint"] == FINGERPRINT
    other = subprocess.run(
        [sys.executable, "-c", FINGERPRINT_CODE + "print(fingerprint)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == FINGERPRINT


@pytest.mark.parametrize("generator", [GENERATOR, TALKATIVE], ids=["few", "many"])
@given(index=st.integers(0, 10_000), num_turns=st.integers(1, 40))
def test_answers_follow_from_the_history(
    generator: DialogueGenerator, index: int, num_turns: int
) -> None:
    """Catches an answer with a stale value, a wrong distance, an update that changes nothing."""
    conversation = generator.conversation(index, num_turns)
    assert len(conversation) == num_turns
    replay(conversation)
    assert Conversation.from_dict(json.loads(json.dumps(conversation.to_dict()))) == conversation


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_shares_of_foreign_and_made_up_values(share: float) -> None:
    """Catches a share that has no effect, or such values where none are wanted."""
    generator = DialogueGenerator(GeneratorConfig(any_value=share, made_up=share))
    told = [
        pair
        for index in range(200)
        for interaction in generator.conversation(index, 8).interactions
        for pair in interaction.told
    ]
    made_up = sum(value not in ALL_VALUES for _, value in told) / len(told)
    proper = sum(value in KINDS_BY_NAME[kind].values for kind, value in told) / len(told)
    assert abs(made_up - share) < 0.05
    # A value of any pool is of the kind's own pool now and then.
    assert abs(1.0 - made_up - proper - share) < 0.08
    assert not any(value in generator.held_out(kind) for kind, value in told)


def test_probe_of_a_word_asks_for_a_made_up_one() -> None:
    """Catches a test of unseen words that asks for words of the pools."""
    for index in range(48):
        question = GENERATOR.probe(index, distance=3, num_facts=4, unseen="words").interactions[-1]
        assert question.value is not None
        assert question.value not in ALL_VALUES
        assert question.value in question.answer


def test_a_made_up_word_is_never_a_held_out_or_told_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a held-out pair that is told in training after all, because syllables spell it."""
    kind = KINDS_BY_NAME["sister"]
    held_out, told = GENERATOR.held_out("sister")[0], "Xerxes"
    words = iter([held_out, told, "Brulom"])
    monkeypatch.setattr("rxlm.data.dialogue.made_up_word", lambda rng, kind: next(words))
    dialogue = Dialogue(
        random.Random(0), {}, made_up=1.0, held_out={"sister": GENERATOR.held_out("sister")}
    )
    dialogue.tell(KINDS_BY_NAME["friend"], told)
    assert dialogue.random_value(kind) == "Brulom"


def test_probes_use_proper_values_only() -> None:
    """Catches test dialogues that tell a colour called Oslo."""
    for index in range(100):
        for interaction in GENERATOR.probe(index, distance=6, num_facts=6).interactions:
            for kind, value in interaction.told:
                assert value in KINDS_BY_NAME[kind].values


def test_very_long_dialogue_runs_out_of_values_gracefully() -> None:
    """Catches a crash or a repeated value when updates have used up a pool."""
    replay(GENERATOR.conversation(0, 3000))


def test_values_never_collide_within_a_pool() -> None:
    """Catches a friend and a sister of one name: a wrong binding would then look right."""
    for index in range(300):
        told: dict[str, tuple[str, str]] = {}
        for interaction in GENERATOR.conversation(index, 16).interactions:
            for kind, value in interaction.told:
                assert value not in told, (index, kind, told[value])
                told[value] = (kind, value)


@pytest.mark.parametrize("generator", [GENERATOR, TALKATIVE], ids=["few", "many"])
def test_held_out_pairs_are_never_told_but_their_words_are_met(
    generator: DialogueGenerator,
) -> None:
    """Catches leaks of the held-out pairs, and words that training would never have seen."""
    words: set[str] = set()
    for index in range(10_000):
        split = ("train", "valid", "test")[index % 3]
        for interaction in generator.conversation(index, 6, split).interactions:
            for kind, value in interaction.told:
                assert value not in generator.held_out(kind)
            words.update(re.findall(r"\w+", interaction.query))
    values = {value for pool in POOLS.values() for value in pool}
    assert values <= words
    assert {pool for pool, _, answer in DISTRACTORS if "{}" in answer} == set(POOLS)
    for fact in FACT_KINDS:
        assert len(generator.held_out(fact.name)) == round(0.1 * len(fact.values))
        for template in (fact.statements[-1], fact.questions[-1]):
            template = template[0].upper() + template[1:]
            assert set(re.findall(r"\w+", template)) <= words, template


@pytest.mark.parametrize("generator", [GENERATOR, TALKATIVE], ids=["few", "many"])
def test_held_out_templates_do_not_occur_in_training(generator: DialogueGenerator) -> None:
    """Catches a held-out wording that is used after all, or that another template repeats."""
    queries = [
        interaction.query.lower()
        for index in range(3000)
        for interaction in generator.conversation(index, 8).interactions
    ]
    text = "\n".join(queries)
    for kind in FACT_KINDS:
        # Careless turns end without a mark.
        assert kind.questions[-1].lower().rstrip("?") not in text
        wording = re.escape(kind.statements[-1].lower().rstrip(".")).replace(r"\{\}", r"\w+")
        assert not re.search(wording, text), kind.statements[-1]


def test_splits_and_seeds_give_other_dialogues() -> None:
    """Catches a split or seed that does not enter the random state: validation on train data."""
    queries = {
        (seed, split): tuple(
            interaction.query
            for index in range(5)
            for interaction in DialogueGenerator(GeneratorConfig(seed=seed))
            .conversation(index, 8, split)
            .interactions
        )
        for seed in (0, 1)
        for split in ("train", "valid", "test")
    }
    assert len(set(queries.values())) == 6


def test_shares_of_turns_are_as_configured() -> None:
    """Catches a turn kind that hardly ever occurs, and dialogues that hold too many facts."""
    counts = dict.fromkeys(("chat", "fact", "update", "question", "unknown"), 0)
    distances = set()
    for index in range(400):
        conversation = GENERATOR.conversation(index, 24)
        kinds = {kind for turn in conversation.interactions for kind, _ in turn.told}
        assert len(kinds) <= 8
        for interaction in conversation.interactions:
            counts[interaction.kind] += 1
            distances.add(interaction.distance)
    shares = {kind: count / (400 * 24) for kind, count in counts.items()}
    assert 0.35 < shares["question"] < 0.55
    assert 0.08 < shares["update"] < 0.14
    assert 0.07 < shares["unknown"] < 0.12
    assert 0.2 < shares["fact"] < 0.35
    assert set(range(1, 21)) <= distances


def test_turns_are_short_and_values_spelled_in_one_way() -> None:
    """Catches turns longer than the nano recipe's limit and values at the start of a text.

    A sub-word tokenizer gives a word without a space before it another token.
    """
    values = {value for pool in POOLS.values() for value in pool}
    for index in range(1000):
        for interaction in GENERATOR.conversation(index, 8).interactions:
            text = f"{interaction.query} {interaction.answer}"
            assert len(re.findall(r"\w+|[^\w\s]", text)) + 4 <= 32, text
            for part in (interaction.query, interaction.answer):
                assert part[0].isupper() and part[-1] in ".?!"
                for match in re.finditer(r"\w+", part):
                    if match.group() in values:
                        assert part[match.start() - 1 : match.start()] == " ", part


def test_many_wordings_contain_the_few_and_mean_one_thing() -> None:
    """Catches a wording that two kinds share (no answer could be right), one that occurs twice, and
    a set that says other things than the small one."""
    few, many = WORDINGS["few"], WORDINGS["many"]
    assert [kind.name for kind in many.kinds] == [kind.name for kind in few.kinds]
    for field in ("statements", "updates", "questions"):
        for small, large in zip(few.kinds, many.kinds, strict=True):
            known, all_of_it = getattr(small, field), getattr(large, field)
            assert set(known) < set(all_of_it) and known[-1] == all_of_it[-1]
            assert len(all_of_it) >= 2 * len(known)
    wordings = [
        wording.lower()
        for kind in many.kinds
        for wording in {*kind.statements, *kind.updates, *kind.questions}
    ]
    assert len(wordings) == len(set(wordings))
    queries = [query for query, _ in many.small_talk]
    assert len(queries) == len(set(queries))


def test_some_write_carelessly_where_wordings_are_many() -> None:
    """Catches a share of careless turns that is lost, or that changes what is told."""
    turns = [
        turn
        for index in range(500)
        for turn in TALKATIVE.conversation(index, 8).interactions
        if turn.kind != "chat"
    ]
    careless = [turn for turn in turns if turn.query[-1] not in ".?!"]
    assert abs(len(careless) / len(turns) - WORDINGS["many"].casual) < 0.03
    assert not any(re.search(r"\bI\b", turn.query) for turn in careless)
    assert all(turn.answer[0].isupper() and turn.answer[-1] in ".?!" for turn in careless)
    told = [turn for turn in careless if turn.told]
    assert told and all(value in turn.query for turn in told for _, value in turn.told)


def test_pools_are_disjoint_single_words() -> None:
    """Catches a word in two pools or twice in one: the right kind would be ambiguous."""
    words = [word for pool in POOLS.values() for word in pool]
    assert len(words) == len(set(words))
    fixed = " ".join(f"{query} {answer}" for query, answer in SMALL_TALK)
    assert not set(words) & set(re.findall(r"\w+", fixed))
    assert {pool for pool, _, _ in DISTRACTORS} == set(POOLS)
    for kind in FACT_KINDS:
        assert len(kind.statements) >= 6 and len(kind.updates) == 3 and len(kind.questions) == 4


@given(
    index=st.integers(0, 500),
    kind=st.sampled_from(("recall", "update", "unknown")),
    distance=st.integers(1, 20),
    num_facts=st.integers(1, 11),
    unseen=st.sampled_from(("none", "pairs", "templates")),
)
def test_probe_is_as_ordered(
    index: int,
    kind: Literal["recall", "update", "unknown"],
    distance: int,
    num_facts: int,
    unseen: Literal["none", "pairs", "templates"],
) -> None:
    """Catches a distance off by one, a wrong number of facts, an 'unseen' that was seen."""
    if kind == "unknown" and unseen == "pairs":
        unseen = "none"
    conversation = GENERATOR.probe(
        index, kind=kind, distance=distance, num_facts=num_facts, unseen=unseen
    )
    replay(conversation)
    *history, question = conversation.interactions
    assert question.kind == ("unknown" if kind == "unknown" else "question")
    asked = FACT_KINDS[index % 12]
    assert question.fact == asked.name
    told = {name for turn in history for name, _ in turn.told}
    assert len(told) == num_facts
    assert sum(turn.kind == "update" for turn in history) == (kind == "update")
    last = history[-distance]
    assert last.kind == ("update" if kind == "update" else "fact") and len(last.told) == 1
    if kind != "unknown":
        assert (question.distance, question.fact) == (distance, last.fact)
        assert len(question.stale) == (kind == "update")
        assert (question.value in GENERATOR.held_out(asked.name)) == (unseen == "pairs")
    assert (question.query.lower().endswith(asked.questions[-1].lower())) == (unseen == "templates")
    if unseen == "templates" and kind == "recall":
        wording = asked.statements[-1].format(question.value)
        assert last.query.lower().endswith(wording.lower())


def test_probes_do_not_always_begin_with_a_fact() -> None:
    """Catches probes in which the first turn gives the position of the fact away."""
    kinds = {
        GENERATOR.probe(index, distance=1, num_facts=1).interactions[0].kind for index in range(50)
    }
    assert {"chat", "fact"} <= kinds


def test_probe_refuses_what_it_cannot_build() -> None:
    """Catches a silently different test: each refusal names the value and the range."""
    with pytest.raises(UserError, match=r"num_facts=13: expected 1 to 12"):
        GENERATOR.probe(0, distance=1, num_facts=13)
    with pytest.raises(UserError, match=r"num_facts=12: expected 1 to 11"):
        GENERATOR.probe(0, kind="unknown", distance=1, num_facts=12)
    with pytest.raises(UserError, match="distance=0"):
        GENERATOR.probe(0, distance=0, num_facts=1)
    with pytest.raises(UserError, match="split 'test' only"):
        GENERATOR.probe(0, distance=1, num_facts=1, unseen="pairs", split="train")
    with pytest.raises(UserError, match="does not apply"):
        GENERATOR.probe(0, kind="unknown", distance=1, num_facts=1, unseen="pairs")
    with pytest.raises(UserError, match="held_out_values > 0"):
        DialogueGenerator(GeneratorConfig(held_out_values=0)).probe(
            0, distance=1, num_facts=1, unseen="pairs"
        )
    with pytest.raises(UserError, match="expected one of train, valid, test"):
        GENERATOR.conversation(0, 4, "dev")
    with pytest.raises(ValueError, match="expected at most 1"):
        GeneratorConfig(question=0.9)


@pytest.mark.parametrize("generator", [GENERATOR, TALKATIVE], ids=["few", "many"])
@given(index=st.integers(0, 500), num_turns=st.integers(1, 12))
def test_probe_questions_ask_for_the_value_of_that_moment(
    generator: DialogueGenerator, index: int, num_turns: int
) -> None:
    """Catches questions answered with a value told or changed only later."""
    conversation = generator.conversation(index, num_turns)
    questions = generator.probe_questions(conversation, index, 4)
    first = next((turn for turn, item in enumerate(conversation.interactions) if item.told), None)
    assert len(questions) == (0 if first is None else 4)
    assert [turn for turn, _ in questions] == sorted(turn for turn, _ in questions)
    for turn, question in questions:
        assert question.kind in ("question", "unknown") and not question.told
        replay(Conversation((*conversation.interactions[: turn + 1], question)))
    assert questions == generator.probe_questions(conversation, index, 4)


def test_probe_questions_cover_turns_and_sometimes_ask_for_the_unknown() -> None:
    """Catches questions that are all about the last turn, or never about an untold kind."""
    asked = [
        (turn, question.kind)
        for index in range(300)
        for turn, question in GENERATOR.probe_questions(GENERATOR.conversation(index, 6), 0, 2)
    ]
    share = sum(kind == "unknown" for _, kind in asked) / len(asked)
    assert 0.05 < share < 0.16
    assert {turn for turn, _ in asked} == set(range(6))


def test_chance_is_one_in_the_pool() -> None:
    """Catches a chance level of another pool, which would make a useless model look good."""
    assert GENERATOR.chance("number") == 1 / 90
    assert GENERATOR.chance("friend") == 1 / 100


@pytest.mark.parametrize("together", [2, 4])
def test_several_facts_in_one_turn(together: int) -> None:
    """Catches a fact under test that is told alone, at another distance, or always first."""
    places = set()
    for index in range(40):
        turns = GENERATOR.probe(index, distance=3, num_facts=5, together=together).interactions
        asked, telling = turns[-1], turns[-4]
        told = dict(telling.told)
        assert len(telling.told) == together and asked.distance == 3
        assert told[asked.fact] == asked.value
        assert all(value in telling.query for value in told.values())
        assert sum(asked.fact in dict(turn.told) for turn in turns) == 1
        places.add(list(told).index(asked.fact))
    assert places == set(range(together))


def test_together_of_one_is_the_probe_without_it() -> None:
    """Catches a new option that changes the dialogues that published numbers were measured on."""
    plain = GENERATOR.probe(7, distance=3, num_facts=4, unseen="pairs")
    assert plain == GENERATOR.probe(7, distance=3, num_facts=4, unseen="pairs", together=1)
    with pytest.raises(UserError, match="together=3"):
        GENERATOR.probe(0, distance=3, num_facts=2, together=3)
    with pytest.raises(UserError, match="one wording"):
        GENERATOR.probe(0, kind="update", distance=3, num_facts=2, together=2)
