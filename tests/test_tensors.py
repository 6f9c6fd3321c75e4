"""Every source of tensors lists all of them, reads each alone, and refuses what is damaged or hostile."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from groundstate.errors import DataError, GroundstateError, UsageError
from groundstate.tensors import natural_key, open_tensors


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def entries(source: Any) -> dict[str, Any]:
    return {e.name: e for e in open_tensors(source).entries}


def write(path: Path, head: Any, body: bytes = b"") -> Path:
    """Writes a safetensors file with any header, right or wrong."""
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + body)
    return path


def one(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def test_safetensors_tensors_are_bytewise_those_that_were_saved(tmp_path: Path) -> None:
    g = generator(1)
    tensors = {f"t{i}.weight": (torch.randn(3, 5, generator=g) * 3).to(d) for i, d in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = entries(tmp_path / "model.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        read = found[name].read()
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_names_sort_as_numbers() -> None:
    assert sorted(["l.10.w", "l.2.w", "l.1.w", "a"], key=natural_key) == ["a", "l.1.w", "l.2.w", "l.10.w"]


def test_dtype_that_torch_lacks_is_listed_and_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"x": one("F4", (4,), (0, 2)), "y": one("F32", (2,), (2, 10))}, bytes(10))
    found = entries(path)
    assert "F4" in found["x"].reason
    assert found["x"].read is None
    assert torch.equal(found["y"].read(), torch.zeros(2))


@pytest.mark.parametrize(
    ("head", "body", "words"),
    [
        (b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}',
         8, "comes twice"),
        (b'{"x":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', 8, "comes twice"),
        ({"x": one()}, 7, "shorter"),
        ({"x": one()}, 9, "longer"),
        ({"x": one(shape=(3,))}, 8, "takes 12"),
        ({"x": one(shape=(-2,))}, 8, "shape"),
        ({"x": one(shape=(True,), offsets=(0, 4))}, 4, "shape"),
        ({"x": one(shape=(1,) * 65, offsets=(0, 4))}, 4, "shape"),
        ({"x": one(offsets=(8, 0))}, 8, "offsets"),
        ({"x": one(offsets=(4, 12))}, 12, "hole"),
        ({"x": one(), "y": one(offsets=(4, 12))}, 12, "overlaps"),
        ({"x": one(shape=(2**62, 2**62), offsets=(0, 8))}, 8, "takes"),
        ({"x": {"dtype": "F32"}}, 0, "entry"),
        ({"x": one(dtype=7)}, 8, "dtype"),  # pyright: ignore[reportArgumentType]
        ({"__metadata__": {"a": 1}, "x": one()}, 8, "__metadata__"),
        (b"[]", 0, "not a JSON object"),
        (b"\xff\xfe", 0, "cannot be read"),
        (b"[" * 100_000, 0, "cannot be read"),
        ({}, 0, "no tensor"),
    ],
)  # fmt: skip
def test_inconsistent_header_is_refused_in_one_line(tmp_path: Path, head: Any, body: int, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        open_tensors(write(tmp_path / "bad.safetensors", head, bytes(body)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "raw", [b"", b"1234", (2**62).to_bytes(8, "little") + b"{}", (10**8 + 1).to_bytes(8, "little")]
)
def test_file_without_a_possible_header_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "bad.safetensors").write_bytes(raw)
    with pytest.raises(DataError):
        open_tensors(tmp_path / "bad.safetensors")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.randn(8, 8, generator=generator(2)), "b.weight": torch.ones(3)}, path)
    whole = path.read_bytes()
    for k in range(64):
        path.write_bytes(whole[: len(whole) * k // 64])
        with pytest.raises(DataError):
            open_tensors(path)


def test_random_damage_to_the_header_gives_tensors_or_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.zeros(4, 4), "b": torch.ones(3)}, path)
    whole = path.read_bytes()
    draw = random.Random(3)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged) - 76)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        message = ""
        try:
            for entry in open_tensors(path).entries:
                if entry.read is not None:
                    entry.read()
        except GroundstateError as error:
            message = str(error)
        assert len(message.splitlines()) <= 1


def test_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.zeros(64, 64)}, path)
    entry = entries(path)["a.weight"]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"ended inside tensor 'a\.weight'"):
        entry.read()


def test_name_is_never_a_path(tmp_path: Path) -> None:
    name = "../../etc/passwd"
    save_file({name: torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert torch.equal(entries(tmp_path / "model.safetensors")[name].read(), torch.ones(2, 2))


def test_names_left_out_by_save_model_are_aliases(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    save_model(model, str(tmp_path / "model.safetensors"))
    found = entries(tmp_path / "model.safetensors")
    assert found["b.weight"].alias_of == "a.weight"
    assert found["b.weight"].shape == (3, 3)


# Folders


def shards(folder: Path) -> dict[str, torch.Tensor]:
    g = generator(4)
    tensors = {f"layer.{i}.weight": torch.randn(4, 4, generator=g) for i in range(4)}
    names = list(tensors)
    files = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    for file, held in files.items():
        save_file({n: tensors[n] for n in held}, folder / file)
    index = {"metadata": {}, "weight_map": {n: f for f, held in files.items() for n in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def change_index(folder: Path, **weight_map: Any) -> None:
    path = folder / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    document["weight_map"] |= {f"layer.{k[1:]}.weight": v for k, v in weight_map.items()}
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("index", [True, False])
def test_folder_of_shards(tmp_path: Path, index: bool) -> None:
    tensors = shards(tmp_path)
    if not index:
        (tmp_path / "model.safetensors.index.json").unlink()
    found = entries(tmp_path)
    assert list(found) == list(tensors)
    assert all(torch.equal(found[n].read(), t) for n, t in tensors.items())


def test_file_that_the_index_does_not_name_is_noted(tmp_path: Path) -> None:
    shards(tmp_path)
    save_file({"other": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    found = open_tensors(tmp_path)
    assert len(found.entries) == 4
    assert "consolidated.safetensors" in found.notes[0]


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", ".hidden", 7])
def test_index_entry_that_is_not_a_plain_name(tmp_path: Path, name: Any) -> None:
    shards(tmp_path)
    change_index(tmp_path, l0=name)
    with pytest.raises(DataError, match="plain name"):
        open_tensors(tmp_path)


def test_index_entry_that_links_out_of_the_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "model", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    shards(inside)
    save_file({"layer.0.weight": torch.ones(2, 2)}, outside / "x.safetensors")
    (inside / "link.safetensors").symlink_to(outside / "x.safetensors")
    change_index(inside, l0="link.safetensors")
    with pytest.raises(DataError, match="link out of its folder"):
        open_tensors(inside)


def test_download_cache_with_links_to_its_blobs_is_read(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    tensors = shards(snapshot)
    for k, file in enumerate(sorted(snapshot.glob("*.safetensors"))):
        os.replace(file, blobs / f"blob{k}")
        file.symlink_to(blobs / f"blob{k}")
    found = entries(snapshot)
    assert all(torch.equal(found[n].read(), t) for n, t in tensors.items())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not an index"),
        ("[]", "not an index"),
        ('{"weight_map": {}}', "no file"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "not in"),
        ('{"weight_map": {"nowhere": "model-1.safetensors"}}', "does not hold"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "comes twice"),
    ],
)
def test_broken_index(tmp_path: Path, text: str, words: str) -> None:
    shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DataError, match=words):
        open_tensors(tmp_path)


def test_two_files_with_one_name(tmp_path: Path) -> None:
    for file in "ab":
        save_file({"fc.weight": torch.ones(2, 2)}, tmp_path / f"{file}.safetensors")
    with pytest.raises(DataError, match=r"is in a\.safetensors and in b\.safetensors"):
        open_tensors(tmp_path)


def test_run_folder_gives_its_newest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(DataError, match="no checkpoint"):
        open_tensors(tmp_path)
    for step in (9, 100, 20):
        folder = tmp_path / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        save_file({"0.weight": torch.full((2, 2), float(step))}, folder / "weights.safetensors")
        save_file({"0.weight.momentum": torch.ones(2)}, folder / "optimizer.safetensors")
    (tmp_path / "checkpoints" / "step-200.tmp").mkdir()
    found = open_tensors(tmp_path)
    assert [e.name for e in found.entries] == ["0.weight"]
    assert found.entries[0].read is not None
    assert float(found.entries[0].read()[0, 0]) == 100.0
    assert "step-100" in found.notes[0]


# Pickles


def test_pt_file_lists_tensors_and_says_what_the_rest_is(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    document = {"state_dict": model.state_dict(), "epoch": 3, "optimizer": optimizer.state_dict()}
    torch.save(document, tmp_path / "run.pt")
    found = entries(tmp_path / "run.pt")
    assert torch.equal(found["state_dict.0.weight"].read(), model.state_dict()["0.weight"])
    assert found["epoch"].reason == "not a tensor (int)"
    moments = [e for n, e in found.items() if n.startswith("optimizer") and e.dtype]
    assert moments
    assert all(e.reason == "state of an optimizer (by name)" for e in moments)


def test_pt_file_in_the_old_format_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, 2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(entries(tmp_path / "old.pth")["a"].read(), torch.ones(2, 2))


class Hostile:
    """Would make a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("plain", [True, False])
def test_pickle_payload_is_refused_and_not_run(tmp_path: Path, plain: bool) -> None:
    target, path = tmp_path / "executed", tmp_path / "model.pt"
    if plain:
        path.write_bytes(pickle.dumps(Hostile(target)))
    else:
        torch.save({"weight": torch.ones(2), "x": Hostile(target)}, path)
    with pytest.raises(DataError, match="safetensors") as caught:
        open_tensors(path)
    assert not target.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"no pickle at all", b"PK\x03\x04" + bytes(100)])
def test_damaged_pt_file(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "model.pt").write_bytes(raw)
    with pytest.raises(DataError):
        open_tensors(tmp_path / "model.pt")


def test_truncated_pt_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.ones(64, 64)}, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError):
        open_tensors(path)


def test_pt_file_without_a_tensor(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "model.pt")
    with pytest.raises(DataError, match="no tensor"):
        open_tensors(tmp_path / "model.pt")


# Modules and state dicts


def test_module_lists_every_parameter_and_buffer_with_ties_as_aliases() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 4))
    model[1].weight = model[0].weight
    model.append(model[3])
    found = entries(model)
    assert found["1.weight"].alias_of == "0.weight"
    assert found["4.weight"].alias_of == "3.weight"
    assert set(found) == set(model.state_dict())
    assert found["2.running_mean"].reason == "buffer (not trained)"


def test_state_dict_with_ties_and_strangers() -> None:
    w = torch.randn(3, 3, generator=generator(5))
    found = entries({"a": w, "b": w, "transposed": w.T, "text": "hello", "none": None, "list": [1, 2]})
    assert found["b"].alias_of == "a"
    assert found["transposed"].alias_of is None
    assert [found[n].reason for n in ("text", "none", "list")] == [
        f"not a tensor ({t})" for t in ("str", "NoneType", "list")
    ]


def test_meta_lazy_and_sparse_tensors_say_why_they_are_not_read() -> None:
    model = nn.ModuleDict({"lazy": nn.LazyLinear(3), "meta": nn.Linear(2, 2, device="meta")})
    found = entries(model)
    assert "lazy" in found["lazy.weight"].reason
    assert "meta" in found["meta.weight"].reason
    assert "sparse" in entries({"s": torch.eye(2).to_sparse()})["s"].reason


def test_parametrized_weight_is_read_as_it_acts_and_measuring_does_not_move_it() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = entries(model)
    assert found["0.parametrizations.weight.original"].reason == "behind a parametrization"
    acting = found["0.weight"].read()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model[0].parametrizations.weight.training  # pyright: ignore[reportAttributeAccessIssue]
    acts = model.eval()[0].weight
    assert isinstance(acts, torch.Tensor)
    assert torch.equal(acting, acts)


# What cannot be a source


def test_sources_that_do_not_exist_or_are_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_tensors(tmp_path / "gone.safetensors")
    with pytest.raises(DataError, match=r"no \.safetensors file"):
        open_tensors(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"'\.onnx'"):
        open_tensors(tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="got int"):
        open_tensors(3)  # pyright: ignore[reportArgumentType]


def test_endless_nesting_is_refused() -> None:
    tree: dict[str, Any] = {"x": torch.ones(1)}
    for _ in range(50):
        tree = {"x": tree}
    with pytest.raises(DataError, match="nested"):
        open_tensors(tree)
