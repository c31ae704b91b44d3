"""What a server is started with: options of `lavit serve`, `args` of a config file for `serve run`."""

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from modeling_lavit.checkpoints import LAVIT_EMOJI


class ServeSettings(BaseModel):
    """Settings of the server; a wrong one is refused before anything starts.

    Args:
        model: checkpoint folder, or repository on the Hub.
        dtype: "auto" is bfloat16 on an accelerator and float32 on a CPU.
        device: such as "cpu" or "cuda"; by default an accelerator if there is one.
        replicas: processes that hold the model. A config file's `deployments` may say so instead.
        max_batch_size: images, or answers, that one replica works on together.
        max_queue: images, or answers, that may wait for a place in a replica; more are refused with status 429.
        max_requests: that are held at once, those still arriving included; more are refused with status 429.
        api_key: asked of every client of /v1 if given; by default that of the environment's LAVIT_API_KEY.
        allow_urls: whether images are fetched from the http(s) addresses that clients name.
        max_body_bytes: of a request.
        max_image_pixels: of an image that a client sends, before it is decoded.
        max_images: in one request.
        max_n: images, or answers, of one request.
        max_prompt_chars: of all texts of one request together.
        max_tokens: that an answer may have.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = str(LAVIT_EMOJI)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    replicas: int = Field(1, ge=1)
    max_batch_size: int = Field(16, ge=1)
    max_queue: int = Field(64, ge=0)
    max_requests: int = Field(256, ge=1)
    api_key: str | None = Field(default_factory=lambda: os.environ.get("LAVIT_API_KEY"))
    allow_urls: bool = False
    max_body_bytes: int = Field(20_000_000, ge=1)
    max_image_pixels: int = Field(20_000_000, ge=1)
    max_images: int = Field(8, ge=1)
    max_n: int = Field(8, ge=1)
    max_prompt_chars: int = Field(8_000, ge=1)
    max_tokens: int = Field(1_024, ge=1)

    @model_validator(mode="after")
    def _check_key(self) -> "ServeSettings":
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key is empty: leave it out for a server that asks for none")
        return self

    @property
    def served_name(self) -> str:
        """What clients call the model: the repository's name, or that of the folder."""
        return Path(self.model).resolve().name if Path(self.model).is_dir() else self.model
