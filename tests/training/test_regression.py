"""The paper's other objective: the regression head draws what it regresses."""

import torch

from modeling_lavit import LavitProcessor
from modeling_lavit.checkpoints import LAVIT_EMOJI
from modeling_lavit.training.regression import RegressionHead, draw_by_regression


def test_the_regression_head_points_at_vectors_and_comes_back_from_a_file(tmp_path):
    head = RegressionHead(16, 8)
    states = torch.randn(5, 16)
    vectors = head(states)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(head.loss(states, vectors), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(head.loss(states, -3 * vectors), torch.full((5,), 2.0))
    head.save(tmp_path)
    assert torch.equal(RegressionHead.load(tmp_path)(states), vectors)


@torch.no_grad()
def test_drawing_by_regression_takes_the_nearest_code_of_the_guided_vector(model):
    """Step by step without a cache, it is the same image."""
    processor = LavitProcessor.from_pretrained(LAVIT_EMOJI)
    vocabulary = model.config.vocabulary

    class Tokenizer:  # the tiny model has a vocabulary of its own
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [ord(letter) % vocabulary.text_vocab_size for letter in text]}

    processor.tokenizer = Tokenizer()
    torch.manual_seed(0)
    head = RegressionHead(model.config.text_config.hidden_size, model.config.visual_config.codebook_dim)
    drawn = draw_by_regression(model, head, processor, ["cat", "a dog"], 2.0)
    for prompt, codes in zip(["cat", "a dog"], drawn, strict=True):
        assert 1 <= len(codes) <= model.config.visual_config.num_patches
        streams = [processor.tokenizer(prompt, False)["input_ids"] + [vocabulary.boi_token_id]]
        streams += [[vocabulary.boi_token_id]]
        for code in codes.tolist():
            one, other = (head(model.model(input_ids=torch.tensor([ids])).last_hidden_state[:, -1]) for ids in streams)
            guided = other + 2.0 * (one - other)
            assert int(model.model.visual_tokenizer.quantizer.nearest(guided)) == code
            streams = [[*ids, vocabulary.visual_offset + code] for ids in streams]
