"""`isolation: exact`: every record, or user, computed so that no other one can change a bit of it.

In a physical batch the rounding of a record's forward depends on the length that its batch is padded to and on whose
rows share its experts' products; weights can be crafted that turn those last bits into several times the clip norm.
Here each record is a batch of its own, and its clipped gradient is added as integers on the noise's grid. What it
adds is then a function of the record, the weights and randomness of its own, and its norm is at most C, whatever the
weights are and however the gradient came about: it is measured on the very numbers that are added.

Shape letters: G gradient groups.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coterie.dp.isolation.grid_sums import GridSums, squares, whole
from coterie.dp.isolation.lone_experts import LoneExperts
from coterie.dp.isolation.model_state import ModelState
from coterie.dp.losses import Batch, batch_size, checked
from coterie.dp.noise.discrete_gaussian import GRID_SIGMA
from coterie.dp.per_sample.engine import Engine
from coterie.dp.per_sample.gradient_groups import Diagnostics
from coterie.dp.per_sample.gradient_sums import Sums
from coterie.dp.per_sample.gram import SqNorms
from coterie.dp.per_sample.probe import synthetic_batch
from coterie.dp.refusals import check_batch
from coterie.errors import PrivacyError
from coterie.models import seam
from coterie.models.autograd import backward, on_accumulated
from coterie.models.lora import expert_adapters, factors_stay_apart

Isolation = Literal["exact", "fast"]

_HALF = (torch.bfloat16, torch.float16)
_TOKENS = 5
"""Length of the made-up record of the trial at set-up."""


def computes_in_half(model: nn.Module) -> bool:
    """Whether a model computes in a half-precision format, by its parameters or under autocast."""
    return any(p.dtype in _HALF for p in model.parameters()) or any(
        torch.is_autocast_enabled(device) for device in ("cpu", "cuda")
    )


def chosen(setting: Isolation | None, half_precision: bool, against_hosts: bool = False) -> Isolation:
    """The isolation that holds: as set; else exact against hosts that choose the weights, and in half precision."""
    return setting or ("exact" if against_hosts or half_precision else "fast")


def make_engine(isolation: Isolation, *args: Any, **options: Any) -> Engine:
    """The engine of one isolation; arguments are those of `Engine`."""
    return (ExactEngine if isolation == "exact" else Engine)(*args, **options)


class ExactEngine(Engine):
    """An `Engine` whose sums are integers, and which takes one record at a time.

    Gradients are autograd's, of each record alone, whole; ``method`` decides nothing. What a pass leaves in the
    model's modules is put back before the next. Arguments and attributes are those of `Engine`; ``eta`` is 0.

    Cost: a forward and backward, a squared norm and an addition of the size of the model for every record; 8 bytes
    of sums for every trained value, and one gradient more in memory.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self._sharing.spread:
            raise PrivacyError(
                "isolation: exact is not possible where experts are spread over ranks.",
                code="dp-spread-exact",
                why="an owner of experts sees rows of several records at once, whose products round together",
                fix="train with whole models at each rank (devices alone), or set isolation: fast",
            )
        own = {name: self._accumulate_on or parameter.device for name, parameter in self.parameters.items()}
        self._elsewhere = self._accumulate_on or torch.device("cpu")
        devices = {name: own.get(name, self._elsewhere) for name in self.shapes}
        self._grid = GridSums(self.shapes, devices)
        self._step_of: Callable[[str], float] = lambda name: self.sensitivity / GRID_SIGMA
        self._state: ModelState | None = None
        self._threads = torch.get_num_threads()
        self._tried = False
        if any(device.type == "cuda" for device in self.devices()):
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def _multiplies_on_tensor_cores(self) -> bool:
        """Its gradients are autograd's: there are no products of norms and sums."""
        return False

    def _eta(self) -> float:
        """The slack that is added to a norm covers all that follows; see `_squares`."""
        return 0.0

    @property
    def on_grid(self) -> ExactEngine:
        """Itself: sums are integers."""
        return self

    def use_grid(self, step_of: Callable[[str], float]) -> None:
        """Count in other steps from the next sum on.

        Args:
            step_of: the grid's step by parameter name, public and positive; default: ``sensitivity`` over 2^24.
        """
        self._step_of = step_of

    def prepare(self, batch: Batch) -> None:
        """As `Engine.prepare`; also tries a made-up record, so that what cannot be repeated is refused at set-up."""
        super().prepare(batch)
        if not self._tried:
            self._gradients(synthetic_batch(self.model, batch, 1, _TOKENS))
            self._state = None
            self._tried = True

    def accumulate(self, batch: Batch, counted: int | None = None) -> Diagnostics:
        """Add the clipped gradient of one record.

        Args:
            batch: of one record, in the shape that follows from it alone.
            counted: 0 to compute it and add zeros.

        Raises:
            PrivacyError: several records; something that cannot be repeated bit by bit.
        """
        losses, gradients = self._gradients(batch)
        return self._add_clipped(losses, gradients, 0.0 if counted == 0 else 1.0)

    def accumulate_user(self, batches: Iterable[Batch]) -> Diagnostics:
        """Add one user's gradient, summed over batches of one record each and clipped once."""
        total: Sums = {}
        loss = torch.zeros(1)
        for batch in batches:
            losses, gradients = self._gradients(batch)
            loss += losses.cpu()
            for name, gradient in gradients.items():
                wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                total[name] = wide if name not in total else total[name].add_(wide)
        return self._add_clipped(loss, total, 1.0)

    def begin(self, lot: str) -> None:
        """Start anew; ranks of whole models exchange nothing before the sums."""
        self.take()

    def take(self) -> Sums:
        """The sums so far in grid steps, an int64 tensor for every trained parameter, and start anew."""
        self._state = None
        return self._grid.take()

    def _add_clipped(self, losses: Tensor, gradients: Mapping[str, Tensor], weight: float) -> Diagnostics:
        squared = {name: squares(gradient) for name, gradient in gradients.items()}
        groups = self.gradient_groups
        factors, diagnostics = groups.factors(self._squares(squared), losses)
        if not bool(diagnostics.masked.any()):
            scale = {name: weight * float(factors[groups.index(name), 0]) / self._step_of(name) for name in gradients}
            self._grid.add(gradients, squared, scale)
        return diagnostics

    def _squares(self, squared: Mapping[str, list[float]]) -> SqNorms:
        """[G, 1] squared norms, with a slack that is twice what all roundings from here to the sum can amount to.

        With d values: adding the squares up is off by at most a part in 2^53 / d. The root, the division by it, by
        the step, and the product with each value are a few more parts in 2^53. Rounding toward zero only helps.
        """
        value = torch.zeros(len(self.groups), 1, dtype=torch.float64)
        for name, parts in squared.items():
            value[self.gradient_groups.index(name)] += whole(parts)
        count = sum(math.prod(shape) for shape in self.shapes.values())
        return SqNorms(value, value * ((count + 64) * 2.0**-52))

    def _gradients(self, batch: Batch) -> tuple[Tensor, Sums]:
        """The loss [1] and the gradients of one record, from a model that knows of no other."""
        if batch_size(batch) != 1:
            raise PrivacyError(
                f"{batch_size(batch)} records came in one batch.",
                code="dp-isolation-batch",
                why="with isolation: exact a record's shape and company must not depend on other records",
                fix="collate and pass every record alone",
            )
        check_batch(batch, self.model)
        # Products may round by where their operands begin; what torch allocates begins alike every time.
        alone = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
        if self._state is None:
            self._state = ModelState(self.model)
        adapters = expert_adapters(self.model)
        experts = LoneExperts(adapters, self._source, frozenset(self.lent_shapes), self._elsewhere)
        try:
            with ExitStack() as stack:
                stack.enter_context(_SWITCHES.repeatable(self._threads))
                stack.enter_context(factors_stay_apart(self.model))
                stack.enter_context(seam.computed_by(self.model, experts))
                gradients = stack.enter_context(_own_gradients(self.parameters, self._accumulate_on))
                losses = checked(self.loss_fn(self.model, alone), 1)
                if losses.requires_grad:
                    backward(losses.float().sum())
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            raise PrivacyError(
                "an operation of the model gives other bits each time it runs.",
                code="dp-isolation-repeat",
                where=str(error).splitlines()[0][:200],
                why="with isolation: exact a record's bits must not depend on what ran before it",
                fix="use an operation that torch can run deterministically, or set isolation: fast",
            ) from error
        finally:
            self._state.put_back()
        return losses.detach().float(), gradients | experts.gradients


@contextmanager
def _own_gradients(parameters: Mapping[str, nn.Parameter], keep_on: torch.device | None) -> Iterator[Sums]:
    """Inside, gradients go into what is yielded as soon as they are formed; the caller's come back afterwards.

    Args:
        parameters: by name.
        keep_on: device that they go to; None: their own.
    """
    found: Sums = {}

    def taking(name: str) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.to(keep_on or parameter.device)
            found[name] = gradient if name not in found else found[name] + gradient
            parameter.grad = None

        return take

    before = {name: parameter.grad for name, parameter in parameters.items()}
    hooks = [on_accumulated(parameter, taking(name)) for name, parameter in parameters.items()]
    for parameter in parameters.values():
        parameter.grad = None
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in parameters.items():
            parameter.grad = before[name]


class _Switches:
    """torch's switches for operations that give the same bits for the same input; they are the whole process's.

    Engines of several threads, as of a federation in one process, may compute at once: whoever comes first keeps what
    was set, and whoever leaves last puts it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._put_back: Callable[[], None] = lambda: None

    @contextmanager
    def repeatable(self, threads: int) -> Iterator[None]:
        """How a product is shared out over threads decides how it is rounded, so their number is fixed."""
        with self._lock:
            if not self._inside:
                self._put_back = _as_set()
            self._inside += 1
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            _use_threads(threads)
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._put_back()


def _as_set() -> Callable[[], None]:
    """Puts the switches back as they are now."""
    on, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    deterministic: Any = torch.utils.deterministic
    fill, threads = deterministic.fill_uninitialized_memory, torch.get_num_threads()

    def put_back() -> None:
        torch.use_deterministic_algorithms(on, warn_only=warn_only)
        deterministic.fill_uninitialized_memory = fill
        _use_threads(threads)

    return put_back


def _use_threads(count: int) -> None:
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


_SWITCHES = _Switches()
