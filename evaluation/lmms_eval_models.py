"""LaVIT in lmms-eval (0.7.3): `python -m lmms_eval --model lavit --model_args pretrained=FOLDER --tasks ...`.

Found by the entry point group `lmms_eval.models` of this package. The chat class is the default; `--force_simple`
takes the other one.
"""

import argparse
import inspect
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from modeling_lavit.command_line.common import load_pipeline, load_reader
from modeling_lavit.evaluation.images import save_png


GENERATION_SETTINGS = (
    "do_sample",
    "generation_preset",
    "length_penalty",
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
)


def manifest() -> ModelManifest:
    """What the entry point names."""
    return ModelManifest(
        model_id="lavit",
        simple_class_path=f"{__name__}.Lavit",
        chat_class_path=f"{__name__}.LavitChat",
        aliases=("lavit-hf",),
    )


class Likelihood(tuple, GenerationResult):
    """(log-likelihood, whether it is what greedy decoding writes), in a form that the harness leaves alone.

    Its evaluator turns every other tuple into text, and chooses among several answers the one of the *least* value:
    of those it is given the negative one as `text`.
    """

    def __new__(cls, value: float, greedy: bool, is_choice: bool):
        pair = super().__new__(cls, (value, greedy))
        pair.text, pair.token_counts = (-value if is_choice else value, greedy), None
        return pair

    def __init__(self, *_):
        pass


class Lavit(lmms):
    """Contexts and images: every context is a prompt behind its images, as the task wrote it.

    Args:
        pretrained: checkpoint folder or repository; the embedded checkpoint by default.
        device: of the model.
        batch_size: prompts at once; "auto" is one.
        mode: "text", or "image" to draw: answers are then JSON, `{"text": "", "images": [files]}`.
        output: folder for drawings.
        seed: of drawings.
        max_batch_size: of the harness, has no use here.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        mode: str = "text",
        output: str = "lavit_drawings",
        seed: int = 0,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if mode not in ("text", "image"):
            raise ValueError(f"mode must be 'text' or 'image', got {mode!r}")
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if device is None and self._world_size > 1:
            device = str(self.accelerator.device)
        options = argparse.Namespace(model=pretrained, device=device)
        self.pipe = None
        if mode == "image":
            self.pipe = load_pipeline(options)
            self.pipe.set_progress_bar_config(disable=True)
            self.model, self.processor = self.pipe.model, self.pipe.processor
        else:
            self.model, self.processor = load_reader(options)
        self.batch_size = 1 if batch_size == "auto" else int(batch_size)
        self.output, self.seed = Path(output), int(seed)

    def generate_until(self, requests: list) -> list[str]:
        """One text for each request, in their order; requests of the same settings go in batches."""
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(self._settings(request.args), sort_keys=True, default=str), []).append(i)
        with tqdm(total=len(requests), desc="requests", disable=self.rank != 0) as bar:
            for places in groups.values():
                for start in range(0, len(places), self.batch_size):
                    batch = places[start : start + self.batch_size]
                    arguments = [requests[i].args for i in batch]
                    texts = self._answer([self._prompt(one) for one in arguments], self._settings(arguments[0]), batch)
                    for i, text in zip(batch, texts, strict=True):
                        answers[i] = text
                    bar.update(len(batch))
        return answers

    def loglikelihood(self, requests: list) -> list[Likelihood]:
        """Of each request's continuation behind its context and images; an image is read once for all that follow."""
        results: list[Likelihood] = []
        start = 0
        while start < len(requests):
            first = requests[start].args
            end = start + 1
            while end < len(requests) and self._same_prompt(first, requests[end].args):
                end += 1
            texts = [self._continuation(request.args) for request in requests[start:end]]
            ids = [self.processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            # without an image and a context nothing stands in front: a language model begins behind </s>
            context, images = self._context(first) or "", self._images(first)
            if not context and not images:
                prompts = {"input_ids": torch.tensor([[self.processor.tokenizer.eos_token_id]])}
            else:
                prompts = self._inputs([(context, images)])
            scores, greedy = self.model.score(**prompts, continuations=ids, return_greedy=True)
            results += [
                Likelihood(value, is_greedy, isinstance(request.args[1], str))
                for value, is_greedy, request in zip(
                    scores[0].tolist(), greedy[0].tolist(), requests[start:end], strict=True
                )
            ]
            start = end
        return results

    def generate_until_multi_round(self, requests: list) -> list[list[str]]:
        """One list of texts for each request, a text for each round; the task's text says what comes next."""
        return [self._rounds(request.args) for request in tqdm(requests, desc="requests", disable=self.rank != 0)]

    def _rounds(self, arguments: tuple) -> list[str]:
        context, settings, _, next_round, doc_id, task, split = arguments
        document = self.task_dict[task][split][doc_id]
        prompt, information = (context, self._images(arguments)), None
        texts: list[str] = []
        while True:
            texts += self._answer([prompt], settings, [doc_id, len(texts)])
            images, context, ended, texts, information = next_round(
                document, previous_output=texts, round_idx=len(texts), previous_round_info=information
            )
            texts = list(texts)
            if ended:
                return texts
            prompt = (context, list(images or []))

    def _settings(self, arguments: tuple) -> dict:
        return arguments[1]

    def _context(self, arguments: tuple) -> str:
        return arguments[0]

    def _document(self, arguments: tuple):
        *_, doc_id, task, split = arguments
        return self.task_dict[task][split][doc_id]

    def _images(self, arguments: tuple) -> list:
        if len(arguments) < 6:  # a mere (context, continuation)
            return []
        return [image for image in arguments[2](self._document(arguments)) or [] if image is not None]

    def _continuation(self, arguments: tuple) -> str:
        text = arguments[1]
        text = text(self._document(arguments)) if callable(text) else text
        # the tokenizer puts a space in front of every text by itself
        return str(text).removeprefix(" ")

    def _same_prompt(self, first: tuple, second: tuple) -> bool:
        return first[0] == second[0] and first[3:] == second[3:] and len(first) == len(second)

    def _prompt(self, arguments: tuple) -> tuple[str, list]:
        return self._context(arguments), self._images(arguments)

    def _inputs(self, prompts: Sequence[tuple[str, list]]) -> dict:
        mark = self.processor.image_token
        texts = [
            text if text.count(mark) == len(images) else mark * len(images) + text.replace(mark, "")
            for text, images in prompts
        ]
        images = [images for _, images in prompts]
        return dict(self.processor(text=texts, images=images if any(images) else None, return_tensors="pt"))

    def _answer(self, prompts: list, settings: dict, places: list[int]) -> list[str]:
        if self.pipe is not None:
            return self._draw([[*images, text] if text else images for text, images in prompts], places)
        return self._write(self._inputs(prompts), settings)

    def _write(self, inputs: dict, settings: dict) -> list[str]:
        """Generated texts, cut at what the task says ends them."""
        chosen = {name: settings[name] for name in GENERATION_SETTINGS if settings.get(name) is not None}
        if not chosen.get("do_sample", False) or chosen.get("temperature") == 0:
            chosen |= {"do_sample": False}
            for name in ("temperature", "top_k", "top_p"):
                chosen.pop(name, None)
        if "generation_preset" not in chosen:
            chosen.setdefault("max_new_tokens", 64)
        prompts = inputs["input_ids"]
        ids = self.model.generate(**inputs, **chosen)
        texts = self.processor.post_process_image_text_to_text(ids[:, prompts.shape[1] :])
        if settings.get("generation_preset") == "caption":
            texts = self.processor.post_process_caption(texts)
        elif settings.get("generation_preset") == "answer":
            texts = self.processor.post_process_answer(texts)
        until = settings.get("until") or []
        for end in [until] if isinstance(until, str) else until:
            texts = [text.split(end)[0] if end else text for text in texts]
        return [text.strip() for text in texts]

    def _draw(self, prompts: list[list], places: list[int]) -> list[str]:
        generators = [torch.Generator().manual_seed(self.seed + place) for place in places[: len(prompts)]]
        images = self.pipe(prompts, generator=generators).images
        answers = []
        for place, image in zip(places, images, strict=False):
            path = self.output / f"{self.rank}-{place:06d}.png"
            save_png(image, path)
            answers.append(json.dumps({"text": "", "images": [str(path)]}))
        return answers


class LavitChat(Lavit):
    """Messages: the checkpoint's chat template makes prompts of them, "Question: ... Answer:" by default."""

    is_simple = False

    def _settings(self, arguments: tuple) -> dict:
        return arguments[2] if callable(arguments[1]) else arguments[1]

    def _prompt(self, arguments: tuple):
        return _as_conversation(arguments[1](self._document(arguments)))

    def _rounds(self, arguments: tuple) -> list[str]:
        _, messages_of, settings, doc_id, _, _ = arguments
        document, texts, information = self._document(arguments), [], None
        messages = messages_of(document)
        while True:
            texts += self._answer([_as_conversation(messages)], settings, [doc_id, len(texts)])
            if "round_idx" not in inspect.signature(messages_of).parameters:
                return texts
            following = messages_of(
                document, round_idx=len(texts), previous_output=list(texts), previous_round_info=information
            )
            if not isinstance(following, tuple) or following[1]:
                return texts
            messages, _, _, information = following

    def _answer(self, prompts: list, settings: dict, places: list[int]) -> list[str]:
        if prompts and isinstance(prompts[0], tuple):  # of loglikelihood and its like
            return super()._answer(prompts, settings, places)
        if self.pipe is not None:
            turns = [conversation[-1]["content"] for conversation in prompts]
            parts = [[part.get("image") or part.get("text") for part in turn] for turn in turns]
            return self._draw([[part for part in turn if part] for turn in parts], places)
        inputs = self.processor.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return self._write(dict(inputs), settings)


def _as_conversation(messages: list[dict]) -> list[dict]:
    """The harness's messages as transformers' chat templates take them."""
    conversation = []
    for message in messages:
        content = []
        for block in message["content"]:
            if block["type"] == "text":
                # the template writes these itself
                text = block["text"].removeprefix("Question: ").removesuffix(" Answer:")
                content.append({"type": "text", "text": text})
            elif block["type"] == "image":
                content.append({"type": "image", "image": block["url"]})
            else:
                raise ValueError(f"LaVIT reads text and images, not {block['type']}")
        conversation.append({"role": message["role"], "content": content})
    return conversation
