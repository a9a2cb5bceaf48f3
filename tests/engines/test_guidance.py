"""Which rows an image takes, and what they read."""

from __future__ import annotations

import pytest

from sdq_engines.guidance import Guidance
from sdq_engines.runtime.requests import ImageRequest
from sdq_engines.runtime.wording import Wording


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, -3.0])
def test_a_scale_of_one_or_less_is_no_guidance(scale: float) -> None:
    assert Guidance.classifier_free(scale) == Guidance("none", 1.0)


def test_rows_and_what_they_read() -> None:
    both = Guidance.classifier_free(1.001)
    assert (both.kind, both.rows, both.texts) == ("classifier-free", 2, ("negative", "prompt"))
    assert Guidance("none", 1.0).texts == Guidance("embedded", 8.0).texts == ("prompt",)
    request = ImageRequest(Wording.same("a cat", 1), Wording.same("fog", 1), 7)
    assert [request.text(row).texts for row in both.texts] == [("fog",), ("a cat",)]
