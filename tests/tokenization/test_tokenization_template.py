"""The form of an interaction: positions of [A] and [EOS]; ids, text and Jinja agree."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rxlm.tokenization import (
    SpecialTokens,
    Tokenizer,
    chat_template,
    encode_interaction,
    encode_query,
    encode_system,
    render_interaction,
)

section_text = st.text(max_size=12) | st.sampled_from(["[A]", "[EOS] hi", " Oslo", ""])


def test_the_parts_of_an_interaction_are_in_order(tokenizer: Tokenizer) -> None:
    """Would catch a missing or misplaced special token."""
    query, answer, context = (tokenizer.encode(text) for text in ("Who am I?", "Ann", "be brief"))
    turn = encode_interaction(tokenizer, "Who am I?", "Ann", internal="be brief")
    assert turn.ids == [2, 10, *context, 5, *query, 6, *answer, 3]
    assert turn.ids[: turn.answer_start] == [2, 10, *context, 5, *query]
    assert encode_interaction(tokenizer, "Who am I?", "Ann").ids == [2, 5, *query, 6, *answer, 3]
    assert encode_system(tokenizer, "be brief") == [2, 10, *context, 3]


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(query=section_text, answer=section_text, internal=st.none() | section_text)
def test_targets_run_from_the_answer_token_to_eos(
    any_tokenizer: Tokenizer, query: str, answer: str, internal: str | None
) -> None:
    """Would catch [A] or [EOS] left out of the targets, or text that passes for either."""
    ids, start = encode_interaction(any_tokenizer, query, answer, internal)
    assert [index for index, value in enumerate(ids) if value == any_tokenizer.answer_id] == [start]
    assert [index for index, value in enumerate(ids) if value == any_tokenizer.eos_id] == [
        len(ids) - 1
    ]
    assert ids[:start] == encode_query(any_tokenizer, query, internal)
    assert any_tokenizer.decode(ids[start:]) == answer
    spelled = any_tokenizer.decode(ids, skip_special_tokens=False)
    assert spelled == render_interaction(query, answer, internal)


def render_chat(messages: list[dict[str, Any]], special: SpecialTokens, **values: Any) -> str:
    """Render the chat template the way transformers does (sandboxed, trimmed blocks)."""
    sandbox = pytest.importorskip("jinja2.sandbox")
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(chat_template(special)).render(messages=messages, **values)


@given(query=section_text, answer=section_text, internal=st.none() | section_text)
def test_the_chat_template_gives_the_same_text(
    query: str, answer: str, internal: str | None
) -> None:
    """Would catch other tools forming an interaction differently (spaces trimmed, roles lost)."""
    special = SpecialTokens(eos="<|end|>")
    user = {"role": "user", "content": query, "internal": internal}
    if internal is None:
        del user["internal"]
    messages = [user, {"role": "assistant", "content": answer}]
    expected = render_interaction(query, answer, internal, special)
    assert render_chat(messages, special) == expected


def test_the_chat_template_opens_the_answer_and_knows_system_texts() -> None:
    """Would catch a generation prompt without [A], and a misspelled role passing unnoticed."""
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    rendered = render_chat(messages, SpecialTokens(), add_generation_prompt=True)
    assert rendered == "[BOS][I]be brief[EOS][BOS][Q]hi[A]"
    with pytest.raises(ValueError, match="unknown role: human"):
        render_chat([{"role": "human", "content": "hi"}], SpecialTokens())
