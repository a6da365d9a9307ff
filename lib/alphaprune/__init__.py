"""alphaprune: narrow parallel branches take over from pretrained layers, then fold away exactly."""

from alphaprune.bundle import save_bundle
from alphaprune.errors import UsageError
from alphaprune.fold import Certificate, fold
from alphaprune.inference import optimise_for_inference
from alphaprune.parallel import ParallelModel
from alphaprune.plan import Plan, plan

__all__ = [
    "Certificate",
    "ParallelModel",
    "Plan",
    "UsageError",
    "fold",
    "optimise_for_inference",
    "plan",
    "save_bundle",
]
