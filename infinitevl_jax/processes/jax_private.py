"""Private names of JAX that several processes need, seen in 0.10.2 to 0.12. No other module of this
package may name a private part of JAX."""

from typing import Any


def coordination_client() -> Any:
    """The client of the coordination service that `jax.distributed.initialize` has started."""
    from jax._src import distributed

    return distributed.global_state.client


def launcher() -> Any | None:
    """The launcher of this process that `jax.distributed.initialize()` would find: an object with
    `get_process_count()`. None without one."""
    from jax._src.clusters import ClusterEnv

    known = (env for env in ClusterEnv._cluster_types if not env.opt_in_only_method)
    return next((env for env in known if env.is_env_present()), None)
