"""Which model is trained."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from coterie.config.base import LocalPath, Spec


class LoraSpec(Spec):
    """Low-rank adapters instead of full training (Hu et al., arXiv:2106.09685); needs the extra `coterie[lora]`."""

    rank: int = Field(default=8, gt=0, description="r: rank of every update.")
    alpha: float = Field(default=16.0, gt=0, description="Updates are scaled by alpha / rank.")
    experts: tuple[str, ...] = Field(
        default=("gate_up_proj", "down_proj"), description="Stacked expert parameters that get an adapter."
    )
    modules: tuple[str, ...] = Field(
        default=(),
        description="Linear layers of the trunk, and routers, that get one, by the end of their name: `q_proj`, ...",
    )

    def words(self) -> str:
        """What is trained, for statement and ledger."""
        named = ", ".join((*self.experts, *self.modules))
        return f"adapters of rank {self.rank} (LoRA) on {named}; everything else stays as it was loaded"


class ModelSpec(Spec):
    """A causal-LM Mixture-of-Experts model of transformers: name exactly one of `path`, `hub`, `family`."""

    path: LocalPath | None = Field(default=None, description="Folder of a Hugging Face checkpoint on this machine.")
    hub: str | None = Field(
        default=None, description="Name of a model on the Hugging Face hub; downloaded when missing."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of `hub`.")
    family: str | None = Field(
        default=None, description="transformers model type, for random weights; see docs/models.md."
    )
    config: dict[str, Any] = Field(
        default={}, description="Settings of the model's own config that replace its defaults."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Number format of weights, activations and gradients."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in backward: less memory, about a third more time."
    )
    provenance: str | None = Field(
        default=None,
        pattern=r"^(public|private|dp:\S+)$",
        description="What the weights were made from: `public`, `private`, or `dp:LEDGER_ID`. "
        "Random weights and hub models count as public; private training asks for it when `path` is used.",
    )
    not_covered: str | None = Field(
        default=None,
        min_length=1,
        description="With `provenance: private`: whose records the weights were made from. The final statement lists "
        "them as not covered; without it private training refuses such weights.",
    )

    overrule_origin: str | None = Field(
        default=None,
        min_length=1,
        description="Why `provenance` holds although the saved model itself says that it was trained on private text "
        "without privacy. The final statement repeats it; without it private training refuses such weights.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelSpec:
        named = [name for name in ("path", "hub", "family") if getattr(self, name) is not None]
        if len(named) != 1:
            found = " and ".join(named) if named else "none"
            raise ValueError(f"name exactly one of `path`, `hub`, `family` (found: {found})")
        if self.revision is not None and self.hub is None:
            raise ValueError("`revision` belongs to `hub`, which is not set")
        return self
