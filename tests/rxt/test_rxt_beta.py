"""``RxTBeta``: modes and marks of ``interact``, its ids, its template, folders, and batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rxlm
from rxlm.errors import UserError
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.beta import MAX_SEQ_LEN
from rxlm.rxt.models import RxTAlpha, RxTBeta
from rxlm.tokenization import RICH_TEMPLATE, Tokenizer, encode_system

BOS, EOS, QUERY, ANSWER, THINK, CALL, USE, INTERNAL = 2, 3, 5, 6, 7, 8, 9, 10
SIZES = {"num_layers": 2, "embed_dim": 16, "att_heads": 2, "stm_size": 4, "seq_len": 40}


def build(tokenizer: Tokenizer | None, seed: int = 0, **options: Any) -> RxTBeta:
    """Return a random Beta that says special tokens often."""
    size = 300 if tokenizer is None else tokenizer.vocab_size
    part = {**SIZES, "vocab_size": size, "ff_dim": 16, "self_att_type": "mha"}
    part["cross_att_type"] = "mha"
    memory = options.pop("memory", {})
    memory = {**SIZES, "att_type": "mha", "interlayer_att_type": "mha", **memory}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RxTBeta(part, part, memory, tokenizer=tokenizer, **options)
    for token in (0, 1, 2, 3, 5, 6, 7, 8, 9, 10):
        model.decoder.head_bias.data[token] = 4.0
    return model.eval()


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Tokenizer) -> RxTBeta:
    return build(tiny_tokenizer)


def said(model: RxTBeta, mode: Any, seed: int) -> list[int]:
    model.reset_stm_state()
    query = model.tokenize_query("Hello")
    ids = list(model.interact(**query, thinking_mode=mode, seed=seed))
    assert ids[-2:] == [-1, -2]
    return ids[:-2]


def test_what_is_said_has_its_form_in_every_mode(model: RxTBeta) -> None:
    """Thinking after the answer, [Q] in the middle of it, two calls, or 'auto' deciding twice."""
    order = {THINK: 0, ANSWER: 1, CALL: 2, EOS: 3}
    for mode, first in (("fast", None), ("extended", THINK), ("auto", None)):
        for seed in range(4):
            ids = said(model, mode, seed)
            special = [token for token in ids if token <= INTERNAL]
            assert set(special) <= set(order)
            ranks = [order[token] for token in special]
            assert ranks == sorted(set(ranks)), (mode, special)
            if first is not None:
                assert ids[0] == first
            if mode == "fast":
                assert THINK not in ids and ANSWER not in ids
            if mode == "auto":
                assert ids[0] in (THINK, ANSWER)


def test_auto_takes_the_likelier_opening_whatever_the_temperature(tiny_tokenizer: Any) -> None:
    """A mode that is drawn anew with every seed, or decided by another token's score."""
    for likelier in (ANSWER, THINK):
        model = build(tiny_tokenizer)
        model.decoder.head_bias.data[likelier] = 9.0
        model.decoder.head_bias.data[CALL] = 20.0
        query = model.tokenize_query("Hello")
        for seed in range(4):
            first = next(model.interact(**query, temperature=5.0, seed=seed))
            assert first == likelier


def test_modes_in_a_batch_equal_those_alone(model: RxTBeta) -> None:
    """A row that takes over the part in which its neighbour is."""
    settings = SamplingSettings(temperature=1.0)
    prompts = ["Hello", "My name is Ann.", "Oslo"]
    for mode in ("fast", "extended", "auto"):
        state = model.new_conversation(3, seed=5)
        together = model.generate(state, prompts, settings, thinking_mode=mode).answers
        for row, prompt in enumerate(prompts):
            alone = model.generate(state.select([row]), [prompt], settings, thinking_mode=mode)
            assert alone.answers[0] == together[row]


def test_without_tool_calls_none_can_be_chosen(model: RxTBeta) -> None:
    """A last interaction that calls again after all, with nobody to answer."""
    call = model.config.tokenizer.tool_call_token_id
    assert call is not None
    logits = torch.zeros(1, model.config.decoder.vocab_size)
    logits[0, call] = 100.0
    for tool_calls in (True, False):
        form = model.answer_form("fast", tool_calls)
        scores = form.restrict(logits, [form.answer_id])
        assert (int(scores.argmax()) == call) is tool_calls


def test_a_batch_is_cut_where_single_answers_are(model: RxTBeta) -> None:
    """Batches that take another default length than interact() and tokenize_batch() do."""
    assert model.turn_length == MAX_SEQ_LEN
    model.reset_stm_state()
    query = model.tokenize_query("Hello")
    alone = [token for token in model.interact(**query, seed=3, thinking_mode="fast") if token >= 0]
    model.set_batch_mode(True, batch_size=2)
    rows = model.tokenize_batch([None, "Hello"])
    found = model.batch_interactions(**rows, seed=[None, 3])
    assert found.ids[1][found.mask[1]].tolist() == alone[: int(found.mask[1].sum())]
    assert len(alone) == int(found.mask[1].sum())
    model.set_batch_mode(False)


def test_a_turn_without_an_end_still_fits(model: RxTBeta) -> None:
    """An opening that the model chooses and for which there is no place left."""
    for mode in ("fast", "extended", "auto"):
        state = model.new_conversation()
        (answer,) = model.generate(
            state, ["Hello"], SamplingSettings(), max_seq_len=8, thinking_mode=mode
        ).answers
        assert len(answer.turn) <= 8
        assert answer.turn[-1] == EOS


def test_tokenized_forms(model: RxTBeta) -> None:
    """Options of the reference that are ignored, or parts in another order."""
    tokenizer = model.require_tokenizer()
    hi, x = tokenizer.encode("Hello"), tokenizer.encode("x")

    def ids(tensors: dict[str, Any]) -> list[int]:
        assert tensors["attention_mask"].all()
        return tensors["input_ids"][0].tolist()

    assert ids(model.tokenize_query("Hello", internal="x")) == [BOS, INTERNAL, *x, QUERY, *hi]
    assert ids(model.tokenize_tool_result("Hello")) == [BOS, USE, *hi]
    whole = model.tokenize_full_interaction(
        tool_use="Hello", answer="x", think="x", tool_call="Hello"
    )
    assert ids(whole) == [BOS, USE, *hi, THINK, *x, ANSWER, *x, CALL, *hi, EOS]
    prompt = ids(model.tokenize_system_prompt("Hello"))
    assert tokenizer.decode(prompt) == "SYSTEM INSTRUCTIONS\n\nHello"
    with pytest.raises(UserError, match="exactly one"):
        model.tokenize_full_interaction("Hello", "x", tool_use="x")
    with pytest.raises(UserError, match="max_seq_len=3"):
        model.tokenize_query("Hello", max_seq_len=3, internal="x")


def test_parts_of_an_answer(model: RxTBeta) -> None:
    """A tool call that is read as answer, or marks that are taken for ids."""
    x = model.require_tokenizer().encode("x")
    assert model.parse_answer([*x, EOS, -1, -2]) == {"answer": "x"}
    ids = [THINK, *x, ANSWER, CALL, *x, EOS, -1]
    assert model.parse_answer(ids) == {"think": "x", "answer": "", "tool_call": "x"}


def test_the_system_prompt_is_in_memory(model: RxTBeta) -> None:
    """Instructions that are not written, or not as training writes them."""
    model.init_model("Hello")
    ids = encode_system(model.require_tokenizer(), "Hello")
    wanted = model.update_memory(model.new_conversation(), [ids]).slots
    assert torch.equal(model.export_stm_state(), wanted)
    assert torch.equal(model.new_conversation(system="Hello").slots, wanted)
    list(model.interact(**model.tokenize_query("Hello"), seed=42))
    model.init_model("Hello")
    assert model.export_conversation().seeds == (0,)
    model.init_model()
    assert torch.equal(model.export_stm_state(), model.new_conversation().slots)


def test_the_template_goes_with_the_tokenizer(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A title that a loaded model has lost, so that it reads other instructions than it learned."""
    for title, wanted in ((None, "SYSTEM INSTRUCTIONS"), ("RULES", "RULES"), ("", "")):
        model = build(tiny_tokenizer, system_prompt_title=title)
        assert model.system_prompt_title == wanted
        folder = tmp_path / (title or f"none-{title}")
        model.save_pretrained(folder)
        loaded = RxTBeta.from_pretrained(folder)
        assert loaded.system_prompt_title == wanted
        assert loaded.fingerprint() == model.fingerprint()
    assert tiny_tokenizer.template != RICH_TEMPLATE
    assert model.require_tokenizer().template.said == RICH_TEMPLATE.said


def test_folders_give_the_model_that_wrote_them(model: RxTBeta, tmp_path: Path) -> None:
    """A Beta that is loaded as an Alpha (by ``rxlm chat``, say) and cannot think any more."""
    model.save_pretrained(tmp_path / "beta")
    assert type(RxTAlpha.from_pretrained(tmp_path / "beta")) is RxTBeta
    assert type(rxlm.load(tmp_path / "beta")) is RxTBeta


def test_the_default_variant(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A default that overrides what was chosen, at first or when loaded."""
    assert build(None).config.memory_attention.variant == "self-interlayer"
    chosen = build(tiny_tokenizer, memory={"variant": "simple"})
    assert chosen.config.memory_attention.variant == "simple"
    chosen.save_pretrained(tmp_path)
    assert RxTBeta.from_pretrained(tmp_path).config == chosen.config


def test_mistakes_are_named(model: RxTBeta, make_model: Any) -> None:
    """A misspelled mode, an Alpha that is asked to think, or a Beta without the tokens."""
    query = model.tokenize_query("Hello")
    with pytest.raises(UserError, match="did you mean 'extended'"):
        model.interact(**query, thinking_mode="extend")
    alpha = make_model()
    with pytest.raises(UserError, match="RxTAlpha answers at once"):
        alpha.generate(alpha.new_conversation(), ["Hello"], thinking_mode="auto")
    part = {**SIZES, "vocab_size": 300, "self_att_type": "mha", "cross_att_type": "mha"}
    memory = {**SIZES, "att_type": "mha", "interlayer_att_type": "mha"}
    with pytest.raises(UserError, match="no think_token_id"):
        RxTBeta(part, part, memory, {"think_token_id": None})
