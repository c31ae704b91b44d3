"""All that LaVIT does, on small images, for `make demo`: `python examples/demo.py [checkpoint] [output folder]`."""

import sys
import time
from pathlib import Path

import torch
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from modeling_lavit import LavitPipeline
from modeling_lavit.checkpoints import LAVIT_EMOJI
from modeling_lavit.show_lavit import enlarge, show_kept_patches


PROMPTS = ("red apple", "sunflower in noto style", "pizza in fluent style", "tiger face in twemoji style")
IMAGE = Path(__file__).resolve().parent.parent / "tests/fixtures/emoji/images/noto/cat-face.png"
RESTYLE = "in flat style"
QUESTIONS = ("what is it?", "which style is this?")

checkpoint = sys.argv[1] if len(sys.argv) > 1 else LAVIT_EMOJI
outputs = Path(sys.argv[2] if len(sys.argv) > 2 else "outputs")
outputs.mkdir(exist_ok=True)
written = []

disable_progress_bar()
device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = LavitPipeline.from_pretrained(checkpoint, dtype=torch.float32).to(device)
processor, model = pipe.processor, pipe.model
factor = max(1, 384 // max(pipe.default_size))


def seed(value: int) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def write(image: Image.Image, name: str, factor: int = factor):
    path = outputs / f"{name}.png"
    enlarge(image, factor).save(path)
    written.append(path)


print("\n1. Text to image")
seconds = []
for i, prompt in enumerate(PROMPTS):
    start = time.perf_counter()
    result = pipe(prompt, generator=seed(i))
    seconds.append(time.perf_counter() - start)
    write(result.images[0], f"draw-{prompt.replace(' ', '-')}")
    print(f"   {prompt!r}: {len(result.visual_tokens.codes)} visual tokens, {seconds[-1]:.2f} s")

print(f"\n2. Image to text: {IMAGE.name}")
image = Image.open(IMAGE).convert("RGB")
inputs = processor(images=image)
ids = model.generate(**inputs, generation_preset="caption")
print(f"   caption: {processor.post_process_caption(ids, input_ids=inputs.input_ids)[0]}")
for question in QUESTIONS:
    inputs = processor(images=image, text=f"<image>Question: {question} Answer:")
    ids = model.generate(**inputs, generation_preset="answer")
    print(f"   {question} {processor.post_process_answer(ids, input_ids=inputs.input_ids)[0]}")

print(f"\n3. Image and text to image: {IMAGE.name} + {RESTYLE!r}")
write(pipe([image, RESTYLE], generator=seed(0)).images[0], f"{IMAGE.stem}-{RESTYLE.replace(' ', '-')}")

print("\n4. Visual tokens: the patches that are kept, and the image drawn again from their codes alone")
tokenizer = model.model.visual_tokenizer
pixel_values = processor.image_processor(image, return_tensors="pt").pixel_values
tokens = tokenizer.tokenize(pixel_values.to(tokenizer.device))
print(f"   {len(tokens.codes)} of {tokens.keep_mask.shape[1]} patches kept")
write(show_kept_patches(image, tokens.keep_mask[0]), f"{IMAGE.stem}-kept-patches", 1)
write(pipe(visual_tokens=tokens, generator=seed(0)).images[0], f"{IMAGE.stem}-reconstructed")

print(f"\nAn image from text took {sorted(seconds)[len(seconds) // 2]:.2f} s on {device} (median of {len(seconds)}).")
print("Written:", *written, sep="\n")
