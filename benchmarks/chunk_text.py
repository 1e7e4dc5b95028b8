"""Documents tokenised and cut into chunks: `chunk_dataset`, with and without the text of chunks, and the original.

python benchmarks/chunk_text.py --model .cache/smollm2-135m-instruct --documents .cache/documentation
python benchmarks/chunk_text.py --original PATH/unlimiformer

The original's functions are read from the `run.py` of a checkout and mapped as it maps them, by the same `datasets`
and tokenizer as ours. It cuts what the tokenizer gave for a whole document, so only its first chunk begins with
special tokens; in ours each does. A tail of fewer than 10 tokens is left out by both. Megabytes of text a second.
"""

import argparse
import ast
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
from measuring import in_turn, keep, machine, ratio
from transformers import AutoTokenizer

from graft.trainer.document_chunks import chunk_dataset

CHUNK = 1024
WANTED = ("preprocess_function", "_preprocess_raw_inputs", "_preprocess_targets", "chunk_dataset_function")


def original_functions(checkout: Path) -> dict[str, Any]:
    """The functions of the original's run.py that tokenise and cut, without what else the file imports."""
    tree = ast.parse((checkout / "src" / "run.py").read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in WANTED]
    names: dict[str, Any] = {}
    exec(compile(tree, "run.py", "exec"), names)  # noqa: S102 - the user's own checkout, named on the command line
    return names


def original_chunks(rows: datasets.Dataset, tokenizer: Any, functions: dict[str, Any]) -> datasets.Dataset:
    options = {"input_column": "source", "input_prefix_column": None, "output_column": None, "prefix": ""}
    options |= {"max_source_length": None, "max_prefix_length": None, "max_target_length": None, "prefix_sep": ""}
    options |= {"padding": False, "ignore_pad_token_for_loss": True, "assign_zero_to_too_long_val_examples": False}
    options |= {"trim_very_long_strings": False, "pad_prefix": False, "tokenizer": tokenizer}
    removed = rows.column_names
    tokens = rows.map(functions["preprocess_function"], fn_kwargs=options, batched=True, remove_columns=removed)

    def cut(batch: Any) -> Any:
        read = SimpleNamespace(data={name: batch[name] for name in batch})  # as batches of its `datasets` were
        return functions["chunk_dataset_function"](read, CHUNK)

    return tokens.map(cut, batched=True)


def tokens_of(rows: datasets.Dataset) -> int:
    return sum(map(len, rows["input_ids"]))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/smollm2-135m-instruct", help="whose tokenizer is used")
    parser.add_argument("--documents", type=Path, default=Path(".cache/documentation"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--original", type=Path, help="a checkout of the original Unlimiformer")
    arguments = parser.parse_args(argv)
    about = machine()
    print(about)
    datasets.disable_caching()  # a second round would read the first one's rows
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = datasets.Dataset.from_parquet(str(arguments.documents / "documents-train.parquet"))
    rows = rows.select_columns(["text"]).rename_column("text", "source")
    megabytes = sum(len(text.encode()) for text in rows["source"]) / 1e6
    calls = {
        "chunks": lambda: chunk_dataset(rows, tokenizer, CHUNK),
        "chunks and their text": lambda: chunk_dataset(rows, tokenizer, CHUNK, capture_raw_text=True),
    }
    if arguments.original is not None:
        functions = original_functions(arguments.original)
        calls["original"] = lambda: original_chunks(rows, tokenizer, functions)
    counts = {name: tokens_of(call()) for name, call in calls.items()}
    if max(counts.values()) > 1.01 * min(counts.values()):
        raise RuntimeError(f"they do not cut the same tokens: {counts}")
    times = in_turn(calls, arguments.rounds)
    found = []
    for name, taken in times.items():
        row = {"system": name, "tokens": counts[name], "MB/s": round(megabytes / statistics.median(taken), 2)}
        if "original" in times and name != "original":
            row["original / this"] = ratio(times["original"], taken)
        found.append(row)
        print(row, flush=True)
    settings = {"chunk": CHUNK, "rounds": arguments.rounds, "MB": round(megabytes, 2), "documents": len(rows)}
    print("kept in", keep("chunk_text", settings, found, about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
