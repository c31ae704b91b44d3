"""Accuracy of answers: every rule of the three protocols, and the records of the official programs."""

import json
from pathlib import Path

import pytest

from modeling_lavit.evaluation.answer_files import Question, QuestionSet, read_answer_predictions, read_questions
from modeling_lavit.evaluation.answers import (
    agreement,
    average_precision,
    clean_lavit,
    clean_lmms_eval,
    lavit_pair,
    normalize_words,
    official_pair,
    question_accuracy,
    score_answers,
    strip_punctuation,
)
from modeling_lavit.evaluation.stems import porter, stem_answer


RECORDS = Path(__file__).parent.parent / "fixtures" / "records" / "answers"
FIXTURES = Path(__file__).parent.parent / "fixtures" / "evaluation"


def question(*answers: str, raw: list[str] | None = None, **fields) -> Question:
    return Question("1", ["a.jpg"], "what?", list(answers), raw or list(answers), **fields)


@pytest.mark.parametrize(
    ("protocol", "suffix"), [("official", ""), ("lavit", "_lavit")], ids=["VQAv2's program", "LaVIT's rules"]
)
def test_the_recorded_scores_are_met_question_by_question(protocol, suffix):
    data = read_questions(RECORDS / "questions.json", RECORDS / "annotations.json")
    result, by_question = score_answers(data, read_answer_predictions(RECORDS / "predictions.json", data), protocol)
    wanted = json.loads((RECORDS / f"by_question{suffix}.json").read_text())
    assert by_question.keys() == wanted.keys() and len(wanted) == 1000
    assert all(abs(by_question[key] - value) < 1e-6 for key, value in wanted.items())
    assert result == json.loads((RECORDS / f"scores{suffix}.json").read_text())


def test_three_who_agree_give_nine_tenths_two_six_tenths_and_one_three_tenths():
    others = [f"other {i}" for i in range(9)]
    for agreeing, accuracy in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        assert agreement("x", ["x"] * agreeing + (others * 2)[: 10 - agreeing]) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("t-shirt", "t shirt"),
        ("blue; red", "blue red"),  # beside a space somewhere: deleted
        ("a-b - c", "ab  c"),
        ("1,000-2", "10002"),  # digit, comma, digit: every mark is deleted
        ("10.5", "10.5"),
        ("yes.", "yes"),
        ("a.b", "ab"),  # the misspelt look-behind: a stop in front of no digit goes, whatever stands before it
        ("1.", "1"),
        ("v.5", "v.5"),
        ("it's", "it's"),
        ("." * 40, "." * 8),  # the flag passed as a count: 32 stops at most
        ("$5&%*'", "$5&%*'"),
    ],
)
def test_punctuation_of_the_official_program(text, wanted):
    assert strip_punctuation(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The Two dogs", "2 dogs"),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("nope", "nope"),
        ("an  apple", "apple"),
        ("Im", "im"),  # the table has capitals, but the words are in lower case by then
    ],
)
def test_words_of_the_official_program(text, wanted):
    assert normalize_words(text) == wanted


def test_where_all_ten_agree_nothing_but_line_breaks_and_tabs_is_normalised():
    assert official_pair("Two\n", ["two"] * 10) == ("Two", ["two"] * 10)
    assert official_pair("new\tyork", ["new\nyork"] * 10) == ("new york", ["new york"] * 10)
    assert official_pair("Two", ["two"] * 9 + ["2"]) == ("2", ["2"] * 10)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("It's a dog.", "dog"),
        ("It is on the table", "table"),  # phrases one after the other, in their order
        ("this is to go to school", "school"),  # what follows the last occurrence
        ("Nope", "no"),
        ("", "unanswerable"),
        ("the", "unanswerable"),
        ("I don't know that", "unanswerable"),
        ("I need to know more", "unanswerable"),
        ("man s", "man s"),  # a phrase counts at the beginning alone
        ("very very big", "big"),
    ],
)
def test_predictions_by_lavits_rules(text, wanted):
    assert clean_lavit(text) == wanted


def test_lavits_rules_treat_annotations_otherwise_than_predictions():
    assert lavit_pair("The Two.", ["The Two."] * 9 + ["x"]) == ("2", ["the two"] * 9 + ["x"])
    assert lavit_pair("Yes", ["Yes"] * 10) == ("yes", ["Yes"] * 10)


def test_lmms_eval_normalises_both_sides_also_where_all_agree():
    two = question(*["two"] * 10)
    assert question_accuracy(two, "2", "vqav2", "official") == 0
    assert question_accuracy(two, "2", "vqav2", "lmms-eval") == 1
    assert clean_lmms_eval("The man's hat, yes?") == "man 's hat yes"
    assert clean_lmms_eval("left,right") == "leftright" and clean_lmms_eval("left,right", False) == "left right"


def test_okvqa_stems_both_sides_officially_and_takes_raw_answers_by_lavits_rules():
    trees = question(*["tree"] * 6, *["plant"] * 4, raw=["trees"] * 6 + ["plants"] * 4)
    assert question_accuracy(trees, "trees", "okvqa", "official") == 1
    assert question_accuracy(trees, "trees", "okvqa", "lavit") == 1
    assert question_accuracy(trees, "tree", "okvqa", "lavit") == 0
    assert question_accuracy(question(*["motorcycle"] * 9, "x"), "motorcycles", "okvqa", "official") == 1


def test_stems_are_porters_after_the_table_of_exceptions():
    words = (
        "caresses ponies ties cats feed agreed plastered motoring conflated hopping falling filing happy relational"
    )
    stems = "caress poni ti cat feed agre plaster motor conflat hop fall file happi relat"
    assert [porter(word) for word in words.split()] == stems.split()
    endings = "triplicate electriciti hopeful revival adoption replacement controll roll probate rate cease"
    assert [
        porter(w) for w in endings.split()
    ] == "triplic electr hope reviv adopt replac control roll probat rate ceas".split()
    assert stem_answer("Riding horses") == "ride hors" and stem_answer("brows") == "brows"


def test_gqa_is_equality_without_case_and_final_stop():
    cat = question("cat")
    assert question_accuracy(cat, "Cat.", "gqa", "official") == 1
    assert question_accuracy(cat, "a cat", "gqa", "official") == 0
    assert question_accuracy(question("t-shirt"), "tshirt", "gqa", "official") == 0
    assert question_accuracy(question("t-shirt"), "TShirt!", "gqa", "lmms-eval") == 1


def test_gqa_consistency_is_that_of_what_right_answers_entail():
    data = read_questions(FIXTURES / "questions_gqa.json")
    result, by_question = score_answers(data, {"201": "cat", "202": "no", "203": "red"})
    assert by_question == {"201": 100, "202": 0, "203": 100} and result["consistency"] == 0
    assert result["perAnswerType"] == {"open": 100, "binary": 50}
    assert "consistency" not in score_answers(data, {"203": "red"})[0]


def test_vizwiz_by_lavits_rules_is_of_answerable_questions_alone():
    data = read_questions(FIXTURES / "questions_vizwiz.json")
    answers = {"0": "cat", "1": "yes", "2": "unanswerable"}
    assert len(score_answers(data, answers, "official")[1]) == 3
    assert len(score_answers(data, answers, "lavit")[1]) == 2


def test_both_sides_can_be_brought_to_base_forms_first():
    dogs = question(*["dogs"] * 9, "cat")
    assert question_accuracy(dogs, "dog", "vqav2", "lavit") == 0
    assert question_accuracy(dogs, "dog", "vqav2", "lavit", lambda text: text.removesuffix("s")) == 1


def test_an_unknown_protocol_and_nothing_to_score_are_refused():
    with pytest.raises(ValueError, match="one of official, lavit, lmms-eval, got 'vqa'"):
        question_accuracy(question("x"), "x", "vqav2", "vqa")
    with pytest.raises(ValueError, match="no question with both"):
        score_answers(QuestionSet("vqav2", [question("x")]), {"2": "x"})


def test_average_precision_steps_over_equal_scores_together():
    assert average_precision([0.9, 0.8, 0.1], [True, False, True]) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision([0.5, 0.5], [True, False]) == average_precision([0.5, 0.5], [False, True]) == 0.5
