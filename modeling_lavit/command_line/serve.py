"""`lavit serve`."""

import argparse
import os
import socket

from .common import device_and_dtype, model_source, positive_number


READY = """\
{name} is served at {url}/v1 (Ctrl-C stops it). To try:
  curl {url}/v1/images/generations -H 'Content-Type: application/json'{key} -d '{{"prompt": "red apple"}}'
  curl {url}/v1/images/edits{key} -F image=@apple.png -F prompt='in flat style'
  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d \
'{{"model": "{name}", "messages": [{{"role": "user", "content": "a red apple"}}], "modalities": ["image"]}}'
"""


def add_commands(add) -> None:
    """Adds the subcommands of this file; `add` is that of [`build_parser`]."""
    command = add(
        "serve",
        run_server,
        help="serve a model through OpenAI's API (needs the extra serve)",
        description="Serves reading, drawing and editing through OpenAI's API. Needs the extra `serve`.",
        example="lavit serve --port 8000 --api-key secret",
    )
    command.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="precision (default: auto, bfloat16 on an accelerator, float32 on a CPU)",
    )
    command.add_argument(
        "--replicas", type=positive_number, default=1, metavar="N", help="processes that hold the model (default: 1)"
    )
    command.add_argument(
        "--max-batch-size",
        type=positive_number,
        default=16,
        metavar="N",
        help="images, or answers, that one replica works on together (default: 16)",
    )
    command.add_argument(
        "--max-queue",
        type=positive_number,
        default=64,
        metavar="N",
        help="images and answers that may wait; others are refused with status 429 (default: 64)",
    )
    command.add_argument(
        "--api-key", metavar="KEY", help="required from clients (default: that of LAVIT_API_KEY, or none)"
    )
    command.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    command.add_argument("--port", type=positive_number, default=8000, help="port to listen at (default: 8000)")
    command.add_argument("--allow-urls", action="store_true", help="fetch images from public http(s) URLs in requests")


def run_server(options: argparse.Namespace):
    """`lavit serve`"""
    try:
        with socket.create_server((options.host, options.port)):
            pass
    except OSError as error:
        raise OSError(f"{options.host}:{options.port} cannot be listened at: {error.strerror}") from error
    source = model_source(options)
    device, _ = device_and_dtype(options)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read by Ray
    from modeling_lavit.serving.application import serve_until_interrupted
    from modeling_lavit.serving.settings import ServeSettings

    given = {"api_key": options.api_key} if options.api_key else {}
    settings = ServeSettings(
        model=source,
        dtype=options.dtype,
        device=str(device),
        replicas=options.replicas,
        max_batch_size=options.max_batch_size,
        max_queue=options.max_queue,
        allow_urls=options.allow_urls,
        **given,
    )

    def announce():
        key = f" -H 'Authorization: Bearer {options.api_key}'" if options.api_key else ""
        url = f"http://{options.host}:{options.port}"
        print(READY.format(name=settings.served_name, url=url, key=key), end="", flush=True)

    serve_until_interrupted(settings, options.host, options.port, announce)
