"""The routes."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

import swarm

from .answers import ChatShape, Choice, CompletionShape, Shape, usage
from .bodies import ChatBody, CompletionBody, EmbeddingBody
from .door import Door, DoorConfig, Rates
from .errors import ApiError
from .generation import Piece
from .requests import Job, Reader
from .service import Run, Service


@dataclass(frozen=True, slots=True, kw_only=True)
class AppConfig:
    """What the API is for whom."""

    model_name: str
    """As clients name the model."""
    door: DoorConfig
    requests_per_min: int = 0
    """Of each caller; 0: as many as it likes."""
    tokens_per_min: int = 0


PATHS = ("/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/embeddings")
"""What metrics tell apart."""


class EventStream(Response):
    """Server-sent events, for as long as the client listens. It takes over what `owned` holds."""

    media_type = "text/event-stream"

    def __init__(
        self, run: Run, first: tuple[int, Piece] | None, job: Job, shape: Shape, owned: AsyncExitStack
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._run, self._first, self._job, self._shape, self._owned = run, first, job, shape, owned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._owned:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await self._send_all(send)
                end = b"data: [DONE]\n\n"
            except ApiError as exc:
                end = _event(exc.body)
            await send({"type": "http.response.body", "body": end, "more_body": False})

    async def _send_all(self, send: Send) -> None:
        choices = [Choice() for _ in self._job.orders]
        begun: set[int] = set()
        event = self._first
        while event is not None:
            number, piece = event
            choices[number].num_tokens = piece.num_tokens
            first = None if number in begun else self._shape.first(number)
            begun.add(number)
            chunks = [first, self._shape.chunk(number, piece)]
            if body := b"".join(_event(chunk) for chunk in chunks if chunk is not None):
                await send(_body(body))
            event = await self._run.next()
        if self._job.include_usage:
            used = usage(self._job.num_prompt_tokens, sum(choice.num_tokens for choice in choices))
            await send(_body(_event(self._shape.last(used))))


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def _body(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}


def make_app(service: Service, reader: Reader, rates: Rates, config: AppConfig) -> FastAPI:
    """The API of one model.

    Args:
        rates: what callers may take; the service tells it of their tokens.
    """
    app = FastAPI(
        title="Swarm", version=swarm.__version__, docs_url=None, redoc_url=None,
        description="An OpenAI-compatible API over a distributed model.",
    )  # fmt: skip
    created = int(time.time())
    model_card = {"id": config.model_name, "object": "model", "created": created, "owned_by": "swarm"}

    def check_model(name: str) -> None:
        if name != config.model_name:
            message = f"the model {name!r} is not served here: {config.model_name!r} is"
            raise ApiError(404, message, code="model_not_found", param="model")

    async def answer(request: Request, job: Job, shape: Shape) -> Response:
        """Generate what a job wants. Headers are sent when there is a first token, so that errors have their status."""
        async with AsyncExitStack() as owned:
            run = await owned.enter_async_context(
                service.run(request.state.caller, job.orders, job.num_prompt_tokens, request.receive)
            )
            event = await run.next()
            if job.stream:
                return EventStream(run, event, job, shape, owned.pop_all())
            choices = [Choice(finish_reason=None if job.orders else "length") for _ in range(job.num_choices)]
            while event is not None:
                choices[event[0]].add(event[1])
                event = await run.next()
        if any(choice.finish_reason is None for choice in choices):
            raise ApiError(499, "the client has left")  # which nobody reads
        await put_behind_prompts(request.state.caller, job, choices)
        num_tokens = sum(choice.num_tokens for choice in choices)
        return JSONResponse(shape.whole(choices, usage(job.num_prompt_tokens, num_tokens)))

    async def put_behind_prompts(caller: str, job: Job, choices: Sequence[Choice]) -> None:
        for number, ids in enumerate(job.echoes):
            echo = await service.call(caller, partial(service.engine.echo, ids, job.num_top_logprobs))
            size = job.num_choices // len(job.echoes)
            for choice in choices[number * size : (number + 1) * size]:
                choice.put_behind(*echo)

    @app.get("/health")
    async def health() -> Response:
        """Whether requests are taken."""
        return JSONResponse({"status": "draining"}, 503) if service.draining else JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model."""
        return {"object": "list", "data": [model_card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The same, by its name."""
        check_model(name)
        return model_card

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue a text."""
        check_model(body.model)
        job = await asyncio.to_thread(reader.completion, body)
        shape = CompletionShape(
            config.model_name, service.engine, include_usage=job.include_usage,
            logprobs=body.logprobs is not None,
        )  # fmt: skip
        return await answer(request, job, shape)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer messages."""
        check_model(body.model)
        job = await asyncio.to_thread(reader.chat, body)
        shape = ChatShape(
            config.model_name, service.engine, include_usage=job.include_usage, logprobs=bool(body.logprobs)
        )
        return await answer(request, job, shape)

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingBody, request: Request) -> dict[str, Any]:
        """Mean of the last hidden states of each text, scaled to length 1."""
        check_model(body.model)
        inputs = await asyncio.to_thread(reader.embedding, body)
        caller, num_tokens = request.state.caller, sum(map(len, inputs))
        service.count(caller, "prompt", num_tokens)
        vectors = [await service.call(caller, partial(service.engine.embed, ids)) for ids in inputs]
        encode = _base64 if body.encoding_format == "base64" else list
        data = [
            {"object": "embedding", "index": number, "embedding": encode(vector)}
            for number, vector in enumerate(vectors)
        ]
        used = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return {"object": "list", "data": data, "model": config.model_name, "usage": used}

    def count(path: str, status: int) -> None:
        route = path if path in PATHS else "other"
        service.metrics.responses.labels(route, status).inc()

    _add_error_handlers(app)
    app.add_middleware(Door, on_response=count, config=config.door, rates=rates, is_draining=lambda: service.draining)
    if config.door.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.door.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def of_api(_: Request, exc: ApiError) -> Response:
        return JSONResponse(exc.body, exc.status, exc.headers)

    @app.exception_handler(RequestValidationError)
    async def of_validation(_: Request, exc: RequestValidationError) -> Response:
        first = exc.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        error = ApiError(400, f"{param or 'the body'}: {first['msg']}", param=param)
        return JSONResponse(error.body, 400)

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, exc: HTTPException) -> Response:
        return JSONResponse(ApiError(exc.status_code, str(exc.detail)).body, exc.status_code, exc.headers)

    @app.exception_handler(Exception)
    async def of_bug(_: Request, exc: Exception) -> Response:
        return JSONResponse(ApiError(500, "the server failed", code="internal_error").body, 500)
