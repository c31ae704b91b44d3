"""TRL's trainers train this package's model as they train every other."""

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny import tiny_model, tiny_processor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from modeling_lavit import LavitForConditionalGeneration


pytestmark = pytest.mark.slow


SETTINGS = dict(
    max_steps=2,
    per_device_train_batch_size=2,
    learning_rate=1e-2,
    logging_steps=1,
    report_to=[],
    save_strategy="no",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
)


# of unequal length
QUESTIONS = ["what colour is the apple", "is it big", "what is on the table", "two blue cats and dogs in snow"]
ANSWERS = ["a red apple", "two cats", "snow", "a photo of it"]


def message(role: str, text: str, *blocks: dict) -> dict:
    return {"role": role, "content": [*blocks, {"type": "text", "text": text}]}


def question(answered: bool = True) -> list[dict]:
    asked, said = message("user", QUESTIONS[0], {"type": "image"}), message("assistant", ANSWERS[0])
    return [asked, said] if answered else [asked]


def questions(image: bool = True) -> list[list[dict]]:
    return [[message("user", text, *[{"type": "image"}] * image)] for text in QUESTIONS]


def answers(texts: list[str]) -> list[list[dict]]:
    return [[message("assistant", text)] for text in texts]


@torch.no_grad()
def read_alone(model, prompt: list[dict], image, answer: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of an answer's ids behind its prompt, without any padding, and which are the most probable."""
    processor = tiny_processor()
    rendered = processor.apply_chat_template(prompt, add_generation_prompt=True)
    whole = processor.apply_chat_template([*prompt, *answer])
    inputs = processor(text=rendered, images=image)
    ids = processor(text=whole[len(rendered) :])["input_ids"]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    log_probs = model(**inputs).logits[0, -1 - ids.shape[1] : -1].log_softmax(-1)
    return log_probs.gather(1, ids[0, :, None])[:, 0], log_probs.argmax(-1) == ids[0]


def first_entry(trainer) -> dict:
    """What was logged of the first step, which the weights as they were took."""
    trainer.train()
    return trainer.state.log_history[0]


def images(count: int = 4) -> list:
    return [[Image.new("RGB", (16, 16), (60 * i, 20, 90))] for i in range(count)]


def losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [{}, {"assistant_only_loss": True}, {"max_length": 64}])
def test_sft_on_conversations_with_images(tmp_path, options):
    rows = Dataset.from_dict({"messages": [question()] * 4, "images": images()})
    args = SFTConfig(tmp_path, **SETTINGS, **options)
    trainer = SFTTrainer(tiny_model(), args, train_dataset=rows, processing_class=tiny_processor())
    assert all(torch.tensor(losses(trainer)).isfinite())


@pytest.mark.parametrize("conversational", [True, False])
def test_sft_on_prompts_and_completions_has_the_loss_and_accuracy_of_each_row_read_alone(tmp_path, conversational):
    columns = {"prompt": questions(), "completion": answers(ANSWERS), "images": images()}
    model, processor = tiny_model(), tiny_processor()
    alone = [
        read_alone(model, *row)
        for row in zip(columns["prompt"], columns["images"], columns["completion"], strict=True)
    ]
    if not conversational:
        rendered = [processor.apply_chat_template(prompt, add_generation_prompt=True) for prompt in columns["prompt"]]
        columns |= {"prompt": rendered, "completion": [f" {text}\n" for text in ANSWERS]}
    args = SFTConfig(tmp_path, **SETTINGS | {"per_device_train_batch_size": 4})
    entry = first_entry(SFTTrainer(model, args, train_dataset=Dataset.from_dict(columns), processing_class=processor))
    log_probs, greedy = (torch.cat(parts) for parts in zip(*alone, strict=True))
    assert entry["loss"] == pytest.approx(-log_probs.mean().item(), abs=2e-4)
    assert entry["mean_token_accuracy"] == pytest.approx(greedy.double().mean().item(), abs=1e-6)


def test_sft_counts_the_tokens_that_an_untrained_model_gets_right(tmp_path):
    """An answer that the model would have written itself is right token by token."""
    model, processor = tiny_model(), tiny_processor()
    prompt = processor(text="<image>what colour", images=images(1)[0])
    new = model.generate(**prompt, max_new_tokens=4, eos_token_id=None)[0, prompt["input_ids"].shape[1] :]
    collated = {"input_ids": torch.cat([prompt["input_ids"][0], new])[None], "pixel_values": prompt["pixel_values"]}
    collated["labels"] = collated["input_ids"].clone()
    collated["labels"][:, :-4] = -100
    collated["attention_mask"] = torch.ones_like(collated["labels"])
    rows = Dataset.from_dict({"prompt": ["<image>what colour"], "completion": ["red"], "images": images(1)})
    args = SFTConfig(tmp_path, **SETTINGS | {"max_steps": 1})
    trainer = SFTTrainer(
        model, args, train_dataset=rows, processing_class=processor, data_collator=lambda examples: dict(collated)
    )
    assert first_entry(trainer)["mean_token_accuracy"] == 1


@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_a_length_that_cuts_into_an_image_is_an_error(tmp_path, form):
    long = " ".join([QUESTIONS[0]] * 4)
    asked = {"role": "user", "content": [{"type": "text", "text": long}, {"type": "image"}]}
    columns = {"images": images(2)}
    if form == "messages":
        columns["messages"] = [[asked, *answers(["red"])[0]]] * 2
    else:
        columns |= {"prompt": [[asked]] * 2, "completion": answers(["red"] * 2)}
    args = SFTConfig(tmp_path, **SETTINGS, max_length=20)
    rows = Dataset.from_dict(columns)
    trainer = SFTTrainer(tiny_model(), args, train_dataset=rows, processing_class=tiny_processor())
    with pytest.raises(ValueError, match="truncation|cut"):
        trainer.train()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """TRL loads its reference model from where the trained one came from."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    return LavitForConditionalGeneration.from_pretrained(folder)


def copy_of(saved):
    return LavitForConditionalGeneration.from_pretrained(saved.name_or_path)


def test_dpo_has_the_log_probabilities_of_each_row_read_alone(saved, tmp_path):
    chosen, rejected = answers(ANSWERS), answers(ANSWERS[::-1])
    columns = {"prompt": questions(), "chosen": chosen, "rejected": rejected, "images": images()}
    args = DPOConfig(tmp_path, **SETTINGS | {"per_device_train_batch_size": 4})
    model = copy_of(saved)
    trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_dict(columns), processing_class=tiny_processor())
    entry = first_entry(trainer)
    for kind, said in (("chosen", chosen), ("rejected", rejected)):
        rows = zip(columns["prompt"], columns["images"], said, strict=True)
        expected = torch.stack([read_alone(saved, *row)[0].sum() for row in rows]).mean()
        assert entry[f"logps/{kind}"] == pytest.approx(expected.item(), rel=1e-5)
    assert entry["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=2e-4)
    assert all(torch.tensor([one["loss"] for one in trainer.state.log_history if "loss" in one]).isfinite())


@pytest.mark.parametrize("image", [True, False])
def test_grpo_reads_and_answers_prompts_of_unequal_length_as_each_alone(saved, tmp_path, image):
    written = []

    def reward(prompts, completion_ids, **kwargs) -> list[float]:
        written.extend(zip(prompts, completion_ids, strict=True))
        return [float(ids[0]) for ids in completion_ids]

    columns = {"prompt": questions(image)} | ({"images": images()} if image else {})
    options = {"per_device_train_batch_size": 8, "max_steps": 1, "generation_kwargs": {"do_sample": False}}
    trainer = GRPOTrainer(
        copy_of(saved),
        reward_funcs=reward,
        args=GRPOConfig(tmp_path, **SETTINGS | options, num_generations=2, max_completion_length=5),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tiny_processor(),
    )
    entry, entropies = first_entry(trainer), []
    assert len(written) == 8
    for prompt, ids in written:
        inputs = tiny_processor().apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        out = saved.generate(**inputs, max_new_tokens=5)
        assert out[0, inputs["input_ids"].shape[1] :].tolist() == ids
        with torch.no_grad():
            logits = saved(out, pixel_values=inputs.get("pixel_values")).logits
        log_probs = logits[0, -1 - len(ids) : -1].log_softmax(-1)
        entropies.append(-(log_probs.exp() * log_probs).sum(-1))
    assert entry["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-5)


def test_grpo_with_images(saved, tmp_path):
    rows = Dataset.from_dict({"prompt": questions(), "images": images()})
    args = GRPOConfig(tmp_path, **SETTINGS, num_generations=2, max_completion_length=4)
    trainer = GRPOTrainer(
        copy_of(saved),
        reward_funcs=lambda completions, **kwargs: [float(len(str(one))) for one in completions],
        args=args,
        train_dataset=rows,
        processing_class=tiny_processor(),
    )
    assert all(torch.tensor(losses(trainer)).isfinite())
