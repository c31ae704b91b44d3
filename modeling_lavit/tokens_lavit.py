"""The first stage of [`LavitPipeline`]: prompts to visual tokens, by the language model, or images themselves."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.accelerate_utils import apply_forward_hook

from .checks_lavit import as_generators, check_components, check_count, check_names, check_scale
from .defaults_lavit import LavitDefaults
from .denoising_lavit import TokenObserver
from .prompts_lavit import Part, Prompt, as_batch, as_negative_texts
from .visual_tokens_lavit import LavitVisualTokens


class LavitTokensMixin(DiffusionPipeline if TYPE_CHECKING else object):
    """What the language model and its visual tokenizer do for a pipeline."""

    defaults: LavitDefaults
    __call__: Callable[..., Any]

    @torch.no_grad()
    def generate_visual_tokens(
        self,
        prompt: Prompt,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        guidance_scale: float | Sequence[float] | torch.Tensor | None = None,
        negative_prompt: str | Iterable[str] | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        max_image_tokens: int | None = None,
        reference_compat: bool = False,
        callback_on_token: Callable[[int, torch.Tensor], None] | None = None,
        stopping_criteria: Sequence | None = None,
        **generate_kwargs,
    ) -> LavitVisualTokens:
        """The first stage alone: the language model writes the visual tokens of every image.

        Args:
            prompt: a string, an image, or a list of both: one multimodal prompt. A list (tuple, array, column, series)
                of strings only, or a list of lists, is a batch. An image is a PIL image, a `pathlib.Path`, an open
                file, the bytes of one or `{"bytes": …, "path": …}`; strings are text.
            num_images_per_prompt: distinct draws for each prompt.
            generator: one, or one for each image (prompts * num_images_per_prompt, a prompt's images together).
            guidance_scale: of the language model, from 0 on, one for all or one for each prompt; 0 and 1 mean none.
                By default that of the checkpoint, for text prompts or for prompts with images.
            negative_prompt: text that the images are guided away from, one for all prompts or one for each; what
                stands in the unconditional stream, which is empty without it (and with `""`).
            temperature, top_k, top_p: of the sampling; by default as the model's generation config says.
            max_image_tokens: at most so many tokens; by default the model's, at most what the detokenizer takes, if
                there is one.
            reference_compat: the reference's quirks, see [`LavitForConditionalGeneration.generate`].
            callback_on_token: called as `callback(step, ids)` with the newest ids (images,) of the whole batch after
                every step.
            stopping_criteria: further `StoppingCriteria` of `generate`: they see the ids of the images.
            generate_kwargs: of [`LavitForConditionalGeneration.generate`]: `min_image_tokens`, `do_sample`, ...

        Returns:
            The visual tokens of all images, each prompt's together.

        Raises:
            ValueError: an empty prompt, settings out of range, a wrong number of generators, a prompt longer than the
                context, an image that was left without visual tokens.
        """
        check_names(generate_kwargs)
        check_components(self, "a prompt", "processor", "model")
        prompts = as_batch(prompt)
        check_count("num_images_per_prompt", num_images_per_prompt)
        generator = as_generators(generator, len(prompts) * num_images_per_prompt)
        scales = self._guidance_scales(prompts, guidance_scale)
        if max_image_tokens is None:
            max_image_tokens = self.defaults.max_image_tokens
        check_count("max_image_tokens", max_image_tokens)
        if self.detokenizer and max_image_tokens > self.detokenizer.config.num_queries:
            raise ValueError(
                f"max_image_tokens is {max_image_tokens}, but the detokenizer takes "
                f"{self.detokenizer.config.num_queries} visual tokens at most"
            )
        inputs = self._encode_prompts(prompts, reference_compat)
        if negative_prompt is not None:
            if all(scale in (0, 1) for scale in scales):
                raise ValueError(
                    f"negative_prompt needs guidance: give a guidance_scale above 1, here it is {scales[0]}"
                )
            inputs |= self._encode_negative(as_negative_texts(negative_prompt, len(prompts)), reference_compat)
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        device = self._execution_device
        running = self._calls.begin(one_at_a_time=self._takes_turns, join=True)
        with running as call, self.progress_bar(total=max_image_tokens + 1) as progress_bar:  # pyright: ignore[reportCallIssue]
            progress_bar.set_description("visual tokens")
            observer = TokenObserver(progress_bar, call, callback_on_token)
            ids = _generate(
                self.model,
                **{name: value.to(device) for name, value in inputs.items()},
                **{name: value for name, value in sampling.items() if value is not None},
                generation_mode="image",
                num_return_sequences=num_images_per_prompt,
                generator=generator,
                guidance_scale=scales[0] if len(set(scales)) == 1 else scales,
                max_image_tokens=max_image_tokens,
                reference_compat=reference_compat,
                stopping_criteria=[observer, *(stopping_criteria or ())],
                **generate_kwargs,
            )
        vocabulary = self.model.config.vocabulary
        is_code = vocabulary.is_code(ids)
        lengths = is_code.sum(1)
        if not lengths.all():
            empty = (lengths == 0).nonzero().flatten().tolist()
            raise ValueError(f"images {empty} have no visual tokens: raise max_image_tokens or min_image_tokens")
        return LavitVisualTokens(codes=vocabulary.codes_of(ids[is_code]), lengths=lengths)

    @torch.no_grad()
    def tokenize(
        self,
        image: Part | list[Part],
        selection: str | None = None,
        keep_ratio: float | None = None,
        keep: float | int | str | None = None,
        target_quality: float | None = None,
        reference_compat: bool = False,
    ) -> LavitVisualTokens:
        """Images to visual tokens.

        Args:
            image: an image or a list of them, as [`LavitImageProcessor`] takes them.
            selection, keep_ratio, keep, target_quality: which patches are kept, see [`LavitVisualTokenizer.select`].
            reference_compat: convert images to RGB as the reference does, see [`LavitImageProcessor`].
        """
        if isinstance(image, list | tuple) and not image:
            raise ValueError("image is an empty list: give one image or more")
        check_components(self, "an image to tokenize", "processor", "model")
        prepared = self.processor.image_processor(image, reference_compat=reference_compat, return_tensors="pt")
        pixel_values = prepared.pixel_values.to(self._execution_device)
        with self._calls.begin(one_at_a_time=self._takes_turns, join=True):
            return _tokenize_images(
                self.model,
                pixel_values,
                selection=selection,
                keep_ratio=keep_ratio,
                keep=keep,
                target_quality=target_quality,
                detokenizer=self.detokenizer,
            )

    def reconstruct(
        self,
        image: Part | list[Part],
        selection: str | None = None,
        keep_ratio: float | None = None,
        keep: float | int | str | None = None,
        target_quality: float | None = None,
        reference_compat: bool = False,
        **decode_kwargs,
    ):
        """Images to visual tokens and back: what the tokens keep.

        Args:
            image, selection, keep_ratio, keep, target_quality, reference_compat: of [`tokenize`].
            decode_kwargs: of a call with `visual_tokens`, whose result is returned.
        """
        with self._calls.begin(one_at_a_time=self._takes_turns):
            visual_tokens = self.tokenize(image, selection, keep_ratio, keep, target_quality, reference_compat)
            return self(visual_tokens=visual_tokens, **decode_kwargs)

    def _guidance_scales(self, prompts: list[list[Part]], given: Any) -> list[float]:
        """The language model's, one for each prompt."""
        if given is not None:
            given = given.tolist() if isinstance(given, torch.Tensor) else given
            scales = list(given) if isinstance(given, list | tuple) else [given] * len(prompts)
        else:
            defaults = self.defaults
            scales = [
                defaults.guidance_scale
                if all(isinstance(part, str) for part in parts)
                else defaults.multimodal_guidance_scale
                for parts in prompts
            ]
        for scale in scales:
            check_scale("guidance_scale", scale, "0 and 1 mean none")
        return scales

    def _encode_prompts(self, prompts: list[list[Part]], reference_compat: bool) -> dict[str, torch.Tensor]:
        mark = self.processor.image_token
        texts = ["".join(part if isinstance(part, str) else mark for part in parts) for parts in prompts]
        images = [[part for part in parts if not isinstance(part, str)] for parts in prompts]
        return dict(
            self.processor(
                text=texts,
                images=images if any(images) else None,
                generation_mode="image",
                reference_compat=reference_compat,
                return_tensors="pt",
            )
        )

    def _encode_negative(self, texts: list[str], reference_compat: bool) -> dict[str, torch.Tensor]:
        """Rows of the unconditional stream, left-padded; an empty text is `[IMG]` alone."""
        options = {"generation_mode": "image", "reference_compat": reference_compat, "return_tensors": "pt"}
        alone = torch.tensor([self.processor.boi_token_id])
        rows = [self.processor(text=text, **options).input_ids[0] if text.strip() else alone for text in texts]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "negative_prompt_ids": pad(rows, batch_first=True, padding_side="left"),
            "negative_prompt_attention_mask": pad(
                [torch.ones_like(row) for row in rows], batch_first=True, padding_side="left"
            ),
        }


# these begin elsewhere than in `forward`: offloading must bring the weights first


@apply_forward_hook
def _generate(model, **kwargs) -> torch.Tensor:
    return model.generate(**kwargs)


@apply_forward_hook
def _tokenize_images(model, pixel_values: torch.Tensor, **selection) -> LavitVisualTokens:
    """(images, 3, height, width) normalised pixels to visual tokens; see `LavitVisualTokenizer.select`."""
    return model.get_image_tokens(pixel_values, **selection)
