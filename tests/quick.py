"""XLA flags that shorten code generation, most of a test's time. XLA's passes are unchanged."""

import importlib.metadata

QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # LLVM gets a program whole: each of 32 parts would be set up anew, a quarter of the time
    " --xla_cpu_parallel_codegen_split_count=1"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # the older way to write fusions takes half the time; later versions have it no more
    QUICK += " --xla_cpu_use_fusion_emitters=false"
