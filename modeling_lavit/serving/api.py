"""The application: its routes, and what holds for all of them (key, size of bodies, errors, figures)."""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from modeling_lavit.serving import chat_routes, image_routes
from modeling_lavit.serving.client import Engine
from modeling_lavit.serving.errors import ApiError, add_error_handlers
from modeling_lavit.serving.metrics import Metrics
from modeling_lavit.serving.settings import ServeSettings


# a body that comes more slowly is given up
UPLOAD_SECONDS = 60
GONE = 499  # counted where a client went away before it was answered
OPEN_ROUTES = ("/health", "/metrics")

router = APIRouter()


@dataclass
class Server:
    """What routes share; `request.app.state.server`.

    Args:
        settings: of the server.
        engine: where the model is.
        metrics: counted by routes and middleware.
        count_replicas: how many replicas of the model run now.
        started: seconds since the epoch.
        running: requests that wait or run.
        is_stopping: whether new requests are refused.
    """

    settings: ServeSettings
    engine: Engine
    metrics: Metrics
    count_replicas: Callable[[], Awaitable[int]]
    started: int
    running: int = 0
    is_stopping: bool = False

    async def drain(self, seconds: float) -> None:
        """Refuses new requests and waits, so long at most, for the others to end."""
        self.is_stopping = True
        async with asyncio.timeout(seconds):
            while self.running:
                await asyncio.sleep(0.05)

    def check_model(self, name: str | None) -> None:
        """Refuses requests for another model."""
        if name is not None and name != self.settings.served_name:
            message = f"there is no model {name!r:.100} here, but {self.settings.served_name!r}"
            raise ApiError(404, message, "model", "model_not_found")


def create_api(settings: ServeSettings, engine: Engine, count_replicas: Callable[[], Awaitable[int]]) -> FastAPI:
    """The ASGI application of a server."""
    api = FastAPI(title="LaVIT", docs_url=None, redoc_url=None)
    api.state.server = Server(settings, engine, Metrics(), count_replicas, int(time.time()))
    add_error_handlers(api)
    for routes in (router, chat_routes.router, image_routes.router):
        api.include_router(routes)
    api.add_middleware(Gate, server=api.state.server)
    return api


@router.get("/v1/models")
async def list_models(request: Request) -> dict:
    """The one model that is served."""
    return {"object": "list", "data": [_model(request.app.state.server)]}


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> dict:
    """The same by its name."""
    server: Server = request.app.state.server
    server.check_model(name)
    return _model(server)


def _model(server: Server) -> dict:
    return {
        "id": server.settings.served_name,
        "object": "model",
        "created": server.started,
        "owned_by": "lavit",
    }


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 while a replica of the model runs."""
    replicas = await request.app.state.server.count_replicas()
    status = {"status": "ok" if replicas else "no replica runs", "replicas": replicas}
    return JSONResponse(status, status_code=200 if replicas else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Figures in Prometheus' text format."""
    return Response(generate_latest(request.app.state.server.metrics.registry), media_type=CONTENT_TYPE_LATEST)


class Gate:
    """ASGI middleware: the key, the size and pace of bodies, and the figures of requests."""

    def __init__(self, app, server: Server):
        self.app, self.server = app, server

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        metrics, status, start = self.server.metrics, GONE, time.monotonic()

        async def counted_send(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.server.running += 1
        metrics.in_flight.inc()
        try:
            headers = dict(scope["headers"])
            self._check(scope["path"], headers)
            await self.app(scope, await self._received(receive, headers), counted_send)
        except ApiError as error:
            await error.response()(scope, receive, counted_send)
        except Exception:
            # answered outside of this middleware
            status = 500
            raise
        finally:
            self.server.running -= 1
            metrics.in_flight.dec()
            # of unknown addresses no more than one line
            route = getattr(scope.get("route"), "path", "other")
            metrics.requests.labels(route, str(status)).inc()
            metrics.seconds.labels(route).observe(time.monotonic() - start)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        if path in OPEN_ROUTES:
            return
        if self.server.is_stopping:
            raise ApiError(503, "the server is stopping", code="stopping")
        if self.server.running > self.server.settings.max_requests:
            raise ApiError(429, "too many requests at once: try again in a moment", code="too_many", retry_after=1)
        key = self.server.settings.api_key
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if key is not None and not hmac.compare_digest(given, key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _received(self, receive, headers: dict[bytes, bytes]):
        """`receive` with the whole body in it, unless that is too long or comes too slowly."""
        limit = self.server.settings.max_body_bytes
        too_long = ApiError(413, f"the body is longer than {limit} bytes", code="body_too_large")
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > limit:
            raise too_long
        body, is_complete = bytearray(), False
        try:
            async with asyncio.timeout(UPLOAD_SECONDS):
                while not is_complete:
                    message = await receive()
                    body += message.get("body", b"")
                    is_complete = not message.get("more_body", False)
                    if len(body) > limit:
                        raise too_long
        except TimeoutError as error:
            raise ApiError(408, f"the body took longer than {UPLOAD_SECONDS} s") from error
        messages = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def replay() -> dict:
            return next(messages, None) or await receive()

        return replay
