"""Images with reference captions, in every form that users hold; a form is recognised by its keys.

| data set | form |
|---|---|
| COCO, Flickr30k, Karpathy's splits | `{images: [{filename, filepath?, cocoid?, split, sentences: [{raw}]}]}` |
| COCO, NoCaps | `{images: [{id, file_name, domain?}], annotations: [{image_id, caption}]}` |
| COCO, Flickr30k, as lists | `[{image, caption: [...]}]`; NoCaps without references `[{image, img_id}]` |
| Flickr30k | CSV with `raw` (a JSON list in a cell), `split`, `filename`, `img_id`; lines `name.jpg#0<TAB>caption` |
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import Findings, Id, read_csv, read_json, read_records, read_text, take


FORMS = "Karpathy's splits, COCO's images and annotations, a list of images with captions, Flickr30k's CSV or tokens"
TEST = "test"


@dataclass
class CaptionedImage:
    """An image and its reference captions.

    Args:
        id: as the data set's submission file names it.
        files: names that the image may have.
        captions: references, perhaps none.
        split: "" where the form has no splits.
        domain: of NoCaps; "" elsewhere.
        sentence_ids: of the captions, where the form has them.
    """

    id: Id
    files: list[str]
    captions: list[str]
    split: str = ""
    domain: str = ""


@dataclass
class CaptionSet:
    """The images of one split.

    Args:
        name: "coco", "nocaps" or "flickr30k" as far as the form tells, else "captions".
        rows: in the file's order.
        findings: what was wrong.
    """

    name: str
    rows: list[CaptionedImage]
    findings: Findings = field(default_factory=Findings)


def read_captions(path: str | Path, split: str | None = None) -> CaptionSet:
    """Reads annotations of captions.

    Args:
        path: of the file.
        split: of a file that has some; "test" by default.

    Raises:
        ValueError: the file's form is not known, a value is of the wrong type, or the split has no image.
        OSError: the file cannot be read.
    """
    path = Path(path)
    name, rows = _read_rows(path)
    findings = Findings()
    rows = _in_split(rows, split, path)
    unique: dict[str, CaptionedImage] = {}
    for row in rows:
        if str(row.id) in unique:
            findings.add("doubled ids, the first of each is used", row.id)
            continue
        empty = [caption for caption in row.captions if not caption.strip()]
        for _ in empty:
            findings.add("empty reference captions, left out", row.id)
        row.captions = [caption for caption in row.captions if caption.strip()]
        unique[str(row.id)] = row
    return CaptionSet(name, list(unique.values()), findings)


def _in_split(rows: list[CaptionedImage], split: str | None, path: Path) -> list[CaptionedImage]:
    splits = Counter(row.split for row in rows)
    if set(splits) <= {""}:
        if split is not None:
            raise ValueError(f"{path} has no splits: leave out --split {split}")
        if not rows:
            raise ValueError(f"{path} has no image")
        return rows
    wanted = split or TEST
    if wanted not in splits:
        raise ValueError(f"{path} has no image of the split {wanted!r}; its splits are {sorted(splits)}")
    return [row for row in rows if row.split == wanted]


def _read_rows(path: Path) -> tuple[str, list[CaptionedImage]]:
    text = read_text(path).lstrip()
    if text.startswith(("{", "[")):
        data = read_json(path)
        if isinstance(data, dict) and isinstance(data.get("images"), list):
            objects = [row for row in data["images"] if isinstance(row, dict)]
            if len(objects) == len(data["images"]) and objects and all("sentences" in row for row in objects):
                return _karpathy(objects)
            if isinstance(data.get("annotations"), list) or (objects and all("file_name" in row for row in objects)):
                return _coco(objects, data.get("annotations", []), path)
        if isinstance(data, list) and data and all(isinstance(row, dict) and "image" in row for row in data):
            return _listed(data)
        keys = sorted(data)[:8] if isinstance(data, dict) else f"a list of {_kind(data)}"
        raise ValueError(f"{path} is none of the known forms of captions ({FORMS}); it holds {keys}")
    first = text.partition("\n")[0]
    if re.match(r"[^\t]+#\d+\t", first):
        return _tokens(text, path)
    columns = set(first.strip().split(","))
    if {"raw", "filename"} <= columns:
        return _table(path)
    raise ValueError(f"{path} is none of the known forms of captions ({FORMS}); it begins with {first[:60]!r}")


def _kind(data: Any) -> str:
    return f"{type(data[0]).__name__} values" if isinstance(data, list) and data else "nothing"


def _karpathy(objects: list[dict]) -> tuple[str, list[CaptionedImage]]:
    rows = []
    for i, row in enumerate(objects):
        where = f"image {i}"
        name = take(row, "filename", str, where)
        sentences = take(row, "sentences", list, where)
        captions = [take(sentence, "raw", str, f"a sentence of image {i}") for sentence in _objects(sentences, where)]
        folder = row.get("filepath")
        files = [f"{folder}/{name}", name] if isinstance(folder, str) and folder else [name]
        split = str(row.get("split", ""))
        rows.append(CaptionedImage(row.get("cocoid", image_id(name)), files, captions, split))
    return ("coco" if "cocoid" in objects[0] else "flickr30k"), rows


def _coco(objects: list[dict], annotations: list, path: Path) -> tuple[str, list[CaptionedImage]]:
    captions: dict[str, list[str]] = {}
    for i, row in enumerate(_objects(annotations, str(path))):
        where = f"annotation {i}"
        key = str(take(row, "image_id", (int, str), where))
        captions.setdefault(key, []).append(take(row, "caption", str, where))
    rows = []
    for i, row in enumerate(objects):
        key = take(row, "id", (int, str), f"image {i}")
        names = [str(row[field]) for field in ("file_name", "filename") if row.get(field)]
        if row.get("open_images_id"):
            names.append(f"{row['open_images_id']}.jpg")
        rows.append(CaptionedImage(key, names, captions.get(str(key), []), domain=str(row.get("domain") or "")))
    known = {str(row.id) for row in rows}
    if strange := [key for key in captions if key not in known]:
        raise ValueError(f"{path} has captions of {len(strange)} images that it does not list, such as {strange[0]}")
    return ("nocaps" if any(row.domain for row in rows) else "coco"), rows


def _listed(objects: list[dict]) -> tuple[str, list[CaptionedImage]]:
    rows: dict[str, CaptionedImage] = {}
    doubled = []
    for i, row in enumerate(objects):
        where = f"row {i}"
        name = take(row, "image", str, where)
        key = next((row[field] for field in ("img_id", "image_id", "id") if field in row), image_id(name))
        captions = row.get("caption", [])
        if not isinstance(captions, str | list) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"{where}: 'caption' must be a string or a list of strings, got {captions!r:.60}")
        one = CaptionedImage(key, [name], [captions] if isinstance(captions, str) else list(captions))
        if str(key) in rows and isinstance(captions, str):  # a row for each caption
            rows[str(key)].captions += one.captions
        elif str(key) in rows:
            doubled.append(one)
        else:
            rows[str(key)] = one
    without = not any(row.captions for row in rows.values())
    return ("nocaps" if without else guess_name(objects[0]["image"])), [*rows.values(), *doubled]


def _table(path: Path) -> tuple[str, list[CaptionedImage]]:
    rows = []
    for i, row in enumerate(read_csv(path), start=2):
        where = f"{path}, line {i}"
        name, raw = take(row, "filename", str, where), take(row, "raw", str, where)
        try:
            captions = json.loads(raw)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: 'raw' is no JSON list of captions: {error}") from error
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"{where}: 'raw' is no list of captions: {raw[:60]!r}")
        rows.append(CaptionedImage(image_id(name), [name], captions, row.get("split") or ""))
    return "flickr30k", rows


def _tokens(text: str, path: Path) -> tuple[str, list[CaptionedImage]]:
    rows: dict[str, CaptionedImage] = {}
    for i, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        found = re.match(r"([^\t]+)#\d+\t(.*)", line)
        if found is None:
            raise ValueError(f"{path}, line {i}, is not like 'name.jpg#0<TAB>caption': {line[:60]!r}")
        row = rows.setdefault(found[1], CaptionedImage(image_id(found[1]), [found[1]], []))
        row.captions.append(found[2])
    return "flickr30k", list(rows.values())


def _objects(rows: list, where: str) -> list[dict]:
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected objects in a list, got {type(row).__name__} {row!r:.60}")
    return rows


def image_id(name: str) -> int | str:
    """The id of an image that has none of its own: COCO's and Flickr30k's numbers, else the file's stem."""
    stem = Path(name).stem
    number = re.fullmatch(r"(?:COCO_\w+\d{4}_)?(\d+)", stem)
    return int(number[1]) if number else stem


def guess_name(name: str) -> str:
    """The data set that an image's name tells: "coco", "flickr30k" or "captions"."""
    if "COCO_" in name or re.fullmatch(r"\d{12}", Path(name).stem):
        return "coco"
    return "flickr30k" if "flickr" in name.lower() else "captions"


def read_caption_predictions(path: str | Path, findings: Findings) -> dict[str, str]:
    """A submission file, `[{image_id, caption}]`, or this program's predictions.jsonl: image id as text to caption.

    Raises:
        ValueError: a value is missing or of the wrong type, or nothing is there.
        OSError: the file cannot be read.
    """
    captions: dict[str, str] = {}
    for i, row in enumerate(read_records(path)):
        where = f"{path}, row {i}"
        key = str(take(row, "image_id", (int, str), where))
        caption = take(row, "caption", str, where)
        if key in captions:
            findings.add("doubled predictions, the first of each is used", key)
            continue
        if not caption.strip():
            findings.add("empty predictions", key)
        captions[key] = caption
    if not captions:
        raise ValueError(f"{path} has no predictions")
    return captions
