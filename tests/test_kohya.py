"""Files with the names of kohya, LyCORIS and diffusers, against the formulas of their authors."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lowrank_sp.adapters import forms
from lowrank_sp.checkpoint import Adapter, Checkpoint, CheckpointError
from lowrank_sp.checkpoint.kohya import read_kohya, write_kohya
from lowrank_sp.operators import LinearOperator

EPS = np.finfo(np.float32).eps
#: Underscores of their own, dots before numbers: only a list of modules undoes the joining.
MODULES = ["down_blocks.0.attn_1.to_q", "down_blocks.0.attn_1.to_out.0", "mid_block.conv_in"]
SHAPE = (24, 12)


def drawn(form):
    """The same form with all trained arrays Gaussian, in float32."""
    rng = np.random.default_rng(1)
    arrays = {
        name: np.asarray(rng.standard_normal(a.shape), np.float32)
        for name, a in form.arrays().items()
        if name != "weight"
    }
    fixed = {"weight": form.weight.astype(np.float32)} if hasattr(form, "weight") else {}
    return form.replace({**arrays, **fixed})


WEIGHT = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
FORMS = {
    "lora": forms.Product.create(SHAPE, 3, alpha=5, rng=0),
    "third": forms.Product.create(SHAPE, 3, alpha=1, rng=0),
    "no single": forms.Product.create(SHAPE, 3, alpha=0.3, rng=0),
    "dora": forms.RowMagnitude.create(WEIGHT, 3, alpha=7, rng=0),
    "loha": forms.HadamardProduct.create(SHAPE, 3, alpha=2, rng=0),
    "lokr": forms.KroneckerProduct.create(SHAPE, 2, alpha=5, rng=0),
    "lokr both": forms.KroneckerProduct.create((64, 64), 2, both=True, alpha=5, rng=0),
    "lokr whole": forms.KroneckerProduct.create(SHAPE, 12, rng=0),
}


def naive(tensors):
    """The update of one layer by the tensors of its file."""
    t = {key.partition(".")[2]: a.astype(np.float64) for key, a in tensors.items()}
    if "lora_up.weight" in t:
        delta, rank = t["lora_up.weight"] @ t["lora_down.weight"], len(t["lora_down.weight"])
        if "dora_scale" in t:
            moved = WEIGHT + t["alpha"] / rank * delta
            length = np.linalg.norm(moved, axis=1, keepdims=True)
            return t["dora_scale"] * moved / length - WEIGHT
    elif "hada_w1_a" in t:
        delta = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
        rank = len(t["hada_w1_b"])
    else:
        parts, rank = [], t["alpha"]
        for i in "12":
            if f"lokr_w{i}" in t:
                parts.append(t[f"lokr_w{i}"])
            else:
                parts.append(t[f"lokr_w{i}_a"] @ t[f"lokr_w{i}_b"])
                rank = len(t[f"lokr_w{i}_b"])
        delta = np.kron(*parts)
    return t["alpha"] / rank * delta


def dense(form):
    delta = form.delta()
    return np.asarray(delta.to_dense() if isinstance(delta, LinearOperator) else delta)


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({f"{name}.weight": WEIGHT for name in MODULES}, path)
    return Checkpoint(path)


@pytest.mark.parametrize("kind", FORMS)
def test_values_survive_and_updates_are_those_of_the_names(kind, model, tmp_path):
    form = drawn(FORMS[kind])
    layers = dict.fromkeys(MODULES[:2], form)
    write_kohya(tmp_path / "adapter.safetensors", Adapter(layers), prefix="lora_unet")
    file = load_file(tmp_path / "adapter.safetensors")
    own = {
        key: a for key, a in file.items() if key.startswith("lora_unet_down_blocks_0_attn_1_to_q.")
    }
    assert len(own) * 2 == len(file)
    back = read_kohya(
        tmp_path / "adapter.safetensors", prefix="lora_unet", modules=model, model=model
    )
    assert sorted(back.layers) == sorted(layers)
    for again in back.layers.values():
        assert type(again) is type(form)
        assert again.scale == form.scale
        arrays = again.arrays()
        for name, array in form.arrays().items():
            assert np.array_equal(array, arrays[name])
        expected = naive(own)
        error = np.linalg.norm(dense(again) - expected)
        assert error <= 50 * EPS * (np.linalg.norm(expected) + np.linalg.norm(WEIGHT))


def test_lokr_of_two_matrices_has_its_scale_in_the_first(tmp_path):
    form = drawn(forms.KroneckerProduct.create(SHAPE, 12, alpha=6, rng=0))
    assert form.scale == 0.5
    write_kohya(tmp_path / "a.safetensors", Adapter({"q": form}), prefix="lycoris")
    again = read_kohya(tmp_path / "a.safetensors", prefix="lycoris", modules=["q"]).layers["q"]
    assert again.scale == 1.0
    assert np.array_equal(dense(again), dense(form))


def test_convolutions(tmp_path):
    rng = np.random.default_rng(2)
    m, n, r, k = 6, 5, 3, (3, 2)
    up, down = rng.standard_normal((m, r, 1, 1)), rng.standard_normal((r, n, *k))
    ends = {"lora_up.weight": up, "lora_down.weight": down, "alpha": np.asarray(6.0)}
    path = tmp_path / "conv.safetensors"
    save_file({f"lora_unet_mid_block_conv_in.{end}": a for end, a in ends.items()}, path)
    adapter = read_kohya(path, prefix="lora_unet", modules=MODULES)
    assert adapter.kernels == {"mid_block.conv_in": k}
    expected = 2 * np.einsum("or,rikl->oikl", up[..., 0, 0], down).reshape(m, -1)
    np.testing.assert_allclose(dense(adapter.layers["mid_block.conv_in"]), expected, rtol=1e-12)
    write_kohya(tmp_path / "again.safetensors", adapter, prefix="lora_unet")
    again = load_file(tmp_path / "again.safetensors")
    for key, array in load_file(path).items():
        assert np.array_equal(again[key], array)


def test_middle_tensors_are_multiplied_out(tmp_path):
    rng = np.random.default_rng(3)
    m, n, r, k = 6, 5, 3, (3, 2)
    up, down = rng.standard_normal((m, r, 1, 1)), rng.standard_normal((r, n, 1, 1))
    middle = rng.standard_normal((r, r, *k))
    ends = {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": middle}
    path = tmp_path / "conv.safetensors"
    save_file({f"lora_unet_mid_block_conv_in.{end}": a for end, a in ends.items()}, path)
    adapter = read_kohya(path, prefix="lora_unet", modules=MODULES)
    expected = np.einsum("oa,abkl,bi->oikl", up[..., 0, 0], middle, down[..., 0, 0])
    np.testing.assert_allclose(
        dense(adapter.layers["mid_block.conv_in"]), expected.reshape(m, -1), rtol=1e-12
    )


def test_names_and_configuration_of_diffusers(tmp_path):
    rng = np.random.default_rng(4)
    tensors = {}
    for name in MODULES[:2]:
        tensors[f"transformer.{name}.lora_A.weight"] = rng.standard_normal((4, 12))
        tensors[f"transformer.{name}.lora_B.weight"] = rng.standard_normal((24, 4))
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_q": 2}}
    said = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    save_file(tensors, tmp_path / "with.safetensors", metadata={"lora_adapter_metadata": said})
    save_file(tensors, tmp_path / "without.safetensors")
    scales = {
        file: [
            form.scale
            for form in read_kohya(
                tmp_path / f"{file}.safetensors", prefix="transformer"
            ).layers.values()
        ]
        for file in ("with", "without")
    }
    assert scales == {"with": [2.0, 0.5], "without": [1.0, 1.0]}


def files(kind):
    """Tensors of a file with something wrong, and what the error says."""
    q = "lora_unet_down_blocks_0_attn_1_to_q"
    up, down = np.ones((6, 2)), np.ones((2, 4))
    good = {f"{q}.lora_up.weight": up, f"{q}.lora_down.weight": down}
    match kind:
        case "unknown module":
            return {f"{q}x.lora_up.weight": up}, "to_qx is no module of the model"
        case "missing factor":
            return {f"{q}.lora_up.weight": up}, r"to_q must have the tensors .* got lora_up\.weight"
        case "unknown tensor":
            return good | {f"{q}.diff_b": up}, r"to_q\.diff_b is not a part of LoRA"
        case "shapes":
            wrong = good | {f"{q}.lora_up.weight": np.ones((6, 3))}
            return wrong, r"attn_1\.to_q: down of Product .* lora_up\.weight \(6, 3\)"
        case "columns":
            wrong = good | {f"{q}.dora_scale": np.ones((1, 4))}
            return wrong, "dora_scale must be one length for every output"
        case "other prefix":
            return {"lora_te_q.lora_up.weight": up}, "no key begins with lora_unet"
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    ["unknown module", "missing factor", "unknown tensor", "shapes", "columns", "other prefix"],
)
def test_bad_files_name_what_is_wrong(kind, tmp_path):
    tensors, message = files(kind)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_kohya(tmp_path / "bad.safetensors", prefix="lora_unet", modules=MODULES)


def test_names_that_cannot_be_undone(tmp_path):
    form = drawn(FORMS["lora"])
    path = tmp_path / "a.safetensors"
    write_kohya(path, Adapter({"a.b_c": form}), prefix="lora_te")
    with pytest.raises(CheckpointError, match=r"lora_te_a_b_c may be a\.b_c or a_b\.c"):
        read_kohya(path, prefix="lora_te", modules=["a.b_c", "a_b.c"])
    with pytest.raises(CheckpointError, match="lora_te_a_b_c does not say where its dots were"):
        read_kohya(path, prefix="lora_te")
    with pytest.raises(CheckpointError, match="another module is called lora_te_a_b_c"):
        write_kohya(path, Adapter({"a.b_c": form, "a_b.c": form}), prefix="lora_te")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Adapter({"q": forms.Gains.create(SHAPE, 3, rng=0)}), "Gains has no names in kohya"),
        (Adapter({"q": FORMS["lora"]}, embeddings=frozenset("q")), "no LoRA of embeddings"),
        (Adapter({"q": FORMS["loha"]}, kernels={"q": (3, 3)}), "plain LoRA only"),
    ],
)
def test_what_kohya_has_no_names_for(adapter, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        write_kohya(tmp_path / "a.safetensors", adapter, prefix="lora_unet")
