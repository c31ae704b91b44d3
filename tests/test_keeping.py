"""The keep dial: a share, a number, a threshold, or the fewest tokens that are decoded well enough."""

from pathlib import Path

import pytest
import torch
from tiny import NUM_PATCHES, tiny_detokenizer, tiny_images

from modeling_lavit import LavitPipeline
from modeling_lavit.checkpoints import LAVIT_EMOJI
from modeling_lavit.command_line import main
from modeling_lavit.keeping_lavit import decoded_cosine, first_patches
from modeling_lavit.processing import load_image


IMAGE = Path(__file__).parent / "fixtures" / "emoji" / "images" / "noto" / "cat-face.png"


@pytest.fixture(scope="module")
def tokenizer(model):
    return model.model.visual_tokenizer


@pytest.fixture(scope="module")
def pipe() -> LavitPipeline:
    pipe = LavitPipeline.from_pretrained(LAVIT_EMOJI, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_a_share_a_number_and_a_threshold_keep_the_most_probable_patches(tokenizer):
    features = tokenizer.encode_patches(tiny_images(3))
    _, log_probs = tokenizer.select(features)
    probability = log_probs[..., 0].exp()
    for keep, count in ((0.25, 4), (1.0, 16), (1, 1), (5, 5), (0.01, 1)):
        mask, _ = tokenizer.select(features, keep=keep)
        assert mask.sum(1).tolist() == [count] * 3
        assert bool((probability[mask].view(3, -1).amin(1) >= probability.masked_fill(mask, 0).amax(1)).all())
    threshold = float(probability.median())
    mask, _ = tokenizer.select(features, keep=f"threshold={threshold}")
    assert torch.equal(mask, probability >= threshold)
    assert tokenizer.select(features, keep="threshold=1")[0].sum(1).tolist() == [1] * 3


def test_keep_as_a_share_is_keep_ratio(tokenizer):
    images = tiny_images(2)
    first, second = tokenizer.tokenize(images, keep=0.3), tokenizer.tokenize(images, keep_ratio=0.3)
    assert torch.equal(first.codes, second.codes) and torch.equal(first.keep_mask, second.keep_mask)


@pytest.mark.parametrize(
    ("dial", "message"),
    [
        ({"keep": 0}, f"from 1 to {NUM_PATCHES} patches, got 0"),
        ({"keep": NUM_PATCHES + 1}, f"from 1 to {NUM_PATCHES} patches, got 17"),
        ({"keep": 1.5}, r"must be in \(0, 1\], got 1.5"),
        ({"keep": float("nan")}, r"must be in \(0, 1\], got nan"),
        ({"keep": True}, "must be a share"),
        ({"keep": "half"}, "like 'threshold=0.7'"),
        ({"keep": "threshold=x"}, "like 'threshold=0.7'"),
        ({"keep": 2, "keep_ratio": 0.5}, "give one of keep_ratio, keep and target_quality"),
        ({"target_quality": 0.5}, "needs the detokenizer"),
    ],
)
def test_a_dial_that_makes_no_sense_is_refused(tokenizer, dial, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.tokenize(tiny_images(1), **dial)


@torch.no_grad()
def test_a_quality_is_reached_by_the_fewest_best_patches(tokenizer):
    detokenizer, pixel_values = tiny_detokenizer(), tiny_images(3)
    features = tokenizer.encode_patches(pixel_values)
    _, log_probs = tokenizer.select(features)
    cosines = torch.stack(
        [
            decoded_cosine(tokenizer, features, first_patches(log_probs, count), detokenizer)
            for count in range(1, NUM_PATCHES + 1)
        ]
    )
    target = float(cosines.amax(0).min())  # what every image reaches
    tokens = tokenizer.tokenize(pixel_values, target_quality=target, detokenizer=detokenizer)
    fewest = (cosines >= target).int().argmax(0) + 1
    assert tokens.lengths.tolist() == fewest.tolist()
    for i, count in enumerate(fewest.tolist()):
        assert torch.equal(tokens.keep_mask[i : i + 1], first_patches(log_probs[i : i + 1], count))
    with pytest.raises(ValueError, match=r"image 0 reach a cosine of -?0\.\d+ at most, target_quality is 0.99"):
        tokenizer.tokenize(pixel_values, target_quality=0.99, detokenizer=detokenizer)
    with pytest.raises(ValueError, match="is a cosine from -1 to 1, got 2"):
        tokenizer.tokenize(pixel_values, target_quality=2, detokenizer=detokenizer)


def test_a_pipeline_reconstructs_by_the_dial(pipe):
    image, options = load_image(IMAGE), {"output_type": "latent", "num_inference_steps": 1}
    assert pipe.reconstruct(image, keep=7, **options).visual_tokens.lengths.tolist() == [7]
    few = pipe.reconstruct(image, target_quality=0.1, **options).visual_tokens.lengths
    assert int(few) < int(pipe.reconstruct(image, target_quality=0.4, **options).visual_tokens.lengths)


def test_the_command_line_has_the_dial(capsys):
    assert main(["tokenize", str(IMAGE), "--keep", "9"]) == 0
    assert capsys.readouterr().out.startswith("9 of 144 patches kept")
    assert main(["tokenize", str(IMAGE), "--target-quality", "0.1"]) == 0
    assert "of 144 patches kept" in capsys.readouterr().out
    assert main(["tokenize", str(IMAGE), "--target-quality", "2"]) == 2
    assert "is a cosine from -1 to 1, got 2" in capsys.readouterr().err
    for wrong in (["--keep", "many"], ["--keep", "3", "--keep-ratio", "0.5"]):
        with pytest.raises(SystemExit) as end:
            main(["tokenize", str(IMAGE), *wrong])
        assert end.value.code == 2
