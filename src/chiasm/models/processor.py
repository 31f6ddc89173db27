"""Turns messages and images into token ids and pixels, with everything in a checkpoint except its weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiasm.errors import ConfigurationError, InvalidRequestError, UnsupportedModelError
from chiasm.models.base import ItemGeometry, Message, Metadata, Pixels, Processor, Prompt, PromptItem
from chiasm.models.chat import ChatTemplate
from chiasm.models.checkpoint import AS_FILES, Checkpoint, JsonObject, open_checkpoint, read_json, told
from chiasm.models.families import Family, ProcessorParts
from chiasm.models.families.base import SIZE_KEY
from chiasm.models.special_words import SpecialWords
from chiasm.models.support import family_of, load_config

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_SIDE = 1 << 20
"""The longest side of an image in pixels. It bounds the arithmetic on sizes that clients send."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class TransformersProcessor(Processor):
    """Tokenizer, chat template and image processor, loaded by transformers."""

    def __init__(self, checkpoint: Checkpoint, parts: ProcessorParts, family: Family) -> None:
        self.tokenizer = parts.tokenizer.backend_tokenizer
        # Silent truncation or padding would move the placeholders.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        text = parts.config.get_text_config()
        self.vocab_size = int(text.vocab_size)
        self.max_model_len = int(text.max_position_embeddings)
        self.eos_token_ids = _eos_token_ids(checkpoint, parts.tokenizer.eos_token_id)
        self.default_sampling = _default_sampling(checkpoint.generation_config)
        self._family = family
        self._bos: str | None = parts.tokenizer.bos_token
        self.placeholder = self._token_of(family.placeholder_id)
        self._words = SpecialWords(self.tokenizer, {family.placeholder_id, *self.eos_token_ids})
        template = _chat_template(checkpoint.folder, parts)
        image_text = family.image_text(self.placeholder)
        self._chat = ChatTemplate(parts.tokenizer, template, self.placeholder, image_text, self._words)
        self.tool_format = self._chat.tool_format

    def build_chat(
        self,
        messages: Sequence[Message],
        items: Sequence[tuple[str, ItemGeometry]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        text, reveal = self._chat.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs or {},
        )
        # Most templates write the BOS token themselves; for the others the tokenizer adds it.
        has_bos = self._bos is not None and text.startswith(self._bos)
        return self._with_items(self._encode(text, add_special_tokens=not has_bos, reveal=reveal), items)

    def build_text(self, text: str, *, add_special_tokens: bool = True) -> Prompt:
        keep = {self.placeholder} if self.placeholder in text else ()
        return self.build_tokens(self._encode(text, add_special_tokens=add_special_tokens, keep=keep))

    def build_tokens(self, token_ids: Sequence[int]) -> Prompt:
        if any(not 0 <= token_id < self.vocab_size for token_id in token_ids):
            raise InvalidRequestError(f"Token ids must be between 0 and {self.vocab_size - 1}.", param="prompt")
        if self._family.placeholder_id in token_ids:
            raise InvalidRequestError(
                f"A prompt must not contain {self.placeholder}, which stands for an image. Use /v1/chat/completions.",
                param="prompt",
            )
        return Prompt(list(token_ids))

    def geometry_of_size(self, height: int, width: int) -> ItemGeometry:
        for side in (height, width):
            if type(side) is not int or not 1 <= side <= LARGEST_SIDE:
                raise InvalidRequestError(f"An image's height and width must be integers from 1 to {LARGEST_SIDE}.")
        return self._family.geometry_of_size(height, width)

    def geometry_of_metadata(self, metadata: Metadata) -> ItemGeometry:
        keys = sorted({SIZE_KEY, self._family.metadata_key})
        if not isinstance(metadata, dict) or len(metadata) != 1 or not metadata.keys() <= set(keys):
            raise InvalidRequestError(
                f"An item's metadata must be an object with {' or '.join(keys)} and nothing else."
            )
        ((key, values),) = metadata.items()
        if not isinstance(values, list) or any(type(value) is not int for value in values):
            raise InvalidRequestError(f"{key} must be a list of integers.")
        if key != SIZE_KEY:
            return self._family.geometry_of_values(values)
        if len(values) != 2:
            raise InvalidRequestError(f"{SIZE_KEY} must be [height, width].")
        return self.geometry_of_size(*values)

    def preprocess(self, image: Image) -> Pixels:
        geometry = self.geometry_of_size(image.height, image.width)
        return Pixels(self._family.preprocess(image if image.mode == "RGB" else image.convert("RGB")), geometry)

    def _token_of(self, placeholder_id: int) -> str:
        token = self.tokenizer.id_to_token(placeholder_id)
        if token is None or self.tokenizer.encode(token, add_special_tokens=False).ids != [placeholder_id]:
            raise ConfigurationError(
                f"The tokenizer has no token {placeholder_id}, which stands for an image. Its files are missing or belong to "
                "another model; download the checkpoint again."
            )
        return token

    def _encode(
        self,
        text: str,
        *,
        add_special_tokens: bool,
        reveal: Callable[[str], str] | None = None,
        keep: Collection[str] = (),
    ) -> list[int]:
        """Tokenize; special words that ``reveal`` uncovers and those in ``keep`` are text."""
        token_ids: list[int] | None
        if reveal is None and not keep:
            token_ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        else:
            token_ids = self._words.encode(text, add_special_tokens=add_special_tokens, reveal=reveal or str, keep=keep)
        if token_ids is None:
            raise InvalidRequestError(
                "The text contains a word that this model's tokenizer reads as a special token only; leave it out."
            )
        # Some tokenizers have more tokens than the model. On a GPU such a token would end the process.
        if unknown := next((token for token in token_ids if token >= self.vocab_size), None):
            raise InvalidRequestError(
                f"The model has no embedding for the token {self.tokenizer.id_to_token(unknown)!r}; leave it out."
            )
        return token_ids

    def _with_items(self, token_ids: list[int], items: Sequence[tuple[str, ItemGeometry]]) -> Prompt:
        """Replace each placeholder by the tokens of its item."""
        places = [index for index, token in enumerate(token_ids) if token == self._family.placeholder_id]
        if len(places) != len(items):
            raise InvalidRequestError(
                f"The messages have {len(places)} places for images, but there are {len(items)} images. Some chat "
                "templates accept images only in user messages.",
                param="messages",
            )
        expanded: list[int] = []
        placed: list[PromptItem] = []
        start = 0
        for place, (identifier, geometry) in zip(places, items, strict=True):
            expanded += token_ids[start:place]
            placed.append(PromptItem(identifier, len(expanded), len(geometry.token_ids), geometry))
            expanded += geometry.token_ids
            start = place + 1
        return Prompt(expanded + token_ids[start:], placed)


def load_processor(folder: Path) -> Processor:
    """Load the processor of a checkpoint. Raises ConfigurationError, UnsupportedModelError."""
    from transformers import AutoImageProcessor, AutoTokenizer

    checkpoint = open_checkpoint(folder)
    config = load_config(checkpoint)
    with told(f"The tokenizer or image processor of {folder} cannot be loaded"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **AS_FILES)
            # The same backend everywhere: torchvision gives other pixels, and entries are cached by the image's content.
            image_processor = AutoImageProcessor.from_pretrained(folder, **AS_FILES, backend="pil")
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise UnsupportedModelError(
                f"The tokenizer or image processor of {folder} is code that comes with it, and chiasm runs no such code."
            ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigurationError(f"{folder} has no tokenizer.json. Choose a checkpoint with a fast tokenizer.")
    processor_config = folder / "processor_config.json"
    parts = ProcessorParts(
        config=config,
        tokenizer=tokenizer,
        image_processor=image_processor,
        processor_config=read_json(processor_config) if processor_config.is_file() else {},
    )
    with told(f"The configs of {folder} lack a value that its {config.model_type} needs, or have a wrong one"):
        return TransformersProcessor(checkpoint, parts, family_of(config)(parts))


def _chat_template(folder: Path, parts: ProcessorParts) -> str | None:
    """Look for the template in the same order as transformers. The tokenizer has read chat_template.jinja."""
    legacy = folder / "chat_template.json"
    template = parts.tokenizer.chat_template
    if not (folder / "chat_template.jinja").is_file():
        template = read_json(legacy).get("chat_template") if legacy.is_file() else None
        template = template or parts.processor_config.get("chat_template") or parts.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _eos_token_ids(checkpoint: Checkpoint, tokenizer_eos: int | None) -> frozenset[int]:
    """Return all tokens that end an answer. Reads the files, since a config class may default to another model's token."""
    ids: set[int] = set()
    for source in (checkpoint.generation_config, checkpoint.config, checkpoint.text_config):
        value = source.get("eos_token_id")
        ids.update(token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int))
    if tokenizer_eos is not None:
        ids.add(tokenizer_eos)
    return frozenset(ids)


def _default_sampling(generation_config: JsonObject) -> dict[str, float | int]:
    sampling: dict[str, float | int] = {
        name: value
        for name in _SAMPLING
        if isinstance(value := generation_config.get(name), (int, float)) and not isinstance(value, bool)
    }
    if generation_config.get("do_sample") is False:
        sampling["temperature"] = 0.0
    return sampling
