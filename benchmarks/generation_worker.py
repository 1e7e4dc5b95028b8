"""One generation in a process of its own, measured: `memory_generate.py` starts it and reads the JSON it prints.

Runs under any transformers from 4.27 on, since the original's environment starts it too; so it imports graft and the
original only where their system is asked for.
"""

import argparse
import json
import sys
import time

import torch
import transformers
from served_calls import PeakMemory

BART = {
    "vocab_size": 50265,
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
    "max_position_embeddings": 1024,
}
LLAMA = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": True,
}


class Clock(transformers.LogitsProcessor):
    """Notes the time at which each token's logits were ready."""

    def __init__(self, now) -> None:
        self.now = now
        self.ticks: list[float] = []

    def __call__(self, input_ids, scores):
        self.ticks.append(self.now())
        return scores


def build(shape: str, layers: int | None):
    """A model of real size, or of fewer layers, with random weights."""
    torch.manual_seed(0)
    if shape == "bart":
        fewer = {"encoder_layers": layers, "decoder_layers": layers} if layers else {}
        return transformers.BartForConditionalGeneration(transformers.BartConfig(**{**BART, **fewer})).eval()
    fewer = {"num_hidden_layers": layers} if layers else {}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **fewer})).eval()


def prepare_ours(model, ids, arguments):
    """Remember; return what makes the inputs of one generation."""
    from graft import UnlimiformerConfig, decode_faster, unlimiform

    kind = arguments.system.removeprefix("ours-")
    if kind.endswith("-faster"):
        decode_faster(model)
        kind = kind.removesuffix("-faster")
    dtype = "bfloat16" if kind.endswith("bf16") else None
    options = {"store": kind.removesuffix("-bf16")} if arguments.shape == "bart" else {"window": arguments.window}
    config = UnlimiformerConfig(
        keys_per_query=arguments.kept, overlap=arguments.overlap, memory_dtype=dtype, **options
    )
    unlimited = unlimiform(model, config)
    question = ids[:, -1:]
    memory = unlimited.remember(ids)
    return lambda: memory.inputs() if arguments.shape == "bart" else memory.inputs(question)


def prepare_stock(model, ids, arguments):
    """Stock generation: over the same encodings in full, over the first window only, or over the whole prompt."""
    from transformers.modeling_outputs import BaseModelOutput

    if arguments.shape == "llama":
        return lambda: {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    window = BART["max_position_embeddings"]
    with torch.no_grad():
        if arguments.system == "stock-truncated":
            states = model.get_encoder()(ids[:, :window]).last_hidden_state
        else:  # full attention over as many encodings: what they are changes no time
            states = torch.cat(
                [model.get_encoder()(part).last_hidden_state for part in ids.split(window, dim=1)], dim=1
            )
    mask = torch.ones(states.shape[:2], dtype=torch.long)
    return lambda: {"encoder_outputs": BaseModelOutput(last_hidden_state=states), "attention_mask": mask}


def prepare_original(model, ids, arguments):
    """The original, from its own checkout; it encodes inside `generate`."""
    sys.path.insert(0, f"{arguments.original}/src")
    from unlimiformer import Unlimiformer

    flat = arguments.system == "original-flat"
    Unlimiformer.convert_model(
        model, layer_begin=0, chunk_overlap=arguments.overlap, use_datastore=flat, flat_index=flat, tokenizer=None
    )
    model.eval()
    return lambda: {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", required=True)
    parser.add_argument("--shape", choices=["bart", "llama"], default="bart")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--source", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--kept", type=int, default=1024)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--original")
    arguments = parser.parse_args()
    model = build(arguments.shape, arguments.layers)
    ids = torch.randint(5, 40000, (1, arguments.source))
    prepare = {"ours": prepare_ours, "stock": prepare_stock, "original": prepare_original}
    now = time.process_time if arguments.processor_time else time.perf_counter
    clock = Clock(now)
    options = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens, "num_beams": arguments.beams}
    with PeakMemory() as memory:
        start = now()
        make_inputs = prepare[arguments.system.split("-")[0]](model, ids, arguments)
        encoded = now()
        with torch.no_grad():
            model.generate(
                **make_inputs(), **options, do_sample=False, logits_processor=transformers.LogitsProcessorList([clock])
            )
    steps = sorted(b - a for a, b in zip(clock.ticks, clock.ticks[1:], strict=False))
    first = clock.ticks[0] - encoded
    print(
        json.dumps(
            {
                # the original and a stock decoder read the document inside `generate`, before the first token
                "read s": round(
                    encoded - start + (first if arguments.system.startswith(("original", "stock")) else 0), 3
                ),
                "first token s": round(first, 3),
                "ms per token": round(1e3 * steps[len(steps) // 2], 2),
                "extra MB": round(memory.extra, 1),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
