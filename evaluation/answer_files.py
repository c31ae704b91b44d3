"""Questions about images with their answers, in every form that users hold; a form is recognised by its keys.

| data set | form |
|---|---|
| VQAv2, OK-VQA | `{questions: [{question_id, image_id, question}]}` and `{annotations: [{question_id, image_id, question_type, answer_type, answers: [{answer, raw_answer?}]}]}` |
| VQAv2, OK-VQA, GQA, as lists | `[{image, question, question_id, answer}]`, the answer a list, or one string (GQA) |
| GQA | `{id: {question, imageId, answer?, types?, entailed?, isBalanced?}}` |
| VizWiz | `[{image, question, answers: [{answer}]?, answer_type?, answerable?}]`, without ids: the row's number |
"""  # noqa: E501

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import Findings, Id, read_json, read_records, take


FORMS = "VQAv2's questions and annotations, GQA's questions, VizWiz's list, a list of image, question, question_id"
COCO_SPLITS = ("val2014", "train2014", "test2015", "test2014")
# data set -> keys of a row of its submission file
SUBMISSION = {
    "vqav2": ("question_id", "answer"),
    "okvqa": ("question_id", "answer"),
    "gqa": ("questionId", "prediction"),
    "vizwiz": ("image", "answer"),
}


@dataclass
class Question:
    """A question about an image.

    Args:
        id: as the data set names it.
        files: names that the image may have.
        text: the question.
        answers: of the annotators (stems in OK-VQA), perhaps none.
        raw_answers: OK-VQA's before stemming, else the same.
        question_type, answer_type: "" where there are none.
        answerable: VizWiz's mark; None elsewhere.
        entailed: GQA's ids of questions whose answers follow from this one's.
        balanced: whether GQA counts it.
    """

    id: Id
    files: list[str]
    text: str
    answers: list[str] = field(default_factory=list)
    raw_answers: list[str] = field(default_factory=list)
    question_type: str = ""
    answer_type: str = ""
    answerable: bool | None = None
    entailed: list[str] = field(default_factory=list)
    balanced: bool = True

    def submission_id(self, name: str) -> Id:
        """What the submission file of a data set calls it."""
        return Path(self.files[0]).name if name == "vizwiz" else self.id


@dataclass
class QuestionSet:
    """Questions of one data set: "vqav2", "okvqa", "gqa" or "vizwiz"."""

    name: str
    rows: list[Question]
    findings: Findings = field(default_factory=Findings)


def read_questions(questions: str | Path | None, annotations: str | Path | None = None) -> QuestionSet:
    """Reads questions, and their answers where they are known.

    Args:
        questions: the file of questions.
        annotations: the file of answers, of the data sets that have two; otherwise either may be given.

    Raises:
        ValueError: a form is not known, a value is of the wrong type, the two files are not of the same questions.
        OSError: a file cannot be read.
    """
    if questions is None and annotations is None:
        raise ValueError("give --questions, --annotations, or both")
    path = Path(questions if questions is not None else annotations)
    data = read_json(path)
    if isinstance(data, dict) and isinstance(data.get("annotations"), list) and "questions" not in data:
        raise ValueError(f"{path} has answers alone: give the file of their questions as --questions")
    if isinstance(data, dict) and isinstance(data.get("questions"), list):
        other = read_json(annotations) if questions is not None and annotations is not None else data
        answered = isinstance(other, dict) and isinstance(other.get("annotations"), list)
        if other is not data and not answered:
            raise ValueError(f"{annotations} is no file of answers: it has no list 'annotations'")
        result = _vqa(data, other["annotations"] if answered else None, path)
    elif questions is not None and annotations is not None and Path(annotations).resolve() != path.resolve():
        raise ValueError(f"{path} holds questions with answers: leave out --annotations {annotations}")
    elif isinstance(data, dict) and data and all(isinstance(row, dict) and "imageId" in row for row in data.values()):
        result = _gqa(data)
    elif isinstance(data, list) and data and all(isinstance(row, dict) and "image" in row for row in data):
        result = _vizwiz(data) if not any("question_id" in row for row in data) else _listed(data)
    else:
        keys = sorted(map(str, data))[:8] if isinstance(data, dict) else f"a list of {len(data)} rows"
        raise ValueError(f"{path} is none of the known forms of questions ({FORMS}); it holds {keys}")
    return _checked(result, path)


def _checked(result: QuestionSet, path: Path) -> QuestionSet:
    unique: dict[str, Question] = {}
    for row in result.rows:
        if str(row.id) in unique:
            result.findings.add("doubled ids, the first of each is used", row.id)
            continue
        if not row.text.strip():
            result.findings.add("empty questions", row.id)
        if any(not answer.strip() for answer in row.answers):
            result.findings.add("questions with empty answers", row.id)
        unique[str(row.id)] = row
    if not unique:
        raise ValueError(f"{path} has no question")
    result.rows = list(unique.values())
    return result


def _vqa(data: dict, annotations: list | None, path: Path) -> QuestionSet:
    findings = Findings()
    by_id: dict[str, dict] = {}
    for i, row in enumerate(annotations or []):
        if not isinstance(row, dict):
            raise ValueError(f"annotation {i} is no object: {row!r:.60}")
        key = str(take(row, "question_id", (int, str), f"annotation {i}"))
        if key in by_id:
            findings.add("doubled annotations, the first of each is used", key)
        by_id.setdefault(key, row)
    stemmed, rows = False, []
    subtype = str(data.get("data_subtype", ""))
    for i, row in enumerate(data["questions"]):
        if not isinstance(row, dict):
            raise ValueError(f"question {i} of {path} is no object: {row!r:.60}")
        key = take(row, "question_id", (int, str), f"question {i} of {path}")
        question = Question(
            key,
            coco_names(take(row, "image_id", (int, str), f"question {key}"), subtype),
            take(row, "question", str, f"question {key}"),
        )
        annotation = by_id.pop(str(key), None)
        if annotation is not None:
            entries = take(annotation, "answers", list, f"the annotation of question {key}")
            stemmed |= any(isinstance(entry, dict) and "raw_answer" in entry for entry in entries)
            question.answers = _texts(entries, "answer", f"an answer of question {key}")
            question.raw_answers = _texts(entries, "raw_answer", f"an answer of question {key}", "answer")
            question.question_type = str(annotation.get("question_type", ""))
            question.answer_type = str(annotation.get("answer_type", ""))
        elif annotations is not None:
            findings.add("questions without annotation", key)
        rows.append(question)
    if annotations and len(by_id) == len(annotations):
        raise ValueError(f"the annotations are of other questions than {path} holds")
    for key in by_id:
        findings.add("annotations without question", key)
    return QuestionSet("okvqa" if stemmed else "vqav2", rows, findings)


def coco_names(image_id: int | str, subtype: str = "") -> list[str]:
    """The files that COCO's image of this id may be called."""
    if not str(image_id).isdecimal():
        return [str(image_id)]
    subtypes = [subtype] if subtype in COCO_SPLITS else COCO_SPLITS
    number = f"{int(image_id):012d}"
    return [f"COCO_{one}_{number}.jpg" for one in subtypes] + [f"{number}.jpg"]


def _texts(entries: list, name: str, where: str, other: str | None = None) -> list[str]:
    texts = []
    for entry in entries:
        if isinstance(entry, str):
            texts.append(entry)
        elif isinstance(entry, dict):
            texts.append(take(entry, name if name in entry or other is None else other, str, where))
        else:
            raise ValueError(f"{where} must be text or an object with {name!r}, got {entry!r:.60}")
    return texts


def _gqa(data: dict[str, dict]) -> QuestionSet:
    rows = []
    for key, row in data.items():
        where = f"question {key}"
        image = str(take(row, "imageId", (int, str), where))
        answers = [take(row, "answer", str, where)] if "answer" in row else []
        types = row.get("types") if isinstance(row.get("types"), dict) else {}
        structure = str(types.get("structural", ""))
        entailed = row.get("entailed") if isinstance(row.get("entailed"), list) else []
        rows.append(
            Question(
                key,
                [f"{image}.jpg", image],
                take(row, "question", str, where),
                answers,
                answers,
                question_type=structure,
                answer_type={"": "", "query": "open"}.get(structure, "binary"),
                entailed=[str(other) for other in entailed if str(other) != key],
                balanced=row.get("isBalanced", True) is not False,
            )
        )
    return QuestionSet("gqa", rows)


def _vizwiz(data: list[dict]) -> QuestionSet:
    rows = []
    for i, row in enumerate(data):
        where = f"row {i}"
        answers = (
            _texts(take(row, "answers", list, where), "answer", f"an answer of {where}") if "answers" in row else []
        )
        answerable = row.get("answerable")
        rows.append(
            Question(
                i,
                [take(row, "image", str, where)],
                take(row, "question", str, where),
                answers,
                answers,
                answer_type=str(row.get("answer_type", "")),
                answerable=None if answerable is None else bool(answerable),
            )
        )
    return QuestionSet("vizwiz", rows)


def _listed(data: list[dict]) -> QuestionSet:
    rows = []
    for i, row in enumerate(data):
        where = f"row {i}"
        key = take(row, "question_id", (int, str), where)
        answer = row.get("answer", [])
        if not isinstance(answer, str | list):
            raise ValueError(f"{where}: 'answer' must be text or a list, got {answer!r:.60}")
        answers = [answer] if isinstance(answer, str) else _texts(answer, "answer", f"an answer of {where}")
        image, text = take(row, "image", str, where), take(row, "question", str, where)
        rows.append(Question(key, [image], text, answers, answers))
    single = any(row.answers for row in rows) and all(len(row.answers) <= 1 for row in rows)
    return QuestionSet("gqa" if single else "vqav2", rows)


def read_answer_predictions(path: str | Path, questions: QuestionSet) -> dict[str, str]:
    """A submission file of any of the data sets, or this program's predictions.jsonl: question id as text to answer.

    Rows are `{question_id, answer}`, `{questionId, prediction}`, or `{image, answer}` of VizWiz.

    Raises:
        ValueError: a value is missing or of the wrong type, or nothing is there.
        OSError: the file cannot be read.
    """
    by_image = {row.submission_id("vizwiz"): str(row.id) for row in questions.rows}
    answers: dict[str, str] = {}
    for i, row in enumerate(read_records(path)):
        where = f"{path}, row {i}"
        key = str(take(row, _first(("question_id", "questionId", "image"), row), (int, str), where))
        answer = take(row, _first(("answer", "prediction"), row), str, where)
        if "question_id" not in row and "questionId" not in row:
            key = by_image.get(Path(key).name, key)
        if key in answers:
            questions.findings.add("doubled predictions, the first of each is used", key)
            continue
        if not answer.strip():
            questions.findings.add("empty predictions", key)
        answers[key] = answer
    if not answers:
        raise ValueError(f"{path} has no predictions")
    return answers


def _first(names: Iterable[str], row: dict[str, Any]) -> str:
    names = tuple(names)
    return next((name for name in names if name in row), names[0])
