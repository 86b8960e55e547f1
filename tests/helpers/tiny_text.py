"""Tiny text encoders and tokenizers of the classes that stock pipelines name, all weights drawn at random."""

import math
import string

import torch
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CLIP_TOKENS = 77
# Every printable character as a word of its own, so that no tokenizer meets an unknown letter in an English prompt.
_CHARACTERS = " ".join(string.printable.split()[0])
_VOCAB_SIZE = 600
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@torch.no_grad()
def spread_weights(module: nn.Module) -> nn.Module:
    """Draws every matrix from N(0, 1 / fan in) and every bias from N(0, 0.01): no layer mutes or blows up its input.

    Default initialisations leave the gates of adaptive norms near zero: time and text show 2 to 8 times less.
    """
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0.0, 0.1)
        elif parameter.ndim > 1 and not name.endswith("gamma"):
            parameter.normal_(0.0, 1 / math.sqrt(parameter[0].numel()))
    return module.eval()


def clip_tokenizer() -> PreTrainedTokenizerBase:
    return CLIPTokenizer(model_max_length=CLIP_TOKENS).train_new_from_iterator(
        [_CHARACTERS], vocab_size=_VOCAB_SIZE, initial_alphabet=ByteLevel.alphabet()
    )


def t5_tokenizer() -> PreTrainedTokenizerBase:
    return T5TokenizerFast(extra_ids=0).train_new_from_iterator([_CHARACTERS], vocab_size=_VOCAB_SIZE)


def gemma_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = GemmaTokenizer().train_new_from_iterator([_CHARACTERS], vocab_size=_VOCAB_SIZE)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    return tokenizer


def qwen_tokenizer(prompt_template: str = "") -> PreTrainedTokenizerBase:
    """A Qwen tokenizer that knows each word of the template, as the real one does: the pipeline drops its 34 tokens."""
    tokenizer = Qwen2Tokenizer(additional_special_tokens=["<|im_start|>", "<|im_end|>"]).train_new_from_iterator(
        [prompt_template], vocab_size=_VOCAB_SIZE, initial_alphabet=ByteLevel.alphabet()
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def clip_text_encoder(tokenizer: PreTrainedTokenizerBase, width: int, *, projected: bool = False) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return spread_weights((CLIPTextModelWithProjection if projected else CLIPTextModel)(config))


def t5_text_encoder(tokenizer: PreTrainedTokenizerBase, width: int) -> nn.Module:
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return spread_weights(T5EncoderModel(config))


def gemma_text_encoder(tokenizer: PreTrainedTokenizerBase, width: int) -> nn.Module:
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return spread_weights(Gemma2Model(config))


def qwen_text_encoder(tokenizer: PreTrainedTokenizerBase, width: int) -> nn.Module:
    end = tokenizer.eos_token_id
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    return spread_weights(Qwen3Model(config))


def qwen_vision_text_encoder(tokenizer: PreTrainedTokenizerBase, width: int) -> nn.Module:
    end = tokenizer.eos_token_id
    text = dict(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=end, eos_token_id=end,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
    )  # fmt: skip
    vision = dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=width, fullatt_block_indexes=[0]
    )
    # The pipeline sends text alone, so the image and video marks stay outside the tiny vocabulary.
    return spread_weights(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)))
