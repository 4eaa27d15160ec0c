"""Host-side numpy: from a batch named as in Hugging Face to the arrays that the model computes on.

    build_inputs(config, **batch)                        one sequence a row (inference, evaluation)
    build_inputs(config, **batch, packing=packing)       several sequences a row (training)

The modules, in the order in which they use each other:
    arrays        numpy, jax or torch arrays and lists, read and checked
    positions     rotary positions of text, images and videos
    segments      packed sequences, told apart by their position ids
    patches       pixels for the vision tower: window order, packing, padding
    packing       which row, and which tokens of it, each sequence of a batch takes
    batch         a batch named as in Hugging Face, checked; sequences joined into such a batch
    model_inputs  the arrays themselves, and the function that builds them
"""
