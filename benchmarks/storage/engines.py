"""Every engine of the storage benchmark: a function that writes a set, and one that opens it and reads batches.

In: a set of ``content``. Out: files, and for any list of blocks the model's arrays as numpy: ``input_ids``
[B, T], ``head_ids`` and ``logprobs`` [B, T, K], ``tail_log_odds`` [B, T] at the first temperature. Each engine has the
best settings that its users could be expected to find; libraries are imported where they are used, since no
environment holds them all.
"""

from __future__ import annotations

import importlib.machinery
import itertools
import json
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.storage.content import MODEL_ARRAYS, VOCAB_SIZE, Array, Sizes, Source

Batch = dict[str, Array]
Read = Callable[[Sequence[int]], Batch]


class Engine(NamedTuple):
    """One way to keep a set."""

    modules: tuple[str, ...]
    """What must be installed."""
    write: Callable[[Source, Path], None]
    open: Callable[[Path, Sizes], Read]
    multiply: Callable[[Path, Sizes, int], None] | None = None
    """Make the set of one shard in a folder look like one of many equal shards, to time opening it."""
    open_many: Callable[[Path, Sizes], Read] | None = None
    """How a user opens many shards, where that is not ``open``."""
    files_of: str | None = None
    """Reads the files of another engine, not its own."""


def kdpipe_manifest(sizes: Sizes) -> Any:
    """The manifest of a made-up cache with the set's sizes."""
    from cache_spec.encodings.topk import TopK
    from cache_spec.manifest import (
        BlocksInfo,
        ComputeInfo,
        CorpusInfo,
        Manifest,
        SourceInfo,
        TeacherInfo,
        TokenizerInfo,
    )

    return Manifest(
        teacher=TeacherInfo(
            name="benchmark",
            revision=None,
            model_type="llama",
            weights_sha256="0" * 64,
            vocab_size=VOCAB_SIZE,
            padded_vocab_size=VOCAB_SIZE,
            hidden_size=64,
            num_layers=1,
            num_parameters=1,
            max_positions=None,
        ),
        tokenizer=TokenizerInfo(sha256="0" * 64, eos_token_id=0),
        corpus=CorpusInfo(
            sources=(SourceInfo(name="benchmark", num_bytes=0, sha256="0" * 64),),
            text_field="text",
            num_documents=1,
            num_tokens=sizes.num_tokens,
            tokens_sha256="0" * 64,
        ),
        blocks=BlocksInfo(
            num_blocks=sizes.num_blocks,
            block_tokens=sizes.block_tokens,
            shard_blocks=sizes.shard_blocks,
            last_block="drop",
            limit_tokens=None,
        ),
        encoding=TopK(k=sizes.k, levels=sizes.levels, odds_step_nats=1 / 64),
        temperatures=sizes.temperatures,
        hidden=None,
        compute=ComputeInfo(device_type="cpu", dtype="float32", batch_blocks=1),
        tables={},
        files={},
        provenance={},
    )


def kdpipe_rows(source: Source, first: int, count: int) -> Batch:
    """Every array of a cache for some blocks."""
    tokens = np.full(count, source.sizes.block_tokens, np.uint32)
    return {
        "input_ids": source.rows("input_ids", first, count),
        "head_ids": source.rows("head_ids", first, count),
        "head_gaps": source.rows("head_gaps", first, count),
        "tail_log_odds": source.rows("odds_codes", first, count),
        "block_lengths": tokens,
        "block_loss": np.zeros(count, np.float32),
        "block_entropy": np.zeros(count, np.float32),
    }


def write_kdpipe(source: Source, folder: Path) -> None:
    """Shards and their receipts as a capture commits them, synced to disk and read back."""
    from cache_spec.commit import commit_shard, create_cache
    from cache_spec.receipts import write_seal

    manifest = create_cache(folder, kdpipe_manifest(source.sizes))
    for shard, first, count in source.shards():
        commit_shard(folder, manifest, shard, kdpipe_rows(source, first, count))
    write_seal(folder, manifest)


def open_kdpipe(folder: Path, sizes: Sizes) -> Read:
    """The reader that training uses."""
    from cache_spec.reader import CacheReader

    reader = CacheReader.open(folder)

    def read(blocks: Sequence[int]) -> Batch:
        batch = reader.batch(blocks, sizes.temperatures[0])
        targets: Any = batch.targets
        return {
            "input_ids": batch.input_ids_BT,
            "head_ids": targets.ids_BTK,
            "logprobs": targets.logprobs_BTK,
            "tail_log_odds": targets.tail_log_odds_BT,
        }

    return read


def multiply_kdpipe(folder: Path, _sizes: Sizes, times: int) -> None:
    """Link the one shard's files under each number."""
    from benchmarks.multiply import multiply

    multiply(folder, times, link=True)


def _decoder(sizes: Sizes) -> Callable[[Batch], Batch]:
    """What makes log-probabilities of stored codes, for stock readers of the same files: the very code of kdpipe."""
    manifest = kdpipe_manifest(sizes)

    def decode(stored: Batch) -> Batch:
        targets = manifest.encoding.decode(stored, manifest.geometry, 0, "benchmark", None)
        return {
            "input_ids": stored["input_ids"],
            "head_ids": targets.ids_BTK,
            "logprobs": targets.logprobs_BTK,
            "tail_log_odds": targets.tail_log_odds_BT,
        }

    return decode


_STORED = ("input_ids", "head_ids", "head_gaps", "tail_log_odds")


def write_zarr(source: Source, folder: Path) -> None:
    """The same arrays and codecs by zarr-python, whole shards at a time; nothing is synced or read back."""
    import zarr

    from cache_spec.layout import zarr_metadata

    zarr.config.set({"threading.max_workers": 1})
    for name, data in zarr_metadata(kdpipe_manifest(source.sizes)).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    arrays = dict(zarr.open_group(folder, mode="r+").arrays())
    for _, first, count in source.shards():
        for name, rows in kdpipe_rows(source, first, count).items():
            arrays[name][first : first + count] = rows


def open_zarr(folder: Path, sizes: Sizes) -> Read:
    """The files of kdpipe by zarr-python."""
    import zarr

    zarr.config.set({"threading.max_workers": 1})
    arrays: Any = {name: zarr.open_array(folder / name, mode="r") for name in _STORED}
    decode = _decoder(sizes)

    def read(blocks: Sequence[int]) -> Batch:
        run = _run(blocks)
        if run is not None:
            return decode({name: array[run] for name, array in arrays.items()})
        at = np.asarray(blocks)
        return decode({name: array.oindex[at] for name, array in arrays.items()})

    return read


def _tensorstores(folder: Path, names: Sequence[str], **options: Any) -> dict[str, Any]:
    import tensorstore

    limits = {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}
    # Room for shard indexes, without which each batch reads them again, but not for a whole small set.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 1 << 21}, **limits})
    pending = {}
    for name in names:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / name)}}
        pending[name] = tensorstore.open(spec, context=context, open=True, **options)
    return {name: future.result() for name, future in pending.items()}


def write_tensorstore(source: Source, folder: Path) -> None:
    """The same arrays and codecs by tensorstore, whole shards at a time; it syncs each file."""
    from cache_spec.layout import zarr_metadata

    for name, data in zarr_metadata(kdpipe_manifest(source.sizes)).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    stores: dict[str, Any] = {}
    for _, first, count in source.shards():
        rows = kdpipe_rows(source, first, count)
        stores = stores or _tensorstores(folder, list(rows))
        pending = [stores[name][first : first + count].write(values) for name, values in rows.items()]
        for future in pending:
            future.result()


def open_tensorstore(folder: Path, sizes: Sizes) -> Read:
    """The files of kdpipe by tensorstore, one core, metadata and indexes checked once."""
    import tensorstore

    stores = _tensorstores(folder, _STORED, read=True, recheck_cached="open")
    decode = _decoder(sizes)

    def read(blocks: Sequence[int]) -> Batch:
        at = _run(blocks)
        key: Any = np.asarray(blocks) if at is None else at
        with tensorstore.Batch() as batch:
            pending = {name: store[key].read(batch=batch) for name, store in stores.items()}
        return decode({name: future.result() for name, future in pending.items()})

    return read


def write_parquet_tokens(source: Source, folder: Path) -> None:
    """A row is a token, its head a list: what most published caches do. A block is a row group, zstd."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    for shard, first, count in source.shards():
        columns: dict[str, Any] = {}
        for name in MODEL_ARRAYS:
            rows = source.rows(name, first, count)
            if name == "tail_log_odds":
                columns |= {f"{name}_{m}": pa.array(rows[:, m].reshape(-1)) for m in range(rows.shape[1])}
            elif rows.ndim == 3:
                offsets = pa.array(np.arange(0, rows.size + 1, rows.shape[2], dtype=np.int32))
                columns[name] = pa.ListArray.from_arrays(offsets, pa.array(rows.reshape(-1)))
            else:
                columns[name] = pa.array(rows.reshape(-1))
        pq.write_table(
            pa.table(columns),
            folder / f"{shard:05d}.parquet",
            compression="zstd",
            row_group_size=source.sizes.block_tokens,
            write_statistics=False,
        )


def open_parquet_tokens(folder: Path, sizes: Sizes) -> Read:
    """Row groups of the asked blocks."""
    return _open_parquet(folder, sizes, lambda array: array.flatten().to_numpy())


def write_parquet_blocks(source: Source, folder: Path) -> None:
    """A row is a block, its arrays fixed-size lists; no dictionaries or statistics, values split by byte, zstd."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    for shard, first, count in source.shards():
        columns: dict[str, Any] = {}
        for name in MODEL_ARRAYS:
            rows = source.rows(name, first, count)
            pieces = (
                [(f"{name}_{m}", rows[:, m]) for m in range(rows.shape[1])]
                if name == "tail_log_odds"
                else [(name, rows)]
            )
            for column, values in pieces:
                flat = np.ascontiguousarray(values).reshape(count, -1)
                columns[column] = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
        pq.write_table(
            pa.table(columns),
            folder / f"{shard:05d}.parquet",
            compression="zstd",
            row_group_size=1,
            use_dictionary=False,
            write_statistics=False,
            store_schema=True,
        )


def open_parquet_blocks(folder: Path, sizes: Sizes) -> Read:
    """Row groups of the asked blocks."""
    return _open_parquet(folder, sizes, lambda array: array.flatten().to_numpy())


def _open_parquet(folder: Path, sizes: Sizes, flat: Callable[[Any], Array]) -> Read:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_cpu_count(1)
    files: dict[int, Any] = {}
    columns = [*MODEL_ARRAYS[:-1], f"{MODEL_ARRAYS[-1]}_0"]
    shapes = [(sizes.block_tokens,), *[(sizes.block_tokens, sizes.k)] * 2, (sizes.block_tokens,)]

    def read(blocks: Sequence[int]) -> Batch:
        wanted = np.asarray(blocks)
        order = np.argsort(wanted, kind="stable")
        tables = []
        for shard, group in itertools.groupby(wanted[order].tolist(), key=lambda b: b // sizes.shard_blocks):
            if shard not in files:
                files[shard] = pq.ParquetFile(folder / f"{shard:05d}.parquet", memory_map=True)
            inside = [block - shard * sizes.shard_blocks for block in group]
            tables.append(files[shard].read_row_groups(inside, columns=columns, use_threads=False))
        table = pa.concat_tables(tables).combine_chunks()
        back = np.argsort(order, kind="stable")
        in_order = bool((back == np.arange(len(back))).all())
        out = {}
        for name, column, shape in zip(MODEL_ARRAYS, columns, shapes, strict=True):
            chunk = table.column(column).chunk(0)
            nested = hasattr(chunk, "flatten") and chunk.type.num_fields
            values = (flat(chunk) if nested else chunk.to_numpy()).reshape(len(wanted), *shape)
            out[name] = values if in_order else values[back]
        return out

    return read


def multiply_parquet(folder: Path, sizes: Sizes, times: int) -> None:
    """Link the one file under each number."""
    for shard in range(1, times):
        os.link(folder / "00000.parquet", folder / f"{shard:05d}.parquet")


def list_parquet(folder: Path, sizes: Sizes) -> Read:
    """As a user opens many files: one data set over the folder."""
    import pyarrow.dataset as ds

    files = ds.dataset(folder, format="parquet")
    return lambda blocks: {"input_ids": files.head(1).column("input_ids").to_numpy()}


def write_huggingface(source: Source, folder: Path) -> None:
    """A row is a block, its arrays sequences of fixed length, in Arrow files as ``datasets`` writes them."""
    import pyarrow as pa
    from datasets import Features, Value
    from datasets import Sequence as ListOf
    from datasets.arrow_writer import ArrowWriter

    folder.mkdir(parents=True)
    sizes = source.sizes
    lengths = {
        "input_ids": ("uint16", sizes.block_tokens),
        "head_ids": ("uint16", sizes.block_tokens * sizes.k),
        "logprobs": ("float16", sizes.block_tokens * sizes.k),
        "tail_log_odds": ("float16", sizes.block_tokens * len(sizes.temperatures)),
    }
    features = Features({name: ListOf(Value(dtype), length=length) for name, (dtype, length) in lengths.items()})
    for shard, first, count in source.shards():
        columns = {}
        for name, (_, length) in lengths.items():
            values = pa.array(source.rows(name, first, count).reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(values, length)
        with ArrowWriter(path=str(folder / f"{shard:05d}.arrow"), features=features) as writer:
            writer.write_table(pa.table(columns))
            writer.finalize()


def open_huggingface(folder: Path, sizes: Sizes) -> Read:
    """``datasets`` in numpy format over memory-mapped Arrow files; it widens uint16 and float16."""
    from datasets import Dataset, concatenate_datasets

    shards = [Dataset.from_file(str(path)) for path in sorted(folder.glob("*.arrow"))]
    rows = concatenate_datasets(shards).with_format("numpy")
    shape = (-1, sizes.block_tokens, sizes.k)

    def read(blocks: Sequence[int]) -> Batch:
        found = rows[list(blocks)]
        return {
            "input_ids": found["input_ids"],
            "head_ids": found["head_ids"].reshape(shape),
            "logprobs": found["logprobs"].reshape(shape),
            "tail_log_odds": found["tail_log_odds"].reshape(len(blocks), -1, sizes.block_tokens)[:, 0],
        }

    return read


def multiply_huggingface(folder: Path, sizes: Sizes, times: int) -> None:
    """Link the one file under each number."""
    for shard in range(1, times):
        os.link(folder / "00000.arrow", folder / f"{shard:05d}.arrow")


def write_hdf5(source: Source, folder: Path) -> None:
    """One file, a block a chunk, byte shuffle and lzf: the fastest filters that come with it."""
    import h5py

    folder.mkdir(parents=True)
    with h5py.File(folder / "set.h5", "w") as file:
        for name in MODEL_ARRAYS:
            for _, first, count in source.shards():
                rows = source.rows(name, first, count)
                if name not in file:
                    shape = (source.sizes.num_blocks, *rows.shape[1:])
                    chunks = (1, *rows.shape[1:])
                    file.create_dataset(name, shape, rows.dtype, chunks=chunks, shuffle=True, compression="lzf")
                file[name][first : first + count] = rows


def open_hdf5(folder: Path, sizes: Sizes) -> Read:
    """Chunks of the asked blocks, straight into the batch."""
    import h5py

    file = h5py.File(folder / "set.h5", "r", rdcc_nbytes=0)
    sets = {name: file[name] for name in MODEL_ARRAYS}

    def read(blocks: Sequence[int]) -> Batch:
        run, out = _run(blocks), {}
        for name, rows in sets.items():
            if run is not None:
                out[name] = rows[run]
                continue
            out[name] = np.empty((len(blocks), *rows.shape[1:]), rows.dtype)
            for at, block in enumerate(blocks):
                rows.read_direct(out[name], np.s_[block : block + 1], np.s_[at : at + 1])
        out["tail_log_odds"] = out["tail_log_odds"][:, 0]
        return out

    return read


def write_mosaic(source: Source, folder: Path) -> None:
    """MDS shards of raw arrays, a block a sample, of the size that kdpipe's shards have; no compression or hashes."""
    _without_vision()
    from streaming import MDSWriter

    sizes = source.sizes
    shapes = {
        "input_ids": ("uint16", (sizes.block_tokens,)),
        "head_ids": ("uint16", (sizes.block_tokens, sizes.k)),
        "logprobs": ("float16", (sizes.block_tokens, sizes.k)),
        "tail_log_odds": ("float16", (len(sizes.temperatures), sizes.block_tokens)),
    }
    columns = {name: f"ndarray:{dtype}:{','.join(map(str, shape))}" for name, (dtype, shape) in shapes.items()}
    # A shard also holds its own description.
    limit = sizes.shard_blocks * (sizes.block_tokens * sizes.raw_bytes_per_token + 64) + 8192
    with MDSWriter(out=str(folder), columns=columns, compression=None, hashes=None, size_limit=limit) as writer:
        for _, first, count in source.shards():
            rows = {name: source.rows(name, first, count) for name in MODEL_ARRAYS}
            for at in range(count):
                writer.write({name: values[at] for name, values in rows.items()})


def open_mosaic(folder: Path, sizes: Sizes) -> Read:
    """MDS by its local data set: random access without shared memory, its fastest."""
    _without_vision()
    from streaming import LocalDataset

    samples = LocalDataset(local=str(folder))

    def read(blocks: Sequence[int]) -> Batch:
        found = [samples[int(block)] for block in blocks]
        out = {name: np.stack([sample[name] for sample in found]) for name in MODEL_ARRAYS[:-1]}
        out["tail_log_odds"] = np.stack([sample["tail_log_odds"][0] for sample in found])
        return out

    return read


def multiply_mosaic(folder: Path, sizes: Sizes, times: int) -> None:
    """Link the one shard under each number and say so in the index."""
    index = json.loads((folder / "index.json").read_text())
    (shard,) = index["shards"]
    first = shard["raw_data"]["basename"]
    index["shards"] = []
    for number in range(times):
        name = f"shard.{number:05d}.mds"
        if name != first:
            os.link(folder / first, folder / name)
        index["shards"].append({**shard, "raw_data": {**shard["raw_data"], "basename": name}})
    (folder / "index.json").write_text(json.dumps(index))


def _without_vision() -> None:
    """MosaicML Streaming imports torchvision for data sets of pictures, and breaks where its build is not torch's."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        module: Any = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.VisionDataset, module.to_tensor = type("VisionDataset", (), {}), None
        sys.modules.setdefault(name, module)


def write_memmap(source: Source, folder: Path) -> None:
    """Raw files: the limit of what reading could be, at full size and without a check."""
    folder.mkdir(parents=True)
    for name in MODEL_ARRAYS:
        with open(folder / name, "wb") as file:
            for _, first, count in source.shards():
                file.write(source.rows(name, first, count).data)


def open_memmap(folder: Path, sizes: Sizes) -> Read:
    """Copies of the asked rows."""
    n, t, k, m = sizes.num_blocks, sizes.block_tokens, sizes.k, len(sizes.temperatures)
    shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
        "input_ids": ((n, t), np.uint16),
        "head_ids": ((n, t, k), np.uint16),
        "logprobs": ((n, t, k), np.float16),
        "tail_log_odds": ((n, m, t), np.float16),
    }
    maps = {name: np.memmap(folder / name, dtype, mode="r", shape=shape) for name, (shape, dtype) in shapes.items()}

    def read(blocks: Sequence[int]) -> Batch:
        at = np.asarray(blocks)
        out: Batch = {name: np.asarray(maps[name])[at] for name in MODEL_ARRAYS[:-1]}
        out["tail_log_odds"] = np.asarray(maps["tail_log_odds"])[at, 0]
        return out

    return read


def _run(blocks: Sequence[int]) -> slice | None:
    """The blocks as a slice, where they follow each other."""
    first, count = int(blocks[0]), len(blocks)
    return slice(first, first + count) if list(blocks) == list(range(first, first + count)) else None


ENGINES: dict[str, Engine] = {
    "kdpipe": Engine(("numcodecs", "zarr"), write_kdpipe, open_kdpipe, multiply_kdpipe),
    "zarr-python": Engine(("zarr",), write_zarr, open_zarr, multiply_kdpipe, files_of="kdpipe"),
    "tensorstore": Engine(("tensorstore",), write_tensorstore, open_tensorstore, multiply_kdpipe, files_of="kdpipe"),
    "parquet-tokens": Engine(("pyarrow",), write_parquet_tokens, open_parquet_tokens),
    "parquet-tuned": Engine(("pyarrow",), write_parquet_blocks, open_parquet_blocks, multiply_parquet, list_parquet),
    "hf-numpy": Engine(("datasets",), write_huggingface, open_huggingface, multiply_huggingface),
    "hdf5": Engine(("h5py",), write_hdf5, open_hdf5),
    "memmap": Engine((), write_memmap, open_memmap),
    "mds": Engine(("streaming",), write_mosaic, open_mosaic, multiply_mosaic),
}
