"""Prompts of the suites that score drawings, and the folders that their programs read.

| suite | prompts | folder |
|---|---|---|
| geneval | `evaluation_metadata.jsonl`: rows with `prompt`, `tag` | `00000/metadata.jsonl`, `00000/samples/0000.png` |
| dpg | a folder of `*.txt`, a prompt each | `<stem>.png`, a grid of two by two |
| t2i-compbench | a text file, a prompt a line | `samples/<prompt>_000000.png`, numbered over all |
| coco | captions of COCO, or rows with an id and a caption (JSON, JSON Lines, CSV) | `<id>.png`, `ids.txt` |
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from .caption_files import read_captions
from .files import read_csv, read_json, read_records, read_text, take


SUITES = {"geneval": 4, "dpg": 4, "t2i-compbench": 10, "coco": 1}  # images a prompt
ID_KEYS, TEXT_KEYS = ("image_id", "id", "img_id"), ("caption", "prompt", "text")


@dataclass
class DrawingPrompt:
    """One prompt: its id, and its images' files below the folder; several images in one file are a grid."""

    id: str
    text: str
    files: list[str]
    images: int = 1
    metadata: dict = field(default_factory=dict)
    real: list[str] = field(default_factory=list)


def read_prompts(path: str | Path, seed: int = 0, images: int | None = None) -> tuple[str, list[DrawingPrompt]]:
    """Reads prompts; the suite is told by their form.

    Args:
        path: a file or folder, see above.
        seed: of the choice among an image's captions.
        images: drawn for each prompt; the suite's number by default.

    Raises:
        ValueError: the form is not known, or there is no prompt.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        suite, prompts = "dpg", _dpg(path)
    elif path.suffix == ".jsonl" and all("prompt" in row and "tag" in row for row in read_records(path)):
        suite, prompts = "geneval", _geneval(path, images or SUITES["geneval"])
    elif path.suffix == ".txt":
        suite, prompts = "t2i-compbench", _compbench(path, images or SUITES["t2i-compbench"])
    else:
        suite, prompts = "coco", _coco(path, seed)
    if not prompts:
        raise ValueError(f"{path} has no prompt")
    if suite in ("dpg", "coco") and images not in (None, SUITES[suite]):
        raise ValueError(f"the program of {suite} reads {SUITES[suite]} image(s) a prompt: leave out --n {images}")
    if empty := [prompt.id for prompt in prompts if not prompt.text.strip()]:
        raise ValueError(f"{path} has {len(empty)} empty prompts, the first is {empty[0]}")
    return suite, prompts


def _geneval(path: Path, images: int) -> list[DrawingPrompt]:
    prompts = []
    for i, row in enumerate(read_records(path)):
        files = [f"{i:05d}/samples/{k:04d}.png" for k in range(images)]
        text = take(row, "prompt", str, f"{path}, row {i}")
        prompts.append(DrawingPrompt(f"{i:05d}", text, files, images, metadata=row))
    return prompts


def _dpg(path: Path) -> list[DrawingPrompt]:
    files = sorted(path.glob("*.txt"))
    return [DrawingPrompt(file.stem, read_text(file).strip(), [f"{file.stem}.png"], SUITES["dpg"]) for file in files]


def _compbench(path: Path, images: int) -> list[DrawingPrompt]:
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    return [
        DrawingPrompt(
            str(i),
            line,
            # the program takes the prompt from the name up to the last underscore
            [f"samples/{line.replace('/', ' ')}_{i * images + k:06d}.png" for k in range(images)],
            images,
        )
        for i, line in enumerate(lines)
    ]


def _file_name(key) -> str:
    """An id as the name of a file, which lies in the folder it is given to."""
    return str(key).replace("/", "_").replace("\\", "_")


def _coco(path: Path, seed: int) -> list[DrawingPrompt]:
    rows = None
    if path.suffix in (".csv", ".tsv"):
        rows = read_csv(path)
        if rows and "raw" in rows[0]:
            rows = None
    elif path.suffix == ".jsonl":
        rows = read_records(path)
    else:
        data = read_json(path)
        plain = isinstance(data, list) and all(isinstance(row, dict) and "image" not in row for row in data)
        rows = data if plain else None
    if rows is None:
        pick = random.Random(seed)
        images = [row for row in read_captions(path).rows if row.captions]
        names = [_file_name(row.id) for row in images]
        return [
            DrawingPrompt(name, pick.choice(row.captions), [f"{name}.png"], real=row.files)
            for name, row in zip(names, images, strict=True)
        ]
    prompts: dict[str, DrawingPrompt] = {}
    for i, row in enumerate(rows):
        key = next((row[name] for name in ID_KEYS if row.get(name) not in (None, "")), None)
        text = next((row[name] for name in TEXT_KEYS if isinstance(row.get(name), str)), None)
        if key is None or text is None:
            raise ValueError(
                f"{path}, row {i}, has no id ({', '.join(ID_KEYS)}) or no text ({', '.join(TEXT_KEYS)}); "
                f"its keys are {sorted(map(str, row))}"
            )
        name = _file_name(key)
        prompts.setdefault(name, DrawingPrompt(name, text, [f"{name}.png"]))
    return list(prompts.values())


def write_extras(suite: str, prompts: list[DrawingPrompt], output: Path) -> None:
    """What a suite's program reads beside the images."""
    if suite == "geneval":
        for prompt in prompts:
            folder = output / prompt.id
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metadata.jsonl").write_text(json.dumps(prompt.metadata) + "\n", encoding="utf-8")
    if suite == "coco":
        (output / "ids.txt").write_text("".join(f"{prompt.id}\n" for prompt in prompts), encoding="utf-8")
