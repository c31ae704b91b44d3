"""Draw from an image and text: `python examples/image_and_text.py IMG "in flat style" [checkpoint]`."""

import sys

import torch
from PIL import Image

from modeling_lavit import LavitPipeline
from modeling_lavit.checkpoints import LAVIT_EMOJI


image, text = Image.open(sys.argv[1]), sys.argv[2]
pipe = LavitPipeline.from_pretrained(sys.argv[3] if len(sys.argv) > 3 else LAVIT_EMOJI, dtype=torch.float32)

# One prompt is a list of images and strings; a batch is a list of such lists.
pipe([image, text], generator=torch.Generator().manual_seed(0)).images[0].save("image-and-text.png")

# What the visual tokens of the image alone hold.
again = pipe.reconstruct(image, generator=torch.Generator().manual_seed(0))
again.images[0].save("reconstructed.png")
print(f"{len(again.visual_tokens.codes)} visual tokens")
