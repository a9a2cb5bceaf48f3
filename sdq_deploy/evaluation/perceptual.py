"""Metrics that need weights from elsewhere: LPIPS, CLIP score and Inception features. Nothing is downloaded here."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdq_deploy.evaluation.scoring import FeatureSpace, Images, ImageScorer, Values
from sdq_engines.errors import SdqError

__all__ = ["clip_scorer", "inception_space", "lpips_scorer"]

_WEIGHTS = "Give the file that docs/evaluation.md names, or leave the metric out."


def lpips_scorer(weights: Path, device: str = "cpu") -> ImageScorer:
    """torchmetrics' LPIPS on AlexNet's features.

    Args:
        weights: AlexNet's, as torchvision publishes them (alexnet-owt-….pth); LPIPS' own come with torchmetrics.
        device: of torch.

    Raises:
        SdqError: torchvision is missing, or the file is not AlexNet's.
    """
    _require("torchvision", "LPIPS")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision.models import AlexNet_Weights

    name = AlexNet_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    before = torch.hub.get_dir()
    # torchmetrics asks torchvision, which looks into torch.hub's folder before it downloads.
    with _plain_copy(weights, f"checkpoints/{name}") as folder, _as_loading(weights, "AlexNet"):
        torch.hub.set_dir(folder)
        try:
            network = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).net.to(device)
        finally:
            torch.hub.set_dir(before)

    @torch.no_grad()
    def take(images: Images, reference: Images, numbers: Sequence[int]) -> Values:
        distances = network(_planes(images).to(device) / 255, _planes(reference).to(device) / 255, normalize=True)
        return {"lpips": distances.reshape(-1).double().cpu().numpy()}

    return ImageScorer(("lpips",), take)


def inception_space(weights: Path, device: str = "cpu") -> FeatureSpace:
    """The 2,048 features of torchmetrics' Inception; of these moments are kept, not the features.

    Args:
        weights: torch-fidelity's (weights-inception-2015-12-05-….pth).
        device: of torch.

    Raises:
        SdqError: torch-fidelity is missing, or the file is not Inception's.
    """
    _require("torch_fidelity", "FID")
    from torchmetrics.image.fid import FrechetInceptionDistance

    with _plain_copy(weights, "inception.pth") as folder, _as_loading(weights, "Inception"):
        path = str(folder / "inception.pth")
        network = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=path).inception.to(device)

    @torch.no_grad()
    def extract(images: Images) -> NDArray[Any]:
        features: NDArray[Any] = network(_planes(images).to(device)).double().cpu().numpy()
        return features

    return FeatureSpace("fid", 2048, extract, kept=False)


def clip_scorer(folder: Path, prompts: Sequence[str], device: str = "cpu") -> ImageScorer:
    """CLIP score (Hessel et al., 2021): max(0, 100 cos) of the embeddings of image and prompt.

    Computed here, as torchmetrics 1.9 does not work with transformers 5, whose models answer with an object.

    Args:
        folder: a CLIP model in transformers' layout, with its processor.
        prompts: of every image.
        device: of torch.

    Raises:
        SdqError: the folder holds no CLIP model.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval().to(device)
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise SdqError(
            f"{folder} does not load as a CLIP model: {str(error).splitlines()[0]}",
            "Give a folder with config.json, model.safetensors and the processor's files: --clip FOLDER",
        ) from error

    @torch.no_grad()
    def take(images: Images, reference: Images, numbers: Sequence[int]) -> Values:
        texts = [prompts[number] for number in numbers]
        limit = model.config.text_config.max_position_embeddings
        tokens = processor(text=texts, return_tensors="pt", padding=True, truncation=True, max_length=limit)
        pixels = processor(images=list(images), return_tensors="pt").pixel_values
        text = _embedding(model.get_text_features(tokens.input_ids.to(device), tokens.attention_mask.to(device)))
        image = _embedding(model.get_image_features(pixels.to(device)))
        cosine = torch.nn.functional.cosine_similarity(image, text, dim=-1)
        return {"clip_score": (100 * cosine).clamp_min(0).double().cpu().numpy()}

    return ImageScorer(("clip_score",), take)


def _embedding(answer: Any) -> Tensor:
    """[N, D]: transformers before 5 answers with the tensor itself."""
    found: Tensor = answer if isinstance(answer, Tensor) else answer.pooler_output
    return found


def _planes(images: Images) -> Tensor:
    """uint8 [N, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _require(module: str, metric: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise SdqError(
            f"{metric} needs {module}, which is not installed.", 'Install it with: pip install "sdq-deploy[metrics]"'
        )


@contextlib.contextmanager
def _plain_copy(weights: Path, name: str) -> Iterator[Path]:
    """A folder with the tensors of a weights file under `name`, and nothing that would run when it is unpickled."""
    if not weights.is_file():
        raise SdqError(f"The weights {weights} do not exist.", "Give a file, or leave the metric out.")
    try:
        tensors = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no weights file makes the unpickler raise anything
        raise SdqError(f"{weights} is no weights file that PyTorch loads without running code.", _WEIGHTS) from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, path)
        yield Path(folder)


@contextlib.contextmanager
def _as_loading(weights: Path, network: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise SdqError(f"The weights {weights} are not those of {network}.", _WEIGHTS) from error
