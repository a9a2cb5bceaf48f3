"""`SamplerPlan`: everything a run needs to know about its scheduler, as arrays."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from sdq_engines.errors import SdqError
from sdq_engines.files import atomic_write_bytes

__all__ = ["SamplerPlan", "StepMap", "row_length"]

Array = NDArray[np.float32]


@dataclass(frozen=True)
class StepMap:
    """One sampler step as a linear map over its S state slots (slot 0: the latents, the rest: the history).

    ``model_input = u . state``; ``new_state = matrix @ state + output * model_output + noise * noise``.

    Attributes:
        matrix: float32 [S, S], "M" in docs/architecture.md.
        output: float32 [S], "N": what the guided model output adds to each slot.
        noise: float32 [S], "C": what unit Gaussian noise adds to each slot.
        u: float32 [S], the model's input as a combination of the slots.
    """

    matrix: Array
    output: Array
    noise: Array
    u: Array

    def pack(self) -> Array:
        """The row that the graph's ``coefficients`` input takes, float32 [S*S + 3*S]."""
        return np.concatenate([self.matrix.ravel(), self.output, self.noise, self.u]).astype(np.float32)

    @staticmethod
    def unpack(row: Array, slots: int) -> StepMap:
        """Undo `pack` for a row of ``slots`` state slots."""
        matrix, output, noise, u = np.split(row, np.cumsum([slots * slots, slots, slots]))
        return StepMap(matrix.reshape(slots, slots), output, noise, u)


def row_length(slots: int) -> int:
    """R, the length of a coefficient row over ``slots`` state slots."""
    return slots * slots + 3 * slots


@dataclass(frozen=True)
class SamplerPlan:
    """A scheduler with a fixed number of steps, compiled.

    Attributes:
        coefficients: float32 [starts, T, R]; row ``[start, i]`` is step ``i`` of a run that began at ``start``
            (multistep coefficients depend on where sampling starts); rows with ``i < start`` are zero.
        timesteps: float32 [T], what the model is told at each step.
        init_noise_sigma: float32 [starts], the factor of unit noise that starts a run from noise alone.
        noising: float32 [starts, 2], ``a, b`` of ``a * clean_latents + b * noise``, the start of an img2img run.
        history: H, the number of state slots besides the latents.
        stochastic: whether any step adds fresh noise.
        scheduler: diffusers' class name.
        config: the scheduler's configuration, JSON values only.
        num_inference_steps: what the user asks for; T, the model calls, may be more (PNDM: one more).
        order: model calls per step where diffusers counts them so; a run from an image begins at a multiple of it.
    """

    coefficients: Array
    timesteps: Array
    init_noise_sigma: Array
    noising: Array
    history: int
    stochastic: bool
    scheduler: str
    config: dict[str, Any]
    num_inference_steps: int
    order: int = 1

    @property
    def calls(self) -> int:
        """T, the number of model calls of a full run."""
        return int(self.timesteps.shape[0])

    @property
    def slots(self) -> int:
        """S = 1 + H."""
        return 1 + self.history

    def step_map(self, start: int, step: int) -> StepMap:
        """The map of step ``step`` in a run that began at step ``start``."""
        return StepMap.unpack(self.coefficients[start, step], self.slots)

    def to_bytes(self) -> bytes:
        """The plan as a safetensors file; what is not an array goes into its header."""
        arrays = {
            "coefficients": self.coefficients,
            "timesteps": self.timesteps,
            "init_noise_sigma": self.init_noise_sigma,
            "noising": self.noising,
        }
        header = {
            "scheduler": self.scheduler,
            "config": json.dumps(self.config, sort_keys=True),
            "num_inference_steps": str(self.num_inference_steps),
            "history": str(self.history),
            "stochastic": str(int(self.stochastic)),
            "order": str(self.order),
        }
        return save({name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}, header)

    def save(self, path: str | Path) -> None:
        """Write ``sampler.safetensors`` atomically."""
        atomic_write_bytes(Path(path), self.to_bytes())

    @staticmethod
    def load(path: str | Path) -> SamplerPlan:
        """Read what `save` wrote.

        Raises:
            SdqError: the file is not a sampler.
        """
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return SamplerPlan(
                coefficients=arrays["coefficients"],
                timesteps=arrays["timesteps"],
                init_noise_sigma=arrays["init_noise_sigma"],
                noising=arrays["noising"],
                history=int(header["history"]),
                stochastic=header["stochastic"] == "1",
                scheduler=header["scheduler"],
                config=json.loads(header["config"]),
                num_inference_steps=int(header["num_inference_steps"]),
                order=int(header.get("order", "1")),
            )
        except (KeyError, ValueError) as error:
            raise SdqError(f"{path} is not a sampler written by sdq-deploy ({error}).", "Export it again.") from error
