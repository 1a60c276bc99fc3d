"""Recipes of a study: arms (what is compared) and a scale (how much of it this machine can afford)."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from anchor.config.fields import FileStem, Fraction, ModelPathText, PositiveInt, Section, Seed, UserPath
from anchor.config.load import load_recipe
from anchor.errors import ConfigError, did_you_mean

LearningRate = Annotated[float, Field(gt=0.0)]
Candidates = Annotated[tuple[LearningRate, ...], Field(min_length=2)]


class Arm(Section):
    """One training run per seed, and its starting point."""

    label: str
    """Name in tables and plots."""
    after: FileStem | None = None
    """Arm of the same seed whose export this one starts from; by default the base model."""
    recipe: FileStem
    """Training recipe beside the arms' file, without `.yaml`."""
    overrides: tuple[str, ...] = ()
    """`section.key=value` for this arm only."""
    steps: Literal["none", "stage1", "stage2"] | None = None
    """Length of the run: no steps, or the scale's `stage1_steps` or `stage2_steps`."""
    compute_of: tuple[FileStem, ...] = ()
    """Instead of `steps`: as many steps as cost the FLOPs of these arms together."""
    decoded: bool = False
    """True to decode the arm's embeddings: for arms that reconstruct, and those they are compared with."""

    @model_validator(mode="after")
    def _one_length(self) -> "Arm":
        if (self.steps is None) == (not self.compute_of):
            raise ValueError("give either steps or compute_of")
        return self

    @property
    def has_curve(self) -> bool:
        """Return whether the arm is drawn over the steps of Stage II.

        Contrastive arms are drawn; arms of equal compute appear as their end point.
        """
        return self.steps == "stage2" or bool(self.compute_of)


class ArmsRecipe(Section):
    """Arms of a study, in the order in which they are run and shown."""

    arms: Annotated[dict[FileStem, Arm], Field(min_length=1)]
    """Arms by name; file names of the results begin with it."""
    baseline: FileStem
    """Arm that the others' differences are measured against."""

    @model_validator(mode="after")
    def _arms_exist(self) -> "ArmsRecipe":
        seen: list[str] = []
        for name, arm in self.arms.items():
            for other in (*([arm.after] if arm.after else []), *arm.compute_of):
                if other not in seen:
                    raise ValueError(
                        f"arms.{name} names '{other}', which is no arm above it{did_you_mean(other, seen)}"
                    )
            seen.append(name)
        if self.baseline not in seen:
            raise ValueError(f"baseline is '{self.baseline}', which is no arm{did_you_mean(self.baseline, seen)}")
        return self


class StudyEvaluation(Section):
    """Scoring of every cell."""

    tasks: tuple[str, ...]
    """Names of mteb tasks, as mteb defines them."""
    retrieval_queries: PositiveInt
    """Questions of the retrieval task made from `retrieval_source`, evenly spaced among those it can answer."""
    retrieval_documents: PositiveInt
    """Paragraphs of that task: the first ones of its source."""
    decoded_pairs: PositiveInt
    """Held-out pairs whose document embeddings are decoded into queries."""
    dtype: Literal["bf16", "fp32"]
    """Compute dtype of embedding and decoding."""


class StudyRecipe(Section):
    """Scale of a study: the file that `python -m bench.study` runs."""

    arms: UserPath
    """File of :class:`ArmsRecipe`; the training recipes and `pack.yaml` are beside it."""
    base: ModelPathText
    """Model folder, hub name or `.gguf` file that all arms start from."""
    pairs: UserPath
    """Folder of the training pairs in E5 layout, `NAME.jsonl[.gz]`."""
    retrieval_source: FileStem
    """Source in that folder that is never trained on; its pairs make the retrieval task."""
    mteb: UserPath
    """Offline copy of the mteb tasks' data, by hub path."""
    work_dir: UserPath
    """Folder of data, runs and logs; may be deleted once the results exist."""
    results_dir: UserPath
    """Folder of the cells' JSON, tables and plots."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    """Seeds of the study. Each stage derives another seed of batch order, dropout and adapters from them."""
    ranks: PositiveInt
    """Processes of a training run on this machine; DeepSpeed's launcher starts them if there are several."""
    stage1_steps: PositiveInt
    """Steps of Stage I and of its control."""
    stage2_steps: PositiveInt
    """Steps of Stage II."""
    curve_steps: tuple[PositiveInt, ...] = ()
    """Steps of Stage II, ascending, that are evaluated besides the last. Arms of `compute_of` are evaluated only at
    their end: the middle of their schedule compares with nothing."""
    warmup_fraction: Fraction
    """Share of a run's steps for warm-up, at least one step. Then the learning rate falls linearly to zero."""
    learning_rates: Annotated[dict[FileStem, LearningRate | Candidates], Field(default_factory=dict)]
    """Learning rates by training recipe or arm, in place of the recipe's: rates that suit so few steps, see `--tune`. A
    recipe's rate is for those of its arms that have no rate of their own, here or in their `overrides`. From a list,
    the study tunes the arm of that name before its seeds and takes the rate with the lowest held-out loss."""
    heldout_pairs: PositiveInt
    """Number of pairs of every source, the last ones, that are held out for learning rates and decoding."""
    pack: tuple[str, ...] = ()
    """`section.key=value` for pack.yaml."""
    train: tuple[str, ...] = ()
    """`section.key=value` for every training recipe; an arm's own overrides come after."""
    evaluation: StudyEvaluation
    """Scoring of every cell."""

    @model_validator(mode="after")
    def _ascending(self) -> "StudyRecipe":
        if list(self.curve_steps) != sorted(set(self.curve_steps)):
            raise ValueError(f"curve_steps ({', '.join(map(str, self.curve_steps))}) must ascend")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds ({', '.join(map(str, self.seeds))}) names one twice")
        return self

    @property
    def recipes(self) -> Path:
        """Folder of the training recipes."""
        return self.arms.parent


def load_arms(study: StudyRecipe) -> ArmsRecipe:
    """Load the arms that a scale names.

    Raises:
        ConfigError: the file is missing or malformed, a recipe does not exist, or a learning rate fits no arm.
    """
    arms = load_recipe(study.arms, ArmsRecipe)
    for name, arm in arms.arms.items():
        if not (study.recipes / f"{arm.recipe}.yaml").is_file():
            known = (path.stem for path in study.recipes.glob("*.yaml"))
            raise ConfigError(
                f"{study.arms}: arms.{name}: no recipe '{arm.recipe}' in {study.recipes}"
                f"{did_you_mean(arm.recipe, known)}"
            )
    used = {arm.recipe for arm in arms.arms.values()} | set(arms.arms)
    for name, rate in study.learning_rates.items():
        if name not in used:
            raise ConfigError(f"learning_rates: no arm is '{name}' or has such a recipe{did_you_mean(name, used)}")
        if isinstance(rate, tuple) and name not in arms.arms:
            raise ConfigError(f"learning_rates.{name}: a list is tuned on the arm of that name, and there is none")
    return arms


def chosen_arms(arms: ArmsRecipe, only: str | None) -> list[str]:
    """Return the names from ``--only A,B`` in the arms' order, or all names when None.

    Raises:
        ConfigError: an arm is unknown.
    """
    wanted = list(arms.arms) if only is None else only.split(",")
    for name in wanted:
        if name not in arms.arms:
            raise ConfigError(f"--only: no arm is called '{name}'{did_you_mean(name, arms.arms)}")
    return [name for name in arms.arms if name in wanted]
