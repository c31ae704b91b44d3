"""Greedy captions of 32 images by vLLM and by one batch of the library, in one process and in turn.

    .venv-vllm/bin/python -m benchmarks.vllm_captions [--repeats 9] [--compile]

From images to ids, in single precision, without vLLM's caches. `make test-vllm` installs the environment. Threads are
those of OMP_NUM_THREADS.
"""

import argparse
import os

import torch
from PIL import Image

from benchmarks.measure import Comparison, Way
from modeling_lavit import LavitForConditionalGeneration, LavitProcessor
from modeling_lavit.checkpoints import LAVIT_EMOJI


COUNT, LONGEST = 32, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the language model")
    options = parser.parse_args()
    # the engine in this process: the same threads for both
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, SamplingParams

    sheet = Image.open(LAVIT_EMOJI / "samples.png").convert("RGB")
    corners = [(10 + 106 * column, 56 + 353 * row) for row in range(4) for column in range(12)]
    images = [sheet.crop((x, y, x + 96, y + 96)) for x, y in corners[:COUNT]]
    prompts = [{"prompt": "<image>", "multi_modal_data": {"image": image}} for image in images]

    model = LavitForConditionalGeneration.from_pretrained(LAVIT_EMOJI)
    processor = LavitProcessor.from_pretrained(LAVIT_EMOJI)
    llm = LLM(
        str(LAVIT_EMOJI),
        dtype="float32",
        enforce_eager=not options.compile,
        mm_processor_cache_gb=0,
        enable_prefix_caching=False,
    )
    greedy = SamplingParams(temperature=0, max_tokens=LONGEST)

    def by_library() -> None:
        model.generate(**processor(images=images), num_beams=1, do_sample=False, max_new_tokens=LONGEST)

    measured = Comparison(
        ours=Way("vLLM", lambda: llm.generate(prompts, greedy, use_tqdm=False), work=COUNT),
        other=Way("library", by_library, work=COUNT),
    )
    measured.measure(options.repeats)
    for way in (measured.ours, measured.other):
        print(f"{way.name}: {way.rate:.1f} captions a second, median of {options.repeats}")
    low, high = measured.spread
    print(f"ratio of throughput: {measured.ratio:.2f} ({low:.2f} to {high:.2f}), {torch.get_num_threads()} thread(s)")


if __name__ == "__main__":
    main()
