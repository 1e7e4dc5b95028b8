"""The types of our columns. Told them, `datasets` does not look at each number of a list to find out."""

from typing import Any

from datasets import List, Value

COLUMN_TYPES: dict[str, Any] = {
    "id": Value("string"),
    "references": List(Value("string")),
    "truncated": Value("bool"),
    **dict.fromkeys(("document_id", "raw_text_chunks"), Value("string")),
    **dict.fromkeys(("length", "source_tokens", "scored_bytes"), Value("int64")),
    **dict.fromkeys(("chunk_index", "chunk_count", "chunk_start", "chunk_end", "dropped_tokens"), Value("int64")),
    **dict.fromkeys(("graph_chunks", "graph_readers", "graph_edges"), Value("int64")),
    "token_offsets": List(List(Value("int64"))),
    "chunk_weights": List(List(Value("float32"))),
    **dict.fromkeys(
        (
            *("input_ids", "attention_mask", "labels", "position_ids", "prompt_ids", "memory_ids"),
            *("token_starts", "chunk_ids"),
        ),
        List(Value("int64")),
    ),
}
