"""Runs whose state stays on a device: ONNX Runtime's I/O binding, and the NVIDIA session on a stand-in for its GPU."""

from __future__ import annotations

import sys
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_ir as ir
import pytest

from sdq_engines.backends.base import Arrays, Stepper
from sdq_engines.backends.nvidia.backend import make
from sdq_engines.backends.nvidia.builder import shapes
from sdq_engines.backends.nvidia.cuda import Stream
from sdq_engines.backends.nvidia.session import Device, NvidiaComponent, NvidiaStepper
from sdq_engines.backends.onnxruntime import DeviceStepper, OnnxRuntimeComponent, open_session
from sdq_engines.backends.stepping import HostStepper
from sdq_engines.errors import SdqError
from sdq_engines.lowering.graph import apply, load_graph
from sdq_engines.package.layout import DENOISER
from sdq_engines.package.schema import ShapeProfile
from sdq_engines.package.store import Package
from sdq_engines.runtime.sampler import SamplerTables
from tests.engines.cuda_stand_in import TRT, Engine, Runtime
from tests.engines.graphs import KEY, VALUE, TinyShape
from tests.engines.packages import make_package

BATCH = 2


@pytest.fixture(params=["history", "stochastic"])
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Package:
    stochastic = request.param == "stochastic"
    shape = TinyShape(precision="w4a8", history=0 if stochastic else 2, stochastic=stochastic)
    return make_package(tmp_path_factory.mktemp("package") / "package", shape)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    bindings = types.ModuleType("cuda.bindings")
    bindings.runtime = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", made)
    return made


def start(package: Package, batch: int = BATCH) -> tuple[np.ndarray, float, np.ndarray, Arrays]:
    random = np.random.default_rng(0)
    prompt = {name: random.standard_normal((2 * batch, 12, 32)).astype(np.float32) for name in (KEY, VALUE)}
    latents = random.standard_normal((batch, *package.manifest.io.latent_shape)).astype(np.float32)
    rows = SamplerTables.load(package.path("sampler.safetensors"), package.manifest.sampler).coefficients[0]
    return latents, 3.0, rows, prompt


def run(stepper: Stepper, package: Package) -> list[np.ndarray]:
    """The latents after each step of a whole run."""
    random, made = np.random.default_rng(1), []
    for index in range(package.manifest.sampler.num_calls):
        noise = random.standard_normal((BATCH, *package.manifest.io.latent_shape)).astype(np.float32)
        stepper.step(index, noise if package.manifest.sampler.stochastic else None)
        made.append(stepper.latents())
    stepper.close()
    return made


def reference(package: Package, component: OnnxRuntimeComponent | None = None) -> list[np.ndarray]:
    component = component or OnnxRuntimeComponent(open_session(package.component(DENOISER)), "cpu")
    latents, guidance, rows, prompt = start(package)
    return run(HostStepper(component, package.manifest, latents, guidance, rows, prompt), package)


def test_io_binding_equals_plain_calls(package: Package) -> None:
    component = OnnxRuntimeComponent(open_session(package.component(DENOISER)), "cpu")
    latents, guidance, rows, prompt = start(package)
    made = run(DeviceStepper(component, package, latents, guidance, rows, prompt), package)
    for ours, wanted in zip(made, reference(package, component), strict=True):
        np.testing.assert_array_equal(ours, wanted)


def nvidia(package: Package, runtime: Runtime) -> NvidiaComponent:
    passes = make("tensorrt").lowering(DENOISER, {})
    graph = apply(load_graph(package.component(DENOISER)), passes)
    profile = shapes(graph, DENOISER, ShapeProfile(batch_max=BATCH), package.manifest.io)
    engine = Engine(runtime, ir.to_proto(graph).SerializeToString(), profile)
    return NvidiaComponent(TRT, engine, Stream(), DENOISER, None, Device("tensorrt"))


def test_a_captured_step_serves_every_step_and_every_run(package: Package, runtime: Runtime) -> None:
    component = nvidia(package, runtime)
    wanted = reference(package)
    for _ in range(2):  # the second run finds the first one's buffers and must not see its state
        made = run(NvidiaStepper(component, *start(package)), package)
        for ours, expected in zip(made, wanted, strict=True):
            assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < 2e-2  # FP16 against FP32
            assert ours.dtype == np.float32
    assert runtime.launches == 2 * package.manifest.sampler.num_calls
    assert component.dtype(KEY) == np.float16


def test_latents_can_be_replaced_between_steps(package: Package, runtime: Runtime) -> None:
    """As inpainting does; the history stays."""
    component = OnnxRuntimeComponent(open_session(package.component(DENOISER)), "cpu")
    latents, guidance, rows, prompt = start(package)
    steppers: list[Stepper] = [
        HostStepper(component, package.manifest, latents, guidance, rows, prompt),
        DeviceStepper(component, package, latents, guidance, rows, prompt),
        NvidiaStepper(nvidia(package, runtime), latents, guidance, rows, prompt),
    ]
    noise = latents if package.manifest.sampler.stochastic else None
    made = []
    for stepper in steppers:
        stepper.step(0, noise)
        before = stepper.latents()
        stepper.replace(0.5 * before)
        assert np.array_equal(stepper.latents(), 0.5 * before)
        stepper.step(1, noise)
        made.append(stepper.latents())
        assert not np.allclose(made[-1], run_on(component, package, latents)[1])
    np.testing.assert_array_equal(made[0], made[1])
    assert np.linalg.norm(made[2] - made[0]) / np.linalg.norm(made[0]) < 2e-2


def run_on(component: OnnxRuntimeComponent, package: Package, noise: np.ndarray) -> list[np.ndarray]:
    """The latents after two steps that nothing was replaced between."""
    stepper = HostStepper(component, package.manifest, *start(package))
    made = []
    for index in range(2):
        stepper.step(index, noise if package.manifest.sampler.stochastic else None)
        made.append(stepper.latents())
    return made


def test_runs_of_several_threads_take_turns_on_the_device(package: Package, runtime: Runtime) -> None:
    """And a callback may call a component of its run's device, but not begin another run."""
    component = nvidia(package, runtime)
    wanted = run(NvidiaStepper(component, *start(package)), package)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: run(NvidiaStepper(component, *start(package)), package), range(12)))
    for each in made:
        for ours, expected in zip(each, wanted, strict=True):
            np.testing.assert_array_equal(ours, expected)
    stepper = NvidiaStepper(component, *start(package))
    with component.device.call(), pytest.raises(SdqError, match="asked for another run"):
        NvidiaStepper(component, *start(package))
    stepper.close()
    stepper.close()  # once is enough, twice does no harm
    run(NvidiaStepper(component, *start(package)), package)


def test_a_step_is_captured_once_for_all_runs_of_a_shape(package: Package, runtime: Runtime) -> None:
    component = nvidia(package, runtime)
    calls = package.manifest.sampler.num_calls
    for runs in (1, 2):
        run(NvidiaStepper(component, *start(package)), package)
        assert component.engine.runs == 1 + runs * calls  # one to warm up, then the steps alone
    graph = component.graph
    NvidiaStepper(component, *start(package, batch=1)).close()
    assert component.graph is not graph


def test_a_batch_outside_the_profile_is_one_sentence(package: Package, runtime: Runtime) -> None:
    with pytest.raises(SdqError, match=r"built for latents of shape \(1, 4, 8, 8\) to \(2, 4, 8, 8\); \(3, 4, 8, 8\)"):
        NvidiaStepper(nvidia(package, runtime), *start(package, batch=3))


def test_memory_is_freed(package: Package, runtime: Runtime) -> None:
    component = nvidia(package, runtime)
    stepper = NvidiaStepper(component, *start(package))
    assert runtime.memory
    del stepper, component
    assert not runtime.memory
