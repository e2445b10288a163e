"""The HTTP application over a conversation service.

What passes a request, from outside to inside: errors, foreign hosts and pages, CORS, the key, the
body's size, counting, then the routes. Not here: the routes, and how it is run
(``rxlm.cli.serve``).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware

from rxlm import __version__
from rxlm.serve.context import Context
from rxlm.serve.guards import BodyGuard, ErrorGuard, HostGuard, KeyGuard
from rxlm.serve.http_errors import error_response, install_handlers
from rxlm.serve.metrics import RequestCounter, service_registry
from rxlm.serve.openai_chat import chat_routes
from rxlm.serve.openai_responses import response_routes
from rxlm.serve.sessions_api import session_routes
from rxlm.serve.settings import ServerSettings

if TYPE_CHECKING:
    from rxlm.serve.service import ConversationService

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/markdown.js": ("markdown.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
OPEN_PATHS = ("/health", *PAGE_FILES)
"""What needs no key: a page without data, and whether the server is there."""


def create_app(service: ConversationService, settings: ServerSettings | None = None) -> FastAPI:
    """Return the application; it closes ``service`` when it is shut down.

    Args:
        service: the conversations.
        settings: limits, the key, who may call; None: as they are by default.
    """
    settings = settings or ServerSettings()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.close)

    app = FastAPI(
        title="rxlm",
        version=__version__,
        description="Conversations with a model that has a memory of fixed size.",
        lifespan=lifespan,
        # The interactive pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    context = Context(service, settings)
    registry = service_registry(service.stats)
    install_handlers(app)
    for routes in (chat_routes, response_routes, session_routes):
        app.include_router(routes(context))
    _add_status(app, context, registry)
    _add_page(app)
    _add_guards(app, settings, registry)
    return app


def _add_guards(app: FastAPI, settings: ServerSettings, registry: CollectorRegistry) -> None:
    # The last one added is the outermost.
    app.add_middleware(RequestCounter, registry=registry)
    app.add_middleware(
        BodyGuard,
        max_bytes=settings.max_body_bytes,
        timeout_seconds=settings.body_timeout_seconds,
    )
    if settings.api_key is not None:
        app.add_middleware(KeyGuard, key=settings.api_key.get_secret_value(), open_paths=OPEN_PATHS)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-RxLM-Session"],
        )
    app.add_middleware(HostGuard, hosts=settings.allowed_hosts, origins=settings.allowed_origins)
    app.add_middleware(ErrorGuard)


def _add_status(app: FastAPI, context: Context, registry: CollectorRegistry) -> None:
    service = context.service
    model = {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "rxlm",
    }

    @app.get("/v1/models", tags=["models"], response_model=None)
    def list_models() -> JSONResponse:
        """List the one model that is served."""
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{model_name:path}", tags=["models"], response_model=None)
    def get_model(model_name: str) -> JSONResponse:
        """Return the model."""
        if model_name != service.model_name:
            return error_response(
                404,
                f"no such model here: this server has '{service.model_name}'.",
                code="model_not_found",
                param="model",
            )
        return JSONResponse(model)

    @app.get("/health", tags=["status"], response_model=None)
    def health() -> JSONResponse:
        """Say that the server is there and its engine answers."""
        stats = service.stats()
        return JSONResponse({"status": "ok", "running": stats.running, "queued": stats.queued})

    @app.get("/metrics", tags=["status"], response_model=None)
    def metrics() -> Response:
        """Return the metrics in Prometheus' format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI) -> None:
    def route(path: str, file: Path, media_type: str) -> None:
        # A page may be kept by the browser if it asks each time whether it changed.
        headers = {"Cache-Control": "no-cache"}

        def page() -> FileResponse:
            return FileResponse(file, media_type=media_type, headers=headers)

        app.router.routes.append(
            APIRoute(path, page, methods=["GET"], include_in_schema=False, response_model=None)
        )

    for path, (name, media_type) in PAGE_FILES.items():
        route(path, PAGE / name, media_type)
