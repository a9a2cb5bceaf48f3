"""`sdq-deploy evaluate` on candidates of the tiny model: what it finds, resumes, refuses and leaves behind."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from sdq_deploy.cli import main
from sdq_engines.package.store import open_package, read_manifest
from tests.deploy.evaluation.helpers import pngs, results_in, run_evaluate, write_prompts
from tests.deploy.launching import finish, launch_nodes
from tests.deploy.training.helpers import ROOT


def test_a_floating_point_package_is_its_model_at_every_step(float_package: Path, tmp_path: Path) -> None:
    """Through the runtime and through torch, with a sampler whose steps draw noise: the same trajectory."""
    out = tmp_path / "out"
    assert run_evaluate(float_package, "--prompts", write_prompts(tmp_path), "--out", out, "--batch-size", 2) == 0
    found = results_in(out)
    (candidate,) = found.candidates
    assert (candidate.kind, candidate.images_by) == ("package", "package, onnxruntime")
    assert [error.step for error in candidate.latent_errors] == [0, 1, 2, 3]
    assert all(error.value < 1e-4 for error in candidate.latent_errors)
    assert candidate.figures["psnr"].value > 55
    assert candidate.figures["ssim"].value > 0.9999
    assert (found.prompts.count, found.sampler.num_inference_steps, found.sampler.guidance_scale) == (5, 4, 4.0)


def test_the_references_images_are_those_of_diffusers(float_package: Path, tiny_sd: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prompts = write_prompts(tmp_path, 3)
    assert run_evaluate(float_package, "--prompts", prompts, "--out", out, "--seed", 40) == 0
    sampler = read_manifest(float_package).sampler
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    import diffusers

    pipeline.scheduler = getattr(diffusers, sampler.scheduler).from_config(sampler.config)
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(
        "a red circle number 2", num_inference_steps=4, guidance_scale=4.0, generator=torch.Generator().manual_seed(42)
    ).images[0]
    found = np.asarray(Image.open(out / "images" / "FP" / "00002.png")).astype(int)
    assert np.abs(found - np.asarray(wanted).astype(int)).max() <= 1


def test_two_processes_make_what_one_makes(checkpoint: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, 7)
    outs = [tmp_path / "one", tmp_path / "two"]
    for out, processes in zip(outs, (1, 2), strict=True):
        code = run_evaluate(
            f"w8a8={checkpoint}", "--prompts", prompts, "--out", out, "--batch-size", 2, "--processes", processes
        )
        assert code == 0
    one, two = (results_in(out).model_dump(exclude={"seconds"}) for out in outs)
    assert one == two
    for name in ("FP", "w8a8"):
        assert len(pngs(outs[0], name)) == 7
        assert pngs(outs[0], name) == pngs(outs[1], name)
    assert (outs[0] / "per-image.csv").read_text() == (outs[1] / "per-image.csv").read_text()


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="nodes launched as on Linux")
def test_two_launched_nodes_make_what_one_process_makes(checkpoint: Path, tmp_path: Path) -> None:
    """Each a part of the images, from whatever was there before; one of them scores and prints."""
    prompts, alone, together = write_prompts(tmp_path, 7), tmp_path / "alone", tmp_path / "together"
    options = [f"w8a8={checkpoint}", "--prompts", prompts, "--batch-size", 2]
    assert run_evaluate(*options, "--out", alone) == 0
    shutil.copytree(alone, together)
    (together / "results.json").unlink()
    lost = [together / "images" / name / "00000.png" for name in ("FP", "w8a8")]
    lost += [together / "images" / name / "00006.png" for name in ("FP", "w8a8")]
    for image in lost:
        image.unlink()
    said = finish(launch_nodes("evaluate", *options, "--out", together, "--cpu"))
    assert all(image.is_file() for image in lost)
    one, two = (results_in(out).model_dump(exclude={"seconds"}) for out in (alone, together))
    assert one == two
    for name in ("FP", "w8a8"):
        assert pngs(alone, name) == pngs(together, name)
    assert ["Look at" in output for output in said] == [True, False]


def test_processes_of_launched_processes_are_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ["--prompts", write_prompts(tmp_path), "--out", tmp_path / "out", "--cpu", "--processes", 2]
    assert run_evaluate(checkpoint, *options) == 1
    assert "accelerate launched 2 processes, and --processes asks each for 2 more." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_finished_images_are_not_made_again_and_changed_candidates_are(
    checkpoint: Path, source: object, tmp_path: Path
) -> None:
    out, prompts = tmp_path / "out", write_prompts(tmp_path, 4)
    changing = tmp_path / "changing"
    shutil.copytree(checkpoint, changing)
    options = ["--prompts", prompts, "--out", out, "--batch-size", 2]
    assert run_evaluate(f"same={checkpoint}", f"changing={changing}", *options) == 0
    before = {name: pngs(out, name) for name in ("same", "changing")}
    assert before["same"] == before["changing"]
    modified = {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*.png")}

    _double_the_scales(changing)
    assert run_evaluate(f"same={checkpoint}", f"changing={changing}", *options, "--num-images", 6) == 0
    again = {path for path, when in modified.items() if path.stat().st_mtime_ns != when}
    assert {path.parent.name for path in again} == {"changing"}
    assert len(again) == 4
    assert len(pngs(out, "same")) == 6
    assert pngs(out, "changing") != pngs(out, "same")


def _double_the_scales(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "denoiser.safetensors")
    scaled = {name: tensor * 2 if name.endswith("weight_scale") else tensor for name, tensor in tensors.items()}
    save_file(scaled, folder / "denoiser.safetensors")


def test_killed_and_run_again_it_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    out, prompts = tmp_path / "out", write_prompts(tmp_path, 16)
    arguments = ["evaluate", str(checkpoint), "--prompts", str(prompts), "--out", str(out), "--batch-size", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "engines"))}
    child = subprocess.Popen(
        [sys.executable, "-m", "sdq_deploy.cli.main", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    finished = out / "images" / "FP"
    while len(list(finished.glob("shard-*.json"))) < 3:
        if child.poll() is not None:
            pytest.fail(child.communicate()[0])
        time.sleep(0.01)
    child.kill()
    child.communicate()
    before = {path: path.stat().st_mtime_ns for path in finished.glob("shard-*.json")}
    assert not (out / "results.json").exists()
    assert run_evaluate(*arguments[1:]) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert len(before) < 16
    assert results_in(out).prompts.count == 16
    assert not list(out.rglob("*.tmp")) or len(list(out.rglob("*.tmp"))) == 1  # the file under way when it was killed


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to a process group")
def test_control_c_says_how_to_go_on(checkpoint: Path, tmp_path: Path) -> None:
    """With two processes: no traceback of any of them."""
    out, prompts = tmp_path / "out", write_prompts(tmp_path, 200)
    arguments = [str(checkpoint), "--prompts", str(prompts), "--out", str(out), "--batch-size", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "engines"))}
    child = subprocess.Popen(
        [sys.executable, "-m", "sdq_deploy.cli.main", "evaluate", *arguments, "--processes", "2"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while not list((out / "images").rglob("shard-*.json")):
        if child.poll() is not None:
            pytest.fail(child.communicate()[0])
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGINT)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert "Run the same command again: finished images are kept." in said
    assert "Traceback" not in said


def test_limits_set_the_exit_code(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, prompts = tmp_path / "out", write_prompts(tmp_path, 3)
    options = [f"w8a8={checkpoint}", "--prompts", prompts, "--out", out]
    assert run_evaluate(*options, "--fail-below", "psnr=1,ssim=0.01") == 0
    value = results_in(out).candidates[0].figures["psnr"].value
    capsys.readouterr()
    assert run_evaluate(*options, "--fail-below", "psnr=99,ssim=0.01", "--json") == 1
    captured = capsys.readouterr()
    assert f"error: w8a8: psnr is {value:.4f}, below 99." in captured.err
    assert json.loads(captured.out)["candidates"][0]["figures"]["psnr"]["value"] == value


def test_the_manifest_carries_the_figures(
    float_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "package"
    shutil.copytree(float_package, package)
    out, prompts = tmp_path / "out", write_prompts(tmp_path, 3)
    assert run_evaluate(package, "--prompts", prompts, "--out", out) == 0
    assert "evaluation" not in read_manifest(package).fidelity
    assert run_evaluate(package, "--prompts", prompts, "--out", out, "--write-manifest") == 0
    fidelity = open_package(package).manifest.fidelity
    found = results_in(out)
    assert fidelity["evaluation"]["figures"]["psnr"]["value"] == found.candidates[0].figures["psnr"].value
    assert fidelity["evaluation"]["prompts"]["sha256"] == found.prompts.sha256
    assert fidelity["evaluation"]["engine"] == "onnxruntime"
    assert "parity" in fidelity
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main.run(["inspect", str(package)])
    shown = capsys.readouterr().out
    figure = found.candidates[0].figures["psnr"]
    assert f"3 images, {found.prompts.title}, prompt set {found.prompts.sha256[:12]}\n" in shown
    assert (
        f"  {'psnr':24} {figure.value:.4g} ({figure.low:.4g} to {figure.high:.4g}), worst {figure.worst:.4g}\n" in shown
    )


def test_every_image_has_its_row(checkpoint: Path, tmp_path: Path) -> None:
    out, prompts = tmp_path / "out", write_prompts(tmp_path, 3)
    assert run_evaluate(f"w8a8={checkpoint}", "--prompts", prompts, "--out", out, "--num-images", 5) == 0
    rows = list(csv.DictReader((out / "per-image.csv").read_text(encoding="utf-8").splitlines()))
    mine = [row for row in rows if row["candidate"] == "w8a8"]
    assert [row["prompt"] for row in mine] == [f"a red circle number {index % 3}" for index in range(5)]
    assert [row["seed"] for row in mine] == ["0", "1", "2", "3", "4"]
    mean = np.mean([float(row["psnr"]) for row in mine])
    assert results_in(out).candidates[0].figures["psnr"].value == pytest.approx(mean, rel=1e-5)


def test_captions_of_shapes_are_read_and_others_are_skipped(checkpoint: Path, tmp_path: Path) -> None:
    """A tiny model of random weights draws no shape; a model of other captions has no such figure."""
    shapes, own = tmp_path / "shapes", tmp_path / "own"
    assert run_evaluate(checkpoint, "--split", "validation", "--num-images", 4, "--out", shapes) == 0
    found = results_in(shapes)
    assert found.candidates[0].figures["caption_accuracy"].value == 0
    assert found.candidates[0].figures["feature_fid"].value > 0
    assert {comparison.figure for comparison in found.comparisons} == {"caption_accuracy"}
    assert run_evaluate(checkpoint, "--prompts", write_prompts(tmp_path), "--out", own) == 0
    assert "caption_accuracy" not in results_in(own).candidates[0].figures
    assert any("the classifier knows" in sentence for sentence in results_in(own).skipped)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fail-below", "psnr=30,sim=0.9"], "--fail-below knows no figure 'sim'."),
        (["--fail-below", "feature_fid=1"], "It takes: psnr, ssim, caption_accuracy, clip_score."),
        (["--fail-below", "psnr=much"], "--fail-below wants a number for psnr; 'much' is none."),
        (["--fail-below", "caption_accuracy=0.8"], "--fail-below limits caption_accuracy, which is not measured here."),
        (["--split", "held_out"], "Prompts come from a file or from a split, not from both."),
        (["--num-inference-steps", "7"], "samples with DPMSolverMultistepScheduler and 3 steps and no other."),
        (["--reference", "no/such/model/at/all"], "The model no/such/model/at/all does not exist."),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_evaluate(checkpoint, "--prompts", write_prompts(tmp_path), "--out", out, *arguments) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not out.exists()


def test_candidates_must_sample_alike(
    checkpoint: Path, float_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_evaluate(
        f"a={checkpoint}", f"b={float_package}", "--prompts", write_prompts(tmp_path), "--out", tmp_path / "out"
    )
    assert code == 1
    assert "a and b do not sample alike: scheduler DPMSolverMultistepScheduler and" in capsys.readouterr().err


def test_a_folder_of_something_else_is_not_written_into(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "holiday"
    out.mkdir()
    (out / "photo.txt").write_text("beach", encoding="utf-8")
    assert run_evaluate(checkpoint, "--prompts", write_prompts(tmp_path), "--out", out) == 1
    assert "was not made by sdq-deploy as an evaluation" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["photo.txt"]


def test_the_page_needs_nothing_beside_it_and_takes_any_prompt(checkpoint: Path, tmp_path: Path) -> None:
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    nasty = 'a </script><b>red</b> "circle" & more'
    prompts.write_text(f"{nasty}\na blue ring\n", encoding="utf-8")
    assert run_evaluate(f"w8a8={checkpoint}", "--prompts", prompts, "--out", out, "--num-images", 10) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "http://" not in page
    assert "https://" not in page
    data = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    cases = json.loads(data)
    assert [case["number"] for case in cases] == list(range(10))
    assert cases[0]["prompt"] == nasty
    assert [image["name"] for image in cases[0]["images"]] == ["FP", "w8a8"]
    assert all(image["source"].startswith("data:image/png;base64,") for image in cases[0]["images"])
    assert page.count("<svg") == 2
    figure = results_in(out).candidates[0].figures["psnr"]
    assert f"{figure.value:.2f} dB" in page


def test_real_images_are_compared_by_their_features(checkpoint: Path, tmp_path: Path) -> None:
    """With the reference's own images for real ones: its distance is 0, a candidate's the one to the reference."""
    out, real = tmp_path / "out", tmp_path / "real"
    options = [checkpoint, "--split", "validation", "--num-images", 4, "--out", out]
    assert run_evaluate(*options) == 0
    shutil.copytree(out / "images" / "FP", real)
    assert run_evaluate(*options, "--real", real) == 0
    found = results_in(out)
    assert found.reference.figures["feature_fid_real"].value == pytest.approx(0, abs=1e-6)
    figures = found.candidates[0].figures
    assert figures["feature_fid_real"].value == pytest.approx(figures["feature_fid"].value, rel=1e-6)
