"""The decoder of the model-parallel example: its parts by their definitions, the whole beside transformers' Llama."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fts_examples.model_parallel.decoder import (
    Attention,
    Decoder,
    DecoderConfig,
    RMSNorm,
    RotaryEmbedding,
    SizeError,
    rotate,
)

CONFIG = DecoderConfig(vocab_size=11, dim=24, n_layers=2, n_heads=6, n_kv_heads=2, hidden_dim=20)
LENGTH = 7


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim": 25}, "expected n_heads to divide dim=25, got n_heads=6. Fix: Set dim to a multiple of 6, or change "),
        ({"n_kv_heads": 4}, "expected n_kv_heads to divide n_heads=6, got n_kv_heads=4. Fix: Set n_kv_heads to a div"),
        ({"n_kv_heads": 12}, "expected n_kv_heads to divide n_heads=6, got n_kv_heads=12. Fix: Set n_kv_heads to a di"),
        (
            {"dim": 18},
            "expected dim / n_heads to be even, since the rotary embedding turns pairs of values, got 18 / 6",
        ),
        ({"n_layers": 0}, "expected n_layers to be positive, got 0. Fix: Give n_layers a positive value."),
        ({"vocab_size": -1}, "expected vocab_size to be positive, got -1."),
    ],
)
def test_sizes_that_do_not_fit_are_named_with_the_fix(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(SizeError, match=re.escape(message)):
        replace(CONFIG, **sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_the_one_of_pytorch_and_of_the_paper(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 8, dtype=dtype) * 4
    norm, reference = RMSNorm(8, eps=1e-3).to(dtype), nn.RMSNorm(8, eps=1e-3, dtype=dtype)
    nn.init.normal_(norm.weight)
    reference.load_state_dict(norm.state_dict())
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x), reference(x))
    by_hand = x.double() / ((x.double() ** 2).sum(-1, keepdim=True) / 8 + 1e-3).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), by_hand, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_a_rotation_keeps_lengths_and_leaves_the_first_position_alone() -> None:
    x = torch.randn(2, 3, LENGTH, 8)
    turned = rotate(x, RotaryEmbedding(8, base=100.0)(LENGTH))
    close(turned.norm(dim=-1), x.norm(dim=-1))
    close(turned[:, :, 0], x[:, :, 0])
    assert (turned[:, :, 1:] - x[:, :, 1:]).abs().amax(-1).min() > 1e-3


def test_products_of_turned_vectors_depend_on_their_distance_only() -> None:
    query, key = torch.randn(2, 8)
    everywhere = torch.stack([query, key])[None, :, None].expand(1, 2, LENGTH, 8)
    queries, keys = rotate(everywhere, RotaryEmbedding(8, base=100.0)(LENGTH))[0]
    products = queries @ keys.T
    for distance in range(1 - LENGTH, LENGTH):
        same_distance = products.diagonal(distance)
        close(same_distance, same_distance[:1].expand_as(same_distance))
    assert products[0].unique().numel() == LENGTH


def multi_head_attention(attention: Attention, x: Tensor, rotation: Tensor) -> Tensor:
    """Attention in which every head has keys and values of its own, written out head by head."""
    width, mixed = attention.head_dim, []
    future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    for rows in torch.arange(attention.wq.weight.shape[0]).split(width):
        query, key, value = (x @ part.weight[rows].T for part in (attention.wq, attention.wk, attention.wv))
        query, key = rotate(query, rotation), rotate(key, rotation)
        scores = (query @ key.transpose(1, 2) / width**0.5).masked_fill(future, -torch.inf)
        mixed.append(scores.softmax(-1) @ value)
    return torch.cat(mixed, -1) @ attention.wo.weight.T


def test_with_as_many_key_heads_as_heads_attention_is_multi_head_attention() -> None:
    attention = Attention(replace(CONFIG, n_kv_heads=6))
    x, rotation = torch.randn(2, LENGTH, CONFIG.dim), RotaryEmbedding(CONFIG.head_dim, 100.0)(LENGTH)
    close(attention(x, rotation), multi_head_attention(attention, x, rotation))


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_grouped_queries_are_heads_with_equal_keys_and_values(kv_heads: int) -> None:
    grouped, whole = Attention(replace(CONFIG, n_kv_heads=kv_heads)), Attention(replace(CONFIG, n_kv_heads=6))
    weights: dict[str, Any] = dict(grouped.state_dict())
    for name in ("wk.weight", "wv.weight"):
        heads = weights[name].unflatten(0, (kv_heads, CONFIG.head_dim))
        weights[name] = heads.repeat_interleave(6 // kv_heads, dim=0).flatten(0, 1)
    whole.load_state_dict(weights)
    x, rotation = torch.randn(2, LENGTH, CONFIG.dim), RotaryEmbedding(CONFIG.head_dim, 100.0)(LENGTH)
    close(grouped(x, rotation), multi_head_attention(whole, x, rotation))


def test_a_later_token_does_not_change_earlier_logits() -> None:
    decoder, tokens = Decoder(CONFIG), torch.randint(CONFIG.vocab_size, (2, LENGTH))
    for position in range(LENGTH):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % CONFIG.vocab_size
        difference = (decoder(changed) - decoder(tokens)).abs().amax(-1)
        assert difference[:, :position].eq(0).all()
        assert difference[:, position:].gt(0).all()


NAMES_IN_TRANSFORMERS = {
    "tok_embeddings": "model.embed_tokens",
    "layers": "model.layers",
    "attention.w": "self_attn.",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "output": "lm_head",
}


def name_in_transformers(name: str) -> str:
    if name == "norm.weight":
        return "model.norm.weight"
    for ours, theirs in NAMES_IN_TRANSFORMERS.items():
        name = name.replace(ours, theirs)
    return re.sub(r"self_attn\.(\w)\.", r"self_attn.\1_proj.", name)


def test_the_decoder_is_the_llama_of_transformers() -> None:
    decoder = Decoder(CONFIG)
    for weight in decoder.parameters():
        nn.init.normal_(weight, std=0.2)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.dim,
            intermediate_size=CONFIG.hidden_dim,
            num_hidden_layers=CONFIG.n_layers,
            num_attention_heads=CONFIG.n_heads,
            num_key_value_heads=CONFIG.n_kv_heads,
            rms_norm_eps=CONFIG.norm_eps,
            tie_word_embeddings=False,
        )
    )
    llama.load_state_dict({name_in_transformers(name): weight for name, weight in decoder.state_dict().items()})
    tokens = torch.randint(CONFIG.vocab_size, (3, LENGTH))
    with torch.no_grad():
        logits = decoder(tokens)
        close(logits, llama(input_ids=tokens).logits)
    assert logits.std() > 0.1


def test_in_bfloat16_distant_positions_stay_apart() -> None:
    decoder = Decoder(CONFIG).to(torch.bfloat16)
    cosines, sines = decoder.rotary(300)
    close(torch.atan2(sines[:, 0], cosines[:, 0]).diff().remainder(2 * torch.pi), torch.ones(299))


def test_a_decoder_from_the_meta_device_computes_the_same() -> None:
    whole, tokens = Decoder(CONFIG), torch.randint(CONFIG.vocab_size, (2, LENGTH))
    with torch.device("meta"):
        empty = Decoder(CONFIG)
    empty.to_empty(device="cpu").load_state_dict(whole.state_dict())
    close(empty(tokens), whole(tokens))
