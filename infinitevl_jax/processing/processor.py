"""The processor: conversations in, the model's numpy inputs out, named as in Hugging Face."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing.chat_template import ChatTemplate
from infinitevl_jax.processing.continuation import after_answer, without_answers
from infinitevl_jax.processing.folder import image_options, override, read_json, video_options
from infinitevl_jax.processing.images import ImageOptions
from infinitevl_jax.processing.messages import (
    Conversation,
    Media,
    check_call,
    read_conversation,
    split_batch,
)
from infinitevl_jax.processing.prompt_ids import PLACEHOLDERS, tokenise
from infinitevl_jax.processing.spelled import GUARD, check_unicode, guard
from infinitevl_jax.processing.stream import TextStream
from infinitevl_jax.processing.tokenizer import Tokenizer
from infinitevl_jax.processing.trace import check_traces
from infinitevl_jax.processing.video import VideoOptions
from infinitevl_jax.processing.vision import Vision, arrays, process
from infinitevl_jax.special_tokens import END_OF_TEXT, END_OF_TURN, VISION_TOKENS

ANSWERS = 256  # of one training example: to find each, the conversation up to it is rendered


class Processor:
    """Turns conversations into model inputs and token ids back into text.

    `tokenizer`, `template`, `images` and `videos` say how; `padding_side` ("left" or "right") and
    `max_length` (tokens of a prompt, None for no limit) are defaults of the calls. Instances can be
    pickled and used from several threads.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        images: ImageOptions | None = None,
        videos: VideoOptions | None = None,
        *,
        padding_side: str = "left",
        max_length: int | None = None,
    ):
        self.tokenizer = tokenizer or Tokenizer.builtin()
        self.template = template or ChatTemplate.builtin()
        self.images = images or ImageOptions()
        self.videos = videos or VideoOptions()
        check_call(padding_side=padding_side, max_length=max_length)
        self.padding_side = padding_side
        self.max_length = max_length

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        video_min_pixels: int | None = None,
        video_max_pixels: int | None = None,
        video_total_pixels: int | None = None,
        fps: float | None = None,
        min_frames: int | None = None,
        max_frames: int | None = None,
        padding_side: str = "left",
        max_length: int | None = None,
    ) -> "Processor":
        """Read a checkpoint folder's tokenizer, chat template and preprocessor files; each that is
        missing has a built-in stand-in.

        The options replace what the files say: pixel limits of images and of video frames (height x
          width after resizing), a whole video's
        pixels, frames sampled a second and their count. Raises InfiniteVLError when files are
        broken or contradict each other.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InfiniteVLError(
                f"{folder} is {'a file' if folder.exists() else 'not there'}: a checkpoint folder"
                " is needed",
                "pass the folder that holds config.json (names on a hub are not downloaded: fetch"
                " the checkpoint first)",
            )
        image_values = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        video_values = {
            "min_pixels": video_min_pixels,
            "max_pixels": video_max_pixels,
            "total_pixels": video_total_pixels,
            "fps": fps,
            "min_frames": min_frames,
            "max_frames": max_frames,
        }
        tokenizer = Tokenizer.from_folder(folder)
        _check_vision_ids(tokenizer, folder)
        return cls(
            tokenizer,
            ChatTemplate.from_folder(folder),
            override(image_options(folder), _given(image_values), "image options"),
            override(video_options(folder), _given(video_values), "video options"),
            padding_side=padding_side,
            max_length=max_length,
        )

    def __call__(
        self,
        messages: Sequence,
        *,
        tools: Sequence[dict] | None = None,
        add_generation_prompt: bool = True,
        padding_side: str | None = None,
        max_length: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Model inputs of one conversation (a list of {"role", "content"}) or of a list of
        conversations.

        `tools` are JSON schemas of functions that the chat template may write. Every part of a
        message has to stand in the text: a template that leaves tools or tool calls out is refused.
          What an assistant's text spells is words, never a picture or an end.

        Returns input_ids and attention_mask [batch, length] int32, padded on `padding_side`, and
        where there are such: pixel_values [patches, features] f32 with image_grid_thw [images, 3]
          int32, pixel_values_videos with video_grid_thw [videos, 3] and
        second_per_grid_ts [videos] f64 (seconds a temporal patch spans). Pictures of all
        conversations follow one another. Raises InfiniteVLError for input that cannot be read and
        for prompts over `max_length` tokens.
        """
        conversations, several = split_batch(messages)
        check_call(
            padding_side=padding_side,
            max_length=max_length,
            add_generation_prompt=add_generation_prompt,
        )
        side = padding_side or self.padding_side
        rows, vision = [], []
        for number, conversation in enumerate(conversations):
            where = f"messages[{number}]" if several else "messages"
            parsed = read_conversation(conversation, where, PLACEHOLDERS, tools)
            seen = [self._process(media) for media in parsed.media]
            text = self._render(parsed.messages, add_generation_prompt, parsed.tools)
            rows.append(self._tokenise([text], seen, where, max_length)[0])
            self._check_traces(parsed, where)
            vision += seen
        length = max(len(row) for row in rows)
        ids = np.full((len(rows), length), self.tokenizer.pad_id, np.int32)
        mask = np.zeros((len(rows), length), np.int32)
        for i, row in enumerate(rows):
            place = slice(length - len(row), None) if side == "left" else slice(0, len(row))
            ids[i, place] = row
            mask[i, place] = 1
        return {"input_ids": ids, "attention_mask": mask, **arrays(vision)}

    def encode_example(
        self,
        messages: Sequence,
        *,
        tools: Sequence[dict] | None = None,
        turns: Literal["last", "all"] = "all",
        max_length: int | None = None,
    ) -> dict[str, np.ndarray]:
        """One conversation for training: input_ids [length] int32 and answer_mask [length] bool,
        unpadded, and `__call__`'s picture arrays.

        The mask is True on what the assistant says, its end-of-turn token included, in the last or
        in all of its turns. An answer is tokenised apart from the prompt before it, as it will be
        when the model says it.
        """
        check_call(turns=turns, max_length=max_length)
        conversation = read_conversation(messages, "messages", PLACEHOLDERS, tools)
        answers = [
            i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"
        ]
        if not answers or answers[0] == 0:
            found = "an assistant turn first, answering nothing"
            raise InfiniteVLError(
                f"messages has {found if answers else 'no assistant turn to learn from'}",
                'write {"role": "user", ...} and then {"role": "assistant", "content": <the'
                " answer>}",
            )
        answers = answers[-1:] if turns == "last" else answers
        if len(answers) > ANSWERS:
            raise InfiniteVLError(
                f"messages has {len(answers):,} answers to learn from, more than {ANSWERS}",
                'cut the conversation into several, or learn from its last answer (turns="last")',
            )
        pieces = self._cut(conversation, answers)
        vision = [self._process(media) for media in conversation.media]
        ids, piece_of = self._tokenise(pieces, vision, "messages", max_length)
        self._check_traces(conversation, "messages")
        # Answers are every second piece. A picture's tokens are nobody's words.
        placeholders = [self.tokenizer.token_id(token) for token in PLACEHOLDERS.values()]
        mask = (piece_of % 2 == 1) & ~np.isin(ids, [i for i in placeholders if i is not None])
        return {"input_ids": ids, "answer_mask": mask, **arrays(vision)}

    def encode_document(self, text: str, *, closed: bool = True) -> np.ndarray:
        """Token ids [length] int32 of a plain text, without a chat template. Control tokens that it
        spells are words.

        closed: the text ends here: <|endoftext|> follows, or the tokenizer's end of turn.
        """
        check_unicode(text, "the document")
        ids = [i for words in guard(text).split(GUARD) for i in self.tokenizer.encode(words)]
        if closed:
            end = self.tokenizer.token_id(END_OF_TEXT)
            ids.append(self.tokenizer.eos_ids[0] if end is None else end)
        return np.asarray(ids, np.int32)

    def continuation(
        self, messages: Sequence, prompt: str = "", *, tools: Sequence[dict] | None = None
    ) -> tuple[dict[str, np.ndarray], str]:
        """What a model that holds a conversation up to its last answer still has to read of it.

        Args:
          messages: the conversation, ending with what was said after the last answer.
          prompt: what was answered, as the call before returned it; "" where nothing has been
            answered yet.

        Returns:
          `__call__`'s arrays (one row) of the rest alone, new pictures included; it begins after
          the answer's words, with the token that ends them. And the prompt of the whole
          conversation, in which stand-ins take the place of answers: the model holds their words,
            and what it said must not decide how the conversation goes on.

        Raises InfiniteVLError for a template that does not leave prompt and answer as they were.
        """
        conversation = read_conversation(messages, "messages", PLACEHOLDERS, tools)
        replaced = without_answers(conversation.messages)
        whole = self._render(replaced, True, conversation.tools)
        first, media = 0, conversation.media
        if prompt:
            first, rest = after_answer(whole, prompt, replaced, self.template.source)
            new = [
                part
                for message in replaced[first:]
                if isinstance(message["content"], list)
                for part in message["content"]
            ]
            media = media[len(media) - sum(part["type"] != "text" for part in new) :]
        else:
            rest = self._render(conversation.messages, True, conversation.tools)
        vision = [self._process(item) for item in media]
        ids, _ = self._tokenise([rest], vision, "messages", None)
        self._check_traces(conversation, "messages", first)
        return {
            "input_ids": ids[None],
            "attention_mask": np.ones_like(ids[None]),
            **arrays(vision),
        }, whole

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """Text of token ids [length]."""
        return self.tokenizer.decode(ids, skip_special_tokens)

    def batch_decode(
        self, ids: Iterable[Sequence[int]] | np.ndarray, skip_special_tokens: bool = True
    ) -> list[str]:
        """Texts of token ids [batch, length]."""
        return [self.decode(row, skip_special_tokens) for row in ids]

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A decoder for ids that arrive one by one."""
        return self.tokenizer.stream(skip_special_tokens)

    def _render(
        self, messages: list[dict], add_generation_prompt: bool, tools: list[dict] | None
    ) -> str:
        if self.template.is_builtin and self.tokenizer.token_id(END_OF_TURN) is None:
            raise InfiniteVLError(
                f"the tokenizer ({self.tokenizer.source}) has no {END_OF_TURN}, which the built-in"
                " chat template writes",
                "put the checkpoint's own chat_template.jinja into its folder",
            )
        return self.template.render(
            messages, add_generation_prompt, tools=tools, **self.tokenizer.special
        )

    def _check_traces(self, conversation: Conversation, where: str, first: int = 0) -> None:
        """Raises InfiniteVLError for a part of messages[first:] or a tool that the template leaves
        out."""

        def render(messages, tools):
            return self._render(messages, False, tools)

        check_traces(
            render, conversation.messages, conversation.tools, where, self.template.source, first
        )

    def _cut(self, conversation: Conversation, answers: list[int]) -> list[str]:
        """The rendered conversation as [prompt, answer, prompt, answer, ..., rest]."""
        messages = conversation.messages
        tools = conversation.tools
        text = self._render(messages, False, tools)
        pieces, done = [], 0
        for i in answers:
            prompt = self._render(messages[:i], True, tools)
            upto = self._render(messages[: i + 1], False, tools)
            if not (upto.startswith(prompt) and text.startswith(upto) and len(prompt) >= done):
                raise InfiniteVLError(
                    f"chat template {self.template.source} rewrites earlier turns, so the answer of"
                    f" messages[{i}] cannot be told apart",
                    "train on the last turn of shorter conversations, or use a template that only"
                    " appends (the built-in does)",
                )
            end = max(
                upto.rfind(token) + len(token) if token in upto[len(prompt) :] else -1
                for token in self._end_tokens()
            )
            if end < 0:
                raise InfiniteVLError(
                    f"chat template {self.template.source} puts no end-of-turn token after the"
                    f" answer of messages[{i}]",
                    "a model trained so never stops: have the template write the tokenizer's"
                    " eos_token after each answer",
                )
            pieces += [text[done : len(prompt)], text[len(prompt) : end]]
            done = end
        return [*pieces, text[done:]]

    def _end_tokens(self) -> list[str]:
        tokens = [self.tokenizer.backend.id_to_token(i) for i in self.tokenizer.eos_ids]
        return [token for token in tokens if token] or [END_OF_TURN]

    def _process(self, media: Media) -> Vision:
        if self.tokenizer.token_id(PLACEHOLDERS[media.kind]) is None:
            raise InfiniteVLError(
                f"{media.where} is of type {media.kind}, but the tokenizer"
                f" ({self.tokenizer.source}) has no {PLACEHOLDERS[media.kind]}",
                "this is a text model: leave pictures out, or load a vision-language checkpoint",
            )
        return process(media, self.images, self.videos)

    def _tokenise(
        self, pieces: list[str], vision: list[Vision], where: str, max_length: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        return tokenise(
            self.tokenizer,
            pieces,
            vision,
            where,
            self.template.source,
            max_length=self.max_length if max_length is None else max_length,
            max_pixels=self.images.max_pixels,
        )


def _check_vision_ids(tokenizer: Tokenizer, folder: Path) -> None:
    config = read_json(folder / "config.json")
    for key, token in VISION_TOKENS.items():
        wanted = config.get(key)
        if not isinstance(config.get("vision_config"), dict) or wanted is None:
            continue
        found = tokenizer.token_id(token)
        if found != wanted:
            raise InfiniteVLError(
                f"{folder / 'config.json'}: {key} is {wanted}, but {token} is {found} in the"
                f" tokenizer ({tokenizer.source})",
                "config and tokenizer are of two checkpoints: copy both from one",
            )


def _given(values: dict) -> dict:
    return {key: value for key, value in values.items() if value is not None}
