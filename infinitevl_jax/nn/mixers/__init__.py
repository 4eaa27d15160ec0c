"""Token mixers of the decoder, by layer type."""
