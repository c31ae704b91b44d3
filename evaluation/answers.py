"""Accuracy of answers to questions about images, by three protocols: they give the same answers different figures.

- `official`: VQAv2's evaluation program, its two slips included, because figures must be comparable: the look-behind
  of its pattern for full stops is misspelt, so that it removes every stop that no digit follows; and it passes a flag
  where a count is meant, so that it removes 32 stops at most. Where the ten annotators agree, nothing is normalised.
  OK-VQA: the words of both sides are stemmed before that. GQA: equality, lower case, without a final stop.
- `lavit`: the authors' own rules, which LaVIT's figures come from; annotations and predictions are treated unlike.
  OK-VQA: the answers before stemming. GQA: as official. VizWiz: the answerable questions alone.
- `lmms-eval`: its tasks of version 0.7.3. GQA: equality without case and punctuation.
"""

import re
import string
from collections.abc import Callable, Sequence

from .answer_files import Question, QuestionSet
from .answer_tables import ARTICLES, CONTRACTIONS, LEADING_PHRASES, NO_ANSWER, NUMBERS, PUNCTUATION
from .stems import stem_answer


PROTOCOLS = ("official", "lavit", "lmms-eval")
FULL_STOP = re.compile(r"(?!<=\d)(\.)(?!\d)")
COMMA_IN_NUMBER = re.compile(r"\d,\d")
AGREEING = 3  # annotators who make an answer fully right
UNANSWERABLE = "unanswerable"


def strip_punctuation(text: str) -> str:
    """VQAv2's rule: a mark goes if it stands beside a space anywhere or the text has digit,comma,digit; else it
    becomes a space. Then the first 32 full stops in front of no digit go."""
    has_number = COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or has_number else " ")
    return FULL_STOP.sub("", result, count=32)


def normalize_words(text: str) -> str:
    """VQAv2's rule: lower case, numbers up to ten as digits, without articles, contractions with their apostrophes."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def trim(text: str) -> str:
    """Line breaks and tabs to spaces, none at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def clean_lavit(text: str) -> str:
    """A prediction by LaVIT's rules: punctuation, words, "unanswerable" for what is no answer, leading phrases."""
    words = ["no" if word == "nope" else word for word in strip_punctuation(trim(text)).lower().split()]
    words = [NUMBERS.get(word, word) for word in words]
    answer = " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
    if not answer or answer.startswith(NO_ANSWER):
        answer = UNANSWERABLE
    for phrase in LEADING_PHRASES:
        if answer.startswith(phrase):
            answer = answer.split(phrase)[-1]
    return answer


def clean_lmms_eval(text: str, first_pass: bool = True) -> str:
    """Either side by lmms-eval's rules; its VQAv2 task leaves out the `first_pass`."""
    if first_pass:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalize_words(strip_punctuation(trim(text)))


def official_pair(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    prediction, answers = trim(prediction), [trim(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, *answers = (normalize_words(strip_punctuation(text)) for text in (prediction, *answers))
    return prediction, answers


def lavit_pair(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    if len(set(answers)) > 1:
        answers = [strip_punctuation(answer).lower() for answer in answers]
    return clean_lavit(prediction), list(answers)


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """Mean over annotators of min(1, matches among the others / 3), from 0 to 1."""
    matches = sum(answer == prediction for answer in answers)
    scores = (min(1.0, (matches - (answer == prediction)) / AGREEING) for answer in answers)
    return sum(scores) / len(answers)


def question_accuracy(
    question: Question, prediction: str, name: str, protocol: str, lemmatize: Callable[[str], str] | None = None
) -> float:
    """Accuracy of one answer, from 0 to 1.

    Args:
        question: with its annotators' answers.
        prediction: the answer.
        name: of the data set: "vqav2", "okvqa", "gqa" or "vizwiz".
        protocol: one of `PROTOCOLS`.
        lemmatize: turns either side into base forms first; the authors' evaluation does so.

    Raises:
        ValueError: the protocol is not known.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"the protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    answers = question.raw_answers if protocol == "lavit" else question.answers
    if lemmatize is not None:
        prediction, answers = lemmatize(prediction), [lemmatize(answer) for answer in answers]
    if name == "gqa":
        return float(_same(prediction, answers[0], protocol))
    if protocol == "lavit":
        return agreement(*lavit_pair(prediction, answers))
    if protocol == "lmms-eval":
        first_pass = name != "vqav2"
        return agreement(
            clean_lmms_eval(prediction, first_pass), [clean_lmms_eval(text, first_pass) for text in answers]
        )
    if name == "okvqa":
        prediction, answers = stem_answer(prediction), [stem_answer(answer) for answer in answers]
    return agreement(*official_pair(prediction, answers))


def _same(prediction: str, answer: str, protocol: str) -> bool:
    if protocol == "lmms-eval":
        remove = str.maketrans("", "", string.punctuation)
        return prediction.lower().translate(remove) == answer.lower().translate(remove)
    return trim(prediction).lower().removesuffix(".") == trim(answer).lower().removesuffix(".")


def score_answers(
    questions: QuestionSet,
    predictions: dict[str, str],
    protocol: str = "official",
    lemmatize: Callable[[str], str] | None = None,
) -> tuple[dict, dict[str, float]]:
    """Scores answers by question, as far as they and their questions' annotations are there.

    Args:
        questions: with annotations.
        predictions: question id as text to answer.
        protocol, lemmatize: see [`question_accuracy`].

    Returns:
        `overall`, `perAnswerType` and `perQuestionType` in per cent, as the official program names them, GQA's
        `consistency` where the questions that an answer entails were answered too; and the accuracy of every scored
        question in per cent.

    Raises:
        ValueError: nothing can be scored.
    """
    scored = [row for row in questions.rows if row.answers and str(row.id) in predictions]
    if protocol == "lavit" and questions.name == "vizwiz":
        scored = [row for row in scored if row.answerable is not False]
    if not scored:
        raise ValueError("there is no question with both a prediction and annotated answers")
    by_question = {
        str(row.id): 100 * question_accuracy(row, predictions[str(row.id)], questions.name, protocol, lemmatize)
        for row in scored
    }
    counted = [row for row in scored if row.balanced] or scored
    result = {
        "overall": _mean([by_question[str(row.id)] for row in counted]),
        "perQuestionType": _by_type(counted, by_question, lambda row: row.question_type),
        "perAnswerType": _by_type(counted, by_question, lambda row: row.answer_type),
    }
    consistency = [
        _mean([by_question[other] for other in row.entailed if other in by_question])
        for row in scored
        if by_question[str(row.id)] == 100 and any(other in by_question for other in row.entailed)
    ]
    if consistency:
        result["consistency"] = _mean(consistency)
    return result, by_question


def average_precision(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Area under precision over recall, by the sum of precision at each step of recall: VizWiz's answerability."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    total, found, seen, start = sum(labels), 0, 0, 0
    area = 0.0
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:  # equal scores are one step
            end += 1
        gained = sum(labels[order[i]] for i in range(start, end))
        found, seen, start = found + gained, end, end
        area += gained / total * found / seen
    return area


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 9)


def _by_type(
    rows: Sequence[Question], by_question: dict[str, float], kind: Callable[[Question], str]
) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for row in rows:
        if kind(row):
            groups.setdefault(kind(row), []).append(by_question[str(row.id)])
    return {name: _mean(values) for name, values in groups.items()}
