"""The commands that need a package and no torch: run, build and bench, and here inspect, verify and doctor."""

from __future__ import annotations

import typer

from sdq_deploy.cli.bench import bench
from sdq_deploy.cli.build import build
from sdq_deploy.cli.options import JsonOption, PackageArgument
from sdq_deploy.cli.package_output import megabytes, print_engine, print_evaluation, print_parity, say
from sdq_deploy.cli.run import run
from sdq_deploy.cli.shared import print_json
from sdq_deploy.display.consoles import new_progress

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    for command in (run, build, inspect, verify, doctor, bench):
        app.command(rich_help_panel="Packages (no torch needed)")(command)


def inspect(package: PackageArgument, json: JsonOption = False) -> None:
    """Show what a package says about itself. No file but its manifest is read.

    Example: sdq-deploy inspect package
    """
    from sdq_engines.package.store import read_manifest
    from sdq_engines.summary import summary

    content = summary(read_manifest(package))
    if json:
        print_json(content)
        return
    sampler, source, io = content["sampler"], content["source"], content["io"]
    say(
        f"[bold]{content['name']}[/]  {content['precision']}, {content['family']}, "
        f"{io['image_size'][1]}x{io['image_size'][0]} pixels"
    )
    say(
        f"sampler  {sampler['scheduler']}, {sampler['num_inference_steps']} steps, guidance {sampler['guidance_scale']}"
    )
    chunks, skipped = (max((text[key] for text in content["text"]), default=0) for key in ("chunks", "clip_skip"))
    if chunks > 1 or skipped:
        say(f"prompts  {chunks} chunk(s) of {content['text'][0]['max_length']} tokens, clip_skip {skipped}")
    say(f"source   {source['model']}, licence {source['license']}. {source['changes']}", markup=False)
    for part, size in content["bytes"].items():
        say(f"  {part:24} {megabytes(size)}")
    if parity := content["fidelity"].get("parity"):
        say("parity, as measured by the export")
        print_parity(parity)
    if evaluation := content["fidelity"].get("evaluation"):
        print_evaluation(evaluation)
    for name, entry in content["engines"].items():
        print_engine(name, entry)


def verify(package: PackageArgument, json: JsonOption = False) -> None:
    """Check a package: its manifest, its paths and the hash of every file.

    Example: sdq-deploy verify package
    """
    from sdq_engines.package.store import open_package, read_manifest

    manifest = read_manifest(package)
    total = sum(entry.size for entry in manifest.files.values())
    with new_progress() as progress:
        task = progress.add_task("hashing", total=max(total, 1))
        open_package(package, on_bytes=lambda size: progress.advance(task, size))
    if json:
        print_json({"ok": True, "files": len(manifest.files), "bytes": total})
    else:
        say(f"{package}: {len(manifest.files)} files, {megabytes(total)}, all as the manifest says.")


def doctor(json: JsonOption = False) -> None:
    """Say which engines work on this machine, and why the others do not.

    Example: sdq-deploy doctor
    """
    from dataclasses import asdict

    from sdq_engines.doctor import diagnose

    found = diagnose()
    if json:
        print_json(asdict(found))
        return
    say(f"Python {found.python}, {found.platform}")
    for name, engine in found.engines.items():
        if engine.works:
            say(f"[green]works[/]  {name:13} {engine.version}  {engine.device}")
        else:
            builds = " (builds here)" if engine.builds else ""
            say(f"[red]no[/]     {name:13} {engine.reason}{builds}")
            say(f"       {'':13} {engine.hint}", markup=False)
    say(f"auto takes: {found.auto or 'nothing; install an engine first'}")
