"""KIVI: counts, codes, grids and outputs of a prompt and decoding, and the quantiser alone."""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.kernels import bits as grids
from kvhive.policies.full import Full
from kvhive.stores._packed import PackedStore
from kvhive.stores._rows import Coded
from kvhive.stores._side import Side
from kvhive.stores.kivi import Kivi

from ..cases import Case
from ..playing import make_layer, require


def replay(case: Case) -> None:
    """Compare with `LlamaFlashAttention_KIVI` and its quantiser."""
    if "bits" in case.params:
        _quantiser(case)
    else:
        _layer(case)


def _quantiser(case: Case) -> None:
    """Groups of channels of one token at a time, every number of bits and size of group."""
    for bits in case.params["bits"]:
        for group in case.params["groups"]:
            recorded = {
                name: case.tensors[f"b{bits}_g{group}_{name}"]
                for name in ("x", "codes", "scale", "min", "deq")
            }
            numbers = recorded["x"].unflatten(-1, (-1, group))
            least, largest = numbers.aminmax(dim=-1)
            scale, zero = grids.grid(least, largest, bits, torch.float32).unbind(-2)
            codes = grids.rounded(numbers, scale[..., None], zero[..., None], bits)
            restored = (codes * scale[..., None] + zero[..., None]).flatten(-2)
            what = f"{bits} bits, groups of {group}"
            _same_codes(codes.flatten(-2), recorded["codes"], bits, what)
            require(torch.allclose(scale, recorded["scale"]), f"{what}: scales differ")
            require(torch.equal(zero, recorded["min"]), f"{what}: minima differ")
            span = (largest - least).max()
            apart = (restored - recorded["deq"]).abs().max()
            require(bool(apart <= 1e-6 * span), f"{what}: restored numbers differ by {apart:g}")


def _layer(case: Case) -> None:
    """A prompt in one step, then single tokens."""
    params = case.params
    half = params["dtype"] == "float16"
    dtype = torch.float16 if half else torch.float32
    query, keys, values = (case.tensors[name][None].to(dtype) for name in ("q", "k", "v"))
    kind = Kivi(
        key_bits=params["k_bits"],
        value_bits=params["v_bits"],
        group=params["group_size"],
        residual=params["residual_length"],
        sink=0,
    )
    layer = make_layer(Full(), None, store=kind)
    steps = [params["prompt"], *[1] * params["decode_steps"]]
    start = 0
    for step, fresh in enumerate(steps):
        part = slice(start, start := start + fresh)
        layer.update(keys[:, :, part], values[:, :, part])
        out = layer.attend(query[:, :, part], params["head_dim"] ** -0.5)[0, :, -1].flatten()
        apart = (out.float() - case.tensors["out"][step].float()).abs().max()
        require(bool(apart < (0.1 if half else 1e-5)), f"step {step}: outputs differ by {apart:g}")
        store = layer.store
        assert isinstance(store, PackedStore)
        counts = [start, _packed(store._keys), _packed(store._values)]
        require(
            counts == case.tensors["counts"][step].tolist(),
            f"step {step}: {counts} tokens, packed keys and values, recorded "
            f"{case.tensors['counts'][step].tolist()}",
        )
        for name, held in zip(("k", "v"), store.view(), strict=True):
            recorded = case.tensors.get(f"{name}_deq_s{step}")
            if recorded is not None:
                _near(held[0], recorded, 0.01 if half else 0.0, f"step {step}: {name}")
    assert isinstance(layer.store, PackedStore)
    _same_parts(case, layer.store, 0.01 if half else 0.0)


def _packed(side: Side) -> int:
    return sum(int(part.lengths[0]) for part in side.parts)


def _near(ours: Tensor, recorded: Tensor, share: float, what: str) -> None:
    """All but a share of the numbers within 1e-5."""
    wrong = ((ours.float() - recorded.float()).abs() > 1e-5).float().mean()
    if share:  # grids in float16: those that are a code apart are further away than rounding
        wrong = ((ours.float() - recorded.float()).abs() > 0.02).float().mean()
    require(bool(wrong <= share), f"{what}: {wrong:.2%} of the restored numbers differ")


def _same_parts(case: Case, store: PackedStore, share: float) -> None:
    """Codes and grids at the end."""
    params = case.params
    for name, side, bits in (
        ("k", store._keys, params["k_bits"]),
        ("v", store._values, params["v_bits"]),
    ):
        part = side.parts[0]
        assert isinstance(part, Coded)
        rows = part.rows
        each, grid = [], []
        for row, (start, length) in enumerate(
            zip(rows.starts.tolist(), rows.lengths.tolist(), strict=True)
        ):
            packed = rows.codes[start : start + length]
            each.append(grids.unpacked(packed, bits, rows.width))
            first, count = start, length
            if rows.runs is not None:
                first, count = int(rows.runs.starts[row]), int(rows.runs.counts[row])
            grid.append(rows.grids[first : first + count])
        codes, scales = torch.stack(each), torch.stack(grid)
        if name == "k":
            codes, scales = codes.transpose(1, 2), scales.permute(0, 3, 2, 1)
            scale, zero = scales.unbind(2)
        else:
            scale, zero = scales.unbind(2)
        _same_codes(codes, case.tensors[f"{name}_codes"], bits, name, share)
        tolerance = {"rtol": 2e-3, "atol": 1e-3} if share else {}
        for what, ours in (("scale", scale), ("min", zero)):
            recorded = case.tensors[f"{name}_{what}"].float()
            require(torch.allclose(ours.float(), recorded, **tolerance), f"{name}: {what} differs")


def _same_codes(codes: Tensor, words: Tensor, bits: int, what: str, share: float = 0.0) -> None:
    """Codes along the last axis against 32-bit words of them, the first in the lowest bits."""
    shifts = torch.arange(0, 32, bits)
    recorded = ((words[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
    wrong = (codes.int() != recorded).float().mean()
    require(bool(wrong <= share), f"{what}: {wrong:.2%} of the codes differ")
