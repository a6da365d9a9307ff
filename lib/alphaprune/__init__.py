"""alphaprune: narrow parallel branches take over from pretrained layers, then fold away exactly."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alphaprune.bundle import save_bundle
    from alphaprune.certificate import Certificate
    from alphaprune.errors import UsageError
    from alphaprune.fold import fold
    from alphaprune.inference import optimise_for_inference
    from alphaprune.parallel import ParallelModel
    from alphaprune.plan import Plan, plan
    from alphaprune.training import accuracy, training

__all__ = [
    "Certificate",
    "ParallelModel",
    "Plan",
    "UsageError",
    "accuracy",
    "fold",
    "optimise_for_inference",
    "plan",
    "save_bundle",
    "training",
]

_MODULES = {"Certificate": "certificate", "ParallelModel": "parallel", "Plan": "plan", "UsageError": "errors", "accuracy": "training",
            "fold": "fold", "optimise_for_inference": "inference", "plan": "plan", "save_bundle": "bundle",
            "training": "training"}  # fmt: skip


class _Face(ModuleType):
    """The package as a module whose names are loaded when they are first asked for: torch takes seconds, and what is wrong with
    a command line or a parameter file is said without it."""

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        super().__setattr__(name, found)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        # An imported module becomes an attribute of its package; but `fold` and `plan` are the functions, here.
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
