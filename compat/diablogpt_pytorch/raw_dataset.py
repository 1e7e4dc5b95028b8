"""The document's data set over raw memory-mapped files."""

from pathlib import Path

from graft.retrieval.corpus.original_files import OriginalDataset, OriginalPaths


class DIABLOGPTDataset(OriginalDataset):
    """Rows (t + 1,) and neighbours (t / m, n, 2 m) from raw files; see `OriginalDataset`.

    The files are only read; chunks that they do not have are padding.
    """

    def __init__(
        self,
        *,
        num_sequences: int,
        num_chunks: int,
        num_neighbors: int,
        chunk_size: int,
        seq_len: int,
        chunk_memmap_path: str | Path,
        chunk_nn_memmap_path: str | Path,
        seq_memmap_path: str | Path,
        eos_id: int = 102,
        pad_id: int = 0,
        add_continuations: bool = True,
    ) -> None:
        paths = OriginalPaths(Path(chunk_memmap_path), Path(chunk_nn_memmap_path), Path(seq_memmap_path))
        super().__init__(
            paths,
            chunk_size,
            seq_len,
            num_neighbors,
            num_sequences=num_sequences,
            num_chunks=num_chunks,
            continues=add_continuations,
            eos_id=eos_id,
            pad_id=pad_id,
        )


DIABLOGPTdataset = RETRODataset = DIABLOGPTDataset
