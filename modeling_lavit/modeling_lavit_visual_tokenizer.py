"""The dynamic visual tokenizer: encode, select, merge, quantize (arXiv 2309.04669, section 3.1).

Legend: B images, N patches, C width, K codes in the codebook, D their dimension, n kept patches of one image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import Blip2VisionConfig, Blip2VisionModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_lavit import SELECTIONS, LavitVisualTokenizerConfig
from .layers_lavit import LavitLayer, mixed_precision, take_rows
from .loading_lavit import StrictLoadingMixin


@dataclass
class LavitVisualTokens(ModelOutput):
    """Discrete visual tokens of a batch of images.

    Args:
        codes: (sum of lengths,) int64, the images' codes one after the other, `0 … K-1`.
        lengths: (B,) int64, number of codes of each image.
        keep_mask: (B, N) bool, which patches were kept; None for codes that a language model wrote.
        keep_logprobs: (B, N) float32, log-probability of keeping each patch; None likewise.
        hidden_states, attentions: of the encoder's layers, where they were asked for.
    """

    codes: torch.LongTensor | None = None
    lengths: torch.LongTensor | None = None
    keep_mask: torch.BoolTensor | None = None
    keep_logprobs: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None

    def split(self) -> tuple[torch.LongTensor, ...]:
        """The codes of each image, a 1-D tensor each."""
        return self.codes.split(self.lengths.tolist())

    @classmethod
    def join(cls, rows: Sequence[torch.LongTensor]) -> "LavitVisualTokens":
        """The opposite of [`split`]: from the codes of each image.

        Raises:
            ValueError: there is no row, or one is not 1-D, has no codes, or holds no integers.
        """
        rows = [torch.as_tensor(row) for row in rows]
        if not rows or any(row.ndim != 1 or row.is_floating_point() or not len(row) for row in rows):
            raise ValueError(
                "visual_tokens must be LavitVisualTokens or a list with a 1-D tensor of codes, one at least, for each "
                "image"
            )
        rows = [row.long() for row in rows]
        return cls(codes=torch.cat(rows), lengths=torch.tensor([len(row) for row in rows]))


@dataclass
class LavitVisualFeatures(ModelOutput):
    """Continuous merged features of a batch of images, what the language model reads.

    Args:
        features: (sum of lengths, C).
        lengths, keep_mask, keep_logprobs: as in [`LavitVisualTokens`].
        last_hidden_state: (B, N, C), the encoder's features of all patches.
        hidden_states, attentions: of the encoder's layers, where they were asked for.
    """

    features: torch.FloatTensor | None = None
    lengths: torch.LongTensor | None = None
    keep_mask: torch.BoolTensor | None = None
    keep_logprobs: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None

    def split(self) -> tuple[torch.FloatTensor, ...]:
        """The features of each image, (n, C) each."""
        return self.features.split(self.lengths.tolist())


class LavitResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a 1x1 one: (B, in, H, W) to (B, out, H / stride, W / stride)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(hidden) + self.shortcut(hidden))


class LavitConvolutionalStem(nn.Module):
    """Overlapping convolutions (B, 3, S, S) to (B, C, S / p, S / p) in the place of the linear patch embedding
    (arXiv 2106.14881): one residual block of stride 2 for every halving, one of stride 1, a projection."""

    def __init__(self, config: LavitVisualTokenizerConfig):
        super().__init__()
        halvings = config.patch_size.bit_length() - 1
        widths = [3, *(config.hidden_size >> (halvings - i) for i in range(halvings + 1))]
        strides = [2] * halvings + [1]
        self.blocks = nn.Sequential(
            *(LavitResidualBlock(widths[i], widths[i + 1], strides[i]) for i in range(halvings + 1))
        )
        self.projection = nn.Conv2d(config.hidden_size, config.hidden_size, 1)

    @property
    def weight(self) -> torch.Tensor:
        """What `Blip2VisionModel` asks for the dtype of."""
        return self.projection.weight

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projection(self.blocks(pixel_values))


def build_encoder(config: LavitVisualTokenizerConfig) -> Blip2VisionModel:
    """EVA ViT-g, which is BLIP-2's vision model, with the config's stem; LaVIT reads it before the post norm."""
    encoder = Blip2VisionModel(
        Blip2VisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            layer_norm_eps=config.layer_norm_eps,
            qkv_bias=True,
            hidden_act="gelu",
            initializer_range=config.initializer_range,
            attn_implementation=config._attn_implementation,
        )
    )
    if config.stem == "convolutional":
        encoder.embeddings.patch_embedding = LavitConvolutionalStem(config)
    return encoder


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Standard Gumbel noise, float32, on the generator's device."""
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    tiny = torch.finfo(torch.float32).tiny
    return -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()


class LavitTokenSelector(nn.Module):
    """Log-probabilities of keeping and dropping each patch, from its own features and the mean of all."""

    def __init__(self, config: LavitVisualTokenizerConfig):
        super().__init__()
        width = config.hidden_size
        self.norm = nn.LayerNorm(width, eps=config.merger_layer_norm_eps)
        self.in_proj = nn.Linear(width, width)
        self.hidden_proj1 = nn.Linear(width, width // 2)
        self.hidden_proj2 = nn.Linear(width // 2, width // 4)
        self.out_proj = nn.Linear(width // 4, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, C) to (B, N, 2) float32; index 0 is "keep"."""
        with mixed_precision(self.norm, self.in_proj, features.device):
            hidden = F.gelu(self.in_proj(self.norm(features.to(self.norm.weight.dtype))))
            local_half, global_half = hidden.chunk(2, dim=-1)
            hidden = torch.cat([local_half, global_half.mean(1, keepdim=True).expand_as(global_half)], dim=-1)
            hidden = F.gelu(self.hidden_proj1(hidden))
            hidden = F.gelu(self.hidden_proj2(hidden))
            return F.log_softmax(self.out_proj(hidden).float(), dim=-1)


def gather_rows(
    hidden_states: torch.Tensor, chosen: torch.BoolTensor
) -> tuple[torch.Tensor, torch.BoolTensor, torch.LongTensor]:
    """The chosen rows of every image in order, padded to the most that one image has.

    Args:
        hidden_states: (B, N, C). chosen: (B, N).

    Returns:
        rows (B, R, C), which of them are no padding (B, R), and their places (B, R).
    """
    places = chosen.int().argsort(dim=1, descending=True, stable=True)[:, : int(chosen.sum(1).max())]
    return take_rows(hidden_states, places), chosen.gather(1, places), places


class LavitTokenMerger(nn.Module):
    """Merges the dropped patches into the kept ones: causal self attention among kept patches, cross attention to
    dropped ones (`config.merger_is_causal` and `config.merge_dropped` take either away, to study it).

    Where `attention_epsilon` is 0 no kept row depends on the row of a dropped patch, and kept rows alone are computed.
    With an epsilon all rows are, and the last layer's kept ones alone; or, with `config.kept_only`, kept rows
    throughout: the leak then has its maximum and its mean over kept rows (in cross attention: over dropped ones).
    """

    def __init__(self, config: LavitVisualTokenizerConfig):
        super().__init__()
        self.config = config
        eps = config.merger_layer_norm_eps
        self.context_norm = nn.LayerNorm(config.hidden_size, eps=eps)
        self.layers = nn.ModuleList(
            LavitLayer(config, config.merger_num_attention_heads, eps, config.attention_epsilon)
            for _ in range(config.merger_num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=eps)

    def forward(self, features: torch.Tensor, keep_mask: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features: (B, N, C) of the encoder.
            keep_mask: (B, N), one where a patch is kept; a float mask passes gradients to whoever made it.

        Returns:
            (sum of kept, C), the kept rows in order, image after image.
        """
        kept = keep_mask.bool()
        mask = keep_mask if keep_mask.is_floating_point() else kept.to(features.dtype)
        merge = self._merge_kept if self.config.kept_only or not self.config.attention_epsilon else self._merge_all
        with mixed_precision(self.norm, self.layers[0].mlp.fc1, features.device):
            return merge(features, kept, mask)

    def _merge_all(self, features: torch.Tensor, kept: torch.BoolTensor, mask: torch.Tensor) -> torch.Tensor:
        context = self.context_norm(features)
        cross_allowed = 1 - mask[:, None, None]
        diagonal = torch.eye(features.shape[1], dtype=mask.dtype, device=mask.device)
        self_allowed = torch.maximum(mask[:, None, None] * torch.ones_like(diagonal).tril(), diagonal)
        hidden_states = features
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states, context, self_allowed, cross_allowed)
        self_allowed, is_kept, places = gather_rows(self_allowed[:, 0], kept)
        hidden_states = self.layers[-1](hidden_states, context, self_allowed[:, None], cross_allowed, rows=places)
        return self.norm(hidden_states[is_kept])

    def _merge_kept(self, features: torch.Tensor, kept: torch.BoolTensor, mask: torch.Tensor) -> torch.Tensor:
        hidden_states, is_kept, places = gather_rows(features, kept)
        earlier = torch.ones(places.shape[1], places.shape[1], dtype=mask.dtype, device=mask.device)
        if self.config.merger_is_causal:
            earlier = earlier.tril()
        self_allowed = mask.gather(1, places)[:, None, None] * earlier
        # an image that keeps all patches has its cross attention over all of them, none allowed; a mask that learns
        # needs the kept ones too
        is_key = ~kept | kept.all(1, keepdim=True) | mask.requires_grad
        keys, is_key, key_places = gather_rows(features, is_key)
        cross_allowed = (1 - mask.gather(1, key_places))[:, None, None] * is_key[:, None, None]
        if not self.config.merge_dropped:
            cross_allowed = torch.zeros_like(cross_allowed)
        context = self.context_norm(keys)
        present = {}
        if self.config.attention_epsilon:
            present = {"self_present": is_kept[:, None, None], "cross_present": is_key[:, None, None]}
        for layer in self.layers:
            hidden_states = layer(hidden_states, context, self_allowed, cross_allowed, **present)
        return self.norm(hidden_states[is_kept])


class LavitQuantizer(nn.Module):
    """Projects merged features to the codebook's space and takes the nearest code (paper Eq. 3)."""

    def __init__(self, config: LavitVisualTokenizerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.hidden_size)
        self.fc2 = nn.Linear(config.hidden_size, config.codebook_dim)
        self.codebook = nn.Embedding(config.codebook_size, config.codebook_dim)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Merged features (…, C) to the codebook's space (…, D)."""
        return self.fc2(torch.tanh(self.fc1(features.to(self.fc1.weight.dtype))))

    def nearest(self, projected: torch.Tensor) -> torch.Tensor:
        """(…, D) to the codes (…,) nearest to its unit vector; distances in float32, the lowest code wins a tie."""
        with torch.autocast(projected.device.type, enabled=False):
            unit = F.normalize(projected.float(), dim=-1, eps=1e-12)
            # by its forward, before which offloading brings the weight
            codebook = self.codebook(torch.arange(self.codebook.num_embeddings, device=projected.device)).float()
            return (codebook.pow(2).sum(-1) - 2 * unit @ codebook.T).argmin(-1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Merged features (…, C) to codes (…,) int64."""
        return self.nearest(self.project(features))


class LavitVisualTokenizer(StrictLoadingMixin, PreTrainedModel):
    """Images to a varying number of discrete codes ([`tokenize`]) or continuous features ([`encode`]).

    The same image gives the same codes in every batch, unless noise, a generator or another selection is asked for.
    """

    config_class = LavitVisualTokenizerConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["LavitLayer", "Blip2EncoderLayer"]
    _keep_in_fp32_modules_strict = ["codebook", "layer_norm", "context_norm", "merger.norm", "selector.norm"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: LavitVisualTokenizerConfig):
        super().__init__(config)
        self.encoder = build_encoder(config)
        self.selector = LavitTokenSelector(config)
        self.merger = LavitTokenMerger(config)
        self.quantizer = LavitQuantizer(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, LavitQuantizer):
            init.normal_(module.codebook.weight)
            init.copy_(module.codebook.weight, F.normalize(module.codebook.weight, dim=-1))

    def compile(self, **options) -> None:
        """Compiles every layer in place, each without a graph break; what lies between them depends on how many
        patches are kept. `options`: of `torch.compile`."""
        options = {"fullgraph": True, "dynamic": True} | options
        for layer in (*self.encoder.encoder.layers, self.selector, *self.merger.layers, self.quantizer):
            layer.compile(**options)

    def encode_patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) normalised pixels to the features (B, N, C) of the encoder's last block, no post norm.

        Raises:
            ValueError: pixels of another shape, or that are NaN or infinite.
        """
        self._check_pixels(pixel_values)
        first = self.encoder.encoder.layers[0]
        with mixed_precision(first.layer_norm1, first.mlp.fc1, pixel_values.device):
            embeddings = self.encoder.embeddings(pixel_values.to(self.encoder.dtype))
            embeddings = embeddings.to(first.layer_norm1.weight.dtype)
            return self.encoder.encoder(inputs_embeds=embeddings).last_hidden_state[:, 1:]

    def _check_pixels(self, pixel_values: torch.Tensor) -> None:
        size = self.config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(f"pixel_values must be (batch, 3, {size}, {size}), got {tuple(pixel_values.shape)}")
        if torch.compiler.is_compiling() or pixel_values.is_meta:
            return
        if not bool(pixel_values.isfinite().all()):
            raise ValueError("pixel_values hold NaN or infinite values")

    def select(
        self,
        features: torch.Tensor,
        selection: str | None = None,
        keep_ratio: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        gumbel_noise: torch.Tensor | None = None,
    ) -> tuple[torch.BoolTensor, torch.Tensor]:
        """Decides which patches are kept; at least one of every image.

        Args:
            features: (B, N, C) of the encoder.
            selection: `"sample"`, `"argmax"` or `"all"`; the config's when None.
            keep_ratio: share of the patches to keep, the most probable ones, whatever `selection` says.
            generator: draws the Gumbel noise, image after image; or one generator an image. Without it every image
                gets the noise of `config.selection_seed`.
            gumbel_noise: (B, N, 2), used instead of a draw.

        Returns:
            keep mask (B, N) bool and log-probabilities (B, N, 2) float32, index 0 being "keep".
        """
        selection = selection or (
            "sample" if generator is not None or gumbel_noise is not None else self.config.selection
        )
        if selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {SELECTIONS}, got {selection!r}")
        log_probs = self.selector(features)
        batch, patches, _ = log_probs.shape
        if keep_ratio is not None:
            if not 0 < keep_ratio <= 1:
                raise ValueError(f"keep_ratio must be in (0, 1], got {keep_ratio}")
            scores = log_probs[..., 0] - log_probs[..., 1]
            best = scores.topk(max(1, round(keep_ratio * patches)), dim=1).indices
            return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True), log_probs
        if selection == "all":
            return torch.ones(batch, patches, dtype=torch.bool, device=log_probs.device), log_probs
        scores = log_probs
        if selection == "sample":
            if gumbel_noise is None:
                gumbel_noise = self._draw_noise(batch, patches, generator)
            if gumbel_noise.shape != log_probs.shape:
                raise ValueError(f"gumbel_noise must be {tuple(log_probs.shape)}, got {tuple(gumbel_noise.shape)}")
            if not torch.compiler.is_compiling() and not bool(gumbel_noise.isfinite().all()):
                raise ValueError("gumbel_noise holds NaN or infinite values")
            scores = log_probs + gumbel_noise.to(log_probs)
        margin = scores[..., 0] - scores[..., 1]
        keep = margin >= 0
        best = F.one_hot(margin.argmax(1), patches).bool()
        return keep | (best & ~keep.any(1, keepdim=True)), log_probs

    def _draw_noise(self, batch: int, patches: int, generator) -> torch.Tensor:
        if generator is None:
            noise = gumbel((1, patches, 2), torch.Generator().manual_seed(self.config.selection_seed))
            return noise.expand(batch, -1, -1)
        generators = generator if isinstance(generator, (list, tuple)) else [generator] * batch
        if len(generators) != batch:
            raise ValueError(f"{len(generators)} generators were given for {batch} images")
        return torch.cat([gumbel((1, patches, 2), one) for one in generators])

    def encode(
        self,
        pixel_values: torch.Tensor,
        merger: LavitTokenMerger | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **selection_kwargs,
    ) -> LavitVisualFeatures:
        """Continuous features of the kept patches.

        Args:
            pixel_values: (B, 3, S, S), normalised.
            merger: another merger than the tokenizer's own (the language model's, for reading).
            output_hidden_states, output_attentions: also return those of the encoder's layers; by default as the
                config says.
            selection_kwargs: see [`select`].
        """
        recorded = {
            "output_hidden_states": self._asked_for("output_hidden_states", output_hidden_states),
            "output_attentions": self._asked_for("output_attentions", output_attentions),
        }
        hidden_states = attentions = None
        if any(recorded.values()):
            self._check_pixels(pixel_values)
            encoder = self.encoder(pixel_values.to(self.encoder.dtype), **recorded | {"output_hidden_states": True})
            features = encoder.hidden_states[-1][:, 1:]
            hidden_states = encoder.hidden_states if recorded["output_hidden_states"] else None
            attentions = encoder.attentions
        else:
            features = self.encode_patches(pixel_values)
        keep_mask, log_probs = self.select(features, **selection_kwargs)
        merged = (merger or self.merger)(features, keep_mask)
        return LavitVisualFeatures(
            features=merged,
            lengths=keep_mask.sum(1),
            keep_mask=keep_mask,
            keep_logprobs=log_probs[..., 0],
            last_hidden_state=features,
            hidden_states=hidden_states,
            attentions=attentions,
        )

    def _asked_for(self, name: str, given: bool | None) -> bool:
        return bool(getattr(self.config, name, False) if given is None else given)

    def tokenize(self, pixel_values: torch.Tensor, **kwargs) -> LavitVisualTokens:
        """Discrete codes of the kept patches.

        Args:
            pixel_values: (B, 3, S, S), normalised.
            kwargs: see [`select`] and [`encode`].
        """
        encoded = self.encode(pixel_values, **kwargs)
        return LavitVisualTokens(
            codes=self.quantizer(encoded.features),
            lengths=encoded.lengths,
            keep_mask=encoded.keep_mask,
            keep_logprobs=encoded.keep_logprobs,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> LavitVisualTokens:
        """See [`tokenize`]; `return_dict=False` gives a tuple."""
        return self.tokenize(pixel_values, **kwargs)
