"""Vectors in Milvus: the same client for a file (Milvus Lite), a server and a cluster."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from .vector_engine import Metric, check_metric, check_rows, check_search, empty_answer, runs_of

BATCH_ROWS = 4096
_METRICS = {"inner_product": "IP", "l2": "L2"}


class MilvusEngine:
    """A collection of a Milvus.

    Args:
        uri: "http://host:19530" of a server, or the path of a file that ends in .db for Milvus Lite, which one process
            at a time can open.
        collection: its name.
        index: Milvus's own kind: "FLAT" is exact; "AUTOINDEX", "IVF_FLAT", "IVF_SQ8", "HNSW" are a server's.
        index_parameters, search_parameters: of that kind, such as {"nlist": 4096} and {"nprobe": 64}.
        connection: further arguments of `MilvusClient`, such as a token.

    Raises:
        ImportError: pymilvus is not installed.
    """

    def __init__(
        self,
        uri: str,
        collection: str = "graft",
        index: Literal["FLAT", "AUTOINDEX", "IVF_FLAT", "IVF_SQ8", "HNSW"] = "FLAT",
        index_parameters: dict[str, Any] | None = None,
        search_parameters: dict[str, Any] | None = None,
        **connection: Any,
    ) -> None:
        self.pymilvus = _import_pymilvus()
        self.client = self.pymilvus.MilvusClient(uri=uri, **connection)
        self.uri, self.collection, self.index = uri, collection, index
        self.index_parameters, self.search_parameters = index_parameters or {}, search_parameters or {}

    def __repr__(self) -> str:
        return f"MilvusEngine({self.uri!r}, collection {self.collection}, {self.index})"

    def create(self, dim: int, metric: Metric = "l2") -> None:
        """Begin an empty collection with its index."""
        check_metric(metric)
        self.drop()
        types = self.pymilvus.DataType
        schema = self.client.create_schema(auto_id=False)
        schema.add_field("id", types.INT64, is_primary=True)
        schema.add_field("vector", types.FLOAT_VECTOR, dim=dim)
        index = self.client.prepare_index_params()
        kind = {"index_type": self.index, "metric_type": _METRICS[metric], "params": self.index_parameters}
        index.add_index("vector", **kind)
        self.client.create_collection(self.collection, schema=schema, index_params=index, consistency_level="Strong")

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Insert in requests of a few thousand rows."""
        check_rows(ids, vectors, self._shape()[0])
        for start in range(0, len(ids), BATCH_ROWS):
            part = slice(start, start + BATCH_ROWS)
            rows = zip(ids[part].tolist(), vectors[part].astype(np.float32), strict=True)
            self.client.insert(self.collection, [{"id": number, "vector": vector} for number, vector in rows])

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See the protocol; one request for neighbouring queries that leave out the same range."""
        dim, metric = self._shape()
        check_search(queries, dim, k, exclude)
        scores, ids = empty_answer(len(queries), k, metric)
        for start, end in runs_of(exclude, len(queries)):
            if start == end:
                continue
            left_out = None if exclude is None else exclude[start]
            filtered = "" if left_out is None else f"id < {left_out[0]} or id >= {left_out[1]}"
            found = self.client.search(
                self.collection,
                data=list(np.asarray(queries[start:end], np.float32)),
                filter=filtered,
                limit=k,
                search_params={"params": self.search_parameters},
            )
            for row, hits in enumerate(found, start):
                ids[row, : len(hits)] = [hit["id"] for hit in hits]
                scores[row, : len(hits)] = [hit["distance"] for hit in hits]
        return scores, ids

    def count(self) -> int:
        """Vectors stored."""
        return int(self.client.query(self.collection, filter="", output_fields=["count(*)"])[0]["count(*)"])

    def flush(self) -> None:
        """Let the server seal what was inserted, and hold it ready."""
        self.client.flush(self.collection)
        self.client.load_collection(self.collection)

    def drop(self) -> None:
        """Drop the collection."""
        if self.client.has_collection(self.collection):
            self.client.drop_collection(self.collection)

    def close(self) -> None:
        """Hang up; a file can then be opened by another process."""
        self.client.close()

    def _shape(self) -> tuple[int, Metric]:
        fields = self.client.describe_collection(self.collection)["fields"]
        dim = next(int(field["params"]["dim"]) for field in fields if field["name"] == "vector")
        kind = self.client.describe_index(self.collection, "vector")["metric_type"]
        return dim, "inner_product" if kind == "IP" else "l2"


def _import_pymilvus() -> Any:
    try:
        import pymilvus
    except ImportError as error:
        raise ImportError("this engine needs pymilvus: pip install graft-transformers[milvus]") from error
    return pymilvus
