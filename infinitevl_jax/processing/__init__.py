"""Conversion of conversations, images and videos to model inputs. Independent of JAX."""

from infinitevl_jax.processing.chat_template import ChatTemplate
from infinitevl_jax.processing.images import ImageOptions, load_image, smart_resize
from infinitevl_jax.processing.processor import Processor
from infinitevl_jax.processing.stream import TextStream
from infinitevl_jax.processing.tokenizer import Tokenizer
from infinitevl_jax.processing.video import VideoOptions, check_video, load_video

__all__ = [
    "ChatTemplate",
    "ImageOptions",
    "Processor",
    "TextStream",
    "Tokenizer",
    "VideoOptions",
    "check_video",
    "load_image",
    "load_video",
    "smart_resize",
]
