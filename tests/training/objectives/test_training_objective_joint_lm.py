"""Joint LM: what is hidden, what is predicted, and what the decoder may read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rxlm.errors import UserError
from rxlm.training.objectives.joint_lm import JointBatch, JointLMObjective, JointLMSettings
from rxlm.training.objectives.masked_lm import MLMHead, TokenMasker
from rxlm.training.objectives.row_windows import TextRows


def settings(**values: Any) -> JointLMSettings:
    sizes = {"turns": 3, "dialogues": 6, "validation_dialogues": 4}
    return JointLMSettings(**{**sizes, **values})


def joint(tiny: Any, model: Any = None, **values: Any) -> Any:
    names = ("train", "valid", "seed", "accumulation")
    options = {name: values.pop(name) for name in names if name in values}
    return tiny.objective(JointLMObjective, settings(**values), model, **options)


def hidden_rows(batch: JointBatch) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return (seen ids, true ids, hidden) of every bucket."""
    return [
        (rows.ids, labels, rows.targets)
        for rows, labels in zip(batch.dialogues.encode, batch.labels, strict=True)
    ]


@pytest.mark.parametrize("replacement", ["mask", "80/10/10"])
def test_special_tokens_and_padding_are_never_hidden(replacement: str, tiny: Any) -> None:
    """An encoder trained to restore [PAD] or markers, or text ids that turn into special ones."""
    objective = joint(tiny, mask_replacement=replacement, mask_probability=0.5)
    special = torch.tensor(sorted(tiny.tokenizer.special_ids - {tiny.tokenizer.mask_id}))
    for seen, labels, hidden in hidden_rows(objective.batch(0, 0)):
        assert not torch.isin(labels[hidden], special).any()
        assert torch.equal(seen[~hidden], labels[~hidden])
        assert not torch.isin(seen[hidden], special).any()


def test_every_row_hides_something(tiny: Any) -> None:
    """Rows that teach the encoder nothing because chance chose none of their few tokens."""
    objective = joint(tiny, mask_probability=0.01)
    counts = torch.cat([hidden.sum(dim=1) for _, _, hidden in hidden_rows(objective.batch(0, 0))])
    assert counts.min() == 1
    assert counts.float().mean() < 1.5


def test_a_row_of_special_tokens_only_hides_nothing(tiny: Any) -> None:
    """The rule above, applied where there is nothing to hide."""
    masker = TokenMasker(tiny.tokenizer, 0.15, "mask")
    ids = torch.tensor([[2, 5, 6, 3], [2, 50, 3, 0]])
    seen, hidden = masker(ids, torch.full((2, 4, 3), 0.9))
    assert hidden.tolist() == [[False] * 4, [False, True, False, False]]
    assert seen.tolist() == [[2, 5, 6, 3], [2, tiny.tokenizer.mask_id, 3, 0]]


def test_share_and_replacement_of_hidden_tokens(tiny: Any) -> None:
    """Another masking rate than the setting, or another rule than 80/10/10."""
    masker = TokenMasker(tiny.tokenizer, 0.15, "80/10/10")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(11, tiny.tokenizer.vocab_size, (400, 100), generator=generator)
    seen, hidden = masker(ids, torch.rand((400, 100, 3), generator=generator))
    assert hidden.float().mean().item() == pytest.approx(0.15, abs=0.01)
    masked = seen[hidden] == tiny.tokenizer.mask_id
    kept = seen[hidden] == ids[hidden]
    assert masked.float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert kept.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert len(seen[hidden][~masked & ~kept].unique()) > 100, "random tokens come from few ids"


def test_the_decoder_predicts_whole_rows_and_never_padding(tiny: Any) -> None:
    """[PAD] as a target (the model then fills answers with it), or [EOS] not learned."""
    batch = joint(tiny).batch(0, 0).dialogues
    assert any((~rows.mask).any() for rows in batch.answer), "the batch has no padding"
    for rows in batch.answer:
        assert torch.equal(rows.targets, rows.mask)
        last = rows.ids.gather(1, rows.mask.sum(dim=1, keepdim=True) - 1)
        assert (last == tiny.tokenizer.eos_id).all()
        assert not (rows.ids[rows.targets] == tiny.tokenizer.pad_id).any()


def test_the_decoder_sees_the_text_without_masks(tiny: Any) -> None:
    """A decoder that is trained to write [MASK]."""
    batch = joint(tiny).batch(0, 0).dialogues
    assert not any((rows.ids == tiny.tokenizer.mask_id).any() for rows in batch.answer)
    assert all((rows.ids == tiny.tokenizer.mask_id).any() for rows in batch.encode)


def test_masks_and_noise_change_with_step_micro_step_and_seed(tiny: Any) -> None:
    """The same tokens hidden in every epoch, so that the others are never learned."""
    source = tiny.chat(("hello there, how are you?", "I am fine, thank you very much."))
    one = joint(tiny, train=source, accumulation=2)
    other = joint(tiny, train=source, seed=1)
    batches = [one.batch(0, 0), one.batch(0, 1), one.batch(1, 0), other.batch(0, 0)]
    hidden = [torch.cat([rows.targets for rows in item.dialogues.encode]) for item in batches]
    assert all(not torch.equal(hidden[i], hidden[j]) for i in range(4) for j in range(i)), (
        "the data is the same in all of them"
    )
    assert len({item.noise_seed for item in batches}) == 4


def gradients(objective: Any) -> dict[str, float]:
    """Return the largest gradient of encoder layers, decoder layers and MLM head."""
    objective.loss(objective.batch(0, 0), 0).loss.backward()
    modules = {
        "encoder": objective.model.encoder.layers,
        "decoder": objective.model.decoder.layers,
        "head": objective.extra_modules["mlm_head"],
    }
    return {
        name: max(float(p.grad.abs().max()) for p in module.parameters() if p.grad is not None)
        for name, module in modules.items()
    }


def test_the_decoder_does_not_teach_the_encoder(tiny: Any) -> None:
    """States that are not detached: the encoder learns to smuggle the answer to the decoder."""
    sizes = gradients(joint(tiny, encoder_loss_scale=0.0))
    assert sizes["encoder"] == sizes["head"] == 0
    assert sizes["decoder"] > 0
    sizes = gradients(joint(tiny, decoder_loss_scale=0.0))
    assert sizes["decoder"] == 0
    assert sizes["encoder"] > 0
    assert sizes["head"] > 0


def test_the_loss_is_the_weighted_sum_of_two_means(tiny: Any) -> None:
    """Scales that are not used, or a mean over rows in place of tokens."""
    model = tiny.model()
    objective = joint(tiny, model, encoder_loss_scale=2.0, decoder_loss_scale=0.5)
    batch = objective.batch(0, 0)
    output = objective.loss(batch, 0)
    wanted = 2.0 * output.metrics["mlm_loss"] + 0.5 * output.metrics["lm_loss"]
    torch.testing.assert_close(output.loss, wanted)
    num_hidden = sum(int(hidden.sum()) for _, _, hidden in hidden_rows(batch))
    num_predicted = sum(int(rows.targets[:, 1:].sum()) for rows in batch.dialogues.answer)
    assert output.num_targets == num_hidden + num_predicted


@pytest.mark.parametrize("change", [{"noise_level": 1.0}, {"drop_probability": 0.5}])
def test_noise_is_for_the_decoder_only(change: dict[str, float], tiny: Any) -> None:
    """A setting without effect, or noise that also reaches the masked LM."""
    model = tiny.model()
    losses = []
    for values in ({"noise_level": 0.0}, {"noise_level": 0.0, **change}):
        objective = joint(tiny, model, **values)
        objective.extra_modules["mlm_head"].load_state_dict(
            joint(tiny, model).extra_modules["mlm_head"].state_dict()
        )
        losses.append(objective.loss(objective.batch(0, 0), 0).metrics)
    assert torch.equal(losses[0]["mlm_loss"], losses[1]["mlm_loss"])
    assert not torch.equal(losses[0]["lm_loss"], losses[1]["lm_loss"])


def lm_loss(tiny: Any, model: Any, turns: int, noise: float, context: str) -> float:
    objective = joint(tiny, model, turns=turns, noise_level=noise, context=context)
    return float(objective.loss(objective.batch(0, 0), 0).metrics["lm_loss"])


def test_context_previous_never_shows_the_own_row(tiny: Any) -> None:
    """The leak that 'previous' exists to avoid; and a 'previous' that shows nothing at all."""
    model = tiny.model()
    # A window of one row has no earlier rows: whatever is read must not matter.
    alone = {lm_loss(tiny, model, 1, noise, "previous") for noise in (0.0, 5.0)}
    assert len(alone) == 1
    assert len({lm_loss(tiny, model, 1, noise, "same") for noise in (0.0, 5.0)}) == 2
    assert len({lm_loss(tiny, model, 2, noise, "previous") for noise in (0.0, 5.0)}) == 2


def test_context_same_shows_the_own_row(tiny: Any) -> None:
    """States of another row: training would see no relation between text and memory."""
    model = tiny.model()
    objective = joint(tiny, model, noise_level=0.0)
    batch = objective.batch(0, 0)
    whole = objective.loss(batch, 0).metrics["lm_loss"]
    total, count = 0.0, 0
    for rows in batch.dialogues.answer:
        for r, place in enumerate(rows.place.tolist()):
            ids = rows.ids[r][rows.mask[r]][None]
            seen = next(
                item.ids[item.place == place][item.mask[item.place == place]][None]
                for item in batch.dialogues.encode
                if (item.place == place).any()
            )
            memory = model.decoder.read_memory(model.encoder(seen))
            hidden, _ = model.decoder(ids[:, :-1], memory=memory)
            logits = model.decoder.logits(hidden[0])
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    assert float(whole) == pytest.approx(total / count, abs=1e-5)


def test_the_head_starts_from_the_seed_and_shares_the_embedding(tiny: Any) -> None:
    """A head that depends on what ran before, or a second vocabulary matrix to store."""
    heads = []
    for _ in range(2):
        torch.rand(1)
        heads.append(joint(tiny).extra_modules["mlm_head"])
    assert torch.equal(heads[0].dense.weight, heads[1].dense.weight)
    vocab_size = tiny.tokenizer.vocab_size
    assert max(item.numel() for item in heads[0].parameters()) == max(vocab_size, 16 * 16)
    head = MLMHead(4, 6, torch.Generator())
    assert head(torch.randn(3, 4), torch.randn(6, 4)).shape == (3, 6)


TEXTS = ["the cat sat on the mat. " * 6, "a dog.", "", "one two three four five " * 3]


def test_text_rows_tile_every_document_once_an_epoch(tiny: Any) -> None:
    """Text lost at the cuts, rows that mix documents, or an epoch that repeats a window."""
    rows = TextRows(TEXTS, tiny.tokenizer, length=12, seed=4)
    found = []
    for position in range(rows.size(3)):
        window = rows.sample(position, 3)
        assert 1 <= len(window) <= 3
        for turn in window:
            assert turn.answer_start == 0
            assert len(turn.ids) <= 12
            assert turn.ids[0] == tiny.tokenizer.bos_id
            found.append(turn.ids[1:])
    ended = [ids for ids in found if ids[-1] == tiny.tokenizer.eos_id]
    assert len(ended) == 3, "each document ends once, the empty one not at all"
    tokens = sorted(token for ids in found for token in ids if token != tiny.tokenizer.eos_id)
    wanted = sorted(token for text in TEXTS for token in tiny.tokenizer.encode(text))
    assert tokens == wanted
    # In a window, the rows follow one another in the document.
    whole = [tiny.tokenizer.encode(text) for text in TEXTS]
    joined = [token for turn in rows.sample(0, 100) for token in turn.ids[1:]]
    assert [token for token in joined if token != tiny.tokenizer.eos_id] in whole


def test_plain_text_trains_like_dialogues(tiny: Any) -> None:
    """A text corpus that is accepted but not used."""
    rows = TextRows(TEXTS, tiny.tokenizer, length=16)
    objective = joint(tiny, train=rows, valid=rows)
    batch = objective.batch(0, 0)
    decoded = {
        tiny.tokenizer.decode(ids[mask].tolist())
        for bucket in batch.dialogues.answer
        for ids, mask in zip(bucket.ids, bucket.mask, strict=True)
    }
    assert all(any(piece.strip() in text for text in TEXTS) for piece in decoded)
    assert objective.loss(batch, 0).loss.isfinite()
    with torch.no_grad():
        assert objective.validate()["lm_loss"] > 0


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_is_an_error(texts: list[str], tiny: Any) -> None:
    """A run that begins and then fails on its first batch."""
    with pytest.raises(UserError, match="holds no text"):
        TextRows(texts, tiny.tokenizer, length=16)


def test_a_row_without_room_is_an_error(tiny: Any) -> None:
    """An endless or empty cut."""
    with pytest.raises(UserError, match="length=2"):
        TextRows(TEXTS, tiny.tokenizer, length=2)
