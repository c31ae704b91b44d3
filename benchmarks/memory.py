"""Peak memory of the stages of drawing and reading, each in a process of its own (Linux: it is read from /proc)."""

import os
import subprocess
import sys
from pathlib import Path


STAGES = {
    "import": "",
    "load the language model": """
model = LavitForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
""",
    "read an image": """
model = LavitForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).eval()
size = model.config.visual_config.image_size
model.get_image_tokens(torch.randn(1, 3, size, size))
""",
    "draw visual tokens": """
pipe = LavitPipeline.from_pretrained(checkpoint, dtype=dtype)
pipe.set_progress_bar_config(disable=True)
pipe.generate_visual_tokens("red apple")
""",
    "draw an image": """
pipe = LavitPipeline.from_pretrained(checkpoint, dtype=dtype)
pipe.set_progress_bar_config(disable=True)
pipe("red apple")
""",
}
PROGRAM = """
import sys, torch
from modeling_lavit import LavitForConditionalGeneration, LavitPipeline
checkpoint, dtype = sys.argv[1], getattr(torch, sys.argv[2])
torch.set_grad_enabled(False)
{stage}
with open("/proc/self/status") as status:
    print(next(line for line in status if line.startswith("VmHWM")).split()[1])
"""


def peak_memory(checkpoint: str, dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> dict[str, list[float]]:
    """Stage -> megabytes resident at the most, for each dtype."""
    peaks: dict[str, list[float]] = {}
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for stage, code in STAGES.items():
        for dtype in dtypes:
            command = [sys.executable, "-c", PROGRAM.format(stage=code), checkpoint, dtype]
            done = subprocess.run(
                command,
                cwd=Path(__file__).parents[1],
                env=os.environ | quiet,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            peaks.setdefault(stage, []).append(int(done.stdout.split()[-1]) / 1024)
    return peaks
