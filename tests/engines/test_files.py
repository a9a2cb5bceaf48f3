"""Files are whole or absent."""

from __future__ import annotations

import hashlib
import pickle
import sys
from pathlib import Path

import pytest

from sdq_engines.errors import SdqError
from sdq_engines.files import atomic_write, atomic_write_json, atomic_write_text, claim_output, folder_kind, sha256_file


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "a" / "file.txt"
    atomic_write_text(target, "old")

    def fail_halfway() -> None:
        with atomic_write(target) as temporary:
            temporary.write_text("half of the new")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fail_halfway()
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_sha256(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "data").write_bytes(data)
    heard: list[int] = []
    assert sha256_file(tmp_path / "data", heard.append) == hashlib.sha256(data).hexdigest()
    assert sum(heard) == len(data)


def test_claims_new_empty_and_own_folders_only(tmp_path: Path) -> None:
    claim_output(tmp_path / "new", "package")
    claim_output(tmp_path / "new", "package")
    (tmp_path / "new" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(SdqError, match="was not made by sdq-deploy as a package"):
        claim_output(tmp_path / "new", "package")
    atomic_write_json(tmp_path / "new" / "manifest.json", {"kind": "sdq-package"})
    assert folder_kind(tmp_path / "new") == "package"
    claim_output(tmp_path / "new", "package")
    with pytest.raises(SdqError, match="as a run"):
        claim_output(tmp_path / "new", "run")


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(SdqError, match="is a file"):
        claim_output(tmp_path / "out", "run")


@pytest.mark.skipif(sys.platform != "linux", reason="a file system that takes no files, from root neither")
def test_a_folder_that_cannot_be_written_is_one_sentence() -> None:
    with pytest.raises(SdqError, match="/sys/run cannot be written: "):
        claim_output("/sys/run", "run")


def test_the_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(SdqError("what is wrong", "what to do")))
    assert (error.message, error.hint) == ("what is wrong", "what to do")
