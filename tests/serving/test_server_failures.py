"""What nobody foresaw, and what no replica takes: told as the API's errors, counted, and without inner details."""

import asyncio

import openai
import pytest
import requests
from ray.serve.exceptions import BackPressureError
from running_server import Running

from modeling_lavit.serving.client import ReplicaClient
from modeling_lavit.serving.errors import ApiError
from modeling_lavit.serving.requests import Description, Drawing, Writing
from modeling_lavit.serving.settings import ServeSettings


class FailingEngine:
    """Runs out of memory, in a stream after the first piece."""

    async def describe(self):
        return Description([(48, 48)], (48, 48))

    async def draw(self, drawing):
        raise RuntimeError("out of memory")

    async def stream(self, writing):
        yield "a "
        raise RuntimeError("out of memory")


@pytest.fixture
def failing():
    server = Running(ServeSettings(), FailingEngine())
    yield server
    server.stop()


def test_a_failure_is_a_500_without_its_reason_and_counted_as_one(failing):
    response = requests.post(f"{failing.root}/v1/images/generations", json={"prompt": "red apple"})
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["type"] == "server_error" and "memory" not in error["message"]
    figures = requests.get(f"{failing.root}/metrics").text
    assert 'lavit_requests_total{route="/v1/images/generations",status="500"} 1.0' in figures


def test_a_stream_that_fails_ends_with_an_error(failing):
    messages = [{"role": "user", "content": "what is it?"}]
    pieces = failing.client().chat.completions.create(model="lavit-emoji", messages=messages, stream=True)
    seen = []
    with pytest.raises(openai.APIError, match="the server failed"):
        for piece in pieces:
            seen.append(piece.choices[0].delta.content)
    assert seen == ["", "a "]


class FullHandle:
    """A handle of Ray whose deployment has a full queue: asking says so, and cancelling says so once more."""

    def __init__(self):
        self.draw = self.stream = self

    def options(self, **options):
        return self

    def remote(self, request):
        return self

    def cancel(self):
        raise BackPressureError(num_queued_requests=4, max_queued_requests=4)

    def __aiter__(self):
        return self

    async def __anext__(self):
        self.cancel()

    def __await__(self):
        yield from self.__anext__().__await__()


def test_a_full_queue_is_a_429_for_streams_too():
    client = ReplicaClient(FullHandle())
    writing = Writing([{"role": "user", "content": [{"type": "text", "text": "what is it?"}]}], "answer", seed=0)
    for asked in (client.draw(Drawing(("red apple",), seed=0)), anext(client.stream(writing))):
        with pytest.raises(ApiError) as caught:
            asyncio.run(as_coroutine(asked))
        assert (caught.value.status, caught.value.code) == (429, "queue_full")


async def as_coroutine(awaitable):
    return await awaitable
