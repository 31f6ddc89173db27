"""Writes everything in the checkpoint's folder except the weights and the model card."""

from __future__ import annotations

import json
import random
from pathlib import Path

from recipe import ID, MAX_PIXELS, MIN_PIXELS, SPECIAL_TOKENS, VOCABULARY
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from chiasm.demo import images, talk

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type in ('image', 'image_url') or 'image' in part or 'image_url' in part %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' or 'video' in part %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def _corpus(seed: int) -> list[str]:
    """Return sample questions, answers and messages from which the tokenizer learns its merges."""
    rng = random.Random(f"corpus {seed}")
    lines = list(images.WORDS) * 40 + list(talk.SYSTEM_MESSAGES) * 40
    for _ in range(6000):
        topic = rng.choice(images.SINGLE_KINDS)
        scene = images.draw_scene(rng, images.content_for(rng, topic), many=topic == "describe")
        lines += images.ask(rng, scene, topic, rng.choice((None, *images.ORDINALS)))
        lines += [*talk.draw_exchange(rng), talk.missing(rng.choice(images.ORDINALS)), "user\n", "assistant\n"]
    return lines + ["system\n"] * 500


def train_tokenizer(seed: int) -> Qwen2Tokenizer:
    """Train a byte-level BPE of ``VOCABULARY`` entries that splits text as Qwen's tokenizers do."""
    bare = Tokenizer(models.BPE())
    bare.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    bare.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(_corpus(seed), trainer)
    bare.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    model = json.loads(bare.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"] | ID,
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=None,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,
        chat_template=CHAT_TEMPLATE,
    )
    assert {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS} == ID, "special tokens moved"
    assert len(tokenizer) == VOCABULARY, f"{len(tokenizer)} tokens"
    return tokenizer


def write_assets(folder: Path, tokenizer: Qwen2Tokenizer) -> None:
    """Write the tokenizer, the chat template and the processors' settings into ``folder``."""
    tokenizer.save_pretrained(folder)
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_size": 2,
        "patch_size": 16,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "temporal_patch_size": 2,
        "processor_class": "Qwen3VLProcessor",
    }
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    # Other engines look up the fast class by name; transformers falls back to its Pillow variant if
    # torchvision is missing.
    image = common | {"size": size, "image_processor_type": "Qwen2VLImageProcessorFast"}
    # A video's bounds count all its frames; the model was not trained on videos.
    video = common | {
        "size": {"shortest_edge": 2 * MIN_PIXELS, "longest_edge": 16 * MAX_PIXELS},
        "video_processor_type": "Qwen3VLVideoProcessor",
        "fps": 2,
        "min_frames": 4,
        "max_frames": 16,
        "do_sample_frames": True,
    }
    for name, content in (("preprocessor_config.json", image), ("video_preprocessor_config.json", video)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
