"""Banks on disk: PEFT loads what they write, and serves mixed batches as they do."""

import json

import numpy as np
import pytest
import torch
from cases import gaussian
from peft import PeftModel
from torch import nn

from lowrank_sp.adapters.forms import Product
from lowrank_sp.adapters.quantize import nf4
from lowrank_sp.adapters.serving import AdapterBank
from lowrank_sp.checkpoint import CheckpointError, read_bank, write_bank

SIZES = {"first": (16, 12), "second": (12, 16)}
NAMES = {"first": ("ann", "bob", "cid"), "second": ("cid", "ann")}


def banks(dtype=np.float32):
    found = {}
    for seed, (module, (m, n)) in enumerate(SIZES.items()):
        found[module] = AdapterBank.of(
            {
                name: Product(
                    gaussian(m, k + 2, seed=10 * seed + k, dtype=dtype),
                    gaussian(k + 2, n, seed=10 * seed + k + 5, dtype=dtype),
                    0.5 * (k + 1),
                )
                for k, name in enumerate(NAMES[module])
            }
        )
    return found


def assert_same(found, given):
    assert found.keys() == given.keys()
    for module, bank in given.items():
        assert set(found[module].names) == set(bank.names)
        for name, pair in bank.items():
            other = found[module][name]
            assert np.array_equal(other.up, pair.up)
            assert np.array_equal(other.down, pair.down)
            assert np.isclose(other.scale, pair.scale, rtol=1e-15)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_is_written_comes_back(dtype, tmp_path):
    given = banks(dtype)
    paths = write_bank(tmp_path / "out", given, base="some/model")
    assert set(paths) == {"ann", "bob", "cid"}
    assert_same(read_bank(paths), given)
    (alone,) = write_bank(tmp_path / "one", given, base="some/model", names=["bob"]).values()
    assert read_bank({"bob": alone}).keys() == {"first"}


def test_other_libraries_and_quantized_banks_are_written_as_arrays(tmp_path):
    single = banks()
    moved = {module: bank.map(torch.from_numpy) for module, bank in single.items()}
    assert_same(read_bank(write_bank(tmp_path / "torch", moved, base="b")), single)
    half = {module: bank.map(lambda a: a.bfloat16()) for module, bank in moved.items()}
    wide = {module: bank.map(lambda a: a.float().numpy()) for module, bank in half.items()}
    assert_same(read_bank(write_bank(tmp_path / "half", half, base="b")), wide)
    coarse = {module: bank.map(nf4) for module, bank in single.items()}
    dense = {module: AdapterBank.of(dict(bank.items())) for module, bank in coarse.items()}
    assert_same(read_bank(write_bank(tmp_path / "nf4", coarse, base="b")), dense)


def test_peft_serves_the_same_mixed_batch(tmp_path):
    given = banks()
    paths = write_bank(tmp_path / "out", given, base="two layers")

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 12)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    torch.manual_seed(0)
    model = Two()
    weights = {
        name: (layer.weight.clone(), layer.bias.clone()) for name, layer in model.named_children()
    }
    served = PeftModel.from_pretrained(model, str(paths["ann"]), adapter_name="ann")
    for name in ("bob", "cid"):
        served.load_adapter(str(paths[name]), adapter_name=name)
    names = ["cid", "__base__", "ann", "bob", "cid", "ann", "ann"]
    x = torch.tensor(gaussian(len(names), 12, dtype=np.float32))
    with torch.no_grad():
        expected = served.eval()(x, adapter_names=names)

        def layer(name, x):
            weight, bias = weights[name]
            bank = given[name].map(torch.from_numpy)
            known = [None if n not in bank.names else n for n in names]
            return x @ weight.T + bias + bank.apply(x, bank.ids(known))

        found = layer("second", torch.relu(layer("first", x)))
    error = torch.linalg.norm(found - expected) / torch.linalg.norm(expected)
    assert error <= 10 * torch.finfo(torch.float32).eps


def test_adapters_of_other_bases_and_shapes_are_named(tmp_path):
    given = banks()
    one = write_bank(tmp_path / "one", given, base="this")["ann"]
    two = write_bank(tmp_path / "two", given, base="that")["bob"]
    with pytest.raises(CheckpointError, match="one base, got 'this' of ann and 'that' of bob"):
        read_bank({"ann": one, "bob": two})
    config = json.loads((two / "adapter_config.json").read_text())
    (two / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "this"})
    )
    assert read_bank({"ann": one, "bob": two})["first"].names == ("ann", "bob")
    wrong = {"first": AdapterBank.of({"bob": Product(np.ones((16, 1)), np.ones((1, 13)))})}
    three = write_bank(tmp_path / "three", wrong, base="this")["bob"]
    with pytest.raises(CheckpointError, match=r"first: all factors must have one dtype"):
        read_bank({"ann": one, "bob": three})
    wrong = {module: bank.map(lambda a: a.astype(np.float32)) for module, bank in wrong.items()}
    three = write_bank(tmp_path / "four", wrong, base="this")["bob"]
    with pytest.raises(CheckpointError, match=r"first: all adapters must have one shape, .* bob,"):
        read_bank({"ann": one, "bob": three})
    with pytest.raises(CheckpointError, match="at least one adapter directory"):
        read_bank({})


def test_what_is_not_written(tmp_path):
    given = banks()
    with pytest.raises(CheckpointError, match="no adapter 'dan' in the banks"):
        write_bank(tmp_path / "out", given, base="b", names=["dan"])
    odd = {"first": AdapterBank.of({"../ann": given["first"]["ann"]})}
    with pytest.raises(CheckpointError, match="no name of a directory"):
        write_bank(tmp_path / "out", odd, base="b")
    assert not (tmp_path / "out").exists()
    write_bank(tmp_path / "out", given, base="b")
    with pytest.raises(CheckpointError):
        write_bank(tmp_path / "out", given, base="b")
