"""Operations without a rule, run again one record at a time.

Shape letters: B records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coterie.dp.per_sample.capture import Capture, Use, mapped, node_of, nodes, refusal, tensors
from coterie.dp.per_sample.guard import Guard
from coterie.dp.per_sample.rules_elementwise import settle_repeated
from coterie.dp.per_sample.sites import CONSTANT, Meaning
from coterie.dp.per_sample.terms import Dense, Term
from coterie.dp.per_sample.weight_expressions import Function, Kind, Node, same_numbers
from coterie.errors import CoterieError
from coterie.models.autograd import applied, applied_to_several

SMALL = 1 << 18
"""Most entries of a parameter whose unknown operation is replayed record by record."""


def replayed(capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], use: Use) -> Any:
    """The operation's results; the backward runs it again on each record's part of every input.

    What it gives then is compared with what it gave in the forward, so that an operation that mixes records, or draws
    random numbers, is refused.

    Raises:
        NoRuleError: a parameter is too large, or no result holds the records in a dimension of its own.
    """
    call = _Call(capture, function, args, kwargs, use)
    node = call.sources[0][0]
    if any(meaning == CONSTANT and source.value.numel() > SMALL for source, meaning in call.sources):
        raise refusal(
            node, function, f"there is no rule for it, and parameters of more than {SMALL} values are not replayed"
        )
    versions = [tensor._version for tensor, _ in call.inputs]
    with torch.no_grad():
        result = call.run([tensor for tensor, _ in call.inputs], [source.value for source, _ in call.sources])
    if versions != [tensor._version for tensor, _ in call.inputs]:
        raise refusal(node, function, "it writes into its inputs")
    parts = list(result) if isinstance(result, tuple | list) else [result]
    wanted = [part for part in parts if _differentiable(part)]
    call.results = capture.meanings(node, f"{call.name} results", wanted)
    if not any(meaning.dim >= 0 for meaning in call.results):
        raise refusal(node, function, "its result does not hold the records in a dimension of its own")
    for source, _ in call.sources:
        capture.expect(source)
    outputs = iter(applied_to_several(_Replay, capture.anchor, call, wanted, *(tensor for tensor, _ in call.inputs)))
    meanings = iter(call.results)
    error = refusal(node, function, "a result of it that does not hold the records in a dimension of its own is used")

    def taken(part: Any) -> Any:
        if not _differentiable(part):
            return part
        output, meaning = next(outputs), next(meanings)
        return output if meaning.dim >= 0 else applied(Guard, capture.anchor, output.detach(), error)

    return mapped(result, taken)


def _differentiable(part: Any) -> bool:
    return isinstance(part, Tensor) and (part.is_floating_point() or part.is_complex())


class _Call:
    """A function call with its data tensors and its nodes as holes, and what each has to do with records."""

    def __init__(
        self, capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], use: Use
    ) -> None:
        self.capture = capture
        self.function = function
        self.name = getattr(function, "__name__", str(function))
        self.results: Sequence[Meaning] = ()
        self._arguments = nodes((args, kwargs))
        of = list(zip(use.operands, use.meanings, strict=True))
        self.sources = [(node, meaning) for tensor, meaning in of if (node := node_of(tensor)) is not None]
        self.inputs = [(tensor, meaning) for tensor, meaning in of if node_of(tensor) is None]
        self._autocast = torch.is_autocast_enabled(use.operands[0].device.type)

    def run(self, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Any:
        """The result with these tensors in place of the data and of the parameters."""
        data, plain = iter(inputs), iter(weights)
        args, kwargs = mapped(self._arguments, lambda item: next(plain if isinstance(item, Node) else data))
        device = (*inputs, *weights)[0].device.type
        with torch.autocast(device, enabled=self._autocast):
            return self.function(*args, **kwargs)

    def of_record(self, tensor: Tensor, meaning: Meaning, record: int) -> Tensor:
        """A record's part of a tensor; all of a constant."""
        if meaning.dim < 0:
            return tensor
        each = tensor.shape[meaning.dim] // self.capture.batch
        return tensor.narrow(meaning.dim, record * each, each)


class _Replay(torch.autograd.Function):
    """Results that were computed already; see `replayed`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: _Call, results: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        outputs = tuple([result.detach().clone() for result in results])
        ctx.save_for_backward(*inputs, *outputs)
        ctx.call = call
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        call: _Call = ctx.call
        inputs, results = ctx.saved_tensors[: len(call.inputs)], ctx.saved_tensors[len(call.inputs) :]
        try:
            parts = _Parts(call, inputs, results, grads, ctx.needs_input_grad[3:])
            gradients_of = [_of_record(parts, record) for record in range(call.capture.batch)]
        except CoterieError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = f"it does not run on one record alone ({type(error).__name__}: {error})"
            raise refusal(call.sources[0][0], call.function, reason) from error
        by_leaf = list(zip(*gradients_of, strict=True))
        for (node, meaning), gradients in zip(call.sources, by_leaf[len(inputs) :], strict=True):
            call.capture.deliver(*_term(node, meaning, gradients, call.capture.batch))
        needs = ctx.needs_input_grad[3:]
        whole = [
            torch.cat(parts, meaning.dim) if need else None
            for parts, need, (_, meaning) in zip(by_leaf, needs, call.inputs, strict=False)
        ]
        return None, None, None, *whole


class _Parts(NamedTuple):
    """What a backward has in hand."""

    call: _Call
    inputs: Sequence[Tensor]
    results: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    needs: Sequence[bool]


def _of_record(parts: _Parts, record: int) -> list[Tensor]:
    """Gradients of one record's part of every input and parameter, zero where there is none."""
    call, inputs, results, grads, needs = parts
    with torch.enable_grad():
        leaves = [
            call.of_record(tensor, meaning, record).detach().requires_grad_(need)
            for tensor, (_, meaning), need in zip(inputs, call.inputs, needs, strict=True)
        ]
        weights = [
            call.of_record(node.value, meaning, record).detach().requires_grad_() for node, meaning in call.sources
        ]
        again = [part for part in tensors(call.run(leaves, weights)) if _differentiable(part)]
    chosen, given = [], []
    for out, result, meaning, grad in zip(again, results, call.results, grads, strict=True):
        if meaning.dim < 0:
            continue
        if not same_numbers(out, call.of_record(result, meaning, record)):
            reason = "run on one record alone it gives other numbers: it mixes the records, or draws random numbers"
            raise refusal(call.sources[0][0], call.function, reason)
        if grad is not None and out.requires_grad:
            chosen.append(out)
            given.append(call.of_record(grad, meaning, record))
    wanted = [leaf for leaf in (*leaves, *weights) if leaf.requires_grad]
    computed: Iterator[Tensor | None] = iter(())
    if chosen:
        computed = iter(torch.autograd.grad(chosen, wanted, given, allow_unused=True))
    gradients = [next(computed, None) if leaf.requires_grad else None for leaf in (*leaves, *weights)]
    return [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip((*leaves, *weights), gradients, strict=True)
    ]


def _term(node: Node, meaning: Meaning, gradients: Sequence[Tensor], batch: int) -> tuple[Node, Term]:
    if node.value.is_complex():
        real = torch.view_as_real(node.value)
        node = Node(real, node.roots, Kind.GENERAL, torch.view_as_real, (node,))
        gradients = [torch.view_as_real(gradient.resolve_conj()) for gradient in gradients]
    if meaning.dim < 0:
        return node, Dense(torch.stack(list(gradients)))
    if meaning.dim == 0:
        return settle_repeated(node, torch.cat(list(gradients)), batch)
    each = gradients[0].shape[meaning.dim]
    apart = gradients[0].new_zeros(batch, *node.value.shape)
    for record, gradient in enumerate(gradients):
        apart[record].narrow(meaning.dim, record * each, each).copy_(gradient)
    return node, Dense(apart)
