"""Commands that compute nothing on an accelerator."""


def stay_on_the_host() -> None:
    """Use the CPU unless the user chose a platform (JAX_PLATFORMS): the accelerator and its memory
    stay free for others."""
    import jax

    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
