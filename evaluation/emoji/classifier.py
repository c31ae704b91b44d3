"""An independent classifier of names and styles, which evaluates drawn images.

The one that evaluates is trained on *all* images of the used styles, held-out ones included, takes part in no loss of
the model, and is not shipped with it: its scores are not circular.
"""

import json
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

from modeling_lavit.encoder_lavit import LavitResidualBlock


class Classifier(nn.Module):
    """Images (B, 3, S, S) in [0, 1] to name logits (B, L) and style logits (B, T)."""

    widths = (32, 64, 128, 192)

    def __init__(
        self,
        names: list[str],
        styles: list[str],
        image_size: int,
        strides: list[int] = (2, 2, 2, 2),
        width: int = 1,
    ):
        super().__init__()
        self.names, self.styles, self.image_size = names, styles, image_size
        self.strides, self.width = list(strides), width
        widths = [3, *(width * channels for channels in self.widths[: len(strides)])]
        self.body = nn.Sequential(
            *(LavitResidualBlock(widths[i], widths[i + 1], stride) for i, stride in enumerate(strides))
        )
        self.name_head = nn.Linear(widths[-1], len(names))
        self.style_head = nn.Linear(widths[-1], len(styles))

    def feature_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of the residual blocks, (B, channels, side, side)."""
        maps, hidden = [], images * 2 - 1
        for block in self.body:
            hidden = block(hidden)
            maps.append(hidden)
        return maps

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if tuple(images.shape[1:]) != (3, self.image_size, self.image_size):
            size = self.image_size
            raise ValueError(f"the classifier takes (batch, 3, {size}, {size}) in [0, 1], got {tuple(images.shape)}")
        return self.classify(self.feature_maps(images)[-1])

    def classify(self, last_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The last feature map to name logits and style logits."""
        pooled = last_map.mean((2, 3))
        return self.name_head(pooled), self.style_head(pooled)

    def style_map(self, last_map: torch.Tensor) -> torch.Tensor:
        """The last feature map (B, C, h, w) to style logits of every position, (B, T, h, w); their mean over positions
        is what [`classify`] gives."""
        return torch.einsum("bchw,tc->bthw", last_map, self.style_head.weight) + self.style_head.bias[:, None, None]

    @torch.no_grad()
    def score(self, images: torch.Tensor, names: list[str], styles: list[str] | None = None) -> dict[str, float]:
        """Shares of images whose name is first, and among the first five, and whose style is right."""
        self.eval()
        name_logits, style_logits = self(images.to(self.name_head.weight.device))
        wanted = torch.tensor([self.names.index(name) for name in names])
        top5 = name_logits.topk(5).indices.cpu()
        scores = {
            "name_top1": float((top5[:, 0] == wanted).float().mean()),
            "name_top5": float((top5 == wanted[:, None]).any(1).float().mean()),
        }
        if styles is not None:
            wanted = torch.tensor([self.styles.index(style) for style in styles])
            scores["style"] = float((style_logits.argmax(-1).cpu() == wanted).float().mean())
        return scores

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file(tensors, folder / "classifier.safetensors")
        labels = {
            "names": self.names,
            "styles": self.styles,
            "image_size": self.image_size,
            "strides": self.strides,
            "width": self.width,
        }
        (folder / "classifier.json").write_text(json.dumps(labels, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "Classifier":
        """Loads what [`save`] wrote.

        Raises:
            OSError: there is none.
        """
        path = Path(folder) / "classifier.json"
        if not path.is_file():
            raise OSError(
                f"there is no classifier at {folder} (no classifier.json): "
                "python -m modeling_lavit.training.emoji.train classifier makes one"
            )
        labels = json.loads(path.read_text())
        classifier = cls(**labels)
        tensors = load_file(Path(folder) / "classifier.safetensors")
        classifier.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
        return classifier.eval()
