"""CIDEr-D, BLEU and ROUGE-L against the figures of the official programs."""

import json
from pathlib import Path

import pytest

from modeling_lavit.evaluation.caption_files import read_caption_predictions, read_captions
from modeling_lavit.evaluation.captions import longest_common, score_captions
from modeling_lavit.evaluation.files import Findings


RECORDS = Path(__file__).parent.parent / "fixtures" / "records" / "captions"


@pytest.fixture(scope="module")
def recorded():
    references = {str(row.id): row.captions for row in read_captions(RECORDS / "references.json").rows}
    predictions = read_caption_predictions(RECORDS / "predictions.json", Findings())
    return {key: predictions[key] for key in references}, references


@pytest.fixture(scope="module")
def scored(recorded):
    return score_captions(*recorded)


def test_the_recorded_scores_of_pycocoevalcap_are_met(scored):
    scores, by_image = scored
    wanted = json.loads((RECORDS / "scores.json").read_text())
    assert scores.keys() == wanted.keys()
    assert all(abs(scores[name] - value) < 1e-6 for name, value in wanted.items())
    mean = sum(row["CIDEr"] for row in by_image.values()) / len(by_image)
    assert len(by_image) == 500 and abs(mean - wanted["CIDEr"]) < 1e-6


def test_a_part_of_the_images_has_document_frequencies_of_its_own(recorded, scored):
    predictions, references = recorded
    part = dict(list(predictions.items())[:50])
    scores, by_image = score_captions(part, references)
    assert by_image.keys() == part.keys()
    _, of_all = scored
    assert all(by_image[key]["ROUGE_L"] == of_all[key]["ROUGE_L"] for key in part)
    assert abs(scores["CIDEr"] - sum(of_all[key]["CIDEr"] for key in part) / len(part)) > 0.01


def test_an_empty_caption_scores_nothing_and_hurts_no_other(recorded, scored):
    predictions, references = recorded
    _, before = scored
    key = next(key for key, row in before.items() if row["CIDEr"] > 1)
    _, by_image = score_captions(predictions | {key: ""}, references)
    assert by_image[key]["CIDEr"] == by_image[key]["ROUGE_L"] == 0 and by_image[key]["Bleu_1"] < 1e-3
    assert all(by_image[other] == before[other] for other in before if other != key)


def test_images_without_references_are_refused():
    with pytest.raises(ValueError, match="1 images have no reference captions, the first is 'b'"):
        score_captions({"a": "x", "b": "y"}, {"a": ["x"], "b": []})
    with pytest.raises(ValueError, match="no captions"):
        score_captions({}, {})


def test_the_longest_common_subsequence_need_not_be_adjacent():
    assert longest_common("a b c d e".split(), "x b y d e".split()) == 3
    assert longest_common([], ["a"]) == 0


def test_a_token_of_several_words_is_one_for_rouge_alone():
    references = {"a": ["eat 1 1/2 pies now"], "b": ["a dog"]}
    _, by_image = score_captions({"a": "eat 1 1/2 cakes now", "b": "a cat"}, references)
    # as pycocoevalcap scores them: 4 of 5 words for BLEU, 3 of 4 for ROUGE-L
    assert by_image["a"]["Bleu_1"] == pytest.approx(0.8) and by_image["a"]["ROUGE_L"] == pytest.approx(0.75)
