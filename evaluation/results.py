"""results.json and results.md: figures with all that is needed to compare them."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

from .output import replacing, write_json


# LaVIT's tables 1 and 2 and its authors' README: CIDEr x 100, accuracy in per cent, FID
COLUMNS = ("coco", "nocaps", "flickr30k", "vqav2", "okvqa", "gqa", "vizwiz", "coco-fid")
PAPER = {
    "LaVIT, paper (LLaMA-1 7B)": (134.0, 114.2, 83.0, 66.0, 54.6, 46.8, 38.5, 7.4),
    "LaVIT-v1 (Llama-2 7B)": (134.6, 113.1, 83.2, 68.2, 55.7, 48.0, 45.3, 7.2),
    "LaVIT-v2 (Llama-2 7B)": (133.3, 112.0, 81.4, 68.3, 55.9, 47.9, 41.0, 7.1),
    "Emu 13B": (112.4, None, None, 52.0, 38.2, None, 34.2, 11.7),
}
NAMES = {
    "coco": "COCO",
    "nocaps": "NoCaps",
    "flickr30k": "Flickr30k",
    "vqav2": "VQAv2",
    "okvqa": "OK-VQA",
    "gqa": "GQA",
    "vizwiz": "VizWiz",
    "coco-fid": "COCO FID",
}


def versions(*packages: str) -> dict[str, str]:
    """Python, this package, and others as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in ("lavit-hf", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def hash_ids(ids: Iterable) -> dict:
    """What was scored, so that two results can be told to be of the same samples."""
    names = sorted(str(one) for one in ids)
    return {"count": len(names), "sha256": hashlib.sha256("\n".join(names).encode()).hexdigest()}


def paper_table(dataset: str, metric: str, score: float | None, label: str) -> str:
    """Markdown: this score and those of the paper for the same data set."""
    column = NAMES.get(dataset, dataset)
    lines = [f"| | {column} ({metric}) |", "|---|---|"]
    if dataset in COLUMNS:
        index = COLUMNS.index(dataset)
        lines += [f"| {name} | {row[index]} |" for name, row in PAPER.items() if row[index] is not None]
    shown = "not scored" if score is None else f"**{score:.1f}**"
    return "\n".join([*lines, f"| {label} | {shown} |"]) + "\n"


def write_results(folder: Path, results: dict, notes: Sequence[str] = ()) -> None:
    """Writes both files.

    Args:
        folder: of the evaluation.
        results: with `dataset`, `metric`, `score`, `protocol`, `counts`, `ids` and `complete`, among others.
        notes: what a reader should know beside the figures.
    """
    label = f"this run ({results['protocol']}; {results['ids']['count']} samples)"
    table = paper_table(results["dataset"], results["metric"], results["score"], label)
    lines = [f"- {note}" for note in notes]
    lines += [f"- {kind}: {count}" for kind, count in results["counts"].items()]
    with replacing(folder / "results.md") as partial:
        partial.write_text(table + "\n" + "\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "results.json", results)
