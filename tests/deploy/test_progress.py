"""What long work says where nobody sees a bar: a line where it begins, each minute, and where it ends."""

from __future__ import annotations

import io

from rich.console import Console

from sdq_deploy.display.progress import LineProgress, progress_on, status_on


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def log() -> Console:
    return Console(file=io.StringIO(), width=40, force_terminal=False)


def said(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_task_says_that_it_begins_goes_on_and_ends() -> None:
    console, clock = log(), Clock()
    with LineProgress(console, get_time=clock) as progress:
        task = progress.add_task("a stage whose name is longer than the log is wide", total=10)
        for _ in range(10):
            clock.now += 30
            progress.advance(task)
        progress.update(task, completed=10)  # once more says nothing
    name = "a stage whose name is longer than the log is wide"
    assert said(console) == [
        f"{name} ...",
        *(f"{name}: {count} of 10 after {30 * count} s" for count in (2, 4, 6, 8)),
        f"{name}: done in 300 s",
    ]


def test_what_cannot_be_counted_ends_too() -> None:
    console, clock = log(), Clock()
    progress = LineProgress(console, get_time=clock)
    task = progress.add_task("writing", total=None)
    clock.now += 61
    progress.update(task, completed=0)
    progress.update(task, total=1, completed=1)
    assert said(console) == ["writing ...", "writing: 0 after 61 s", "writing: done in 61 s"]


def test_a_process_that_is_not_the_first_says_nothing() -> None:
    console = log()
    progress = progress_on(console)
    progress.disable = True
    progress.advance(progress.add_task("stage", total=1))
    assert said(console) == []


def test_a_status_says_each_thing_once() -> None:
    console = log()
    with status_on(console, "openvino: starting") as status:
        for part in ("lowering denoiser", "lowering denoiser", "compiling denoiser"):
            status.update(f"openvino: {part}")
    assert said(console) == [
        "openvino: starting ...",
        "openvino: lowering denoiser ...",
        "openvino: compiling denoiser ...",
    ]


def test_a_terminal_has_bars() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    assert not isinstance(progress_on(console), LineProgress)
