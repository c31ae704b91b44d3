"""Requests in OpenAI's shapes. A field that is not here is refused: no client believes in what does nothing."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _number_of_form(value: Any) -> Any:
    """Forms hold strings: `"4"` is a 4 there."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?\d{1,20}", value) else value


def _as_parts(value: Any) -> Any:
    """A string is one part of text."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    """A string is a list of one, and null of none."""
    return [value] if isinstance(value, str) else value or []


Seed = Annotated[int, BeforeValidator(_number_of_form), Field(ge=0, lt=2**63)]
Count = Annotated[int, BeforeValidator(_number_of_form), Field(ge=1)]


class TextPart(Schema):
    type: Literal["text"]
    text: str


class ImageAddress(Schema):
    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Schema):
    type: Literal["image_url"]
    image_url: ImageAddress


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Schema):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)]
    name: str | None = None
    # an answer of this or another server, handed back as it came
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class StreamOptions(Schema):
    include_usage: bool = False
    include_obfuscation: bool = False


class Labels(Schema):
    """What clients attach to requests and no answer depends on."""

    user: str | None = None
    safety_identifier: str | None = None


class ChatRequest(Labels):
    model: str
    messages: list[Message] = Field(min_length=1, max_length=256)
    modalities: list[Literal["text", "image"]] = Field(["text"], min_length=1, max_length=2)
    n: int | None = Field(None, ge=1)
    seed: Seed | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)] = Field([], max_length=16)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    size: str | None = None
    # what many clients send always, at the values that mean nothing
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logprobs: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @property
    def answers_with(self) -> Literal["text", "image", "interleaved"]:
        """The generation mode that `modalities` name."""
        if len(set(self.modalities)) == 2:
            return "interleaved"
        return self.modalities[0]

    @model_validator(mode="after")
    def _check_combinations(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options go with stream=true")
        if self.answers_with != "text":
            for name in ("stream", "stop", "temperature", "top_p"):
                if getattr(self, name):
                    raise ValueError(f"{name} goes with text alone, not with modalities {self.modalities}")
        if self.top_p not in (None, 1) and self.temperature is None:
            self.temperature = 1.0  # OpenAI's: whoever names a nucleus wants to sample
        if self.answers_with == "image" and (self.max_tokens or self.max_completion_tokens):
            raise ValueError("an image has as many visual tokens as it needs: leave max_tokens out")
        if self.answers_with == "text" and self.size:
            raise ValueError("size goes with images, not with modalities ['text']")
        if self.answers_with == "text" and (self.n or 1) > 1 and not self.temperature:
            raise ValueError("n answers are alike without a temperature above 0: give one, or n=1")
        return self


class ImageRequest(Labels):
    """Of /v1/images/generations, and without its images of /v1/images/edits."""

    prompt: str = Field(min_length=1)
    model: str | None = None
    n: Count | None = None
    size: str | None = None
    seed: Seed | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, BeforeValidator(_number_of_form), Field(ge=0, le=100)] | None = None
    # the values of OpenAI's models that this one's images have
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    style: Literal["natural"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: Literal[False] | None = None
