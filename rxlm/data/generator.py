"""The built-in dialogues: facts told, changed and asked for over many turns, made up on demand.

A dialogue is a pure function of (seed, split, index, number of turns): the same on every machine,
Python version and process. Answers to questions are determined by the history word for word, so
exact match is a fair test, and they cannot be known without it. Data: ``facts``, ``fact_values``.
Turns are put together in ``dialogue``; test dialogues with a planned distance in ``probes``.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import Field, model_validator

from rxlm.configuration import Config
from rxlm.data import probes
from rxlm.data.conversations import Conversation, Interaction
from rxlm.data.dialogue import Dialogue, pick, seeded
from rxlm.data.facts import FACT_KINDS, KINDS_BY_NAME, FactKind
from rxlm.data.wordings import WORDINGS
from rxlm.errors import UserError

SPLITS = ("train", "valid", "test")
UNKNOWN_PROBE_SHARE = 0.1


class GeneratorConfig(Config):
    """How the built-in dialogues are made. The shares are of turns; the rest is small talk."""

    wordings: Literal["few", "many"] = "few"
    """How many ways the user has to tell, change and ask for a fact: ``few``, all of them well-kept
    English sentences, about five a kind and learned fast; or ``many``, about fifteen, with
    contractions, American spelling, greetings, and some in lower case. One way to tell and one to
    ask is held out of training in both."""
    seed: int = 0
    """Another seed gives other dialogues (the held-out pairs stay the same)."""
    max_facts: int = Field(default=8, ge=1, le=len(FACT_KINDS))
    """At most this many facts are held in one dialogue."""
    new_fact: float = Field(default=0.33, ge=0, le=1)
    """Share of turns that tell a new fact."""
    two_facts: float = Field(default=0.3, ge=0, le=1)
    """Share of those that tell two facts in one sentence."""
    update: float = Field(default=0.12, ge=0, le=1)
    """Share of turns that change a fact told earlier."""
    unknown_question: float = Field(default=0.10, ge=0, le=1)
    """Share of turns that ask for a fact never told."""
    question: float = Field(default=0.40, ge=0, le=1)
    """Share of turns that ask for a fact told earlier."""
    any_value: float = Field(default=0.25, ge=0, lt=1)
    """Share of the facts whose value is taken from the pools of all kinds, not of its own ("my
    favourite colour is Oslo"). Such values do not betray what they were told for, so that the
    binding itself has to be remembered; without them a model knows a city when it sees one, and
    fails on pairs that it never met. Test dialogues (``probe``) use proper values only."""
    made_up: float = Field(default=0.25, ge=0, lt=1)
    """Share of the facts whose value is a made-up word of two syllables ("my name is Brulom"),
    which a tokenizer cuts into pieces. Teaches to remember words that no list holds."""
    held_out_values: float = Field(default=0.1, ge=0, lt=1)
    """Share of the (kind, value) pairs that are never told outside ``unseen='pairs'`` probes."""

    @model_validator(mode="after")
    def _shares_fit(self) -> GeneratorConfig:
        if self.any_value + self.made_up > 1:
            raise ValueError(
                f"any_value + made_up = {self.any_value + self.made_up:g}, expected at most 1 "
                f"(the other facts have proper values): lower one of them"
            )
        total = self.new_fact + self.update + self.unknown_question + self.question
        if total > 1 + 1e-9:
            raise ValueError(
                f"new_fact + update + unknown_question + question = {total:g}, expected at most 1 "
                f"(the rest is small talk): lower one of them"
            )
        return self


class DialogueGenerator:
    """Makes dialogues by number.

    Example:
        >>> generator = DialogueGenerator(GeneratorConfig(seed=1))
        >>> dialogue = generator.conversation(0, num_turns=8)
        >>> test = generator.probe(0, distance=8, num_facts=4)
        >>> test.interactions[-1].answer        # what the model has to say
    """

    def __init__(self, config: GeneratorConfig | None = None) -> None:
        self.config = config or GeneratorConfig()
        held_out = {kind.name: _held_out(kind, self.config.held_out_values) for kind in FACT_KINDS}
        self._held_out: dict[str, tuple[str, ...]] = held_out
        self._wordings = WORDINGS[self.config.wordings]
        self._common: dict[str, tuple[str, ...]] = {
            kind.name: tuple(value for value in kind.values if value not in held_out[kind.name])
            for kind in FACT_KINDS
        }

    def conversation(self, index: int, num_turns: int, split: str = "train") -> Conversation:
        """Return random dialogue number ``index`` of ``split``.

        The splits share one distribution: training templates, no held-out pairs, other dialogues.

        Args:
            index: which dialogue, >= 0; there are as many as one likes.
            num_turns: its length, >= 1; another length is another dialogue.
            split: ``'train'``, ``'valid'`` or ``'test'``.
        """
        _check(index, split)
        if num_turns < 1:
            raise UserError(f"num_turns={num_turns}: expected at least 1.")
        rng = seeded("conversation", self.config.seed, split, index, num_turns)
        dialogue = Dialogue(
            rng,
            self._common,
            self.config.any_value,
            self.config.made_up,
            self._held_out,
            self._wordings,
        )
        for _ in range(num_turns):
            self._random_turn(dialogue)
        return Conversation(
            tuple(dialogue.turns), id=f"builtin-{split}-{index}-{num_turns}", source="builtin"
        )

    def probe(
        self,
        index: int,
        *,
        kind: Literal["recall", "update", "unknown"] = "recall",
        distance: int,
        num_facts: int,
        unseen: Literal["none", "pairs", "templates", "words"] = "none",
        split: str = "test",
        together: int = 1,
    ) -> Conversation:
        """Return test dialogue ``index``; its last interaction is the question under test.

        Args:
            index: which dialogue, >= 0; the fact kinds take turns over the indices.
            kind: ``'recall'`` asks for a fact told exactly ``distance`` turns before the question;
                ``'update'`` for one that was told earlier and changed ``distance`` turns before
                (the question's ``stale`` holds the old value); ``'unknown'`` for one never told,
                when the last fact was told ``distance`` turns before.
            distance: >= 1; 1 is the previous turn.
            num_facts: facts held at the question, the one under test included. At most 12
                (``'unknown'``: 11).
            unseen: ``'none'``: everything as in training; ``'pairs'``: the (kind, value) pair under
                test is one never told in training; ``'templates'``: statement and question are
                worded in a way held out of training; ``'words'``: the value is a made-up word.
            split: ``unseen`` other than ``'none'`` exists in ``'test'`` only.
            together: facts in the sentence that tells the one under test (of ``'recall'``); more
                than two in one sentence never occur in training.
        """
        _check(index, split)
        plan = probes.ProbePlan(kind, distance, num_facts, unseen, together)
        if unseen != "none" and split != "test":
            raise UserError(f"unseen={unseen!r} exists in split 'test' only, got split={split!r}.")
        # A single fact draws as it did before there was a choice: other dialogues stay the same.
        more = () if together == 1 else (together,)
        key = (split, index, kind, distance, num_facts, unseen, *more)
        rng = seeded("probe", self.config.seed, *key)
        dialogue = Dialogue(rng, self._common, wordings=self._wordings)
        turns = probes.build(plan, dialogue, index, self._held_out)
        suffix = "".join(f"-t{count}" for count in more)
        name = f"builtin-{split}-{kind}-d{distance}-k{num_facts}-{unseen}{suffix}-{index}"
        return Conversation(turns, id=name, source="builtin")

    def probe_questions(
        self, conversation: Conversation, index: int, count: int
    ) -> list[tuple[int, Interaction]]:
        """Return questions that could be asked in the middle of ``conversation``.

        They train an intermediate memory directly: ask after the turn, do not write the answer to
        memory. Nine in ten ask for a fact told so far (its value as of then), the others for a
        kind not told so far.

        Args:
            conversation: one with ``told`` metadata (of this generator, or loaded from a file).
            index: draws other questions for other numbers.
            count: how many questions.

        Returns:
            ``count`` pairs of (turn after which it is asked, question), in order of the turns;
            empty for a conversation that tells no fact of a known kind.
        """
        rng = seeded("questions", self.config.seed, conversation.id, index)
        telling = [
            turn
            for turn, interaction in enumerate(conversation.interactions)
            if any(kind in KINDS_BY_NAME for kind, _ in interaction.told)
        ]
        if not telling:
            return []
        first, last = telling[0], len(conversation) - 1
        turns = sorted(first + int(rng.random() * (last - first + 1)) for _ in range(count))
        questions = []
        dialogue = Dialogue(rng, self._common, wordings=self._wordings)
        for turn in turns:
            dialogue.replay(conversation.interactions[: turn + 1])
            untold = dialogue.untold()
            if untold and rng.random() < UNKNOWN_PROBE_SHARE:
                questions.append((turn, dialogue.unknown_question(pick(rng, untold))))
            else:
                told = pick(rng, tuple(dialogue.told))
                questions.append((turn, dialogue.question(dialogue.kinds[told])))
        return questions

    def held_out(self, kind: str) -> tuple[str, ...]:
        """Return the values of ``kind`` that are never told as facts in training."""
        return self._held_out[kind]

    def chance(self, kind: str) -> float:
        """Return the probability that a random value of the pool of ``kind`` is the right one."""
        return 1.0 / len(KINDS_BY_NAME[kind].values)

    def _random_turn(self, dialogue: Dialogue) -> None:
        """Add one turn drawn by the shares; what cannot happen yet becomes a fact or small talk."""
        config, rng = self.config, dialogue.rng
        room = config.max_facts - len(dialogue.told)
        draw = rng.random()
        if draw < config.new_fact:
            wanted = "fact"
        elif draw < config.new_fact + config.update:
            wanted = "update"
        elif draw < config.new_fact + config.update + config.unknown_question:
            wanted = "unknown"
        elif draw < (config.new_fact + config.update + config.unknown_question + config.question):
            wanted = "question"
        else:
            wanted = "chat"
        if wanted in ("update", "question") and not dialogue.told:
            wanted = "fact" if rng.random() < 0.5 else "chat"
        if wanted == "fact" and room == 0:
            wanted = "question" if rng.random() < 0.5 else "chat"

        if wanted == "fact":
            second = room > 1 and rng.random() < config.two_facts
            dialogue.tell_random(2 if second else 1)
        elif wanted == "update":
            dialogue.update_random()
        elif wanted == "unknown" and dialogue.untold():
            dialogue.add(dialogue.unknown_question(pick(rng, dialogue.untold())))
        elif wanted == "question":
            dialogue.add(dialogue.question(dialogue.asked_kind()))
        else:
            dialogue.chat()


def _check(index: int, split: str) -> None:
    if index < 0:
        raise UserError(f"index={index}: expected a number >= 0.")
    if split not in SPLITS:
        raise UserError(f"split={split!r}: expected one of {', '.join(SPLITS)}.")


def _held_out(kind: FactKind, share: float) -> tuple[str, ...]:
    """Return the values whose hash with the kind is smallest: no random state, no seed."""
    if share == 0:
        return ()
    count = max(1, round(share * len(kind.values)))

    def rank(value: str) -> bytes:
        return hashlib.sha256(f"{kind.name}|{value}".encode()).digest()

    return tuple(sorted(kind.values, key=rank)[:count])
