"""Imports all that a run imports on its way: packages load lazily, so each forked process would do it anew.

Modules are left out of garbage collections from then on: forked processes would copy the memory of all of them.
"""

import gc
import importlib
import pkgutil

import deepspeed  # noqa: F401 - accelerate asks for it
import deepspeed.runtime.zero.muon.original_muon  # noqa: F401 - ZeRO does, whatever the optimizer, and with it inductor
import transformers.models.granitemoehybrid.modeling_granitemoehybrid  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

gc.disable()
for package in ("distill", "students", "teachers"):
    path = importlib.import_module(f"transpoint.{package}").__path__
    for module in pkgutil.walk_packages(path, f"transpoint.{package}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
gc.freeze()
gc.enable()
