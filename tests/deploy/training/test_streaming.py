"""The serial dataset stays on disk: what is read are the rows of a batch, and they are those of the whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdq_deploy.sharing import await_files
from sdq_deploy.training.batches import SerialToParallelSource, make_source
from sdq_deploy.training.dataset import EMPTY, INDEX, load_split, shard_name
from sdq_deploy.training.memory import peak_bytes, reset_peak
from sdq_deploy.training.prompts import stable_seed
from sdq_deploy.training.stored import stored_tensors
from sdq_engines.errors import SdqError
from tests.deploy.training.helpers import small_context, small_settings

ROWS, PROMPTS = 16, 2
"""Of a made shard."""


def made_dataset(folder: Path, shards: int, size: int) -> Path:
    """A dataset of random numbers, `size` x `size` latents and 77 x 64 of text."""
    generator = torch.Generator().manual_seed(0)
    (folder / "prompts").mkdir(parents=True)
    names = [shard_name(split, number) for split, count in (("validation", 1), ("training", shards))
             for number in range(count)]  # fmt: skip
    for name in names:
        number = int(name[-17:].removesuffix(".safetensors").rpartition("-")[2])
        images = {key: torch.randn(ROWS, 4, size, size, generator=generator)
                  for key in ("latents", "conditional", "unconditional")}  # fmt: skip
        ends = {key: torch.randn(PROMPTS, 4, size, size, generator=generator) for key in ("noise", "final")}
        ids = {"steps": torch.arange(ROWS) % 3, "prompt_ids": number * PROMPTS + torch.arange(ROWS) * PROMPTS // ROWS}
        save_file(images | ends | ids, folder / name)
        save_file({"text_embeddings": torch.randn(PROMPTS, 77, 64, generator=generator)}, folder / "prompts" / name)
    save_file({"empty.text_embeddings": torch.zeros(1, 77, 64)}, folder / EMPTY)
    (folder / INDEX).write_text(json.dumps({"shards": names}))
    return folder


def test_rows_are_those_of_the_whole(finished_run: Path) -> None:
    files = sorted((finished_run / "dataset").glob("training-*.safetensors"))
    whole = torch.cat([load_file(file)["latents"] for file in files])
    stored = stored_tensors(files)["latents"]
    assert stored.shape == whole.shape
    chosen = [slice(None), slice(3, 9), [5, 2, 2, 15], range(4, 7), torch.tensor([15, 0, 8]), torch.tensor([-1])]
    chosen += [torch.arange(16) % 3 == 1, torch.zeros(16, dtype=torch.bool)]
    for rows in chosen:
        assert torch.equal(stored[rows], whole[list(rows) if isinstance(rows, range) else rows])
    with pytest.raises(IndexError):
        stored[[16]]


def test_prompts_are_encoded_shard_by_shard(tiny_sd: Path, finished_run: Path) -> None:
    context = small_context(tiny_sd, finished_run)
    data = load_split(finished_run / "dataset", "training")
    names = sorted(path.name for path in (finished_run / "dataset" / "prompts").iterdir())
    assert names == sorted(path.name for path in (finished_run / "dataset").glob("*-*.safetensors"))
    wanted = context.source.family.encode_prompts(list(context.prompts.training))
    assert len(data.conditioning) == len(wanted) == 8
    for name, tensor in data.conditioning[torch.tensor([7, 0, 3])].tensors.items():
        torch.testing.assert_close(tensor, wanted.tensors[name][[7, 0, 3]], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="the peak is Linux's to tell")
def test_memory_does_not_grow_with_the_dataset(tiny_sd: Path, tmp_path: Path) -> None:
    """25 MB on disk or 200 MB: a batch takes the same. Reading one column whole shows that the measure would see it."""
    context = small_context(tiny_sd, tmp_path / "run")
    device = torch.device("cpu")

    def peak_of(shards: int) -> int:
        folder = made_dataset(tmp_path / f"made-{shards}", shards, size=64)
        reset_peak(device)
        before = peak_bytes(device)
        source = make_source(context, load_split(folder, "training"), "serial-to-parallel")
        for iteration in range(shards):
            source.batch(iteration)
        return peak_bytes(device) - before

    peak_of(1)  # whatever is allocated once
    small, large = peak_of(8), peak_of(64)
    assert large < small + 8e6
    reset_peak(device)
    before = peak_bytes(device)
    whole = load_split(tmp_path / "made-64", "training").shard.latents[:]
    assert peak_bytes(device) - before > 0.9 * whole.numel() * 4 > 60e6


def test_batches_are_a_function_of_seed_and_iteration_alone(tiny_sd: Path, tmp_path: Path) -> None:
    """100,000 rows: each exactly once an epoch, in the order that the seed gives; also from the middle."""
    context = small_context(tiny_sd, tmp_path / "run", {"fit.batch_size": 7})
    data = load_split(made_dataset(tmp_path / "made", 2, size=4), "training")
    sources = [make_source(context, data, "serial-to-parallel") for _ in range(2)]
    one, other = (source for source in sources if isinstance(source, SerialToParallelSource))
    orders = [
        torch.randperm(100_000, generator=torch.Generator().manual_seed(stable_seed(context.seed, "rows", epoch)))
        for epoch in range(2)
    ]
    wanted = torch.cat(orders)
    for iteration in (0, 1, 14284, 14285, 14286, 20000):
        rows = one.drawn(100_000, iteration, "rows")
        assert torch.equal(rows, wanted[7 * iteration : 7 * iteration + 7])
    assert torch.equal(other.drawn(100_000, 14285, "rows"), one.drawn(100_000, 14285, "rows"))
    batch = one.batch(5)
    picked = one.drawn(32, 5, "rows")
    whole = torch.cat([load_file(tmp_path / "made" / shard_name("training", n))["conditional"] for n in range(2)])
    assert batch.target is not None
    assert torch.equal(batch.target.conditional, whole[picked])


def test_a_dataset_of_an_earlier_version_is_read(finished_run: Path, tmp_path: Path) -> None:
    """All prompts in one file, none beside the shards."""
    folder = Path(shutil.copytree(finished_run / "dataset", tmp_path / "dataset"))
    wanted = {split: load_split(folder, split).conditioning[:] for split in ("training", "validation")}
    together = load_file(folder / EMPTY)
    for split, conditioning in wanted.items():
        together |= conditioning.named(split)
    shutil.rmtree(folder / "prompts")
    save_file({name: tensor.clone() for name, tensor in together.items()}, folder / EMPTY)
    for split, conditioning in wanted.items():
        found = load_split(folder, split)
        assert len(found.conditioning) == len(conditioning)
        assert torch.equal(found.conditioning[[0, 1]].tensors["text_embeddings"],
                           conditioning.tensors["text_embeddings"][:2])  # fmt: skip


def test_a_lost_shard_is_one_sentence(finished_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished_run / "dataset", tmp_path / "dataset"))
    (folder / shard_name("training", 1)).unlink()
    with pytest.raises(SdqError, match=r"1 files of the run are gone, such as .*training-00001"):
        load_split(folder, "training")
    assert len(load_split(folder, "validation")) == 6
    await_files([folder / INDEX])


def test_what_a_collection_was_made_of_is_kept_by_the_next(tiny_sd: Path, finished_run: Path, tmp_path: Path) -> None:
    """Another run's dataset is taken over with its prompts; nothing of it is made again."""
    from sdq_deploy.training.run import run_training

    out = tmp_path / "run"
    run_training(
        small_settings(tiny_sd, out, {"method": "ptq", "calibrate.smoothing": []}), dataset=finished_run, cpu=True,
        quiet=True,
    )  # fmt: skip
    for path in (finished_run / "dataset").rglob("*-*.safetensors"):
        copied = out / "dataset" / path.relative_to(finished_run / "dataset")
        assert copied.stat().st_mtime_ns == path.stat().st_mtime_ns
