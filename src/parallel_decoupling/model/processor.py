"""What turns raw rows into tokens: a Hugging Face processor, or a tokenizer that is called like one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer


class TextProcessor:
    """The tokenizer of a language model without vision, called like a processor.

    A tokenizer without a padding token, such as Llama 3's, pads with its end token: the mask hides it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def __call__(
        self, text: Sequence[str], images: Sequence[Any] | None = None, **options: Any
    ) -> Mapping[str, Tensor]:
        """Tokenise ``B`` rows; a picture is a ``ValueError``."""
        if images is not None:
            raise ValueError("the backbone reads text alone. Leave the picture out, or take one with vision.")
        return cast(Mapping[str, Tensor], self.tokenizer(text, **options))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


def load_processor(source: str | Path, config: Any, **options: Any) -> Any:
    """Load the processor of a backbone with this config, or its tokenizer if the config is a text model's."""
    if config.get_text_config() is config:  # whose files may name a processor all the same, as Gemma 3's do
        return TextProcessor(AutoTokenizer.from_pretrained(source, **options))
    return cast(Any, AutoProcessor).from_pretrained(source, **options)
