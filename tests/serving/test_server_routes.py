"""The routes, asked by OpenAI's own client; what they answer is what the library draws and writes."""

import base64
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest
import requests
import torch
from PIL import Image
from running_server import Running

from modeling_lavit.serving.settings import ServeSettings


IMAGES = Path(__file__).parent.parent / "fixtures/emoji/images/noto"
CAT, CUP = IMAGES / "cat-face.png", IMAGES / "cup-with-straw.png"
MODEL = "lavit-emoji"


def part(path: Path) -> dict:
    uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": uri}}


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


def decoded(content: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(content.rsplit(",", 1)[-1])))


def drawn_alone(engine, prompt, seed: int) -> Image.Image:
    return engine.pipe(prompt, generator=torch.Generator().manual_seed(seed)).images[0]


def assert_alike(image: Image.Image, other: Image.Image) -> None:
    """Within one level of 255."""
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int))
    assert image.size == other.size and difference.max() <= 1


def chat(client, *messages, **options):
    return client.chat.completions.create(model=MODEL, messages=list(messages), **options)


def test_the_model_is_listed_under_its_name(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_image_i_of_a_request_is_the_library_s_with_seed_plus_i(client, engine):
    response = client.images.generate(prompt="red apple", n=2, extra_body={"seed": 7})
    assert [image.seed for image in response.data] == [7, 8] and response.size == "48x48"
    for i, image in enumerate(response.data):
        assert_alike(decoded(image.b64_json), drawn_alone(engine, "red apple", 7 + i))


def test_an_image_without_a_seed_says_with_which_it_was_drawn(client):
    image = client.images.generate(prompt="red apple").data[0]
    again = client.images.generate(prompt="red apple", extra_body={"seed": image.seed}).data[0]
    assert_alike(decoded(image.b64_json), decoded(again.b64_json))


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_images_come_in_the_format_asked_for(client, output_format):
    options = {"prompt": "cat", "size": "48x48", "output_format": output_format, "extra_body": {"seed": 1}}
    image = decoded(client.images.generate(**options).data[0].b64_json)
    assert image.format.lower() == output_format and image.size == (48, 48)
    url = client.images.generate(**options, response_format="url").data[0].url
    assert url.startswith(f"data:image/{output_format};base64,") and decoded(url).tobytes() == image.tobytes()


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_the_smallest_files_are_those_of_compression_0(client, output_format):
    options = {"prompt": "cat", "output_format": output_format, "extra_body": {"seed": 1}}
    sizes = [
        len(client.images.generate(**options, output_compression=value).data[0].b64_json) for value in (0, 50, 100)
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]


def test_an_edit_is_drawn_from_its_images_and_the_prompt(client, engine):
    response = client.images.edit(image=CAT, prompt="in flat style", extra_body={"seed": 3})
    assert_alike(decoded(response.data[0].b64_json), drawn_alone(engine, [Image.open(CAT), "in flat style"], 3))
    response = client.images.edit(image=[CAT, CUP], prompt="together", n=1, extra_body={"seed": 3})
    expected = drawn_alone(engine, [Image.open(CAT), Image.open(CUP), "together"], 3)
    assert_alike(decoded(response.data[0].b64_json), expected)


def test_drawings_that_wait_together_run_together_and_each_is_the_one_drawn_alone(running, client, engine):
    prompts = ["red apple", "pizza", "cat face", "sunflower in noto style", "tiger face", "cup"]
    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(client.images.generate, prompt=p, extra_body={"seed": 5}) for p in prompts]
        images = [decoded(call.result().data[0].b64_json) for call in calls]
    for prompt, image in zip(prompts, images, strict=True):
        assert_alike(image, drawn_alone(engine, prompt, 5))
    figures = requests.get(f"{running.root}/metrics").text
    assert figure(figures, 'lavit_batch_size_bucket{le="1.0"}') < figure(figures, "lavit_batch_size_count")


def figure(figures: str, name: str) -> float:
    return float(next(line for line in figures.splitlines() if line.startswith(f"{name} ")).split()[1])


def written_alone(engine, prompt: str, images: list, preset: str, **settings) -> str:
    processor = engine.processor
    inputs = processor(text=prompt, images=[images] if images else None)
    ids = engine.model.generate(**inputs, generation_preset=preset, **settings)
    post_process = processor.post_process_caption if preset == "caption" else processor.post_process_answer
    return post_process(ids, input_ids=inputs.input_ids)[0]


def test_an_image_alone_is_captioned_and_a_question_answered_as_the_library_does(client, engine):
    response = chat(client, user(part(CAT)))
    choice = response.choices[0]
    assert choice.message.content and choice.message.content == written_alone(
        engine, "<image>", [Image.open(CAT)], "caption"
    )
    assert choice.finish_reason == "stop"
    assert response.usage.total_tokens == response.usage.prompt_tokens + response.usage.completion_tokens
    asked = "<image>Question: which style is this? Answer:"
    answer = chat(client, user(part(CAT), text("which style is this?"))).choices[0].message.content
    assert answer and answer == written_alone(engine, asked, [Image.open(CAT)], "answer")


def test_turns_a_system_message_and_several_images_make_one_prompt(client, engine):
    messages = [
        {"role": "system", "content": "Answer in one word."},
        user(part(CAT), text("what is it?")),
        {"role": "assistant", "content": "cat"},
        user(part(CUP), text("and this?")),
    ]
    blocks = [
        {"role": "system", "content": [text("Answer in one word.")]},
        {"role": "user", "content": [{"type": "image"}, text("what is it?")]},
        {"role": "assistant", "content": [text("cat")]},
        {"role": "user", "content": [{"type": "image"}, text("and this?")]},
    ]
    prompt = engine.processor.apply_chat_template(blocks, add_generation_prompt=True)
    answer = chat(client, *messages).choices[0].message.content
    assert answer == written_alone(engine, prompt, [Image.open(CAT), Image.open(CUP)], "answer")


def test_streamed_pieces_make_the_answer_of_greedy_search(client, engine):
    events = list(chat(client, user(part(CAT)), stream=True, stream_options={"include_usage": True}))
    pieces = [event.choices[0].delta.content for event in events if event.choices and event.choices[0].delta.content]
    assert len(pieces) > 1 and "".join(pieces) == written_alone(
        engine, "<image>", [Image.open(CAT)], "caption", num_beams=1
    )
    assert events[-2].choices[0].finish_reason == "stop" and events[-1].usage.completion_tokens > 0


def test_an_answer_ends_at_a_stop_and_at_its_limit(client):
    whole = chat(client, user(part(CAT))).choices[0].message.content
    first, second = whole.split()[:2]
    assert chat(client, user(part(CAT)), stop=second).choices[0].message.content.strip() == first
    # a stop that comes before the limit is what ended it
    stopped = chat(client, user(part(CAT)), stop=second, max_tokens=12).choices[0]
    assert stopped.message.content.strip() == first and stopped.finish_reason == "stop"
    events = list(chat(client, user(part(CAT)), stop=[second], stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in events).strip() == first
    short = chat(client, user(part(CAT)), max_tokens=1).choices[0]
    assert len(short.message.content) < len(whole) and short.finish_reason == "length"


def test_sampled_answers_differ_by_seed_and_come_again(client):
    options = {"temperature": 2.0, "n": 4, "seed": 11, "max_completion_tokens": 8}
    first, again = (
        [choice.message.content for choice in chat(client, user(text("what is it?")), **options).choices]
        for _ in range(2)
    )
    assert first == again and len(set(first)) > 1
    second = chat(client, user(text("what is it?")), **(options | {"n": 1, "seed": 12})).choices[0]
    assert second.message.content == first[1]


def test_a_nucleus_alone_is_sampled_from_at_temperature_1(client):
    options = {"seed": 11, "max_completion_tokens": 8}
    alone, named = (
        chat(client, user(text("what is it?")), top_p=0.9, **options, **temperature).choices[0].message.content
        for temperature in ({}, {"temperature": 1.0})
    )
    assert alone == named


def test_a_chat_draws_the_image_of_its_messages(client, engine):
    response = chat(client, user(part(CAT), text("in flat style")), modalities=["image"], seed=3)
    (drawn,) = response.choices[0].message.content
    expected = drawn_alone(engine, [Image.open(CAT), "in flat style"], 3)
    assert_alike(decoded(drawn["image_url"]["url"]), expected)


def test_a_drawn_image_is_part_of_the_next_turn(client, engine):
    first = {"role": "user", "content": "red apple"}
    drawn = chat(client, first, modalities=["image"], seed=0).choices[0].message.content
    second = user(text("what is it?"))
    answer = chat(client, first, {"role": "assistant", "content": drawn}, second).choices[0].message.content
    image = drawn_alone(engine, "red apple", 0)
    blocks = [
        {"role": "user", "content": [text("red apple")]},
        {"role": "assistant", "content": [{"type": "image"}]},
        second,
    ]
    prompt = engine.processor.apply_chat_template(blocks, add_generation_prompt=True)
    assert answer and answer == written_alone(engine, prompt, [image], "answer")


def test_a_mark_of_images_that_a_user_types_is_text(client):
    assert chat(client, user(part(CAT), text("what is <image>?"))).choices[0].message.content


def test_text_and_images_come_as_parts_in_one_answer(client):
    response = chat(client, user(text("red apple")), modalities=["text", "image"], seed=1, max_tokens=60)
    content = response.choices[0].message.content
    assert content and {one["type"] for one in content} <= {"text", "image_url"}


def test_an_answer_of_text_and_images_ends_at_the_server_s_limit(client, engine, monkeypatch):
    monkeypatch.setattr(engine, "max_tokens", 5)
    response = chat(client, user(text("red apple")), modalities=["text", "image"], seed=1)
    assert response.choices[0].finish_reason == "length" and response.usage.completion_tokens == 5


@pytest.mark.parametrize(
    ("payload", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": " "}, 400, "prompt"),
        ({"prompt": 3}, 400, "prompt"),
        ({"prompt": "a" * 9_000}, 400, "prompt"),
        ({"prompt": "a " * 3_000}, 400, None),
        ({"prompt": "a", "n": 0}, 400, "n"),
        ({"prompt": "a", "n": 5}, 400, "n"),
        ({"prompt": "a", "seed": -1}, 400, "seed"),
        ({"prompt": "a", "seed": 2**63}, 400, "seed"),
        ({"prompt": "a", "size": "9999x9999"}, 400, "size"),
        ({"prompt": "a", "size": "large"}, 400, "size"),
        ({"prompt": "a", "output_format": "gif"}, 400, "output_format"),
        ({"prompt": "a", "output_compression": 50}, 400, "output_compression"),
        ({"prompt": "a", "model": "gpt-image-1"}, 404, "model"),
        ({"prompt": "a", "strength": 0.5}, 400, "strength"),
        ({"prompt": "<image> and"}, 400, None),
    ],
)
def test_a_wrong_drawing_is_refused_with_the_field_that_is_wrong(running, payload, status, param):
    assert_refused(requests.post(f"{running.root}/v1/images/generations", json=payload), status, param)


def assert_refused(response, status: int, param: str | None) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and "Traceback" not in str(error)


@pytest.mark.parametrize(
    ("payload", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "judge", "content": "a"}]}, "messages.0.role"),
        ({"messages": [user(text(" "))]}, "messages"),
        ({"messages": [user({"type": "input_audio"})]}, "messages.0.content.0"),
        ({"messages": [user(*[part(CAT)] * 4)]}, "messages"),
        (
            {"messages": [user({"type": "image_url", "image_url": {"url": "http://10.0.0.1/a"}})]},
            "messages.0.content.0.image_url.url",
        ),
        ({"messages": [user(text("a"))], "tools": [{}]}, "tools"),
        ({"messages": [user(text("a"))], "temperature": 3}, "temperature"),
        ({"messages": [user(text("a"))], "max_tokens": 10**9}, "max_tokens"),
        ({"messages": [user(text("a"))], "n": 2}, None),
        ({"messages": [user(text("a"))], "frequency_penalty": 1}, "frequency_penalty"),
        ({"messages": [user(text("a"))], "modalities": ["audio"]}, "modalities.0"),
        ({"messages": [user(text("a"))], "modalities": ["image"], "stream": True}, None),
        ({"messages": [user(text("word " * 600))]}, None),
        ({"messages": [user(text("word " * 600))], "stream": True}, None),
    ],
)
def test_a_wrong_chat_is_refused_with_the_field_that_is_wrong(running, payload, param):
    response = requests.post(f"{running.root}/v1/chat/completions", json={"model": MODEL} | payload)
    assert_refused(response, 400, param)


def test_what_no_answer_depends_on_is_taken(client):
    options = {"frequency_penalty": 0, "presence_penalty": 0.0, "user": "me", "logprobs": False, "store": False}
    assert chat(client, user(part(CAT)), stop=None, **options).choices[0].message.content


@pytest.mark.parametrize(
    ("files", "fields", "param"),
    [
        ({}, {"prompt": "a"}, "image"),
        ({"image": b""}, {"prompt": "a"}, "image"),
        ({"image": b"no image"}, {"prompt": "a"}, "image"),
        ({"image": CAT.read_bytes()}, {}, "prompt"),
        ({"image": CAT.read_bytes()}, {"prompt": "a", "n": "many"}, "n"),
        ({"image": CAT.read_bytes(), "mask": b"x"}, {"prompt": "a"}, "mask"),
    ],
)
def test_a_wrong_edit_is_refused_with_the_field_that_is_wrong(running, files, fields, param):
    files = {name: ("file.png", content) for name, content in files.items()} or {"n": (None, "1")}
    assert_refused(requests.post(f"{running.root}/v1/images/edits", data=fields, files=files), 400, param)


def test_bodies_that_are_no_json_or_too_long_are_refused(running):
    url, json_type = f"{running.root}/v1/images/generations", {"Content-Type": "application/json"}
    for body in (b"", b"{", b"[1", b"\xff\xfe", b"[" * 100_000):
        assert_refused(requests.post(url, data=body, headers=json_type), 400, None)
    assert_refused(requests.post(url, data=b"x" * 300_001, headers=json_type), 413, None)
    chunks = (b"x" * 100_000 for _ in range(50))
    assert_refused(requests.post(url, data=chunks, headers=json_type), 413, None)


def test_other_addresses_and_methods_get_the_api_s_errors(running):
    assert_refused(requests.get(f"{running.root}/v1/nothing"), 404, None)
    assert_refused(requests.get(f"{running.root}/v1/chat/completions"), 405, None)


def test_a_server_with_a_key_asks_for_it_but_tells_its_health(engine):
    server = Running(ServeSettings(api_key="secret"), engine)
    try:
        assert list(server.client(api_key="secret").models.list())
        for wrong in ("wrong", "sécret", "x" * 5000):
            response = requests.get(f"{server.root}/v1/models", headers={"Authorization": f"Bearer {wrong}".encode()})
            assert_refused(response, 401, None)
        with pytest.raises(openai.AuthenticationError):
            server.client().images.generate(prompt="red apple")
        assert requests.get(f"{server.root}/health").json() == {"status": "ok", "replicas": 1}
        assert "lavit_requests_total" in requests.get(f"{server.root}/metrics").text
    finally:
        server.stop()


def test_figures_count_requests_by_route_and_status(running, client):
    client.images.generate(prompt="red apple", n=2)
    requests.get(f"{running.root}/v1/some/{'x' * 100}")
    figures = requests.get(f"{running.root}/metrics").text
    assert 'lavit_requests_total{route="/v1/images/generations",status="200"}' in figures
    assert 'route="other",status="404"' in figures and "xxx" not in figures
    json.dumps(figures)


def test_the_session_of_the_documentation_runs(running, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parent.parent.parent / "docs/serving.md").read_text()
    (session,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("cat.png").write_bytes(CAT.read_bytes())
    exec(session.replace("http://127.0.0.1:8000", running.root), {})
    assert Image.open("drawn.png").size == (48, 48) and Image.open("edited.jpg").format == "JPEG"
    seeds, *texts = capsys.readouterr().out.splitlines()
    assert seeds == "[7, 8]" and all(text.strip() for text in texts)
