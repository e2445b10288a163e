"""OpenAI's own client against a real server: both protocols, streaming and not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from rxlm.ops.sampling import GREEDY
from rxlm.rxt.models import RxTAlpha
from rxlm.tokenization import encode_interaction

MODEL = "tiny"
LINES = ["My name is Ann.", "I live in Oslo.", "What is my name?"]


@pytest.fixture
def api(server: Any) -> Iterator[openai.OpenAI]:
    """OpenAI's client."""
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0) as client:
        yield client


def alone(model: RxTAlpha, lines: list[str], system: str | None = None) -> list[str]:
    """Return the greedy answers of a conversation that runs alone."""
    session = model.session(system=system, settings=GREEDY)
    return [session.ask(line) for line in lines]


def said(*texts: str, system: str | None = None) -> Any:
    """Return messages, the user's and the assistant's in turn."""
    start = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
    return start + messages


def test_models(api: openai.OpenAI) -> None:
    """Catches a list that the client cannot read."""
    (model,) = api.models.list().data
    assert model.id == MODEL == api.models.retrieve(MODEL).id
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("gpt-5")


@pytest.mark.parametrize("system", [None, "You are kind."])
def test_chat_goes_on_from_the_memory_of_known_messages(
    api: openai.OpenAI, tiny: RxTAlpha, system: str | None
) -> None:
    """Catches a history that does not reach memory: answers must be those of a session."""
    history: list[str] = []
    for line, answer in zip(LINES, alone(tiny, LINES, system), strict=True):
        completion = api.chat.completions.create(
            model=MODEL, messages=said(*history, line, system=system)
        )
        (choice,) = completion.choices
        assert choice.message.content == answer
        assert choice.finish_reason in ("stop", "length")
        history += [line, answer]
    used = completion.usage
    assert used is not None and used.total_tokens == used.prompt_tokens + used.completion_tokens
    assert used.prompt_tokens < 30, "the history was read again"


def test_chat_replays_messages_that_are_unknown(api: openai.OpenAI, tiny: RxTAlpha) -> None:
    """Catches turns said elsewhere that are left out of memory, or written twice."""
    told = [("I have a dog.", "A dog, I see."), ("It is called Rex.", "Rex is a name.")]
    tokenizer = tiny.require_tokenizer()
    state = tiny.new_conversation()
    for query, answer in told:
        turn = encode_interaction(tokenizer, query, answer)
        state = tiny.update_memory(state, [turn.ids])
    (wanted,) = tiny.generate(state, ["Who is Rex?"], GREEDY).answers
    messages = said(*[text for turn in told for text in turn], "Who is Rex?")
    completion = api.chat.completions.create(model=MODEL, messages=messages)
    assert completion.choices[0].message.content == tokenizer.decode(wanted.ids)


def test_chat_streams(api: openai.OpenAI, tiny: RxTAlpha) -> None:
    """Catches pieces that are not the answer, or a stream that the client finds malformed."""
    (wanted,) = alone(tiny, LINES[:1])
    chunks = list(
        api.chat.completions.create(
            model=MODEL,
            messages=said(LINES[0]),
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == wanted
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0
    # The client's own accumulation; it raises if an answer was cut by length.
    stop = wanted[6:8]
    with api.chat.completions.stream(model=MODEL, messages=said(LINES[0]), stop=stop) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == wanted[: wanted.index(stop)]


def test_chat_limits_stops_and_draws(api: openai.OpenAI, tiny: RxTAlpha) -> None:
    """Catches max_tokens, stop, temperature or seed that are taken and not obeyed."""
    (whole,) = alone(tiny, LINES[:1])

    def answer(**options: Any) -> tuple[str, str, int]:
        completion = api.chat.completions.create(model=MODEL, messages=said(LINES[0]), **options)
        (choice,) = completion.choices
        assert completion.usage is not None and choice.message.content is not None
        return choice.message.content, choice.finish_reason, completion.usage.completion_tokens

    text, reason, num_tokens = answer(max_tokens=3)
    assert (reason, num_tokens) == ("length", 3) and whole.startswith(text)
    stop = whole[2:4]
    assert answer(stop=stop)[:2] == (whole[: whole.index(stop)], "stop")
    drawn = [answer(temperature=1.0, seed=seed)[0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_not_offered_is_refused(api: openai.OpenAI) -> None:
    """Catches parameters that would change the answer and are silently dropped."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for name, options in {
        "n": {"n": 2},
        "logprobs": {"logprobs": True},
        "response_format": {"response_format": {"type": "json_object"}},
        "tools": {"tools": [tool]},
        "logit_bias": {"logit_bias": {"5": 1}},
        "presence_penalty": {"presence_penalty": 0.5},
        "nonsense": {"extra_body": {"nonsense": 1}},
        "stop": {"stop": [str(number) for number in range(9)]},
    }.items():
        with pytest.raises(openai.BadRequestError, match=name) as caught:
            api.chat.completions.create(model=MODEL, messages=said("a"), **options)  # type: ignore[call-overload]
        assert caught.value.param == name
    neutral = {"n": 1, "logprobs": False, "tools": [], "user": "u", "presence_penalty": 0}
    neutral |= {"response_format": {"type": "text"}, "metadata": {"a": "b"}}
    api.chat.completions.create(
        model=MODEL,
        messages=said("a"),
        max_tokens=1,
        **neutral,  # type: ignore[call-overload]
    )
    with pytest.raises(openai.NotFoundError, match="tiny"):
        api.chat.completions.create(model="gpt-5", messages=said("a"))


@pytest.mark.parametrize(
    "messages",
    [
        said("a", "b"),
        [{"role": "assistant", "content": "b"}, {"role": "user", "content": "a"}],
        [*said("a", "b"), {"role": "system", "content": "s"}, *said("c")],
        [{"role": "system", "content": "s"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [],
    ],
)
def test_messages_that_are_no_conversation(api: openai.OpenAI, messages: Any) -> None:
    """Catches messages that are dropped to make the rest fit."""
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(model=MODEL, messages=messages)
    assert str(caught.value.param).startswith("messages")


def test_chat_in_a_session(api: openai.OpenAI, server: Any, tiny: RxTAlpha) -> None:
    """Catches a session header that is ignored, and a history that contradicts the session."""
    session = server.service.create(seed=0)
    header = {"X-RxLM-Session": session.session_id}
    answers = [
        api.chat.completions.create(model=MODEL, messages=said(line), extra_headers=header)
        .choices[0]
        .message.content
        for line in LINES
    ]
    assert answers == alone(tiny, LINES)
    assert [turn.query for turn in server.service.turns(session.session_id)] == LINES
    same = said(LINES[-1], str(answers[-1]), "Hi")
    api.chat.completions.create(model=MODEL, messages=same, extra_headers=header)
    with pytest.raises(openai.ConflictError, match="not the last turns"):
        other = said("never", "said", "Hi")
        api.chat.completions.create(model=MODEL, messages=other, extra_headers=header)
    with pytest.raises(openai.NotFoundError):
        api.chat.completions.create(
            model=MODEL, messages=said("a"), extra_headers={"X-RxLM-Session": "nobody"}
        )


def test_responses_go_on_and_branch(api: openai.OpenAI, tiny: RxTAlpha) -> None:
    """Catches an id that means the newest turn instead of the one it names."""
    system = "You are kind."
    wanted = alone(tiny, LINES, system)
    first = api.responses.create(model=MODEL, input=LINES[0], instructions=system)
    second = api.responses.create(model=MODEL, input=LINES[1], previous_response_id=first.id)
    third = api.responses.create(model=MODEL, input=LINES[2], previous_response_id=second.id)
    assert [first.output_text, second.output_text, third.output_text] == wanted
    branch = api.responses.create(model=MODEL, input=LINES[2], previous_response_id=first.id)
    assert branch.output_text == alone(tiny, [LINES[0], LINES[2]], system)[1]
    kept = api.responses.retrieve(second.id)
    assert (kept.output_text, kept.previous_response_id) == (wanted[1], first.id)
    assert kept.usage == second.usage
    (item,) = api.responses.input_items.list(second.id).data
    assert LINES[1] in str(item)


def test_responses_stream(api: openai.OpenAI, tiny: RxTAlpha) -> None:
    """Catches events that are missing, misnumbered or out of order."""
    (wanted,) = alone(tiny, LINES[:1])
    events: list[Any] = list(api.responses.create(model=MODEL, input=LINES[0], stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:-1] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
    ]  # fmt: skip
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events[4:-4]) == wanted
    final = events[-1].response
    assert final.output_text == wanted
    # It is safely remembered by now.
    assert api.responses.retrieve(final.id).output_text == wanted


def test_responses_are_forgotten_when_asked(api: openai.OpenAI) -> None:
    """Catches store=False that stores, and a deletion that does not delete."""
    hidden = api.responses.create(model=MODEL, input="a secret", store=False)
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(hidden.id)
    with pytest.raises(openai.NotFoundError):
        api.responses.create(model=MODEL, input="b", previous_response_id=hidden.id)
    kept = api.responses.create(model=MODEL, input="another secret")
    api.responses.delete(kept.id)
    for call in (api.responses.retrieve, api.responses.delete):
        with pytest.raises(openai.NotFoundError):
            call(kept.id)


def test_responses_limits_and_refusals(api: openai.OpenAI, tiny: RxTAlpha) -> None:
    """Catches a limit or an unsupported parameter that is ignored."""
    short = api.responses.create(model=MODEL, input=LINES[0], max_output_tokens=2)
    assert short.status == "incomplete" and short.incomplete_details is not None
    assert short.incomplete_details.reason == "max_output_tokens"
    assert short.usage is not None and short.usage.output_tokens == 2
    tool = {"type": "function", "name": "f", "parameters": {}, "strict": True}
    for name, options in {
        "background": {"background": True},
        "tools": {"tools": [tool]},
        "text": {"text": {"format": {"type": "json_object"}}},
        "conversation": {"conversation": "conv_1"},
        "input": {"input": [{"role": "assistant", "content": "a"}]},
    }.items():
        with pytest.raises(openai.BadRequestError) as caught:
            api.responses.create(**({"model": MODEL, "input": "a"} | options))  # type: ignore[call-overload]
        assert caught.value.param == name
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": LINES[0]}]},
        *[item.model_dump(exclude_none=True) for item in short.output],
        {"role": "user", "content": LINES[1]},
    ]
    assert api.responses.create(model=MODEL, input=items).output_text
