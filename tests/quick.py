"""XLA flags that shorten code generation, most of a test's time. XLA's passes are unchanged."""

import importlib.metadata

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # the older fusion emitters take half the time; later versions lack them
    QUICK += " --xla_cpu_use_fusion_emitters=false"
