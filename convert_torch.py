"""`infinitevl convert` in a checkout."""

from infinitevl_jax.__main__ import main

if __name__ == "__main__":
    main("convert", "convert_torch.py")
