"""Vectors in, nearest vectors out: exactly with torch, or through the kinds of faiss; saved without pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from graft.atomic_files import new_folder, read_manifest, write_manifest

from .exact_search import inner_products
from .faiss_indexes import (
    DEFAULTS,
    TRAINING_POINTS,
    choose_nlist,
    factory_string,
    import_faiss,
    new_index,
    one_faiss_thread,
    read_index,
    search_index,
)

Metric = Literal["inner_product", "l2"]
KINDS = ("exact", *DEFAULTS)
BLOCK_ROWS = 8192
SEARCH_OPTIONS = ("nprobe", "ef_search")


class Datastore:
    """A growing set of vectors, numbered from 0 or by ids of the caller's.

    Args:
        dim: of a vector.
        kind: "exact" scores every vector in torch; the others are faiss's, approximate but for "flat".
        metric: "inner_product", larger is better, or "l2", squared distance, smaller is better.
        device: where an exact store lies; the faiss kinds know the CPU only.
        parameters: of the kind, such as nlist, nprobe, code_size, ef_search.

    Raises:
        ValueError: an unknown kind, metric or parameter, or a device the kind does not know.
        ImportError: a faiss kind without faiss.
    """

    def __init__(
        self,
        dim: int,
        kind: str = "exact",
        metric: Metric = "inner_product",
        device: str | torch.device = "cpu",
        **parameters: Any,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")
        if metric not in ("inner_product", "l2"):
            raise ValueError(f'`metric` must be "inner_product" or "l2", got {metric!r}.')
        known = DEFAULTS.get(kind, {})
        if unknown := parameters.keys() - known.keys():
            raise ValueError(f"kind {kind!r} has the parameters {sorted(known)}, got {sorted(unknown)}.")
        self.device = torch.device(device)
        if kind != "exact":
            import_faiss()
            if self.device.type != "cpu":
                raise ValueError(f"`device` of kind {kind!r} must be the CPU, got {device}; kind 'exact' takes any.")
        self.dim, self.kind, self.metric = dim, kind, metric
        self.parameters: dict[str, Any] = {**known, **parameters}
        self.index: Any = None
        self._blocks: list[Tensor] = []
        self._ids = np.empty(0, dtype=np.int64)
        self._mapped_from: Path | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        options = "".join(f", {name} {value}" for name, value in self.parameters.items() if value is not None)
        return f"Datastore({len(self)} vectors of {self.dim}, {self.kind}, {self.metric}{options})"

    @property
    def nbytes(self) -> int:
        """Bytes that the stored vectors or codes take."""
        if self.kind == "exact":
            return sum(block.nbytes for block in self._blocks)
        return 0 if self.index is None else len(self) * self._bytes_each(self.index)

    def estimate(self, count: int) -> int:
        """What `nbytes` will be of `count` vectors of float32, before there are any.

        Raises:
            ValueError: as `check_trainable`.
        """
        if self.kind == "exact":
            return 4 * self.dim * count
        return count * self._bytes_each(new_index(self.check_trainable(count), self.dim, self.metric))

    def _bytes_each(self, index: Any) -> int:
        if self.kind == "hnsw":  # the vectors, and on average two links for each of the neighbours
            return 4 * self.dim + 8 * int(self.parameters["neighbours"])
        return int(index.sa_code_size())

    def train(self, vectors: Tensor, seed: int = 0) -> None:
        """Learn lists and codes from (count, dim) vectors, at most 64 per list; kinds that learn nothing return.

        Raises:
            ValueError: too few vectors, or the store holds some already.
        """
        self._check(vectors)
        if self.kind == "exact":
            return
        if len(self):
            raise ValueError(f"{self} cannot be trained again; make a new one.")
        factory = self.check_trainable(len(vectors))
        if "nlist" in self.parameters and self.parameters["nlist"] is None:
            self.parameters["nlist"] = choose_nlist(len(vectors))
        self.index = new_index(factory, self.dim, self.metric)
        if self.kind == "hnsw":
            self.index.hnsw.efConstruction = self.parameters["ef_construction"]
        if not self.index.is_trained:
            most = TRAINING_POINTS * max(self.parameters.get("nlist", 256), 256)
            chosen = np.sort(np.random.default_rng(seed).permutation(len(vectors))[:most])
            with one_faiss_thread():
                self.index.train(_array(vectors)[chosen])

    def check_trainable(self, count: int) -> str:
        """Refuse a store that `count` vectors cannot train; returns what faiss calls its index, "" if exact.

        Raises:
            ValueError: too few vectors for its lists, or a parameter that does not fit the dimension.
        """
        return "" if self.kind == "exact" else factory_string(self.kind, self.dim, count, self.parameters)

    def add(self, vectors: Tensor, ids: np.ndarray | None = None) -> None:
        """Append (count, dim) vectors; a store that must be trained is, on the first ones.

        Args:
            vectors: to add.
            ids: (count,) larger than all there are and ascending; by default the numbers go on.

        Raises:
            ValueError: a wrong shape, ids that do not ascend, or a store that is mapped.
        """
        self._check(vectors)
        if self._mapped_from is not None:
            raise ValueError(f"{self} is mapped from {self._mapped_from} and cannot grow; load it with mapped=False.")
        if ids is None:
            first = int(self._ids[-1]) + 1 if len(self) else 0
            ids = np.arange(first, first + len(vectors))
        joined = np.concatenate([self._ids, np.asarray(ids, dtype=np.int64)])
        if len(ids) != len(vectors) or (np.diff(joined) <= 0).any():
            raise ValueError(f"`ids` must be {len(vectors)} numbers that ascend beyond those stored.")
        if self.kind == "exact":
            self._blocks += [block.clone() for block in vectors.to(self.device).split(BLOCK_ROWS)]
        else:
            if self.index is None:
                self.train(vectors)
            self.index.add(_array(vectors))
        self._ids = joined

    def search(
        self, queries: Tensor, k: int, exclude: np.ndarray | None = None, **options: int
    ) -> tuple[Tensor, Tensor]:
        """The `k` best vectors of each query.

        Args:
            queries: (count, dim).
            k: at least 1.
            exclude: (count, 2) first id and end of what a query must not find.
            options: nprobe or ef_search, for this search only.

        Returns:
            scores (count, k) float32, best first, and ids (count, k) int64; where fewer are found, -1 and the worst
            score there is.
        """
        self._check(queries)
        if k < 1:
            raise ValueError(f"`k` must be at least 1, got {k}.")
        if exclude is not None and exclude.shape != (len(queries), 2):
            raise ValueError(f"`exclude` must be ({len(queries)}, 2), got {exclude.shape}.")
        ranges = np.searchsorted(self._ids, exclude) if exclude is not None else None
        if self.kind == "exact" or not len(self):
            scores, rows = self._search_exact(queries, k, ranges)
        else:
            found, places = search_index(self.index, _array(queries), k, ranges, self.search_options | options)
            scores, rows = torch.from_numpy(found), torch.from_numpy(places)
        worst = -torch.inf if self.metric == "inner_product" else torch.inf
        ids = torch.from_numpy(self._ids)[rows.cpu().clamp(min=0)] if len(self) else rows.cpu()
        missing = rows.cpu() < 0
        return scores.masked_fill(missing.to(scores.device), worst), ids.masked_fill(missing, -1).to(scores.device)

    @property
    def search_options(self) -> dict[str, int]:
        """How much of an approximate index a search reads: its nprobe or ef_search; empty for kinds with neither."""
        return {name: self.parameters[name] for name in SEARCH_OPTIONS if name in self.parameters}

    def widen(self) -> bool:
        """Let every search from now on read twice as many lists, or keep twice as many candidates in a graph.

        Returns:
            Whether that changed anything: not where all are read already, or nothing is stored.
        """
        for name, now in self.search_options.items():
            most = len(self) if name == "ef_search" else (self.parameters["nlist"] or 0)
            if now < most:
                self.parameters[name] = min(2 * now, most)
                return True
        return False

    def recall(self, queries: Tensor, k: int, vectors: Tensor) -> tuple[float, float]:
        """How much of the exact answer a search finds.

        Args:
            queries: (count, dim), best some that are not stored.
            k: results compared.
            vectors: all that was added, in order, to search exactly.

        Returns:
            recall@k, and the share of the softmax mass of the exact k that was found.
        """
        truth = Datastore(self.dim, "exact", self.metric)
        truth.add(vectors, self._ids)
        scores, expected = truth.search(queries, k)
        _, found = self.search(queries, k)
        hit = ((expected[:, :, None] == found[:, None]) & (expected >= 0)[:, :, None]).any(-1)
        weights = (scores if self.metric == "inner_product" else -scores).softmax(-1)
        mass = (weights * hit).sum(-1).mean()
        return float(hit.sum() / (expected >= 0).sum()), float(mass)

    def reconstruct(self, ids: np.ndarray) -> Tensor:
        """The stored vectors (count, dim), float32; of lossy kinds what their codes say.

        Raises:
            KeyError: an id is not stored.
        """
        rows = np.searchsorted(self._ids, ids)
        if len(ids) and (rows.max() >= len(self) or (self._ids[rows] != ids).any()):
            raise KeyError(f"{self} lacks some of the ids {ids}.")
        if self.kind == "exact":
            return torch.cat(self._blocks)[torch.from_numpy(rows).to(self.device)].float()
        if self.kind not in ("flat", "scalar", "hnsw"):
            import_faiss().extract_index_ivf(self.index).make_direct_map()
        return torch.from_numpy(np.stack([self.index.reconstruct(int(row)) for row in rows]))

    def to(self, device: str | torch.device) -> Datastore:
        """Move an exact store; returns itself."""
        device = torch.device(device)
        if self.kind != "exact" and device.type != "cpu":
            raise ValueError(f"`device` of kind {self.kind!r} must be the CPU, got {device}; kind 'exact' takes any.")
        self._blocks, self.device = [block.to(device) for block in self._blocks], device
        return self

    def save(self, folder: str | Path, replace: bool = False) -> None:
        """Write the store to a folder of its own, with sizes and SHA-256 sums."""
        with new_folder(folder, replace) as temporary:
            np.save(temporary / "ids.npy", self._ids)
            if self.kind == "exact":
                empty = torch.empty(0, self.dim)
                np.save(temporary / "vectors.npy", torch.cat(self._blocks or [empty]).cpu().numpy())
            elif self.index is not None:
                import_faiss().write_index(self.index, str(temporary / "index.faiss"))
            details = {"dim": self.dim, "kind": self.kind, "metric": self.metric, "parameters": self.parameters}
            write_manifest(temporary, {**details, "count": len(self)})

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu", mapped: bool = False) -> Datastore:
        """Read a store that `save` wrote, after checking its files; ValueError if one is damaged.

        Args:
            folder: where it lies.
            device: of an exact store.
            mapped: leave faiss's inverted lists in the file, which processes then share; such a store cannot grow.
        """
        details = read_manifest(folder)
        store = cls(details["dim"], details["kind"], details["metric"], device, **details["parameters"])
        ids = np.load(Path(folder) / "ids.npy")
        if store.kind == "exact":
            if len(ids):
                store.add(torch.from_numpy(np.load(Path(folder) / "vectors.npy")), ids)
        elif (path := Path(folder) / "index.faiss").exists():
            store.index, store._ids = read_index(path, mapped), ids
            store._mapped_from = Path(folder) if mapped else None
        return store

    def __reduce__(self) -> Any:
        """A mapped store travels to other processes as the name of its folder."""
        if self._mapped_from is None:
            return super().__reduce__()
        return Datastore.load, (self._mapped_from, "cpu", True)

    def _check(self, vectors: Tensor) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise ValueError(f"vectors must be (count, {self.dim}), got {tuple(vectors.shape)}.")

    def _search_exact(self, queries: Tensor, k: int, ranges: np.ndarray | None) -> tuple[Tensor, Tensor]:
        wide = queries.to(self.device).float()
        best = torch.full((len(wide), k), -torch.inf, device=self.device)
        rows = torch.full((len(wide), k), -1, dtype=torch.int64, device=self.device)
        limits = torch.from_numpy(ranges).to(self.device) if ranges is not None else None
        start = 0
        for block in self._blocks:
            scores = inner_products(wide, block)
            if self.metric == "l2":
                scores = 2 * scores - block.float().square().sum(1) - wide.square().sum(1, keepdim=True)
            numbers = torch.arange(start, start + len(block), device=self.device)
            if limits is not None:
                scores = scores.masked_fill((numbers >= limits[:, :1]) & (numbers < limits[:, 1:]), -torch.inf)
            joined = torch.cat([best, scores], 1)
            best, places = joined.topk(k, dim=1)
            rows = torch.cat([rows, numbers.expand(len(wide), -1)], 1).gather(1, places)
            start += len(block)
        rows = rows.masked_fill(best == -torch.inf, -1)
        return (best if self.metric == "inner_product" else (-best).clamp(min=0)), rows


def _array(vectors: Tensor) -> np.ndarray:
    return np.ascontiguousarray(vectors.detach().cpu().float().numpy())
