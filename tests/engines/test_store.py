"""A package is checked before anything in it is parsed; each defect is one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdq_engines import Pipeline
from sdq_engines.build import build_engine
from sdq_engines.errors import SdqError
from sdq_engines.package.editor import PackageEditor
from sdq_engines.package.layout import MANIFEST
from sdq_engines.package.paths import is_inside
from sdq_engines.package.schema import SCHEMA_VERSION
from sdq_engines.package.store import Package, open_package, read_manifest
from tests.hubcache import into_hub_cache

Built = Callable[[str], Package]
MODEL = "denoiser/model.onnx"


def edit_manifest(package: Package, change: Callable[[dict[str, Any]], object]) -> None:
    path = package.folder / MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip_byte(path: Path, keep_time: bool = False) -> None:
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))


def test_a_sound_package_opens(bare: Package) -> None:
    for verify in ("full", "cached"):
        assert open_package(bare.folder, verify).manifest == bare.manifest


def test_every_byte_of_every_file_is_hashed(bare: Package) -> None:
    seen: list[int] = []
    open_package(bare.folder, on_bytes=seen.append)
    assert sum(seen) == sum(entry.size for entry in bare.manifest.files.values())


@pytest.mark.parametrize("verify", ["full", "cached"])
def test_a_flipped_byte_is_named(bare: Package, verify: Any) -> None:
    open_package(bare.folder)
    flip_byte(bare.folder / MODEL)
    with pytest.raises(SdqError, match=f"{MODEL}.*damaged") as caught:
        open_package(bare.folder, verify)
    assert caught.value.hint


def test_cached_trusts_size_and_time_and_full_does_not(bare: Package) -> None:
    open_package(bare.folder)
    flip_byte(bare.folder / MODEL, keep_time=True)
    open_package(bare.folder, "cached")
    with pytest.raises(SdqError, match="damaged"):
        open_package(bare.folder, "full")


def test_cached_without_a_full_check_before_hashes_all(bare: Package) -> None:
    flip_byte(bare.folder / MODEL, keep_time=True)
    with pytest.raises(SdqError, match="damaged"):
        open_package(bare.folder, "cached")


def test_a_changed_manifest_voids_the_cache(bare: Package) -> None:
    open_package(bare.folder)
    flip_byte(bare.folder / MODEL, keep_time=True)
    edit_manifest(bare, lambda content: content.update(name="other"))
    with pytest.raises(SdqError, match="damaged"):
        open_package(bare.folder, "cached")


def test_a_missing_file_is_named(bare: Package) -> None:
    (bare.folder / "sampler.safetensors").unlink()
    with pytest.raises(SdqError, match=r"lacks the file sampler\.safetensors"):
        open_package(bare.folder)


def test_a_cut_file_is_named_with_both_sizes(bare: Package) -> None:
    path = bare.folder / MODEL
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SdqError, match=f"{path.stat().st_size} bytes, not {path.stat().st_size + 1}"):
        open_package(bare.folder)


@pytest.mark.parametrize(
    "outside", ["../secret", "/etc/passwd", "a/../../b", "C:\\x", "a\\b", "c:/x", "", "./a", "a//b"]
)
def test_a_path_outside_is_refused(bare: Package, outside: str) -> None:
    assert not is_inside(outside)
    edit_manifest(bare, lambda content: content["files"].update({outside: {"size": 0, "sha256": "0" * 64}}))
    with pytest.raises(SdqError, match="outside the package"):
        open_package(bare.folder)


def test_a_component_outside_is_refused(bare: Package) -> None:
    edit_manifest(bare, lambda content: content["components"].update(denoiser="../denoiser.onnx"))
    with pytest.raises(SdqError, match="outside the package"):
        open_package(bare.folder)


def test_a_component_that_is_not_listed_is_refused(bare: Package) -> None:
    edit_manifest(bare, lambda content: content["components"].update(denoiser="other.onnx"))
    with pytest.raises(SdqError, match="without listing"):
        open_package(bare.folder)


@pytest.mark.parametrize("listed", [True, False])
def test_a_symlink_is_refused_even_if_its_content_is_right(bare: Package, tmp_path: Path, listed: bool) -> None:
    outside = tmp_path / "outside.onnx"
    outside.write_bytes((bare.folder / MODEL).read_bytes())
    link = bare.folder / (MODEL if listed else "denoiser/extra.data")
    link.unlink(missing_ok=True)
    link.symlink_to(outside)
    with pytest.raises(SdqError, match="symlink"):
        open_package(bare.folder)


def test_a_symlinked_folder_is_refused(bare: Package, tmp_path: Path) -> None:
    (bare.folder / "denoiser").rename(tmp_path / "denoiser")
    (bare.folder / "denoiser").symlink_to(tmp_path / "denoiser", target_is_directory=True)
    with pytest.raises(SdqError, match="symlink"):
        open_package(bare.folder)


def test_a_hub_caches_links_are_followed_and_what_they_lead_to_is_hashed(built: Built, tmp_path: Path) -> None:
    snapshot = into_hub_cache(built("w4a8").folder, tmp_path)
    pipeline = Pipeline.load(snapshot, "openvino")
    wanted = Pipeline.from_package(built("w4a8"), "openvino")("a red star", seed=1).latents
    np.testing.assert_array_equal(pipeline("a red star", seed=1).latents, wanted)
    blob = (snapshot / MODEL).resolve()
    blob.write_bytes(b"x" + blob.read_bytes()[1:])
    with pytest.raises(SdqError, match="hash is not the manifest's"):
        open_package(snapshot)


def test_a_hub_caches_link_that_leads_elsewhere_is_refused(built: Built, tmp_path: Path) -> None:
    snapshot = into_hub_cache(built("w4a8").folder, tmp_path)
    outside = tmp_path / "outside"
    outside.write_bytes((snapshot / MODEL).read_bytes())
    (snapshot / MODEL).unlink()
    (snapshot / MODEL).symlink_to(outside)
    with pytest.raises(SdqError, match="symlink that leads out") as caught:
        open_package(snapshot)
    assert "--local-dir" in caught.value.hint


def test_an_engine_of_linked_weights_is_built_from_plain_files(bare: Package, tmp_path: Path) -> None:
    """Parsers of ONNX do not follow a link to weights beside the graph."""
    with PackageEditor.edit(bare.folder, "test") as editor:
        editor.add_bytes(f"{MODEL}.data", b"weights")
        editor.commit(editor.current)
    package = open_package(into_hub_cache(bare.folder, tmp_path / "cache"))
    with pytest.raises(SdqError, match="plain files") as caught:
        build_engine(package, "openvino")
    assert "--local-dir" in caught.value.hint


def test_a_newer_schema_says_to_upgrade(bare: Package) -> None:
    edit_manifest(bare, lambda content: content.update(schema_version=SCHEMA_VERSION + 1, something_new=1))
    with pytest.raises(SdqError, match=f"version {SCHEMA_VERSION + 1}") as caught:
        open_package(bare.folder)
    assert "--upgrade" in caught.value.hint


def test_a_damaged_manifest_names_the_field(bare: Package) -> None:
    edit_manifest(bare, lambda content: content["sampler"].pop("scheduler"))
    with pytest.raises(SdqError, match=r"is damaged: sampler\.scheduler is missing\."):
        open_package(bare.folder)
    (bare.folder / MANIFEST).write_text("{")
    with pytest.raises(SdqError, match="JSON"):
        open_package(bare.folder)


def test_what_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(SdqError, match="does not exist"):
        open_package(tmp_path / "nowhere")
    with pytest.raises(SdqError, match=r"no manifest\.json"):
        open_package(tmp_path)
    (tmp_path / MANIFEST).write_text('{"kind": "sdq-run"}')
    with pytest.raises(SdqError, match="sdq-run"):
        open_package(tmp_path)


def test_an_interrupted_export_is_incomplete(tmp_path: Path) -> None:
    PackageEditor.create(tmp_path / "package").add_bytes("LICENSE", b"x")
    with pytest.raises(SdqError, match="incomplete"):
        open_package(tmp_path / "package")
    PackageEditor.create(tmp_path / "package")  # the same export may be run again


def test_dropped_files_go_only_after_the_manifest(bare: Package) -> None:
    with PackageEditor.edit(bare.folder, "test") as editor:
        editor.add_bytes("engines/x/new/a.bin", b"new")
        editor.drop("LICENSE")
        assert open_package(bare.folder).manifest == bare.manifest
        after = editor.commit(editor.current)
    assert "engines/x/new/a.bin" in after.manifest.files
    assert not (bare.folder / "LICENSE").exists()
    assert open_package(bare.folder).manifest == after.manifest


def test_abandoned_changes_leave_nothing(bare: Package) -> None:
    before = sorted(path.relative_to(bare.folder) for path in bare.folder.rglob("*"))
    with PackageEditor.edit(bare.folder, "test") as editor:
        editor.add_bytes("engines/x/new/a.bin", b"new")
    assert sorted(path.relative_to(bare.folder) for path in bare.folder.rglob("*")) == before


def test_an_editor_writes_inside_only(bare: Package) -> None:
    for path in ("../x", MANIFEST):
        with PackageEditor.edit(bare.folder, "test") as editor, pytest.raises(SdqError):
            editor.add_bytes(path, b"")


def test_a_missing_engine_names_the_command(bare: Package) -> None:
    with pytest.raises(SdqError, match="no engine 'openvino'") as caught:
        read_package_engine(bare)
    assert "sdq-deploy build" in caught.value.hint
    assert read_manifest(bare.folder).engines == {}


def read_package_engine(package: Package) -> object:
    return package.engine("openvino")
