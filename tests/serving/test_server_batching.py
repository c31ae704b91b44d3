"""Requests that wait together run together."""

import asyncio
import threading
from concurrent.futures import Future

import pytest

from modeling_lavit.checkpoints import LAVIT_EMOJI
from modeling_lavit.processing import LavitProcessor
from modeling_lavit.serving.batching import AbandonedError, Batcher, Waiting
from modeling_lavit.serving.engine import AnswerText
from modeling_lavit.serving.requests import Writing


class Recorder:
    """A `run` that answers with what it was asked, and waits until it may."""

    def __init__(self):
        self.batches, self.may_run, self.is_running = [], threading.Event(), threading.Event()

    def __call__(self, settings, batch):
        self.is_running.set()
        self.may_run.wait(5)
        self.batches.append((settings, [one.request for one in batch]))
        if all(one.is_abandoned for one in batch):
            raise AbandonedError
        if any(one.request == "wrong" for one in batch):
            raise ValueError("it is wrong")
        return [one.request.upper() for one in batch]


async def busy(batcher: Batcher, run: Recorder) -> asyncio.Task:
    """A first request that runs already, so that others have to wait."""
    first = asyncio.ensure_future(batcher.submit("s", "first"))
    await asyncio.to_thread(run.is_running.wait, 5)
    return first


def test_what_waits_while_the_model_works_runs_together():
    async def scenario():
        run = Recorder()
        batcher = Batcher(run, max_batch_size=3)
        first = await busy(batcher, run)
        others = [asyncio.ensure_future(batcher.submit("s", name)) for name in "abcd"]
        await asyncio.sleep(0.02)
        run.may_run.set()
        assert await asyncio.gather(first, *others) == ["FIRST", "A", "B", "C", "D"]
        assert run.batches == [("s", ["first"]), ("s", ["a", "b", "c"]), ("s", ["d"])]

    asyncio.run(scenario())


def test_requests_of_other_settings_run_apart_and_the_oldest_first():
    async def scenario():
        run = Recorder()
        batcher = Batcher(run, max_batch_size=3)
        first = await busy(batcher, run)
        others = [asyncio.ensure_future(batcher.submit(settings, name)) for settings, name in ("xa", "yb", "xc", "yd")]
        await asyncio.sleep(0.02)
        run.may_run.set()
        assert await asyncio.gather(first, *others) == ["FIRST", "A", "B", "C", "D"]
        assert run.batches[1:] == [("x", ["a", "c"]), ("y", ["b", "d"])]

    asyncio.run(scenario())


def test_a_client_that_goes_away_frees_its_place():
    async def scenario():
        run = Recorder()
        batcher = Batcher(run, max_batch_size=2)
        first = await busy(batcher, run)
        others = [asyncio.ensure_future(batcher.submit("s", name)) for name in "abc"]
        await asyncio.sleep(0.02)
        others[0].cancel()
        await asyncio.sleep(0.02)
        run.may_run.set()
        assert await asyncio.gather(first, *others[1:]) == ["FIRST", "B", "C"]
        assert run.batches[1:] == [("s", ["b", "c"])]

    asyncio.run(scenario())


def test_a_batch_whose_clients_are_all_gone_ends_and_the_next_runs():
    async def scenario():
        run = Recorder()
        batcher = Batcher(run, max_batch_size=2)
        first = await busy(batcher, run)
        first.cancel()
        await asyncio.sleep(0.02)
        run.may_run.set()
        assert await batcher.submit("s", "next") == "NEXT"

    asyncio.run(scenario())


def test_a_wrong_request_fails_alone():
    async def scenario():
        run = Recorder()
        batcher = Batcher(run, max_batch_size=4)
        first = await busy(batcher, run)
        others = [asyncio.ensure_future(batcher.submit("s", name)) for name in ("a", "wrong", "b")]
        await asyncio.sleep(0.02)
        run.may_run.set()
        results = await asyncio.gather(first, *others, return_exceptions=True)
        assert [*results[:2], results[3]] == ["FIRST", "A", "B"]
        with pytest.raises(ValueError, match="it is wrong"):
            raise results[2]

    asyncio.run(scenario())


@pytest.mark.parametrize("answer", ["a red apple", "中 and 😀", "é"])
def test_characters_of_several_bytes_are_streamed_when_they_are_whole(answer):
    processor = LavitProcessor.from_pretrained(LAVIT_EMOJI)
    pieces: list[str] = []
    text = AnswerText(processor, "answer", Waiting(None, Writing([], "answer", 0), Future(), pieces.append))
    for token in processor.tokenizer(answer, add_special_tokens=False)["input_ids"]:
        text.ids.append(token)
        text.emit()
    text.emit(is_whole=True)
    assert "".join(pieces) == text.shown() == answer
