"""Annotations and predictions in every form that users hold, and what is wrong with them."""

import json
from pathlib import Path

import pytest

from modeling_lavit.evaluation.answer_files import SUBMISSION, coco_names, read_answer_predictions, read_questions
from modeling_lavit.evaluation.caption_files import image_id, read_caption_predictions, read_captions
from modeling_lavit.evaluation.files import Findings, ImageFolder


FIXTURES = Path(__file__).parent.parent / "fixtures" / "evaluation"
BAD = FIXTURES / "bad"
IMAGES = FIXTURES / "images"


@pytest.mark.parametrize(
    ("file", "name", "ids"),
    [
        ("captions_coco.json", "coco", [42, 73, 74]),
        ("captions_karpathy_coco.json", "coco", [42, 73, 74]),
        ("captions_coco_list.json", "coco", [42, 73, 74]),
        ("captions_karpathy_flickr30k.json", "flickr30k", [1007129816, 1009434119, 101362133]),
        ("captions_flickr30k.csv", "flickr30k", [1007129816, 1009434119, 101362133]),
        ("captions_flickr30k.token", "flickr30k", [1007129816, 1009434119, 101362133]),
        ("captions_nocaps.json", "nocaps", [0, 1, 2]),
        ("captions_nocaps_list.json", "nocaps", [0, 1, 2]),
    ],
)
def test_every_form_of_captions_gives_its_images_and_references(file, name, ids):
    data = read_captions(FIXTURES / file)
    assert (data.name, [row.id for row in data.rows]) == (name, ids) and not data.findings.cases
    folder = ImageFolder(IMAGES)
    assert all(folder.find(row.files) for row in data.rows)
    if "list" not in file or name == "coco":
        assert [len(row.captions) for row in data.rows] == [5, 5, 5] and data.rows[1].captions[0] == "bread"
    else:
        assert not any(row.captions for row in data.rows)


@pytest.mark.parametrize(
    ("questions", "annotations", "name"),
    [
        ("questions_vqav2.json", "annotations_vqav2.json", "vqav2"),
        ("questions_vqav2_list.json", None, "vqav2"),
        ("questions_okvqa.json", "annotations_okvqa.json", "okvqa"),
        ("questions_gqa.json", None, "gqa"),
        ("questions_gqa_list.json", None, "gqa"),
        ("questions_vizwiz.json", None, "vizwiz"),
    ],
)
def test_every_form_of_questions_gives_its_images_and_answers(questions, annotations, name):
    data = read_questions(FIXTURES / questions, annotations and FIXTURES / annotations)
    assert (data.name, len(data.rows)) == (name, 3) and not data.findings.cases
    assert all(ImageFolder(IMAGES).find(row.files) for row in data.rows)
    assert {len(row.answers) for row in data.rows} == ({1} if name == "gqa" else {10})
    own = FIXTURES / f"predictions_{name}.json"
    assert len(read_answer_predictions(own, data)) == 3 and not data.findings.cases
    assert all(set(row) == set(SUBMISSION[name]) for row in json.loads(own.read_text()))


def test_a_split_is_chosen_and_a_missing_one_named():
    assert [row.files for row in read_captions(FIXTURES / "captions_flickr30k.csv", "train").rows] == [["1.jpg"]]
    with pytest.raises(ValueError, match=r"no image of the split 'val'; its splits are \['test', 'train'\]"):
        read_captions(FIXTURES / "captions_karpathy_coco.json", "val")
    with pytest.raises(ValueError, match="has no splits: leave out --split val"):
        read_captions(FIXTURES / "captions_coco.json", "val")


def test_doubled_ids_and_empty_captions_are_counted_and_named():
    data = read_captions(BAD / "captions_missing_image.json")
    assert [row.id for row in data.rows] == [42, 999, 73, 74] and len(data.rows[-1].captions) == 1
    assert data.findings.lines() == [
        "empty reference captions, left out: 1 (74)",
        "doubled ids, the first of each is used: 1 (73)",
    ]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: read_captions(BAD / "captions_unknown_shape.json"), "none of the known forms of captions"),
        (lambda: read_captions(BAD / "captions_latin1.json"), "no text in UTF-8"),
        (lambda: read_captions(BAD / "not_json.json"), "is no JSON file"),
        (lambda: read_captions(BAD / "flickr30k.token"), "line 2, is not like"),
        (lambda: read_captions(BAD / "flickr30k.csv"), "line 2: 'raw' is no JSON list"),
        (lambda: read_captions(BAD), "is a folder"),
        (lambda: read_captions(FIXTURES / "questions_vqav2.json"), "none of the known forms of captions"),
        (lambda: read_caption_predictions(BAD / "predictions_cp1251.json", Findings()), "no text in UTF-8"),
        (lambda: read_questions(BAD / "questions_unknown_shape.json"), "none of the known forms of questions"),
        (lambda: read_questions(FIXTURES / "annotations_vqav2.json"), "has answers alone"),
        (lambda: read_questions(FIXTURES / "questions_gqa.json", FIXTURES / "annotations_vqav2.json"), "leave out"),
        (
            lambda: read_questions(FIXTURES / "questions_vqav2.json", BAD / "annotations_wrong_type.json"),
            "an answer of question 73000: 'answer' must be str, got int 5",
        ),
        (lambda: read_questions(None, None), "give --questions"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_says_why(read, message):
    with pytest.raises(ValueError, match=message) as error:
        read()
    assert "\n" not in str(error.value)


def test_predictions_of_the_wrong_type_and_doubled_ones():
    data = read_questions(FIXTURES / "questions_vqav2.json", FIXTURES / "annotations_vqav2.json")
    with pytest.raises(ValueError, match=r"row 0: 'answer' must be str, got list \['noto'\]"):
        read_answer_predictions(BAD / "predictions_wrong_type.json", data)


def test_annotations_of_other_questions_are_refused_and_missing_ones_counted(tmp_path):
    path = tmp_path / "annotations.json"
    data = json.loads((FIXTURES / "annotations_vqav2.json").read_text())
    path.write_text(json.dumps({"annotations": data["annotations"][:2]}))
    read = read_questions(FIXTURES / "questions_vqav2.json", path)
    assert read.findings.counts() == {"questions without annotation": 1}
    path.write_text(json.dumps({"annotations": [data["annotations"][0] | {"question_id": 5}]}))
    with pytest.raises(ValueError, match="the annotations are of other questions"):
        read_questions(FIXTURES / "questions_vqav2.json", path)


def test_captions_given_a_row_each_are_of_one_image(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps([{"image": "a.jpg", "caption": text} for text in ("one", "two")]))
    assert [row.captions for row in read_captions(path).rows] == [["one", "two"]]


def test_images_are_found_by_path_by_name_and_with_any_ending_but_never_outside(tmp_path):
    (tmp_path / "images" / "val2014").mkdir(parents=True)
    inside = tmp_path / "images" / "val2014" / "a.png"
    inside.touch()
    (tmp_path / "secret.png").touch()
    folder = ImageFolder(tmp_path / "images")
    assert folder.find(["val2014/a.png"]) == folder.find(["x/a.png"]) == folder.find(["a.jpg"]) == inside
    assert folder.find(["../secret.png"]) is None and folder.find([str(tmp_path / "secret.png")]) is None
    with pytest.raises(OSError, match="no folder of images"):
        ImageFolder(tmp_path / "nowhere")


def test_of_several_images_of_a_name_the_one_whose_folder_is_named_is_found_or_none(tmp_path):
    for name in ("x/a/1.png", "x/b/1.png", "y/2.png", "y/2.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    folder = ImageFolder(tmp_path)
    assert folder.find(["b/1.png"]) == tmp_path / "x/b/1.png"
    assert folder.find(["1.png"]) is folder.find(["c/1.png"]) is folder.find(["1.jpg"]) is None
    assert folder.find(["2.jpg"]) == tmp_path / "y/2.png"


def test_ids_and_names_of_coco():
    assert image_id("val2014/COCO_val2014_000000000042.jpg") == 42 and image_id("1007129816.jpg") == 1007129816
    assert image_id("cat-2.jpg") == "cat-2"
    assert coco_names(42, "val2014") == ["COCO_val2014_000000000042.jpg", "000000000042.jpg"]
