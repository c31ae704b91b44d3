"""Text to image as another commit of this repository does it: its code, its checkpoint, a process of its own."""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import psutil


ROOT = Path(__file__).parents[1]
# "The embedded checkpoint lavit-emoji", the first published state
FIRST_ISSUE = "c982cfb3fde76a4389681c3a235199dbdb647065"

PROGRAM = """
import json, sys, torch
from modeling_lavit import LavitPipeline
pipe = LavitPipeline.from_pretrained("checkpoints/lavit-emoji", dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
print("ready", pipe.config.default_num_inference_steps, flush=True)
for line in sys.stdin:
    lengths = []
    for prompts in json.loads(line):
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        lengths += pipe(prompts, generator=generators).visual_tokens.lengths.tolist()
    print("drawn", sum(lengths) / len(lengths), flush=True)
"""


class Skipped(Exception):
    """A row cannot be measured here; says why."""


class Painter:
    """A process that draws on request.

    Args:
        folder: a checkout with its embedded checkpoint.
    """

    def __init__(self, folder: Path):
        environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.steps = self._answer("ready")

    def draw(self, batches: list[list[str]]) -> str:
        """Draws batch after batch; says how long the images' sequences are."""
        self.process.stdin.write(json.dumps(batches) + "\n")
        self.process.stdin.flush()
        return f"{float(self._answer('drawn')):.0f} tokens an image, {self.steps} denoising steps"

    def cpu_seconds(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def _answer(self, mark: str) -> str:
        for line in self.process.stdout:
            if line.startswith(f"{mark} "):
                return line.split()[1]
        raise RuntimeError(f"the drawing process ended with {self.process.wait()}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def today_and_first(resources: ExitStack) -> tuple[Painter, Painter]:
    """Painters of this checkout and of the first published state; `resources` ends both and removes their files.

    Raises:
        Skipped: this is no git checkout, or a shallow one without that commit.
    """
    archive = subprocess.run(["git", "archive", FIRST_ISSUE], cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise Skipped(f"git history with {FIRST_ISSUE[:7]} is not here: {archive.stderr.decode().strip()}")
    folder = Path(resources.enter_context(tempfile.TemporaryDirectory()))
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    painters = Painter(ROOT), Painter(folder)
    for painter in painters:
        resources.callback(painter.close)
    return painters
