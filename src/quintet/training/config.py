"""The configuration of a training: the tables of its file, and their consistency."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from quintet.training.adapting import AdapterSettings
from quintet.training.bounds import above, at_least, at_most
from quintet.training.data import DataSettings
from quintet.training.evaluation import EvaluationSettings
from quintet.training.metrics import ReportSettings
from quintet.training.optimizers import OptimizerSettings
from quintet.training.parallel import ParallelSettings
from quintet.training.schedules import Number
from quintet.training.settings import SettingError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """The `[model]` table: the model to train.

    Attributes:
        from_: a checkpoint to begin with: a folder, or a hub id.
        revision: of a hub id.
        config: what a config.json would say, with `model_type`, of a model to begin anew; with
            `from`, the keys of its config.json that are to be others. "none" stands for null,
            which TOML has not.
        dtype: of the weights while they are trained; "auto" is what they were saved in.
        quantize: how the weights that an adapter is trained on are held: "int8", "int4", "nf4" or
            "fp8".
        attention: the attention of it; None for the best there is.
    """

    from_: str | None = None
    revision: str | None = None
    config: Mapping[str, Any] | None = None
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    quantize: Literal["int8", "int4", "nf4", "fp8"] | None = None
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None

    def __post_init__(self) -> None:
        if self.config is not None:
            # None given in Python is written down as a file can hold it.
            config = {key: "none" if v is None else v for key, v in self.config.items()}
            object.__setattr__(self, "config", config)
        if self.from_ is None and self.config is not None and "model_type" not in self.config:
            raise SettingError(
                "config.model_type",
                ": is missing; a model that begins anew needs it, such as qwen2",
            )
        if self.from_ is None and self.quantize is not None:
            raise SettingError.value(
                "quantize", self.quantize, "needs trained weights; name them by from"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSettings:
    """The `[tokenizer]` table.

    Attributes:
        from_: where it comes from; None for where the model does.
        chat_template: a file with the template of conversations, in place of its own.
    """

    from_: str | None = None
    chat_template: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageSettings:
    """The `[objective]` table of a model that learns to predict the next token.

    Attributes:
        z_loss: ζ of ζ·log²Z, which keeps logits small.
        label_smoothing: the share of a target that is spread over all ids.
        prediction: λ of the losses of prediction layers, a number or a schedule; None leaves
            these layers as they are.
    """

    kind: Literal["language"] = "language"
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    prediction: Number | None = None

    def __post_init__(self) -> None:
        at_least(self, z_loss=0, label_smoothing=0)
        if self.label_smoothing >= 1:
            raise SettingError.value("label_smoothing", self.label_smoothing, "has to be below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceSettings:
    """The `[objective]` table of a model that learns which of two answers is the better one.

    Attributes:
        beta: β, how far the model may go from the reference.
        loss: "sigmoid" for DPO's, or "ipo".
        label_smoothing: how often the preferences are taken to be the wrong way round.
        reference: the model that answers are compared with; None for the one that is trained, as
            it was before the first step: without an adapter that is new, with one that is gone
            on with.
        reference_free: compare with a model to which all answers are alike.
    """

    kind: Literal["preference"]
    beta: float = 0.1
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    reference: str | None = None
    reference_free: bool = False

    def __post_init__(self) -> None:
        above(self, "beta")
        at_least(self, label_smoothing=0)
        if self.label_smoothing >= 0.5:
            raise SettingError.value("label_smoothing", self.label_smoothing, "has to be below 0.5")
        if self.reference is not None and self.reference_free:
            raise SettingError.value(
                "reference", self.reference, "contradicts reference_free = true; leave one out"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationSettings:
    """The `[objective]` table of a model that learns another's predictions.

    Attributes:
        teacher: the other model: a folder, or a hub id, of the same ids.
        temperature: what logits are divided by.
        share: how much of what is minimised the teacher is; the rest is the next token itself.
    """

    kind: Literal["distillation"]
    teacher: str
    temperature: float = 1.0
    share: float = 1.0

    def __post_init__(self) -> None:
        above(self, "temperature")
        if not 0 <= self.share <= 1:
            raise SettingError.value("share", self.share, "has to be from 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceSettings:
    """The `[balance]` table: how the experts of a model are kept busy alike.

    Attributes:
        bias: how far the biases of the routers move in a step, a number or a schedule
            (DeepSeek-V3); None leaves them.
        sequence: α of the loss by texts (DeepSeek-V3).
        expert: α of the loss of experts (DeepSeek-V2).
        device: α of the loss of devices (DeepSeek-V2).
        communication: α of the loss of what is sent to devices (DeepSeek-V2).
        devices: of how many devices these two speak.
        reached: to how many of them a token goes at the most.
        auxiliary: α of the loss of a share times a probability (Qwen2-MoE).
        z: α of the loss of large router logits (Qwen2-MoE).
        scope: over what the shares of `auxiliary` are counted: a "sequence", a part of a step
            ("micro"), or the whole step ("global").
        capacity: how many times its share a device computes; what is beyond is dropped in training
            (DeepSeek-V2). None drops nothing.
        exempt: the share of texts that nothing is dropped of.
    """

    bias: Number | None = None
    sequence: Number | None = None
    expert: Number | None = None
    device: Number | None = None
    communication: Number | None = None
    devices: int = 8
    reached: int = 3
    auxiliary: Number | None = None
    z: Number | None = None
    scope: Literal["sequence", "micro", "global"] = "global"
    capacity: float | None = None
    exempt: float = 0.1

    def __post_init__(self) -> None:
        at_least(self, devices=1, reached=1, exempt=0)
        above(self, "capacity")
        if self.exempt > 1:
            raise SettingError.value("exempt", self.exempt, "has to be from 0 to 1")
        if self.reached > self.devices:
            raise SettingError.value("reached", self.reached, f"exceeds devices = {self.devices}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """The `[train]` table: how long, and how a step is run.

    Attributes:
        folder: where all of it is written: settings, metrics, checkpoints.
        steps: how many steps there are; exactly one of the three budgets.
        tokens: how many tokens are read, padding aside.
        minutes: how long the processor works for it. A run that is measured by a clock ends
            elsewhere each time, and is not resumed to the bit.
        batches: how many batches of the data a step reads; a number, or a schedule for steps that
            grow along the way.
        parts: in how many parts a batch is cut, one after the other, to need less memory.
        seed: what begins anew is drawn from, and dropout.
        threads: of the processor; None for what PyTorch takes.
        recompute: run layers again in the backward pass in place of keeping what it needs; of so
            many layers the first, if a number.
        compile: compile the layers by torch.compile.
        skips: how many steps in a row may be left out because their numbers are not finite;
            one more ends the training.
    """

    folder: str = "run"
    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    batches: Number = 1.0
    parts: int = 1
    seed: int = 0
    threads: int | None = None
    recompute: bool | int = False
    compile: bool = False
    skips: int = 3

    def __post_init__(self) -> None:
        given = [key for key in ("steps", "tokens", "minutes") if getattr(self, key) is not None]
        if len(given) != 1:
            problem = f"has {', '.join(given)}" if given else "has none of them"
            raise SettingError(
                "", f" {problem}: name one budget, steps, tokens or minutes, such as steps = 1000"
            )
        at_least(self, steps=1, tokens=1, parts=1, seed=0, threads=1, skips=0)
        # A number of threads beyond this is a slip, and PyTorch would start them.
        at_most(self, threads=4096, seed=2**63 - 1)
        above(self, "minutes")
        if isinstance(self.batches, float) and self.batches < 1:
            raise SettingError.value("batches", self.batches, "has to be at least 1")
        if not self.folder:
            raise SettingError.value("folder", self.folder, "has to be the path of a folder")
        if not isinstance(self.recompute, bool):
            at_least(self, recompute=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSettings:
    """The `[checkpoint]` table: how often a run is saved.

    Attributes:
        every: after how many steps.
        minutes: after how many minutes, too.
        keep: how many checkpoints are kept; beside them the best.
    """

    every: int | None = None
    minutes: float = 10.0
    keep: int = 2

    def __post_init__(self) -> None:
        at_least(self, every=1, keep=1)
        above(self, "minutes")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """Everything that decides a training; each field is a table of its file."""

    model: ModelSettings = field(default_factory=ModelSettings)
    adapter: AdapterSettings | None = None
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    data: DataSettings
    objective: LanguageSettings | PreferenceSettings | DistillationSettings = field(
        default_factory=LanguageSettings
    )
    balance: BalanceSettings = field(default_factory=BalanceSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    train: TrainSettings
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    report: ReportSettings = field(default_factory=ReportSettings)

    def __post_init__(self) -> None:
        if self.adapter is not None and self.balance.bias is not None:
            raise SettingError(
                "balance.bias",
                ": moves the biases of the model itself, which an [adapter] leaves as they are; "
                "take one of the two out",
            )
        if self.model.quantize is not None and self.adapter is None:
            raise SettingError.value(
                "model.quantize",
                self.model.quantize,
                "weights of fewer bits are not trained; add an [adapter], which is",
            )
