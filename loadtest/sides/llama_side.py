"""llama.cpp with several sequences in one batch, run with the interpreter of its own environment.

python llama_side.py CHECKPOINT DTYPE THREADS FILE SEQUENCES TOKENS_EACH

`llama_decode` is the engine: its Python server runs one request at a time. Weights go to FILE (GGUF) in DTYPE
unless it is there, norms in float32 as llama.cpp wants them. The KV cache has as many bytes a token as on the
other sides: float32, or llama.cpp's own 16 bits (float16; in bfloat16 prompts took a third longer and
decoding about as long). What else was tried, 8 and 32 sequences on two cores without AVX-512, and the faster
taken: no flash attention in float32 (decoding 1.5 and 1.7 times as fast, prompts a fifth slower), with it in
16 bits; a stream of its own for each sequence (in one cache for all, `kv_unified`, every row is computed
against everybody's keys and masked: prompts 1.7 times as long at 32); steps of 512 tokens (2,048: the same).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import gguf
import llama_cpp as ll
import numpy as np
from protocol import serve  # type: ignore[import-not-found]
from safetensors.numpy import load_file

BATCH = 2048  # tokens of a step
PAD = 256  # tokens that a sequence's room is a multiple of
FILE_TYPES = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}
KV_TYPES = {"float32": ll.GGML_TYPE_F32, "bfloat16": ll.GGML_TYPE_F16}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head in the order of llama.cpp's rotary embedding, which turns neighbours, not halves."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def renamed(name: str) -> str:
    """The checkpoint's name of a tensor in llama.cpp's words."""
    stem = name.removesuffix(".weight")
    if stem in TOP:
        return f"{TOP[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def convert(checkpoint: Path, dtype: str, file: Path) -> None:
    """A Llama in safetensors (float32) as GGUF; tokens go in and out by id, so it has no vocabulary."""
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rope = config.get("rope_parameters") or config
    part = file.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        if "q_proj" in name or "k_proj" in name:
            weight = paired(weight, heads if "q_proj" in name else kv_heads)
        kind = FILE_TYPES[dtype] if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(renamed(name), gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(file)


class Engine:
    """One model, `sequences` streams of `tokens_each`."""

    def __init__(self, file: Path, dtype: str, threads: int, sequences: int, tokens_each: int) -> None:
        ll.llama_backend_init()
        self._model = ll.llama_model_load_from_file(str(file).encode(), ll.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not read {file}")
        params = ll.llama_context_default_params()
        params.n_ctx = sequences * -(-tokens_each // PAD) * PAD
        params.n_batch = BATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = KV_TYPES[dtype]
        params.kv_unified = False
        if dtype == "float32":
            params.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = ll.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context of this size")
        self._vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self._model))
        self._batch = ll.llama_batch_init(BATCH, 0, 1)

    def step(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, position, sequence, whether it is asked what comes next); the most likely next
        tokens of those asked."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, asked) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, asked
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
        failed = ll.llama_decode(self._context, batch)
        if failed:
            raise RuntimeError(f"llama_decode: {failed}")
        found = []
        for i, row in enumerate(rows):
            if row[3]:
                logits = ll.llama_get_logits_ith(self._context, i)
                found.append(int(np.argmax(np.ctypeslib.as_array(logits, shape=(self._vocab,)))))
        return found

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        ll.llama_memory_clear(ll.llama_get_memory(self._context), False)
        rows = [
            (token, place, sequence, place == len(ids) - 1)
            for sequence, ids in enumerate(prompts)
            for place, token in enumerate(ids)
        ]
        last: list[int] = []
        for start in range(0, len(rows), BATCH):
            last += self.step(rows[start : start + BATCH])
        outputs = [[token] for token in last]
        for done in range(1, max_tokens):
            last = self.step(
                [(last[i], len(ids) + done - 1, i, True) for i, ids in enumerate(prompts)],
            )
            for output, token in zip(outputs, last, strict=True):
                output.append(token)
        return outputs


def main() -> None:
    checkpoint, dtype, threads, file, sequences, tokens_each = sys.argv[1:7]
    if not Path(file).exists():
        convert(Path(checkpoint), dtype, Path(file))
    engine = Engine(Path(file), dtype, int(threads), int(sequences), int(tokens_each))
    kv = "float32" if dtype == "float32" else "float16"
    serve(engine.generate, note=f"llama_decode, KV cache in {kv}, a stream for each of {sequences} sequences")


if __name__ == "__main__":
    main()
