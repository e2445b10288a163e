"""What `decode.py` compares: Micro (or Mini) as this package runs it, and Llamas of its size.

Every contender answers the same question: read a prompt, then write a number of tokens greedily,
whatever they are. Llama's loop is the shortest there is: its forward pass, its cache, an argmax.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rxlm.nn.attention import Attention
from rxlm.nn.moe import MixtureOfExperts
from rxlm.ops.sampling import GREEDY
from rxlm.rxt.reactive import ReactiveModel
from rxlm.training.described_model import described_model

STAGES = Path(__file__).resolve().parents[1] / "stages"
OURS, COMPILED = "rxlm", "rxlm, compiled"
LLAMA, STATIC, GENERATE = "Llama", "Llama, StaticCache", "Llama, generate()"
ACTIVE = "Llama, as many active"

Answer = Callable[[int, int, int], Any]
"""Answers with (rows, tokens of the prompt, tokens to write)."""


class Contender(NamedTuple):
    """One way to decode: what it is called, what it does, and how large it is."""

    name: str
    answer: Answer
    parameters: int


def published(size: str, overrides: tuple[str, ...] = ()) -> ReactiveModel:
    """Return a model of ``stages/`` that never ends an answer: new weights, turns of 512 tokens."""
    config = described_model(STAGES / size, ("model.decoder.seq_len=512", *overrides))
    torch.manual_seed(0)
    model = ReactiveModel(config).eval()
    model.decoder.head_bias.data[config.tokenizer.eos_token_id] = -1e4
    return model


def prompt_ids(rows: int, tokens: int, vocab_size: int) -> Tensor:
    """Return prompts ``[B, T]`` without special tokens."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(20, vocab_size, (rows, tokens), generator=generator)


def ours(model: ReactiveModel, *, compiled: bool) -> Answer:
    """Return how this package answers; the last token of the prompt is [A]."""

    def answer(rows: int, tokens: int, new: int) -> Any:
        ids = prompt_ids(rows, tokens - 1, model.config.decoder.vocab_size).tolist()
        if new == 1:
            # Not generate(): that makes a step more, to see whether the answer is at its end.
            return next(model.stream(states[rows], ids, GREEDY))
        generated = model.generate(
            states[rows], ids, GREEDY, max_new_tokens=new, compile_decode=compiled
        )
        return [answer.ids for answer in generated.answers]

    states = {rows: model.new_conversation(rows) for rows in (1, 8)}
    return answer


def llama_of(model: ReactiveModel, parameters: int) -> Any:
    """Return a Llama of a model's width, depth, heads and vocabulary with so many parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = model.config.decoder

    def build(inner: int) -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=fields.vocab_size,
                hidden_size=fields.embed_dim,
                intermediate_size=inner,
                num_hidden_layers=fields.num_layers,
                num_attention_heads=fields.att_heads,
                num_key_value_heads=fields.att_heads // 2,
                max_position_embeddings=fields.seq_len,
                tie_word_embeddings=fields.tie_embeddings,
                attn_implementation="sdpa",
                eos_token_id=None,
                bos_token_id=None,
                pad_token_id=0,
            )
        ).eval()

    # Three matrices a layer; what is left decides how wide they are.
    rest = parameters - count(build(8)) + 3 * 8 * fields.embed_dim * fields.num_layers
    return build(max(8, round(rest / (3 * fields.embed_dim * fields.num_layers))))


def llama_loop(model: Any, *, static: bool) -> Answer:
    """Return the shortest greedy loop around a Llama and one of its caches."""
    from transformers import DynamicCache, StaticCache

    @torch.inference_mode()
    def answer(rows: int, tokens: int, new: int) -> Tensor:
        ids = prompt_ids(rows, tokens, model.config.vocab_size)
        cache = (
            StaticCache(config=model.config, max_cache_len=tokens + new)
            if static
            else DynamicCache(config=model.config)
        )
        written = []
        for _ in range(new):
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(dim=-1, keepdim=True)
            written.append(ids)
        return torch.cat(written, dim=1)

    return answer


def llama_generate(model: Any) -> Answer:
    """Return what transformers' users call."""

    def answer(rows: int, tokens: int, new: int) -> Tensor:
        ids = prompt_ids(rows, tokens, model.config.vocab_size)
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            written: Tensor = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new
            )
        return written[:, tokens:]

    return answer


def contenders(model: ReactiveModel, *, compiled: bool) -> list[Contender]:
    """Return everything that is compared."""
    size = count(model.decoder)
    found = [Contender(OURS, ours(model, compiled=False), size)]
    if compiled:
        found.append(Contender(COMPILED, ours(model, compiled=True), size))
    large = llama_of(model, size)
    small = llama_of(model, active_parameters(model))
    return [
        *found,
        Contender(LLAMA, llama_loop(large, static=False), count(large)),
        Contender(STATIC, llama_loop(large, static=True), count(large)),
        Contender(GENERATE, llama_generate(large), count(large)),
        Contender(ACTIVE, llama_loop(small, static=False), count(small)),
    ]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- what a step reads ----------------------------------------------------------------------------


def active_parameters(model: ReactiveModel) -> int:
    """Return the parameters of the decoder, of experts only as many as a token visits."""
    idle = sum(
        (1 - part.settings.top_k / part.settings.num_experts) * count(part.experts)
        for part in model.decoder.modules()
        if isinstance(part, MixtureOfExperts)
    )
    return round(count(model.decoder) - idle)


def bytes_of_a_step(model: ReactiveModel, rows: int, columns: float) -> float:
    """Return the bytes that one step of B rows has to read at least.

    Args:
        model: with softmax self-attention in every layer.
        rows: B. Experts that several rows visit are read once: as many as are visited if all are
            equally likely.
        columns: keys of the turn so far, on average.
    """
    decoder, fields = model.decoder, model.config.decoder
    numbers = float(count(decoder))
    if not fields.tie_embeddings:
        # Of the table, one line a row.
        numbers += rows * fields.embed_dim - decoder.embedding.weight.numel()
    for layer in decoder.all_layers:
        if isinstance(layer.feed_forward, MixtureOfExperts):
            moe = layer.feed_forward.settings
            missed = (1 - moe.top_k / moe.num_experts) ** rows
            numbers -= missed * count(layer.feed_forward.experts)
        attention = layer.self_attention
        assert isinstance(attention, Attention)
        numbers += 2 * rows * columns * attention.key.out_features
        if layer.reads_memory:
            # Slots are projected once a turn.
            cross = layer.cross_attention
            numbers -= count(layer.norm_slots) + count(cross.key) + count(cross.value)
            numbers += 2 * rows * fields.stm_size * cross.key.out_features
    return numbers * decoder.embedding.weight.element_size()
