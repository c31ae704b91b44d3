"""/v1/chat/completions: images and text in; text, an image, or both in one stream out."""

import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from PIL import Image

from modeling_lavit.serving.client import ask_all, checked
from modeling_lavit.serving.errors import ApiError, unexpected_error
from modeling_lavit.serving.image_routes import check_n, check_texts, chosen_size, seeds_of
from modeling_lavit.serving.images import ImageReader, data_uri
from modeling_lavit.serving.requests import Answer, Drawing, Writing
from modeling_lavit.serving.schemas import ChatRequest, ImagePart, TextPart


router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def complete_chat(request: Request, body: ChatRequest) -> dict | StreamingResponse:
    """OpenAI's `chat.completions.create`.

    `modalities` is `["text"]` (the default), `["image"]` (the messages, text and images in order, are a drawing's
    prompt) or `["text", "image"]`. Answers with images have a list of parts as their content, as messages may have it:
    put back into `messages` they are the next turn's context.

    Without a temperature the checkpoint's own search is used, as in `lavit caption` and `lavit ask`: beams. Streamed
    text is written by greedy search.
    """
    server = request.app.state.server
    server.check_model(body.model)
    conversation = await _read_messages(request, body)
    n = check_n(server.settings, body.n)
    seeds = seeds_of(body.seed, n)
    if body.answers_with == "image":
        size = chosen_size(await server.engine.describe(), body.size)
        parts = _drawing_parts(conversation)
        answers = await ask_all(server.engine.draw, [Drawing(parts, seed, size) for seed in seeds])
    else:
        writings = [_writing(request, body, conversation, seed) for seed in seeds]
        if body.stream:
            if n > 1:
                raise ApiError(400, "n is 1 where an answer is streamed", "n", "invalid_value")
            return await _start_stream(request, body, writings[0])
        answers = await ask_all(server.engine.write, writings)
    server.metrics.count(answers)
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": _content(body, answer)},
            "logprobs": None,
            "finish_reason": "stop" if answer.ended else "length",
        }
        for i, answer in enumerate(answers)
    ]
    return {**_head(body), "object": "chat.completion", "choices": choices, "usage": _usage(answers)}


async def _read_messages(request: Request, body: ChatRequest) -> list[dict]:
    """Messages as the chat template takes them, with their images."""
    server = request.app.state.server
    parts = [part for message in body.messages for part in message.content]
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    check_texts(server.settings, texts, "messages")
    count = sum(isinstance(part, ImagePart) for part in parts)
    if count > server.settings.max_images:
        message = f"the messages have {count} images, more than {server.settings.max_images}"
        raise ApiError(400, message, "messages", "too_many_images")
    if not count and not any(text.strip() for text in texts):
        raise ApiError(400, "the messages are empty", "messages", "invalid_value")
    reader = ImageReader(server.settings, (await server.engine.describe()).image_size)
    conversation = []
    for i, message in enumerate(body.messages):
        blocks = []
        for j, part in enumerate(message.content):
            if isinstance(part, TextPart):
                blocks.append({"type": "text", "text": part.text})
            else:
                param = f"messages.{i}.content.{j}.image_url.url"
                image = await reader.from_address(part.image_url.url, param)
                blocks.append({"type": "image", "image": image})
        role = "system" if message.role == "developer" else message.role
        conversation.append({"role": role, "content": blocks})
    return conversation


def _drawing_parts(conversation: list[dict]) -> tuple[str | Image.Image, ...]:
    return tuple(block[block["type"]] for message in conversation for block in message["content"])


def _writing(request: Request, body: ChatRequest, conversation: list[dict], seed: int) -> Writing:
    settings = request.app.state.server.settings
    max_tokens = body.max_completion_tokens or body.max_tokens
    if (max_tokens or 0) > settings.max_tokens:
        message = f"max_tokens is {max_tokens}, more than {settings.max_tokens}"
        raise ApiError(400, message, "max_tokens", "invalid_value")
    preset = None
    if body.answers_with == "text":
        asks = any(block["type"] == "text" and block["text"].strip() for block in conversation[-1]["content"])
        preset = "answer" if asks else "caption"
    return Writing(
        conversation,
        preset,
        seed,
        max_tokens=max_tokens,
        temperature=body.temperature or None,
        top_p=body.top_p,
        stops=tuple(body.stop),
    )


def _head(body: ChatRequest) -> dict:
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}


def _content(body: ChatRequest, answer: Answer) -> str | list[dict]:
    if body.answers_with == "text":
        return "".join(part for part in answer.parts if isinstance(part, str))
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_uri(part)}}
        for part in answer.parts
    ]


def _usage(answers: list[Answer]) -> dict:
    read, written = answers[0].prompt_tokens, sum(answer.completion_tokens for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


async def _start_stream(request: Request, body: ChatRequest, writing: Writing) -> StreamingResponse:
    """A stream whose first piece is there: what is refused before gets its own status."""
    pieces = request.app.state.server.engine.stream(writing)
    first = checked(await anext(pieces))
    return StreamingResponse(_events(request, body, first, pieces), media_type="text/event-stream")


async def _events(
    request: Request, body: ChatRequest, first: str | Answer, pieces: AsyncGenerator[str | Answer]
) -> AsyncIterator[str]:
    head = {**_head(body), "object": "chat.completion.chunk"}
    with_usage = body.stream_options is not None and body.stream_options.include_usage

    def event(delta: dict, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if with_usage else {}
        return f"data: {json.dumps({**head, 'choices': [choice], **usage})}\n\n"

    yield event({"role": "assistant", "content": ""})
    try:
        piece = first
        while isinstance(piece, str):
            yield event({"content": piece})
            piece = checked(await anext(pieces))
    except Exception as error:
        told = error if isinstance(error, ApiError) else unexpected_error()
        yield f"data: {bytes(told.response().body).decode()}\n\n"
        return
    finally:
        await pieces.aclose()
    request.app.state.server.metrics.count([piece])
    yield event({}, "stop" if piece.ended else "length")
    if with_usage:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': _usage([piece])})}\n\n"
    yield "data: [DONE]\n\n"
