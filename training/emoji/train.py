"""Runs a stage of the embedded checkpoint's training: `python -m modeling_lavit.training.emoji.train RECIPE
[KEY=VALUE …]`.

The core's `lavit train` with further stages and with the recipes of this folder.
"""

import sys
from pathlib import Path

from modeling_lavit.command_line.common import one_line
from modeling_lavit.training import run
from modeling_lavit.training.emoji.pretrain_encoder import EncoderStage
from modeling_lavit.training.emoji.train_classifier import ClassifierStage
from modeling_lavit.training.emoji.train_language_model import EmojiLanguageModelStage
from modeling_lavit.training.emoji.train_pixel_decoder import EmojiPixelDecoderStage
from modeling_lavit.training.emoji.train_visual_tokenizer import EmojiTokenizerStage


STAGES = run.STAGES | {
    "classifier": ClassifierStage(),
    "encoder": EncoderStage(),
    "emoji-tokenizer": EmojiTokenizerStage(),
    "emoji-language-model": EmojiLanguageModelStage(),
    "emoji-pixel-decoder": EmojiPixelDecoderStage(),
}
RECIPES = Path(__file__).parent / "recipes"


def main(arguments: list[str] | None = None) -> None:
    run.main(arguments, STAGES, (RECIPES, run.RECIPES))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {one_line(str(error))}")
