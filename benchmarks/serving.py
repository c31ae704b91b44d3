"""A server under load: what its processes hold in memory, what it answers, and what a drawing takes.

    python -m benchmarks.serving load --clients 50 --seconds 300
    python -m benchmarks.serving drawings --repeats 5

Each starts `lavit serve` with the embedded checkpoint and stops it again.
"""

import argparse
import base64
import collections
import contextlib
import itertools
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import requests
import torch

from benchmarks.measure import Way
from modeling_lavit import LavitPipeline
from modeling_lavit.checkpoints import LAVIT_EMOJI


ROOT = Path(__file__).resolve().parents[1]
CAT = ROOT / "tests/fixtures/emoji/images/noto/cat-face.png"
PROMPTS = ("red apple", "cat face", "pizza in flat style", "sunflower", "a tiger in noto style", "cup with straw")
DRAWN_TOGETHER = 16


class Server:
    """One that runs: its address and its processes."""

    def __init__(self, url: str, pid: int):
        self.url, self.process = url, psutil.Process(pid)

    def memory(self) -> dict[str, float]:
        """Kind of process -> megabytes, shared pages divided among those who share them (PSS)."""
        held: dict[str, float] = collections.defaultdict(float)
        for process in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                held[self._kind(process)] += process.memory_full_info().pss / 2**20
        return dict(held)

    def _kind(self, process: psutil.Process) -> str:
        words = " ".join(process.cmdline())
        kinds = {"LavitEngine": "model", "LavitServer": "routes", "ProxyActor": "proxy", "Controller": "controller"}
        if process == self.process:
            return "lavit serve"
        return next((kind for word, kind in kinds.items() if word in words), "Ray's own")

    def ask(self, method: str, path: str, **options) -> requests.Response:
        return requests.request(method, self.url + path, timeout=300, **options)

    def draw(self, seed: int) -> None:
        answer = self.ask("POST", "/v1/images/generations", json={"prompt": PROMPTS[seed % 6], "seed": seed})
        answer.raise_for_status()


@contextlib.contextmanager
def started_server() -> Iterator[Server]:
    """`lavit serve` until it is no longer needed."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    command = [sys.executable, str(ROOT / "modeling_lavit/bin/lavit"), "serve", "--port", str(port)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if not any('"modalities"' in line for line in process.stdout):
            raise RuntimeError("the server ended before it was ready")
        yield Server(f"http://127.0.0.1:{port}", process.pid)
    finally:
        process.terminate()
        process.wait(90)


class Load:
    """Clients that ask for everything, four of ten times for what cannot be.

    Args:
        server: that is asked.
        clients: that ask at once, each again when it was answered.
    """

    def __init__(self, server: Server, clients: int):
        self.server, self.clients = server, clients
        self.statuses: dict[str, collections.Counter] = {
            kind: collections.Counter() for kind in ("valid", "malformed")
        }
        self.lock, self.ends = threading.Lock(), 0.0
        cat = CAT.read_bytes()
        self.cat = cat
        self.shown = {"url": "data:image/png;base64," + base64.b64encode(cat).decode()}

    def run(self, seconds: float, every: float) -> None:
        """Prints what the processes hold, at the start and `every` so many seconds, and then what was answered."""
        kinds = list(self.server.memory())
        print("| seconds |", " | ".join(kinds), "| all, MB | answered |\n|" + "---|" * (len(kinds) + 3))
        start = time.monotonic()
        self.ends = start + seconds
        with ThreadPoolExecutor(self.clients) as pool:
            asking = [pool.submit(self._client, number) for number in range(self.clients)]
            for tick in itertools.count():
                time.sleep(max(0.0, min(start + tick * every, self.ends) - time.monotonic()))
                held = self.server.memory()
                answered = sum(sum(counts.values()) for counts in self.statuses.values())
                row = [f"{held.get(kind, 0):.0f}" for kind in kinds]
                row = [f"{time.monotonic() - start:.0f}", *row, f"{sum(held.values()):.0f}", str(answered)]
                print("|", " | ".join(row), "|", flush=True)
                if time.monotonic() >= self.ends:
                    break
            for one in asking:
                one.result()
        for kind, counts in self.statuses.items():
            print(f"{kind}: " + ", ".join(f"{count} with {status}" for status, count in sorted(counts.items())))

    def _client(self, number: int) -> None:
        chooser = random.Random(number)
        while time.monotonic() < self.ends:
            kind = "malformed" if chooser.random() < 0.4 else "valid"
            method, path, options = chooser.choice(self.malformed() if kind == "malformed" else self.valid(chooser))
            try:
                status = str(self.server.ask(method, path, **options).status_code)
            except requests.RequestException as error:
                status = type(error).__name__
            with self.lock:
                self.statuses[kind][status] += 1

    def _chat(self, text: str | None = None, **options) -> tuple[str, str, dict]:
        parts = [{"type": "image_url", "image_url": self.shown}] + [{"type": "text", "text": text}] * bool(text)
        body = {"model": LAVIT_EMOJI.name, "messages": [{"role": "user", "content": parts}], **options}
        return "POST", "/v1/chat/completions", {"json": body}

    def valid(self, chooser: random.Random) -> list[tuple[str, str, dict]]:
        """Requests that are to be answered with 200."""
        prompt, seed = chooser.choice(PROMPTS), chooser.randrange(2**32)
        drawing = {"prompt": prompt, "seed": seed}
        edit = {"files": {"image": ("cat.png", self.cat)}, "data": {"prompt": "in flat style", "seed": str(seed)}}
        return [
            ("POST", "/v1/images/generations", {"json": drawing}),
            ("POST", "/v1/images/generations", {"json": drawing | {"n": 2, "output_format": "jpeg"}}),
            ("POST", "/v1/images/edits", edit),
            self._chat(),
            self._chat("which style is this?"),
            self._chat("what is it?", stream=True),
            self._chat("what is it?", temperature=1.0, n=2, seed=seed),
            self._chat("in flat style", modalities=["image"], seed=seed),
        ]

    def malformed(self) -> list[tuple[str, str, dict]]:
        """Requests that are to be answered with a status from 400 to 499."""
        broken = {"type": "image_url", "image_url": {"url": self.shown["url"][:200]}}
        chat = {"model": LAVIT_EMOJI.name, "messages": [{"role": "user", "content": [broken]}]}
        return [
            ("POST", "/v1/images/generations", {"data": "{", "headers": {"Content-Type": "application/json"}}),
            ("POST", "/v1/images/generations", {"json": {"prompt": "cat", "colour": "red"}}),
            ("POST", "/v1/images/generations", {"json": {"prompt": "cat", "size": "1x1"}}),
            ("POST", "/v1/images/edits", {"data": {"prompt": "no image"}}),
            ("POST", "/v1/chat/completions", {"json": chat}),
            ("POST", "/v1/chat/completions", {"json": chat | {"model": "other"}}),
            self._chat(max_tokens=10**6),
            ("GET", "/v1/nothing", {}),
        ]


def compare_drawings(server: Server, repeats: int) -> None:
    """Prints what a drawing takes by the server and by the library, alone and with others."""
    pipe = LavitPipeline.from_pretrained(LAVIT_EMOJI)
    pipe.set_progress_bar_config(disable=True)
    seeds = range(DRAWN_TOGETHER)
    prompts = [PROMPTS[seed % 6] for seed in seeds]

    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def one_by_one(**options) -> None:
        for seed, prompt in zip(seeds, prompts, strict=True):
            pipe(prompt, generator=generator(seed), **options)

    pool = ThreadPoolExecutor(DRAWN_TOGETHER)
    ways = [
        Way("the server, one drawing", lambda: server.draw(0)),
        Way("the library, one drawing", lambda: pipe(prompts[0], generator=generator(0)) and None),
        Way("the server, 16 at once", lambda: collections.deque(pool.map(server.draw, seeds), maxlen=0) and None),
        Way("the server, 16 one after the other", lambda: [server.draw(seed) for seed in seeds] and None),
        Way("the library, a batch of 16", lambda: pipe(prompts, generator=[generator(s) for s in seeds]) and None),
        Way("the library, 16 one by one", one_by_one),
    ]
    for way in ways:
        way.run()
    for _ in range(repeats):
        for way in ways:
            way.time_once()
    for way in ways:
        print(
            f"{way.name}: {way.median:.2f} s ({min(way.seconds):.2f} to {max(way.seconds):.2f}), median of {repeats}"
        )
    for name, numerator, denominator in (("latency, to the library", 0, 1), ("throughput, 16 at once", 3, 2)):
        pairs = zip(ways[numerator].seconds, ways[denominator].seconds, strict=True)
        ratios = [above / below for above, below in pairs]
        print(f"{name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), median of {repeats}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    load = commands.add_parser("load")
    load.add_argument("--clients", type=int, default=50)
    load.add_argument("--seconds", type=float, default=300)
    load.add_argument("--every", type=float, default=50)
    drawings = commands.add_parser("drawings")
    drawings.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with started_server() as server:
        if options.command == "load":
            Load(server, options.clients).run(options.seconds, options.every)
        else:
            compare_drawings(server, options.repeats)


if __name__ == "__main__":
    main()
