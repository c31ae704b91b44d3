"""Images with a name and a style, held in memory at the model's size."""

from pathlib import Path

import torch
from datasets import load_dataset
from torch.utils.data import default_collate

from modeling_lavit.processing import LavitImageProcessor
from modeling_lavit.training.emoji.recipe import NamedData


NO_STYLE = -100  # what losses leave out


class NamedImages(torch.utils.data.Dataset):
    """An image folder (`metadata.jsonl` with `name`, `style`, `split`) decoded once to uint8 tensors.

    Args:
        folder: image folder that `datasets` reads.
        image_size: side in pixels to which the image processor resizes.
        splits: values of the `split` column to keep.
        repeat: how often the images of a category come in an epoch (the `category` column); once if not named.

    Raises:
        OSError: there is no such folder.
        ValueError: a column is missing, or no image is of these splits.

    Items are `{"position": (), "images": (3, S, S) uint8, "name": (), "style": ()}`, `name` and `style` being
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
                f"there is no {folder}/metadata.jsonl: name other images as data.path, or make the emoji "
                "(python -m modeling_lavit.training.emoji.prepare_images)"
            )
        # no split by file names
        rows = load_dataset("imagefolder", data_files={"train": f"{folder}/**"}, split="train")
        needed = ["name", "style", "split", *(["category"] if repeat else [])]
        if missing := [column for column in needed if column not in rows.column_names]:
            raise ValueError(f"{folder}/metadata.jsonl has no column {missing[0]!r}; it has {rows.column_names}")
        self.names = sorted(set(rows["name"]))
        self.styles = sorted(set(rows["style"]))
        wanted = [i for i, split in enumerate(rows["split"]) if split in splits]
        if not wanted:
            raise ValueError(f"{folder} has no image whose split is one of {splits}")
        rows = rows.select(wanted)
        times = [repeat.get(category, 1) for category in rows["category"]] if repeat else [1] * len(rows)
        self.order = [i for i, number in enumerate(times) for _ in range(number)]
        processor = LavitImageProcessor(
            size={"height": image_size, "width": image_size}, do_normalize=False, do_rescale=False
        )
        name_index = {name: i for i, name in enumerate(self.names)}
        style_index = {style: i for i, style in enumerate(self.styles)}
        self.name = torch.tensor([name_index[name] for name in rows["name"]])
        self.style = torch.tensor([style_index[style] for style in rows["style"]])
        self.images = torch.cat(
            [
                processor(images=[row["image"]], return_tensors="pt")["pixel_values"].round().to(torch.uint8)
                for row in rows
            ]
        )

    def append(self, other: "NamedImages") -> None:
        """Adds the images of another folder whose names are known here, with the style [`NO_STYLE`]."""
        number_of = {name: i for i, name in enumerate(self.names)}
        numbers = torch.tensor([number_of.get(other.names[name], -1) for name in other.name.tolist()])
        known = numbers >= 0
        place = len(self.images) + known.cumsum(0) - 1
        self.order = [*self.order, *(int(place[i]) for i in other.order if known[i])]
        self.images = torch.cat([self.images, other.images[known]])
        self.name = torch.cat([self.name, numbers[known]])
        self.style = torch.cat([self.style, torch.full_like(numbers[known], NO_STYLE)])

    def of_no_style(self) -> list[tuple[torch.Tensor, str]]:
        """Image and name of all that [`append`] added."""
        return [(self.images[i], self.names[self.name[i]]) for i in (self.style == NO_STYLE).nonzero()[:, 0].tolist()]

    @staticmethod
    def collate(items: list[dict]) -> dict[str, torch.Tensor]:
        return default_collate(items)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        index = self.order[position]
        return {
            "position": torch.tensor(position),
            "images": self.images[index],
            "name": self.name[index],
            "style": self.style[index],
        }


def load_named(data: NamedData, image_size: int) -> tuple[NamedImages, NamedImages | None]:
    """What a stage is trained on, [`NamedData.more`] left out, and validated on."""
    dataset = NamedImages(data.path, image_size, tuple(data.splits), data.repeat)
    validation = NamedImages(data.path, image_size, (data.validation,)) if data.validation else None
    return dataset, validation


def load_more(data: NamedData, image_size: int, split: str = "train") -> NamedImages | None:
    """The images in further styles, of which only the names are learnt."""
    return NamedImages(data.more, image_size, (split,), data.repeat) if data.more else None
