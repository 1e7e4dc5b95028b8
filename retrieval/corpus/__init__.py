"""From text to neighbours, on disk: chunks, embeddings, neighbours and packed sequences, each stage resumable."""
