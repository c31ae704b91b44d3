"""One replica: a pipeline, and a thread on which it draws, writes, and does both in one stream."""

import asyncio
import ctypes
import sys
from collections.abc import AsyncIterator
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar

from modeling_lavit.pipeline_lavit import LavitPipeline
from modeling_lavit.serving.batching import AbandonedError, Batcher, Waiting
from modeling_lavit.serving.requests import Answer, Description, Drawing, Refusal, Writing
from modeling_lavit.serving.settings import ServeSettings


# of glibc alone
malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class LavitEngine:
    """Holds the model and answers requests, those of equal settings together.

    An image is drawn, and an answer written, as the library does it alone with the same seed.
    """

    def __init__(self, settings: ServeSettings):
        self.batcher = Batcher(self._run, settings.max_batch_size)
        # Loaded where it runs: OpenMP keeps helpers for each thread that has computed, and once there are more than
        # cores, those of all threads sleep between two operations, and waking takes longer than most operations.
        self.pipe = self.batcher.thread.submit(load_pipeline, settings).result()
        self.model, self.processor = self.pipe.model, self.pipe.processor
        self.max_tokens = settings.max_tokens

    async def describe(self) -> Description:
        """Sizes of images that the model draws and reads."""
        ratios = self.pipe.defaults.aspect_ratios.values()
        default = self.pipe.default_size
        size = self.processor.image_processor.size
        return Description([default, *(one for one in ratios if one != default)], (size["height"], size["width"]))

    async def draw(self, drawing: Drawing) -> Answer | Refusal:
        """One image."""
        return await self._submit(("draw", drawing.size), drawing)

    async def write(self, writing: Writing) -> Answer | Refusal:
        """One answer in text, or in text and images where the request has no preset."""
        settings = (writing.preset, writing.max_tokens, writing.temperature, writing.top_p)
        return await self._submit(("compose" if writing.preset is None else "write", *settings), writing)

    async def stream(self, writing: Writing) -> AsyncIterator[str | Answer | Refusal]:
        """An answer in pieces as they are written, and then the whole."""
        pieces: asyncio.Queue = asyncio.Queue()
        settings = (writing.preset, writing.max_tokens, writing.temperature, writing.top_p)
        answer = asyncio.ensure_future(self._submit(("stream", *settings), writing, pieces.put_nowait))
        answer.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield await answer
        finally:
            answer.cancel()

    async def _submit(self, settings: tuple, request: Any, emit=None) -> Answer | Refusal:
        try:
            return await self.batcher.submit(settings, request, emit)
        except ValueError as error:
            return Refusal(str(error))

    def _run(self, settings: tuple, batch: list[Waiting]) -> list[Answer]:
        mode, *rest = settings
        try:
            if mode == "draw":
                return self._draw(batch, *rest)
            if mode == "compose":
                return self._compose(batch, *rest)
            return self._write(batch, *rest, streaming=mode == "stream")
        finally:
            release_memory()

    def _draw(self, batch: list[Waiting], size: tuple[int, int] | None) -> list[Answer]:
        drawings: list[Drawing] = [one.request for one in batch]
        height, width = size or (None, None)
        output = self.pipe(
            [list(drawing.parts) for drawing in drawings],
            generator=[seeded(drawing.seed) for drawing in drawings],
            height=height,
            width=width,
            callback_on_token=lambda step, ids: _stop_if_abandoned(batch),
        )
        lengths = output.visual_tokens.lengths.tolist()
        return [
            Answer([image], self._count_prompt(drawing.parts), length, batch_size=len(batch))
            for image, drawing, length in zip(output.images, drawings, lengths, strict=True)
        ]

    def _count_prompt(self, parts: tuple) -> int:
        # an image counts as [IMG] and [/IMG], whatever it is made of, and [IMG] begins what is drawn
        text = [part for part in parts if isinstance(part, str)]
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return sum(map(len, ids)) + 2 * (len(parts) - len(text)) + 1

    def _inputs(self, batch: list[Waiting], generation_mode: str = "text") -> dict[str, torch.Tensor]:
        return self.processor.apply_chat_template(
            [one.request.messages for one in batch],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"generation_mode": generation_mode},
        )

    def _write(
        self,
        batch: list[Waiting],
        preset: str,
        max_tokens: int | None,
        temperature: float | None,
        top_p: float | None,
        streaming: bool,
    ) -> list[Answer]:
        settings: dict[str, Any] = {"generation_preset": preset}
        if max_tokens is not None:
            settings |= {"max_new_tokens": max_tokens, "min_new_tokens": 0}
        if temperature:
            generators = [seeded(one.request.seed) for one in batch]
            settings |= {"do_sample": True, "temperature": temperature, "top_p": top_p or 1.0, "top_k": 0}
            settings |= {"num_beams": 1, "generator": generators}
        texts = [AnswerText(self.processor, preset, one) for one in batch]
        if streaming:
            settings |= {"num_beams": 1, "streamer": BatchStreamer(texts)}
        if settings.get("num_beams") == 1:
            # of beam search alone, and warned of without
            settings |= {"length_penalty": 1.0, "early_stopping": False}
        inputs = self._inputs(batch)
        rows = self.model.generate(**inputs, **settings, stopping_criteria=StoppingCriteriaList([ClientsGone(batch)]))
        answers = []
        for text, row, mask in zip(texts, rows, inputs["attention_mask"], strict=True):
            text.ids, ended = self._until_end(row[len(mask) :].tolist())
            text.emit(is_whole=True)
            answers.append(Answer([text.shown()], int(mask.sum()), len(text.ids), ended, len(batch)))
        return answers

    def _compose(self, batch: list[Waiting], _preset, max_tokens: int | None, *_) -> list[Answer]:
        inputs = self._inputs(batch, generation_mode="interleaved")
        generators = [seeded(one.request.seed) for one in batch]
        rows = self.model.generate(
            **inputs,
            generation_mode="interleaved",
            max_new_tokens=max_tokens,
            generator=generators,
            stopping_criteria=StoppingCriteriaList([ClientsGone(batch), IdsWritten(self.max_tokens)]),
        )
        answers = []
        for row, mask, generator in zip(rows, inputs["attention_mask"], generators, strict=True):
            ids, ended = self._until_end(row[len(mask) :].tolist())
            segments = self.processor.post_process_multimodal_output([ids], generation_mode="interleaved")[0]
            codes = [segment for segment in segments if isinstance(segment, torch.Tensor)]
            images = iter(self.pipe(visual_tokens=codes, generator=[generator] * len(codes)).images if codes else [])
            parts = [next(images) if isinstance(segment, torch.Tensor) else segment.strip() for segment in segments]
            parts = [part for part in parts if part != ""]
            answers.append(Answer(parts, int(mask.sum()), len(ids), ended, len(batch)))
        return answers

    def _until_end(self, ids: list[int]) -> tuple[list[int], bool]:
        """New ids before the end that the model wrote, and whether it wrote one."""
        end = self.model.generation_config.eos_token_id
        ends = set(end if isinstance(end, list) else [end])
        stop = next((i for i, token in enumerate(ids) if token in ends), None)
        return (ids, False) if stop is None else (ids[:stop], True)


class AnswerText:
    """The text of one answer as it grows."""

    def __init__(self, processor, preset: str, waiting: Waiting):
        self.processor, self.waiting = processor, waiting
        self.post_process = processor.post_process_caption if preset == "caption" else processor.post_process_answer
        self.ids: list[int] = []
        self.emitted = ""

    def shown(self) -> str:
        """What the client sees: the first sentence, up to a stop."""
        text = self.post_process(self.processor.post_process_image_text_to_text([self.ids]))[0]
        found = [text.index(stop) for stop in self.waiting.request.stops if stop in text]
        return text[: min(found)] if found else text

    def emit(self, is_whole: bool = False) -> None:
        """Sends what is new since the last time, if anybody waits for it."""
        text = self.shown()
        if self.waiting.emit is None or not text.startswith(self.emitted):
            return
        if not is_whole:
            text = text[: len(text) - self._uncertain(text)]
        if len(text) > len(self.emitted):
            self.waiting.emit(text[len(self.emitted) :])
            self.emitted = text

    def _uncertain(self, text: str) -> int:
        """Length of the end that the next id may change: half a character, or the beginning of a stop."""
        beginnings = (stop[:length] for stop in self.waiting.request.stops for length in range(1, len(stop)))
        return max((len(end) for end in ("\ufffd", *beginnings) if text.endswith(end)), default=0)


class BatchStreamer(BaseStreamer):
    """Gives every row's new ids to its text."""

    def __init__(self, texts: list[AnswerText]):
        self.texts, self.is_prompt = texts, True

    def put(self, value: torch.Tensor) -> None:
        """See `BaseStreamer`: the prompts first, then (rows,) ids."""
        if self.is_prompt:
            self.is_prompt = False
            return
        for text, token in zip(self.texts, value.tolist(), strict=True):
            text.ids.append(token)
            text.emit()

    def end(self) -> None:
        """See `BaseStreamer`."""


class ClientsGone(StoppingCriteria):
    """Ends the rows whose clients have gone away."""

    def __init__(self, batch: list[Waiting]):
        self.batch = batch

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        _stop_if_abandoned(self.batch)
        gone = [one.is_abandoned for one in self.batch]
        # of beam search the rows of one prompt stand together
        return torch.tensor(gone, device=input_ids.device).repeat_interleave(len(input_ids) // len(gone))


class IdsWritten(StoppingCriteria):
    """Ends all rows after `count` ids, however long the context is; there may be less room."""

    def __init__(self, count: int):
        self.left = count

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        self.left -= 1
        return torch.full((len(input_ids),), self.left <= 0, device=input_ids.device)


def _stop_if_abandoned(batch: list[Waiting]) -> None:
    if all(one.is_abandoned for one in batch):
        raise AbandonedError


def seeded(seed: int) -> torch.Generator:
    """The generator of one image or answer."""
    return torch.Generator().manual_seed(seed)


def release_memory() -> None:
    """Gives the pages that are free back to the system. glibc keeps them, and batches of many sizes leave more and
    more of them, of which few fit the next batch."""
    if malloc_trim is not None:
        malloc_trim(0)


def load_pipeline(settings: ServeSettings) -> LavitPipeline:
    """The pipeline of a server: on its device, in its precision, without progress bars."""
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if settings.dtype != "auto":
        dtype = getattr(torch, settings.dtype)
    disable_progress_bar()
    pipe = LavitPipeline.from_pretrained(settings.model, dtype=dtype, use_safetensors=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe
