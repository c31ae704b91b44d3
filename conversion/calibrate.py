"""Whether a converted checkpoint's merger may compute kept patches alone: measured on images, not assumed."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from modeling_lavit.configuration_lavit import LavitVisualTokenizerConfig
from modeling_lavit.modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from modeling_lavit.processing import LavitImageProcessor
from modeling_lavit.processing.image_loading_lavit import load_image


@torch.no_grad()
def changed_codes(tokenizer: LavitVisualTokenizer, pixel_values: torch.Tensor, **selection) -> tuple[int, int]:
    """How many codes of images change where the merger computes kept patches alone, and how many codes there are.

    The official merger leaks a little attention to masked patches (`attention_epsilon`), so that every row has to be
    computed; with `kept_only` the leak is left out of the rows of dropped patches.

    Args:
        tokenizer: its `config.kept_only` is as it was afterwards.
        pixel_values: (B, 3, S, S), normalized.
        selection: see `LavitVisualTokenizer.select`.

    Raises:
        ValueError: the merger leaks nothing: kept patches alone are exact.
    """
    config = tokenizer.config
    if not config.attention_epsilon:
        raise ValueError("the checkpoint's attention_epsilon is 0: kept tokens alone are exact, nothing can change")
    before, codes = config.kept_only, []
    try:
        for config.kept_only in (False, True):
            codes.append(tokenizer.tokenize(pixel_values, **selection).codes)
    finally:
        config.kept_only = before
    return int((codes[0] != codes[1]).sum()), len(codes[0])


def calibrate(
    folder: Path,
    visual_config: LavitVisualTokenizerConfig,
    images: list[Path],
    report: Callable[[str], None] = print,
    batch_size: int = 8,
) -> bool:
    """Sets `kept_only` in the configuration of a converted checkpoint where no code of the images changes by it.

    Args:
        folder: of the checkpoint, `config.json` and weights.
        visual_config: of its visual tokenizer.
        images: files; their patches are selected as by default, in float32.
        report: called with a line about the result.
        batch_size: images that go through the tokenizer at once.

    Returns:
        Whether it is set.
    """
    if not visual_config.attention_epsilon:
        report("calibration: nothing to choose, the merger leaks no attention")
        return False
    tokenizer = LavitVisualTokenizer.from_pretrained(
        folder, config=visual_config, key_mapping={r"^model\.visual_tokenizer\.": ""}, dtype=torch.float32
    ).eval()
    processor = LavitImageProcessor.from_pretrained(folder)
    changed = total = 0
    for start in range(0, len(images), batch_size):
        batch = [load_image(path) for path in images[start : start + batch_size]]
        counts = changed_codes(tokenizer, processor(images=batch, return_tensors="pt").pixel_values)
        changed, total = changed + counts[0], total + counts[1]
    report(
        f"calibration: {changed} of {total} codes of {len(images)} images change where the merger computes kept "
        f"patches alone; kept_only is {'left off' if changed else 'set'}"
    )
    if changed:
        return False
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["visual_config"]["kept_only"] = True
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return True
