"""The app: routes, what is checked before them, and errors in one shape.

There is no page of documentation here, for FastAPI's loads its program from elsewhere; the document
itself is at `/openapi.json`.
"""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from salience import __version__
from salience.errors import SalienceError
from salience.monitor import memory
from salience.server import chats, page, responses, texts
from salience.server.answers import ErrorAnswer, ModelAnswer, ModelList, documented
from salience.server.errors import ApiError
from salience.server.guard import Guard, Limits, answer, authorized
from salience.server.metrics import CONTENT_TYPE, Metrics
from salience.server.service import Service
from salience.server.sse import ClientGoneError

_logger = logging.getLogger(__name__)


def make_app(
    service: Service,
    metrics: Metrics,
    limits: Limits | None = None,
    cors: Sequence[str] = (),
) -> Any:
    """An ASGI app for a service. It starts the service's thread, and stops it at the end.

    Args:
        service: what answers.
        metrics: that the service's worker watches.
        limits: None for the defaults.
        cors: origins whose pages may call it; "*" for all.
    """
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.stop()

    app = FastAPI(
        title="salience",
        version=__version__,
        description=f"OpenAI's protocol, served for the model {service.name}.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    metrics.observe(service.worker)
    for router in (
        chats.router(service),
        texts.router(service),
        _models(service),
        responses.router(service),
        _state(service, metrics, limits),
        _page(),
    ):
        app.include_router(router)
    _handle_errors(app)
    paths = {getattr(route, "path", "") for route in app.routes}
    paths |= set(app.openapi()["paths"])

    def answered(path: str, status: int) -> None:
        metrics.answered(path if path in paths else "other", status)

    app.add_middleware(Guard, limits=limits, answered=answered)
    if cors:
        # Without credentials: keys are sent by programs, not by browsers unasked.
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors), allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _models(service: Service) -> APIRouter:
    made = APIRouter(tags=["models"])

    def model() -> dict[str, Any]:
        return {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "salience",
            "max_model_len": service.context,
        }

    @made.get("/v1/models", summary="The served model", responses=documented(ModelList, 401, 500))
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model()]})

    @made.get(
        "/v1/models/{name:path}",
        summary="One model",
        responses=documented(ModelAnswer, 401, 404, 500),
    )
    async def one(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(model())

    return made


def _state(service: Service, metrics: Metrics, limits: Limits) -> APIRouter:
    made = APIRouter(tags=["state"])
    worker = service.worker

    @made.get(
        "/health",
        summary="Whether it answers",
        responses={200: {"model": dict[str, Any]}, 503: {"model": dict[str, Any]}},
    )
    async def health(request: Request) -> Response:
        said: dict[str, Any] = {"status": worker.state}
        if authorized(request.scope, limits.api_key):
            said |= {
                "model": service.name,
                "context": service.context,
                "slots": {
                    "total": service.engine.max_batch,
                    "running": worker.running,
                    "waiting": worker.waiting,
                },
                "memory": asdict(memory()),
                "tokens_per_second": round(worker.tokens_per_second, 2),
            }
        return JSONResponse(said, 200 if worker.state == "ok" else 503)

    @made.get(
        "/metrics",
        summary="Numbers for Prometheus",
        responses={
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
            401: {"model": ErrorAnswer},
        },
        response_class=Response,
    )
    async def numbers() -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return made


def _handle_errors(app: FastAPI) -> None:
    async def api(_: Request, error: Any) -> Response:
        return answer(error)

    async def wrong(_: Request, error: Any) -> Response:
        return answer(ApiError(str(error)))

    async def invalid(_: Request, error: Any) -> Response:
        return answer(_invalid(error))

    async def http(_: Request, error: Any) -> Response:
        status = HTTPStatus(error.status_code)
        message = str(error.detail)
        if message == status.phrase:
            message = f"{status.phrase.lower()} here; /openapi.json tells what there is"
        response = answer(ApiError(message, status.value))
        response.headers.update(error.headers or {})
        return response

    async def failed(_: Request, error: Any) -> Response:
        # Starlette raises it again behind this, and uvicorn writes it to stderr.
        return answer(ApiError("the server made a mistake; its log tells more", 500))

    async def gone(_: Request, error: Any) -> Response:
        return Response(status_code=499)

    app.add_exception_handler(ApiError, api)
    app.add_exception_handler(SalienceError, wrong)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientGoneError, gone)
    app.add_exception_handler(Exception, failed)


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "path", "query")]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(f"the body is no JSON: {reason} at character {place[0]}", code="bad_json")
    if not place:
        return ApiError("the body must be a JSON object")
    field = place[0]
    return ApiError(f"{field}: {first['msg'].lower()}", param=field)


def _page() -> APIRouter:
    made = APIRouter()

    @made.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page.PAGE, headers=page.HEADERS)

    return made
