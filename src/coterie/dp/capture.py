"""One forward and backward in which every use of a trainable parameter is seen.

For the length of a `Capture`, each trainable parameter's class is `TrackedParameter`, whose ``__torch_function__``
sees every torch operation on it: in checkpointed layers when they are recomputed, in other threads and under
autocast too, where a ``TorchFunctionMode`` would miss some. The object stays the same, so tied parameters and
references kept anywhere are seen as well. Operations on parameters alone give `DerivedTensor`; the rules of
`coterie.dp.rules` replace an operation that meets data by one that also hands its gradient to `Capture.deliver`.

Shape letters: B records.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from coterie.dp.derived import Function, Node, Root, kind_of
from coterie.dp.terms import Term
from coterie.errors import NoRuleError, PrivacyError

_NODE = "_coterie_node"
_CAPTURE = "_coterie_capture"

CONSTANT, RECORDS, FLAT = "constant", "records", "flat"
"""What a tensor's first dimension is: nothing to do with records, the records, or records times rows."""


@dataclass
class Sites:
    """What the first dimension of the data is at every use of every parameter, learnt from probe passes.

    A run's own sizes cannot tell: with 4 records of 64 tokens, a table of 64 positions looks like 4 records of 16
    rows. Two probe passes whose sizes share no factor can.

    Attributes:
        seen: (parameter, operation) to the first dimensions seen, in call order, for each probe batch size.
    """

    seen: dict[tuple[str, str], dict[int, list[int]]] = field(default_factory=lambda: defaultdict(dict))

    def note(self, key: tuple[str, str], batch: int, length: int) -> None:
        self.seen[key].setdefault(batch, []).append(length)

    def meaning(self, key: tuple[str, str], call: int) -> str | None:
        """RECORDS, FLAT or CONSTANT for the ``call``-th use; None if the probes never saw it or disagree."""
        if key not in self.seen:
            return None
        columns = list(zip(*self.seen[key].values(), strict=False))
        found = [self._of_lengths(tuple(self.seen[key]), lengths) for lengths in columns]
        if len(set(found)) == 1:
            return found[0]
        same_count = len({len(lengths) for lengths in self.seen[key].values()}) == 1
        return found[call] if same_count and call < len(found) else None

    @staticmethod
    def _of_lengths(batches: tuple[int, ...], lengths: tuple[int, ...]) -> str:
        pairs = list(zip(batches, lengths, strict=True))
        if len(pairs) > 1 and len(set(lengths)) == 1:
            return CONSTANT  # the probes differ in records and tokens, so what follows either would differ too
        if all(length == batch for batch, length in pairs):
            return RECORDS
        return FLAT if all(length and length % batch == 0 for batch, length in pairs) else CONSTANT


class TrackedParameter(nn.Parameter):
    """A parameter during a `Capture`."""

    @classmethod
    def __torch_function__(cls, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class DerivedTensor(Tensor):
    """A value computed from parameters alone during a `Capture`."""

    @classmethod
    def __torch_function__(cls, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


Rule = Callable[["Capture", Function, tuple[Any, ...], dict[str, Any]], Any]


class Capture:
    """See the module text. Use it as a context manager around one forward and one `backward`.

    Args:
        parameters: the trainable ones, by name.
        batch: B.
        rule: called for every operation on a tracked tensor.
        ready: called once for each root, when all its uses have delivered their gradients.
        sites: what was learnt by probing.
        probing: this pass teaches ``sites``.

    Attributes:
        anchor: a leaf that requires a gradient; rules pass it to their autograd functions so that these are
            visited even where the data itself needs no gradient.
        row_records: while set, rows of data are not grouped by record and this [R] says whose each row is.
        recomputing: the backward has begun, so a forward seen now is a recompute.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        batch: int,
        rule: Rule,
        ready: Callable[[Root], None],
        sites: Sites,
        probing: bool = False,
    ) -> None:
        self.batch = batch
        self.rule = rule
        self.sites = sites
        self.probing = probing
        self.roots = {name: Root(p.detach(), name=name) for name, p in parameters.items()}
        self.row_records: Tensor | None = None
        self.recomputing = False
        device = next(iter(parameters.values())).device
        self.anchor = torch.zeros((), device=device if device.type != "meta" else None, requires_grad=True)
        self._parameters = dict(parameters)
        self._gradients: dict[str, Tensor | None] = {}
        self._ready = ready
        self._calls: dict[tuple[str, str], int] = defaultdict(int)

    def __enter__(self) -> Capture:
        for name, parameter in self._parameters.items():
            if type(parameter) is not nn.Parameter:
                self.__exit__()
                raise NoRuleError(
                    f"`{name}` is a {type(parameter).__name__}, not a plain parameter.",
                    why="its operations could not be seen, so its gradient could not be clipped",
                    fix="freeze it, or load the model without quantised or sharded parameter classes",
                )
            self._gradients[name] = parameter.grad
            parameter.grad = None
            setattr(parameter, _NODE, self.roots[name])
            setattr(parameter, _CAPTURE, self)
            parameter.__class__ = TrackedParameter
        return self

    def __exit__(self, *_: Any) -> None:
        for name, gradient in self._gradients.items():
            parameter = self._parameters[name]
            parameter.__class__ = nn.Parameter
            delattr(parameter, _NODE)
            delattr(parameter, _CAPTURE)
            parameter.grad = gradient
        self._gradients = {}

    def backward(self, total: Tensor) -> None:
        """Run the backward of the summed loss, then settle what never received a gradient.

        Raises:
            NoRuleError: a parameter got a gradient past the rules, or all of the loss did.
        """
        if isinstance(total, DerivedTensor) or not total.requires_grad:
            raise NoRuleError(
                "The loss does not depend on any trainable parameter through data.",
                why="there is nothing to clip, so nothing may be released",
                fix="check that the loss function uses the model's output, and that something is trainable",
            )
        self.recomputing = True
        total.backward()
        for name, parameter in self._parameters.items():
            with torch._C.DisableTorchFunctionSubclass():
                escaped = parameter.grad is not None
            if escaped:
                raise NoRuleError(
                    f"`{name}` received a gradient that no rule saw.",
                    where="an operation outside torch's function dispatch, such as a custom autograd function",
                    why="that part of its gradient would escape clipping",
                    fix="freeze the parameter, or use the plain PyTorch form of that layer",
                )
        for root in self.roots.values():
            self._settle(root)

    def derive(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A weight-only operation: its value as `DerivedTensor`, with the expression remembered."""
        with torch.no_grad():
            result = function(*values(args), **values(kwargs))
        nodes_args, nodes_kwargs = nodes(args), nodes(kwargs)
        if isinstance(result, Tensor):
            return self._derived(result, function, nodes_args, nodes_kwargs, None)
        if isinstance(result, tuple | list) and any(isinstance(part, Tensor) for part in result):
            parts = [self._derived(part, function, nodes_args, nodes_kwargs, i) for i, part in enumerate(result)]
            return tuple(parts)
        return result

    def _derived(
        self, value: Tensor, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], part: int | None
    ) -> Tensor:
        if not value.is_floating_point():
            return value
        sources = list(iterate_nodes((args, kwargs)))
        roots = tuple(dict.fromkeys(root for source in sources for root in source.roots))
        kind = kind_of(function, sources, args, kwargs, value)
        return self.wrap(Node(value, roots, kind, function, args, kwargs, part))

    def wrap(self, node: Node) -> Tensor:
        derived = node.value.as_subclass(DerivedTensor)
        setattr(derived, _NODE, node)
        setattr(derived, _CAPTURE, self)
        return derived

    def rows_of(self, node: Node, function: Function, data: Tensor) -> int | None:
        """Rows of ``data`` that belong to one record, or None if its first dimension has nothing to do with records.

        Raises:
            NoRuleError: the first dimension does not fit what the probes learnt.
        """
        length = data.shape[0] if data.ndim else 0
        name = function.__name__
        key = (node.roots[0].name, name)
        if self.probing:
            self.sites.note(key, self.batch, length)
            return length // self.batch if length and length % self.batch == 0 else None
        call = self._calls[key]
        self._calls[key] += 0 if self.recomputing else 1
        meaning = self.sites.meaning(key, call)
        if meaning == CONSTANT:
            return None
        fits = length == self.batch if meaning == RECORDS else length and length % self.batch == 0
        if meaning is None or not fits:
            raise refusal(
                node,
                function,
                f"its input has {length} rows, which cannot be told apart by record ({self.batch} records)",
            )
        return length // self.batch

    def expect(self, node: Node) -> None:
        """A use whose gradient will be delivered in the backward."""
        if self.recomputing:
            return
        for root in node.roots:
            root.expected += 1

    def deliver(self, node: Node, term: Term) -> None:
        """The gradient of one use."""
        for root in node.roots:
            if root.done:
                raise PrivacyError(
                    f"`{root.name}` received a gradient after its norm was taken.",
                    code="dp-late-gradient",
                    why="its per-sample norm would be too small, and clipping would not bound it",
                    fix="use non-reentrant gradient checkpointing (use_reentrant=False)",
                )
            root.captured.append((node, term))
            if len(root.captured) == root.expected:
                self._settle(root)

    def _settle(self, root: Root) -> None:
        if not root.done:
            root.done = True
            self._ready(root)

    @contextmanager
    def rows_belong_to(self, row_records: Tensor) -> Iterator[None]:
        """Inside, rows are in the order of ``row_records`` [R] instead of record by record."""
        self.row_records = row_records
        try:
            yield
        finally:
            self.row_records = None


def node_of(tensor: Any) -> Node | None:
    """The node behind a tracked tensor; None for anything else."""
    return getattr(tensor, _NODE, None) if isinstance(tensor, TrackedParameter | DerivedTensor) else None


def _mapped(item: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(item, tuple | list):
        return type(item)(change(part) for part in item) if type(item) in (tuple, list) else item
    if isinstance(item, dict):
        return {key: _mapped(part, change) for key, part in item.items()}
    return change(item)


def values(items: Any) -> Any:
    """Arguments with tracked tensors replaced by their plain values (one list deep)."""
    return _mapped(items, lambda item: _mapped(item, _value) if isinstance(item, list | tuple) else _value(item))


def _value(item: Any) -> Any:
    node = node_of(item)
    return item if node is None else node.value


def nodes(items: Any) -> Any:
    """Arguments with tracked tensors replaced by their nodes (one list deep)."""

    def change(item: Any) -> Any:
        return node_of(item) or item

    return _mapped(items, lambda item: _mapped(item, change) if isinstance(item, list | tuple) else change(item))


def iterate_nodes(items: Any) -> Iterator[Node]:
    """All nodes among arguments."""
    if isinstance(items, Node):
        yield items
    elif isinstance(items, tuple | list):
        for item in items:
            yield from iterate_nodes(item)
    elif isinstance(items, dict):
        yield from iterate_nodes(list(items.values()))


def tensors(items: Any) -> Iterator[Tensor]:
    """All tensors among arguments, tracked ones included."""
    if isinstance(items, Tensor):
        yield items
    elif isinstance(items, tuple | list):
        for item in items:
            yield from tensors(item)
    elif isinstance(items, dict):
        yield from tensors(list(items.values()))


def refusal(node: Node, function: Function, reason: str) -> NoRuleError:
    """The error for a use of a parameter that cannot be bounded."""
    names = ", ".join(f"`{root.name}`" for root in node.roots)
    return NoRuleError(
        f"{names} meets data in `{getattr(function, '__name__', function)}`, which cannot be clipped per record.",
        where=reason,
        why="a gradient that is not split by record cannot be bounded, and epsilon would be wrong",
        fix="freeze the parameter (requires_grad_(False)), or use a model variant with plain linear layers there",
    )


_T: Any = torch.Tensor
_WEIGHT_PROPERTIES = {_T.T.__get__, _T.mT.__get__}
_PLAIN = {
    _T.detach, torch.detach, _T.requires_grad_, _T.size, _T.dim, _T.numel, _T.stride, _T.is_floating_point,
    _T.register_hook, _T.__repr__, _T.__hash__, _T.__len__, _T.item, _T.tolist, _T.data_ptr, _T.element_size,
    _T.is_contiguous, _T.get_device, _T.storage_offset, _T.untyped_storage, torch.is_floating_point, torch.numel,
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like,
    _T.new_zeros, _T.new_empty, _T.new_ones, _T.new_full, _T.new_tensor,
}  # fmt: skip


def _dispatch(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        name = getattr(function, "__name__", "")
        accessor = name in ("__get__", "__set__") and function not in _WEIGHT_PROPERTIES
        if accessor or function in _PLAIN or not torch.is_grad_enabled():
            return function(*_unwrapped(args), **_unwrapped(kwargs))
        capture = next(
            (found for tensor in tensors((args, kwargs)) if (found := getattr(tensor, _CAPTURE, None)) is not None),
            None,
        )
        if capture is None:  # a tensor that outlived its capture: plain again
            return function(*values(args), **values(kwargs))
        return capture.rule(capture, function, args, kwargs)


def _unwrapped(items: Any) -> Any:
    """Derived tensors as plain values; parameters stay themselves, so that their attributes are theirs."""
    return _mapped(items, lambda item: _value(item) if isinstance(item, DerivedTensor) else item)
