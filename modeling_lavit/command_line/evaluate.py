"""`lavit evaluate`: captions, answers, drawings, visual tokens and retrieval on data as users hold them.

Files are read and scored without torch; it is imported when a model is to work.
"""

import argparse
import importlib
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from .common import Parser, model_source, positive_number, seed_number


EMOJI_REPORT = "modeling_lavit.evaluation.emoji.report"
JAVA_METRICS = ("METEOR", "SPICE")
FORMATS = ("float16", "bfloat16", "int8", "int4")
PROTOCOLS = ("official", "lavit", "lmms-eval")

EPILOG = """\
examples:
  lavit evaluate captions --annotations dataset_coco.json --images coco --output runs/coco
  lavit evaluate captions --annotations captions_val2014.json --predictions captions.json --output runs/scored
  lavit evaluate answers --questions Q.json --annotations A.json --images val2014 --output runs/vqa --protocol lavit

An interrupted run resumes when it is started again; accelerate launch -m modeling_lavit.command_line evaluate ...
divides it among processes, --ray among workers of a cluster. docs/evaluation.md says what can be compared with what.
"""


def build_parser() -> Parser:
    """`parse_args(...).run(options)` evaluates."""
    parser = Parser(
        prog="lavit evaluate",
        description="Scores a checkpoint, or existing predictions.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)

    def add(name: str, run, help: str, batch_size: int, unit: str) -> Parser:
        kind = kinds.add_parser(name, help=help, description=f"Scores {help}.")
        kind.set_defaults(run=run)
        kind.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for everything written")
        kind.add_argument(
            "--model",
            metavar="PATH_OR_REPO",
            help="checkpoint folder, or repository on the Hub (default: the embedded checkpoint lavit-emoji)",
        )
        kind.add_argument("--device", help="such as cpu or cuda:1 (default: cuda if there is a GPU, else cpu)")
        kind.add_argument(
            "--batch-size", type=positive_number, default=batch_size, metavar="N", help=f"(default: {batch_size})"
        )
        kind.add_argument("--limit", type=positive_number, metavar="N", help=f"only N {unit}, drawn with --seed")
        kind.add_argument("--seed", type=seed_number, default=0, help="of --limit, and of what is drawn (default: 0)")
        kind.add_argument("--ray", type=positive_number, metavar="N", help="run as a Ray Data job of N workers")
        return kind

    _add_captions(add("captions", captions, "captions: CIDEr-D, BLEU, ROUGE-L", 32, "images"))
    _add_answers(add("answers", answers, "answers to questions about images", 32, "questions"))
    _add_drawings(add("drawings", drawings, "drawings of a suite's prompts: FID, CLIP score", 8, "prompts"))
    _add_tokens(add("tokens", tokens, "the visual tokens of a folder's images", 32, "images"))
    _add_retrieval(
        add("retrieval", retrieval, "images found by their captions, and captions by their images", 16, "images")
    )

    _add_formats(
        add("formats", formats, "what half precision and quantized weights change in codes and captions", 32, "images")
    )

    kinds.add_parser("emoji", help="the embedded checkpoint's own report", add_help=False)
    return parser


def _add_captions(kind: Parser) -> None:
    kind.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="reference captions")
    kind.add_argument("--images", type=Path, metavar="DIR", help="folder of the images that the model describes")
    kind.add_argument("--predictions", type=Path, metavar="FILE", help="captions to score instead of the model's")
    kind.add_argument("--split", help="of annotations that have some (default: test)")
    kind.add_argument(
        "--java",
        nargs="*",
        choices=JAVA_METRICS,
        metavar="METRIC",
        help="also METEOR and SPICE, or the one that is named, by pycocoevalcap and Java",
    )


def _add_answers(kind: Parser) -> None:
    kind.add_argument("--questions", type=Path, metavar="FILE", help="questions")
    kind.add_argument("--annotations", type=Path, metavar="FILE", help="answers, if they are in another file")
    kind.add_argument("--images", type=Path, metavar="DIR", help="folder of the images that the questions are about")
    kind.add_argument("--predictions", type=Path, metavar="FILE", help="answers to score instead of the model's")
    kind.add_argument("--protocol", choices=PROTOCOLS, default="official", help="(default: official)")
    kind.add_argument("--lemmatize", action="store_true", help="compare nouns and verbs in their base forms, by spaCy")


def _add_drawings(kind: Parser) -> None:
    kind.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="captions of COCO, GenEval's metadata, DPG-Bench's folder, or a file of T2I-CompBench",
    )
    kind.add_argument("--images", type=Path, metavar="DIR", help="folder of real images, for FID")
    kind.add_argument(
        "--predictions", type=Path, metavar="DIR", help="folder of drawings to score instead of the model's"
    )
    kind.add_argument("--inception", metavar="FILE", help="torch-fidelity's weights, or package.module:Class, for FID")
    kind.add_argument("--clip", metavar="PATH_OR_REPO", help="a CLIP, for the CLIP score")
    kind.add_argument("--rerank", metavar="PATH_OR_REPO", help="a CLIP that chooses the best of --candidates")
    kind.add_argument(
        "--candidates", type=positive_number, default=1, metavar="N", help="drawings for each image (default: 1)"
    )
    kind.add_argument("--n", type=positive_number, metavar="N", help="images for each prompt (default: the suite's)")
    kind.add_argument(
        "--pixel-decoder",
        metavar="NAME",
        help="subfolder of another pixel decoder, such as lowres, used for the paper's FID",
    )
    kind.add_argument("--guidance-scale", type=float, metavar="S", help="of the language model")
    kind.add_argument("--top-k", type=positive_number, metavar="K", help="of the language model")
    kind.add_argument("--temperature", type=float, metavar="T", help="of the language model")
    kind.add_argument("--steps", type=positive_number, metavar="N", help="denoising steps")
    kind.add_argument("--decoder-guidance-scale", type=float, metavar="S", help="of the pixel decoder")


def _add_tokens(kind: Parser) -> None:
    kind.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of images")
    kind.add_argument(
        "--shares", type=float, nargs="+", default=[], metavar="R", help="shares of the patches to keep, for a curve"
    )
    kind.add_argument("--reconstruct", action="store_true", help="also draw from the tokens: PSNR and SSIM")


def _add_retrieval(kind: Parser) -> None:
    kind.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="reference captions")
    kind.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the images")
    kind.add_argument("--split", help="of annotations that have some (default: test)")


def _add_formats(kind: Parser) -> None:
    kind.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of images")
    kind.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=FORMATS, metavar="F", help=f"of {', '.join(FORMATS)} (all)"
    )


def main(arguments: list[str] | None = None) -> None:
    """Evaluates; errors are those of the command `lavit`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["emoji"]:
        importlib.import_module(EMOJI_REPORT).main(arguments[1:])
        return
    options = build_parser().parse_args(arguments)
    options.run(options)


def evaluation_module(name: str):
    """A module of the evaluation package, without importing the whole package and torch with it."""
    if "modeling_lavit" in sys.modules:
        return importlib.import_module(f"modeling_lavit.evaluation.{name}")
    if "lavit_evaluation" not in sys.modules:
        package = Path(__file__).resolve().parent.parent
        candidates = (package / "evaluation", package.parent / "evaluation")
        folder = next(folder for folder in candidates if (folder / "__init__.py").is_file())
        spec = spec_from_file_location(
            "lavit_evaluation", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"{folder} is no package")
        sys.modules[spec.name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    return importlib.import_module(f"lavit_evaluation.{name}")


def model_runner(options: argparse.Namespace, worker: str, unit: str, **worker_options):
    """`run_model` of the evaluations: loads `module.Class` of the evaluation package and has it work."""

    def run_model(output, settings: dict, items: list[dict], **further):
        from modeling_lavit.evaluation.model_run import run_model

        module, name = worker.split(".")
        return run_model(
            output,
            settings,
            items,
            getattr(importlib.import_module(f"modeling_lavit.evaluation.{module}"), name),
            unit,
            model_source(options),
            options.device,
            options.batch_size,
            options.ray,
            **worker_options,
            **further,
        )

    return run_model


def check_model_options(options: argparse.Namespace) -> None:
    """Refuses options of a model where predictions are given."""
    given = [name for name in ("model", "device", "ray") if getattr(options, name) is not None]
    if options.predictions is not None and given:
        raise ValueError(f"--{given[0]} is of a model, but --predictions exist already: leave one out")


def captions(options: argparse.Namespace) -> None:
    """`lavit evaluate captions`"""
    check_model_options(options)
    results = evaluation_module("run").evaluate_captions(
        options.annotations,
        options.output,
        images=options.images,
        predictions=options.predictions,
        split=options.split,
        limit=options.limit,
        seed=options.seed,
        java=JAVA_METRICS if options.java == [] else options.java or (),
        run_model=model_runner(options, "reading.CaptionReader", "image"),
    )
    _print(options.output, results)


def answers(options: argparse.Namespace) -> None:
    """`lavit evaluate answers`"""
    check_model_options(options)
    results = evaluation_module("run").evaluate_answers(
        options.questions,
        options.output,
        annotations=options.annotations,
        images=options.images,
        predictions=options.predictions,
        protocol=options.protocol,
        lemmatize=options.lemmatize,
        limit=options.limit,
        seed=options.seed,
        run_model=model_runner(options, "reading.AnswerReader", "question", protocol=options.protocol),
    )
    _print(options.output, results)


def drawings(options: argparse.Namespace) -> None:
    """`lavit evaluate drawings`"""
    check_model_options(options)
    if (options.rerank is None) != (options.candidates == 1):
        raise ValueError("--rerank chooses among --candidates: give both, at least 2 candidates")
    from modeling_lavit.evaluation.drawings import IMAGES, evaluate_drawings

    names = ("candidates", "rerank", "pixel_decoder", "guidance_scale", "top_k", "temperature")
    worker_options = {name: getattr(options, name) for name in (*names, "decoder_guidance_scale")}
    worker_options |= {"num_inference_steps": options.steps, "folder": str(options.output / IMAGES)}
    results = evaluate_drawings(
        options.prompts,
        options.output,
        images=options.images,
        predictions=options.predictions,
        inception=options.inception,
        clip=options.clip,
        rerank=options.rerank,
        n=options.n,
        limit=options.limit,
        seed=options.seed,
        device=options.device,
        run_model=model_runner(options, "drawings.DrawingWorker", "prompt", **worker_options, seed=options.seed),
    )
    _print(options.output, results)


def tokens(options: argparse.Namespace) -> None:
    """`lavit evaluate tokens`"""
    if wrong := [share for share in options.shares if not 0 < share <= 1]:
        raise ValueError(f"--shares are above 0 and at most 1, got {wrong[0]}")
    from modeling_lavit.evaluation.tokens import evaluate_tokens

    results = evaluate_tokens(
        options.images,
        options.output,
        model_source(options),
        limit=options.limit,
        seed=options.seed,
        run_model=model_runner(
            options,
            "tokens.TokenWorker",
            "image",
            shares=options.shares,
            reconstruct=options.reconstruct,
            seed=options.seed,
        ),
    )
    _print(options.output, results)


def retrieval(options: argparse.Namespace) -> None:
    """`lavit evaluate retrieval`"""
    from modeling_lavit.evaluation.retrieval import evaluate_retrieval

    results = evaluate_retrieval(
        options.annotations,
        options.images,
        options.output,
        split=options.split,
        limit=options.limit,
        seed=options.seed,
        run_model=model_runner(options, "retrieval.TextScorer", "image"),
    )
    _print(options.output, results)


def formats(options: argparse.Namespace) -> None:
    """`lavit evaluate formats`"""
    if options.ray is not None:
        raise ValueError("--ray: formats are compared in one process")
    from modeling_lavit.evaluation.formats import evaluate_formats

    results = evaluate_formats(
        options.images,
        options.output,
        model_source(options),
        formats=tuple(options.formats),
        device=options.device,
        batch_size=options.batch_size,
        limit=options.limit,
        seed=options.seed,
    )
    _print(options.output, results)


def _print(output: Path, results: dict | None) -> None:
    """The table, on the main process."""
    if results is not None:
        print((output / "results.md").read_text(encoding="utf-8"), end="")
