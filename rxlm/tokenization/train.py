"""Training a tokenizer from a stream of texts.

Deterministic: the same texts in the same order give the same fingerprint. The vocabulary may come
out smaller than asked when the texts hold too few words; the real size is logged and is the
tokenizer's ``vocab_size``. Not here: reading texts from files (``rxlm.data``).
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator

from pydantic import Field
from tokenizers import trainers

from rxlm.configuration import Config
from rxlm.errors import UserError
from rxlm.tokenization.backend import Backend, TokenizerDefinition, TokenizerKind
from rxlm.tokenization.byte_bpe import ByteBPE, byte_bpe_pipeline, byte_of_symbol
from rxlm.tokenization.sentencepiece_backend import SentencePiece, import_sentencepiece
from rxlm.tokenization.special import NUM_SPECIAL_TOKENS, SpecialTokens
from rxlm.tokenization.tokenizer import Tokenizer, check_text

logger = logging.getLogger(__name__)

MIN_VOCAB_SIZE = NUM_SPECIAL_TOKENS + 256
# Part of the definition of a unigram training (sums are split by thread), so not the CPU count.
SENTENCEPIECE_THREADS = 4
# SentencePiece drops longer lines; cutting them keeps every text in the training.
MAX_LINE_CHARACTERS = 4000


class TokenizerTraining(Config):
    """How a tokenizer is trained."""

    kind: TokenizerKind = "byte-bpe"
    """Byte-level BPE (library ``tokenizers``) or SentencePiece unigram / BPE with byte fallback."""
    vocab_size: int = Field(default=1024, ge=MIN_VOCAB_SIZE, le=1_000_000)
    """Largest number of ids: 11 special tokens and 256 bytes are always among them."""
    min_frequency: int = Field(default=2, ge=1)
    """byte-bpe: how often a pair must occur to be merged."""
    character_coverage: float = Field(default=0.9995, gt=0.0, le=1.0)
    """sentencepiece: share of the text's characters with a token; others become bytes."""
    add_prefix_space: bool = True
    """Put one space before every text, so that 'Oslo' is one token at the start and in the middle.
    Decoding removes exactly that space."""
    split_digits: bool = False
    """Make every digit a token of its own."""


def train_tokenizer(
    texts: Iterable[str], config: TokenizerTraining, special: SpecialTokens | None = None
) -> Tokenizer:
    """Train a tokenizer on ``texts``, read once, as a stream.

    Args:
        texts: the training texts; empty ones are skipped.
        config: kind, size and options.
        special: spelling of the special tokens; by default ``SpecialTokens()``.

    Raises:
        UserError: when there is no text, a text is not valid Unicode, or the vocabulary is too
            small for the texts' characters.
    """
    definition = TokenizerDefinition(
        kind=config.kind,
        add_prefix_space=config.add_prefix_space,
        split_digits=config.split_digits,
        special=special or SpecialTokens(),
    )
    source = _TextSource(texts)
    backend: Backend
    if config.kind == "byte-bpe":
        backend = _train_byte_bpe(source, config, definition)
    else:
        backend = _train_sentencepiece(source, config, definition)
    tokenizer = Tokenizer(backend, definition)
    logger.info(
        "trained a %s tokenizer on %d texts (%d characters): %d ids",
        *(config.kind, source.num_texts, source.num_characters, tokenizer.vocab_size),
    )
    if tokenizer.vocab_size < config.vocab_size:
        logger.warning(
            "the texts hold too few repeated words for %d ids: the vocabulary has %d",
            *(config.vocab_size, tokenizer.vocab_size),
        )
    return tokenizer


class _TextSource:
    """Iterates over checked texts once, counts them, and remembers what went wrong.

    Both libraries call it from native code, which may wrap an exception beyond recognition.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.num_texts = 0
        self.num_characters = 0
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                if not isinstance(text, str):
                    raise UserError(f"training texts must be str, got {type(text).__name__}.")
                if text:
                    check_text(text)
                    self.num_texts += 1
                    self.num_characters += len(text)
                    yield text
        except BaseException as error:
            self.error = error
            raise

    def lines(self) -> Iterator[str]:
        """Yield the texts' lines, cut to what SentencePiece accepts; it learns no line breaks."""
        for text in self:
            for line in text.split("\n"):
                for start in range(0, len(line), MAX_LINE_CHARACTERS):
                    yield line[start : start + MAX_LINE_CHARACTERS]

    def consume(self, training: Callable[[], None]) -> None:
        """Run a library's ``training`` over this source and give its errors their meaning."""
        try:
            training()
        except Exception as error:  # the libraries share no narrower type
            if self.error is not None:
                raise self.error from None
            if self.num_texts:
                raise UserError(f"the tokenizer could not be trained: {error}") from error
        if not self.num_texts:
            raise UserError("there is no text to train a tokenizer on: all texts are empty.")


def _train_byte_bpe(
    source: _TextSource, config: TokenizerTraining, definition: TokenizerDefinition
) -> Backend:
    pipeline = byte_bpe_pipeline(definition)
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        initial_alphabet=sorted(byte_of_symbol()),
        special_tokens=list(definition.special.spellings()),
        show_progress=False,
    )
    source.consume(lambda: pipeline.train_from_iterator(iter(source), trainer))
    return ByteBPE(pipeline, definition)


def _train_sentencepiece(
    source: _TextSource, config: TokenizerTraining, definition: TokenizerDefinition
) -> Backend:
    library = import_sentencepiece()
    special = definition.special
    model = io.BytesIO()

    def training() -> None:
        library.SentencePieceTrainer.train(
            sentence_iterator=source.lines(),
            model_writer=model,
            model_type=config.kind.removeprefix("sentencepiece-"),
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,
            character_coverage=config.character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=config.add_prefix_space,
            split_digits=config.split_digits,
            max_sentence_length=4 * MAX_LINE_CHARACTERS + 1,  # bytes
            **dict(pad_id=0, unk_id=1, bos_id=2, eos_id=3),
            **dict(pad_piece=special.pad, unk_piece=special.unk),
            **dict(bos_piece=special.bos, eos_piece=special.eos),
            control_symbols=list(special.spellings()[4:]),
            num_threads=SENTENCEPIECE_THREADS,
            minloglevel=2,
        )

    source.consume(training)
    return SentencePiece(model.getvalue(), definition)
