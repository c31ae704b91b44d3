"""How near solvers with few steps come to a result of many, and what an independent classifier says of their images.

    python -m benchmarks.solvers --classifier DIR [--model DIR] [--data DIR] [--count 24] [--steps 5 10] [--intervals]

Decodes the visual tokens of the first images of an image folder (with `metadata.jsonl`) from the same noise by every
solver; with `--intervals` also with guidance in the first or last half of the steps only. The distance is the root
mean square difference of pixels in 0..1; the error is that to the image which was tokenized.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from PIL import Image

from modeling_lavit import LavitPipeline
from modeling_lavit.checkpoints import LAVIT_EMOJI
from modeling_lavit.evaluation.emoji.classifier import Classifier


SOLVERS = {
    "DDIM": DDIMScheduler,
    "DPM-Solver++ 2M": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
}
WHOLE = {"": (0.0, 1.0)}
HALVES = {", guidance in the first half": (0.0, 0.5), ", guidance in the last half": (0.5, 1.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(LAVIT_EMOJI))
    parser.add_argument("--classifier", required=True, help="folder of the classifier")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[1] / "tests/fixtures/emoji")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--reference-steps", type=int, default=200, help="of DDIM, what all are compared with")
    parser.add_argument("--intervals", action="store_true", help="also guidance in half of the steps")
    options = parser.parse_args()

    pipe = LavitPipeline.from_pretrained(options.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    classifier = Classifier.load(options.classifier)
    rows = [json.loads(line) for line in (options.data / "metadata.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["name"] in classifier.names][: options.count]
    images = [Image.open(options.data / row["file_name"]) for row in rows]
    pixel_values = pipe.processor.image_processor(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        tokens = pipe.model.get_image_tokens(pixel_values)
    originals = pipe.image_processor.preprocess(images, *pipe.default_size) / 2 + 0.5
    noise = pipe.prepare_latents(len(rows), *pipe.default_size, torch.Generator().manual_seed(0))
    config = pipe.scheduler.config

    def decode(solver: type, steps: int, interval: tuple[float, float]) -> tuple[torch.Tensor, float]:
        pipe.scheduler = solver.from_config(config)
        started = time.perf_counter()
        images = pipe(
            visual_tokens=tokens,
            latents=noise,
            num_inference_steps=steps,
            decoder_guidance_interval=interval,
            output_type="pt",
        ).images
        return images, time.perf_counter() - started

    reference, seconds = decode(DDIMScheduler, options.reference_steps, (0.0, 1.0))
    names = [row["name"] for row in rows]
    print(f"{len(rows)} images, decoder guidance {pipe.defaults.decoder_guidance_scale}\n")
    print(f"| solver | steps | distance to {options.reference_steps} | error | name top-5 | top-1 | seconds |")
    print("|---|---|---|---|---|---|---|")

    def report(name: str, steps: int, images: torch.Tensor, seconds: float) -> None:
        distance, error = (float((images - other).pow(2).mean().sqrt()) for other in (reference, originals))
        scores = classifier.score(images, names)
        shown = f"{scores['name_top5']:.2f} | {scores['name_top1']:.2f}"
        print(f"| {name} | {steps} | {distance:.4f} | {error:.4f} | {shown} | {seconds:.2f} |", flush=True)

    report("DDIM", options.reference_steps, reference, seconds)
    for name, solver in SOLVERS.items():
        for steps in options.steps:
            for label, interval in (WHOLE | HALVES if options.intervals else WHOLE).items():
                report(name + label, steps, *decode(solver, steps, interval))


if __name__ == "__main__":
    main()
