"""Settings files as frozen models: train.yaml, federation.yaml, party.yaml.

An unknown key is an error, every field has a description, and `load_yaml` reports all problems of a file at once.

In reading order: `coterie.config.base` is what all share, `coterie.config.numbers` the numbers,
`coterie.config.load` the files. `coterie.config.train` and `coterie.config.federation` are the files' whole
content; `coterie.config.model`, `coterie.config.data`, `coterie.config.privacy` and `coterie.config.report` are
blocks in them.
"""

from coterie.config.base import LocalPath, Spec, content_hash
from coterie.config.data import DataSpec, TokenizerSpec, TokenizerTraining
from coterie.config.federation import (
    FederationConfig,
    FederationTrainSpec,
    MemberAddress,
    PartyConfig,
    TranscriptSpec,
    party_privacy,
)
from coterie.config.load import dump_yaml, load_yaml
from coterie.config.model import LoraSpec, ModelSpec
from coterie.config.privacy import PartyPrivacy, PreconditionerSpec, PrivacyRules, PrivacySpec
from coterie.config.train import OptimSpec, TrainConfig, TrainSpec, due

__all__ = [
    "DataSpec",
    "FederationConfig",
    "FederationTrainSpec",
    "LocalPath",
    "LoraSpec",
    "MemberAddress",
    "ModelSpec",
    "OptimSpec",
    "PartyConfig",
    "PartyPrivacy",
    "PreconditionerSpec",
    "PrivacyRules",
    "PrivacySpec",
    "Spec",
    "TokenizerSpec",
    "TokenizerTraining",
    "TrainConfig",
    "TrainSpec",
    "TranscriptSpec",
    "content_hash",
    "due",
    "dump_yaml",
    "load_yaml",
    "party_privacy",
]
