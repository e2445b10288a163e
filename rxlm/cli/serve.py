"""``rxlm serve MODEL_DIR``: a model over HTTP, with sessions and a chat page.

Not here: what is served (``rxlm.serve``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from rxlm.cli import console
from rxlm.cli.chat import default_sessions_dir
from rxlm.errors import RunError, UserError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from rxlm.serve.settings import ServerSettings

logger = logging.getLogger(__name__)

KEY_VARIABLE = "RXLM_API_KEY"
NEEDED = ("fastapi", "uvicorn", "prometheus_client")
STORE_FOLDER = "served"
"""In the folder of conversations: those of ``rxlm chat`` are folders beside it."""
BACKLOG = 2048


def register(app: typer.Typer) -> None:
    """Add ``serve`` to the command line."""
    app.command("serve")(serve)


def serve(
    model_dir: Annotated[
        str, typer.Argument(help="A pipeline's folder, a run, a checkpoint or a model folder.")
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0: other machines may call.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")
    ] = 8000,
    sessions: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where conversations are kept.  [default: MODEL_DIR/sessions/served]",
        ),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="Name of the model in the API.  [default: of its folder]")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"File with the key that callers send; or set {KEY_VARIABLE}.  [default: none]",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Name by which callers reach this server; several times for several."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Site whose pages may call from a browser (CORS), https://example.org."),
    ] = None,
    max_running: Annotated[
        int, typer.Option(min=1, help="Answers written at once; more wait.")
    ] = 64,
    max_queued: Annotated[
        int, typer.Option(min=0, help="Turns that may wait; more are refused with status 429.")
    ] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 1024,
    max_body_bytes: Annotated[
        int, typer.Option(min=1, help="Size of a request's body.")
    ] = 1_000_000,
    max_sessions: Annotated[int, typer.Option(min=1, help="Sessions that are kept.")] = 10_000,
    session_days: Annotated[
        float | None,
        typer.Option(help="Forget conversations that were not used for so long.  [default: never]"),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds that a turn may take, waiting included.")
    ] = 300.0,
    temperature: Annotated[
        float, typer.Option(min=0, help="Of requests that name none; 0: the most likely answer.")
    ] = 0.0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Serve a model: OpenAI-compatible HTTP, sessions, and a chat page.

    Ctrl-C (or SIGTERM) finishes the answers being written and leaves; a second one leaves at once.
    """
    _need_extra()
    from rxlm.rxt.models import RxTAlpha
    from rxlm.serve.app import create_app
    from rxlm.serve.interface import ServeLimits
    from rxlm.serve.service import ConversationService
    from rxlm.serve.settings import ServerSettings
    from rxlm.training.device import cpu_threads, resolve_device

    settings = ServerSettings.parse(
        {
            "api_key": read_key(api_key_file, os.environ.get(KEY_VARIABLE)),
            "allowed_hosts": _hosts(host, allowed_host),
            "allowed_origins": tuple(allow_origin or ()),
            "max_body_bytes": max_body_bytes,
            "answer_timeout_seconds": timeout + 60.0,
            "default_temperature": temperature,
        },
        "serve",
    )
    limits = ServeLimits.parse(
        {
            "max_running": max_running,
            "max_queued": max_queued,
            "max_new_tokens": max_new_tokens,
            "max_sessions": max_sessions,
            "session_ttl_seconds": None if session_days is None else 86_400.0 * session_days,
            "request_timeout_seconds": timeout,
        },
        "serve",
    )
    # Before the model is read, which takes longer than to find out that the port is taken.
    with contextlib.closing(listening(host, port)) as listener, cpu_threads(threads):
        model = RxTAlpha.from_pretrained(model_dir, device=resolve_device(device))
        folder = sessions or default_sessions_dir(model_dir) / STORE_FOLDER
        name = model_name or default_model_name(model_dir)
        service = ConversationService(model, folder, limits, model_name=name)
        try:
            _announce(listener, name, settings)
            run(create_app(service, settings), listener)
        finally:
            service.close()


def read_key(file: Path | None, variable: str | None) -> str | None:
    """Return the key of ``file``, or else that of the environment; None if there is neither.

    Raises:
        UserError: if it is empty or holds what no header can carry.
    """
    if file is not None:
        source, key = str(file), file.read_text(encoding="utf-8").strip()
    elif variable is not None:
        source, key = KEY_VARIABLE, variable.strip()
    else:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"{source}: a key is one word of printable ASCII characters, 'openssl rand -hex 32' "
            "makes one."
        )
    return key


def default_model_name(model_dir: str) -> str:
    """Return how a model is called in the API: after its folder, or the folder of its run."""
    path = Path(model_dir.removeprefix("hf://")).absolute()
    if path.parent.name == "checkpoints":
        path = path.parent.parent
    return path.name or "rxlm"


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        UserError: if the port is in use or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror or error}.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host}, port {port}: {error.strerror}. Choose another one with "
            "--port (0: any free one)."
        ) from None
    return listener


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve ``app`` on ``listener`` until SIGINT or SIGTERM.

    Raises:
        RunError: if the application does not start.
    """
    import uvicorn

    from rxlm.serve.header_timeout import HeadTimeoutProtocol

    class Server(uvicorn.Server):
        """Ends on a signal as on any other end: with a status of the program's own."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            before = {
                number: signal.signal(number, self.handle_exit)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # The second one does not wait for the answers being written.
            self.force_exit = self.should_exit
            self.should_exit = True

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        # Nobody in front of it is believed: the address of a caller decides nothing here.
        proxy_headers=False,
        ws="none",
        http=HeadTimeoutProtocol,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=65_536,
    )
    server = Server(config)
    server.run(sockets=[listener])
    if not server.started:
        raise RunError("the server did not start; the lines above say why.")


def _announce(listener: socket.socket, name: str, settings: ServerSettings) -> None:
    from rxlm.serve.settings import is_loopback

    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if settings.api_key is None and not is_loopback(host):
        style = "bold red" if sys.stderr.isatty() else None
        console.messages().out(
            f"WARNING: {host} is reachable from other machines and no key is set: whoever reaches "
            "this port can read, continue and delete every conversation. Set a key "
            f"(--api-key-file or {KEY_VARIABLE}), or leave out --host.",
            highlight=False,
            style=style,
        )
    console.messages().out(
        f"serving {name} on http://{shown}:{port}/ (Ctrl-C ends)", highlight=False
    )


def _hosts(host: str, allowed: list[str] | None) -> tuple[str, ...] | None:
    """Return the names that are answered to; None: any.

    Bound to other addresses without ``--allowed-host``, nobody knows the names of this machine.
    """
    from rxlm.serve.settings import LOOPBACK_NAMES, is_loopback

    if allowed:
        return (*LOOPBACK_NAMES, *allowed)
    return (*LOOPBACK_NAMES, host) if is_loopback(host) else None


def _need_extra() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"rxlm serve needs {', '.join(missing)}: pip install 'reactive-lm[serve]'.")
