"""The detokenizer: visual codes to the conditions of a denoising UNet (arXiv 2309.04669, section 3.1, Eq. 5).

Legend: B images, N queries, C width, O feature width.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_lavit import LavitDetokenizerConfig
from .layers_lavit import LavitLayer, eager_attention_forward, requested
from .loading_lavit import StrictLoadingMixin
from .saving_lavit import SavedWithCodeMixin


# Added to the logits of padding: finite, as in the reference, whose image without codes attends to padding alone.
PADDING_LOGIT = -10000.0


@dataclass
class LavitDetokenizerOutput(ModelOutput):
    """Conditions of the UNet.

    Args:
        prompt_embeds: (B, N, sum of `prompt_embed_dims`).
        pooled_prompt_embeds: (B, `pooled_embed_dim`), highres only.
        attention_mask: (B, N) bool, lowres only: which conditions count.
        last_hidden_state: (B, N, O), reconstructed encoder features.
        hidden_states: the queries (B, N, C) before the first layer and after each one, where they were asked for.
    """

    # `ModelOutput` wants a default
    prompt_embeds: torch.Tensor = None  # pyright: ignore[reportAssignmentType]
    pooled_prompt_embeds: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None


class LavitAttentionPool(nn.Module):
    """CLIP's attention pool: one query, the mean, over the mean and all rows; (B, N, O) to (B, pooled)."""

    def __init__(self, config: LavitDetokenizerConfig):
        super().__init__()
        width = config.feature_size
        self.num_heads = config.num_attention_heads
        if width % self.num_heads:
            raise ValueError(f"feature_size {width} is not a multiple of num_attention_heads {self.num_heads}")
        self.position_embedding = nn.Parameter(torch.empty(config.num_queries + 1, width))
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.projection = nn.Linear(width, config.pooled_embed_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = torch.cat([features.mean(1, keepdim=True), features], dim=1) + self.position_embedding
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in (self.query(hidden[:, :1]), self.key(hidden), self.value(hidden))
        )
        pooled, _ = eager_attention_forward(self, query, key, value, None, query.shape[-1] ** -0.5)
        return self.projection(pooled.flatten(2)[:, 0])


class LavitDetokenizer(SavedWithCodeMixin, StrictLoadingMixin, PreTrainedModel):
    """Query tokens read the codes by cross attention and become reconstructed features (paper section 3.1), which are
    projected to the conditions of a UNet (Eq. 5).

    A code's position is its rank in the sequence: which patch it came from is not known.
    """

    config_class = LavitDetokenizerConfig
    main_input_name = "codes"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LavitLayer"]
    _keep_in_fp32_modules_strict = ["codebook"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: LavitDetokenizerConfig):
        super().__init__(config)
        self.codebook = nn.Embedding(config.codebook_size, config.codebook_dim)
        self.in_proj = nn.Linear(config.codebook_dim, config.hidden_size)
        self.position_embedding = nn.Parameter(torch.empty(1, config.num_queries, config.hidden_size))
        self.query_embedding = nn.Parameter(torch.empty(1, config.num_queries, config.hidden_size))
        self.layers = nn.ModuleList(
            LavitLayer(config, config.num_attention_heads, config.layer_norm_eps, epsilon=0.0)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.hidden_size)
        self.fc2 = nn.Linear(config.hidden_size, config.feature_size)
        self.prompt_projections = nn.ModuleList(
            nn.Linear(config.feature_size, width) for width in config.prompt_embed_dims
        )
        if config.variant == "highres":
            self.attention_pool = LavitAttentionPool(config)
        else:
            self.unconditional_embedding = nn.Parameter(
                torch.empty(config.num_unconditional_tokens, config.prompt_embed_dims[0])
            )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, LavitDetokenizer):
            init.normal_(module.position_embedding, std=std)
            init.normal_(module.query_embedding, std=std)
            if self.config.variant == "lowres":
                init.normal_(module.unconditional_embedding, std=std)
        elif isinstance(module, LavitAttentionPool):
            init.normal_(module.position_embedding, std=std)

    def pad(self, codes: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed codes (sum,) to padded code vectors (B, n_max, D) and their mask (B, n_max) bool."""
        for name, values in (("codes", codes), ("lengths", lengths)):
            if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
                raise ValueError(f"{name} must be whole numbers, got {values.dtype}")
        if codes.ndim != 1 or int(lengths.sum()) != len(codes):
            raise ValueError(f"codes must be packed, {int(lengths.sum())} by lengths, got {tuple(codes.shape)}")
        longest = int(lengths.max())
        if longest > self.config.num_queries:
            raise ValueError(f"an image has {longest} codes, but at most {self.config.num_queries} can be decoded")
        if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.codebook_size:
            raise ValueError(
                f"codes must be in 0 … {self.config.codebook_size - 1}, got {int(codes.min())} … {int(codes.max())}; "
                "ids of the language model have the visual offset added"
            )
        mask = torch.arange(max(longest, 1), device=lengths.device) < lengths[:, None]
        found = self.codebook(codes)
        vectors = found.new_zeros(*mask.shape, self.config.codebook_dim)
        vectors[mask] = found
        return vectors, mask

    def decode(
        self, vectors: torch.Tensor, mask: torch.Tensor, hidden_states: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Padded code vectors (B, n, D) and mask (B, n) to reconstructed features (B, N, O).

        `hidden_states` gets the queries (B, N, C) before the first layer and after each one.
        """
        hidden = self.in_proj(vectors.to(self.in_proj.weight.dtype)) * mask[..., None]
        context = hidden + self.position_embedding[:, : hidden.shape[1]]
        attention_mask = (~mask)[:, None, None].to(hidden.dtype) * PADDING_LOGIT
        queries = self.query_embedding.expand(len(hidden), -1, -1)
        attention_mask = attention_mask.expand(-1, -1, queries.shape[1], -1)
        if hidden_states is not None:
            hidden_states.append(queries)
        for layer in self.layers:
            queries = layer(queries, context, cross_attention_mask=attention_mask)
            if hidden_states is not None:
                hidden_states.append(queries)
        return self.fc2(torch.tanh(self.fc1(self.norm(queries))))

    def conditions(self, features: torch.Tensor) -> LavitDetokenizerOutput:
        """Reconstructed features (B, N, O) to the UNet's conditions."""
        prompt_embeds = torch.cat([projection(features) for projection in self.prompt_projections], dim=-1)
        if self.config.variant == "highres":
            return LavitDetokenizerOutput(prompt_embeds, self.attention_pool(features), last_hidden_state=features)
        mask = torch.ones(prompt_embeds.shape[:2], dtype=torch.bool, device=prompt_embeds.device)
        return LavitDetokenizerOutput(prompt_embeds, attention_mask=mask, last_hidden_state=features)

    @can_return_tuple
    def forward(
        self,
        codes: torch.Tensor,
        lengths: torch.Tensor,
        output_hidden_states: bool | list[int] | None = None,
    ) -> LavitDetokenizerOutput:
        """
        Args:
            codes: (sum of lengths,) int64 in 0 … K-1, image after image.
            lengths: (B,) int64, 1 … `num_queries` each.
            output_hidden_states: also return the queries of all layers, or of those on a list; by default as the
                config says.

        Returns:
            `prompt_embeds` (B, `num_queries`, sum of `prompt_embed_dims`), and by variant `pooled_prompt_embeds` (B,
            `pooled_embed_dim`) or `attention_mask` (B, `num_queries`).

        Raises:
            ValueError: an image of no codes or of too many, codes out of range or of another kind of number, or
                lengths that do not fit.
        """
        if lengths.ndim != 1 or not len(lengths) or int(lengths.min()) < 1:
            raise ValueError(f"lengths must be one an image, each from 1 on, got {lengths.tolist()}")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states: list[torch.Tensor] | None = [] if output_hidden_states else None
        output = self.conditions(self.decode(*self.pad(codes, lengths), hidden_states=states))
        if states is not None:
            output.hidden_states = requested(tuple(states), output_hidden_states)
        return output

    def unconditional(self, batch_size: int, device: torch.device | None = None) -> LavitDetokenizerOutput:
        """The conditions of the unconditional stream: zeros, or (lowres) the learnt rows, zero-padded and masked.

        `device` is the model's own by default; weights that are offloaded have none.
        """
        device = device or self.device
        queries, width = self.config.num_queries, sum(self.config.prompt_embed_dims)
        prompt_embeds = torch.zeros(batch_size, queries, width, dtype=self.dtype, device=device)
        if self.config.variant == "highres":
            pooled = torch.zeros(batch_size, self.config.pooled_embed_dim, dtype=self.dtype, device=device)
            return LavitDetokenizerOutput(prompt_embeds, pooled)
        learnt = min(queries, self.config.num_unconditional_tokens)
        prompt_embeds[:, :learnt] = self.unconditional_embedding[:learnt].to(self.dtype)
        mask = (torch.arange(queries, device=device) < learnt).expand(batch_size, -1)
        return LavitDetokenizerOutput(prompt_embeds, attention_mask=mask)
