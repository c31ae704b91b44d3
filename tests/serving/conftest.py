"""A server with the embedded checkpoint, for the tests of one file."""

import pytest
from running_server import Running

from modeling_lavit.serving.engine import LavitEngine
from modeling_lavit.serving.settings import ServeSettings


@pytest.fixture(scope="module")
def settings():
    return ServeSettings(
        dtype="float32", device="cpu", max_batch_size=4, max_body_bytes=300_000, max_images=3, max_n=4
    )


@pytest.fixture(scope="module")
def engine(settings):
    return LavitEngine(settings)


@pytest.fixture(scope="module")
def running(settings, engine):
    server = Running(settings, engine)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(running):
    return running.client()
