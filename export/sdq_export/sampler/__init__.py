"""Samplers as measured linear maps (docs/architecture.md, "The sampler is in the graph").

A diffusers scheduler is driven once with basis vectors; what it does to them *is* the sampler of a package, so the
package cannot drift from diffusers.
"""

from sdq_export.sampler.compile import compile_sampler
from sdq_export.sampler.names import SCHEDULER_NAMES, make_scheduler, saved_scheduler
from sdq_export.sampler.plan import SamplerPlan
from sdq_export.sampler.run import run_sampler

__all__ = ["SCHEDULER_NAMES", "SamplerPlan", "compile_sampler", "make_scheduler", "run_sampler", "saved_scheduler"]
