"""The figures of `lavit evaluate emoji` as Markdown:

`python -m modeling_lavit.evaluation.emoji.table FIGURES [PAGE [RESULTS]]`.

With a second file, the table there between `<!-- FIGURES -->` and `<!-- /FIGURES -->` is replaced; a third one is
written in the form that model cards read.
"""

import json
import sys
from pathlib import Path

from modeling_lavit.evaluation.output import write_json


BEGIN, END = "<!-- FIGURES -->", "<!-- /FIGURES -->"


def table(report: dict) -> str:
    """One row a figure: seen images, held-out pairs, and the target that was set for them."""
    seen, held = report["seen"], report["held_out"]
    tokens = report["tokens"]

    def pair(task: str, key: str) -> tuple[str, str]:
        return f"{seen[task][key]:.2f}", f"{held[task][key]:.2f}"

    def both(key: str) -> tuple[str, str]:
        return f"{seen[key]:.2f}", f"{held[key]:.2f}"

    rows = [
        ("images", str(seen["images"]), str(held["images"]), ""),
        ("caption, exact match", *both("caption_exact"), ".98 / .65"),
        ("style question, right", *both("style_question"), ".90 / .65"),
        ("reconstruction: name top-5", *pair("reconstruction", "name_top5"), ".97 / .93"),
        ("reconstruction: PSNR, dB", *pair("reconstruction", "psnr"), "20 / 19"),
        (
            f"drawing from text, {seen['text_to_image']['prompts']} / {held['text_to_image']['prompts']}: name top-5",
            *pair("text_to_image", "name_top5"),
            ".95 / .80",
        ),
        ("text → image: name top-1", *pair("text_to_image", "name_top1"), ""),
        ("text → image: style right", *pair("text_to_image", "style"), ".80 / .45"),
        ('image + "in X style" → image: name top-5', *pair("image_and_text_to_image", "name_top5"), "– / .60"),
        ('image + "in X style" → image: style right', *pair("image_and_text_to_image", "style"), "– / .55"),
        ("the classifier on the real images: name top-5", *pair("classifier_on_real", "name_top5"), ""),
        ("the classifier on the real images: style", *pair("classifier_on_real", "style"), ""),
    ]
    lines = ["| | seen | held out | target |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    codes = [
        ("codes used", f"{tokens['codes_used']:.1%}", "> 90 %"),
        ("perplexity, share of the codebook", f"{tokens['perplexity_share']:.1%}", "> 40 %"),
        ("distinct codes per image ÷ kept", f"{tokens['distinct_per_kept']:.2f}", ".8"),
        ("mean keep rate (target .333)", f"{tokens['keep_rate']:.3f}", "± .03"),
        (
            "kept patches: mean, least, most",
            f"{tokens['kept_mean']:.1f}, {tokens['kept_min']:.0f}, {tokens['kept_max']:.0f}",
            "",
        ),
        ("correlation of kept count with PNG size", f"{tokens['png_size_correlation']:.2f}", ".40"),
        (
            f"seconds per image from text, on {report['threads']} thread(s)",
            f"{report['seconds_from_text']:.2f}",
            "< .5",
        ),
    ]
    if foreign := report.get("foreign"):
        name = f"caption of {foreign['images']} images in a style that was never seen"
        codes.append((name, f"{foreign['caption_exact']:.2f}", ".30"))
    lines += ["", "| | | target |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in codes]
    return "\n".join(lines)


def results(report: dict) -> list[dict]:
    """The main figures, each as `lavit evaluate` writes results of other data."""
    by_classifier = "the checkpoint's defaults; by a classifier that takes part in no training"
    kinds = [
        ("captions", "caption is the name", "caption_exact", None, "word for word"),
        ("answers", "style is right", "style_question", None, "word for word"),
        ("drawings", "from text: name in the top 5", "text_to_image", "name_top5", by_classifier),
        ("drawings", "from text: style is right", "text_to_image", "style", by_classifier),
        ("drawings", "from image and style: name in the top 5", "image_and_text_to_image", "name_top5", by_classifier),
        ("tokens", "reconstruction: name in the top 5", "reconstruction", "name_top5", by_classifier),
        ("tokens", "reconstruction: PSNR (dB)", "reconstruction", "psnr", "mean over images"),
    ]
    found = []
    for task, metric, figure, key, protocol in kinds:
        for split in ("seen", "held_out"):
            value, count = report[split][figure], report[split]["images"]
            if task == "drawings":
                count = value.get("prompts")
            found.append(
                {
                    "task": task,
                    "dataset": "emoji",
                    "metric": metric,
                    "score": value[key] if key else value,
                    "protocol": protocol,
                    "settings": {"split": split.replace("_", " "), "checkpoint": report["checkpoint"]},
                    "ids": {"count": count} if count else {},
                }
            )
    return found


def main(arguments: list[str]) -> None:
    report = json.loads(Path(arguments[0]).read_text())
    text = table(report)
    if len(arguments) == 1:
        print(text)
        return
    readme = Path(arguments[1])
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    if len(arguments) > 2:
        Path(arguments[2]).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(arguments[2]), {"results": results(report)})


if __name__ == "__main__":
    main(sys.argv[1:])
