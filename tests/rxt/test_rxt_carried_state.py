"""The state that MD-GDN layers carry from turn to turn: decoder, conversations, sessions, files.

Not here: one layer (tests/nn/test_nn_memory_driven), decoding within a turn (test_rxt_linear),
training (test_training_objective_carried).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.nn.expert_routing import record_routing
from rxlm.nn.linear_attention import LinearSelfAttention
from rxlm.nn.recurrent_cache import CarriedState
from rxlm.nn.turn_layout import TurnLayout
from rxlm.ops.sampling import GREEDY
from rxlm.rxt.components import RxTDecoder, RxTEncoder
from rxlm.rxt.config import RxTComponentConfig
from rxlm.rxt.conversation import ConversationState, check_carried
from rxlm.rxt.decode_values import MemoryReading
from rxlm.rxt.models import RxTAlpha
from rxlm.rxt.session import Session

ModelBuilder = Callable[..., RxTAlpha]

MD_GDN: dict[str, Any] = {
    "use_linear_self_attn": True, "linear_attn_type": "md_gdn", "linear_attn_use_short_conv": True,
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "add": MD_GDN,
    "concat": {**MD_GDN, "memory_fusion_mode": "concat"},
    "hybrid": {
        "self_att_type": "hybrid", "attn_layer_types": ["mha", "md_gdn"],
        "linear_attn_use_short_conv": True,
    },
    "no slots": {**MD_GDN, "skip_memory_cross_attention": True},
    "stateless": {
        **MD_GDN, "stateless_layers_config": ["dense"], "dense_layer_dim": 12, "num_experts": 3,
        "final_stateless_layers_config": ["moe"],
    },
}  # fmt: skip
COMPONENT: dict[str, Any] = {
    "num_layers": 2, "embed_dim": 16, "att_heads": 4, "stm_size": 3, "vocab_size": 30,
    "ff_dim": 20, "seq_len": 64, "cross_att_type": "mha",
}  # fmt: skip
TURNS = [[2, 5, 40, 41, 6, 42, 3], [2, 5, 90, 6, 3], [2, 5, 7, 100, 101, 6, 50, 51, 52, 3]]
PROMPTS = [[2, 5, 40, 41, 42], [2, 5, 90], [2, 5, 7, 100, 101, 102]]

layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def awake(module: torch.nn.Module) -> None:
    """Let memory have a say: weights that start at zero become random."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, LinearSelfAttention) and part.settings.memory_fusion is not None:
                part.memory_fusion.up.weight.normal_(generator=generator)
                part.memory_fusion.keep.weight.normal_(std=0.3, generator=generator)
                part.memory_fusion.scale.fill_(1.0)


def decoder_of(**fields: Any) -> RxTDecoder:
    torch.manual_seed(0)
    decoder = RxTDecoder({**COMPONENT, **fields}).eval()
    awake(decoder)
    return decoder


@pytest.fixture
def model(make_model: ModelBuilder) -> RxTAlpha:
    made = make_model(**MD_GDN)
    awake(made)
    return made


def same(one: ConversationState, other: ConversationState, exactly: bool = True) -> bool:
    pairs = [(one.slots, other.slots)]
    assert one.carried is not None and other.carried is not None
    pairs += list(zip(one.carried, other.carried, strict=True))
    equal = torch.equal if exactly else lambda a, b: torch.allclose(a, b, atol=1e-5, rtol=1e-5)
    return all(equal(a, b) for a, b in pairs)


# The decoder.


@pytest.mark.parametrize("mode", ["add", "concat"])
def test_a_decoder_without_memory_is_that_of_kda(mode: str) -> None:
    """Catches a decoder that is not plain KDA, bit for bit, where no memory is given."""
    driven = decoder_of(**MD_GDN, memory_fusion_mode=mode)
    plain = decoder_of(**{**MD_GDN, "linear_attn_type": "kda"})
    weights = {k: v for k, v in driven.state_dict().items() if "memory_fusion" not in k}
    plain.load_state_dict(weights)
    ids = torch.randint(0, 29, (2, 70))
    with torch.no_grad():
        assert torch.equal(driven(ids)[0], plain(ids)[0])
        slots = torch.randn(2, 2, 3, 16)
        heard = [d(ids, memory=d.read_memory(slots))[0] for d in (driven, plain)]
    assert not torch.allclose(*heard)


def test_memory_is_read_once_per_turn_and_not_per_token() -> None:
    """Catches memory projections in the decoding step: in 'add' mode none may be left there."""
    decoder = decoder_of(**MD_GDN)
    calls: list[str] = []
    for name, part in decoder.named_modules():
        if ".memory_fusion." in name:
            part.register_forward_hook(lambda *_, name=name: calls.append(name))
    memory = decoder.read_memory(torch.randn(2, 1, 3, 16))
    assert len(calls) == len(set(calls)) > 0
    calls.clear()
    _, cache = decoder(torch.randint(0, 29, (1, 5)), memory=memory)
    for _ in range(3):
        _, cache = decoder(torch.randint(0, 29, (1, 1)), memory=memory, cache=cache)
    assert calls == []


def test_two_turns_without_slots_and_convolution_are_one_sequence() -> None:
    """Catches a boundary between turns that the decoder notices although nothing tells it."""
    decoder = decoder_of(**{**LAYOUTS["no slots"], "linear_attn_use_short_conv": False})
    ids = torch.randint(0, 29, (2, 90))
    with torch.no_grad():
        whole, whole_cache = decoder(ids)
        first, cache = decoder(ids[:, :41])
        carried = decoder.carry(cache, None)
        second, cache = decoder(ids[:, 41:], carried=carried)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, atol=1e-5, rtol=1e-5)
    found, wanted = decoder.carry(cache, carried), decoder.carry(whole_cache, None)
    assert found is not None and wanted is not None
    torch.testing.assert_close(found.states, wanted.states, atol=1e-5, rtol=1e-5)


@layouts
def test_a_batch_with_padding_and_pieces_is_each_row_alone(layout: dict[str, Any]) -> None:
    """Catches padding that decays what is carried, rows without a past that get one, and a turn
    in pieces that starts afresh with each of them."""
    decoder = decoder_of(**layout)
    slots = torch.randn(2, 3, 3, 16)
    rows = [torch.randint(0, 29, (length,)) for length in (6, 3, 5)]
    start = decoder.nothing_carried(3)
    assert start is not None
    start = CarriedState(torch.randn_like(start.states), torch.tensor([True, False, True]))
    start = start.reset(~start.started)
    ids, mask = torch.full((3, 8), 29), torch.zeros(3, 8, dtype=torch.bool)
    for r, (row, left) in enumerate(zip(rows, (2, 0, 1), strict=True)):
        ids[r, left : left + len(row)], mask[r, left : left + len(row)] = row, True
    memory = decoder.read_memory(slots)
    with torch.no_grad():
        whole, cache = decoder(ids, mask, memory=memory, carried=start)
        _, part = decoder(ids[:, :4], mask[:, :4], memory=memory, carried=start)
        _, pieces = decoder(ids[:, 4:], mask[:, 4:], memory=memory, cache=part)
        together, in_pieces = decoder.carry(cache, start), decoder.carry(pieces, start)
        assert together is not None and in_pieces is not None
        torch.testing.assert_close(together.states, in_pieces.states, atol=1e-5, rtol=1e-5)
        for r, row in enumerate(rows):
            reading = decoder.read_memory(slots[:, r : r + 1])
            alone, cache = decoder(row[None], memory=reading, carried=start.select([r]))
            carried = decoder.carry(cache, start.select([r]))
            assert carried is not None
            torch.testing.assert_close(whole[r, mask[r]], alone[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                together.states[:, r], carried.states[:, 0], atol=1e-5, rtol=1e-5
            )
    assert together.started.tolist() == [True] * 3


def test_experts_count_the_real_tokens_of_turns_in_order() -> None:
    """Catches padding of chunks or of turns in the statistics of experts."""
    decoder = decoder_of(**LAYOUTS["stateless"], use_moe=True)
    lengths = torch.tensor([[5, 20], [17, 0]])
    layout = TurnLayout.of_lengths(lengths)
    ids = torch.randint(0, 29, layout.mask.shape)
    with torch.no_grad(), record_routing() as record:
        decoder.forward_turns(ids, layout)
    # Two layers that carry a state and the one behind them.
    assert [int(layer.tokens) for layer in record.layers()] == [int(lengths.sum())] * 3


def test_a_row_without_a_token_carries_what_it_had() -> None:
    """Catches a state that is mixed with the memory although nothing was said."""
    decoder = decoder_of(**MD_GDN)
    before = CarriedState(torch.randn(2, 2, 4, 4, 4), torch.tensor([True, False])).reset(
        torch.tensor([False, True])
    )
    ids, mask = torch.randint(0, 29, (2, 4)), torch.zeros(2, 4, dtype=torch.bool)
    memory = decoder.read_memory(torch.randn(2, 2, 3, 16))
    _, cache = decoder(ids, mask, memory=memory, carried=before)
    after = decoder.carry(cache, before)
    assert after is not None
    assert torch.equal(after.states, before.states) and after.started.tolist() == [True, False]


def test_the_encoder_is_bidirectional_kda_without_memory() -> None:
    """Catches an encoder with parameters of a memory that it never reads."""
    torch.manual_seed(0)
    driven = RxTEncoder({**COMPONENT, **MD_GDN})
    torch.manual_seed(0)
    plain = RxTEncoder({**COMPONENT, **MD_GDN, "linear_attn_type": "kda"})
    ids = torch.randint(0, 29, (2, 9))
    assert torch.equal(driven(ids), plain(ids))
    assert driven.state_dict().keys() == plain.state_dict().keys()


def test_the_shape_is_that_of_the_layers_that_carry() -> None:
    """Catches softmax layers counted, and head widths other than those of the layers."""
    assert decoder_of(**LAYOUTS["hybrid"], linear_attn_heads=2).carried_shape == (1, 2, 8, 8)
    assert decoder_of(**MD_GDN, linear_attn_expand_v=2.0).carried_shape == (2, 4, 4, 8)
    assert decoder_of(**LAYOUTS["stateless"]).carried_shape == (2, 4, 4, 4)
    plain = decoder_of()
    assert plain.carried_shape is None and plain.nothing_carried(3) is None
    assert not plain.carries_state


def test_states_that_do_not_fit_a_decoder_are_refused() -> None:
    """Catches a carried state that is ignored or broadcast, and a memory that is missing."""
    decoder, plain = decoder_of(**MD_GDN), decoder_of()
    ids = torch.randint(0, 29, (2, 4))
    carried = decoder.nothing_carried(2)
    assert carried is not None
    _, cache = decoder(ids)
    for build, options, message in (
        (plain, {"carried": carried}, "no md_gdn layer"),
        (decoder, {"carried": carried.select([0])}, r"expected \[2, 2, 4, 4, 4\]"),
        (decoder, {"carried": carried, "cache": cache}, "first tokens only"),
        (decoder, {"memory": MemoryReading(())}, "read_memory"),
    ):
        with pytest.raises(UserError, match=message):
            build(ids, **options)


def test_fields_that_are_not_read_are_named() -> None:
    """Catches a setting without effect that nobody is told about."""
    changed = {"memory_fusion_mode": "concat"}
    assert RxTComponentConfig(**MD_GDN, **changed).ignored_fields() == []
    for fields in ({}, {**MD_GDN, "skip_memory_cross_attention": True}):
        assert "memory_fusion_mode" in RxTComponentConfig(**fields, **changed).ignored_fields()


# Conversations.


def test_what_is_carried_is_what_reading_the_whole_turn_leaves(model: RxTAlpha) -> None:
    """Catches a last token ([EOS]) that is left out, the memory after the turn in place of that
    before it, and a state that is not passed on."""
    state = model.new_conversation(1)
    carried = None
    for turn in TURNS:
        with torch.no_grad():
            memory = model.decoder.read_memory(state.slots)
            _, cache = model.decoder(torch.tensor([turn]), memory=memory, carried=carried)
        carried = model.decoder.carry(cache, carried)
        state = model.update_memory(state, [turn])
        assert carried is not None and state.carried is not None
        assert torch.equal(state.carried.states, carried.states)
    assert state.carried is not None and state.carried.started.tolist() == [True]


def test_batched_conversations_are_single_ones(make_model: ModelBuilder) -> None:
    """Catches a carried state that depends on the neighbours, in updates or in answers."""
    for layout in LAYOUTS.values():
        model = make_model(eos_bias=5.0, **layout)
        awake(model)
        state = model.update_memory(model.new_conversation(3), TURNS[::-1])
        state = model.update_memory(state, [TURNS[0], [], TURNS[2]])
        together = model.generate(state, PROMPTS, GREEDY, max_new_tokens=12)
        for row, prompt in enumerate(PROMPTS):
            alone = model.update_memory(model.new_conversation(3).select([row]), [TURNS[::-1][row]])
            if row != 1:
                alone = model.update_memory(alone, [TURNS[row]])
            assert same(alone, state.select([row]), exactly=False)
            answer = model.generate(state.select([row]), [prompt], GREEDY, max_new_tokens=12)
            assert answer.answers[0] == together.answers[row]


def test_the_carried_state_changes_answers(model: RxTAlpha) -> None:
    """Catches a state that is kept with care and never read."""
    state = model.update_memory(model.new_conversation(3), TURNS)
    fresh = state.replaced(carried=model.decoder.nothing_carried(3))
    found = model.generate(state, PROMPTS, GREEDY, max_new_tokens=12).answers
    assert found != model.generate(fresh, PROMPTS, GREEDY, max_new_tokens=12).answers


def test_rows_are_chosen_stacked_and_reset(model: RxTAlpha) -> None:
    """Catches a carried state that stays behind when conversations are rearranged."""
    state = model.update_memory(model.new_conversation(3), TURNS)
    picked = state.select([2, 0])
    again = ConversationState.stack([picked, state.select([1])]).select([1, 2, 0])
    assert same(again, state)
    doubled = state.repeat(2)
    assert same(doubled.select([1, 3, 5]), state)
    assert same(state.detach().to("cpu"), state)
    anew = ConversationState.stack([state.select([0]), model.new_conversation(1)])
    assert anew.carried is not None and anew.carried.started.tolist() == [True, False]
    with pytest.raises(UserError, match="different models"):
        ConversationState.stack([state, ConversationState.start(state.slots, 0)])


def test_an_update_leaves_its_input_unchanged(model: RxTAlpha) -> None:
    """Catches in-place writes: whoever keeps an old state must be able to go back to it."""
    state = model.update_memory(model.new_conversation(3), TURNS)
    assert state.carried is not None
    before = state.carried.states.clone()
    model.update_memory(state, TURNS)
    model.generate(state, PROMPTS, GREEDY, max_new_tokens=4)
    assert torch.equal(state.carried.states, before)
    assert not state.carried.states.requires_grad


def test_a_system_prompt_is_carried_too(model: RxTAlpha) -> None:
    """Catches a prompt that slots hold and the carried state does not: training writes both."""
    state = model.new_conversation(1, system="Hello, Ann.")
    assert state.carried is not None and state.carried.started.tolist() == [True]
    assert state.num_turns == (0,)


def test_a_foreign_carried_state_is_refused(model: RxTAlpha, make_model: ModelBuilder) -> None:
    """Catches half of a conversation of another model, and slots alone with another's past."""
    state = model.update_memory(model.new_conversation(1), TURNS[:1])
    assert state.carried is not None
    plain = make_model()
    with pytest.raises(UserError, match="no md_gdn layer"):
        plain.update_memory(state, TURNS[:1])
    with pytest.raises(UserError, match="no md_gdn layer"):
        plain.load_stm_state(state)
    nan = state.replaced(carried=state.carried._replace(states=state.carried.states * torch.nan))
    with pytest.raises(UserError, match="not finite"):
        model.load_stm_state(nan)
    with pytest.raises(UserError, match=r"torch\.int64"):
        check_carried(
            state.carried._replace(started=torch.ones(1, dtype=torch.long)),
            model.decoder.carried_shape,
            1,
        )
    model.load_stm_state(state)
    assert same(model.export_conversation(), state)
    model.load_stm_state(state.slots)
    held = model.export_conversation().carried
    assert held is not None and not held.started.any() and not held.states.any()


# Sessions and their files.


def spoken(model: RxTAlpha) -> Session:
    session = model.session(seed=3, settings={"temperature": 0.0})
    for text in ("My name is Ann.", "Hello"):
        session.ask(text)
    return session


def next_tokens(session: Session) -> tuple[str, Tensor]:
    answer = session.ask("What is my name?")
    assert session.state.carried is not None
    return answer, session.state.carried.states


def test_a_session_goes_on_after_a_restart(model: RxTAlpha, tmp_path: Path) -> None:
    """Catches a carried state that a file loses or rounds: the next tokens must be identical."""
    session = spoken(model)
    session.save(tmp_path / "s")
    model.save_pretrained(tmp_path / "m")
    loaded = Session.load(tmp_path / "s", RxTAlpha.from_pretrained(tmp_path / "m"))
    assert same(loaded.state, session.state)
    wanted, found = next_tokens(session), next_tokens(loaded)
    assert wanted[0] == found[0]
    torch.testing.assert_close(wanted[1], found[1], atol=1e-6, rtol=1e-5)
    loaded.undo(2)
    session.undo(2)
    assert same(loaded.state, session.state), "the states before the last turns are kept as well"


def test_undo_and_fork_take_the_carried_state_along(model: RxTAlpha) -> None:
    """Catches a fork that shares its past's future, and an undo of the slots alone."""
    session = spoken(model)
    before = session.state
    fork = session.fork()
    fork.ask("My name is Bob.")
    assert session.state is before and not same(fork.state, before)
    fork.undo()
    assert same(fork.state, before)


def test_formats_of_session_files(
    model: RxTAlpha, make_model: ModelBuilder, tmp_path: Path
) -> None:
    """Catches sessions of other models that change, and a file whose half is missing."""

    def version(folder: Path, new: int | None = None) -> int:
        path = folder / "meta.json"
        meta = json.loads(path.read_text())
        found = meta["format_version"]
        if new is not None:
            path.write_text(json.dumps({**meta, "format_version": new}))
        return found

    plain = make_model()
    spoken(plain).save(tmp_path / "plain")
    assert version(tmp_path / "plain") == 1
    assert len(Session.load(tmp_path / "plain", plain).turns) == 2
    spoken(model).save(tmp_path / "carrying")
    assert version(tmp_path / "carrying", new=1) == 2
    with pytest.raises(UserError, match="with a carried state"):
        Session.load(tmp_path / "carrying", model)
    version(tmp_path / "carrying", new=3)
    with pytest.raises(UserError, match="reads 1 and 2"):
        Session.load(tmp_path / "carrying", model)


def test_only_a_carried_state_starts_slow_and_as_a_copy() -> None:
    """Catches a start that hangs on the slots: without them the state is carried just the same, and
    an encoder or a layer without memory carries nothing."""
    for layout in ("add", "no slots"):
        attention = decoder_of(**LAYOUTS[layout]).layers[0].self_attention
        assert attention.settings.carried
        assert torch.nn.functional.softplus(attention.gates.dt_bias).max() < 2e-3
        value = attention.query_key_value.weight[-attention.output.in_features :]
        assert torch.equal(value, torch.eye(*value.shape))
    stateless = decoder_of(
        self_att_type="hybrid",
        attn_layer_types=["mha", "mha"],
        stateless_layers_config=["dense"],
        stateless_attn_layer_types=["md_gdn"],
    )
    assert not stateless.carries_state
    assert not stateless.initial_layers[0].self_attention.settings.carried
