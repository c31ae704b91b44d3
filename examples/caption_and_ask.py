"""Describe images, and answer a question about each: `python examples/caption_and_ask.py IMG… [--model DIR]`."""

import argparse

from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_lavit  # noqa: F401  registers the model with the Auto classes
from modeling_lavit.checkpoints import LAVIT_EMOJI


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("images", nargs="+")
parser.add_argument("--model", default=LAVIT_EMOJI)
options = parser.parse_args()

processor = AutoProcessor.from_pretrained(options.model)
model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="float32").eval()

# All images in one batch, first for captions, then for answers.
inputs = processor(images=options.images)
ids = model.generate(**inputs, generation_preset="caption")
captions = processor.post_process_caption(ids, input_ids=inputs.input_ids)

question = "<image>Question: which style is this? Answer:"
inputs = processor(images=options.images, text=[question] * len(options.images))
ids = model.generate(**inputs, generation_preset="answer")
answers = processor.post_process_answer(ids, input_ids=inputs.input_ids)

for image, caption, answer in zip(options.images, captions, answers, strict=True):
    print(f"{image}: {caption}; style: {answer}")
