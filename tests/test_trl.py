"""TRL's trainers train this package's model as they train every other."""

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny import tiny_model, tiny_processor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from modeling_lavit import LavitForConditionalGeneration


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


def question(answered: bool = True) -> list[dict]:
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is the apple"}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "a red apple"}]}
    return [asked, said] if answered else [asked]


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """TRL loads its reference model from where the trained one came from."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    return LavitForConditionalGeneration.from_pretrained(folder)


def test_dpo_with_images(saved, tmp_path):
    def said(text: str) -> list[dict]:
        return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]

    columns = {"prompt": [question(False)] * 4, "chosen": [said("red")] * 4, "rejected": [said("blue")] * 4}
    rows = Dataset.from_dict({**columns, "images": images()})
    trainer = DPOTrainer(
        saved, args=DPOConfig(tmp_path, **SETTINGS), train_dataset=rows, processing_class=tiny_processor()
    )
    assert all(torch.tensor(losses(trainer)).isfinite())


def test_grpo_with_images(saved, tmp_path):
    rows = Dataset.from_dict({"prompt": [question(False)] * 4, "images": images()})
    args = GRPOConfig(tmp_path, **SETTINGS, num_generations=2, max_completion_length=4)
    trainer = GRPOTrainer(
        saved,
        reward_funcs=lambda completions, **kwargs: [float(len(str(one))) for one in completions],
        args=args,
        train_dataset=rows,
        processing_class=tiny_processor(),
    )
    assert all(torch.tensor(losses(trainer)).isfinite())
