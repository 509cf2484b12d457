"""Targets of a cache by the words of ``SPEC.md`` alone: TensorStore, JSON and numpy, nothing of ``cache_spec``.

In: a cache's folder. Out: what §9 says of it: dense distributions, and the arrays as any Zarr v3 reader gives them.

Legend of axes: N blocks, T tokens, K kept, M temperatures, C prototypes, V vocabulary, R draws, J points, W windows,
D teacher width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

Array = np.ndarray[Any, np.dtype[Any]]


class SpecifiedCache:
    """A cache, as §3 to §9 describe it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
        self.encoding: dict[str, Any] = self.manifest["encoding"]
        self.temperatures: list[float] = self.manifest["temperatures"]
        self.vocab_size: int = self.manifest["teacher"]["vocab_size"]

    def array(self, name: str) -> Array:
        """§4 and §5: an array or a table."""
        kvstore = {"driver": "file", "path": str(self.folder / name)}
        opened = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
        return np.asarray(opened.read().result())

    def probabilities(self, at: int) -> tuple[Array, Array | None]:
        """p at the temperature of index ``at``, float64 [N, T, V]; and of ``topk`` the mass m that it leaves out (H-2).

        Entries are those of the target arrays: with ``masking``, Q-4 says which positions they describe.
        """
        name = self.encoding["name"]
        if name == "hidden":
            return self._of_hidden(self.temperatures[at]), None
        if name in ("sampled", "sparsified"):
            return self._of_points(at), None
        return self._of_head(at)

    def _of_hidden(self, temperature: float) -> Array:
        """X-1"""
        states_NTD = self.array("last_hidden").astype(np.float64)
        if self.encoding["dtype"] == "int8":
            states_NTD *= self.array("last_hidden_scale").astype(np.float64)[..., None]
        logits_NTV = states_NTD @ self.array("output_head").astype(np.float64).T
        if self.encoding["bias"]:
            logits_NTV += self.array("output_bias")
        return softmax(logits_NTV / temperature)

    def _of_points(self, at: int) -> Array:
        """C-1, K-1"""
        if self.encoding["name"] == "sampled":
            ids_NJT = self.array("draw_ids")[:, at]
            values_NJT = self.array("draw_counts")[:, at] / self.encoding["draws"]
        else:
            ids_NJT = self.array("kept_ids")[:, at]
            levels = self.encoding["levels"] - np.cumsum(self.array("kept_gaps")[:, at].astype(np.int64), axis=1)
            values_NJT = levels.astype(np.float64) ** 2
            values_NJT /= values_NJT.sum(1, keepdims=True)
        return self._spread(ids_NJT.swapaxes(1, 2), values_NJT.swapaxes(1, 2))

    def _of_head(self, at: int) -> tuple[Array, Array | None]:
        """H-1 to H-3, P-1 to P-5"""
        temperature, levels = self.temperatures[at], self.encoding["levels"]
        r_NKT = levels - np.cumsum(self.array("head_gaps").astype(np.int64), axis=1)
        lp_NTK = 2 * np.log(np.maximum(r_NKT, 2.0**-20) / levels).swapaxes(1, 2)
        codes_NT = self.array("tail_log_odds")[:, at]
        m_NT = 1 / (1 + np.exp(-codes_NT * float(self.encoding["odds_step_nats"])))
        m_NT[codes_NT == -32_768] = 0
        head_NTK = (1 - m_NT)[..., None] * softmax(lp_NTK / temperature)
        if self.encoding["name"] == "topk":
            return self._spread(self.array("head_ids"), head_NTK), m_NT
        values_MCV, rows_NT = self.array("prototypes"), self.array("tail_prototype").astype(int)
        order_CV = np.argsort(values_MCV[0], axis=1, kind="stable")
        places_NTK = self.array("head_ranks").astype(int)
        ids_NTK = np.take_along_axis(order_CV[rows_NT], places_NTK, axis=-1)
        u_NTV = np.exp(-values_MCV[at].astype(np.float64) / 64)[rows_NT]
        np.put_along_axis(u_NTV, ids_NTK, 0, axis=-1)
        p_NTV = self._spread(ids_NTK, head_NTK) + m_NT[..., None] * u_NTV / u_NTV.sum(-1, keepdims=True)
        draws = self.encoding["residual_draws"]
        if draws:
            masses_NT = self.array("residual_log_mass")[:, at]
            g_NT = np.where(masses_NT == -32_768, 0, np.exp(masses_NT / 8))
            places_NTR = self.array("residual_ranks")[:, at].astype(int).swapaxes(1, 2)
            drawn_NTR = np.take_along_axis(order_CV[rows_NT], places_NTR, axis=-1)
            signs_R = np.where(np.arange(draws) < draws // 2, 1, -1)
            p_NTV += self._spread(drawn_NTR, g_NT[..., None] / draws * signs_R)
        return p_NTV, None

    def hidden(self) -> Array | None:
        """V-6: pooled states, float64 [N, W, D]."""
        if self.manifest["hidden"] is None:
            return None
        states_NWD = self.array("hidden").astype(np.float64)
        if self.manifest["hidden"]["dtype"] == "int8":
            states_NWD *= self.array("hidden_scale").astype(np.float64)[:, None]
        return states_NWD

    def kept_positions(self) -> list[list[int]]:
        """Q-4: the positions of each block that entries of the target arrays describe, or would: all real ones."""
        lengths_N = self.array("block_lengths")
        masking = self.manifest.get("masking")
        if masking is None or masking["positions"] == "all":
            return [list(range(length)) for length in lengths_N.tolist()]
        return [np.flatnonzero(row_T).tolist() for row_T in self.array("selected")]

    def _spread(self, ids: Array, values: Array) -> Array:
        out = np.zeros((*ids.shape[:2], self.vocab_size))
        blocks, tokens = np.indices(ids.shape[:2])
        np.add.at(out, (blocks[..., None], tokens[..., None], ids.astype(int)), values)
        return out


def softmax(values: Array) -> Array:
    powers: Array = np.exp(values - values.max(-1, keepdims=True))
    result: Array = powers / powers.sum(-1, keepdims=True)
    return result
