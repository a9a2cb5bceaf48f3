"""Training and measuring of shapes-64, part by part.

    python -m sdq_deploy.shapes64.train vae        --out WORK
    python -m sdq_deploy.shapes64.train classifier --out WORK
    python -m sdq_deploy.shapes64.train denoiser   --out WORK
    python -m sdq_deploy.shapes64.train assemble   --out WORK --model FOLDER
    python -m sdq_deploy.shapes64.train evaluate   --out WORK --model FOLDER

Every trainer writes checkpoints to WORK and goes on from them with `--resume`.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from sdq_deploy.shapes64.paths import model_path
from sdq_deploy.shapes64.splits import held_out_pairs, validation_pairs
from sdq_deploy.shapes64.train.loop import LoopConfig, run_in_processes

_TRAINERS = {"vae": (3000, 2e-3), "classifier": (1500, 3e-3), "denoiser": (6600, 6e-4)}  # steps, peak learning rate


def main() -> None:
    arguments = _parser().parse_args()
    commands = {"assemble": _assemble, "evaluate": _evaluate}
    commands.get(arguments.part, _train)(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sdq_deploy.shapes64.train")
    parts = parser.add_subparsers(dest="part", required=True)
    for name, (steps, peak_lr) in _TRAINERS.items():
        part = parts.add_parser(name, help=f"train the {name}")
        part.add_argument("--out", type=Path, required=True, help="work folder: caches, checkpoints, trained parts")
        part.add_argument("--steps", type=int, default=steps)
        part.add_argument("--lr", type=float, default=peak_lr, help="peak of the one-cycle schedule")
        part.add_argument("--seed", type=int, default=0)
        part.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        part.add_argument("--processes", type=int, default=1, help="processes that share each batch")
        part.add_argument("--init", type=Path, help="checkpoint of an earlier cycle to start from")
        part.add_argument("--resume", action="store_true")
    assemble = parts.add_parser("assemble", help="write the trained parts as one diffusers folder")
    assemble.add_argument("--out", type=Path, required=True)
    assemble.add_argument("--model", type=Path, default=model_path())
    evaluate = parts.add_parser("evaluate", help="measure caption accuracy and draw the contact sheet")
    evaluate.add_argument("--out", type=Path, required=True, help="where the report goes")
    evaluate.add_argument("--model", type=Path, default=model_path())
    evaluate.add_argument("--split", choices=("held_out", "validation"), default="held_out")
    evaluate.add_argument("--pairs", type=int, default=1024)
    evaluate.add_argument("--steps", type=int, default=20)
    evaluate.add_argument("--guidance-scale", type=float, nargs="+", default=[3.0])
    evaluate.add_argument("--sheet", type=Path, help="PNG of 32 samples")
    evaluate.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def _train(arguments: argparse.Namespace) -> None:
    work = arguments.out
    loop = LoopConfig(
        out=work / arguments.part,
        steps=arguments.steps,
        peak_lr=arguments.lr,
        seed=arguments.seed,
        device=arguments.device,
        resume=arguments.resume,
        init=arguments.init,
    )
    vae, cache = work / "vae" / "vae", work / "cache"
    if arguments.part == "vae":
        from sdq_deploy.shapes64.train.vae import prepare_vae, train_vae

        prepare_vae(cache)
        run_in_processes(partial(train_vae, loop, cache), arguments.processes)
    elif arguments.part == "classifier":
        from sdq_deploy.shapes64.train.classifier import train_classifier

        train_classifier(loop, vae, cache)
    else:
        from sdq_deploy.shapes64.train.denoiser import prepare_denoiser, train_denoiser

        prepare_denoiser(loop, vae, cache)
        run_in_processes(partial(train_denoiser, loop, vae, cache), arguments.processes)


def _assemble(arguments: argparse.Namespace) -> None:
    from sdq_deploy.shapes64.train.assemble import assemble

    folder = assemble(arguments.out, arguments.model)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.2f} MB")


def _evaluate(arguments: argparse.Namespace) -> None:
    from diffusers import StableDiffusionPipeline

    from sdq_deploy.shapes64.train.evaluate import contact_sheet, evaluate, generate, write_report

    pipeline = StableDiffusionPipeline.from_pretrained(arguments.model, safety_checker=None).to(arguments.device)
    classifier = arguments.model / "classifier" / "classifier.safetensors"
    pairs = (held_out_pairs if arguments.split == "held_out" else validation_pairs)(arguments.pairs)
    reports = []
    for scale in arguments.guidance_scale:
        reports.append(evaluate(pipeline, classifier, pairs, scale, arguments.steps))
        print(reports[-1], flush=True)
    write_report({"split": arguments.split, "results": reports}, arguments.out / f"evaluation-{arguments.split}.json")
    if arguments.sheet:
        shown = pairs[:32]
        images = generate(pipeline, shown, arguments.guidance_scale[0], arguments.steps)
        contact_sheet(images, [pair.prompt for pair in shown], arguments.sheet)


if __name__ == "__main__":
    main()
