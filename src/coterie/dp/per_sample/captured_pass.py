"""One forward and backward of a model whose every use of a trained parameter is seen, experts included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from coterie.dp.losses import Batch, LossFunction, batch_size, checked
from coterie.dp.per_sample.capture import Capture
from coterie.dp.per_sample.private_experts import PrivateExperts
from coterie.dp.per_sample.rules import apply_rule
from coterie.dp.per_sample.shared_batch import SharedBatch
from coterie.dp.per_sample.sites import Sites, Size
from coterie.dp.per_sample.switch_experts import rows_of_single_experts
from coterie.dp.per_sample.weight_expressions import Root
from coterie.errors import CoterieError, NoRuleError
from coterie.models import seam
from coterie.models.lora import expert_adapters, factors_stay_apart
from coterie.models.spread.spread import at_home
from coterie.models.streaming.streamer import WeightSource

Ready = Callable[[Root], None]
"""Called for each parameter as soon as all of its gradient is there."""


class CapturedPass:
    """Runs passes of one model.

    Args:
        model: as it is trained.
        loss_fn: ``loss_fn(model, batch) -> [B]``.
        parameters: that are captured, by name.
        lent_shapes: of parameters whose values ``source`` lends.
        source: of lent expert weights.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        parameters: Mapping[str, nn.Parameter],
        lent_shapes: Mapping[str, torch.Size],
        source: WeightSource | None,
    ) -> None:
        self.model = model
        self._loss_fn = loss_fn
        self._parameters: dict[str, nn.Parameter] = dict(parameters)
        self._lent_shapes: Mapping[str, torch.Size] = dict(lent_shapes)
        self._source = source

    def run(
        self, batch: Batch, ready: Ready, sites: Sites, shared: SharedBatch, probing: Size | None = None
    ) -> Tensor:
        """One pass; ``probing`` as in `Capture`, ``shared`` says whose records the experts see.

        Returns:
            [B] float32 losses, detached.

        Raises:
            NoRuleError: also where something fails that does not fail in the model by itself.
        """
        records = batch_size(batch)
        try:
            with self._capturing(records, ready, sites, shared, probing) as capture:
                losses = checked(self._loss_fn(self.model, batch), records)
                capture.backward(losses.float().sum())
        except (CoterieError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if self._fails_plainly(batch):
                raise
            used = "" if capture.last is None else f", where `{capture.last.roots[0].name}` was used last"
            raise NoRuleError(
                f"The model fails while its parameters are followed{used}: {type(error).__name__}: {error}",
                why="its gradients cannot be clipped per record, though it runs by itself",
                fix="freeze that parameter, or use the plain PyTorch form of that layer",
            ) from error
        return losses.detach().float()

    def _fails_plainly(self, batch: Batch) -> bool:
        """Whether forward or backward fail without a capture too: then the fault is the model's own."""
        try:
            with torch.random.fork_rng(devices=[]), at_home(self.model):
                loss = self._loss_fn(self.model, batch).sum()
                torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True)
        except Exception:
            return True
        return False

    @contextmanager
    def _capturing(
        self, records: int, ready: Ready, sites: Sites, shared: SharedBatch, probing: Size | None
    ) -> Iterator[Capture]:
        parameters, lent_shapes, source = self._parameters, self._lent_shapes, self._source
        with ExitStack() as stack:
            if (layers := shared.layers) is not None:
                adapters_by_name = stack.enter_context(layers.one_pass())
                here = {name: own for name, own in parameters.items() if name not in layers.shapes}
                parameters, lent_shapes, source = here | adapters_by_name, layers.lent_shapes, layers
            capture = Capture(parameters, records, apply_rule, ready, sites, probing)
            for name, shape in lent_shapes.items():
                capture.roots[name] = Root(torch.empty(shape, device="meta"), name=name)
            if seam.expert_layers(self.model):
                adapters = expert_adapters(self.model)
                stack.enter_context(factors_stay_apart(self.model))
                experts = PrivateExperts(capture, adapters, source)
                stack.enter_context(seam.computed_by(self.model, shared.computed(experts)))
            stack.enter_context(rows_of_single_experts(self.model, capture))
            stack.enter_context(capture)
            yield capture
