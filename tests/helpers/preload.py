"""Imports all that a run imports on its way, and fills what it remembers of recipes and of checkpoints' names: packages
load lazily, so each forked process would do it anew.

Modules are left out of garbage collections from then on: forked processes would copy the memory of all of them.
"""

import gc
import importlib
import pkgutil

import deepspeed  # noqa: F401 - accelerate asks for it
import deepspeed.runtime.zero.muon.original_muon  # noqa: F401 - ZeRO does, whatever the optimizer, and with it inductor
import transformers.models.granitemoehybrid.modeling_granitemoehybrid  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

gc.disable()
for package in ("distill", "students", "teachers"):
    path = importlib.import_module(f"transpoint.{package}").__path__
    for module in pkgutil.walk_packages(path, f"transpoint.{package}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
run_files = importlib.import_module("run_files")
importlib.import_module("transpoint.distill.config").load_recipe(run_files.TINY)
get_checkpoint_conversion_mapping("llama")
gc.freeze()
gc.enable()
