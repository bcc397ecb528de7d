"""Private figures decide nothing: schedules, callbacks and checkpoints that would choose by them, as objects too."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers.trainer_callback import CallbackHandler, TrainerCallback

from coterie.errors import PrivacyError

_METRIC_NAMES = {"metrics", "metric", "loss", "val_loss"}
_DEPTH = 4
_SHOWS_FIGURES = ("on_evaluate", "on_log", "on_predict", "on_prediction_step")
_FIX = "fix the number of steps in advance, or evaluate on public data and set evaluation_is_public"


def check_scheduler(scheduler: Any) -> None:
    """Refuse a schedule that looks at a metric, also inside accelerate's or another schedule's wrapper.

    Raises:
        PrivacyError: its ``step`` takes a metric.
    """
    for part in _reachable(scheduler, _DEPTH):
        if callable(getattr(type(part), "step", None)) and _takes_metric(type(part).step):
            raise refusal(
                f"the schedule {type(part).__name__} looks at a metric",
                "a rate that follows losses of private records reveals them, and no noise was added to them",
            )


def _takes_metric(step: Any) -> bool:
    try:
        return bool(_METRIC_NAMES & inspect.signature(step).parameters.keys())
    except ValueError:
        return False


def _reachable(value: Any, depth: int) -> Iterator[Any]:
    """A schedule and the schedules it holds; the optimizers they step are not looked into."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _reachable(item, depth)
        return
    if not callable(getattr(type(value), "step", None)) or hasattr(value, "param_groups"):
        return
    yield value
    if depth:
        for inner in vars(value).values() if hasattr(value, "__dict__") else ():
            yield from _reachable(inner, depth - 1)


class _History(list[dict[str, Any]]):
    """The log of a run, which holds every round's exact loss. It counts how often it is read.

    Attributes:
        reads: how often, length apart.
    """

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.reads += 1
        return super().__iter__()

    def __reversed__(self) -> Iterator[dict[str, Any]]:
        self.reads += 1
        return super().__reversed__()


class WatchedCallbacks(CallbackHandler):  # type: ignore[misc]
    """Trainer's callbacks, whose decisions may not come from private figures.

    A callback that is shown losses or metrics, or has read the run's log, and then stops, saves or changes a rate is
    undone and refused. Where the evaluation is public, what it decides in ``on_evaluate`` stands. Those of
    transformers itself go by steps and epochs; the ones that go by a metric are refused when they are added.
    """

    public_evaluation: bool
    readers: set[int]

    @classmethod
    def of(cls, handler: CallbackHandler, public_evaluation: bool = False) -> WatchedCallbacks:
        """The same callbacks, watched."""
        made = cls.__new__(cls)
        made.__dict__ = handler.__dict__
        made.public_evaluation = public_evaluation
        made.readers = set()
        return made

    def call_event(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if not isinstance(state.log_history, _History):
            state.log_history = _History(state.log_history)
        history = state.log_history
        for callback in list(self.callbacks):
            before, reads = _Decisions.of(control, self.optimizer), history.reads
            result = self._one(callback, event, args, state, control, **kwargs)
            control = control if result is None else result
            if history.reads > reads:
                self.readers.add(id(callback))
            if self._sees_figures(callback, event) and _Decisions.of(control, self.optimizer) != before:
                before.put_back(control, self.optimizer)
                raise refusal(
                    f"{type(callback).__name__} decides by what it is shown (in {event})",
                    "it sees losses and metrics of private records, and what it decides would reveal them",
                    "decide in on_evaluate, by the public evaluation alone" if self.public_evaluation else _FIX,
                )
        return control

    def _sees_figures(self, callback: Any, event: str) -> bool:
        if type(callback).__module__.partition(".")[0] in ("transformers", "coterie"):
            return False
        if self.public_evaluation:
            return event != "on_evaluate" and (_overrides(callback, "on_log") or id(callback) in self.readers)
        return id(callback) in self.readers or any(_overrides(callback, name) for name in _SHOWS_FIGURES)

    def _one(self, callback: Any, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        parts = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
        shared = {name: getattr(self, name) for name in parts}
        return getattr(callback, event)(args, state, control, **shared, **kwargs)


class _Decisions(NamedTuple):
    flags: tuple[bool, bool, bool]
    rates: tuple[Any, ...]

    @classmethod
    def of(cls, control: Any, optimizer: Any) -> _Decisions:
        groups = getattr(optimizer, "param_groups", ())
        flags = (control.should_training_stop, control.should_epoch_stop, control.should_save)
        return cls(flags, tuple(float(group["lr"] or 0.0) for group in groups))

    def put_back(self, control: Any, optimizer: Any) -> None:
        control.should_training_stop, control.should_epoch_stop, control.should_save = self.flags
        for group, rate in zip(getattr(optimizer, "param_groups", ()), self.rates, strict=True):
            group["lr"] = rate


def _overrides(callback: Any, name: str) -> bool:
    return getattr(type(callback), name, None) is not getattr(TrainerCallback, name)


def refusal(what: str, why: str, fix: str = _FIX) -> PrivacyError:
    """The error for a choice by private figures."""
    return PrivacyError(f"{what}; private training cannot use it.", code="hf-option", why=why, fix=fix)
