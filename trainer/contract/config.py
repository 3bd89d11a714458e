"""run.yaml: the whole configuration of a run. Units are in the names; unknown keys are errors.

Torch-free, because the supervisor validates it before anything starts. Defaults follow TRAINING's table: AdamW
(0.9, 0.95), weight decay 0.1, clip 1.0, cosine to 10 % of the peak.
"""

from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from trainer.contract.durations import StoredDurationS
from trainer.contract.secrets import plain_secrets


class Section(BaseModel):
    """Base of every section: frozen, and a key that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Section):
    """A pre-norm GPT with SDPA causal attention and tied embeddings."""

    layers: int = Field(12, ge=1)
    heads: int = Field(12, ge=1)
    width: int = Field(768, ge=8)
    vocab_size: int | None = Field(None, ge=2, description="None: the tokenizer's, rounded up to a multiple of 64")
    dropout: float = Field(0.0, ge=0, lt=1)
    bias: bool = False
    qk_norm: bool = False
    z_loss: float = Field(0.0, ge=0, description="weight of log(Z)^2; 1e-4 is common")
    embedding_grad_shrink: float = Field(1.0, gt=0, le=1, description="GLM-130B used 0.1; 1 is off")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class OptimizerConfig(Section):
    """AdamW with decoupled decay on tensors of two and more dimensions."""

    peak_lr: float = Field(6e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: float = Field(1.0, gt=0)


class SkipUpdateConfig(Section):
    """Leave out a finite update whose gradient norm is far above those before it."""

    sigma: float = Field(
        6.0, gt=0, description="robust standard deviations of ln(norm) above the median; OLMo-core's skip-step has 6"
    )
    min_ratio: float = Field(
        3.0, ge=1, description="and at least so many times the median: what is below is left to clipping"
    )
    window_steps: int = Field(128, ge=2, le=8192, description="updates whose norms make the band; OLMo-core's length")
    min_steps: int = Field(64, ge=1, description="norms before the band is trusted; OLMo-core's number")
    max_skips: int = Field(
        10, ge=1, description="within the window; then the update is applied and the band starts anew: a new level"
    )

    @model_validator(mode="after")
    def _window_suffices(self) -> Self:
        if self.min_steps + self.max_skips > self.window_steps:
            raise ValueError(
                f"window_steps {self.window_steps} must be at least min_steps {self.min_steps} + max_skips "
                f"{self.max_skips}, or the band would not be trusted while it skips"
            )
        return self


class AdaptiveClipConfig(Section):
    """Clip below `optimizer.clip_norm` where a norm is far above its moving average (ZClip, arXiv 2504.02507)."""

    method: Literal["zclip"] = "zclip"
    z: float = Field(2.5, gt=0, description="standard deviations above the average; ZClip's")
    alpha: float = Field(0.97, gt=0, lt=1, description="share of the old in the moving averages; ZClip's")
    warm_up_steps: int = Field(25, ge=2, description="norms that the averages start with; ZClip's")


class PreventionConfig(Section):
    """What is done about a bad gradient at once, beside `optimizer.clip_norm`; a non-finite update is never applied."""

    skip_update: SkipUpdateConfig | None = Field(None, description="null: off; {} turns it on")
    adaptive_clip: AdaptiveClipConfig | None = Field(None, description="null: off; {} turns it on")


class ScheduleConfig(Section):
    """Linear warm-up from 0, then cosine, warm-up-stable-decay (WSD) or constant."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(2000, ge=0)
    min_ratio: float = Field(0.1, ge=0, le=1, description="the minimum as a share of the peak")
    decay_steps: int | None = Field(None, ge=1, description="WSD: length of the final decay; None: a tenth")


class BatchConfig(Section):
    """One update. `micro_sequences` splits it for gradient accumulation."""

    sequences: int = Field(512, ge=1)
    sequence_tokens: int = Field(1024, ge=2)
    micro_sequences: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.micro_sequences and self.sequences % self.micro_sequences:
            raise ValueError(f"sequences {self.sequences} must be a multiple of micro_sequences {self.micro_sequences}")
        return self


Format = Literal["auto", "llmc", "raw_u16", "raw_u32", "npy", "megatron"]
LONE_SOURCE = "train"  # what a source that has no name of its own is called


def _without_password(url: str) -> str:
    if urlsplit(url).password is not None:
        raise ValueError("a password in a URL ends up in logs; use data.storage_options with {env: NAME}")
    return url


DataUrl = Annotated[str, AfterValidator(_without_password)]


class SourceConfig(Section):
    """One of several sources of training data."""

    source: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="its name, kept for the whole run")
    url: DataUrl = Field(description="URL of a directory with manifest.json, or with shards")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="its part of what is read, beside the others'")
    format: Format | None = Field(None, description="None: data.format")
    vocab_size: int | None = Field(None, ge=2, description="of data without a manifest; None: data.vocab_size")


class DataConfig(Section):
    """Token shards on any fsspec URL, prepared by `longwatch data prepare` or brought along."""

    train: DataUrl | tuple[SourceConfig, ...] = Field(
        description="URL of a directory with manifest.json, or with shards; or a list of sources that are blended"
    )
    validation: DataUrl | None = Field(None, description="URL of held-out shards; None: no evaluation")
    format: Format = "auto"
    vocab_size: int | None = Field(None, ge=2, description="of data without a manifest")
    seed: int = 1234
    block_samples: int = Field(64, ge=1, description="samples that lie together in a shard and stay together")
    window_blocks: int = Field(
        4, ge=1, description="samples are permuted among so many blocks: few is local, a batch draws on few shards"
    )  # fmt: skip
    read_ahead_blocks: int = Field(8, ge=1)
    timeout_s: float = Field(
        300.0, ge=0, description="how long an outage of the storage is waited for; at most half of deadlines.train"
    )
    cache_bytes: int = Field(1 << 30, ge=0, description="of the run directory's disk, for blocks of remote shards")
    storage_options: dict[str, Any] = Field(
        default_factory=dict, repr=False, description="of the filesystem; a secret is written {env: NAME}"
    )

    @field_validator("storage_options")
    @classmethod
    def _no_secret_as_text(cls, options: dict[str, Any]) -> dict[str, Any]:
        if found := ", ".join(plain_secrets(options)):
            raise ValueError(
                f"{found}: a secret would lie in plain text in the run directory; write {{env: NAME}} instead and "
                "set that environment variable"
            )
        return options

    @model_validator(mode="after")
    def _told_apart(self) -> Self:
        names = [source.source for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"train needs sources, each with a name of its own, got {names}")
        return self

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources of the training data; a URL alone is one source."""
        if isinstance(self.train, str):
            return (SourceConfig(source=LONE_SOURCE, url=self.train),)
        return self.train

    def places(self) -> list[tuple[str, Self]]:
        """Every URL with tokens, training and validation, each with this section as it holds for it."""
        training = [(source.url, self.of(source)) for source in self.sources]
        return training if self.validation is None else [*training, (self.validation, self)]

    def of(self, source: SourceConfig) -> Self:
        """This section as it holds for one source."""
        changes = {"format": source.format or self.format, "vocab_size": source.vocab_size or self.vocab_size}
        return self.model_copy(update=changes)


class EvaluateConfig(Section):
    """Validation on the same held-out samples each time."""

    every_steps: int = Field(1000, ge=1)
    sequences: int = Field(256, ge=1)
    hook: str | None = Field(None, description="'module:function'; gets the model, returns {name: number}")


class SpacingConfig(Section):
    """One good checkpoint in every so much time, for so long."""

    every: StoredDurationS = Field(gt=0)
    for_: StoredDurationS = Field(gt=0, alias="for")

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @model_validator(mode="after")
    def _worth_a_rule(self) -> Self:
        if self.every > self.for_:
            raise ValueError("`every` is longer than `for`, so nothing would be kept by it for as long as it says")
        return self


class CheckpointConfig(Section):
    """Full checkpoints on the store, and how they become good."""

    every_steps: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1000, description="auto: as often as the measured stall and the failures so far make best"
    )
    good_after_steps: int = Field(100, ge=1, description="K: healthy steps beyond it that make a checkpoint good")
    keep_good: int = Field(3, ge=2)
    keep_for: tuple[SpacingConfig, ...] = Field(
        (), description="dense near, sparse far: [{every: 1h, for: 1d}, {every: 1d, for: 30d}]"
    )
    patience_s: float = Field(
        0.0, ge=0, description="how long training may be held up to save at the very step that is due, if disk is slow"
    )  # fmt: skip
    keep_local: int = Field(
        2, ge=1, description="on the local disk: so many that are in the store, and so many that wait for it"
    )  # fmt: skip


class StoreConfig(Section):
    """Where checkpoints go: any fsspec URL. Secrets come from the environment or from a file, never from here."""

    url: str = "file://./store"
    endpoint_url: str | None = Field(None, description="of an S3-compatible server")
    key_env: str | None = Field(None, description="name of the environment variable with the access key")
    secret_env: str | None = Field(None, description="name of the environment variable with the secret")
    timeout_s: float = Field(60.0, gt=0, description="total deadline of every call")
    allow_unconditional: bool = Field(False, description="accept a store that ignores create-only writes")


class DeadlinesConfig(Section):
    """Longest silence of the main loop per phase, in seconds; stop is ordered by grace and kill."""

    spawn: float = Field(60, gt=0)
    import_: float = Field(300, gt=0, alias="import")
    load: float = Field(1800, gt=0)
    compile: float = Field(3600, gt=0)
    warm_up: float = Field(1800, gt=0)
    train: float = Field(600, gt=0)
    evaluate: float = Field(1800, gt=0)
    save: float = Field(1800, gt=0)
    leave: float = Field(1800, gt=0)
    grace_s: float = Field(120, gt=0, description="from SIGTERM to SIGKILL")
    orphan_s: float = Field(1800, gt=0, description="a trainer without a supervisor saves and leaves after this")
    learn_factor: float | None = Field(
        5.0, gt=1, description="train, evaluate and save: so many times the 99th percentile seen, if that is less"
    )
    learn_floor_s: float = Field(60.0, gt=0, description="but never less than this")

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class MonitorConfig(Section):
    """How often the dearer signals are taken."""

    update_ratio_every: int = Field(1, ge=1)
    details_every: int = Field(50, ge=1, description="activations and per-group gradient norms, logits, log Z")


class MetricsConfig(Section):
    """The Prometheus endpoint. Port 0 takes a free one; null serves none."""

    host: str = "127.0.0.1"
    port: int | None = Field(9108, ge=0, le=65535)


class PlannedChange(Section):
    """A change that will move the loss by intention: re-baselines for 200 steps, never rolled back."""

    step: int = Field(ge=1)
    what: str


class LaunchConfig(Section):
    """How the trainer is started. `command` replaces our own trainer by one that speaks the same contract."""

    command: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    env: dict[str, SecretStr] = Field(default_factory=dict)
    threads: int | None = Field(None, ge=1, description="CPU threads of the trainer; None: all cores")
    standby: bool = Field(True, description="keep a warm process for a fast restart (some 350 MB); our trainer only")
    logbook_minutes: float | None = Field(
        10.0, gt=0, description="report.html in the run directory is written this often, and at incidents; None: never"
    )


FaultKind = Literal[
    "nan_loss", "nan_grad", "lr_bomb", "lr_override", "bad_shard", "leak_targets", "zero_layer", "saturate_layer",
    "drop_optimizer_state", "bit_flip", "corrupt_checkpoint", "hang", "sigkill", "slow", "torn_write", "store_error",
    "oom", "loss_drift", "scale_qk", "grad_bomb",
]  # fmt: skip


class FaultConfig(Section):
    """One injected fault, for tests and drills. Off unless configured; every firing is counted and recorded.

    It fires when all given conditions hold: at `steps` [first, last], while the batch touches raw positions in
    `data` [begin, end), while it touches `shard`, and in `attempt`. `once` fires at most once per run (one step, or
    one window of `steps`), over all attempts; otherwise every time.
    """

    kind: FaultKind
    steps: tuple[int, int] | None = None
    data: tuple[int, int] | None = None
    shard: int | None = Field(None, ge=0)
    attempt: int | None = Field(None, ge=1)
    once: bool = True
    factor: float = Field(
        100.0,
        description="lr_bomb, lr_override, scale_qk, saturate_layer, grad_bomb: a factor; leak_targets: odds; "
        "slow: seconds; loss_drift: about so many nats a step, by growing noise on the weights",
    )
    target: Literal["weight", "gradient", "activation"] = "weight"
    chance: float = Field(1.0, gt=0, le=1, description="at each occasion, drawn anew in every attempt: a loose contact")
    mode: Literal["gil_held", "gil_free", "sigstop"] = "gil_free"
    layer: int = 0


class RunConfig(Section):
    """run.yaml as a whole."""

    version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    run_dir: str | None = Field(None, description="default: runs/NAME beside this file")
    policy: str | None = Field(None, description="path of a policy file; default: the shipped one")
    seed: int = Field(1337, ge=0, lt=2**63)
    steps: int = Field(ge=1, lt=2**53, description="planned number of updates")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    deterministic: bool = True
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    prevention: PreventionConfig = PreventionConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch: BatchConfig = BatchConfig()
    data: DataConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    store: StoreConfig = StoreConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()
    monitor: MonitorConfig = MonitorConfig()
    metrics: MetricsConfig = MetricsConfig()
    launch: LaunchConfig = LaunchConfig()
    planned_changes: tuple[PlannedChange, ...] = ()
    faults: tuple[FaultConfig, ...] = ()

    @model_validator(mode="after")
    def _warm_up_fits(self) -> Self:
        if self.schedule.warmup_steps > self.steps:
            raise ValueError(f"schedule.warmup_steps {self.schedule.warmup_steps} is more than steps {self.steps}")
        return self

    @model_validator(mode="after")
    def _time_outs_in_order(self) -> Self:
        """What is waited for must be over before whoever waits is taken for hung, or killed."""
        deadlines = self.deadlines
        ordered = (
            ("checkpoint.patience_s", self.checkpoint.patience_s, "deadlines.save", deadlines.save),
            ("store.timeout_s", self.store.timeout_s, "deadlines.save", deadlines.save),
        )
        for shorter, short_s, longer, long_s in ordered:
            if short_s > long_s:
                raise ValueError(
                    f"{shorter} ({short_s:g} s) must not be longer than {longer} ({long_s:g} s): what waits so long "
                    f"would be ended before; lower {shorter} or raise {longer}"
                )
        return self
