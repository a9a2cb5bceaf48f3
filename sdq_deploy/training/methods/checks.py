"""What a method cannot do, said before any work is done."""

from __future__ import annotations

from sdq_deploy.recipes.schema import Recipe
from sdq_engines.errors import SdqError

__all__ = ["check_ptq", "one_process"]


def one_process(recipe: Recipe, processes: int) -> None:
    """Raises: SdqError: several were started, and the method works in one."""
    if processes > 1:
        raise SdqError(
            f"The method {recipe.method} works in one process, and {processes} were started.",
            "Start it without accelerate launch.",
        )


def check_ptq(recipe: Recipe, processes: int) -> None:
    """Refuse an algorithm that does not fit the precision.

    Raises:
        SdqError: in one sentence why, and what to do instead; or several processes.
    """
    one_process(recipe, processes)
    algorithm, precision = recipe.ptq.algorithm, recipe.quantization.precision
    if algorithm == "svdquant":
        raise SdqError(
            "SVDQuant adds a floating-point low-rank branch to each layer, which the quantized checkpoint and the "
            "engines' graph have no place for.",
            "Choose another --ptq-algorithm; docs/methods.md says what each is.",
        )
    if algorithm == "awq" and precision != "w4a16":
        raise SdqError(
            f"AWQ quantizes weights alone, and {precision} quantizes the inputs too.",
            "Take --precision w4a16, or --ptq-algorithm smoothquant.",
        )
    if algorithm == "smoothquant" and precision == "w4a16":
        raise SdqError(
            "SmoothQuant balances weights against quantized inputs, and w4a16 leaves the inputs of its Linear layers "
            "in floating point.",
            "Take --ptq-algorithm awq, or another --precision.",
        )
