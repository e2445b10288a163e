"""A tiny model behind a real server on the loopback interface."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from rxlm.rxt.models import RxTAlpha, RxTBeta
from rxlm.serve.app import create_app
from rxlm.serve.header_timeout import HeadTimeoutProtocol
from rxlm.serve.interface import ServeLimits
from rxlm.serve.service import ConversationService
from rxlm.serve.settings import ServerSettings
from rxlm.tokenization import TokenizerTraining, train_tokenizer

MODEL_NAME = "tiny"
TEXTS = ["Hello, my name is Ann.", "What is my name?", "Your name is Ann, I think."]
SIZES = {"num_layers": 2, "embed_dim": 16, "att_heads": 2, "stm_size": 4, "seq_len": 160}


def random_model(kind: type[RxTAlpha]) -> RxTAlpha:
    """Return a model with random weights."""
    tokenizer = train_tokenizer(TEXTS * 8, TokenizerTraining(vocab_size=300))
    part = {**SIZES, "vocab_size": tokenizer.vocab_size, "ff_dim": 16}
    part |= {"self_att_type": "mha", "cross_att_type": "mha"}
    memory = {**SIZES, "att_type": "mha", "interlayer_att_type": "mha"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(part, part, memory, tokenizer=tokenizer).eval()


@pytest.fixture(scope="session")
def tiny() -> RxTAlpha:
    """A model that says random things, for as long as there is room."""
    return random_model(RxTAlpha)


@pytest.fixture(scope="session")
def tiny_beta() -> RxTAlpha:
    """The same, in the form of thoughts, answers and calls."""
    return random_model(RxTBeta)


@pytest.fixture
def slow_tiny(tiny: RxTAlpha, monkeypatch: pytest.MonkeyPatch) -> RxTAlpha:
    """The same, but a token takes so long that somebody can come between, and none ends it: drawn
    at random, [EOS] came first once in a while."""
    logits, eos_id = tiny.decoder.logits, tiny.config.tokenizer.eos_token_id

    def slowly(*args: Any, **options: Any) -> torch.Tensor:
        time.sleep(0.02)
        scores = logits(*args, **options).clone()
        scores[..., eos_id] = -1e9
        return scores

    monkeypatch.setattr(tiny.decoder, "logits", slowly)
    return tiny


class Server:
    """A server in a thread of this process."""

    def __init__(self, service: ConversationService, settings: ServerSettings) -> None:
        self.service = service
        self.app = create_app(service, settings)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            self.app, log_config=None, ws="none", timeout_keep_alive=5, http=HeadTimeoutProtocol
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._thread.start()
        end = time.monotonic() + 60
        while not self._server.started:
            assert time.monotonic() < end
            time.sleep(0.01)

    def stop(self) -> None:
        """End it; the service is closed with it."""
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._socket.close()

    def client(self, **options: Any) -> httpx.Client:
        """Return a client."""
        return httpx.Client(base_url=self.address, timeout=60, trust_env=False, **options)


@contextlib.contextmanager
def running_server(
    model: RxTAlpha, folder: Path | None, limits: dict[str, Any] | None = None, **settings: Any
) -> Iterator[Server]:
    """Run a server inside the block."""
    service = ConversationService(
        model, folder, ServeLimits(**(limits or {})), model_name=MODEL_NAME
    )
    server = Server(service, ServerSettings(**settings))
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def run_server() -> Callable[..., contextlib.AbstractContextManager[Server]]:
    """How to run a server of one's own: ``with run_server(model, folder, limits, ...)``."""
    return running_server


@pytest.fixture(scope="module")
def server(tiny: RxTAlpha, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with default settings, shared by the tests of a file."""
    with running_server(tiny, tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    """A plain HTTP client of the shared server."""
    with server.client() as made:
        yield made
