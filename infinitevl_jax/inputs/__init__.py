"""Host-side numpy: from a batch named as in Hugging Face to the arrays a model computes on."""
