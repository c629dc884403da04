"""Valid files of every kind that hpcmlp reads, small, and files that are valid and mean harm."""

import gzip
import io
import json
import struct
import zipfile
from typing import Any

import numpy as np

ROWS = 24


def arrays(random: Any) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (24, 3) float32 and three classes (24,) int32."""
    return random.standard_normal((ROWS, 3)).astype(np.float32), np.arange(ROWS, dtype=np.int32) % 3


def table(random: Any) -> np.ndarray:
    """A compound array with a float, a whole number, a text and a label."""
    values = np.zeros(ROWS, [("a", "<f4"), ("n", "<i8"), ("t", "S4"), ("label", "<i4")])
    values["a"], values["n"] = random.standard_normal(ROWS), random.integers(-9, 9, ROWS)
    values["t"], values["label"] = random.choice([b"red", b"blue"], ROWS), np.arange(ROWS) % 2
    return values


def hdf5_image(fill: Any, **options: Any) -> bytes:
    """The bytes of an HDF5 file that `fill(file)` fills."""
    import h5py
    with h5py.File("image", "w", driver="core", backing_store=False, **options) as file:
        fill(file)
        file.flush()
        return file.id.get_file_image()


def shards(random: Any) -> list[bytes]:
    """Shards as hpcmlp writes them: plain, weighted, compressed."""
    from hpcmlp.data.shards import shard_image
    x, y = arrays(random)
    weight = np.ones(ROWS, np.float32)
    return [shard_image(x, y), shard_image(x, y, weight, {"split": "train"}), shard_image(x, y, None, {}, "gzip"),
            shard_image(x, y, None, {}, "lzf")]


def hdf5(random: Any) -> list[bytes]:
    """Files of other people, in the layouts that the reader knows."""
    x, y = arrays(random)
    split = ROWS // 2

    def named(file: Any) -> None:
        file["X"], file["Y"] = x, y

    def checked(file: Any) -> None:
        file.create_dataset("x", data=x, chunks=(5, 3), compression="gzip", shuffle=True, fletcher32=True)
        file.create_dataset("y", data=y, chunks=(7,), fletcher32=True, maxshape=(None,))

    def groups(file: Any) -> None:
        for name, rows in (("train", slice(0, split)), ("test", slice(split, ROWS))):
            file[f"{name}/x"], file[f"{name}/y"] = x[rows], y[rows]
            file[name].attrs["rows"] = split

    def columns(file: Any) -> None:
        file["a"], file["b"], file["label"] = x[:, 0], np.array([b"u", b"v"] * split), y

    def images(file: Any) -> None:
        file["images"] = (x[:, :, None] > 0).astype(np.uint8).repeat(4, 2)
        file["labels"], file["weights"] = y.reshape(-1, 1), np.ones(ROWS)

    def compound(file: Any) -> None:
        file["table"] = table(random)

    return [hdf5_image(named), hdf5_image(checked), hdf5_image(groups), hdf5_image(columns), hdf5_image(images),
            hdf5_image(compound), hdf5_image(named, libver="latest"), hdf5_image(checked, libver="latest"),
            hdf5_image(groups, libver="latest"), *shards(random)]


def hostile_hdf5(random: Any) -> bytes:
    """One valid HDF5 file that means harm: it looks elsewhere, claims too much, or has no end."""
    import h5py
    x, y = arrays(random)

    def external(file: Any) -> None:
        file.create_dataset("x", (ROWS, 3), "u1", external=[("/etc/passwd", 0, ROWS * 3)])
        file["y"] = y

    def links(file: Any) -> None:
        file["x"] = h5py.ExternalLink(str(random.choice(["/etc/passwd", "../other.h5", "other.h5", "case.h5"])), "x")
        file["y"] = h5py.SoftLink(str(random.choice(["/y", "/nowhere", "/", ".", "y/y"])))
        file["s"] = x

    def virtual(file: Any) -> None:
        layout = h5py.VirtualLayout((ROWS, 3), "f4")
        layout[:] = h5py.VirtualSource(str(random.choice(["missing.h5", "/tmp/missing.h5", ".", "case.h5"])),
                                       "x", (ROWS, 3))
        file.create_virtual_dataset("x", layout)
        file["y"] = y

    def huge(file: Any) -> None:
        rows = int(random.choice([2**31, 2**40, 2**57]))
        file.create_dataset("x", (rows, 3), "f8", chunks=(64, 3) if random.random() < 0.5 else None)
        file.create_dataset("y", (rows,), "i4", chunks=(64,))

    def bomb(file: Any) -> None:
        rows = 1 << int(random.integers(16, 22))
        file.create_dataset("x", data=np.zeros((rows, 3), "f4"), chunks=(rows, 3), compression="gzip",
                            compression_opts=9)
        file.create_dataset("y", data=np.zeros(rows, "i4"), chunks=(rows,), compression="gzip")

    def knot(file: Any) -> None:
        group = file
        for k in range(int(random.integers(1, 12))):
            group = group.create_group(f"g{k}")
            for other in range(int(random.integers(1, 12))):
                group[f"back{other}"] = file["/"] if random.random() < 0.5 else group
        file["x"], file["y"] = x, y

    def deep(file: Any) -> None:
        file["/".join(["g"] * int(random.integers(2, 300))) + "/x"] = x
        file["y"] = y

    def crowd(file: Any) -> None:
        for k in range(int(random.integers(2, 300))):
            file[f"v{k}"] = x[:, 0]

    def unwritten(file: Any) -> None:
        file.create_dataset("x", (ROWS, 3), "f4", chunks=(5, 3) if random.random() < 0.5 else None)
        file["y"] = y

    def odd_types(file: Any) -> None:
        kinds = [h5py.string_dtype(), h5py.vlen_dtype(np.int32), h5py.ref_dtype, np.dtype("V8"), np.dtype("c16"),
                 np.dtype("S5000"), np.dtype("f2"), np.dtype("u8"), np.dtype("?"), np.dtype(("f4", (3,))),
                 h5py.enum_dtype({"a": 1, "b": 2}), np.dtype("g"), np.dtype(">f8"),
                 np.dtype([("p", "f4"), ("q", [("r", "i4"), ("s", "f4", (2,))])]), np.dtype("M8[s]").str]
        for name in ("x", "y", "weight", "z"):
            kind = kinds[int(random.integers(len(kinds)))]
            shape = [(ROWS, 3), (ROWS,), (), (0,), (0, 3), (ROWS, 0), (ROWS, 1, 1, 1), (1,) * 20][
                int(random.integers(8))]
            try:
                plain = np.dtype(kind).kind != "O"
                file.create_dataset(name, shape, kind, data=np.zeros(shape, kind) if plain else None)
            except (TypeError, ValueError, OSError):
                if name not in file:
                    file[name] = x
        file.create_dataset("null", data=h5py.Empty("f4"))

    def odd_values(file: Any) -> None:
        values = x.astype(random.choice(["f2", "f4", "f8"]))
        values[tuple(random.integers(0, [ROWS, 3]))] = random.choice([np.nan, np.inf, -np.inf, 6e4])
        file["x"] = values
        labels = y.astype(random.choice(["i8", "f4", "u8", "i1"]))
        labels[int(random.integers(ROWS))] = random.choice([99, 0, 1, 100])
        file["y"] = labels if random.random() < 0.5 else labels[:int(random.integers(ROWS))]

    def odd_names(file: Any) -> None:
        for _ in range(3):
            length = int(random.integers(1, 40))
            name = bytes(random.integers(1, 256, length).astype(np.uint8)).replace(b"/", b"_").replace(b".", b"_")
            h5py.h5d.create(file.id, name, h5py.h5t.NATIVE_FLOAT, h5py.h5s.create_simple((ROWS,))).write(
                h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(x[:, 0]))

    def filtered(file: Any) -> None:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((ROWS, 3))
        plan.set_filter(int(random.choice([4, 5, 6, 307, 32001, 65535])), h5py.h5z.FLAG_OPTIONAL, (1, 2, 3))
        data = h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_FLOAT, h5py.h5s.create_simple((ROWS, 3)), plan)
        data.write_direct_chunk((0, 0), x.tobytes(), 0)
        file["y"] = y

    kinds = (external, links, virtual, huge, bomb, knot, deep, crowd, unwritten, odd_types, odd_values, odd_names,
             filtered)
    options = {"libver": "latest"} if random.random() < 0.3 else {}
    return hdf5_image(kinds[int(random.integers(len(kinds)))], **options)


def csv(random: Any) -> list[bytes]:
    """Numbers, texts, quotes, marks, other delimiters and line ends, no header, one column."""
    x, y = arrays(random)
    plain = "a,b,c,label\n" + "".join(f"{p:.4f},{q:.3e},{r:.2f},{k}\n" for (p, q, r), k in zip(x, y, strict=True))
    texts = 'name,"size, mm",when,label\r\n' + "".join(
        f'"item ""{k}""",{p:.3f},2026-11-{k % 28 + 1:02d},{"yes" if k % 2 else "no"}\r\n'
        for k, (p, _, _) in enumerate(x.tolist()))
    gaps = "a;b;label\n" + "".join(f"{p:.3f};{'NA' if k % 5 == 0 else q};{k % 3}\n"
                                   for k, (p, q, _) in enumerate(x.tolist()))
    lines = 'note\tv\tlabel\n' + "".join(f'"two\nlines"\t{p}\t{k % 2}\n' for k, (p, _, _) in enumerate(x.tolist()))
    bare = "".join(f"{p},{q},{k % 2}\n" for k, (p, q, _) in enumerate(x.tolist()))
    one = "label\n" + "".join(f"{k % 3}\n" for k in range(ROWS))
    script = "gr\u00f6\u00dfe,\u0432\u044b\u0441,label\n" + "".join(f"{k},{k * k},\u00e9{k % 2}\n" for k in range(ROWS))
    return [t.encode() for t in (plain, texts, "\ufeff" + plain, gaps, lines, bare, one, script)]


def npz(random: Any) -> list[bytes]:
    """Matrices, splits, columns, a compound array, big-endian and Fortran order, deflated."""
    x, y = arrays(random)
    out = []
    for save, values in ((np.savez, dict(x=x, y=y)), (np.savez_compressed, dict(X=x.astype(">f8"), Y=y)),
                         (np.savez, dict(x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])),
                         (np.savez, dict(features=np.asfortranarray(x), labels=np.array(["u", "v"] * (ROWS // 2)))),
                         (np.savez_compressed, dict(table=table(random))), (np.savez, dict(a=x[:, 0], label=y))):
        file = io.BytesIO()
        save(file, **values)
        out.append(file.getvalue())
    return out


def npy_header(descr: str, order: str, shape: str, version: tuple[int, int] = (1, 0)) -> bytes:
    """The header of an npy member with these texts in its places, sound or not."""
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode("latin1", "replace")
    form = "<H" if version[0] == 1 else "<I"
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack(form, len(text) % 65536) + text


def zipped(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """An archive of these members, with right checksums whatever is in them."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return file.getvalue()


def idx(random: Any) -> list[bytes]:
    """Images and labels of several types, one compressed."""
    out = []
    for code, kind in ((8, "u1"), (9, "i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")):
        for shape in ((ROWS, 4, 4), (ROWS,), (ROWS, 6)):
            values = random.integers(0, 100, shape).astype(kind)
            out.append(struct.pack(f">HBB{len(shape)}I", 0, code, len(shape), *shape) + values.tobytes())
    return [*out, gzip.compress(out[0], mtime=0)]


def parquet(random: Any) -> list[bytes]:
    """Numbers, texts, categories, nulls, several row groups and compressions."""
    import pyarrow
    import pyarrow.parquet
    x, y = arrays(random)
    columns: dict[str, Any] = {"a": x[:, 0], "n": pyarrow.array([None if k % 5 == 0 else k for k in range(ROWS)]),
                               "t": pyarrow.array(["red", "blue"] * (ROWS // 2)).dictionary_encode(),
                               "s": ["u", None] * (ROWS // 2), "flag": [True, False] * (ROWS // 2), "label": y}
    out = []
    for compression, group in (("none", 24), ("snappy", 5), ("gzip", 24), ("zstd", 24)):
        file = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.table(columns), file, compression=compression, row_group_size=group)
        out.append(file.getvalue().to_pybytes())
    return out


def toml(random: Any) -> list[bytes]:
    """Configurations of train."""
    return [b'data = "d"\nout = "r"\nhidden = [64, 32]\nlr = 1e-3\nepochs = 3\nschedule = "cosine"\nresume = true\n',
            b'# a comment\noptimizer = "sgd"\nmomentum = 0.9\nquantiles = [0.1, 0.5]\nloss = "quantile"\n'
            b'global_batch_size = 1_000\nclass_weights = "1,2"\n', b"\xef\xbb\xbfsteps = 5\n"]


def manifest(random: Any) -> bytes:
    """The dataset.json of a small data set with texts, numbers and two shards."""
    entry = {"file": "train-00000-of-00001.h5", "rows": ROWS, "bytes": 4000, "sha256": "0" * 64}
    target = {"task": "classification", "names": ["label"], "classes": ["0", "1", "2"], "shift": [], "scale": []}
    return json.dumps({
        "name": "t", "task": "classification", "num_features": 3, "x_dtype": "float32",
        "feature_names": ["a", "b=u", "b=v"],
        "splits": {"train": [entry], "test": [{**entry, "file": "test-00000-of-00001.h5"}]},
        "classes": ["0", "1", "2"], "target_names": ["label"], "preprocessing": {"version": 1,
            "form": "columns", "inputs": ["a", "b"], "levels": {"b": ["u", "v"]}, "fills": {"a": 0.5, "b": "u"},
            "shift": [0.0, 0.0, 0.0], "scale": [1.0, 1.0, 1.0], "x_dtype": "float32", "invalid_is_missing": False,
            "target": target},
        "load_shift": None, "load_scale": None, "target_shift": None, "target_scale": None,
        "class_counts": {"train": [8, 8, 8], "test": [8, 8, 8]}, "weighted": False, "format_version": 1},
        indent=1).encode()


def summary(random: Any) -> bytes:
    """The summary.json of a run."""
    return json.dumps({"status": "finished", "steps": 40, "epochs": 2.0, "ranks": 2, "nodes": 1, "sync": "shared",
                       "test": {"loss": 0.5, "accuracy": 0.9}, "val": {"loss": 0.6}, "parameters_sha256": "0" * 64,
                       "num_params": 300, "samples_per_s": 1e4, "step_s": 0.01, "wall_s": 3.0}).encode()


def metrics(random: Any) -> bytes:
    """The metrics.jsonl of a run."""
    lines: list[dict[str, Any]] = [{"kind": "event", "event": "start", "step": 0}]
    for step in range(10, 50, 10):
        lines.append({"kind": "step", "step": step, "epoch": step / 20, "loss": 1.0 / step, "lr": 1e-3,
                      "grad_norm": 1.0, "samples_per_s": 1e4, "compute_s": 0.1, "comm_s": 0.02, "input_s": 0.01})
    lines.append({"kind": "epoch", "epoch": 2, "step": 40, "train_loss": 0.5, "val": {"loss": 0.6, "accuracy": 0.8}})
    return "".join(json.dumps(line) + "\n" for line in lines).encode()
