"""The rich form of an interaction: order, spans, the way back to texts, files, streaming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rxlm.errors import UserError
from rxlm.tokenization import (
    PLAIN_TEMPLATE,
    RICH_TEMPLATE,
    InteractionTemplate,
    PartStream,
    Tokenizer,
    chat_template,
    encode_given,
    encode_system,
    parse_parts,
    render_parts,
    render_text,
)

FAST = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
text = st.text(max_size=8) | st.sampled_from(["[A]", "[C]{}[EOS] hi", " Oslo", "", "[T][U]"])
maybe = st.none() | text


@pytest.fixture
def rich(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the form of RxTBeta."""
    return tokenizer.with_template(RICH_TEMPLATE)


def test_the_rich_form_in_order(rich: Tokenizer) -> None:
    """Would catch a part in another place, or one that is learned and should not be (or not)."""
    parts = {"answer": "b", "tool_call": "c", "think": "t", "tool_use": "u", "internal": "i"}
    rendered = render_parts(rich, parts)
    assert [(span.part, span.learned) for span in rendered.spans] == [
        ("bos", False),
        ("internal", False),
        ("tool_use", False),
        ("think", True),
        ("answer", True),
        ("tool_call", True),
        ("eos", True),
    ]
    spelled = rich.decode(rendered.ids, skip_special_tokens=False)
    assert spelled == "[BOS][I]i[U]u[T]t[A]b[C]c[EOS]" == render_text(parts, RICH_TEMPLATE)


@FAST
@given(
    opener=st.sampled_from(["query", "tool_use"]),
    texts=st.tuples(text, maybe, maybe, text, maybe),
)
def test_ids_spans_and_texts_agree(
    rich: Tokenizer, opener: str, texts: tuple[str | None, ...]
) -> None:
    """Would catch a text that becomes structure, and masks that drift from what was rendered."""
    names = (opener, "internal", "think", "answer", "tool_call")
    parts = {name: value for name, value in zip(names, texts, strict=True) if value is not None}
    rendered = render_parts(rich, parts)
    assert parse_parts(rich, rendered.ids) == parts
    assert [span.start for span in rendered.spans[1:]] == [s.end for s in rendered.spans[:-1]]
    assert rendered.spans[-1].end == len(rendered.ids) == len(rendered.loss_mask)
    ids, start = rendered.turn
    assert rendered.loss_mask == [index >= start for index in range(len(ids))]
    assert ids[:start] == encode_given(rich, {k: parts.get(k) for k in (opener, "internal")})
    assert render_text(parts, RICH_TEMPLATE) == rich.decode(ids, skip_special_tokens=False)


@FAST
@given(texts=st.tuples(maybe, text, maybe))
def test_a_stream_tells_the_parts_apart(rich: Tokenizer, texts: tuple[str | None, ...]) -> None:
    """Would catch thinking shown as answer, and a space lost where a part begins."""
    said = {"query": "q", **dict(zip(("think", "answer", "tool_call"), texts, strict=True))}
    rendered = render_parts(rich, said)
    stream = PartStream(rich, None)
    pieces = [piece for token in rendered.ids[rendered.turn.answer_start :]
              for piece in stream.push(token)] + stream.flush()  # fmt: skip
    for name, value in said.items():
        if name != "query":
            assert "".join(p.text for p in pieces if p.name == name) == (value or "")


def test_plain_is_a_case_of_it(tokenizer: Tokenizer, rich: Tokenizer) -> None:
    """Would catch the two forms differing where they should not."""
    parts = {"query": "q", "answer": "a"}
    assert render_parts(tokenizer, parts) == render_parts(rich, parts)
    assert tokenizer.template == PLAIN_TEMPLATE
    title = rich.decode(encode_system(rich, "be brief"))
    assert title == "SYSTEM INSTRUCTIONS\n\nbe brief"
    assert tokenizer.decode(encode_system(tokenizer, "be brief")) == "be brief"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"query": "q", "thinks": "t", "answer": "a"}, "no part 'thinks': did you mean 'think'"),
        ({"query": "q", "tool_use": "u", "answer": "a"}, "tool_use and query: give exactly one"),
        ({"answer": "a"}, "neither: give exactly one"),
        ({"query": "q", "think": "t"}, "give 'answer' or 'tool_call'"),
    ],
)
def test_what_is_no_interaction_is_refused(
    rich: Tokenizer, parts: dict[str, str], message: str
) -> None:
    """Would catch a typing error that silently drops a part."""
    with pytest.raises(UserError, match=message):
        render_parts(rich, parts)


def test_a_plain_tokenizer_names_the_remedy(tokenizer: Tokenizer) -> None:
    """Would catch thinking that an Alpha is trained on and cannot say."""
    with pytest.raises(UserError, match=r"no part 'think' .*RxTBeta"):
        render_parts(tokenizer, {"query": "q", "think": "t", "answer": "a"})
    with pytest.raises(ValueError, match="in order"):
        InteractionTemplate(said=("answer", "think"))


def test_the_form_is_saved_and_plain_files_stay_as_they_were(
    tokenizer: Tokenizer, rich: Tokenizer, tmp_path: Path
) -> None:
    """Would catch a form that is lost on the way, or old folders that no longer load."""
    tokenizer.save(tmp_path / "plain")
    rich.save(tmp_path / "rich")
    definition = json.loads((tmp_path / "plain/tokenizer_config.json").read_text())["rxlm"]
    assert "template" not in definition["definition"]
    assert Tokenizer.load(tmp_path / "plain").template == PLAIN_TEMPLATE
    assert Tokenizer.load(tmp_path / "rich").template == RICH_TEMPLATE
    assert Tokenizer.load(tmp_path / "rich").fingerprint == rich.fingerprint
    assert rich.fingerprint != tokenizer.fingerprint


def test_the_chat_template_knows_all_parts() -> None:
    """Would catch servers forming a Beta's interactions otherwise than training does."""
    sandbox = pytest.importorskip("jinja2.sandbox")
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = RICH_TEMPLATE.model_copy(update={"system_title": "It's \\ here"})
    jinja = environment.from_string(chat_template(template=template))
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "q", "internal": "i"},
        {"role": "assistant", "content": None, "think": "t", "tool_call": "c"},
        {"role": "tool", "content": "u"},
    ]
    begun = "[BOS][I]It's \\ here\n\nbe brief[EOS][BOS][I]i[Q]q[T]t[A][C]c[EOS][BOS][U]u"
    assert jinja.render(messages=messages) == begun
    for mode, opening in (("fast", "[A]"), ("extended", "[T]"), ("auto", "")):
        options = {"add_generation_prompt": True, "thinking_mode": mode}
        assert jinja.render(messages=messages, **options) == begun + opening
