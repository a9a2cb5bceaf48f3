"""Parity's fourth criterion on a built engine: one that strays is taken out of the package again."""

from __future__ import annotations

import numpy as np

from sdq_engines.backends.base import Session
from sdq_engines.backends.registry import backend
from sdq_engines.package.editor import PackageEditor
from sdq_engines.package.layout import DENOISER, PROLOGUE
from sdq_engines.package.store import Package
from sdq_export.parity import Criterion, ParityInputs, ParityReport, TeacherSamples, check_engine
from sdq_export.writer import ExportResult

__all__ = ["check_built_engine"]


def check_built_engine(package: Package, engine: str, result: ExportResult) -> tuple[Package, Criterion | None]:
    """Measure an engine against the teacher; record the figures, or drop the engine and say so.

    Args:
        package: the package, the engine listed in it.
        engine: its name.
        result: the export that wrote the package.

    Returns:
        The package and the criterion; None where this machine cannot run the engine, or it is for other sizes only.

    Raises:
        SdqError: the engine is too far from the teacher. The package is then without it.
    """
    chosen, io = backend(engine), package.manifest.io
    # the teacher's samples are of the package's own size
    if not chosen.available().works or not package.engine(engine).profile.takes(io.image_size, io):
        return package, None
    session = chosen.load(package, package.engine(engine), {})
    criterion = _measure(session, engine, result)
    report = ParityReport(criteria=(criterion,))
    kept = _record(package, engine, report) if criterion.passed else _drop(package, engine)
    report.require(f"the engine {engine} was taken out of the package again")
    return kept, criterion


def _measure(session: Session, engine: str, result: ExportResult) -> Criterion:
    inputs, most = ParityInputs(result.plan, result.samples, result.gate), session.entry.profile.batch_max
    prompt = _prompt(session, result.samples, most)
    references = _reference_distances(result)
    return check_engine(engine, inputs, session.component(DENOISER), prompt, references, most)


def _prompt(session: Session, samples: TeacherSamples, most: int) -> dict[str, np.ndarray]:
    """The prologue's outputs for all samples, by the engine's own prologue, as many at once as it takes."""
    prologue = session.component(PROLOGUE)
    conditioning = samples.conditioning
    parts = [prologue.run(conditioning[at : at + most].numpy()) for at in range(0, len(conditioning), most)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _reference_distances(result: ExportResult) -> np.ndarray:
    """The fake-quantized reference's distances from the teacher, [steps, N]; zeros for an unquantized one."""
    for criterion in result.report.criteria:
        if criterion.name == "quantized_graph":
            return np.array(criterion.reference_by_sample)
    return np.zeros((len(result.gate.steps), len(result.samples.conditioning) // 2))


def _record(package: Package, engine: str, report: ParityReport) -> Package:
    with PackageEditor.edit(package.folder, f"check of {engine}") as editor:
        fidelity = dict(editor.current.fidelity)
        fidelity["parity"] = {**fidelity["parity"], **report.to_manifest()}
        return editor.commit(editor.current.model_copy(update={"fidelity": fidelity}))


def _drop(package: Package, engine: str) -> Package:
    with PackageEditor.edit(package.folder, f"check of {engine}") as editor:
        engines = dict(editor.current.engines)
        if engines.get(engine) != package.engine(engine):  # another one by now, which is not what was measured
            return Package(package.folder, editor.current)
        for file in engines.pop(engine).components.values():
            if file.startswith("engines/"):
                editor.drop(file)
        return editor.commit(editor.current.model_copy(update={"engines": engines}))
