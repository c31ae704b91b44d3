"""Draw images from text, in one call and in two stages: `python examples/draw.py [checkpoint]`."""

import sys

import torch

from modeling_lavit import LavitPipeline
from modeling_lavit.checkpoints import LAVIT_EMOJI


pipe = LavitPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else LAVIT_EMOJI, dtype=torch.float32)

# Two images of each prompt. A generator for each makes every image repeatable by itself.
prompts = ["red apple", "sunflower in noto style"]
generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
images = pipe(prompts, num_images_per_prompt=2, generator=generators).images
for i, image in enumerate(images):
    image.save(f"draw-{i}.png")

# The language model writes visual tokens; decoding them can wait for another day or another machine.
tokens = pipe.generate_visual_tokens("pizza", generator=torch.Generator().manual_seed(0))
print(f"pizza in {len(tokens.codes)} visual tokens")
pipe(visual_tokens=tokens, generator=torch.Generator().manual_seed(0)).images[0].save("draw-pizza.png")
