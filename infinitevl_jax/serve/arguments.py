"""Hugging Face's arguments that a call here does not have: taken where they ask for what is done
anyway, refused with a cure where they do not."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from infinitevl_jax.errors import InfiniteVLError

# Both tables: name -> (the value that means what is done anyway, what to do instead of another).
# None is always accepted.
_BEAMS = "there is no beam search: draw several answers with do_sample=True and different seeds"
_SCORES = "generate returns ids: call model(...) on prompt and answer for logits and hidden states"
_WORDS = "follow model.stream(...) and choose there, or call model(..., cache=...) token by token"
_DRAW = "use temperature, top_k, top_p or min_p"
_STOP = "follow model.stream(...) and stop listening"
# Arguments of `generate`, and settings in generation_config.json.
GENERATE: dict[str, tuple[Any, str]] = {
    "num_beams": (1, _BEAMS),
    "num_beam_groups": (1, _BEAMS),
    "length_penalty": (1, _BEAMS),
    "diversity_penalty": (0, _BEAMS),
    "early_stopping": (False, _BEAMS),
    "constraints": ([], _BEAMS),
    "force_words_ids": ([], _BEAMS),
    "penalty_alpha": (0, _DRAW),
    "typical_p": (1, _DRAW),
    "epsilon_cutoff": (0, _DRAW),
    "eta_cutoff": (0, _DRAW),
    "top_h": (None, _DRAW),
    "use_cache": (True, "the cache is what decoding runs on: leave use_cache out"),
    "num_return_sequences": (1, "repeat the row in input_ids: one row an answer"),
    "return_dict_in_generate": (False, _SCORES),
    "output_scores": (False, _SCORES),
    "output_logits": (False, _SCORES),
    "output_attentions": (False, "attention weights are never formed here"),
    "output_hidden_states": (False, _SCORES),
    "min_length": (0, "pass eos_token_ids=[], and cut the answer yourself"),
    "min_new_tokens": (0, "pass eos_token_ids=[], and cut the answer yourself"),
    "no_repeat_ngram_size": (0, "use repetition_penalty"),
    "encoder_no_repeat_ngram_size": (0, "use repetition_penalty"),
    "encoder_repetition_penalty": (1, "use repetition_penalty"),
    "bad_words_ids": ([], _WORDS),
    "suppress_tokens": ([], _WORDS),
    "begin_suppress_tokens": ([], _WORDS),
    "sequence_bias": (None, _WORDS),
    "forced_bos_token_id": (None, _WORDS),
    "forced_eos_token_id": (None, _WORDS),
    "exponential_decay_length_penalty": (None, _WORDS),
    "prefix_allowed_tokens_fn": (None, _WORDS),
    "logits_processor": ([], _WORDS),
    "renormalize_logits": (False, "probabilities that are drawn from always sum to 1"),
    "remove_invalid_values": (
        False,
        "logits that are not finite are an error here, not something to hide",
    ),
    "stopping_criteria": ([], _STOP),
    "max_time": (None, _STOP),
    "guidance_scale": (1, "there is no guidance: call model(...) with both prompts"),
    "watermarking_config": (None, "there is no watermark"),
    "token_healing": (False, "end the prompt at a whole token"),
    "dola_layers": (None, _DRAW),
    "prompt_lookup_num_tokens": (None, "there is no speculation: leave it out"),
    "assistant_model": (None, "there is no speculation: leave it out"),
    "custom_generate": (None, _STOP),
    "negative_prompt_ids": (None, "there is no guidance: call model(...) with both prompts"),
    "synced_gpus": (False, "a mesh works in step: load with mesh=make_mesh(...)"),
    "generation_config": (
        None,
        "pass its settings as arguments: do_sample, temperature, max_new_tokens, ...",
    ),
    "past_key_values": (None, "use model(..., cache=...), or Conversation, which keeps one"),
    "inputs_embeds": (None, "pass input_ids"),
    "inputs": (None, "call it input_ids"),
}
# Arguments of a call of the model.
CALL: dict[str, tuple[Any, str]] = {
    "return_dict": (True, "the output has the fields logits, cache and hidden_states"),
    "output_attentions": (False, "attention weights are never formed here"),
    "labels": (None, "compute the loss from logits, or train: infinitevl train"),
    "past_key_values": (None, "pass cache=..., as an earlier call's output has it"),
    "inputs_embeds": (None, "pass input_ids"),
    "cache_position": (None, "the cache knows where it stands: leave it out"),
    "rope_deltas": (None, "the cache knows where it stands: leave it out"),
}
# Settings in generation_config.json that do not change the tokens.
WITHOUT_EFFECT = {
    "transformers_version",
    "bos_token_id",
    "decoder_start_token_id",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "compile_config",
    "disable_compile",
    "prefill_chunk_size",
    "low_memory",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "max_matching_ngram_size",
    "assistant_early_exit",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "speculation_type",
    "use_mtp",
    "continuous_batching_config",
    "_from_model_config",
    "_commit_hash",
}


def refuse(
    given: Mapping[str, Any], known: Iterable[str], fixed: Mapping[str, tuple[Any, str]], what: str
) -> None:
    """Raise InfiniteVLError unless every argument is known, or asks for the one thing that is done
    anyway."""
    for name in given.keys() - set(known):
        if name in fixed:
            neutral, cure = fixed[name]
            value = given[name]
            if value is None or (
                neutral is not None
                and type(value) in (bool, int, float, list, tuple, dict)
                and value == neutral
            ):
                continue
            raise InfiniteVLError(f"{what} does not take {name}={value!r}", cure)
        near = difflib.get_close_matches(name, [*known, *fixed], n=3)
        raise InfiniteVLError(
            f"{what} has no argument {name!r}",
            (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"it takes {', '.join(sorted(known))}"
            ),
        )
