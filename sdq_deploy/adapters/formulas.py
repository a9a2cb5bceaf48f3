"""What an adapter's tensors make of a layer's weight, by the formula of each kind.

lora    delta = up . down, with a core between them for convolutions in Tucker form (LoCon)
loha    delta = (w1_a . w1_b) * (w2_a . w2_b), element by element
lokr    delta = kron(w1, w2), each whole or a product of two
diff    delta itself, of the weight or of a normalization's (LyCORIS "full" and "norm")

Scaled by alpha / rank. LoRA: Hu et al. 2021. LoHa, LoKr and the Tucker forms: Yeh et al. 2023 (LyCORIS). With a
magnitude (DoRA, Liu et al. 2024) the new weight is magnitude * W' / |W'|, W' = W + strength * delta, the norm over all
but the output's channel, or over all but the input's, as the magnitude's shape says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

__all__ = ["ROLES", "new_weight", "rank_of", "unused_roles"]

_LORA = frozenset({"up", "down", "mid"})
_LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"})
_LOKR = frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"})
_DIFF = frozenset({"diff"})
_BESIDE = frozenset({"alpha", "magnitude", "bias_diff"})

#: What a tensor of an adapter can be to its layer.
ROLES = _LORA | _LOHA | _LOKR | _DIFF | _BESIDE


def new_weight(weight: Tensor, tensors: Mapping[str, Tensor], scale: float, strength: float) -> Tensor:
    """The layer's weight with the adapter in it.

    Args:
        weight: f32, of a Linear [out, in], a Conv2d [out, in, kh, kw] or a normalization [channels].
        tensors: role -> f32, without "alpha".
        scale: alpha / rank.
        strength: what the user weighs the adapter with.

    Raises:
        ValueError: the tensors are not a whole set of one kind, or do not have the layer's shape.
    """
    if unused_roles(tensors):
        raise ValueError(f"has {', '.join(sorted(tensors))}, which make no whole set of one kind")
    if not set(tensors) - _BESIDE:
        return weight
    delta = _delta(tensors)
    if delta.shape[:1] != weight.shape[:1] or delta.numel() != weight.numel():
        raise ValueError(f"is a change of {list(delta.shape)}, the layer's weight is {list(weight.shape)}")
    merged = weight + strength * scale * delta.reshape(weight.shape)
    return _normalized(merged, tensors["magnitude"]) if "magnitude" in tensors else merged


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """What alpha is divided by; None for a delta that is not a product, whose scale is 1."""
    for role in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if role in tensors:
            return int(tensors[role].shape[0])
    return None


def unused_roles(roles: Iterable[str]) -> set[str]:
    """Those that no formula reads: what is beside a whole set of one kind, or all of what makes no whole set."""
    own = set(roles) - _BESIDE
    if not own:
        return set(roles) - {"bias_diff"}
    if "diff" in own:
        return set(roles) - {"diff", "bias_diff"}
    return set() if any(wanted <= own <= kind for wanted, kind in _whole_sets()) else own


def _whole_sets() -> list[tuple[set[str], frozenset[str]]]:
    """(what must be there, what may be there) of each kind."""
    firsts = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
    seconds = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
    kroneckers = [(first | second, frozenset(first | second)) for first in firsts for second in seconds]
    tuckers = [(each | {"lokr_t2"}, frozenset(each | {"lokr_t2"})) for each, _ in kroneckers if "lokr_w2_a" in each]
    loha = set(_LOHA) - {"hada_t1", "hada_t2"}
    return [
        ({"up", "down"}, _LORA),
        (loha, frozenset(loha)),
        (set(_LOHA), _LOHA),
        *kroneckers,
        *tuckers,
    ]


def _delta(tensors: Mapping[str, Tensor]) -> Tensor:
    if "diff" in tensors:
        return tensors["diff"]
    if "up" in tensors:
        return _lora(tensors)
    return _loha(tensors) if "hada_w1_a" in tensors else _lokr(tensors)


def _lora(tensors: Mapping[str, Tensor]) -> Tensor:
    up, down = tensors["up"].flatten(1), tensors["down"]
    if "mid" in tensors:
        return torch.einsum("mnkl,im,nj->ijkl", tensors["mid"], up, down.flatten(1))
    return (up @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def _loha(tensors: Mapping[str, Tensor]) -> Tensor:
    factors = [_product(tensors[f"hada_w{i}_a"], tensors[f"hada_w{i}_b"], tensors.get(f"hada_t{i}")) for i in (1, 2)]
    return factors[0] * factors[1]


def _lokr(tensors: Mapping[str, Tensor]) -> Tensor:
    first = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    second = (
        tensors["lokr_w2"]
        if "lokr_w2" in tensors
        else _product(tensors["lokr_w2_a"], tensors["lokr_w2_b"], tensors.get("lokr_t2"))
    )
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)), second.contiguous())


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """a . b; with a core [r, r, kh, kw], a is [r, out], b [r, in]."""
    if core is not None:
        return torch.einsum("ijkl,ip,jr->prkl", core, a, b)
    return (a @ b.flatten(1)).reshape(len(a), *b.shape[1:])


def _normalized(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Each output's weights scaled to its magnitude [out] or [out, 1, ...], or each input's to [1, in, 1, ...]."""
    axis = 1 if magnitude.ndim > 1 and magnitude.shape[0] == 1 else 0
    if weight.ndim < 2 or magnitude.numel() != weight.shape[axis]:
        raise ValueError(f"has a magnitude of {list(magnitude.shape)}, the layer's weight is {list(weight.shape)}")
    others = [dim for dim in range(weight.ndim) if dim != axis]
    norm = weight.pow(2).sum(dim=others, keepdim=True).sqrt()
    return weight * magnitude.reshape(norm.shape) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
