"""A small graph-aware Llama against a plain one with as many parameters, on real documentation: losses of both, what
the graph layers learnt, and the graphs they make of a sentence. Offline, about 5 minutes on a CPU; ends in pictures.

python examples/graph_language_model.py --run runs/graph --minutes 3

The text is docstrings of installed packages, split by source file; the tokenizer is trained from its training part.
Both models see the same rows in the same order for the same number of steps. Minutes of training on one seed show that
both learn and what one looks at; they are no comparison of architectures.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from graft import LlamaForCausalLMWithGNN, LlamaGNNConfig, pages
from graft.modeling.graph.graph_parameters import graph_parameters, plot_graph_parameters
from graft.modeling.graph.graph_recorder import GraphRecorder
from graft.trainer.documentation import package_docstrings, package_folder, without_duplicates
from graft.trainer.tokenizer_training import plot_token_lengths, train_byte_level_tokenizer
from graft.trainer.trainable_parameters import count_trainable_parameters

PACKAGES = ("peft", "accelerate", "datasets", "networkx")
VOCABULARY, LENGTH, BATCH, RATE = 2048, 128, 8, 3e-3
SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 352}
GRAPH = {"attention": "llama", "sparse": {"rank": 64, "scale_first": 0.1, "scale_last": 0.3, "dropout": 0.0}}
SENTENCE = "Returns the shortest path between two nodes of the graph, and the length of the path."


def read_texts() -> tuple[list[str], list[str]]:
    """Docstrings to train on and, of every tenth source file, to hold out."""
    docstrings = [
        docstring
        for package in PACKAGES
        if (root := package_folder(package)) is not None
        for docstring in without_duplicates(package_docstrings(root))
    ]
    modules = sorted({docstring.module for docstring in docstrings})
    held_out = set(modules[::10])
    return (
        [docstring.text for docstring in docstrings if docstring.module not in held_out],
        [docstring.text for docstring in docstrings if docstring.module in held_out],
    )


def packed(tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts one after the other, an end between two, in rows of `LENGTH` tokens."""
    ids = [token for text in tokenizer(texts)["input_ids"] for token in [*text, tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def build(tokenizer) -> dict:
    """The graph-aware model, and a plain one whose MLPs are wider by as many parameters as graph layers have."""
    common = {
        **SIZES,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 4 * LENGTH,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    aware = LlamaForCausalLMWithGNN(LlamaGNNConfig(**common, gnn_config=GRAPH))
    wanted = count_trainable_parameters(aware)[1]
    small = count_trainable_parameters(LlamaForCausalLM(LlamaConfig(**common)))[1]
    more = round((wanted - small) / (3 * SIZES["hidden_size"] * SIZES["num_hidden_layers"]))
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**{**common, "intermediate_size": SIZES["intermediate_size"] + more}))
    return {"graph-aware": aware, "plain": plain}


@torch.no_grad()
def evaluate(model, rows: torch.Tensor) -> float:
    """Mean loss per token of these rows."""
    model.eval()
    return sum(model(part, labels=part).loss.item() * len(part) for part in rows.split(BATCH)) / len(rows)


def train(models: dict, rows: torch.Tensor, held_out: torch.Tensor, minutes: float) -> dict:
    """Train all in turn on the same batches until the time is over; returns losses by name, and ms per step."""
    optimizers = {name: torch.optim.AdamW(m.parameters(), lr=RATE, weight_decay=0.01) for name, m in models.items()}
    losses = {name: {"train": [], "held out": [], "ms": []} for name in models}
    order = torch.Generator().manual_seed(0)
    started, step, checked = time.monotonic(), 0, -1
    progress = tqdm(total=round(60 * minutes), unit="s", desc="train")
    while (spent := time.monotonic() - started) < 60 * minutes:
        progress.update(min(int(spent), progress.total) - progress.n)
        share = spent / (60 * minutes)
        batch = rows[torch.randint(len(rows), (BATCH,), generator=order)]
        for name, model in models.items():
            if int(4 * share) > checked:
                losses[name]["held out"].append((step, evaluate(model, held_out[:16])))
            model.train()
            for group in optimizers[name].param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / 20) * max(0.05, 1 - share)
            begun = time.perf_counter()
            loss = model(batch, labels=batch).loss
            optimizers[name].zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            losses[name]["ms"].append(1e3 * (time.perf_counter() - begun))
            losses[name]["train"].append((step, loss.item()))
        checked = max(checked, int(4 * share))
        step += 1
    progress.close()
    for name, model in models.items():
        losses[name]["held out"].append((step, evaluate(model, held_out)))
    return losses


def draw(folder: Path, models: dict, losses: dict, tokenizer) -> Path:
    """Losses, parameters by layer, the graphs of a sentence: one page."""
    series, rows = {}, []
    for name, found in losses.items():
        width = max(1, len(found["train"]) // 40)
        parts = [found["train"][i : i + width] for i in range(0, len(found["train"]) - width + 1, width)]
        series[f"{name}, training"] = ([p[-1][0] for p in parts], [sum(x for _, x in p) / len(p) for p in parts])
        series[f"{name}, held out"] = tuple(map(list, zip(*found["held out"], strict=True)))
        last, ms = found["held out"][-1][1], sorted(found["ms"])[len(found["ms"]) // 2]
        rows.append((name, count_trainable_parameters(models[name])[1], len(found["train"]), last, math.exp(last), ms))
    plot = pages.line_plot_png(series, folder / "losses.png", "Loss per token", ("step", "nats"))
    parameters = plot_graph_parameters(graph_parameters(models["graph-aware"]), folder / "parameters.png")
    body = pages.table(rows, ("model", "parameters", "steps", "held-out loss", "perplexity", "ms per step"))
    body += pages.figure(plot, "Both models on the same batches.")
    body += pages.figure(parameters, "What the graph layers learnt: lambda (graph scale) and epsilon by layer.")
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    with torch.no_grad(), GraphRecorder(models["graph-aware"].eval()) as recorder:
        models["graph-aware"](ids)
    names = ("layer", "edges_per_row", "density", "self_loop_share", "mass_kept", "graph scale")
    body += pages.heading("The graphs of a sentence")
    body += pages.table([[row[name] for name in names] for row in recorder.statistics()], names)
    for layer in recorder.layers:
        picture = recorder.heat_map(layer, folder / f"adjacency-layer-{layer}.png", recorder.tokens(tokenizer))
        body += pages.figure(picture, f"Layer {layer}: what each token (row) reads.")
    pages.page("A graph-aware language model", body, folder / "graph_language_model.html")
    for name, *rest in rows:
        print(
            f"{name:12} {rest[0]:,} parameters, {rest[1]} steps, held-out loss {rest[2]:.4f}, {rest[4]:.0f} ms a step"
        )
    return folder / "graph_language_model.html"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/graph"))
    parser.add_argument("--minutes", type=float, default=3.0, help="of training, both models together")
    arguments = parser.parse_args(argv)
    arguments.run.mkdir(parents=True, exist_ok=True)
    texts, others = read_texts()
    tokenizer = train_byte_level_tokenizer(texts, VOCABULARY)
    plot_token_lengths(texts, tokenizer, arguments.run / "token_lengths.png")
    rows, held_out = packed(tokenizer, texts), packed(tokenizer, others)[:128]
    print(f"{rows.numel():,} tokens to train on, {held_out.numel():,} held out, {len(tokenizer)} in the vocabulary")
    models = build(tokenizer)
    losses = train(models, rows, held_out, arguments.minutes)
    (arguments.run / "losses.json").write_text(json.dumps(losses) + "\n")
    models["graph-aware"].save_pretrained(arguments.run / "model")
    tokenizer.save_pretrained(arguments.run / "model")
    print("page:", draw(arguments.run, models, losses, tokenizer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
