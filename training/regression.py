"""The paper's other objective for visual tokens, for its ablation (Table 3a): the next code vector is regressed, as
continuous image features are elsewhere, where classification predicts the next code."""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from modeling_lavit.modeling_lavit import LavitForConditionalGeneration
from modeling_lavit.processing import LavitProcessor


class RegressionHead(nn.Module):
    """Hidden states (…, E) to unit vectors (…, D) of the codebook's space."""

    file_name = "regression_head.safetensors"

    def __init__(self, hidden_size: int, codebook_dim: int):
        super().__init__()
        self.projection = nn.Linear(hidden_size, codebook_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.projection(hidden_states).float(), dim=-1)

    def loss(self, hidden_states: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """`1 - cos` to the code vectors (M, D) that come next, (M,)."""
        return 1 - F.cosine_similarity(self(hidden_states), vectors, dim=-1)

    def save(self, folder: Path) -> None:
        save_file(self.state_dict(), folder / self.file_name)

    @classmethod
    def load(cls, folder: Path) -> "RegressionHead":
        tensors = load_file(folder / cls.file_name)
        head = cls(*reversed(tensors["projection.weight"].shape))
        head.load_state_dict(tensors)
        return head


@torch.no_grad()
def draw_by_regression(
    model: LavitForConditionalGeneration,
    head: RegressionHead,
    processor: LavitProcessor,
    prompts: list[str],
    guidance_scale: float,
) -> list[torch.Tensor]:
    """Draws one image a prompt, deterministically: the code nearest to each regressed vector is the next one.

    Where a code follows, the language model's head was trained on `[IMG]` in its place: between that and `[/IMG]` it
    decides whether the image is complete.

    Returns:
        The codes of each image, at least one.
    """
    vocabulary = model.config.vocabulary
    quantizer = model.model.visual_tokenizer.quantizer
    limit = model.config.visual_config.num_patches
    drawn = []
    for prompt in prompts:
        conditional = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"] + [vocabulary.boi_token_id]
        states = [torch.tensor([conditional]), torch.tensor([[vocabulary.boi_token_id]])]
        caches, codes = [None, None], []
        while len(codes) < limit:
            vectors = []
            for stream in (0, 1):
                outputs = model.model(input_ids=states[stream], past_key_values=caches[stream], use_cache=True)
                caches[stream] = outputs.past_key_values
                last = outputs.last_hidden_state[:, -1]
                vectors.append(head(last))
                if stream == 0:
                    logits = model.lm_head(last)[0]
            if codes and logits[vocabulary.eoi_token_id] > logits[vocabulary.boi_token_id]:
                break
            guided = vectors[1] + guidance_scale * (vectors[0] - vectors[1])
            codes.append(int(quantizer.nearest(guided)))
            states = [torch.tensor([[vocabulary.visual_offset + codes[-1]]])] * 2
        drawn.append(torch.tensor(codes))
    return drawn
