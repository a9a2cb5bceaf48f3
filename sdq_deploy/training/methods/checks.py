"""What a method cannot do, said before any work is done."""

from __future__ import annotations

from sdq_deploy.recipes.schema import Recipe
from sdq_engines.errors import SdqError
from sdq_engines.formats import PRECISIONS

__all__ = ["check_method"]


def check_method(recipe: Recipe, processes: int) -> None:
    """Refuse a method that does not fit the precision or the processes.

    Raises:
        SdqError: in one sentence why, and what to do instead.
    """
    if recipe.method in ("ptq", "ptq-reconstruction") and processes > 1:
        raise SdqError(
            f"The method {recipe.method} works in one process, and {processes} were started.",
            "Start it without accelerate launch.",
        )
    precision = recipe.quantization.precision
    floats = next((each.title for each in PRECISIONS[precision].formats if each.kind == "float"), None)
    if recipe.method == "ptq-reconstruction" and floats:
        raise SdqError(
            f"The method ptq-reconstruction learns whether an integer is rounded down or up, and {precision} has "
            f"weights in {floats}.",
            "Take --method s2p, efficientdm or ptq.",
        )
    if recipe.method != "ptq":
        return
    algorithm = recipe.ptq.algorithm
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
