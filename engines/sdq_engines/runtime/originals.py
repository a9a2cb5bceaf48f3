"""The images and masks of a call, encoded into what a run begins from."""

from __future__ import annotations

from typing import Any

import numpy as np

from sdq_engines.backends.base import Session
from sdq_engines.errors import SdqError
from sdq_engines.package.layout import VAE_ENCODER
from sdq_engines.package.schema import Size
from sdq_engines.package.store import Package
from sdq_engines.runtime.beginning import Moments, Original
from sdq_engines.runtime.pictures import Pictured, mask_pixels, one_each, open_picture, pixels
from sdq_engines.sizes import source_of

__all__ = ["ImageEncoder"]


class ImageEncoder:
    """A package's VAE encoder on a loaded engine; that there is one is asked only when it is used."""

    def __init__(self, package: Package, session: Session) -> None:
        self.package, self.session = package, session

    def originals(self, image: Any, mask_image: Any, prompts: int, size: Size) -> list[Original]:
        """What each prompt's images start from; every different pair of image and mask is encoded once.

        Args:
            image, mask_image: one for all prompts or a list with one each; the mask may be None.
            prompts: how many there are.
            size: (height, width) that is made.

        Raises:
            SdqError: no encoder, or something that is no image.
        """
        pairs = zip(one_each(image, prompts, "image"), one_each(mask_image, prompts, "mask_image"), strict=True)
        made: dict[tuple[int, int], Original] = {}
        found = []
        for pictured, mask in pairs:
            key = (id(pictured), id(mask))
            if key not in made:
                made[key] = self._original(pictured, mask, size)
            found.append(made[key])
        return found

    def encode(self, image: np.ndarray) -> Moments:
        """The distribution of latents for pixels [3, height, width] in [-1, 1].

        Raises:
            SdqError: the package, or the engine, has no VAE encoder.
        """
        self._require()
        moments = self.session.component(VAE_ENCODER).run({"images": image[None]})["latent_moments"]
        mean, std = np.split(moments[0].astype(np.float32), 2)
        return Moments(mean, std)

    def _original(self, pictured: Pictured, mask_image: Pictured | None, size: Size) -> Original:
        image = pixels(open_picture(pictured, "image"), size)
        if mask_image is None:
            return Original(self.encode(image))
        mask = mask_pixels(open_picture(mask_image, "mask_image"), size)
        encoded = self.encode(image)
        masked = self.encode(image * (mask < 0.5)) if self.package.manifest.io.extra_channels else None
        factor = size[0] // encoded.mean.shape[1]
        return Original(encoded, mask[:, ::factor, ::factor], masked)

    def _require(self) -> None:
        manifest, folder = self.package.manifest, self.package.folder
        if VAE_ENCODER not in manifest.components:
            raise SdqError(
                f"The package at {folder} has no VAE encoder, so it cannot start from an image.",
                f"Export it again: sdq-deploy export {source_of(manifest)} --out {folder}",
            )
        if VAE_ENCODER not in self.session.entry.components:
            name = self.session.name
            raise SdqError(
                f"The {name} engine of {folder} was built without the VAE encoder.",
                f"Build it again: sdq-deploy build {folder} --engine {name}",
            )
