"""Pictures with a name and a style: loading, held in memory at the model's size, and batch augmentation."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import load_dataset
from torch.utils.data import default_collate

from ..configuration_lavit import IMAGE_MEAN, IMAGE_STD
from ..processing import LavitImageProcessor
from .sources import load_source


def result_of(stage: str, folder: str, name: str) -> Path:
    """The file or folder `name` in the result of an earlier stage.

    Raises:
        OSError: it is not there.
    """
    path = Path(folder) / name
    if not path.exists():
        raise OSError(f"there is no {path}: train the stage {stage} first (lavit train {stage}), or name its result")
    return path


class PictureDataset(torch.utils.data.Dataset):
    """An image folder (`metadata.jsonl` with `name`, `style`, `split`) decoded once to uint8 tensors.

    Args:
        folder: image folder that `datasets` reads.
        image_size: side in pixels to which the image processor resizes.
        splits: values of the `split` column to keep.
        repeat: how often the pictures of a category come in an epoch (the `category` column); once if not named.

    Raises:
        OSError: there is no such folder.
        ValueError: no picture is of these splits.

    Items are `{"position": (), "pictures": (3, S, S) uint8, "name": (), "style": ()}`, `name` and `style` being
    indices into `names` and `styles`, which list those of the whole folder whatever the split.
    """

    def __init__(
        self,
        folder: str,
        image_size: int,
        splits: tuple[str, ...] = ("train",),
        repeat: dict[str, int] | None = None,
    ):
        if not (Path(folder) / "metadata.jsonl").is_file():
            raise OSError(
                f"there is no {folder}/metadata.jsonl: make it (python -m modeling_lavit.training.emoji), or "
                "name other pictures in the data section"
            )
        rows = load_dataset(
            "imagefolder", data_files={"train": f"{folder}/**"}, split="train"
        )  # no split by file names
        self.names = sorted(set(rows["name"]))
        self.styles = sorted(set(rows["style"]))
        wanted = [i for i, split in enumerate(rows["split"]) if split in splits]
        if not wanted:
            raise ValueError(f"{folder} has no picture whose split is one of {splits}")
        rows = rows.select(wanted)
        repeat = repeat or {}
        self.order = [i for i, category in enumerate(rows["category"]) for _ in range(repeat.get(category, 1))]
        processor = LavitImageProcessor(
            size={"height": image_size, "width": image_size}, do_normalize=False, do_rescale=False
        )
        name_index = {name: i for i, name in enumerate(self.names)}
        style_index = {style: i for i, style in enumerate(self.styles)}
        self.name = torch.tensor([name_index[name] for name in rows["name"]])
        self.style = torch.tensor([style_index[style] for style in rows["style"]])
        self.pictures = torch.cat(
            [
                processor(images=[row["image"]], return_tensors="pt")["pixel_values"].round().to(torch.uint8)
                for row in rows
            ]
        )

    def spread(self, count: int) -> torch.Tensor:
        """Indices of about `count` pictures, evenly over all."""
        return torch.arange(0, len(self.name), max(1, len(self.name) // count))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        index = self.order[position]
        return {
            "position": torch.tensor(position),
            "pictures": self.pictures[index],
            "name": self.name[index],
            "style": self.style[index],
        }


class SampleNoise:
    """Random numbers of a batch that depend on seed, step and sample alone: they are the same on one rank or many, in
    an uncut run and in a resumed one.

    Args:
        positions: (B,) of the samples in the data set's order.
        step: of the optimizer.
        seed: of the run.
    """

    def __init__(self, positions: torch.Tensor, step: int, seed: int = 0):
        self.positions, self.step, self.seed = positions, step, seed
        self.device = positions.device
        self.generators = [
            torch.Generator().manual_seed(random.Random(f"{seed} {step} {position}").getrandbits(62))
            for position in positions.tolist()
        ]

    def of(self, samples: torch.Tensor) -> "SampleNoise":
        """The noise of some samples, a mask (B,) or indices (P,), from its start."""
        return SampleNoise(self.positions[samples], self.step, self.seed)

    def uniform(self, *shape: int) -> torch.Tensor:
        """(B, *shape) in [0, 1)."""
        return torch.stack([torch.rand(shape, generator=generator) for generator in self.generators]).to(self.device)

    def normal(self, *shape: int) -> torch.Tensor:
        """(B, *shape), standard normal."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators]).to(self.device)


def augment(
    pictures: torch.Tensor,
    noise: SampleNoise,
    share: float = 0.9,
    scale: float = 0.15,
    shift: float = 0.1,
    rotation: float = 0.15,
    tint: float = 0.1,
    flip: float = 0.3,
) -> torch.Tensor:
    """Random affine maps on a white ground, mirror images and colour casts.

    Args:
        pictures: (B, 3, S, S) in [0, 1].
        noise: of the batch, which decides everything.
        share: probability that a picture is changed at all.
        scale, shift, rotation, tint: largest relative zoom, shift (share of the side), rotation (radians), gain.
        flip: probability of a mirror image.

    Returns:
        (B, 3, S, S) in [0, 1].
    """
    if not share:
        return pictures
    batch = len(pictures)
    uniform = noise.uniform(10)
    centred = uniform * 2 - 1
    active = (uniform[:, 0] < share).float()
    zoom = 1 + scale * centred[:, 1:3] * active[:, None]
    mirror = 1 - 2 * ((uniform[:, 3] < flip).float() * active)
    angle = rotation * centred[:, 4] * active
    theta = torch.zeros(batch, 2, 3, device=pictures.device)
    theta[:, 0, 0] = angle.cos() * zoom[:, 0] * mirror
    theta[:, 0, 1] = -angle.sin() * zoom[:, 1]
    theta[:, 1, 0] = angle.sin() * zoom[:, 0] * mirror
    theta[:, 1, 1] = angle.cos() * zoom[:, 1]
    theta[:, :, 2] = 2 * shift * centred[:, 5:7] * active[:, None]
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - pictures, grid, align_corners=False)
    ink = 1 - moved
    gain = 1 + tint * centred[:, 7:, None, None] * active[:, None, None, None]
    return (1 - ink * gain).clamp(0, 1)


def beta_half(uniform: torch.Tensor) -> torch.Tensor:
    """Numbers uniform in [0, 1) to numbers by Beta(1/2, 1/2): how much of the first of two pictures a blend has."""
    return (torch.pi / 2 * uniform).sin().square()


def augment_halves(
    pictures: torch.Tensor, noise: SampleNoise, augmentation: dict, close_augmentation: dict | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augments half of the pictures, each at random, closely: how a thing is drawn is told by colours, outlines and
    margins, which strong maps and casts take away, while what it is should be told in spite of them.

    Args:
        pictures: (B, 3, S, S) in [0, 1].
        noise: of the batch, which decides everything.
        augmentation, close_augmentation: arguments of [`augment`]; without the second all pictures get the first, and
            count as close.

    Returns:
        Pictures (B, 3, S, S) in [0, 1], and which of them are close, (B,) bool.
    """
    if close_augmentation is None:
        close = torch.ones(len(pictures), dtype=torch.bool, device=pictures.device)
        return augment(pictures, noise, **augmentation), close
    close = noise.uniform(1)[:, 0] < 0.5
    far = augment(pictures, noise, **augmentation)
    return torch.where(close[:, None, None, None], augment(pictures, noise, **close_augmentation), far), close


def normalize_pictures(pictures: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S) in [0, 1] to the encoder's `pixel_values`, as the image processor does it."""
    mean, std = (pictures.new_tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    return (pictures - mean) / std


def patchify(pictures: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, 3, S, S) to (B, N, 3·p²), patches in row-major order."""
    return F.pixel_unshuffle(pictures, patch_size).flatten(2).transpose(1, 2)


def collate_pictures(items: list[dict]) -> dict[str, torch.Tensor]:
    """Batches what the stages of pictures alone take: positions, pictures, names and styles where there are any."""
    keys = [key for key in ("position", "pictures", "name", "style") if key in items[0]]
    return default_collate([{key: item[key] for key in keys} for item in items])


def load_pictures(data: dict, image_size: int):
    """The pictures of a recipe's `data` section: a [`PictureDataset`] of its `folder`, or what [`load_source`] makes
    of its `source`."""
    if "source" in data:
        return load_source(data, image_size)
    return PictureDataset(data["folder"], image_size, tuple(data["splits"]), data["repeat"])
