"""Sizes of decoders that every mesh of 8 devices divides, and objectives with all terms."""

from infinitevl_jax.config.objective import DistillConfig, LayerwiseConfig, SupervisedConfig

SIZES = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_attention_heads=8,
    num_key_value_heads=4,
    num_linear_heads=8,
    linear_head_dim=8,
    tie_word_embeddings=False,
)
OBJECTIVES = {
    "supervised": SupervisedConfig(),
    "distill": DistillConfig(temperature=2.0, cross_entropy=0.5, prompt_weight=0.5),
    "layerwise": LayerwiseConfig(),
}
