"""How probable given texts or images are behind prompts: for ranking answers, retrieval, and harnesses.

B prompts, T continuations, P positions of the filled prompts, V ids. Ids and masks are int64.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from .compat_lavit import CACHE_NAME
from .filling_lavit import LavitPrompt, begin_images, fill_prompt
from .slots_lavit import pad
from .visual_tokens_lavit import LavitVisualTokens


Ids = Sequence[int] | torch.Tensor


class LavitScoringMixin(PreTrainedModel if TYPE_CHECKING else object):
    """Adds [`score`] to a model that generates."""

    model: Any  # a LavitModel
    get_image_tokens: Callable[..., LavitVisualTokens]
    _compute_logits: Callable[..., torch.Tensor]
    _on_device: Callable[[torch.Tensor | None], torch.Tensor | None]

    @torch.no_grad()
    def score(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        *,
        continuations: Sequence[Ids] | Sequence[Sequence[Ids]] | None = None,
        continuation_images: torch.Tensor | None = None,
        batch_size: int = 64,
        return_greedy: bool = False,
        **selection,
    ) -> torch.Tensor | list[torch.Tensor] | tuple:
        """Log-likelihoods of given texts, or images, behind every prompt, which is read once for all of them.

        ```python
        prompts = processor(images=images, text=["<image>"] * len(images))
        texts = [processor.tokenizer(text, add_special_tokens=False).input_ids for text in ("a cat", "a dog")]
        model.score(**prompts, continuations=texts)                          # (images, 2)
        prompts = processor(text=["a cat", "a dog"], generation_mode="image")
        model.score(**prompts, continuation_images=pixel_values)             # (2, images)
        ```

        Args:
            input_ids, attention_mask: (B, L) prompts.
            pixel_values: (images, 3, H, W), one for every slot of the prompts; read as continuous features in front
                of text, as codes in front of images.
            continuations: ids of T texts that all prompts have, or a list of texts for each prompt. Nothing is added:
                an end of the sequence counts where its id is among them. Codes of an image are `codes` and `[/IMG]`
                behind a prompt that ends with `[IMG]`.
            continuation_images: (T, 3, H, W), instead: their codes and `[/IMG]`, behind the `[IMG]` that ends the
                prompts (it is added where it is missing).
            batch_size: rows of the language model at once.
            return_greedy: also return, in the same form, whether every id is the most probable one at its place.
            selection: which patches of the images are kept, see `LavitVisualTokenizer.select`.

        Returns:
            (B, T) float32, sums over the continuation's ids of the log-probability among all V ids; or a list of B
            tensors (T_i,) where every prompt has its own texts. With `return_greedy` a tuple of that and the bools.

        Raises:
            ValueError: both or neither kind of continuation, an empty one, ids that the vocabulary has not, or lists
                for another number of prompts.
        """
        if (continuations is None) == (continuation_images is None):
            raise ValueError("give either continuations, ids of texts, or continuation_images")
        move, drawing = self._on_device, continuation_images is not None
        prompt = LavitPrompt(move(input_ids), move(attention_mask), move(pixel_values), selection)
        if continuation_images is not None:
            continuations = self._image_ids(continuation_images, selection)
            prompt = begin_images(prompt, self.config.vocabulary, 0)
        own = [self._as_ids(texts) for texts in self._per_prompt(continuations, len(input_ids))]
        scores, greedy = [], []
        for start in range(0, len(own), batch_size):
            rows = range(start, min(start + batch_size, len(own)))
            part = _rows_of(prompt, rows, self.config.vocabulary)
            for row_scores, row_greedy in self._score_part(part, [own[i] for i in rows], batch_size, drawing):
                scores.append(row_scores)
                greedy.append(row_greedy)
        if drawing or not _is_nested(continuations):
            scores, greedy = torch.stack(scores), torch.stack(greedy)
        return (scores, greedy) if return_greedy else scores

    def _image_ids(self, pixel_values: torch.Tensor, selection: dict) -> list[torch.Tensor]:
        """The images' code ids, `[/IMG]` behind each."""
        tokens = self.get_image_tokens(self._on_device(pixel_values), **selection)
        end = tokens.codes.new_tensor([self.config.vocabulary.eoi_token_id])
        return [torch.cat([self.config.vocabulary.ids_of(codes), end]) for codes in tokens.split()]

    def _per_prompt(self, continuations: Any, prompts: int) -> list[Sequence[Ids]]:
        if not _is_nested(continuations):
            return [continuations] * prompts
        if len(continuations) != prompts:
            raise ValueError(f"{len(continuations)} lists of continuations were given for {prompts} prompts")
        return list(continuations)

    def _as_ids(self, texts: Sequence[Ids]) -> list[torch.Tensor]:
        rows = [torch.as_tensor(ids, dtype=torch.long, device=self.device) for ids in texts]
        for i, row in enumerate(rows):
            if row.ndim != 1 or not len(row):
                raise ValueError(f"continuation {i} must be a row of at least one id, got shape {tuple(row.shape)}")
            if int(row.min()) < 0 or int(row.max()) >= self.config.text_config.vocab_size:
                raise ValueError(
                    f"continuation {i} has ids from {int(row.min())} to {int(row.max())}, the vocabulary from 0 to "
                    f"{self.config.text_config.vocab_size - 1}"
                )
        return rows

    def _score_part(
        self, prompt: LavitPrompt, texts: list[list[torch.Tensor]], batch_size: int, discrete: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Log-likelihoods (T_i,) and greediness (T_i,) of each prompt's texts: the language model reads the prompts
        once, then every continuation behind its cache."""
        filled = fill_prompt(self, prompt, 0, discrete=discrete)
        embeds = filled.inputs_embeds
        if embeds is None:
            embeds = self.get_input_embeddings()(filled.input_ids)
        mask = filled.attention_mask
        outputs = self.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            use_cache=True,
        )
        first = self._compute_logits(outputs.last_hidden_state[:, -1:], None).float().log_softmax(-1)
        cache, lengths = outputs[CACHE_NAME], mask.sum(1)
        pairs = [(i, j) for i, own in enumerate(texts) for j in range(len(own))]
        likelihoods, greedy = [], []
        for start in range(0, len(pairs), batch_size):
            chunk = pairs[start : start + batch_size]
            index = torch.tensor([i for i, _ in chunk], device=mask.device)
            ids, is_id = pad([texts[i][j] for i, j in chunk], 0, "right")
            log_probs = first[index]
            if ids.shape[1] > 1:
                outputs = self.model.language_model(
                    inputs_embeds=self.get_input_embeddings()(ids[:, :-1]),
                    attention_mask=torch.cat([mask[index], is_id[:, :-1]], dim=1),
                    position_ids=lengths[index, None] + torch.arange(ids.shape[1] - 1, device=mask.device),
                    use_cache=True,
                    **{CACHE_NAME: _selected(cache, index)},
                )
                further = self._compute_logits(outputs.last_hidden_state, None).float().log_softmax(-1)
                log_probs = torch.cat([log_probs, further], dim=1)
            likelihoods.append((log_probs.gather(2, ids[..., None])[..., 0] * is_id).sum(1).cpu())
            greedy.append(((log_probs.argmax(-1) == ids) | (is_id == 0)).all(1).cpu())
        counts = [len(own) for own in texts]
        return list(zip(torch.cat(likelihoods).split(counts), torch.cat(greedy).split(counts), strict=True))


def _is_nested(continuations: Any) -> bool:
    """Whether there is a list of continuations for each prompt, instead of one for all."""
    if isinstance(continuations, torch.Tensor):
        return continuations.ndim == 3
    first = next((one for one in continuations if len(one)), ())
    return not isinstance(first, torch.Tensor) and len(first) > 0 and not isinstance(first[0], int)


def _rows_of(prompt: LavitPrompt, rows: range, vocabulary) -> LavitPrompt:
    """Some of the prompts, with their images."""
    if len(rows) == len(prompt.ids):
        return prompt
    parts = prompt.split(vocabulary)[rows.start : rows.stop]
    images = [part.pixel_values for part in parts if part.pixel_values is not None]
    chosen = slice(rows.start, rows.stop)
    mask = None if prompt.attention_mask is None else prompt.attention_mask[chosen]
    return LavitPrompt(prompt.ids[chosen], mask, torch.cat(images) if images else None, prompt.selection)


def _selected(cache, index: torch.Tensor) -> DynamicCache:
    """A cache of some rows of another, which stays as it is."""
    selected = DynamicCache()
    for i, layer in enumerate(cache.layers):
        selected.update(layer.keys[index], layer.values[index], i)
    return selected
