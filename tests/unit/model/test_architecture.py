"""Reading config.json: old and new spellings, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from ellm.worker.api.errors import ConfigError
from ellm.worker.model.architecture import SUPPORTED, parse_architecture

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
OPT: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}


def named(architecture: str, **changes: Any) -> dict[str, Any]:
    return {**LLAMA, "architectures": [architecture], **changes}


def test_a_llama_2_config_of_old() -> None:
    arch = parse_architecture({**LLAMA, "rope_scaling": None, "pretraining_tp": 1})
    assert (arch.family, arch.head_dim, arch.num_kv_heads, arch.max_model_len) == ("llama", 8, 2, 256)
    assert arch.rope is not None
    assert (arch.rope.theta, arch.rope.scaling, arch.rope.rotary_dim) == (10000.0, "default", 8)
    assert arch.dtype == "bfloat16"
    assert arch.norm_eps == 1e-5
    assert arch.windows == (None,) * 4
    features = (arch.qkv_bias, arch.out_bias, arch.mlp_bias, arch.qk_norm, arch.tie_word_embeddings)
    assert not any(features)
    assert arch.kv_elements_per_token == 2 * 4 * 2 * 8


def test_missing_kv_heads_mean_one_for_each_head() -> None:
    config = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert parse_architecture(config).num_kv_heads == 8


SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **SCALING}},
    ],
)
def test_rope_is_read_in_every_spelling(spelling: dict[str, Any]) -> None:
    rope = parse_architecture({**LLAMA, **spelling}).rope
    assert rope is not None
    assert (rope.theta, rope.scaling, rope.factor, rope.original_max_positions) == (5e5, "llama3", 8.0, 64)


def test_a_linear_scaling_stretches_the_context() -> None:
    arch = parse_architecture({**LLAMA, "rope_scaling": {"type": "linear", "factor": 4}})
    assert arch.max_model_len == 1024


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope", "su"])
def test_other_scalings_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"{kind!r} is not supported"):
        parse_architecture({**LLAMA, "rope_scaling": {"type": kind, "factor": 2.0}})


def test_a_scaling_without_its_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match="lacks low_freq_factor, high_freq_factor"):
        parse_architecture(
            {
                **LLAMA,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 64,
                },
            }
        )


def test_frequencies_per_kind_of_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match="not supported"):
        parse_architecture({**LLAMA, "rope_parameters": {"full_attention": {"rope_theta": 1e6}}})


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        (2, None, (2,)),
        (2, {"eos_token_id": [7, 8, 7]}, (7, 8)),
        ([3, 4], {"bos_token_id": 1}, (3, 4)),
        (None, {}, ()),
    ],
)
def test_end_of_text_ids(config: object, generation: dict[str, Any] | None, ids: tuple[int, ...]) -> None:
    assert parse_architecture({**LLAMA, "eos_token_id": config}, generation).eos_token_ids == ids


def test_mistral_has_its_window_on_every_layer_unless_null() -> None:
    assert parse_architecture(named("MistralForCausalLM", sliding_window=32)).windows == (32,) * 4
    assert parse_architecture(named("MistralForCausalLM", sliding_window=None)).windows == (None,) * 4
    assert parse_architecture(named("MistralForCausalLM")).windows == (4096,) * 4


def test_qwen2_windows() -> None:
    unused = parse_architecture(named("Qwen2ForCausalLM", sliding_window=32, max_window_layers=2))
    assert unused.windows == (None,) * 4
    assert unused.qkv_bias
    assert not unused.out_bias
    used = {"use_sliding_window": True, "sliding_window": 32}
    late = parse_architecture(named("Qwen2ForCausalLM", max_window_layers=2, **used))
    assert late.windows == (None, None, 32, 32)
    types = ["sliding_attention", "full_attention"] * 2
    listed = parse_architecture(named("Qwen2ForCausalLM", layer_types=types, **used))
    assert listed.windows == (32, None, 32, None)
    with pytest.raises(ConfigError, match="layer_types"):
        parse_architecture(named("Qwen2ForCausalLM", layer_types=["linear_attention"] * 4, **used))


def test_qwen3_norms_its_heads_and_has_128_of_each() -> None:
    arch = parse_architecture(named("Qwen3ForCausalLM"))
    assert (arch.head_dim, arch.qk_norm, arch.qkv_bias) == (128, True, False)
    assert parse_architecture(named("Qwen3ForCausalLM", head_dim=16)).head_dim == 16


def test_opt() -> None:
    arch = parse_architecture({**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False})
    assert (arch.family, arch.embed_dim, arch.pre_norm) == ("opt", 32, False)
    assert arch.tie_word_embeddings
    assert arch.rope is None
    assert parse_architecture(OPT).embed_dim == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported are Llama"),
        ({"architectures": None}, "architecture none is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised \\(gptq\\)"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, found None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
        ({"vocab_size": "100"}, "vocab_size must be a positive integer, found '100'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"num_key_value_heads": 3}, "8 attention heads cannot share 3 key/value heads"),
        ({"torch_dtype": "float64"}, "dtype 'float64' is not supported"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be an integer or a list"),
    ],
)
def test_what_cannot_be_honoured_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_architecture({**LLAMA, **changes})


@pytest.mark.parametrize("name", [n for n in SUPPORTED if n != "OPTForCausalLM"])
def test_every_decoder_parses(name: str) -> None:
    assert parse_architecture(named(name)).name == name
