"""The dynamic visual tokenizer: encode, select, merge, quantize (arXiv 2309.04669, section 3.1).

Legend: B images, N patches, C width, K codes in the codebook, D their dimension, n kept patches of one image.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import can_return_tuple

from .configuration_lavit import SELECTIONS, LavitVisualTokenizerConfig
from .encoder_lavit import build_encoder
from .keeping_lavit import keep_best, keep_for_quality
from .layers_lavit import LavitLayer, mixed_precision, requested, take_rows
from .loading_lavit import StrictLoadingMixin
from .saving_lavit import TRANSFORMERS_CODE, SavedWithCodeMixin, write_json
from .visual_tokens_lavit import LavitVisualFeatures, LavitVisualTokens


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


def gather_rows(hidden_states: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The chosen rows of every image in order, padded to the most that one image has.

    Args:
        hidden_states: (B, N, C). chosen: (B, N) bool.

    Returns:
        rows (B, R, C), which of them are no padding (B, R) bool, and their positions (B, R) int64.
    """
    positions = chosen.int().argsort(dim=1, descending=True, stable=True)[:, : int(chosen.sum(1).max())]
    return take_rows(hidden_states, positions), chosen.gather(1, positions), positions


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
        first: Any = self.layers[0]
        with mixed_precision(self.norm, first.mlp.fc1, features.device):
            return merge(features, kept, mask)

    def _merge_all(self, features: torch.Tensor, kept: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        context = self.context_norm(features)
        cross_allowed = 1 - mask[:, None, None]
        diagonal = torch.eye(features.shape[1], dtype=mask.dtype, device=mask.device)
        self_allowed = torch.maximum(mask[:, None, None] * torch.ones_like(diagonal).tril(), diagonal)
        hidden_states = features
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states, context, self_allowed, cross_allowed)
        self_allowed, is_kept, positions = gather_rows(self_allowed[:, 0], kept)
        hidden_states = self.layers[-1](hidden_states, context, self_allowed[:, None], cross_allowed, rows=positions)
        return self.norm(hidden_states[is_kept])

    def _merge_kept(self, features: torch.Tensor, kept: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden_states, is_kept, positions = gather_rows(features, kept)
        earlier = torch.ones(positions.shape[1], positions.shape[1], dtype=mask.dtype, device=mask.device)
        if self.config.merger_is_causal:
            earlier = earlier.tril()
        self_allowed = mask.gather(1, positions)[:, None, None] * earlier
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


class LavitVisualTokenizer(SavedWithCodeMixin, StrictLoadingMixin, PreTrainedModel):
    """Images to a varying number of discrete codes ([`tokenize`]) or continuous features ([`encode`]), paper section
    3.1, Eq. 1 to 3.

    The same image gives the same codes in every batch, unless noise, a generator or another selection is asked for.
    """

    config_class = LavitVisualTokenizerConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # pyright: ignore[reportAssignmentType]
    supports_gradient_checkpointing = True
    _no_split_modules = ["LavitLayer", "Blip2EncoderLayer"]
    _keep_in_fp32_modules_strict = [
        "codebook",
        "context_norm",
        "cross_attn_layer_norm",
        "layer_norm1",
        "layer_norm2",
        "merger.norm",
        "mlp_layer_norm",
        "selector.norm",
        "self_attn_layer_norm",
    ]
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
        first: Any = self.encoder.encoder.layers[0]
        with mixed_precision(first.layer_norm1, first.mlp.fc1, pixel_values.device):
            embeddings = self.encoder.embeddings(pixel_values.to(self.encoder.dtype))
            embeddings = embeddings.to(first.layer_norm1.weight.dtype)
            return self.encoder.encoder(inputs_embeds=embeddings).last_hidden_state[:, 1:]

    def _check_pixels(self, pixel_values: torch.Tensor) -> None:
        size = self.config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(f"pixel_values must be (batch, 3, {size}, {size}), got {tuple(pixel_values.shape)}")
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be normalised floats, got {pixel_values.dtype}: let the image processor make them"
            )
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
        keep: float | int | str | None = None,
        target_quality: float | None = None,
        detokenizer: PreTrainedModel | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decides which patches are kept; at least one of every image.

        Args:
            features: (B, N, C) of the encoder.
            selection: `"sample"`, `"argmax"` or `"all"`; the config's when None.
            keep_ratio: share of the patches, above 0 and at most 1: the most probable ones, as with `keep`.
            generator: draws the Gumbel noise, image after image; or a list with one for each image. Without it every
                image gets the noise of `config.selection_seed`.
            gumbel_noise: (B, N, 2), used instead of a draw.
            keep: the most probable patches, whatever `selection` says: a share (float), a number (int), or
                `"threshold=0.7"`, a probability; see [`keep_best`].
            target_quality: as few of the most probable patches as are decoded to features of this mean cosine with
                the encoder's; see [`keep_for_quality`].
            detokenizer: the [`LavitDetokenizer`] that decodes them; `target_quality` needs it.

        Returns:
            keep mask (B, N) bool and log-probabilities (B, N, 2) float32, index 0 being "keep".

        Raises:
            ValueError: an unknown selection, more than one of the dials, values out of range, noise of another shape
                or not finite, or a wrong number of generators.
        """
        selection = selection or (
            "sample" if generator is not None or gumbel_noise is not None else self.config.selection
        )
        if selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {SELECTIONS}, got {selection!r}")
        log_probs = self.selector(features)
        batch, patches, _ = log_probs.shape
        if sum(dial is not None for dial in (keep_ratio, keep, target_quality)) > 1:
            raise ValueError("give one of keep_ratio, keep and target_quality")
        if target_quality is not None:
            return keep_for_quality(self, features, log_probs, target_quality, detokenizer), log_probs
        dial = keep if keep_ratio is None else float(keep_ratio)
        if dial is not None:
            return keep_best(log_probs, dial), log_probs
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
        kept = margin >= 0
        best = F.one_hot(margin.argmax(1), patches).bool()
        return kept | (best & ~kept.any(1, keepdim=True)), log_probs

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
        merger: nn.Module | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        **selection_kwargs,
    ) -> LavitVisualFeatures:
        """Continuous features of the kept patches.

        Args:
            pixel_values: (B, 3, S, S), normalised.
            merger: of features and keep mask, in place of the tokenizer's own (the language model's, for reading).
            output_hidden_states, output_attentions: also return those of the encoder's layers (hidden states also of
                those on a list alone); by default as the config says.
            selection_kwargs: see [`select`].

        Raises:
            ValueError: pixels of another shape, NaN or infinite ones, and what [`select`] refuses.
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
            hidden_states = requested(encoder.hidden_states, recorded["output_hidden_states"])
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

    def _asked_for(self, name: str, given: bool | list[int] | None) -> bool | list[int]:
        return (getattr(self.config, name, False) if given is None else given) or False

    def tokenize(self, pixel_values: torch.Tensor, **kwargs) -> LavitVisualTokens:
        """Discrete codes of the kept patches.

        Args:
            pixel_values: (B, 3, S, S), normalised.
            kwargs: see [`select`] and [`encode`].

        Raises:
            ValueError: as [`encode`].
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

    def decode_features(self, codes: torch.Tensor) -> torch.Tensor:
        """The quantized features that codes stand for: rows of the codebook as they are stored (paper Eq. 3).

        The encoder's features of all patches come back from these by [`LavitDetokenizer`] alone.

        Args:
            codes: (…,) int64 in 0 … K-1, such as `tokens.codes`.

        Returns:
            (…, D) float32.

        Raises:
            ValueError: they are no codes.
        """
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"codes must be whole numbers, got {codes.dtype}")
        size = self.config.codebook_size
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise ValueError(
                f"codes must be in 0 … {size - 1}, got {int(codes.min())} … {int(codes.max())}; ids of the language "
                "model have the visual offset added"
            )
        return self.quantizer.codebook(codes)

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> LavitVisualTokens:
        """See [`tokenize`]; `return_dict=False` gives a tuple."""
        return self.tokenize(pixel_values, **kwargs)

    def save_extra_files(self, folder: Path) -> None:
        """The configuration of the image processor that images for it go through."""
        side = self.config.image_size
        config = {
            "auto_map": {"AutoImageProcessor": f"{TRANSFORMERS_CODE}.LavitImageProcessor"},
            "image_processor_type": "LavitImageProcessor",
            "size": {"height": side, "width": side},
        }
        write_json(folder / "preprocessor_config.json", config)
