"""Qwen2.5's added tokens, which the published models share.

Code goes by these strings. A checkpoint's own tokenizer says their ids; those here are of the
published vocabulary.
"""

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"

# In id order. The second list is not "special": decoding keeps it as text.
SPECIAL_TOKENS = [
    END_OF_TEXT,
    START_OF_TURN,
    END_OF_TURN,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE,
    VIDEO,
]
PLAIN_TOKENS = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|>"
    " <|repo_name|> <|file_sep|>".split()
)
# token -> id in the published vocabulary, after its 151,643 plain tokens
IDS = {token: 151643 + i for i, token in enumerate([*SPECIAL_TOKENS, *PLAIN_TOKENS])}

# What config.json calls the ids of the tokens that frame and stand for pictures.
VISION_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
EOS_TOKENS = (END_OF_TURN, END_OF_TEXT)  # any of them ends an answer
EOS_IDS = tuple(IDS[token] for token in EOS_TOKENS)
