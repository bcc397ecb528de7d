"""The cut: a model's forward and backward in parts, so that no backward ever waits for the wire.

PyTorch runs backward on one thread per CUDA device. If an owner waited for a remote expert inside it, the same
party's expert host could not use that thread, and two parties would wait for each other for ever. So the graph of a
micro-batch begins anew (`coterie.models.cut.graph`) at three places:

- at what a decoder layer with experts receives (forward pre-hook), and at what it returns (forward hook);
- at what the experts return. Between what went in and this stands a `RowsExchange`, which is asked outside autograd.

No family needs code here, and where the borders lie decides the cost, not the result: a tensor that goes around one
(a shared dictionary, a captured output) is followed through its own graph.
docs/decisions/0001-cut-at-moe-boundaries.md tells what else was considered.

Shape letters: N tokens, K experts chosen per token, D model width, R routed rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from transformers.modeling_layers import GradientCheckpointingLayer

from coterie.errors import ModelError
from coterie.models.cut.device_lock import DeviceLock, RandomState
from coterie.models.cut.graph import Border, ExpertsEvent, GradientSink, Restarts
from coterie.models.seam import ExpertLayer, ExpertsCall, RoutedRows, select

_Arguments = tuple[Any, ...]


class RowsExchange(Protocol):
    """Computes experts for one micro-batch, near or far. Called outside autograd; it may wait."""

    def answers_rows(self, layer: ExpertLayer) -> bool:
        """Whether `forward` returns every expert's own output, so that this party weights and sums them.

        Must be true for a layer whose ``layout.has_post_expert_norm``: the norm's weight belongs to the trunk.
        """
        ...

    def forward(self, call: ExpertsCall, keep: bool) -> tuple[Tensor, Any]:
        """Ask the experts.

        Args:
            call: tensors without history.
            keep: whether `backward` will follow; if not, nobody need remember anything.

        Returns:
            A new tensor and a ticket for `backward`. The tensor is the weighted sum [N, D] in the hidden states'
            dtype; or, where `answers_rows`, [R, D] in the order of ``RoutedRows.of(expert_ids)``, before a
            post-expert norm and the routing weights.
        """
        ...

    def backward(self, ticket: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients at the hidden states [N, D] and the routing weights [N, K] (None where `answers_rows`).

        Args:
            ticket: what `forward` returned beside its output.
            grad: gradient at what `forward` returned, same shape and dtype.
        """
        ...


class AddToGrad:
    """A `GradientSink` that accumulates into ``parameter.grad``, as ``loss.backward()`` does."""

    def expect(self, visits: Mapping[Tensor, int]) -> None:
        pass

    def add(self, parameter: Tensor, grad: Tensor | None) -> None:
        if grad is None:
            return
        if parameter.grad is None:
            parameter.grad = grad.detach().clone()
        else:
            parameter.grad += grad


class Cut:
    """Makes a model's MoE layers go through a `RowsExchange`, and its backward run in parts.

    Args:
        model: any model with layers behind the experts interface. Its expert parameters are not touched and may be
            on the meta device.
        device_lock: shared by everything that computes on the same device.

    Attributes:
        layers: the model's MoE layers.
        device_lock: see `DeviceLock`.

    Raises:
        ModelError: the model has no MoE layer behind the experts interface.
    """

    def __init__(self, model: nn.Module, device_lock: DeviceLock | None = None) -> None:
        self.device_lock = device_lock or DeviceLock()
        self.layers: list[ExpertLayer] = select(model, self)
        self.active: Tape | None = None
        self._hooks = ExitStack()
        for module in decoder_layers(model, self.layers):
            for handle in (
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave),
            ):
                self._hooks.callback(handle.remove)

    def record(self, exchange: RowsExchange, *, seed: int | None = None) -> Tape:
        """A context for one training micro-batch: run the model and the loss inside it, then `Tape.backward`.

        Args:
            exchange: computes this micro-batch's experts.
            seed: start of this micro-batch's own random state (dropout, router noise), so that it does not depend on
                what other micro-batches in flight draw. None: the process's random state.
        """
        return Tape(self, exchange, training=True, seed=seed)

    def inference(self, exchange: RowsExchange) -> Tape:
        """A context for a forward without gradients: the exchange is only ever asked for `RowsExchange.forward`."""
        return Tape(self, exchange, training=False)

    def close(self) -> None:
        """Take the hooks off the model. Select another implementation (`seam.select`) before using it again."""
        self._hooks.close()

    def __call__(self, call: ExpertsCall) -> Tensor:
        """What a MoE layer runs."""
        return self._tape(call.layer.name).experts(call)

    def _enter(
        self, module: nn.Module, args: _Arguments, kwargs: dict[str, Any]
    ) -> tuple[_Arguments, dict[str, Any]] | None:
        tape = self._tape(type(module).__name__)
        return tape.enter(module, args, kwargs) if tape.training else None

    def _leave(self, module: nn.Module, args: _Arguments, output: Any) -> Any:
        tape = self._tape(type(module).__name__)
        return tape.leave(module, output) if tape.training else None

    def _tape(self, where: str) -> Tape:
        if self.active is None:
            raise ModelError(
                "A model that is cut for an exchange was called outside of a recording.",
                code="model-not-recording",
                where=where,
                why="its experts are computed elsewhere, and nobody would be asked for them",
                fix="call it inside `with cut.record(exchange)` or `with cut.inference(exchange)`",
            )
        return self.active


def decoder_layers(model: nn.Module, layers: Sequence[ExpertLayer]) -> list[nn.Module]:
    """The modules at whose borders the graph is cut: for each MoE layer the innermost decoder layer around it.

    That is the innermost module that transformers can checkpoint, or else the innermost member of a list of modules.
    A MoE layer outside of any has none: the result is the same, only slower.
    """
    modules: dict[nn.Module, None] = {}
    for layer in layers:
        parts = layer.name.split(".")
        around = [(model.get_submodule(".".join(parts[:n])), parts[n - 1]) for n in range(len(parts) - 1, 0, -1)]
        checkpointed = [module for module, _ in around if isinstance(module, GradientCheckpointingLayer)]
        listed = [module for module, name in around if name.isdigit()]
        for module in (checkpointed or listed)[:1]:
            modules[module] = None
    return list(modules)


@dataclass
class _Received:
    """What the experts of one call returned, for as long as checkpointing may ask for it again.

    Attributes:
        visit: which entry into a decoder layer the call happened in.
        value: None where nothing is recomputed.
    """

    visit: int
    value: Tensor | None


@dataclass
class _Visit:
    """A decoder layer that is running: which entry this is, whether it will be recomputed, and what it received."""

    number: int
    recomputed: bool
    inputs: list[tuple[Tensor, int]]


class Tape:
    """One micro-batch: records its parts while the model runs, and runs them backward.

    Use it as a context manager. Inside, it holds the lock except while the exchange works.

    Attributes:
        training: whether a backward will follow.
    """

    def __init__(self, cut: Cut, exchange: RowsExchange, *, training: bool, seed: int | None = None) -> None:
        self.training = training
        self._cut, self._exchange = cut, exchange
        self._random = RandomState(seed) if seed is not None else None
        self._holding = False
        self._modes = ExitStack()
        self._restarts = Restarts()
        self._visits: list[_Visit] = []
        self._entries = 0
        self._received: dict[int, list[_Received]] = defaultdict(list)
        self._in_backward = False
        self._asked_again: dict[tuple[int, int], int] = defaultdict(int)

    def __enter__(self) -> Self:
        self._acquire()
        self._modes.enter_context(torch.set_grad_enabled(self.training))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._modes.close()
        self._restarts = Restarts()
        self._received.clear()
        if self._holding:
            self._release()

    def backward(self, loss: Tensor, sink: GradientSink | None = None) -> None:
        """Run everything backward: trunk gradients go to ``sink``, expert gradients stay with their hosts.

        The exchange is asked for exactly one backward per forward. Can be called once.

        Args:
            loss: scalar, computed inside this recording.
            sink: default: ``parameter.grad``.

        Raises:
            ModelError: the loss has no history, or depends on another micro-batch's graph.
        """
        assert self._holding, "backward belongs inside the recording"
        assert not self._in_backward, "a recording can be run backward once"
        self._in_backward = True
        self._restarts.backward(loss, sink or AddToGrad(), self._ask_backward)

    # ---- what the model does ----

    def enter(self, module: nn.Module, args: _Arguments, kwargs: dict[str, Any]) -> tuple[_Arguments, dict[str, Any]]:
        """Restart every tensor with a history that a decoder layer receives, also inside tuples.

        Other containers pass as they are, since the layer may write into them.
        """
        if not torch.is_grad_enabled():
            raise _reentrant(type(module).__name__)
        visit = _Visit(self._entries, _may_recompute(module), [])
        restart, border = self._restarting(visit.inputs)
        args, kwargs = (
            _map_tensors(args, restart),
            {name: _map_tensors(value, restart) for name, value in kwargs.items()},
        )
        if not self._in_backward:
            self._entries += 1
            self._visits.append(visit)
            self._restarts.record(border)
        return args, kwargs

    def leave(self, module: nn.Module, output: Any) -> Any:
        """Restart every tensor with a history that a decoder layer returns."""
        restart, border = self._restarting([])
        if not self._in_backward:
            visit = self._visits.pop()
            if any(tensor._version != version for tensor, version in visit.inputs):
                raise _written_input(type(module).__name__)
        output = _map_tensors(output, restart)
        if not self._in_backward:
            self._restarts.record(border)
        return output

    def experts(self, call: ExpertsCall) -> Tensor:
        """Ask the exchange; in a recomputation, return what it answered in the forward."""
        out = self._answer_again(call.layer) if self._in_backward else self._ask_forward(call)
        if not self._exchange.answers_rows(call.layer):
            return out
        if call.layer.layout.has_post_expert_norm:
            out = call.layer.module.post_expert_norm(out)  # type: ignore[operator]
        rows = RoutedRows.of(call.expert_ids_NK, call.layer.num_experts)
        return rows.combine(out, call.routing_weights_NK, call.hidden_ND.dtype)

    # ---- asking ----

    def _ask_forward(self, call: ExpertsCall) -> Tensor:
        hidden, weights = call.hidden_ND, call.routing_weights_NK
        if self.training and not torch.is_grad_enabled():
            raise _reentrant(call.layer.name)
        detached = ExpertsCall(call.layer, hidden.detach(), call.expert_ids_NK, weights.detach())
        with self._waiting():
            value, ticket = self._exchange.forward(detached, keep=self.training)
        if not self.training:
            return value
        visit = self._visits[-1] if self._visits else _Visit(-1, True, [])
        # The model may write into what it receives, so what is kept is a copy.
        self._received[call.layer.index].append(_Received(visit.number, value.clone() if visit.recomputed else None))
        rows = self._exchange.answers_rows(call.layer)
        sources = (_edge(hidden), None if rows else _edge(weights))
        out, key = self._restarts.restart(value)
        self._restarts.record(ExpertsEvent(sources, key, value.shape, value.dtype, value.device, ticket))
        return out

    def _answer_again(self, layer: ExpertLayer) -> Tensor:
        """What the experts returned in the forward, for a checkpointed layer that is being recomputed.

        Each backward task recomputes a layer at most once, so calls are counted per task.
        """
        received = self._received[layer.index]
        count = self._asked_again
        key = (torch._C._current_graph_task_id(), layer.index)
        number = count[key]
        count[key] += 1
        if len({one.visit for one in received}) > 1 or number >= len(received) or received[number].value is None:
            raise _unknown_recompute(layer)
        value = received[number].value
        assert value is not None
        return self._restarts.throwaway(value.clone())

    def _ask_backward(self, ticket: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        with self._waiting():
            return self._exchange.backward(ticket, grad)

    # ---- the lock ----

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Release the lock. After an error it stays released: this micro-batch is over."""
        self._release()
        yield
        self._acquire()

    def _acquire(self) -> None:
        self._cut.device_lock.acquire()
        self._holding, self._cut.active = True, self
        if self._random is not None:
            self._random.enter()

    def _release(self) -> None:
        if self._random is not None:
            self._random.leave()
        self._holding, self._cut.active = False, None
        self._cut.device_lock.release()

    def _restarting(self, inputs: list[tuple[Tensor, int]]) -> tuple[Callable[[Tensor], Tensor], Border]:
        border = Border()

        def restart(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            if self._in_backward:
                return self._restarts.throwaway(tensor.detach())
            inputs.append((tensor, tensor._version))
            border.sources.append(get_gradient_edge(tensor))
            restarted, key = self._restarts.restart(tensor.detach())
            border.restarts.append(key)
            return restarted

        return restart, border


def _edge(tensor: Tensor) -> GradientEdge | None:
    return get_gradient_edge(tensor) if tensor.requires_grad else None


def _may_recompute(module: nn.Module) -> bool:
    """Whether the layer's forward may run again in the backward."""
    if isinstance(module, GradientCheckpointingLayer):
        return module.training and bool(module.gradient_checkpointing)
    return True


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with its tensors changed, also inside tuples (which nobody can write into)."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = [_map_tensors(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _written_input(layer: str) -> ModelError:
    return ModelError(
        f"{layer} writes into a tensor that it was given.",
        code="model-writes-input",
        why="what came before it would see the change in its values but not in its gradient",
        fix="write `x = x + y` instead of `x += y` where x is an argument of the layer",
    )


def _reentrant(layer: str) -> ModelError:
    return ModelError(
        f"{layer} runs without gradients inside a training recording.",
        code="model-reentrant-checkpoint",
        why="its experts would be asked twice and its gradient would not pass through the exchange",
        fix='model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})',
    )


def _unknown_recompute(layer: ExpertLayer) -> ModelError:
    return ModelError(
        f"{layer.name} is recomputed in a way that coterie cannot follow.",
        code="model-recompute",
        why="it is not clear which of the expert outputs received in the forward belongs here",
        fix="switch gradient checkpointing off, or use the one of transformers on the whole decoder layer",
    )
