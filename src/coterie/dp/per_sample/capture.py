"""One forward and backward in which every use of a trainable parameter is seen.

For the length of a `Capture`, each trainable parameter's class is `TrackedParameter`, whose ``__torch_function__``
sees every torch operation on it: in checkpointed layers when they are recomputed, in other threads and under
autocast too, where a ``TorchFunctionMode`` would miss some. The object stays the same, so tied parameters and
references kept anywhere are seen as well. Operations on parameters alone give `DerivedTensor`; the rules of
`coterie.dp.per_sample.rules` replace an operation that meets data by one that also hands its gradient to
`Capture.deliver`.

Shape letters: B records.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coterie.dp.per_sample.sites import Key, Meaning, Sites, Size, supposed
from coterie.dp.per_sample.terms import Term
from coterie.dp.per_sample.weight_expressions import Function, Node, Root, kind_of
from coterie.errors import NoRuleError, PrivacyError
from coterie.models.autograd import backward, on_gradient

_NODE = "_coterie_node"
_CAPTURE = "_coterie_capture"


class TrackedParameter(nn.Parameter):
    """A parameter during a `Capture`."""

    @classmethod
    def __torch_function__(cls, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class DerivedTensor(Tensor):
    """A value computed from parameters alone during a `Capture`.

    It is a leaf that requires a gradient, and refuses to get one: the rules use the plain value of its node, so a
    gradient that arrives here went past them, whatever way that was.
    """

    @classmethod
    def __torch_function__(cls, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class Use:
    """The tensors of one operation, tracked ones included, and what each has to do with records."""

    __slots__ = ("meanings", "operands")

    def __init__(self, operands: Sequence[Tensor], meanings: Sequence[Meaning]) -> None:
        self.operands = operands
        self.meanings = meanings

    def of(self, tensor: Tensor) -> Meaning:
        """The meaning of one of the operands."""
        return next(m for operand, m in zip(self.operands, self.meanings, strict=True) if operand is tensor)

    def records_first(self, tensor: Tensor) -> bool:
        """The records are its first dimension, or lie along it."""
        return self.of(tensor).dim == 0

    def constant(self, tensor: Tensor | None) -> bool:
        """It has nothing to do with records, or there is none."""
        return tensor is None or self.of(tensor).dim == -1


Rule = Callable[["Capture", Function, tuple[Any, ...], dict[str, Any], Use], Any]


class Capture:
    """See the module text. Use it as a context manager around one forward and one `backward`.

    Args:
        parameters: the trainable ones, by name.
        batch: B.
        rule: called for every operation on a tracked tensor.
        ready: called once for each root, when all its uses have delivered their gradients.
        sites: what was learnt by probing.
        probing: (records, tokens) of this pass if it teaches ``sites``.

    Attributes:
        anchor: a leaf that requires a gradient; rules pass it to their autograd functions so that these are
            visited even where the data itself needs no gradient.
        row_records: while set, rows of data are not grouped by record and this [R] says whose each row is.
        recomputing: the backward has begun, so a forward seen now is a recompute.
        active: between entering and leaving.
        last: the parameter that was used last, to be named if something fails.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        batch: int,
        rule: Callable[[Capture, Function, tuple[Any, ...], dict[str, Any]], Any],
        ready: Callable[[Root], None],
        sites: Sites,
        probing: Size | None = None,
    ) -> None:
        self.batch = batch
        self.rule = rule
        self.sites = sites
        self.probing = probing
        self.roots = {name: Root(p.detach(), name=name) for name, p in parameters.items()}
        self.row_records: Tensor | None = None
        self.recomputing = False
        self.active = False
        self.last: Node | None = None
        device = next((parameter.device for parameter in parameters.values()), torch.device("cpu"))
        self.anchor = torch.zeros((), device=device if device.type != "meta" else None, requires_grad=True)
        self._parameters = dict(parameters)
        self._gradients: dict[str, Tensor | None] = {}
        self._ready = ready
        self._calls: dict[Key, int] = defaultdict(int)

    def __enter__(self) -> Capture:
        for name, parameter in self._parameters.items():
            if type(parameter) is not nn.Parameter or parameter.is_complex():
                kind = "complex parameter" if parameter.is_complex() else type(parameter).__name__
                self.__exit__()
                raise NoRuleError(
                    f"`{name}` is a {kind}, not a plain parameter.",
                    why="its operations could not be seen, so its gradient could not be clipped",
                    fix="freeze it, or load the model without quantised or sharded parameter classes",
                )
            self._gradients[name] = parameter.grad
            parameter.grad = None
            setattr(parameter, _NODE, self.roots[name])
            setattr(parameter, _CAPTURE, self)
            parameter.__class__ = TrackedParameter
        self.active = True
        return self

    def __exit__(self, *_: Any) -> None:
        self.active = False
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
        backward(total)
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
        """A weight-only operation: its value as `DerivedTensor`, with the expression remembered.

        Raises:
            NoRuleError: it wrote into one of its arguments, or returned something that cannot be followed.
        """
        plain_args, plain_kwargs = values(args), values(kwargs)
        operands = list(tensors((plain_args, plain_kwargs)))
        versions = [tensor._version for tensor in operands]
        with torch.no_grad():
            result = function(*plain_args, **plain_kwargs)
        nodes_args, nodes_kwargs = nodes(args), nodes(kwargs)
        if versions != [tensor._version for tensor in operands]:
            raise refusal(next(iterate_nodes((nodes_args, nodes_kwargs))), function, "it writes into its arguments")
        if isinstance(result, Tensor):
            return self._derived(result, function, nodes_args, nodes_kwargs, None)
        if isinstance(result, tuple | list) and any(isinstance(part, Tensor) for part in result):
            return rebuilt(
                result, [self._derived(part, function, nodes_args, nodes_kwargs, i) for i, part in enumerate(result)]
            )
        if not _holds_no_tensor(result):
            raise refusal(
                next(iterate_nodes((nodes_args, nodes_kwargs))), function, f"it returns a {type(result).__name__}"
            )
        return result

    def _derived(
        self, value: Any, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], part: int | None
    ) -> Any:
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        sources = list(iterate_nodes((args, kwargs)))
        if value.layout != torch.strided:
            raise refusal(sources[0], function, "it makes a sparse tensor of a parameter")
        roots = tuple(dict.fromkeys(root for source in sources for root in source.roots))
        kind = kind_of(function, sources, args, kwargs, value)
        return self.wrap(Node(value, roots, kind, function, args, kwargs, part))

    def wrap(self, node: Node) -> Tensor:
        derived = node.value.detach().as_subclass(DerivedTensor)
        derived.requires_grad_()
        on_gradient(derived, _Escaped(node))
        setattr(derived, _NODE, node)
        setattr(derived, _CAPTURE, self)
        return derived

    def meanings(self, node: Node, name: str, operands: Sequence[Tensor]) -> Sequence[Meaning]:
        """What the tensors of a call of operation ``name`` have to do with records.

        Raises:
            NoRuleError: the probes never saw this use, or its sizes do not fit what they learnt.
        """
        key = (node.roots[0].name, name, self.recomputing)
        shapes = tuple([tuple(tensor.shape) for tensor in operands])
        if self.probing is not None:
            self.sites.note(key, self.probing, shapes)
            self.sites.lowered |= torch.is_autocast_enabled(operands[0].device.type)
            return [supposed(shape, self.batch) for shape in shapes]
        call = self._calls[key]
        self._calls[key] = call + 1
        meanings = self.sites.meanings(key, call, shapes)
        if meanings is not None:
            for meaning, shape in zip(meanings, shapes, strict=True):
                if meaning.dim >= 0:
                    size = shape[meaning.dim] if meaning.dim < len(shape) else 0
                    if size != self.batch if meaning.exact else not size or size % self.batch:
                        meanings = None
                        break
        if meanings is None:
            raise refusal(
                node,
                name,
                f"its rows cannot be told apart by record ({self.batch} records, shapes {[list(s) for s in shapes]})",
            )
        return meanings

    def expect(self, node: Node) -> None:
        """A use whose gradient will be delivered in the backward."""
        if self.recomputing:
            return
        for root in node.roots:
            root.expected += 1

    def deliver(self, node: Node, term: Term) -> None:
        """The gradient of one use."""
        if not self.recomputing:
            raise NoRuleError(
                f"{_named(node)} received a gradient inside the forward.",
                where="a gradient that the model or the loss takes itself, such as torch.autograd.grad",
                why="it would be taken for a part of the loss's gradient",
                fix="freeze what that gradient runs through, or leave it out of the loss",
            )
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


def mapped(items: Any, change: Callable[[Any], Any]) -> Any:
    """Arguments with every tensor and node in them changed, however they are nested."""
    if isinstance(items, Tensor | Node):
        return change(items)
    kind = type(items)
    if kind is tuple:
        return tuple([mapped(part, change) for part in items])
    if kind is list:
        return [mapped(part, change) for part in items]
    if kind is dict:
        return {key: mapped(part, change) for key, part in items.items()}
    if kind is slice:
        return slice(mapped(items.start, change), mapped(items.stop, change), mapped(items.step, change))
    if isinstance(items, tuple) and kind is not torch.Size:
        return rebuilt(items, [mapped(part, change) for part in items])
    return items


def rebuilt(like: Any, parts: list[Any]) -> Any:
    """A sequence of the class of ``like``: plain, named, or one of torch's own."""
    return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)


def values(items: Any) -> Any:
    """Arguments with tracked tensors replaced by their plain values."""
    return mapped(items, _value)


def _value(item: Any) -> Any:
    node = node_of(item)
    return item if node is None else node.value


def nodes(items: Any) -> Any:
    """Arguments with tracked tensors replaced by their nodes, and others detached: an expression holds no graph."""
    return mapped(items, _node)


def _node(item: Any) -> Any:
    node = node_of(item)
    if node is not None:
        return node
    return item.detach() if isinstance(item, Tensor) and item.requires_grad else item


def iterate_nodes(items: Any) -> Iterator[Node]:
    """All nodes among arguments."""
    if isinstance(items, Node):
        yield items
    elif isinstance(items, tuple | list):
        for item in items:
            yield from iterate_nodes(item)
    elif isinstance(items, dict):
        yield from iterate_nodes(list(items.values()))
    elif isinstance(items, slice):
        yield from iterate_nodes((items.start, items.stop, items.step))


def tensors(items: Any) -> Iterator[Tensor]:
    """All tensors among arguments, tracked ones included."""
    if isinstance(items, Tensor):
        yield items
    elif isinstance(items, tuple | list):
        for item in items:
            yield from tensors(item)
    elif isinstance(items, dict):
        yield from tensors(list(items.values()))
    elif isinstance(items, slice):
        yield from tensors((items.start, items.stop, items.step))


def _holds_no_tensor(result: Any) -> bool:
    if isinstance(result, tuple | list):
        return all(_holds_no_tensor(part) for part in result)
    plain = bool | int | float | complex | str | torch.dtype | torch.device | torch.layout | torch.memory_format
    return result is None or isinstance(result, plain)


def _named(node: Node) -> str:
    return ", ".join(f"`{root.name}`" for root in node.roots)


def refusal(node: Node, function: Function | str, reason: str) -> NoRuleError:
    """The error for a use of a parameter that cannot be bounded."""
    name = function if isinstance(function, str) else getattr(function, "__name__", str(function))
    return NoRuleError(
        f"{_named(node)} meets data in `{name}`, which cannot be clipped per record.",
        where=reason,
        why="a gradient that is not split by record cannot be bounded, and epsilon would be wrong",
        fix="freeze the parameter (requires_grad_(False)), or use a model variant with plain linear layers there",
    )


class _Escaped:
    """The hook of a derived value."""

    def __init__(self, node: Node) -> None:
        self._names = _named(node)

    def __call__(self, gradient: Tensor) -> None:
        raise NoRuleError(
            f"A value made from {self._names} received a gradient that no rule saw.",
            where="an operation outside torch's function dispatch, such as a custom autograd function",
            why="that part of its gradient would escape clipping",
            fix="freeze the parameter, or use the plain PyTorch form of that layer",
        )


_T: Any = torch.Tensor
_WEIGHT_PROPERTIES = {getattr(_T, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")}
_PLAIN = {
    _T.detach, torch.detach, _T.requires_grad_, _T.size, _T.dim, _T.numel, _T.stride, _T.is_floating_point,
    _T.__repr__, _T.__hash__, _T.__len__, _T.item, _T.tolist, _T.data_ptr, _T.element_size,
    _T.is_contiguous, _T.get_device, _T.storage_offset, _T.untyped_storage, torch.is_floating_point, torch.numel,
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like,
    _T.new_zeros, _T.new_empty, _T.new_ones, _T.new_full, _T.new_tensor,
}  # fmt: skip
_HOOKS = {_T.register_hook, _T.register_post_accumulate_grad_hook}


def _dispatch(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        name = getattr(function, "__name__", "")
        if name in ("__get__", "__set__") and function not in _WEIGHT_PROPERTIES:
            if name == "__set__" and function == _T.data.__set__ and not _same_storage(*args):
                raise _unfollowed(args[0], "its `.data` is replaced")
            return function(*args, **kwargs)
        if function in _PLAIN or not torch.is_grad_enabled():
            return function(*_unwrapped(args), **_unwrapped(kwargs))
        if function in _HOOKS:
            raise _unfollowed(args[0], "it is given a hook that may change its gradient")
        capture = next(
            (owner for tensor in tensors((args, kwargs)) if (owner := getattr(tensor, _CAPTURE, None)) is not None),
            None,
        )
        if capture is None or not capture.active:  # a derived value that outlived its pass refuses gradients itself
            return function(*args, **kwargs)
        return capture.rule(capture, function, args, kwargs)


def _same_storage(old: Tensor, new: Tensor) -> bool:
    """Nothing changes: a module that is moved to the type and device it has sets every `.data` to itself."""
    return old.data_ptr() == new.data_ptr() and old.dtype == new.dtype and old.shape == new.shape


def _unfollowed(tensor: Tensor, what: str) -> NoRuleError:
    node = node_of(tensor)
    return NoRuleError(
        f"{_named(node) if node is not None else 'A parameter'} is changed during the forward: {what}.",
        why="its gradient would no longer be that of the value which was used",
        fix="freeze the parameter, or leave that out of the forward",
    )


def _unwrapped(items: Any) -> Any:
    """Derived tensors as plain values; parameters stay themselves, so that their attributes are theirs."""
    return mapped(items, lambda item: _value(item) if isinstance(item, DerivedTensor) else item)
