"""What a method cannot do, said before any work is done."""

from __future__ import annotations

from sdq_deploy.recipes.schema import Recipe
from sdq_engines.errors import SdqError
from sdq_engines.formats import PRECISIONS

__all__ = ["check_ptq", "check_reconstruction", "one_process"]


def one_process(recipe: Recipe, processes: int) -> None:
    """Raises: SdqError: several were started, and the method works in one."""
    if processes > 1:
        raise SdqError(
            f"The method {recipe.method} works in one process, and {processes} were started.",
            "Start it without accelerate launch.",
        )


def check_reconstruction(recipe: Recipe, processes: int) -> None:
    """Refuse weights that are no integers, and several processes.

    Raises:
        SdqError: in one sentence why, and what to do instead.
    """
    one_process(recipe, processes)
    precision = recipe.quantization.precision
    floats = next((each.title for each in PRECISIONS[precision].formats if each.kind == "float"), None)
    if floats:
        raise SdqError(
            f"The method ptq-reconstruction learns whether an integer is rounded down or up, and {precision} has "
            f"weights in {floats}.",
            "Take --method s2p, efficientdm or ptq.",
        )


def check_ptq(recipe: Recipe, processes: int) -> None:
    """Refuse an algorithm that does not fit the precision.

    Raises:
        SdqError: in one sentence why, and what to do instead; or several processes.
    """
    one_process(recipe, processes)
    algorithm, precision = recipe.ptq.algorithm, recipe.quantization.precision
    alone = PRECISIONS[precision].weights_alone
    others = ", ".join(f"--precision {name}" for name, each in PRECISIONS.items() if each.weights_alone)
    if algorithm == "svdquant":
        raise SdqError(
            "SVDQuant adds a floating-point low-rank branch to each layer, which the quantized checkpoint and the "
            "engines' graph have no place for.",
            "Choose another --ptq-algorithm; docs/methods.md says what each is.",
        )
    if algorithm == "awq" and not alone:
        raise SdqError(
            f"AWQ quantizes weights alone, and {precision} quantizes the inputs too.",
            f"Take {others}, or --ptq-algorithm smoothquant.",
        )
    if algorithm == "smoothquant" and alone:
        raise SdqError(
            f"SmoothQuant balances weights against quantized inputs, and {precision} leaves the inputs of its Linear "
            "layers in floating point.",
            "Take --ptq-algorithm awq, or another --precision.",
        )
