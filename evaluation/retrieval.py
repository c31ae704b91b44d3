"""`lavit evaluate retrieval`, `lavit search`: images ranked for a text and texts for an image, by log-likelihood."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .caption_files import read_captions
from .files import read_json
from .reading import Reader
from .results import hash_ids, versions, write_results
from .run import choose, find_images, warn


RANKS = (1, 5, 10)


class TextScorer(Reader):
    """Log-likelihoods of all texts behind each image, as its captions."""

    def read(self, images: list[Image.Image], items: list[dict]) -> list[dict]:
        texts = [
            self.processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.options["texts"]
        ]
        prompts = self.processor(images=images, text=["<image>"] * len(images), return_tensors="pt")
        scores = self.model.score(**prompts, continuations=texts)
        return [{"scores": [round(value, 4) for value in row]} for row in scores.tolist()]


def evaluate_retrieval(
    annotations: str | Path,
    images: str | Path,
    output: str | Path,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    run_model: Callable | None = None,
) -> dict | None:
    """Recall among the images and captions of a split.

    Images are ranked by the text's log-likelihood behind them; texts by theirs less their mean over all images,
    without which short and frequent ones would win.

    Args:
        annotations, output, images, split, limit, seed: see [`evaluate_captions`].
        run_model: as there, with `texts=` to hand to the worker.

    Raises:
        ValueError, OSError: the files are not as they should be.
    """
    data = read_captions(annotations, split)
    data.rows = [row for row in choose(data.rows, limit, seed) if row.captions]
    if not data.rows:
        raise ValueError(f"{annotations} has no captions to search for")
    items = find_images(data.rows, images, data.findings)
    warn(data.findings)
    found = {item["key"] for item in items}
    pairs = [(str(row.id), text) for row in data.rows if str(row.id) in found for text in row.captions]
    texts = [text for _, text in pairs]
    settings = {"annotations": str(annotations), "images": str(images), "split": split, "limit": limit, "seed": seed}
    settings |= {"samples": hash_ids(found), "text_hash": hash_ids(texts)}
    rows = run_model(output, settings, items, texts=texts)
    if rows is None:
        return None
    read = [row for row in rows if "error" not in row]
    for row in rows:
        if "error" in row:
            data.findings.add("broken images, left out", row["key"])
    if not read:
        raise ValueError(f"no image can be read; the first: {rows[0]['error']}")
    keys = [row["key"] for row in read]
    kept = [i for i, (key, _) in enumerate(pairs) if key in set(keys)]
    scores = np.array([row["scores"] for row in read])[:, kept]
    owner = np.array([keys.index(pairs[i][0]) for i in kept])
    recalls = {"image_to_text": recall_of_texts(scores, owner), "text_to_image": recall_of_images(scores, owner)}
    results = {
        "task": "retrieval",
        "dataset": data.name + " retrieval",
        "metric": "R@1 of images, per cent",
        "score": recalls["text_to_image"]["R@1"],
        **recalls,
        "protocol": "log-likelihood of the caption behind the image",
        "complete": len(read) == len(data.rows) and limit is None,
        "settings": read_json(Path(output) / "settings.json"),
        "versions": versions("torch", "transformers"),
        "counts": {"images": len(read), "texts": len(kept), **data.findings.counts()},
        "ids": hash_ids(keys),
    }
    notes = [f"{kind}: {', '.join(f'{k} {v:.1f}' for k, v in recall.items())}" for kind, recall in recalls.items()]
    write_results(Path(output), results, notes)
    return results


def recall_of_images(scores: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """Per cent of texts whose image is among the first K.

    Args:
        scores: (images, texts). owner: (texts,), the image of each.
    """
    own = scores[owner, np.arange(scores.shape[1])]
    better = (scores > own).sum(0)
    return {f"R@{k}": 100 * float((better < k).mean()) for k in RANKS}


def recall_of_texts(scores: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """Per cent of images one of whose texts is among the first K; (images, texts), (texts,)."""
    scores = scores - scores.mean(0)
    best = np.array([row[owner == i].max() for i, row in enumerate(scores)])
    better = (scores > best[:, None]).sum(1)
    return {f"R@{k}": 100 * float((better < k).mean()) for k in RANKS}


def search(paths: Sequence[Path], reader: TextScorer, batch_size: int = 32) -> list[tuple[float, Path]]:
    """Images that can be read, the one behind which the reader's text is most probable first, with its log-likelihood.

    Args:
        paths: image files.
        reader: with one text.
        batch_size: images at once.
    """
    found = []
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        for path, row in zip(batch, reader([{"image": str(path)} for path in batch]), strict=True):
            if "error" not in row:
                found.append((row["scores"][0], path))
    return sorted(found, key=lambda pair: (-pair[0], str(pair[1])))
