"""LaVIT in lmms-eval, against a stand-in of the harness's own classes (its dependencies are heavy)."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image


IMAGES = Path(__file__).parent.parent / "fixtures" / "emoji" / "images" / "noto"
NAMES = ("cat-face", "palm-tree", "hot-beverage")


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = field(default=())


@pytest.fixture(scope="module")
def plugin():
    """The plugin's module, loaded with a stand-in of `lmms_eval`."""
    names = ["lmms_eval", "lmms_eval.models", "lmms_eval.models.registry_v2"]
    names += ["lmms_eval.api", "lmms_eval.api.model", "lmms_eval.api.instance"]
    modules = {name: ModuleType(name) for name in names}

    class Lmms:
        is_simple = True

        def __init__(self):
            self._rank, self._world_size, self.task_dict = 0, 1, {}

        rank = property(lambda self: self._rank)
        world_size = property(lambda self: self._world_size)

    modules["lmms_eval.api.model"].lmms = Lmms
    modules["lmms_eval.api.instance"].GenerationResult = type("GenerationResult", (), {})
    modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest
    sys.modules.update(modules)
    import modeling_lavit.evaluation.lmms_eval_models as module

    yield module
    for name in (*names, module.__name__):
        sys.modules.pop(name, None)


def give_task(model):
    documents = [{"image": Image.open(IMAGES / f"{name}.png"), "name": name.replace("-", " ")} for name in NAMES]
    model.task_dict = {"emoji": {"test": documents}}
    return model


@pytest.fixture(scope="module")
def simple(plugin):
    return give_task(plugin.Lavit(batch_size="2"))


@pytest.fixture(scope="module")
def chat(plugin):
    return give_task(plugin.LavitChat(batch_size=2))


def visual(document) -> list:
    return [document["image"]]


def request(*arguments):
    return SimpleNamespace(args=arguments, metadata={})


def ask(index: int, context: str, **settings):
    return request(context, settings, visual, index, "emoji", "test")


CAPTION = {"generation_preset": "caption"}
QUESTION = "Question: which style is this? Answer:"


def test_the_entry_point_names_both_classes(plugin):
    manifest = plugin.manifest()
    assert manifest.model_id == "lavit"
    for path, is_simple in ((manifest.simple_class_path, True), (manifest.chat_class_path, False)):
        module, name = path.rsplit(".", 1)
        assert module == plugin.__name__ and getattr(plugin, name).is_simple is is_simple


def test_answers_come_in_the_order_of_the_requests_whatever_their_settings(simple):
    requests = [
        ask(0, "", **CAPTION),
        ask(1, QUESTION, generation_preset="answer"),
        ask(2, "", **CAPTION),
        ask(1, "", **CAPTION),
    ]
    answers = simple.generate_until(requests)
    assert answers[0] == "cat face" and answers[1] == "noto" and answers[3] == "palm tree" and len(answers) == 4
    assert [simple.generate_until([one])[0] for one in requests] == answers


def test_texts_are_cut_where_the_task_says(simple):
    assert simple.generate_until([ask(0, "", max_new_tokens=8, until=[" face", "\n\n"])]) == ["cat"]


def test_chat_messages_are_prompts_as_contexts_are(simple, chat):
    def messages(document):
        image = {"type": "image", "url": document["image"]}
        return [{"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}]

    settings = {"generation_preset": "answer"}
    requests = [request("", messages, settings, i, "emoji", "test") for i in range(3)]
    assert chat.generate_until(requests) == simple.generate_until([ask(i, QUESTION, **settings) for i in range(3)])


def test_the_right_name_is_more_probable_and_is_what_would_be_written(simple):
    requests = [request("", f" {name}", visual, 1, "emoji", "test") for name in ("cat face", "palm tree")]
    requests.append(request("", lambda document: document["name"], visual, 0, "emoji", "test"))
    requests.append(request("a red", " apple"))
    results = simple.loglikelihood(requests)
    assert [greedy for _, greedy in results[:3]] == [False, True, True]
    assert results[1][0] > results[0][0] and len(results) == 4 and all(value < 0 for value, _ in results)
    # the evaluator takes the least value of several answers, and perplexities of log-likelihoods
    assert results[1].text == (-results[1][0], True) and results[2].text == results[2]


def test_rounds_go_on_until_the_task_ends_them(simple, chat):
    def next_round(document, previous_output, round_idx, previous_round_info):
        return [document["image"]], QUESTION, round_idx == 2, previous_output, None

    settings = {"generation_preset": "answer"}
    rounds = simple.generate_until_multi_round([request("", settings, visual, next_round, 0, "emoji", "test")])
    assert len(rounds) == 1 and len(rounds[0]) == 2 and rounds[0][1] == "noto"

    def messages(document, round_idx=None, previous_output=None, previous_round_info=None):
        content = [{"type": "image", "url": document["image"]}, {"type": "text", "text": QUESTION}]
        turn = [{"role": "user", "content": content}]
        return turn if round_idx is None else (turn, round_idx == 2, previous_output, None)

    assert chat.generate_until_multi_round([request("", messages, settings, 0, "emoji", "test")]) == [["noto"] * 2]


def test_drawings_are_answered_as_json_with_files(plugin, tmp_path):
    model = give_task(plugin.Lavit(mode="image", output=str(tmp_path), seed=3))
    (answer,) = model.generate_until([request("a red apple", {}, lambda document: [], 0, "emoji", "test")])
    drawn = json.loads(answer)
    assert drawn["text"] == "" and [Path(name).parent for name in drawn["images"]] == [tmp_path]
    alone = model.pipe("a red apple", generator=torch.Generator().manual_seed(3)).images[0]
    assert Image.open(drawn["images"][0]).tobytes() == alone.tobytes()


def test_an_unknown_mode_is_refused(plugin):
    with pytest.raises(ValueError, match="mode must be 'text' or 'image'"):
        plugin.Lavit(mode="video")
