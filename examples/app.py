"""The Space: `python examples/app.py [checkpoint]`, or `lavit app`. Needs gradio."""

import sys

import torch

from modeling_lavit import LavitPipeline
from modeling_lavit.app_lavit import build_app
from modeling_lavit.checkpoints import LAVIT_EMOJI


checkpoint = sys.argv[1] if len(sys.argv) > 1 else LAVIT_EMOJI
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = LavitPipeline.from_pretrained(checkpoint, dtype=dtype).to(device)

app = build_app(pipe)

if __name__ == "__main__":
    app.launch()
