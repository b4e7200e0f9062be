"""What a checkpoint's config says about its model, read once and checked; imports no torch.

The decoder is described by shape and by features (bias, q/k norm, window), not by family name, so that one
body covers Llama, Mistral, Qwen2 and Qwen3. Anything the bodies cannot compute is refused here by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from ellm.worker.api.errors import ConfigError
from ellm.worker.model.rope import RopeConfig

Family = Literal["llama", "opt"]
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Shapes and features of one model. Sizes are counts of elements, never bytes."""

    name: str  # as config.json writes it, e.g. "Qwen2ForCausalLM"
    family: Family  # which body computes it
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int  # tokens that positions are defined for
    norm_eps: float
    tie_word_embeddings: bool
    dtype: str  # of the checkpoint: "float32", "bfloat16", "float16"
    eos_token_ids: tuple[int, ...]
    rope: RopeConfig | None = None  # None: learned positions
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()  # per layer: sliding window in tokens, None sees everything
    # OPT alone.
    pre_norm: bool = True  # norm before attention and MLP, and once after the last layer
    embed_dim: int = 0  # of token embeddings; projected to hidden_size where it differs

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers (not bytes) that keys and values of one token take over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


class _Fields:
    """config.json with checked reads: a missing or mistyped key is a ConfigError that names it."""

    def __init__(self, raw: Json) -> None:
        self.raw = raw

    def int_(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ConfigError(f"config.json: {key} must be a positive integer, found {value!r}", param=key)
        return value

    def float_(self, key: str, default: float) -> float:
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"config.json: {key} must be a number, found {value!r}", param=key)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"config.json: {key} must be true or false, found {value!r}", param=key)
        return value

    def require(self, key: str, allowed: tuple[object, ...], default: object) -> None:
        value = self.raw.get(key, default)
        if value not in allowed:
            raise ConfigError(f"config.json: {key} = {value!r} is not supported", param=key)


def _eos_ids(*sources: Json) -> tuple[int, ...]:
    """End-of-text ids of the first source that has any."""
    for source in sources:
        value = source.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if value is not None:
            if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
                raise ConfigError(
                    f"eos_token_id must be an integer or a list of them: {value!r}", param="eos_token_id"
                )
            return tuple(dict.fromkeys(ids))
    return ()


def _dtype(raw: Json) -> str:
    value = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    name = str(value).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"config.json: dtype {name!r} is not supported", param="dtype")
    return name


def _windows(raw: Json, num_layers: int, window: int | None) -> tuple[int | None, ...]:
    """The window of each layer, by `layer_types` where present, else from `max_window_layers` on."""
    if window is None:
        return (None,) * num_layers
    types = raw.get("layer_types")
    if types is None:
        first = int(raw.get("max_window_layers", 0))
        return tuple(window if i >= first else None for i in range(num_layers))
    known = {"sliding_attention": window, "full_attention": None}
    if len(types) != num_layers or not set(types) <= set(known):
        raise ConfigError(f"config.json: layer_types {types!r} is not supported", param="layer_types")
    return tuple(known[t] for t in types)


def _decoder(raw: Json, generation: Json) -> Architecture:
    """What Llama, Mistral, Qwen2 and Qwen3 share; features are set by the callers below."""
    fields = _Fields(raw)
    fields.require("hidden_act", ("silu", "swish"), "silu")
    hidden, heads = fields.int_("hidden_size"), fields.int_("num_attention_heads")
    head_dim = fields.int_("head_dim", hidden // heads)
    num_layers = fields.int_("num_hidden_layers")
    rope = RopeConfig.from_hf(raw, head_dim)
    return Architecture(
        name=raw["architectures"][0],
        family="llama",
        vocab_size=fields.int_("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.int_("intermediate_size"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=fields.int_("num_key_value_heads", heads),
        head_dim=head_dim,
        max_model_len=rope.max_positions(fields.int_("max_position_embeddings")),
        norm_eps=fields.float_("rms_norm_eps", 1e-6),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        dtype=_dtype(raw),
        eos_token_ids=_eos_ids(generation, raw),
        rope=rope,
        windows=(None,) * num_layers,
        embed_dim=hidden,
    )


def _llama(raw: Json, generation: Json) -> Architecture:
    fields = _Fields(raw)
    bias = fields.flag("attention_bias", False)
    return replace(
        _decoder(raw, generation), qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias", False)
    )


def _mistral(raw: Json, generation: Json) -> Architecture:
    arch = _decoder({"num_key_value_heads": 8, **raw}, generation)
    window = raw.get("sliding_window", 4096)
    layers = {k: v for k, v in raw.items() if k != "max_window_layers"}
    return replace(arch, windows=_windows(layers, arch.num_layers, window))


def _qwen_windows(raw: Json, num_layers: int) -> tuple[int | None, ...]:
    used = bool(raw.get("use_sliding_window", False))
    window = raw.get("sliding_window", 4096) if used else None
    return _windows({"max_window_layers": 28, **raw}, num_layers, window)


def _qwen2(raw: Json, generation: Json) -> Architecture:
    arch = _decoder(raw, generation)
    return replace(arch, qkv_bias=True, windows=_qwen_windows(raw, arch.num_layers))


def _qwen3(raw: Json, generation: Json) -> Architecture:
    bias = _Fields(raw).flag("attention_bias", False)
    arch = _decoder({"head_dim": 128, **raw}, generation)
    windows = _qwen_windows(raw, arch.num_layers)
    return replace(arch, qkv_bias=bias, out_bias=bias, qk_norm=True, windows=windows)


def _opt(raw: Json, generation: Json) -> Architecture:
    fields = _Fields(raw)
    fields.require("activation_function", ("relu",), "relu")
    fields.require("layer_norm_elementwise_affine", (True,), True)
    fields.require("_remove_final_layer_norm", (False,), False)
    hidden, heads = fields.int_("hidden_size"), fields.int_("num_attention_heads")
    bias = fields.flag("enable_bias", True)
    num_layers = fields.int_("num_hidden_layers")
    return Architecture(
        name=raw["architectures"][0],
        family="opt",
        vocab_size=fields.int_("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.int_("ffn_dim"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_model_len=fields.int_("max_position_embeddings"),
        norm_eps=1e-5,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        dtype=_dtype(raw),
        eos_token_ids=_eos_ids(generation, raw),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        windows=(None,) * num_layers,
        pre_norm=fields.flag("do_layer_norm_before", True),
        embed_dim=fields.int_("word_embed_proj_dim", hidden),
    )


_READERS = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "OPTForCausalLM": _opt,
}
SUPPORTED = tuple(_READERS)


def parse_architecture(config: Json, generation: Json | None = None) -> Architecture:
    """The architecture of a parsed config.json (and generation_config.json, which has the end-of-text ids).

    Raises ConfigError naming the architecture, the quantisation or the key that cannot be honoured.
    """
    names = config.get("architectures") or []
    if len(names) != 1 or names[0] not in _READERS:
        found = ", ".join(map(str, names)) or "none"
        raise ConfigError(
            f"architecture {found} is not supported; supported are {', '.join(SUPPORTED)}",
            param="architectures",
        )
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise ConfigError(
            f"the checkpoint is quantised ({method}); only plain float weights are supported",
            param="quantization_config",
        )
    arch = _READERS[names[0]](config, generation or {})
    _check_heads(arch)
    return arch


def _check_heads(arch: Architecture) -> None:
    if arch.num_heads % arch.num_kv_heads:
        raise ConfigError(
            f"config.json: {arch.num_heads} attention heads cannot share {arch.num_kv_heads} key/value heads",
            param="num_key_value_heads",
        )
    if arch.family == "opt" and arch.head_dim * arch.num_heads != arch.hidden_size:
        raise ConfigError(
            f"config.json: hidden_size {arch.hidden_size} is no multiple of {arch.num_heads} heads",
            param="hidden_size",
        )
    if any(w is not None and (isinstance(w, bool) or not isinstance(w, int) or w <= 0) for w in arch.windows):
        raise ConfigError("config.json: sliding_window must be a positive integer", param="sliding_window")
