"""/v1/images: drawing from text, and from images and text."""

import re
import secrets
import time

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from modeling_lavit.serving.client import ask_all
from modeling_lavit.serving.errors import ApiError, refuse_validation
from modeling_lavit.serving.images import ImageReader, encode_image
from modeling_lavit.serving.requests import Answer, Description, Drawing
from modeling_lavit.serving.schemas import ImageRequest
from modeling_lavit.serving.settings import ServeSettings


IMAGE_FIELDS = ("image", "image[]")

router = APIRouter()


@router.post("/v1/images/generations")
async def generate_images(request: Request, body: ImageRequest) -> dict:
    """OpenAI's `images.generate`; beyond it `seed`: image i is drawn with seed + i, and the answer says with which."""
    return await _draw(request, body, ())


@router.post("/v1/images/edits")
async def edit_images(request: Request) -> dict:
    """OpenAI's `images.edit`: a multipart form with one image or several, which stand in front of the prompt."""
    server = request.app.state.server
    async with request.form(max_files=server.settings.max_images, max_fields=32) as form:
        fields = [(name, value) for name, value in form.multi_items() if name not in IMAGE_FIELDS]
        files = [value for name, value in form.multi_items() if name in IMAGE_FIELDS]
        if not files:
            raise ApiError(400, "image is missing: send a multipart form with one file or several", "image")
        for name, value in fields:
            if isinstance(value, UploadFile):
                raise ApiError(400, f"this server does not know the parameter {name}", name, "unknown_parameter")
        try:
            body = ImageRequest.model_validate(dict(fields))
        except ValidationError as error:
            raise refuse_validation(error) from error
        reader = ImageReader(server.settings, (await server.engine.describe()).image_size)
        images = []
        for file in files:
            if not isinstance(file, UploadFile):
                raise ApiError(400, "image is no file: send it as one part of the form", "image", "invalid_image")
            images.append(await reader.from_bytes(await file.read(), "image"))
    return await _draw(request, body, tuple(images))


async def _draw(request: Request, body: ImageRequest, images: tuple) -> dict:
    server = request.app.state.server
    server.check_model(body.model)
    check_texts(server.settings, [body.prompt], "prompt")
    if not body.prompt.strip():
        raise ApiError(400, "the prompt is empty", "prompt", "invalid_value")
    output_format = body.output_format or "png"
    if output_format == "png" and body.output_compression not in (None, 100):
        raise ApiError(400, "output_compression goes with jpeg and webp", "output_compression", "invalid_value")
    compression = 100 if body.output_compression is None else body.output_compression
    n = check_n(server.settings, body.n)
    size = chosen_size(await server.engine.describe(), body.size)
    seeds = seeds_of(body.seed, n)
    drawings = [Drawing((*images, body.prompt), seed, size) for seed in seeds]
    answers = await ask_all(server.engine.draw, drawings)
    server.metrics.count(answers)
    data = []
    images_drawn = [part for answer in answers for part in answer.parts if not isinstance(part, str)]
    for image, seed in zip(images_drawn, seeds, strict=True):
        content = encode_image(image, output_format, compression)
        if body.response_format == "url":
            data.append({"url": f"data:image/{output_format};base64,{content}", "seed": seed})
        else:
            data.append({"b64_json": content, "seed": seed})
    width, height = images_drawn[0].size
    return {
        "created": int(time.time()),
        "data": data,
        "output_format": output_format,
        "size": f"{width}x{height}",
        "usage": usage_of_images(answers, len(images)),
    }


def usage_of_images(answers: list[Answer], num_images: int) -> dict:
    """Ids of prompt and images, in the shape of OpenAI's images."""
    read = answers[0].prompt_tokens
    written = sum(answer.completion_tokens for answer in answers)
    details = {"image_tokens": 2 * num_images, "text_tokens": read - 2 * num_images}
    return {
        "input_tokens": read,
        "input_tokens_details": details,
        "output_tokens": written,
        "total_tokens": read + written,
    }


def check_texts(settings: ServeSettings, texts: list[str], param: str) -> None:
    """Refuses more text than the server takes."""
    length = sum(map(len, texts))
    if length > settings.max_prompt_chars:
        message = f"{param} has {length} characters, more than {settings.max_prompt_chars}"
        raise ApiError(400, message, param, "prompt_too_long")


def check_n(settings: ServeSettings, n: int | None) -> int:
    """The number of images, or answers, that a request asks for."""
    if (n or 1) > settings.max_n:
        raise ApiError(400, f"n is {n}, more than {settings.max_n}", "n", "invalid_value")
    return n or 1


def chosen_size(description: Description, size: str | None) -> tuple[int, int] | None:
    """(height, width) of OpenAI's "WIDTHxHEIGHT"; None, the model's own, of "auto"."""
    if size in (None, "auto"):
        return None
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    wanted = (int(found[2]), int(found[1])) if found else None
    if wanted not in description.sizes:
        known = ", ".join(f"{width}x{height}" for height, width in description.sizes)
        raise ApiError(400, f"size is {size!r:.40}, the model draws auto, {known}", "size", "invalid_value")
    return wanted


def seeds_of(seed: int | None, n: int) -> list[int]:
    """Image i has seed + i; without a seed a new one."""
    first = secrets.randbits(32) if seed is None else seed
    return [(first + i) % 2**63 for i in range(n)]
