"""Build plans from lowered graphs through polygraphy's loaders. Runs in a child process, see `sdq_engines.build`.

polygraphy chooses TensorRT-RTX by `POLYGRAPHY_USE_TENSORRT_RTX=1`, read at import: the parent sets it.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdq_engines.backends.base import BF16_OPTION, FP32_OPTION, SM_OPTION, BuildJob, BuildResult
from sdq_engines.backends.kernels import count, tensorrt_layers
from sdq_engines.backends.nvidia import cuda
from sdq_engines.backends.profiles import extents, fixed_size, input_dims
from sdq_engines.backends.supported import PORTABLE_SM, least_sm, require_architectures
from sdq_engines.errors import SdqError
from sdq_engines.lowering.graph import apply, load_graph
from sdq_engines.lowering.save import save_graph
from sdq_engines.package.layout import DENOISER

if TYPE_CHECKING:
    import onnx_ir as ir

    from sdq_engines.backends.nvidia.library import Library
    from sdq_engines.package.schema import ModelIO, ShapeProfile

__all__ = ["build_plans"]

Lowering = Callable[[str, Mapping[str, Any]], "list[ir.passes.PassBase]"]


def build_plans(job: BuildJob, library: Library, lowering: Lowering) -> BuildResult:
    """Lower and build every component; the denoiser's kernels are counted from the builder's layer list.

    Raises:
        SdqError: the parser or the builder refuses a component; the log above says why.
    """
    trt = importlib.import_module(library.module)
    log = _listen(trt)
    targets = _targets(trt, library, job)
    files: dict[str, str | None] = {}
    kernels = None
    io = job.package.manifest.io
    options = {**job.options, FP32_OPTION: _in_fp32(job)}
    for component in job.package.manifest.components:
        job.progress(component, "lowering")
        passes = [*fixed_size(component, job.profile, io), *lowering(component, options)]
        graph = apply(load_graph(job.package.component(component)), passes)
        path = save_graph(graph, job.out / "work" / component)
        job.progress(component, "building")
        log.layers = ""
        files[component] = f"{component}.plan"
        (job.out / f"{component}.plan").write_bytes(
            _plan(trt, library, path, shapes(graph, component, job.profile, io), targets)
        )
        shutil.rmtree(path.parent)
        if component == DENOISER:
            kernels = count(job.package, tensorrt_layers(log.layers))
    return BuildResult(files, trt.__version__, _named(library, targets), _recorded(options), kernels)


def _in_fp32(job: BuildJob) -> list[str]:
    """What the caller asks to be built in FP32, and what the package says overflows in FP16, unless BF16 is asked for.

    Raises:
        SdqError: a component is asked for in both, or a quantized denoiser in BF16.
    """
    asked, short = job.options.get(FP32_OPTION, ()), job.options.get(BF16_OPTION, ())
    if both := [name for name in asked if name in short]:
        raise SdqError(f"{both[0]} was asked for in FP32 and in BF16.", "Give --fp32 or --bf16.")
    if DENOISER in short and job.package.manifest.is_quantized:
        raise SdqError(
            "The denoiser's quantization scales lose too much in BF16's 8 bits of precision.",
            "Leave the denoiser out of --bf16; it computes in INT8 and FP16.",
        )
    return list(dict.fromkeys([*asked, *(name for name in job.package.manifest.full_precision if name not in short)]))


def _recorded(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not empty."""
    return {name: value for name, value in options.items() if value}


def shapes(
    graph: ir.Model, component: str, profile: ShapeProfile, io: ModelIO
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Each input's (min, opt, max) shape; see `backends.profiles.extents`."""
    free = extents(component, profile, io)
    return {
        name: tuple(tuple(dim if isinstance(dim, int) else free[dim][at] for dim in dims) for at in range(3))
        for name, dims in input_dims(graph).items()
    }


def _plan(
    trt: Any, library: Library, path: Path, shapes: dict[str, tuple[tuple[int, ...], ...]], targets: Sequence[int]
) -> bytes:
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxPath, Profile
    from polygraphy.exception import PolygraphyException

    profile = Profile()
    for name, (low, opt, high) in shapes.items():
        profile.add(name, low, opt, high)
    # Since TensorRT 11 every network is strongly typed and the flag is gone.
    strongly = True if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") else None
    options = {"profiles": [profile], "profiling_verbosity": trt.ProfilingVerbosity.DETAILED}
    if library.rtx:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        create = CreateConfigRTX(**options)
    else:
        create = CreateConfig(**options)

    def config(builder: Any, network: Any) -> Any:
        made = create(builder, network)
        # The sampler's FP32 products must not be rounded to TF32.
        made.clear_flag(trt.BuilderFlag.TF32)
        if library.rtx:
            # Each one is named, so that the builder refuses what the manifest must not claim.
            made.num_compute_capabilities = len(targets)
            for at, sm in enumerate(targets):
                made.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), at)
        return made

    try:
        network = NetworkFromOnnxPath(str(path), strongly_typed=strongly)
        return bytes(EngineBytesFromNetwork(network, config=config)())
    except PolygraphyException as error:
        raise SdqError(
            f"{library.engine} refuses {path.parent.name}: {_first_line(error)}",
            "Try --engine onnxruntime, or another precision; `--fp32 COMPONENT` or `--bf16 COMPONENT` builds one so.",
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no reason given"


def _targets(trt: Any, library: Library, job: BuildJob) -> list[int]:
    """The architectures to build for, ascending: the GPU's here, or of TensorRT-RTX those that the job names, by
    default all that it knows and that can compute the package.

    Raises:
        SdqError: there is no GPU, an architecture is not one of TensorRT-RTX's, or it cannot compute the package.
    """
    precision = job.package.manifest.precision
    if not library.rtx:
        gpu, why = cuda.find_gpu()
        if gpu is None:
            raise SdqError(f"tensorrt builds for the GPU of this machine, and there is none: {why}.")
        targets = [int(gpu.architecture.removeprefix("sm_"))]
    else:
        known = sorted(int(name[2:]) for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
        least = max(PORTABLE_SM, least_sm(precision))
        targets = sorted(set(job.options.get(SM_OPTION) or [sm for sm in known if sm >= least]))
        if strange := [sm for sm in targets if sm not in known]:
            raise SdqError(
                f"{library.engine} {trt.__version__} cannot build for sm_{strange[0]}.",
                f"Name some of {', '.join(f'--sm {sm}' for sm in known)}; for another one, build with "
                "--engine tensorrt on such a GPU.",
            )
    require_architectures(library.engine, precision, targets)
    return targets


def _named(library: Library, targets: Sequence[int]) -> str:
    """The targets as the manifest says them."""
    names = ", ".join(f"sm_{sm}" for sm in targets)
    return f"any of {names}" if library.rtx and len(targets) > 1 else names


def _listen(trt: Any) -> Any:
    """Make TensorRT log to us: its verbose layer list is kept, the rest of it goes to stderr from INFO up."""
    from polygraphy.backend.trt import util as trt_util

    class LayerListLogger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity == trt.Logger.VERBOSE:
                if "LayerType: " in message:
                    self.layers += message + "\n"
                return
            print(f"[{severity.name}] {message}", file=sys.stderr, flush=True)

    # The one logger that polygraphy hands to every TensorRT object (`get_trt_logger` returns it).
    trt_util.TRT_LOGGER = LayerListLogger()
    return trt_util.TRT_LOGGER
