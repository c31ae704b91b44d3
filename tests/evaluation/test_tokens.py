"""`lavit evaluate tokens`: lengths, codes and what is kept of the images of a folder."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from modeling_lavit.command_line import main
from modeling_lavit.evaluation.tokens import TokenWorker, compare_pixels, token_items


IMAGES = Path(__file__).parent.parent / "fixtures" / "emoji" / "images" / "noto"


def test_figures_of_a_folder_are_those_of_its_tokens(tmp_path, capsys):
    arguments = ["--images", IMAGES, "--output", tmp_path, "--shares", 0.25, 1, "--reconstruct", "--batch-size", 4]
    assert main(["evaluate", "tokens", *map(str, arguments)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    lengths = [len(row["codes"]) for row in rows]
    codes = [code for row in rows for code in row["codes"]]
    assert len(rows) == 9 and results["mean_length"] == pytest.approx(sum(lengths) / 9)
    assert (results["min_length"], results["max_length"]) == (min(lengths), max(lengths))
    assert results["codes_used"] == len(set(codes))
    shares = [codes.count(code) / len(codes) for code in set(codes)]
    assert results["perplexity"] == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))
    assert [point["mean_length"] for point in results["curve"]] == [36, 144]
    assert -1 < results["feature_cosine"] < 1 and 5 < results["psnr"] < 60 and 0 < results["ssim"] < 1
    assert Image.open(tmp_path / "rate_quality.png").format == "PNG"
    assert f"mean_length: {results['mean_length']:.4g}" in capsys.readouterr().out


def test_the_cosine_is_that_of_the_encoders_features_with_the_decoded_ones():
    worker = TokenWorker()
    (row,) = worker([token_items(IMAGES)[0]])
    pixels = worker.processor.image_processor(Image.open(IMAGES / "cat-face.png"), return_tensors="pt").pixel_values
    with torch.no_grad():
        features = worker.tokenizer.encode_patches(pixels)[0]
        decoded = worker.detokenizer(torch.tensor(row["codes"]), torch.tensor([len(row["codes"])]))
    cosine = torch.nn.functional.cosine_similarity(features, decoded.last_hidden_state[0], dim=-1).mean()
    assert row["cosine"] == pytest.approx(float(cosine), abs=1e-5)


def test_psnr_and_ssim_of_an_image_with_itself_and_with_another():
    image = Image.open(IMAGES / "cat-face.png").convert("RGB")
    other = Image.new("RGB", image.size, "gray")
    same, different = compare_pixels(image, image), compare_pixels(image, other)
    assert (
        same["ssim"] == pytest.approx(1, abs=1e-3)
        and same["psnr"] == 100 > different["psnr"]
        and different["ssim"] < 0.9
    )


def test_a_folder_without_images_and_wrong_shares_are_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["--images", tmp_path / "empty"], "there is no image in the folder"),
        (["--images", tmp_path / "nowhere"], "no folder of images"),
        (["--images", IMAGES, "--shares", "1.5"], "--shares are above 0 and at most 1, got 1.5"),
    ):
        assert main(["evaluate", "tokens", *map(str, arguments), "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
