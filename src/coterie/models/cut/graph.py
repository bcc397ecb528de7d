"""An autograd graph in pieces: where each piece begins, and the order in which to run them backward.

A piece begins at a *restart*: a tensor with the value of its *source* and no history. The gradient that arrives at a
restart is handed to its source: unchanged at a border, through whoever computes the experts at an experts call.

Restarts are visited last to first. Sources wait until all of their gradient is known, and are run backward
together with every other source that leads to the same border: so a piece is usually run once. At an experts call,
before that, autograd is asked for the gradient at the call's restart alone, and visits only the short path there.

The result does not depend on where the restarts are. A restart's gradient is the sum over all sources that lead to
it; those are recorded later than it, so each has its whole gradient before it is run; and each is run exactly once
for every restart and parameter it leads to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from coterie.errors import ModelError
from coterie.models.autograd import applied

_END = -1
"""In place of a border: sources that lead to parameters only are run when everything else is done."""


class GradientSink(Protocol):
    """Where the trunk's gradients go."""

    def expect(self, visits: Mapping[Tensor, int]) -> None:
        """Called once, before the backward: how often `add` will be called for each parameter."""
        ...

    def add(self, parameter: Tensor, grad: Tensor | None) -> None:
        """One share of a parameter's gradient; None counts as a visit and adds nothing.

        Do not write into ``grad``: autograd may have given the same memory to somebody else.
        """
        ...


class _Restart(torch.autograd.Function):
    """``apply(anchor, box, owner, key)``: the tensor in ``box`` with a history that begins here.

    Not a leaf tensor, because models may write into what they receive, and autograd forbids that for leaves.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, box: list[Tensor], owner: object, key: int) -> Tensor:
        ctx.restart_owner, ctx.restart_key = owner, key
        return box.pop()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        return None, None, None, None


@dataclass
class Border:
    """Entering or leaving a decoder layer: source i becomes restart i, gradients pass unchanged."""

    sources: list[GradientEdge] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)


@dataclass
class ExpertsEvent:
    """One call of a layer's experts.

    Attributes:
        sources: hidden states and routing weights; None where no gradient is wanted.
        restart: what the experts returned.
        shape, dtype, device: of it.
        ticket: what the exchange wants back in the backward.
    """

    sources: tuple[GradientEdge | None, GradientEdge | None]
    restart: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    ticket: Any


AskExperts = Callable[[Any, Tensor], tuple[Tensor | None, Tensor | None]]
"""``ask(ticket, grad)``: the gradients at hidden states and routing weights."""


@dataclass
class _Source:
    """A source on its way: where it leads, when it is run, and the gradient that it has by then."""

    edge: GradientEdge
    restarts: frozenset[int]
    parameters: tuple[Tensor, ...]
    run_at: int
    grad: Tensor | None = None


@dataclass
class _RestartPlan:
    """What the backward of one recording will do; made from the graph's shape alone.

    Attributes:
        sources: of each event, in its order; None for those that the loss does not depend on.
        by_border: the sources that are run together.
        visits: how often each parameter is given to the sink.
        retain: whether a run leaves the graph for another one.
    """

    loss: _Source
    sources: list[list[_Source | None]]
    by_border: dict[int, list[_Source]]
    visits: dict[Tensor, int]
    retain: dict[int, bool]


class Restarts:
    """The restarts of one micro-batch, in the order they were made.

    First `restart` what an event brings, then `record` the event.
    """

    def __init__(self) -> None:
        self._owner = object()
        self._anchor = torch.empty(0, requires_grad=True)
        self._events: list[Border | ExpertsEvent] = []
        self._event_of: list[int] = []
        self._nodes: list[Node] = []
        self._grads: dict[int, Tensor] = {}

    def restart(self, value: Tensor) -> tuple[Tensor, int]:
        """``value``, which must have no history, as the begin of a new piece; and the restart's number."""
        restarted = self.throwaway(value, len(self._nodes))
        assert restarted.grad_fn is not None
        self._nodes.append(restarted.grad_fn)
        self._event_of.append(len(self._events))
        return restarted, len(self._nodes) - 1

    def throwaway(self, value: Tensor, key: int = -1) -> Tensor:
        """Like a restart, but not recorded: for a recomputation, whose graph is thrown away."""
        return applied(_Restart, self._anchor, [value], self._owner, key)

    def record(self, event: Border | ExpertsEvent) -> None:
        """Put an event behind the others."""
        self._events.append(event)

    def backward(self, loss: Tensor, sink: GradientSink, ask: AskExperts) -> None:
        """Run all pieces, last to first, and give the parameters' gradients to ``sink``.

        Every recorded experts call is asked exactly once, with zeros if the loss does not depend on it.

        Args:
            loss: a scalar with a history.
            sink: gets each parameter's gradient, as soon as it is whole.
            ask: called outside autograd; may wait.

        Raises:
            ModelError: the loss has no history, or leads into the graph of another recording.
        """
        if not loss.requires_grad:
            raise ModelError(
                "The loss does not depend on anything that can be trained.",
                code="model-loss-without-gradient",
                fix="compute it from the model's output inside the recording, without torch.no_grad()",
            )
        plan = self._plan(get_gradient_edge(loss))
        sink.expect(plan.visits)
        plan.loss.grad = torch.ones_like(loss)
        pending = [plan.loss]
        for index in reversed(range(len(self._events))):
            event, sources = self._events[index], plan.sources[index]
            if isinstance(event, ExpertsEvent):
                grads: Iterable[Tensor | None] = ask(event.ticket, self._grad_at_experts(event, pending))
            else:
                pending = self._run(index, plan, pending, sink)
                grads = [self._grads.pop(key, None) for key in event.restarts]
            for source, grad in zip(sources, grads, strict=True):
                if source is not None and grad is not None:
                    source.grad = grad
                    pending.append(source)
            self._events[index] = Border()  # lets the graph behind it go
            plan.sources[index] = []
        self._run(_END, plan, pending, sink)

    def _grad_at_experts(self, event: ExpertsEvent, pending: list[_Source]) -> Tensor:
        """The gradient at what the experts returned. Autograd visits only the paths from ``pending`` to there."""
        known = self._grads.pop(event.restart, None)
        leading = [source for source in pending if event.restart in source.restarts]
        if leading:
            (grad,) = _gradients(leading, [self._edge(event.restart)], retain=True)
            known = grad if known is None or grad is None else known + grad
        return torch.zeros(event.shape, dtype=event.dtype, device=event.device) if known is None else known

    def _run(self, border: int, plan: _RestartPlan, pending: list[_Source], sink: GradientSink) -> list[_Source]:
        """Run the sources that wait for a border; returns the others."""
        planned = plan.by_border.pop(border, [])
        parameters = _unique(parameter for source in planned for parameter in source.parameters)
        ready = [source for source in pending if source.run_at == border]
        grads: dict[Tensor, Tensor | None] = {}
        if ready:
            # Experts calls behind this border were served by `_grad_at_experts` already.
            keys = _unique(key for source in ready for key in source.restarts if self._event_of[key] <= border)
            reached = _unique(parameter for source in ready for parameter in source.parameters)
            inputs = [*(self._edge(key) for key in keys), *reached]
            all_grads = _gradients(ready, inputs, plan.retain[border]) if inputs else []
            for key, grad in zip(keys, all_grads, strict=False):
                if grad is not None:
                    self._grads[key] = self._grads[key] + grad if key in self._grads else grad
            grads = dict(zip(reached, all_grads[len(keys) :], strict=True))
        for parameter in parameters:
            sink.add(parameter, grads.get(parameter))
        return [source for source in pending if source.run_at != border]

    def _edge(self, key: int) -> GradientEdge:
        return GradientEdge(self._nodes[key], 0)

    # ---- planning ----

    def _plan(self, loss: GradientEdge) -> _RestartPlan:
        """Where every source leads, when to run it, and which graph is needed again after that."""
        nodes_of: dict[int, set[Node]] = defaultdict(set)
        by_border: dict[int, list[_Source]] = defaultdict(list)

        def look(edge: GradientEdge, made_at: int) -> _Source:
            source, nodes = self._look(edge, made_at)
            nodes_of[source.run_at] |= nodes
            by_border[source.run_at].append(source)
            return source

        whole = look(loss, len(self._events))
        reached = set(whole.restarts)
        sources: list[list[_Source | None]] = [[] for _ in self._events]
        for index in reversed(range(len(self._events))):
            event = self._events[index]
            if isinstance(event, ExpertsEvent):
                wanted = list(event.sources)
            else:
                pairs = zip(event.sources, event.restarts, strict=True)
                wanted = [edge if key in reached else None for edge, key in pairs]
            sources[index] = [None if edge is None else look(edge, index) for edge in wanted]
            reached.update(key for source in sources[index] if source is not None for key in source.restarts)
        visits: dict[Tensor, int] = defaultdict(int)
        for group in by_border.values():
            for parameter in _unique(parameter for source in group for parameter in source.parameters):
                visits[parameter] += 1
        return _RestartPlan(whole, sources, dict(by_border), dict(visits), _needed_again(nodes_of))

    def _look(self, edge: GradientEdge, made_at: int) -> tuple[_Source, set[Node]]:
        """Follow a source's history to the restarts and parameters where it begins; also what lies between."""
        seen, inner = {edge.node}, set[Node]()
        waiting: list[Any] = [edge.node]  # nodes; what ours and the accumulating ones carry has no declared type
        restarts: dict[int, None] = {}
        parameters: dict[Tensor, None] = {}
        while waiting:
            node = waiting.pop()
            owner = getattr(node, "restart_owner", None)
            if owner is not None:
                if owner is not self._owner or self._event_of[node.restart_key] >= made_at:
                    raise _leak()
                restarts[node.restart_key] = None
                continue
            if hasattr(node, "variable"):
                parameters[node.variable] = None
                continue
            inner.add(node)
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    waiting.append(following)
        borders = [self._event_of[key] for key in restarts]
        run_at = max((i for i in borders if isinstance(self._events[i], Border)), default=_END)
        return _Source(edge, frozenset(restarts), tuple(parameters), run_at), inner


def _needed_again(nodes_of: Mapping[int, set[Node]]) -> dict[int, bool]:
    """For each border, whether a later run (an earlier border) visits some of the same graph."""
    retain, later = {}, set[Node]()
    for border in sorted(nodes_of):
        retain[border] = not later.isdisjoint(nodes_of[border])
        later |= nodes_of[border]
    return retain


def _gradients(sources: list[_Source], inputs: list[Any], retain: bool) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(
        [source.edge for source in sources],
        inputs,
        [source.grad for source in sources],
        retain_graph=retain,
        allow_unused=True,
    )


def _unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


def _leak() -> ModelError:
    return ModelError(
        "The graph of this micro-batch leads into the graph of another one.",
        code="model-graph-leak",
        where="backward of a recording",
        why="the gradient would be wrong: the other recording has already been run, or is run by itself",
        fix="do not keep outputs, caches or hidden states of one micro-batch for the next without .detach()",
    )
