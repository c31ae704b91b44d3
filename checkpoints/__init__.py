"""The checkpoints that come with the package: `LavitPipeline.from_pretrained(LAVIT_EMOJI)`."""

from pathlib import Path


LAVIT_EMOJI = Path(__file__).resolve().parent / "lavit-emoji"

__all__ = ["LAVIT_EMOJI"]
