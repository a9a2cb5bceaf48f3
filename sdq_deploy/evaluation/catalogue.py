"""The figures that an evaluation can give: their names in results.json, their titles, and what each means."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FRECHET_METRICS", "IMAGE_METRICS", "Metric"]


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        title: heading of a column.
        digits: after the point, as shown.
        higher_is_better: which way is good.
        against_reference: whether it compares with the floating-point image; otherwise the reference has one too.
        meaning: a sentence.
        percent: whether a share, 0 to 1, shown in percent.
        unit: behind the number.
    """

    title: str
    digits: int
    higher_is_better: bool
    against_reference: bool
    meaning: str
    percent: bool = False
    unit: str = ""


#: One value an image: means with bootstrap intervals, and paired differences.
IMAGE_METRICS: dict[str, Metric] = {
    "psnr": Metric(
        "PSNR",
        2,
        True,
        True,
        "peak signal-to-noise ratio against the floating-point image, peak 255; identical images count as 100 dB",
        unit=" dB",
    ),
    "ssim": Metric("SSIM", 4, True, True, "structural similarity to the floating-point image; 1 is identical"),
    "lpips": Metric(
        "LPIPS", 4, False, True, "perceptual distance to the floating-point image (AlexNet features); 0 is identical"
    ),
    "caption_accuracy": Metric(
        "captions right",
        1,
        True,
        False,
        "share of images in which the classifier sees every shape of the caption in its colour, and no other",
        percent=True,
        unit=" %",
    ),
    "clip_score": Metric("CLIP score", 2, True, False, "100 times the cosine of CLIP's image and prompt embeddings"),
}

#: One value a set of images: Fréchet distances.
FRECHET_METRICS: dict[str, Metric] = {
    "feature_fid": Metric(
        "feature-FID to FP",
        4,
        False,
        True,
        "Fréchet distance of the caption classifier's features from those of the floating-point images",
    ),
    "fid": Metric(
        "FID to FP", 3, False, True, "Fréchet distance of Inception features from those of the floating-point images"
    ),
    "feature_fid_real": Metric(
        "feature-FID to real", 4, False, False, "the same distance of the classifier's features from real images'"
    ),
    "fid_real": Metric(
        "FID to real", 3, False, False, "Fréchet distance of Inception features from those of real images"
    ),
}
