"""`lavit serve` and `serve run` as users start them: `make test-serve`. Minutes, and all of the cores."""

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import psutil
import pytest
import requests
import yaml
from PIL import Image


pytestmark = pytest.mark.skipif(not os.environ.get("LAVIT_TEST_SERVE"), reason="takes minutes: make test-serve")
ROOT = Path(__file__).resolve().parent.parent.parent
LAVIT = [sys.executable, str(ROOT / "modeling_lavit/bin/lavit")]
CAT = ROOT / "tests/fixtures/emoji/images/noto/cat-face.png"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


class Served:
    """`lavit serve` in a process of its own, in a session of its own as a terminal gives it."""

    def __init__(self, folder: Path, *options: str):
        self.port = free_port()
        command = [*LAVIT, "serve", "--port", str(self.port), *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": open(folder / "stderr.txt", "w"), "text": True}
        self.process = subprocess.Popen(command, cwd=folder, start_new_session=True, **pipes)
        self.ready = "".join(self._read())
        self.root = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.root}/v1", api_key="none", max_retries=0)

    def _read(self):
        for line in self.process.stdout:
            yield line
            if '"modalities"' in line:
                return
        raise AssertionError("the server ended before it was ready")

    def draw(self, seed: int = 0) -> str:
        return self.client.images.generate(prompt="red apple", extra_body={"seed": seed}).data[0].b64_json

    def write(self) -> str:
        messages = [{"role": "user", "content": "which style is this?"}]
        pieces = self.client.chat.completions.create(model="lavit-emoji", messages=messages, stream=True)
        return "".join(piece.choices[0].delta.content or "" for piece in pieces)

    def engines(self) -> list[psutil.Process]:
        return [
            one
            for one in psutil.Process(self.process.pid).children(recursive=True)
            if "ServeReplica:lavit:LavitEngine" in " ".join(one.cmdline())
        ]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "apple.png").write_bytes(CAT.read_bytes())
    server = Served(folder, "--max-batch-size", "4", "--max-queue", "4")
    server.folder = folder
    yield server
    server.process.kill()


def pixels(content: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))), dtype=int)


def outcome(call) -> tuple[str, float]:
    start = time.monotonic()
    try:
        return call(), time.monotonic() - start
    except openai.APIStatusError as error:
        return str(error.status_code), time.monotonic() - start


def test_the_commands_of_the_ready_message_work(served):
    commands = [line.strip() for line in served.ready.splitlines() if line.strip().startswith("curl")]
    assert len(commands) == 3
    for command in commands:
        answer = subprocess.run(command, shell=True, cwd=served.folder, capture_output=True, text=True, check=True)
        assert {"data", "choices"} & set(json.loads(answer.stdout)), answer.stdout


def test_a_full_queue_answers_429_at_once(served):
    with ThreadPoolExecutor(40) as pool:
        outcomes = list(pool.map(lambda seed: outcome(lambda: served.draw(seed)), range(40)))
    refused = [seconds for what, seconds in outcomes if what == "429"]
    # 4 run, 4 wait in the replica and 4 in the queue
    assert len(refused) >= 40 - 12 - 4 and max(refused) < 5
    assert all(len(what) > 100 for what, _ in outcomes if what != "429")


def test_streams_that_find_the_queue_full_are_refused_in_the_same_way(served):
    with ThreadPoolExecutor(40) as pool:
        outcomes = {what for what, _ in pool.map(lambda _: outcome(served.write), range(40))}
    assert "429" in outcomes and not any(what.startswith("5") for what in outcomes)


def test_clients_that_go_away_free_their_places(served):
    body = json.dumps({"prompt": "red apple", "n": 4})
    for _ in range(6):
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        time.sleep(0.05)
        connection.close()
    # 24 images would keep the engine busy for long, and the queue full
    end = time.monotonic() + 3
    while (found := outcome(lambda: served.draw(1))[0]) == "429" and time.monotonic() < end:
        time.sleep(0.1)
    assert len(found) > 100
    figures = requests.get(f"{served.root}/metrics").text
    assert "lavit_requests_in_flight 1.0" in figures and 'status="499"' in figures


def test_a_replica_that_is_killed_is_replaced_and_no_image_is_wrong(served):
    expected = [served.draw(seed) for seed in range(3)]
    outcomes, killed = [], threading.Event()

    def ask(seed: int) -> None:
        drawn_since = 0
        while drawn_since < 3:
            after = killed.is_set()
            try:
                outcomes.append((seed, served.draw(seed)))
                drawn_since += after
            except openai.APIStatusError as error:
                assert error.status_code in (429, 503)
                time.sleep(0.2)

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask, seed) for seed in range(3)]
        time.sleep(2)
        (engine,) = served.engines()
        engine.kill()
        killed.set()
        for one in asking:
            one.result()
    for seed, image in outcomes:
        assert np.abs(pixels(image) - pixels(expected[seed])).max() <= 1
    assert requests.get(f"{served.root}/health").json() == {"status": "ok", "replicas": 1}


def test_a_second_server_on_the_same_port_says_so_in_one_line(served):
    command = [*LAVIT, "serve", "--port", str(served.port)]
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2
    assert second.stderr.startswith("lavit: error:") and "in use" in second.stderr


def test_a_server_that_is_stopped_ends_what_is_in_flight(served):
    with ThreadPoolExecutor(2) as pool:
        # as many as the queue takes, should none have reached the replica yet
        drawings = [pool.submit(served.client.images.generate, prompt="red apple", n=2) for _ in range(2)]
        time.sleep(0.3)
        served.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises((openai.APIStatusError, openai.APIConnectionError)):
            served.draw()
        assert all(len(drawing.result().data) == 2 for drawing in drawings)
    assert served.process.wait(60) == 0


def test_the_application_runs_from_a_config_file(tmp_path):
    config = yaml.safe_load((ROOT / "examples/serve_cluster.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    (application,) = config["applications"]
    application["args"] = {"max_batch_size": 2}
    engine, server = application["deployments"]
    engine["ray_actor_options"], server["num_replicas"] = {"num_cpus": 1}, 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "run", "config.yaml"]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        root, end = f"http://127.0.0.1:{config['http_options']['port']}", time.monotonic() + 240
        while time.monotonic() < end:
            try:
                if requests.get(f"{root}/health", timeout=5).status_code == 200:
                    break
            except (requests.ConnectionError, requests.Timeout):
                pass
            time.sleep(1)
        client = openai.OpenAI(base_url=f"{root}/v1", api_key="none", max_retries=0)
        assert client.images.generate(prompt="red apple").data[0].b64_json
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
