"""The stock Trainer's own arithmetic on this package's outputs: a row for each id, and the label that follows it."""

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny import tiny_model, tiny_processor
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments


TEXTS = ["<image>a red apple", "<image>two blue cats and dogs in snow", "a big table", "<image><image>what colour"]


def rows() -> list[dict]:
    images = [Image.new("RGB", (16, 16), (60 * i, 20, 90)) for i in range(4)]
    return [{"text": text, "images": images[: text.count("<image>")]} for text in TEXTS]


def collate(examples: list[dict]) -> dict:
    """What a user writes: labels are the ids, but for padding and images."""
    processor = tiny_processor()
    images = [example["images"] for example in examples]
    batch = processor(
        text=[example["text"] for example in examples], images=images if any(images) else None, padding_side="right"
    )
    ignored = (batch["attention_mask"] == 0) | (batch["input_ids"] >= processor.boi_token_id)
    return {**batch, "labels": batch["input_ids"].masked_fill(ignored, -100)}


def arguments(folder, **options) -> TrainingArguments:
    settings = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "use_cpu": True, "report_to": []}
    return TrainingArguments(folder, remove_unused_columns=False, save_strategy="no", **settings, **options)


def by_hand(model, smoothing: float = 0.0) -> torch.Tensor:
    """Mean over the labelled ids, each row read alone."""
    losses = []
    for row in rows():
        batch = collate([row])
        labels = batch.pop("labels")[0, 1:]
        logits = model(**batch).logits[0, :-1]
        losses.append(cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")[labels != -100])
    return torch.cat(losses).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_batch_is_that_of_its_rows_with_label_smoothing_too(tmp_path, smoothing):
    model = tiny_model()
    args = arguments(tmp_path, max_steps=1, logging_steps=1, label_smoothing_factor=smoothing)
    trainer = Trainer(model, args, train_dataset=rows(), data_collator=collate)
    expected = by_hand(model, smoothing).item()
    trainer.train()
    # the log is rounded
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=2e-4)


def test_metrics_are_computed_on_a_row_of_logits_for_each_label(tmp_path):
    def metrics(prediction) -> dict:
        predicted, labels = prediction.predictions[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
        return {"accuracy": (predicted == labels)[labels != -100].mean(), "shape": prediction.predictions.shape[:2]}

    model = tiny_model()
    trainer = Trainer(model, arguments(tmp_path), eval_dataset=rows(), data_collator=collate, compute_metrics=metrics)
    results = trainer.evaluate()
    correct = []
    for row in rows():
        batch = collate([row])
        labels = batch.pop("labels")[0, 1:]
        correct.append((model(**batch).logits[0, :-1].argmax(-1) == labels)[labels != -100])
    assert results["eval_accuracy"] == pytest.approx(torch.cat(correct).double().mean().item())
    assert results["eval_loss"] == pytest.approx(by_hand(model).item(), abs=1e-4)
    assert results["eval_shape"] == collate(rows())["labels"].shape


def test_rows_are_grouped_by_their_number_of_ids(tmp_path):
    processor = tiny_processor()

    def encode(batch: dict) -> dict:
        return {"input_ids": processor(text=batch["text"], padding=False, return_tensors=None)["input_ids"]}

    texts = [" ".join(["apple"] * (1 + i % 16)) for i in range(64)]
    encoded = Dataset.from_dict({"text": texts}).map(encode, batched=True)
    args = arguments(tmp_path, train_sampling_strategy="group_by_length")
    trainer = Trainer(tiny_model(), args, train_dataset=encoded, processing_class=processor, data_collator=list)
    batches = [[len(row["input_ids"]) for row in batch] for batch in trainer.get_train_dataloader()]
    # sorted within groups of 16 rows
    groups = [sum(batches[start : start + 4], []) for start in range(0, 16, 4)]
    assert sum(group == sorted(group, reverse=True) for group in groups) >= 3
