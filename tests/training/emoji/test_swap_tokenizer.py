"""Another tokenizer under what was trained: tokenizers that differ from the embedded one in known ways."""

import copy
import json

import pytest
import torch
from parts import EMOJI
from tiny import tiny_model

from modeling_lavit import LavitDetokenizer, LavitForConditionalGeneration, LavitProcessor, LavitVisualTokenizer
from modeling_lavit.checkpoints import LAVIT_EMOJI
from modeling_lavit.training.data.augmentation import normalize_images
from modeling_lavit.training.emoji.images import NamedImages
from modeling_lavit.training.emoji.pseudo_targets import read_codes
from modeling_lavit.training.emoji.swap_tokenizer import main, swap_in_detokenizer, swap_in_language_model


pytestmark = pytest.mark.slow


ORDER = torch.randperm(4096, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def images() -> NamedImages:
    return NamedImages(str(EMOJI), 48)


@pytest.fixture(scope="module")
def pixels(images) -> torch.Tensor:
    return normalize_images(images.images[:12].float() / 255)


@pytest.fixture
def model() -> LavitForConditionalGeneration:
    return LavitForConditionalGeneration.from_pretrained(LAVIT_EMOJI, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> LavitVisualTokenizer:
    model = LavitForConditionalGeneration.from_pretrained(LAVIT_EMOJI, dtype=torch.float32)
    return model.model.visual_tokenizer.eval()


@pytest.fixture(scope="module")
def detokenizer() -> LavitDetokenizer:
    return LavitDetokenizer.from_pretrained(LAVIT_EMOJI / "detokenizer", dtype=torch.float32).eval()


@torch.no_grad()
def shuffled(part):
    """The same with its codes in another order: the old code `ORDER[i]` is the new code i."""
    part = copy.deepcopy(part)
    codebook = part.quantizer.codebook if isinstance(part, LavitVisualTokenizer) else part.codebook
    codebook.weight.copy_(codebook.weight[ORDER])
    return part


@torch.no_grad()
def test_codes_in_another_order_are_found(model, tokenizer, images, pixels):
    other = shuffled(tokenizer)
    old = [table.weight.clone() for table in (model.get_input_embeddings(), model.lm_head)]
    model.model.understanding.merger.load_state_dict(tokenizer.merger.state_dict())  # what is read can be the same
    features = model.get_image_features(pixels).pooler_output
    processor = LavitProcessor.from_pretrained(LAVIT_EMOJI)
    captions = read_codes(model, processor, list(model.get_image_tokens(pixels).split()))
    assert model.draft_codes is not None

    swap_in_language_model(model, other, images)

    new_codes = model.get_image_tokens(pixels)
    assert torch.equal(ORDER[new_codes.codes], tokenizer.tokenize(pixels).codes)
    offset = model.config.vocabulary.visual_offset
    for table, before in zip((model.get_input_embeddings(), model.lm_head), old, strict=True):
        torch.testing.assert_close(table.weight[:offset], before[:offset], rtol=0, atol=0)
        torch.testing.assert_close(table.weight[offset + new_codes.codes], before[offset + ORDER[new_codes.codes]])
    for now, before in zip(model.get_image_features(pixels).pooler_output, features, strict=True):
        torch.testing.assert_close(now, before, rtol=1e-2, atol=1e-2)
    assert read_codes(model, processor, list(new_codes.split())) == captions
    assert model.draft_codes is None  # the codes that it knew are those of the old tokenizer


@torch.no_grad()
def test_the_readout_gives_what_the_unet_knows(tokenizer, detokenizer, images, pixels):
    other = shuffled(detokenizer)
    mix = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(1)))[0]
    other.fc2.weight.copy_(2 * mix @ other.fc2.weight)
    other.fc2.bias.copy_(2 * mix @ other.fc2.bias)
    tokens, others = tokenizer.tokenize(pixels), shuffled(tokenizer).tokenize(pixels)
    wanted = detokenizer(tokens.codes, tokens.lengths).prompt_embeds
    assert (other(others.codes, others.lengths).prompt_embeds - wanted).abs().mean() > 0.1

    swap_in_detokenizer((tokenizer, detokenizer), (shuffled(tokenizer), other), images)

    torch.testing.assert_close(other(others.codes, others.lengths).prompt_embeds, wanted, rtol=1e-2, atol=1e-2)


def test_sizes_must_fit(images, tokenizer):
    with pytest.raises(ValueError, match="other sizes than that of the language model"):
        swap_in_language_model(tiny_model(), tokenizer, images)


def test_language_model_and_pixel_decoder_must_know_the_same_codes(images, tokenizer, detokenizer):
    with pytest.raises(ValueError, match="different codebooks"):
        swap_in_detokenizer((tokenizer, shuffled(detokenizer)), (tokenizer, detokenizer), images)


def test_results_are_starts_of_both_stages(tmp_path, tokenizer, detokenizer, capsys):
    tokenizer.save_pretrained(tmp_path / "new" / "visual_tokenizer")
    detokenizer.save_pretrained(tmp_path / "new" / "detokenizer")
    folders = {"--tokenizer": tmp_path / "new", "--data": EMOJI, "--output": tmp_path / "out"}
    arguments = [str(part) for pair in folders.items() for part in pair]
    main([*arguments, "--language-model", str(LAVIT_EMOJI), "--pixel-decoder", str(LAVIT_EMOJI)])
    assert "of 4096" in capsys.readouterr().out
    model = LavitForConditionalGeneration.from_pretrained(tmp_path / "out" / "language_model", dtype=torch.float32)
    LavitProcessor.from_pretrained(tmp_path / "out" / "language_model")
    assert torch.equal(model.model.visual_tokenizer.quantizer.codebook.weight, tokenizer.quantizer.codebook.weight)
    parts = {path.name for path in (tmp_path / "out" / "pixel_decoder").iterdir()}
    assert parts == {"unet", "vae", "scheduler", "detokenizer"}
    assert json.loads((tmp_path / "out" / "pixel_decoder" / "unet" / "config.json").read_text())
