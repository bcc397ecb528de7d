"""Odd modules, as people write them: per-sample norms and clipped sums are those of batches of one, or are refused.

Numbers of records are chosen to equal dimensions of the weights (4 and 8), and not to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from coterie import dp
from coterie.errors import NoRuleError
from helpers.engine_reference import clipped, distance, gradients, norms

T, D = 6, 4
RECORDS = (1, 3, 4, 8)


class Made(nn.Module):
    """``function(x, *weights)`` with weights of the given shapes, behind a linear layer or on the input itself."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(torch.randn(shape) / 2 for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


class Around(nn.Module):
    """A module, and how it is called."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor) -> Tensor:
        found = self.module(x) if self.call is None else self.call(self.module, x)
        return found[0] if isinstance(found, tuple) else found


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return 2 * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def swapped(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def written(table: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    write(table)
    return table


def ids_of(x: Tensor) -> Tensor:
    """[B, T] int64 in 0..3, from the data."""
    return (x[..., 0].detach() * 7).long() % 4


SPARSE_PLACES = torch.cartesian_prod(torch.arange(D), torch.arange(D)).T

WEIGHTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "index assignment": lambda w: written(torch.zeros(D, D), lambda t: t.__setitem__(torch.arange(D), w * 1.0)),
    "slice assignment": lambda w: written(torch.zeros(D, D), lambda t: t.__setitem__(slice(0, 2), (w * 2)[:2])),
    "copy_ of a view": lambda w: written(torch.zeros(D, D), lambda t: t[:2].copy_(w.float()[:2] * 3)),
    "add_": lambda w: written(torch.zeros(D, D), lambda t: t.add_(w)),
    "index_copy_": lambda w: written(torch.zeros(D, D), lambda t: t.index_copy_(0, torch.arange(D), w * 2)),
    "scatter_add_": lambda w: written(torch.zeros(D, D), lambda t: t.scatter_add_(0, SPARSE_PLACES[0].view(D, D), w)),
    "masked_scatter": lambda w: torch.zeros(D, D).masked_scatter(torch.eye(D).bool(), w * 2),
    "index_put": lambda w: torch.zeros(D, D).index_put((torch.arange(D),), w * 1.0),
    "fft": lambda w: torch.fft.ifft2(torch.fft.fft2(w) * (1 + 2j)).real,
    "rfft": lambda w: torch.fft.irfft(torch.fft.rfft(w), n=D),
    "imaginary part": lambda w: (w * 2j).imag,
    "polar": lambda w: torch.view_as_real(torch.polar(w.abs() + 0.1, w))[..., 0],
    "conjugate transpose": lambda w: w.to(torch.complex64).mH.real,
    "custom function": lambda w: Double.apply(w * 0.5),
    "custom function of a part": lambda w: torch.cat([Double.apply(w[:2]), w[2:]]),
    "sparse": lambda w: torch.sparse_coo_tensor(SPARSE_PLACES, (w * 0.5).reshape(-1), (D, D)).to_dense(),
    "sparse of the parameter": lambda w: w.to_sparse().to_dense(),
    "loop over rows": lambda w: torch.stack([row * 2 for row in w]),
    "loop over rows of a product": lambda w: torch.stack(tuple(w * 3)),
    "sort": lambda w: torch.sort(w, dim=1).values,
    "top": lambda w: w * torch.topk(w, 2, dim=1)[0].sum(1, keepdim=True),
    "max over rows": lambda w: w + w.max(0).values,
    "cumsum": lambda w: w.cumsum(0),
    "softmax": lambda w: w.softmax(-1),
    "where": lambda w: torch.where(w > 0, w, 0.1 * w),
    "clamp": lambda w: w.clamp(-0.2, 0.2),
    "normalised": lambda w: F.normalize(w, dim=1),
    "svd": lambda w: torch.linalg.svdvals(w).diag() + w,
    "inverse": lambda w: torch.linalg.inv(w + 4 * torch.eye(D)),
    "stacked": lambda w: torch.stack([w, w.T])[1] + torch.vstack([w[:2], w[2:]]),
    "einsum of two": lambda w: torch.einsum("ij,kj->ik", w, w.exp()),
    "kron": lambda w: torch.kron(w[:2, :2], w[2:, 2:]),
    "noise added": lambda w: w + torch.randn_like(w),
    "dropout": lambda w: F.dropout(w, 0.5),
    "bernoulli": lambda w: w * torch.bernoulli(torch.sigmoid(w)),
    "random slope": lambda w: F.rrelu(w, training=True),
    "data": lambda w: w.data + w.detach() * w,
    "mutated view": lambda w: written((w * 1.0), lambda t: t[:2].mul_(2)),
    "mutated clone": lambda w: written(w.clone(), lambda t: F.relu(t, inplace=True)),
    "filled clone": lambda w: written(w.clone(), lambda t: t.fill_diagonal_(0)),
    "item assignment": lambda w: written(w.clone(), lambda t: t.__setitem__(0, 0.0)),
    "power": lambda w: 2**w,
    "reinterpreted": lambda w: w.view(torch.int32).view(torch.float32) + w,
    "vmap of the weight": lambda w: torch.vmap(lambda row: row * 2)(w * 1.0),
    "vmap of the parameter": lambda w: torch.vmap(lambda row: row * 2)(w),
    "jacobian of the weight": lambda w: torch.func.grad(lambda v: v.pow(3).sum())(w),
    "list to function": lambda w: torch.cat(torch.split(w, [1, 3])),
    "tensordot of two": lambda w: torch.tensordot(w, w, dims=([1], [1])),
    "outer": lambda w: torch.outer(w[0], w[1]),
    "block": lambda w: torch.block_diag(w[:2, :2], w[2:, 2:]),
    "as strided": lambda w: (w * 1.0).as_strided((D, D), (1, D)),
    "unfold": lambda w: w.unfold(0, D, 1)[0],
    "flat view": lambda w: w.view(2, 8).reshape(8, 2).reshape(D, D),
    "complex multiplication": lambda w: torch.view_as_real(torch.view_as_complex(w.view(D, 2, 2)) * 1j).reshape(D, D),
}

FUNCTIONS: Mapping[str, tuple[Any, ...]] = {
    "einsum": (lambda x, w: torch.einsum("btd,ed->bte", x, w.float()), (8, D)),
    "einsum of a cast": (lambda x, w: torch.einsum("btd,ed->bte", x, w.double().float()), (D, D)),
    "tensordot": (lambda x, w: torch.tensordot(x, w * 1.0, dims=1), (D, 8)),
    "cdist": (lambda x, w: torch.cdist(x, w.view(8, D)), (8, D)),
    "bilinear": (lambda x, w, b: F.bilinear(x, x.tanh(), F.normalize(w, dim=2), b), (8, D, D), (8,)),
    "transposed convolution": (
        lambda x, w, b: F.conv_transpose1d(swapped(x), w.float() * 2, bias=b),
        (D, 8, 3),
        (8,),
    ),
    "transposed convolution 2": (lambda x, w: F.conv_transpose2d(swapped(x)[..., None], weight=w), (D, 8, 3, 1)),
    "convolution by keyword": (lambda x, w: F.conv1d(input=swapped(x), weight=w * 2, padding="same"), (8, D, 3)),
    "unbatched convolutions": (lambda x, w: torch.stack([F.conv1d(one.T, w) for one in x]), (8, D, 3)),
    "rows as images": (lambda x, w: F.conv1d(x.reshape(-1, 1, D), w).view(len(x), -1), (3, 1, 2)),
    "functional convolution": (
        lambda x, w: torch.convolution(swapped(x), w, None, [1], [0], [1], False, [0], 1),
        (8, D, 2),
    ),
    "linear by keyword": (lambda x, w, b: F.linear(input=x, weight=w * 1.0, bias=b), (8, D), (8,)),
    "one-dimensional linear": (lambda x, w: F.linear(x, w), (D,)),
    "one-dimensional product": (lambda x, w: x @ w, (D,)),
    "product from the left": (lambda x, w: torch.matmul(w, x), (T,)),
    "mv": (lambda x, w: torch.stack([torch.mv(one, w) for one in x]), (D,)),
    "addmm": (lambda x, b, w: torch.addmm(b, x.flatten(0, 1), w, alpha=2).view(len(x), -1), (8,), (D, 8)),
    "addmm with its defaults": (lambda x, b, w: torch.addmm(b, x.flatten(0, 1), w).view(len(x), -1), (8,), (D, 8)),
    "baddbmm": (lambda x, b, w: torch.baddbmm(b, x, w.expand(len(x), -1, -1)), (T, 8), (D, 8)),
    "bmm of a repeated weight": (lambda x, w: torch.bmm(x, w.repeat(len(x), 1, 1)), (1, D, 8)),
    "batch of matrices": (lambda x, w: torch.matmul(x.unsqueeze(1), w), (3, D, 8)),
    "prelu": (lambda x, w: F.prelu(swapped(x), weight=w.abs()), (D,)),
    "zero-dimensional scale": (lambda x, w, b: x * w + b, (), ()),
    "zero-dimensional temperature": (lambda x, w: (x / w.exp()).softmax(-1), ()),
    "zero-dimensional twice": (lambda x, w: x * w + w.sigmoid(), ()),
    "layer norm by keyword": (lambda x, w, b: F.layer_norm(x, (D,), bias=b, weight=w * 2), (D,), (D,)),
    "layer norm of two dimensions": (lambda x, w: F.layer_norm(x, (T, D), w), (T, D)),
    "group norm": (lambda x, w, b: F.group_norm(swapped(x), 2, weight=w, bias=b), (D,), (D,)),
    "instance norm": (lambda x, w, b: F.instance_norm(swapped(x), weight=w, bias=b), (D,), (D,)),
    "batch norm of fixed statistics": (
        lambda x, w, b: F.batch_norm(swapped(x), torch.zeros(D), torch.ones(D), w, b, False),
        (D,),
        (D,),
    ),
    "attention with learnt keys": (
        lambda x, k, v: F.scaled_dot_product_attention(x, k.expand(len(x), -1, -1), v.expand(len(x), -1, -1)),
        (1, 8, D),
        (1, 8, D),
    ),
    "attention with shared keys": (
        lambda x, k: F.scaled_dot_product_attention(x, k[None] * 1.0, k[None] * 2.0),
        (8, D),
    ),
    "attention with a learnt bias": (
        lambda x, b: F.scaled_dot_product_attention(x, x, x, attn_mask=b.expand(len(x), -1, -1)),
        (T, T),
    ),
    "learnt mask token": (lambda x, w: torch.where(x[..., :1] > 0, x, w), (D,)),
    "masked positions": (lambda x, w: x + w * (x[..., :1] > 0), (T, D)),
    "position table": (lambda x, w: x + F.embedding(torch.arange(T), w), (8, D)),
    "gather": (
        lambda x, w: torch.gather(w.expand(len(x), -1, -1), 1, ids_of(x)[..., None].expand(-1, -1, D)),
        (4, D),
    ),
    "index_select": (lambda x, w: w.index_select(0, ids_of(x).flatten()).view(*x.shape[:2], -1), (4, 8)),
    "take": (lambda x, w: torch.take(w, ids_of(x)), (4,)),
    "one-dimensional lookup": (lambda x, w: w[ids_of(x)] * x.sum(-1), (4,)),
    "lookup of columns": (lambda x, w: w[:, ids_of(x)].movedim(0, -1), (8, 4)),
    "lookup by two": (lambda x, w: w[ids_of(x), ids_of(x.flip(1))], (4, 4)),
    "one hot": (lambda x, w: F.one_hot(ids_of(x), 4).float() @ w, (4, 8)),
    "tokens first": (lambda x, w: F.linear(x.transpose(0, 1), w * 1.0).transpose(0, 1), (8, D)),
    "tokens first scale": (lambda x, w: (x.transpose(0, 1) * w).transpose(0, 1), (D,)),
    "list of tensors": (lambda x, w: torch.stack([x, w.expand_as(x)]).sum(0), (T, D)),
    "concatenated weight": (lambda x, w: torch.cat([x, w.expand(len(x), -1, -1)], 1).cumsum(1), (2, D)),
    "meshed": (lambda x, w: sum(torch.broadcast_tensors(x, w)), (T, D)),
    "type of the data": (lambda x, w: x @ w.type_as(x).to(x), (D, 8)),
    "shape of the data": (lambda x, w: x * w.expand_as(x), (D,)),
    "lerp": (lambda x, w: torch.lerp(x, x.tanh(), w.sigmoid()), (D,)),
    "addcmul": (lambda x, w: torch.addcmul(x, x, w, value=2.0), (T, D)),
    "in place": (lambda x, w: (x * 1.0).mul_(w).add_(w.sum()), (D,)),
    "maximum": (lambda x, w: torch.maximum(x, w) - torch.minimum(w.exp(), x), (D,)),
    "scatter of data": (lambda x, w: x.scatter_add(1, ids_of(x)[..., None].expand(-1, -1, D), w.expand_as(x)), (D,)),
    "copysign": (lambda x, w: torch.copysign(w.abs() + 1, x), (D,)),
    "dot products": (lambda x, w: torch.linalg.vecdot(x, w), (D,)),
    "cosine": (lambda x, w: F.cosine_similarity(x, w, dim=-1), (D,)),
    "solve": (lambda x, w: torch.linalg.solve(w + 4 * torch.eye(D), swapped(x)), (D, D)),
    "complex data": (lambda x, w: torch.view_as_real(torch.polar(x.abs(), x) * w), (D,)),
    "spectral filter": (
        lambda x, w: torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.view_as_complex(w), n=T, dim=1),
        (4, D, 2),
    ),
    "vmap over the batch": (lambda x, w: torch.vmap(lambda one: one @ w)(x), (D, 8)),
    "vmap with the weight": (lambda x, w: torch.vmap(lambda one, v: one @ v, (0, None))(x, w), (D, 8)),
    "gradient of an energy": (
        lambda x, w: torch.autograd.grad((x @ w).tanh().sum(), x, create_graph=True)[0] if x.requires_grad else x @ w,
        (D, D),
    ),
    "custom function of data and a value": (lambda x, w: x * Double.apply(w * 2), (D,)),
    "mixes the records": (lambda x, w: x + x.mean(0, keepdim=True) @ w, (D, D)),
    "mixes the records by einsum": (lambda x, w: torch.einsum("btd,ctd,de->bte", x, x, w), (D, D)),
    "flipped records": (lambda x, w: (x.flip(0) * w).flip(0), (D,)),
    "moved records": (
        lambda x, w: (x.transpose(0, 1).reshape(-1, D) @ w).view(T, len(x), -1).transpose(0, 1),
        (D, 8),
    ),
    "random slope": (lambda x, w: F.rrelu(x * w, training=True), (D,)),
    "attention dropout": (
        lambda x, k: F.scaled_dot_product_attention(x, k[None] * 1.0, k[None] * 2.0, dropout_p=0.5),
        (8, D),
    ),
    "one chosen row": (
        lambda x, w: torch.stack([one * w[int(i) % 4] for one, i in zip(x, ids_of(x)[:, 0], strict=True)]),
        (4, D),
    ),
    "as many rows as there are": (lambda x, w: x.transpose(0, 1)[:1].reshape(-1, D) * w[: len(x)], (8, D)),
}


def gru(batch_first: bool) -> nn.Module:
    return nn.GRU(D, 8, num_layers=2, batch_first=batch_first)


MODULES: Mapping[str, Callable[[], nn.Module]] = {
    "gru": lambda: Around(gru(True)),
    "gru of tokens": lambda: Around(gru(False), lambda m, x: m(x.transpose(0, 1))[0].transpose(0, 1)),
    "gru's last state": lambda: Around(gru(True), lambda m, x: m(x)[1].transpose(0, 1)),
    "lstm": lambda: Around(nn.LSTM(D, 8, batch_first=True, bidirectional=True)),
    "rnn cell": lambda: Around(nn.RNNCell(D, 8), lambda m, x: m(x[:, 1], m(x[:, 0]))),
    "lstm cell": lambda: Around(nn.LSTMCell(D, 8), lambda m, x: m(x[:, 0])[0]),
    "attention": lambda: Around(nn.MultiheadAttention(D, 2, batch_first=True), lambda m, x: m(x, x, x)[0]),
    "attention of tokens": lambda: Around(
        nn.MultiheadAttention(D, 2), lambda m, x: m(*[x.transpose(0, 1)] * 3, need_weights=False)[0].transpose(0, 1)
    ),
    "encoder layer": lambda: nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True),
    "group norm": lambda: Around(nn.GroupNorm(2, D), lambda m, x: m(swapped(x))),
    "instance norm": lambda: Around(nn.InstanceNorm1d(D, affine=True), lambda m, x: m(swapped(x))),
    "bag": lambda: Around(nn.EmbeddingBag(4, 8), lambda m, x: m(ids_of(x))),
    "bag of a flat list": lambda: Around(
        nn.EmbeddingBag(4, 8), lambda m, x: m(ids_of(x).flatten(), torch.arange(0, x.shape[0] * T, T))
    ),
    "sparse embedding": lambda: Around(nn.Embedding(4, 8, sparse=True), lambda m, x: m(ids_of(x))),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(D, 8)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(D, 8)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(D, D)),
    "old weight norm": lambda: torch.nn.utils.weight_norm(nn.Linear(D, 8)),  # type: ignore[no-untyped-call]
    "bilinear": lambda: Around(nn.Bilinear(D, D, 8), lambda m, x: m(x, x)),
    "prelu": lambda: Around(nn.PReLU(D), lambda m, x: m(swapped(x))),
    "transposed convolution": lambda: Around(nn.ConvTranspose1d(D, 8, 3), lambda m, x: m(swapped(x))),
    "functional call": lambda: Around(
        nn.Linear(D, 8),
        lambda m, x: torch.func.functional_call(m, {n: p * 2 for n, p in m.named_parameters()}, (x,)),
    ),
    "scripted": lambda: torch.jit.script(nn.Linear(D, 8)),  # type: ignore[no-untyped-call]
}


REFUSED_WEIGHTS = {
    "index assignment", "slice assignment", "copy_ of a view", "add_", "index_copy_", "scatter_add_",
    "custom function", "custom function of a part", "sparse", "sparse of the parameter", "noise added",
    "dropout", "bernoulli", "random slope", "mutated view", "mutated clone", "filled clone", "item assignment",
    "vmap of the weight", "vmap of the parameter", "jacobian of the weight",
}  # fmt: skip
REFUSED_FUNCTIONS = {
    "unbatched convolutions", "mv", "vmap over the batch", "vmap with the weight", "gradient of an energy",
    "custom function of data and a value", "mixes the records", "mixes the records by einsum", "flipped records",
    "moved records", "random slope", "attention dropout", "one chosen row", "as many rows as there are",
}  # fmt: skip
REFUSED_MODULES = {"bag of a flat list", "scripted"}


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    out = model(batch["x"])
    return (out.flatten(1) * torch.linspace(0.5, 1.5, out[0].numel())).square().sum(1)


def batch_of(records: int) -> dict[str, Tensor]:
    return {"x": torch.randn(records, T, D, generator=torch.Generator().manual_seed(records))}


def assert_exact(model: nn.Module) -> None:
    """Over several numbers of records, by the public functions and by one engine."""
    engine = dp.Engine(model, loss, method="book_keeping")
    for records in RECORDS:
        batch = batch_of(records)
        expected = gradients(model, batch, loss)
        right = norms(expected)
        engine.accumulate(batch)
        engine.clipping, engine.thresholds = dp.Flat(clip := float(right.median())), torch.tensor([clip]).double()
        engine.take()
        figures = engine.accumulate(batch)
        assert float((figures.norms - right).abs().max()) <= 1e-4 * float(right.max()), records
        assert distance(engine.take(), clipped(expected, clip)) <= 1e-4, records
    assert float((dp.per_sample_norms(model, batch, loss) - right).abs().max()) <= 1e-4 * float(right.max())
    assert distance(dp.clipped_sum(model, batch, clip, loss), clipped(expected, clip)) <= 1e-4


def assert_refused(model: nn.Module) -> None:
    """By every public function, whatever the number of records; never with a traceback of another kind."""
    for records in (4, 8):
        batch = batch_of(records)
        loss(model, batch).sum().backward()  # the plain model runs
        model.zero_grad()
        with pytest.raises(NoRuleError, match=r"`[a-z0-9_.]+`|records beside it|does not depend on any"):
            dp.per_sample_norms(model, batch, loss)
        with pytest.raises(NoRuleError):
            dp.clipped_sum(model, batch, 1.0, loss)


def assert_right(model: nn.Module, refused: bool) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 2)
    assert_refused(model.eval()) if refused else assert_exact(model.eval())


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
@pytest.mark.parametrize("name", WEIGHTS)
def test_invariant_1_weights_made_by_any_function_are_exact_or_refused(name: str) -> None:
    make = WEIGHTS[name]
    model = nn.Sequential(nn.Linear(D, D), Made(lambda x, w: F.linear(x, make(w)), (D, D)))
    assert_right(model, name in REFUSED_WEIGHTS)


@pytest.mark.parametrize("frozen", [False, True], ids=["behind a layer", "on the input"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_invariant_1_operations_that_meet_data_are_exact_or_refused(name: str, frozen: bool) -> None:
    if frozen and name == "gradient of an energy":
        pytest.skip("the input needs no gradient")
    function, *shapes = FUNCTIONS[name]
    made = Made(function, *shapes)
    assert_right(made if frozen else nn.Sequential(nn.Linear(D, D), made), name in REFUSED_FUNCTIONS)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize("name", MODULES)
def test_invariant_1_modules_of_every_kind_are_exact_or_refused(name: str) -> None:
    assert_right(MODULES[name](), name in REFUSED_MODULES)


@pytest.mark.parametrize("name", sorted(REFUSED_WEIGHTS - {"noise added"}))
def test_invariant_4_gradients_past_the_rules_are_refused_without_a_comparison(name: str) -> None:
    """The guard of derived values itself, not the comparison with batches of one that would find many of them too."""
    make = WEIGHTS[name]
    engine = dp.Engine(Made(lambda x, w: F.linear(x, make(w)), (D, D)), loss)
    engine.compared = True
    with pytest.raises(NoRuleError, match=r"`weights\.0`"):
        engine.norms(batch_of(4))
