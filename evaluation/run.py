"""`lavit evaluate captions` and `lavit evaluate answers`: annotations, predictions or images, and figures.

Nothing here needs torch until a model is to answer.
"""

import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .answer_files import SUBMISSION, QuestionSet, read_answer_predictions, read_questions
from .answers import PROTOCOLS, UNANSWERABLE, average_precision, score_answers
from .caption_files import CaptionSet, read_caption_predictions, read_captions
from .captions import score_captions
from .files import Findings, ImageFolder, read_json
from .lemmas import load_lemmatizer
from .output import OutputFolder, write_json
from .results import hash_ids, versions, write_results


CAPTION_PROTOCOL = "CIDEr-D, BLEU and ROUGE-L as pycocoevalcap 1.2 computes them"


def evaluate_captions(
    annotations: str | Path,
    output: str | Path,
    images: str | Path | None = None,
    predictions: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    java: Sequence[str] = (),
    run_model: Callable | None = None,
) -> dict | None:
    """Scores captions of a file, or has a model write them.

    Args:
        annotations: see [`read_captions`].
        output: folder of the evaluation.
        images: folder of the images that the model describes.
        predictions: a submission file, instead of images and model.
        split: of the annotations.
        limit: so many images, drawn with `seed`.
        java: see [`score_captions`].
        run_model: `run_model(output, settings, items)` writes the missing predictions and returns all rows in order,
            or None in processes that are not the main one.

    Returns:
        what results.json holds; None where `run_model` returned that.

    Raises:
        ValueError, OSError: the files are not as they should be.
    """
    _check_source(images, predictions)
    data = read_captions(annotations, split)
    data.rows = choose(data.rows, limit, seed)
    settings = {"annotations": str(annotations), "split": split, "limit": limit, "seed": seed}
    if predictions is not None:
        captions = read_caption_predictions(predictions, data.findings)
        captions = match_predictions({str(row.id): row.id for row in data.rows}, captions, data.findings, limit)
        warn(data.findings)
        folder = OutputFolder(output).path
        settings["predictions"] = str(predictions)
    else:
        items = find_images(data.rows, images, data.findings)
        warn(data.findings)
        settings |= {"images": str(images), "samples": hash_ids(item["key"] for item in items)}
        rows = run_model(output, settings, items)
        if rows is None:
            return None
        settings = read_json(Path(output) / "settings.json")
        captions = written(rows, "caption", data.findings)
        folder = Path(output)
    return _caption_results(folder, data, captions, settings, java)


def _caption_results(
    folder: Path, data: CaptionSet, captions: dict[str, str], settings: dict, java: Sequence[str]
) -> dict:
    by_id = {str(row.id): row for row in data.rows}
    write_json(
        folder / "submission.json", [{"image_id": by_id[key].id, "caption": text} for key, text in captions.items()]
    )
    referenced = {key: text for key, text in captions.items() if by_id[key].captions}
    if len(referenced) < len(captions):
        data.findings.cases["images without references"] = sorted(captions.keys() - referenced.keys())
    results: dict = {"task": "captions", "dataset": data.name, "metric": "CIDEr x 100", "score": None}
    notes = [f"CIDEr's document frequencies are those of the references of these {len(referenced)} images"]
    if referenced:
        references = {key: by_id[key].captions for key in referenced}
        scores, by_image = score_captions(referenced, references, java)
        results |= {"score": 100 * scores["CIDEr"], **scores}
        domains = sorted({by_id[key].domain for key in referenced} - {""})
        if domains:
            results["by_domain"] = {}
            notes.append("a domain is scored as a data set of its own")
        for domain in domains:
            part = {key: text for key, text in referenced.items() if by_id[key].domain == domain}
            results["by_domain"][domain] = score_captions(part, references, java)[0] | {"images": len(part)}
        write_json(folder / "by_image.json", by_image)
    results |= {
        "protocol": CAPTION_PROTOCOL,
        "complete": len(referenced) == len(data.rows) and settings["limit"] is None,
        "settings": settings,
        "versions": versions(*(["pycocoevalcap"] if java else []), *_model_packages(settings)),
        "counts": {"images": len(data.rows), "scored": len(referenced), **data.findings.counts()},
        "ids": hash_ids(referenced),
    }
    write_results(folder, results, notes)
    return results


def evaluate_answers(
    questions: str | Path | None,
    output: str | Path,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    predictions: str | Path | None = None,
    protocol: str = "official",
    lemmatize: bool = False,
    limit: int | None = None,
    seed: int = 0,
    run_model: Callable | None = None,
) -> dict | None:
    """Scores answers of a file, or has a model give them.

    Args:
        questions, annotations: see [`read_questions`].
        output, images, predictions, limit, seed, run_model: see [`evaluate_captions`].
        protocol: one of `PROTOCOLS`, see [`answers`].
        lemmatize: both sides' nouns and verbs to base forms first, by spaCy.

    Returns:
        what results.json holds; None where `run_model` returned that.

    Raises:
        ValueError, OSError: the files are not as they should be.
        ImportError: `lemmatize` without spaCy.
    """
    _check_source(images, predictions)
    if protocol not in PROTOCOLS:
        raise ValueError(f"--protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    lemmatizer = load_lemmatizer() if lemmatize else None
    data = read_questions(questions, annotations)
    data.rows = choose(data.rows, limit, seed)
    names = {"questions": questions, "annotations": annotations}
    settings = {name: None if path is None else str(path) for name, path in names.items()}
    settings |= {"protocol": protocol, "lemmatize": lemmatize, "limit": limit, "seed": seed}
    answerable: dict[str, float] = {}
    if predictions is not None:
        answers = read_answer_predictions(predictions, data)
        answers = match_predictions({str(row.id): row.id for row in data.rows}, answers, data.findings, limit)
        warn(data.findings)
        folder = OutputFolder(output).path
        settings["predictions"] = str(predictions)
    else:
        items = find_images(data.rows, images, data.findings)
        for item in items:
            item |= {"question": item.pop("text"), "ask_answerable": data.name == "vizwiz" and protocol == "lavit"}
        warn(data.findings)
        settings |= {"images": str(images), "samples": hash_ids(item["key"] for item in items)}
        settings["text_hash"] = hash_ids(f"{item['key']} {item['question']}" for item in items)
        rows = run_model(output, settings, items)
        if rows is None:
            return None
        settings = read_json(Path(output) / "settings.json")
        answers = written(rows, "answer", data.findings)
        answerable = {row["key"]: row["answerable"] for row in rows if "answerable" in row}
        folder = Path(output)
    return _answer_results(folder, data, answers, answerable, settings, lemmatizer)


def _answer_results(
    folder: Path,
    data: QuestionSet,
    answers: dict[str, str],
    answerable: dict[str, float],
    settings: dict,
    lemmatizer: Callable[[str], str] | None,
) -> dict:
    by_id = {str(row.id): row for row in data.rows}
    id_name, answer_name = SUBMISSION[data.name]
    write_json(
        folder / "submission.json",
        [{id_name: by_id[key].submission_id(data.name), answer_name: text} for key, text in answers.items()],
    )
    results: dict = {"task": "answers", "dataset": data.name, "metric": "accuracy in per cent", "score": None}
    scored: dict[str, float] = {}
    if any(row.answers for row in data.rows):
        scores, scored = score_answers(data, answers, settings["protocol"], lemmatizer)
        results |= {"score": scores["overall"], **scores}
        write_json(folder / "by_question.json", scored)
    labelled = [key for key in answerable if by_id[key].answerable is not None]
    if any(by_id[key].answerable for key in labelled):
        results["answerability"] = 100 * average_precision(
            [answerable[key] for key in labelled], [bool(by_id[key].answerable) for key in labelled]
        )
    results |= {
        "protocol": settings["protocol"] + (", lemmatized" if settings["lemmatize"] else ""),
        "complete": len(answers) == len(data.rows) and settings["limit"] is None,
        "settings": settings,
        "versions": versions(*(["spacy"] if settings["lemmatize"] else []), *_model_packages(settings)),
        "counts": {"questions": len(data.rows), "scored": len(scored), **data.findings.counts()},
        "ids": hash_ids(scored),
    }
    write_results(folder, results, ["figures of different protocols cannot be compared"])
    return results


def _check_source(images, predictions) -> None:
    if (images is None) == (predictions is None):
        raise ValueError("give either --images, which the model reads, or --predictions, which exist already")


def _model_packages(settings: dict) -> Sequence[str]:
    return () if "predictions" in settings else ("torch", "transformers")


def choose(rows: list, limit: int | None, seed: int) -> list:
    """All rows, or `limit` of them drawn with `seed`, in their order."""
    if limit is None or limit >= len(rows):
        return rows
    chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return [rows[i] for i in chosen]


def match_predictions(
    ids: dict[str, object], predictions: dict[str, str], findings: Findings, limit: int | None
) -> dict[str, str]:
    """The predictions for these ids, in their order; names what is missing and what is of none of them.

    Raises:
        ValueError: there is no prediction for any of them.
    """
    matched = {key: predictions[key] for key in ids if key in predictions}
    if not matched:
        first = next(iter(predictions))
        raise ValueError(f"none of the {len(predictions)} predictions is for these annotations; the first is {first}")
    for key in ids:
        if key not in predictions:
            findings.add("without prediction, not scored", key)
    if limit is None:
        for key in predictions:
            if key not in ids:
                findings.add("predictions without annotation, left out", key)
    return matched


def find_images(rows: Sequence, images: str | Path, findings: Findings) -> list[dict]:
    """One item for each row whose image is there; names those whose image is not.

    Raises:
        ValueError: not one image is there.
        OSError: there is no such folder.
    """
    folder = ImageFolder(Path(images))
    items = []
    for row in rows:
        path = folder.find(row.files)
        if path is None:
            findings.add("missing images, left out", row.files[0] if row.files else row.id)
            continue
        items.append({"key": str(row.id), "image": str(path), "text": getattr(row, "text", "")})
    if not items:
        raise ValueError(f"{images} has none of the {len(rows)} images, such as {(rows[0].files or [rows[0].id])[0]}")
    return items


def written(rows: Sequence[dict], name: str, findings: Findings) -> dict[str, str]:
    """Texts that a model wrote, by key; names broken images and empty texts."""
    texts = {}
    for row in rows:
        if "error" in row:
            findings.add("broken images, left out", row["key"])
            continue
        if not row[name].strip():
            findings.add("empty predictions", row["key"])
        texts[row["key"]] = row[name]
    if not texts:
        raise ValueError(f"no image can be read; the first: {rows[0]['error']}")
    return texts


def warn(findings: Findings) -> None:
    """Names on stderr what is wrong with the data."""
    for line in findings.lines():
        print(f"lavit evaluate: {line}", file=sys.stderr)


__all__ = ["UNANSWERABLE", "evaluate_answers", "evaluate_captions"]
