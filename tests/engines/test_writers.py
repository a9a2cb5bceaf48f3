"""Several processes at one package: nothing is lost, and readers keep what they opened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sdq_engines import Pipeline
from sdq_engines.build import build_engine
from sdq_engines.errors import SdqError
from sdq_engines.files import claimed_folder
from sdq_engines.locks import JOB, LOCK_FILES, MANIFEST_LOCK, holder, is_held, sole_writer
from sdq_engines.package.editor import PackageEditor
from sdq_engines.package.held import PackageChangedError
from sdq_engines.package.layout import MANIFEST, model_file
from sdq_engines.package.schema import ShapeProfile
from sdq_engines.package.store import Package, open_package

#: Holds a lock of a folder until its standard input ends.
HOLDER = """
import sys
from pathlib import Path
from sdq_engines.locks import sole_writer
with sole_writer(Path(sys.argv[1]), sys.argv[2], "test of locks"):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold_elsewhere(folder: Path, name: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_second_command_is_refused_and_told_who_is_first(tmp_path: Path) -> None:
    process = hold_elsewhere(tmp_path, JOB)
    refused = pytest.raises(SdqError, match=f"written by another process .process {process.pid}, test of locks, since")
    with refused, claimed_folder(tmp_path, "package", "export"):
        pass
    assert is_held(tmp_path, JOB)
    (tmp_path / "first.txt").write_text("of a command that has not yet said whose the folder is to be", "utf-8")
    with pytest.raises(SdqError, match="written by another process"), claimed_folder(tmp_path, "package", "export"):
        pass
    (tmp_path / "first.txt").unlink()
    process.communicate()
    with claimed_folder(tmp_path, "package", "export") as folder:  # a lock file does not make it another's
        assert holder(folder, JOB) is not None
    assert not any(tmp_path.iterdir())


def test_a_folder_that_was_not_there_is_not_left_empty(tmp_path: Path) -> None:
    with pytest.raises(SdqError, match="refused"), claimed_folder(tmp_path / "new", "run", "train"):
        raise SdqError("refused")
    assert not (tmp_path / "new").exists()
    with claimed_folder(tmp_path / "new", "run", "train") as folder:
        (folder / "run.json").write_text('{"kind": "sdq-run"}', "utf-8")
    assert (tmp_path / "new" / "run.json").is_file()


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    process = hold_elsewhere(tmp_path, JOB)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / JOB).is_file()
    assert not is_held(tmp_path, JOB)
    with sole_writer(tmp_path, JOB, "test"):
        pass


def test_a_manifest_is_waited_for(bare: Package, caplog: pytest.LogCaptureFixture) -> None:
    process = hold_elsewhere(bare.folder, MANIFEST_LOCK)
    threading.Timer(1.5, process.communicate).start()
    with PackageEditor.edit(bare.folder, "test") as editor:
        editor.add_bytes("LICENSE", b"another\n")
        editor.commit(editor.current)
    assert process.wait(10) == 0
    assert "Waiting for another process" in caplog.text
    assert "test of locks" in caplog.text
    assert not LOCK_FILES & files(bare.folder)


def test_changes_from_many_threads_are_all_kept(bare: Package) -> None:
    def add(number: int) -> None:
        with PackageEditor.edit(bare.folder, "test") as editor:
            editor.add_bytes(f"engines/x/{number}", b"%d" % number)
            found = {**editor.current.fidelity, str(number): number}
            editor.commit(editor.current.model_copy(update={"fidelity": found}))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(24)))
    after = open_package(bare.folder).manifest
    assert after.fidelity == {str(number): number for number in range(24)}
    assert files(bare.folder) == {MANIFEST, *after.files}


def test_builds_at_once_are_both_kept_and_leave_nothing_over(bare: Package) -> None:
    """Each was begun on a package without engines."""
    jobs = [("openvino", 1), ("onnxruntime", 1), ("openvino", 2)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda job: build_engine(bare, job[0], ShapeProfile(batch_max=job[1])), jobs))
    after = open_package(bare.folder).manifest
    assert set(after.engines) == {"openvino", "onnxruntime"}
    assert files(bare.folder) == {MANIFEST, *after.files}
    assert Pipeline.load(bare.folder, "openvino")("a red star", seed=1).images


def test_what_a_killed_build_left_is_swept(copy: Package) -> None:
    stray = copy.folder / "engines" / "openvino" / "deadbeef" / "denoiser.blob"
    stray.parent.mkdir()
    stray.write_bytes(b"half")
    after = build_engine(copy, "openvino")
    assert files(copy.folder) == {MANIFEST, *after.manifest.files}


def test_an_engine_of_graphs_that_are_no_longer_there_is_not_listed(bare: Package) -> None:
    with PackageEditor.edit(bare.folder, "export") as editor:
        editor.add_bytes(model_file("vae_decoder"), bare.component("vae_decoder").read_bytes() + b"")
        editor.add_bytes("LICENSE", b"exported again\n")
        editor.commit(editor.current)
    with pytest.raises(SdqError, match="exported again while its onnxruntime engine was built") as caught:
        build_engine(bare, "onnxruntime")
    assert "sdq-deploy build" in caught.value.hint
    assert open_package(bare.folder).manifest.engines == {}


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_loaded_pipeline_keeps_its_engine(full: Package, tmp_path: Path, engine: str) -> None:
    """Also what it had not read yet: the VAE encoder."""
    folder = tmp_path / "package"
    shutil.copytree(full.folder, folder)
    image = np.full((64, 64, 3), 99, np.uint8)
    wanted = Pipeline.load(folder, engine)("a red star", image=image, seed=1).latents
    pipeline = Pipeline.load(folder, engine)
    # an engine built again, and an export over the package: new files under the old names
    build_engine(open_package(folder), "openvino", ShapeProfile(batch_max=2))
    with PackageEditor.edit(folder, "export") as editor:
        for name in editor.current.components.values():
            content = folder.joinpath(name).read_bytes()
            editor.add_bytes(name, content)
        editor.commit(editor.current)
    folder.joinpath(model_file("vae_encoder")).write_bytes(b"of another model")
    np.testing.assert_array_equal(pipeline("a red star", image=image, seed=1).latents, wanted)


def test_an_engine_that_goes_while_it_is_loaded_is_said(copy: Package) -> None:
    build_engine(copy, "openvino", ShapeProfile(batch_max=2))
    with pytest.raises(PackageChangedError, match="changed by another process"):
        Pipeline.from_package(copy, "openvino")  # of the manifest as it was


def test_loading_goes_on_beside_builds(copy: Package) -> None:
    """The manifest and the files are of one moment, whenever it is."""
    ended = threading.Event()

    def rebuild() -> None:
        with PackageEditor.edit(copy.folder, "build") as editor:
            entry = editor.current.engines["openvino"]
            moved = {name: f"engines/openvino/{time.monotonic_ns()}/{Path(file).name}"
                     for name, file in entry.components.items()}  # fmt: skip
            for name, file in moved.items():
                editor.add_bytes(file, copy.folder.joinpath(entry.components[name]).read_bytes())
                editor.drop(entry.components[name])
            engines = {**editor.current.engines, "openvino": entry.model_copy(update={"components": moved})}
            editor.commit(editor.current.model_copy(update={"engines": engines}))

    def keep_rebuilding() -> None:
        while not ended.is_set():
            rebuild()
            time.sleep(0.02)

    writer = threading.Thread(target=keep_rebuilding)
    writer.start()
    try:
        made = [Pipeline.load(copy.folder, "openvino", "cached")("a red star", seed=1).latents for _ in range(10)]
    finally:
        ended.set()
        writer.join()
    for latents in made[1:]:
        np.testing.assert_array_equal(latents, made[0])


def test_a_package_that_is_being_written_says_by_whom(tmp_path: Path) -> None:
    PackageEditor.create(tmp_path)
    with pytest.raises(SdqError, match="its export was interrupted"):
        open_package(tmp_path)
    process = hold_elsewhere(tmp_path, JOB)
    with pytest.raises(SdqError, match=f"is being written now .process {process.pid}, test of locks"):
        open_package(tmp_path)
    process.communicate()


def test_a_lock_of_another_machine_says_which(tmp_path: Path) -> None:
    with sole_writer(tmp_path, JOB, "export"):
        who = json.loads((tmp_path / JOB).read_text("utf-8"))
        assert who["process"] == os.getpid()
        (tmp_path / JOB).write_text(json.dumps({**who, "host": "elsewhere"}), "utf-8")
        found = holder(tmp_path, JOB)
    assert found is not None
    assert found.startswith(f"process {os.getpid()} on elsewhere, export, since ")
