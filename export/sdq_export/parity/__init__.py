"""Parity, the gate of every export: four criteria that a faithful quantized graph passes and a wrong one does not.

Rounding turns a perturbation of 1e-7 into quantization-sized differences a few layers on, even within one framework, so
outputs of two quantized networks are not compared with each other. See docs/quantization.md, "Parity".
"""

from sdq_export.parity.budget import Gate, GateChoice
from sdq_export.parity.engine import check_engine
from sdq_export.parity.inputs import ParityInputs
from sdq_export.parity.report import Criterion, ParityReport
from sdq_export.parity.samples import TeacherSamples

__all__ = ["Criterion", "Gate", "GateChoice", "ParityInputs", "ParityReport", "TeacherSamples", "check_engine"]
