"""Commands that compute nothing on an accelerator."""


def stay_on_the_host() -> None:
    """Use the CPU unless JAX_PLATFORMS is set, so that no accelerator memory is reserved."""
    import jax

    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
