"""The names and shapes of the tensors that an architecture needs, as Hugging Face writes them; no torch."""

from __future__ import annotations

from ellm.worker.model.architecture import Architecture

Shapes = dict[str, tuple[int, ...]]

EMBED = "model.embed_tokens.weight"
OPT_EMBED = "model.decoder.embed_tokens.weight"
OPT_POSITION_OFFSET = 2  # the first rows of OPT's position table are never used
LM_HEAD = "lm_head.weight"


def embedding_name(arch: Architecture) -> str:
    return OPT_EMBED if arch.family == "opt" else EMBED


def expected_shapes(arch: Architecture) -> Shapes:
    """Every tensor the loader will read. A tied LM head is not listed: the embedding stands in for it."""
    shapes = _opt(arch) if arch.family == "opt" else _llama(arch)
    if not arch.tie_word_embeddings:
        shapes[LM_HEAD] = (arch.vocab_size, arch.embed_dim)
    return shapes


def _linear(shapes: Shapes, name: str, out: int, in_: int, bias: bool) -> None:
    shapes[f"{name}.weight"] = (out, in_)
    if bias:
        shapes[f"{name}.bias"] = (out,)


def _llama(arch: Architecture) -> Shapes:
    hidden, inner = arch.hidden_size, arch.intermediate_size
    q, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    shapes: Shapes = {EMBED: (arch.vocab_size, hidden), "model.norm.weight": (hidden,)}
    for i in range(arch.num_layers):
        layer = f"model.layers.{i}"
        attention = f"{layer}.self_attn"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        _linear(shapes, f"{attention}.q_proj", q, hidden, arch.qkv_bias)
        _linear(shapes, f"{attention}.k_proj", kv, hidden, arch.qkv_bias)
        _linear(shapes, f"{attention}.v_proj", kv, hidden, arch.qkv_bias)
        _linear(shapes, f"{attention}.o_proj", hidden, q, arch.out_bias)
        if arch.qk_norm:
            shapes[f"{attention}.q_norm.weight"] = (arch.head_dim,)
            shapes[f"{attention}.k_norm.weight"] = (arch.head_dim,)
        _linear(shapes, f"{layer}.mlp.gate_proj", inner, hidden, arch.mlp_bias)
        _linear(shapes, f"{layer}.mlp.up_proj", inner, hidden, arch.mlp_bias)
        _linear(shapes, f"{layer}.mlp.down_proj", hidden, inner, arch.mlp_bias)
    return shapes


def _norm(shapes: Shapes, name: str, size: int) -> None:
    shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)


def _opt(arch: Architecture) -> Shapes:
    hidden, inner, embed = arch.hidden_size, arch.intermediate_size, arch.embed_dim
    shapes: Shapes = {
        OPT_EMBED: (arch.vocab_size, embed),
        "model.decoder.embed_positions.weight": (arch.max_model_len + OPT_POSITION_OFFSET, hidden),
    }
    if embed != hidden:
        shapes["model.decoder.project_in.weight"] = (hidden, embed)
        shapes["model.decoder.project_out.weight"] = (embed, hidden)
    if arch.pre_norm:
        _norm(shapes, "model.decoder.final_layer_norm", hidden)
    for i in range(arch.num_layers):
        layer = f"model.decoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            _linear(shapes, f"{layer}.self_attn.{name}", hidden, hidden, arch.qkv_bias)
        _norm(shapes, f"{layer}.self_attn_layer_norm", hidden)
        _linear(shapes, f"{layer}.fc1", inner, hidden, arch.mlp_bias)
        _linear(shapes, f"{layer}.fc2", hidden, inner, arch.mlp_bias)
        _norm(shapes, f"{layer}.final_layer_norm", hidden)
    return shapes
