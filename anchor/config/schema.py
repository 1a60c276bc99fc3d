"""Schemas of the two recipes: packing data (:class:`PackRecipe`) and training (:class:`TrainRecipe`).

All models are frozen and forbid unknown keys. A field has a default only if the default suits everyone; coefficients
from a paper have none. The field name or its description states the unit.
"""

from anchor.config.objectives import (
    ContrastiveObjective,
    ContrastiveTerm,
    JointContrastive,
    LanguageModelObjective,
    ReconstructionObjective,
    SelfSupervisedObjective,
    Similarity,
)
from anchor.config.pack_recipe import (
    BatchShape,
    CappedMixture,
    ChatTemplate,
    Columns,
    CustomTemplate,
    E5Source,
    FilesSource,
    HubSource,
    PackRecipe,
    PresetTemplate,
    ProportionalMixture,
    SpecialTokensTemplate,
    TemperatureMixture,
    TextLimits,
)
from anchor.config.train_recipe import (
    BackboneSection,
    DataSection,
    EngineSection,
    EvaluationSection,
    FrozenTraining,
    FullTraining,
    LoraTraining,
    OptimSection,
    TelemetrySection,
    TrainRecipe,
)

__all__ = [
    "BackboneSection",
    "BatchShape",
    "CappedMixture",
    "ChatTemplate",
    "Columns",
    "ContrastiveObjective",
    "ContrastiveTerm",
    "CustomTemplate",
    "DataSection",
    "E5Source",
    "EngineSection",
    "EvaluationSection",
    "FilesSource",
    "FrozenTraining",
    "FullTraining",
    "HubSource",
    "JointContrastive",
    "LanguageModelObjective",
    "LoraTraining",
    "OptimSection",
    "PackRecipe",
    "PresetTemplate",
    "ProportionalMixture",
    "ReconstructionObjective",
    "SelfSupervisedObjective",
    "Similarity",
    "SpecialTokensTemplate",
    "TelemetrySection",
    "TemperatureMixture",
    "TextLimits",
    "TrainRecipe",
]
