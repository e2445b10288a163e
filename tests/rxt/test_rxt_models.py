"""``RxTAlpha``: construction, the held conversation and its ``interact`` protocol, text and ids."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.ops.sampling import GREEDY
from rxlm.rxt.models import MemoryAttentionConfig, RxTAlpha, RxTComponentConfig, TokenizerConfig
from rxlm.tokenization import Tokenizer, TokenizerTraining, encode_interaction, train_tokenizer

ModelBuilder = Callable[..., RxTAlpha]


@pytest.fixture
def model(make_model: ModelBuilder) -> RxTAlpha:
    return make_model(eos_bias=4.0)


def talk(model: RxTAlpha, text: str = "My name is Ann.", **options: Any) -> list[int]:
    return list(model.interact(**model.tokenize_query(text), **options))


def turn_ids(model: RxTAlpha, text: str, said: list[int]) -> list[int]:
    """The whole turn as it must enter memory."""
    answer = [token for token in said if token >= 0 and token != 3]
    return [*model.tokenize_query(text)["input_ids"][0].tolist(), 6, *answer, 3]


def component_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "num_layers": 2,
        "embed_dim": 16,
        "att_heads": 2,
        "stm_size": 6,
        "seq_len": 48,
        "vocab_size": tokenizer.vocab_size,
        "ff_dim": 24,
        "self_att_type": "mha",
        "cross_att_type": "mha",
    }


MEMORY_FIELDS = {
    "num_layers": 2,
    "embed_dim": 16,
    "att_heads": 2,
    "stm_size": 6,
    "seq_len": 48,
    "att_type": "mha",
    "self_att_type": "mha",
    "variant": "self",
}


# Construction.


def test_configurations_may_be_objects_or_dicts(tiny_tokenizer: Tokenizer) -> None:
    """Catches one of the two forms building another model."""
    fields = component_fields(tiny_tokenizer)
    from_dicts = RxTAlpha(fields, fields, MEMORY_FIELDS)
    component = RxTComponentConfig(**fields)
    from_objects = RxTAlpha(
        decoder_config=component,
        encoder_config=component,
        memory_attention_config=MemoryAttentionConfig(**MEMORY_FIELDS),
        tokenizer_config=TokenizerConfig(),
        tokenizer=tiny_tokenizer,
    )
    assert from_dicts.config == from_objects.config
    assert RxTAlpha.from_config(from_objects.config, tiny_tokenizer).config == from_dicts.config


def test_the_variant_argument_wins_over_the_configuration(tiny_tokenizer: Tokenizer) -> None:
    """Catches an explicit variant that is ignored, and a default that overrides the config's."""
    fields = component_fields(tiny_tokenizer)
    assert RxTAlpha(fields, fields, MEMORY_FIELDS).config.memory_attention.variant == "self"
    simple = RxTAlpha(fields, fields, MEMORY_FIELDS, memory_attention_variant="simple")
    assert simple.config.memory_attention.variant == "simple"
    assert not hasattr(simple.memory_attention, "mix_attention")
    with pytest.raises(UserError, match=r"memory_attention_variant.*'other'"):
        RxTAlpha(fields, fields, MEMORY_FIELDS, memory_attention_variant="other")


def test_a_tokenizer_of_another_vocabulary_is_refused(tiny_tokenizer: Tokenizer) -> None:
    """Catches ids that index past the embedding, found only when somebody says a rare word."""
    fields = {**component_fields(tiny_tokenizer), "vocab_size": 1000}
    with pytest.raises(UserError) as error:
        RxTAlpha(fields, fields, MEMORY_FIELDS, tokenizer=tiny_tokenizer)
    assert f"vocab_size={tiny_tokenizer.vocab_size}" in str(error.value)
    assert "vocab_size=1000" in str(error.value)


def test_special_ids_that_are_not_the_tokenizers_are_refused(tiny_tokenizer: Tokenizer) -> None:
    """Catches a model that waits for an [EOS] which the tokenizer spells differently."""
    fields = component_fields(tiny_tokenizer)
    swapped = {"eos_token_id": 2, "bos_token_id": 3}
    with pytest.raises(UserError, match=r"bos_token_id=3 \(tokenizer: 2\)"):
        RxTAlpha(fields, fields, MEMORY_FIELDS, swapped, tiny_tokenizer)


def test_a_model_without_tokenizer_says_so(tiny_tokenizer: Tokenizer) -> None:
    """Catches an AttributeError on None where a person should read what to do."""
    fields = component_fields(tiny_tokenizer)
    model = RxTAlpha(fields, fields, MEMORY_FIELDS)
    with pytest.raises(UserError, match="set_tokenizer"):
        model.tokenize_query("hello")
    model.set_tokenizer(tiny_tokenizer)
    assert model.tokenize_query("hello")["input_ids"].shape[0] == 1


# The protocol.


def test_interact_yields_the_answer_then_the_two_marks(model: RxTAlpha) -> None:
    """Catches a broken protocol, and a memory that misses the query, the answer or [EOS]."""
    before = model.export_conversation()
    said = talk(model, temperature=0)
    assert said[-2:] == [-1, -2] and all(token >= 0 for token in said[:-2])
    prompt = model.tokenize_query("My name is Ann.")["input_ids"][0].tolist()
    answer = model.generate(before, [prompt], GREEDY).answers[0]
    assert said[:-2] == answer.ids + ([3] if answer.reason == "eos" else [])
    expected = model.update_memory(before, [answer.turn])
    assert torch.equal(model.export_stm_state(), expected.slots)
    assert model.export_conversation().num_turns == (1,)


@pytest.mark.parametrize("memory_update", ["inline", "background"])
def test_looking_at_the_memory_disturbs_nothing(
    make_model: ModelBuilder, memory_update: Any
) -> None:
    """Catches a turn that is written twice, early, or breaks when the state is read meanwhile."""
    watched, other = make_model(eos_bias=4.0), make_model(eos_bias=4.0)
    before = watched.export_stm_state()
    said = []
    for token in watched.interact(**watched.tokenize_query("Hello"), memory_update=memory_update):
        said.append(token)
        changed = not torch.equal(watched.export_stm_state(), before)
        assert changed == (token in (3, -1, -2)), "the turn enters memory when its answer is over"
    assert said == talk(other, "Hello", memory_update=memory_update)
    assert torch.equal(watched.export_stm_state(), other.export_stm_state())
    assert watched.export_conversation().num_turns == (1,)


def test_a_conversation_that_was_replaced_is_not_written_to(model: RxTAlpha) -> None:
    """Catches an old answer entering the memory of a conversation that was started anew."""
    for stop_at in (0, -1):
        for token in model.interact(**model.tokenize_query("Hello"), temperature=0):
            if token == stop_at or (stop_at == 0 and token >= 0):
                model.reset_stm_state(seed=9)
                break
        assert model.export_conversation().num_turns == (0,)
    iterator = model.interact(**model.tokenize_query("Hello"), temperature=0)
    assert next(token for token in iterator if token == -1)
    model.reset_stm_state()
    with pytest.raises(UserError, match="went on without it"):
        next(iterator)
    assert model.export_conversation().num_turns == (0,)


def test_a_seed_starts_its_stream_at_the_beginning(model: RxTAlpha) -> None:
    """Catches a new seed whose draws are counted from where the old stream was."""
    for _ in range(2):
        said = [
            token
            for token in model.interact(**model.tokenize_query("Hello"), seed=5, max_seq_len=60)
            if token >= 0
        ]
        # An answer that is cut was drawn one token further.
        assert model.export_conversation().draws[0] - len(said) in (0, 1)


def test_a_seed_makes_an_answer_repeatable(model: RxTAlpha) -> None:
    """Catches draws from the global generator, and a seed that is ignored."""
    answers = []
    for seed in (5, 5, 6, None, None):
        model.reset_stm_state(seed=1)
        torch.manual_seed(len(answers))
        answers.append(talk(model, seed=seed, temperature=1.3))
    assert answers[0] == answers[1] != answers[2]
    assert answers[3] == answers[4] != answers[0]


def test_padding_of_the_query_changes_nothing(model: RxTAlpha) -> None:
    """Catches padded ids that are read as part of the query."""
    query = model.tokenize_query("Hello")
    expected = list(model.interact(**query, temperature=0))
    memory = model.export_stm_state()
    model.reset_stm_state()
    padded = {
        "input_ids": torch.nn.functional.pad(query["input_ids"], (2, 3), value=9),
        "attention_mask": torch.nn.functional.pad(query["attention_mask"].long(), (2, 3)),
    }
    assert list(model.interact(**padded, temperature=0)) == expected
    assert torch.equal(model.export_stm_state(), memory)


def test_a_reader_who_leaves_early_loses_no_turn(model: RxTAlpha) -> None:
    """Catches a memory that misses the turn when the reader breaks out of the loop."""
    before = model.export_conversation()
    said = []
    for token in model.interact(**model.tokenize_query("My name is Ann."), temperature=0.5):
        said.append(token)
        if len(said) == 2:
            break
    assert torch.is_grad_enabled()
    expected = model.update_memory(before, [turn_ids(model, "My name is Ann.", said)])
    assert torch.equal(model.export_stm_state(), expected.slots)
    assert model.export_conversation().draws == (2,)


def test_a_reader_who_leaves_may_discard_the_turn(model: RxTAlpha) -> None:
    """Catches a discarded turn that changes memory or randomness."""
    before = model.export_conversation()
    for _ in model.interact(**model.tokenize_query("Hello"), on_early_stop="discard"):
        break
    assert model.export_conversation() is before


@pytest.mark.parametrize("on_early_stop", ["commit", "discard"])
def test_leaving_after_the_answer_commits_it(model: RxTAlpha, on_early_stop: Any) -> None:
    """Catches a complete answer that is lost because the reader stopped at -1."""
    query = model.tokenize_query("Hello")
    before = model.export_conversation()
    said = []
    for token in model.interact(**query, temperature=0, on_early_stop=on_early_stop):
        said.append(token)
        if token == -1:
            break
    expected = model.update_memory(before, [turn_ids(model, "Hello", said)])
    assert torch.equal(model.export_stm_state(), expected.slots)


def test_an_iterator_that_is_never_read_is_no_turn(model: RxTAlpha) -> None:
    """Catches state that changes when an answer is only asked for."""
    before = model.export_stm_state()
    model.interact(**model.tokenize_query("Hello"))
    assert torch.equal(model.export_stm_state(), before)


def test_the_next_turn_ends_one_that_is_still_being_read(model: RxTAlpha) -> None:
    """Catches two turns mixed up, or the first one lost, while its iterator is still held."""
    before = model.export_conversation()
    first = model.interact(**model.tokenize_query("My name is Ann."), temperature=0)
    said = [next(first)]
    assert torch.equal(model.export_stm_state(), before.slots), "the turn is not over yet"
    second = talk(model, "Hello", temperature=0)
    after_first = model.update_memory(before, [turn_ids(model, "My name is Ann.", said)])
    after_both = model.update_memory(after_first, [turn_ids(model, "Hello", second)])
    assert torch.equal(model.export_stm_state(), after_both.slots)
    with pytest.raises(UserError, match="went on without it"):
        next(first)
    assert torch.equal(model.export_stm_state(), after_both.slots)


def test_grad_mode_is_the_readers_at_every_step(model: RxTAlpha) -> None:
    """Catches torch.no_grad() that stays active while the reader works or after it left."""
    for count, _ in enumerate(model.interact(**model.tokenize_query("Hello"))):
        assert torch.is_grad_enabled()
        if count == 1:
            break
    assert torch.is_grad_enabled()
    with torch.no_grad():
        iterator = model.interact(**model.tokenize_query("Hello"))
        next(iterator)
    assert torch.is_grad_enabled()
    next(iterator)
    del iterator
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "Hello " * 60}, "model's seq_len is 48"),
        ({"max_seq_len": 4}, "max_seq_len is 4"),
        ({"temperature": -1}, "temperature=-1"),
        ({"memory_update": "later"}, "memory_update='later'.*'inline', 'background'"),
        ({"on_early_stop": "panic"}, "on_early_stop='panic'"),
    ],
)
def test_a_query_that_cannot_be_answered_changes_nothing(
    model: RxTAlpha, options: dict[str, Any], message: str
) -> None:
    """Catches errors that come after the memory was changed, or only when the answer is read."""
    talk(model, "Hello", temperature=0)
    before = model.export_conversation()
    query = model.tokenize_query(options.pop("text", "Hello"), max_seq_len=1000)
    with pytest.raises(UserError, match=message):
        model.interact(**query, **options)
    assert model.export_conversation() is before


def test_several_rows_are_refused(model: RxTAlpha) -> None:
    """Catches a batch of which only the first row is answered."""
    with pytest.raises(UserError, match=r"generate\(\)"):
        model.interact(**model.tokenize_batch(["Hello", "My name is Ann."]))
    query = model.tokenize_query("Hello")
    with pytest.raises(UserError, match="attention_mask has shape"):
        model.interact(query["input_ids"], query["attention_mask"][:, :-1])


# Errors and interruptions.


class Failing:
    """Replaces a method: fails when told to."""

    def __init__(self, method: Callable[..., Any], error: BaseException) -> None:
        self.method, self.error, self.active = method, error, True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.active:
            raise self.error
        return self.method(*args, **kwargs)


@pytest.mark.parametrize("memory_update", ["inline", "background"])
def test_a_failed_update_surfaces_and_is_tried_again(
    model: RxTAlpha, monkeypatch: pytest.MonkeyPatch, memory_update: Any
) -> None:
    """Catches an update whose error nobody sees, and a turn that is lost with it."""
    before = model.export_conversation()
    failing = Failing(model.write_memory, RuntimeError("out of memory"))
    monkeypatch.setattr(model, "write_memory", failing)
    iterator = model.interact(
        **model.tokenize_query("Hello"), temperature=0, memory_update=memory_update
    )
    said = []
    with pytest.raises(RuntimeError, match="out of memory"):
        for token in iterator:
            said.append(token)
        model.wait_for_memory()
    assert said[-1] == -1
    failing.active = False
    expected = model.update_memory(before, [turn_ids(model, "Hello", said)])
    assert torch.equal(model.export_stm_state(), expected.slots)


def test_an_interrupted_answer_is_committed(
    model: RxTAlpha, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches Ctrl-C during a computation losing what was said before."""
    before = model.export_conversation()
    iterator = model.interact(**model.tokenize_query("Hello"), temperature=0)
    said = [next(iterator)]
    failing = Failing(model.decoder.logits, KeyboardInterrupt())
    monkeypatch.setattr(model.decoder, "logits", failing)
    with pytest.raises(KeyboardInterrupt):
        next(iterator)
    failing.active = False
    expected = model.update_memory(before, [turn_ids(model, "Hello", said)])
    assert torch.equal(model.export_stm_state(), expected.slots)


def test_a_failed_answer_is_no_turn(model: RxTAlpha, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches half an answer entering memory after the decoder failed."""
    before = model.export_conversation()
    iterator = model.interact(**model.tokenize_query("Hello"), temperature=0)
    next(iterator)
    failing = Failing(model.decoder.logits, RuntimeError("decoder failed"))
    monkeypatch.setattr(model.decoder, "logits", failing)
    with pytest.raises(RuntimeError, match="decoder failed"):
        next(iterator)
    assert model.export_conversation() is before


# Updates in the background.


def test_a_background_update_equals_an_inline_one(make_model: ModelBuilder) -> None:
    """Catches an update that is skipped, done twice, or not waited for by the next turn."""
    inline, background = make_model(eos_bias=4.0), make_model(eos_bias=4.0)
    for text in ("My name is Ann.", "Hello", "I live in Oslo."):
        expected = talk(inline, text, temperature=0.7)
        assert talk(background, text, temperature=0.7, memory_update="background") == expected[:-1]
    assert torch.equal(inline.export_stm_state(), background.export_stm_state())


def test_the_answer_does_not_wait_for_a_background_update(
    model: RxTAlpha, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a 'background' update that runs in the reader's thread."""
    release, write = threading.Event(), model.write_memory
    threads = []

    def slow(*args: Any) -> Tensor:
        threads.append(threading.current_thread())
        assert release.wait(30)
        return write(*args)

    monkeypatch.setattr(model, "write_memory", slow)
    before = model.export_stm_state()
    assert talk(model, memory_update="background")[-1] == -1
    release.set()
    model.wait_for_memory()
    assert threads[0] is not threading.main_thread()
    assert not torch.equal(model.export_stm_state(), before)


# The held memory.


def test_init_stm_state_starts_anew_with_the_prompt(model: RxTAlpha) -> None:
    """Catches a system prompt added to an old conversation, or counted as a turn."""
    prompt = model.tokenize_full_interaction("Your name is Ann.", "", max_seq_len=256)
    talk(model, "Hello")
    model.init_stm_state(**prompt)
    expected = model.update_memory(model.new_conversation(), [prompt["input_ids"][0].tolist()])
    assert torch.equal(model.export_stm_state(), expected.slots)
    assert model.export_conversation().num_turns == (0,)
    model.update_stm(**prompt)
    assert model.export_conversation().num_turns == (1,)
    assert not torch.equal(model.export_stm_state(), expected.slots)
    model.reset_stm_state(seed=4)
    assert model.export_conversation().seeds == (4,)
    assert torch.equal(model.export_stm_state(), model.new_conversation().slots)


def test_an_exported_memory_can_be_loaded_again(model: RxTAlpha) -> None:
    """Catches a lossy export, or one that changes when the conversation goes on."""
    talk(model, "My name is Ann.", temperature=0)
    memory = model.export_stm_state()
    conversation = model.export_conversation()
    next_turn = talk(model, "Hello", temperature=0)
    assert not torch.equal(model.export_stm_state(), memory)
    model.load_stm_state(memory)
    assert talk(model, "Hello", temperature=0) == next_turn
    model.load_stm_state(conversation)
    assert model.export_conversation().num_turns == (1,)
    memory.zero_()
    assert talk(model, "Hello", temperature=0) == next_turn


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (torch.zeros(2, 1, 7, 16), "7, 16.*another model"),
        (torch.zeros(2, 2, 6, 16), "2 conversations"),
        (torch.full((2, 1, 6, 16), float("nan")), "not finite"),
        (torch.zeros(2, 1, 6, 16, dtype=torch.int32), "int32"),
        (torch.zeros(2, 1, 6, 16, dtype=torch.bfloat16), r"memory is torch\.float32.*convert"),
    ],
)
def test_a_wrong_memory_is_refused_and_the_old_one_kept(
    model: RxTAlpha, slots: Tensor, message: str
) -> None:
    """Catches foreign or damaged memories, and a conversation lost to a failed load."""
    talk(model, "Hello")
    before = model.export_conversation()
    with pytest.raises(UserError, match=message):
        model.load_stm_state(slots)
    assert model.export_conversation() is before


def test_sharing_components_keeps_the_memory(model: RxTAlpha) -> None:
    """Catches share_components() starting the conversation anew."""
    talk(model, "Hello")
    before = model.export_stm_state()
    model.share_components()
    assert torch.equal(model.export_stm_state(), before)
    assert model.decoder.embedding is model.encoder.embedding


def test_conversations_as_values_do_not_touch_the_held_one(model: RxTAlpha) -> None:
    """Catches generate() or update_memory() working on hidden state."""
    talk(model, "Hello")
    before = model.export_conversation()
    state = model.new_conversation(2)
    result = model.generate(state, ["Hello", "My name is Ann."])
    model.update_memory(result.state, [answer.turn for answer in result.answers])
    assert model.export_conversation() is before


def test_a_copied_model_has_a_conversation_of_its_own(model: RxTAlpha) -> None:
    """Catches copies that share one conversation, or cannot be made after talking."""
    talk(model, "Hello", memory_update="background")
    model.wait_for_memory()
    twin = copy.deepcopy(model)
    before = model.export_stm_state()
    talk(twin, "My name is Ann.")
    assert torch.equal(model.export_stm_state(), before)
    assert not torch.equal(twin.export_stm_state(), before)


# Text and ids.


def test_tokenized_forms(model: RxTAlpha, tiny_tokenizer: Tokenizer) -> None:
    """Catches forms that differ from what the model was trained on, and silent truncation."""
    word = tiny_tokenizer.encode("Hello")
    query = model.tokenize_query("Hello")
    assert query["input_ids"].tolist() == [[2, 5, *word]]
    assert query["attention_mask"].all() and query["attention_mask"].shape == (1, 2 + len(word))
    full = model.tokenize_full_interaction("Hello", "Your name is Ann.")
    expected = encode_interaction(tiny_tokenizer, "Hello", "Your name is Ann.").ids
    assert full["input_ids"].tolist() == [expected]
    batch = model.tokenize_batch(["Hello", "My name is Ann."])
    assert batch["attention_mask"].sum(dim=1).tolist() == [
        model.tokenize_query(text)["input_ids"].shape[1] for text in ("Hello", "My name is Ann.")
    ]
    with pytest.raises(UserError, match=f"{2 + len(word)} tokens but max_seq_len=3"):
        model.tokenize_query("Hello", max_seq_len=3)
    with pytest.raises(UserError, match="no texts"):
        model.tokenize_batch([])


def pieces(model: RxTAlpha, ids: list[int], **options: bool) -> Iterator[str]:
    for token in ids:
        yield model.stringify_token(token, **options)


def test_stringified_tokens_never_cut_a_character(
    model: RxTAlpha, tiny_tokenizer: Tokenizer
) -> None:
    """Catches replacement characters where a character spans several tokens."""
    text = "Zażółć 😀 ok"
    ids = tiny_tokenizer.encode(text)
    texts = list(pieces(model, [*ids, 3, -1, -2]))
    assert "".join(texts) == text and "\ufffd" not in "".join(texts)
    assert "" in texts[: len(ids)], "some token must have been held back"
    # An answer that ends inside a character: what is held is shown, and not by the next answer.
    half = tiny_tokenizer.encode("😀")[:-1]
    assert "".join(pieces(model, [*half, -1])) == "\ufffd"
    assert "".join(pieces(model, [*half])) == ""
    talk(model, "Hello")
    assert "".join(pieces(model, ids)) == text


def test_marks_and_special_tokens_are_shown_on_demand(model: RxTAlpha) -> None:
    """Catches notes in the answer of a reader who did not ask for them."""
    assert "".join(pieces(model, [3, -1, -2])) == ""
    assert "memory" in model.stringify_token(-1, show_memory_update=True)
    assert "updated" in model.stringify_token(-2, show_memory_update=True)
    assert model.stringify_token(3, skip_special_tokens=False) == "[EOS]"


# Weights of components.


def test_component_weights_can_be_loaded(make_model: ModelBuilder) -> None:
    """Catches a component that keeps its old weights, or an embedding that is no longer shared."""
    target, source = make_model(seed=1), make_model(seed=2)
    target.load_pretrained_weights(
        decoder=source.decoder,
        encoder=source.encoder.state_dict(),
        memory_attention=source.memory_attention,
    )
    assert target.fingerprint() == source.fingerprint()
    assert target.decoder.embedding is target.encoder.embedding


def test_component_weights_that_do_not_fit_are_refused(make_model: ModelBuilder) -> None:
    """Catches partly copied weights, and a decoder that silently replaces the embedding."""
    target, source, other = make_model(seed=1), make_model(seed=2), make_model(seed=3)
    before = target.fingerprint()
    wrong = source.encoder.state_dict()
    wrong["extra"] = wrong.pop("layers.0.norm_self.weight")
    wrong["layers.1.norm_self.weight"] = torch.ones(5)
    with pytest.raises(UserError) as error:
        target.load_pretrained_weights(encoder=wrong, memory_attention=source.memory_attention)
    message = str(error.value)
    assert "encoder.layers.0.norm_self.weight: missing" in message
    assert "encoder.extra: unknown" in message
    assert "encoder.layers.1.norm_self.weight: shape [5], this model's is [16]" in message
    with pytest.raises(UserError, match="share one token embedding"):
        target.load_pretrained_weights(decoder=source.decoder, encoder=other.encoder)
    assert target.fingerprint() == before


def test_another_tokenizer_changes_the_fingerprint(
    make_model: ModelBuilder, tiny_tokenizer: Tokenizer
) -> None:
    """Catches a memory that is taken over by a model whose words have other ids."""
    size = tiny_tokenizer.vocab_size
    texts = ["Completely other words are learned here, over and over again."] * 4
    tokenizer = train_tokenizer(texts, TokenizerTraining(vocab_size=size))
    assert tokenizer.vocab_size == size
    ours, theirs = make_model(), make_model(tokenizer=tokenizer)
    assert ours.fingerprint().differences(theirs.fingerprint()) == ["tokenizer"]
