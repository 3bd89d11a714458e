"""Thresholds of the detectors: the `detect` section of a policy. Steps are updates, losses nats a token."""

from pydantic import BaseModel, ConfigDict, Field


class DetectSettings(BaseModel):
    """Every threshold, with its origin. research = measured on recorded runs; others are conventions of the field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spike_sigma: float = Field(6.0, gt=0, description="leaves the band; OLMo-core's skip-step rule also has 6")
    return_sigma: float = Field(2.0, gt=0, description="back within this of the extrapolated trend")
    return_steps: int = Field(10, ge=1, description="for so many steps")
    recover_steps: int = Field(50, ge=1, description="not back after these: unrecovered, unless it is falling")
    recover_steps_max: int = Field(250, ge=1, description="real spikes healed by themselves after 55, 65, 140 steps")
    unrecovered_nats: float = Field(0.1, ge=0, description="smaller lasting excesses are level shifts")
    window_rows: int = Field(128, ge=16, description="of healthy rows; OLMo-core's length")
    min_rows: int = Field(16, ge=4, description="rows before the band is trusted")
    scale_floor: float = Field(0.003, gt=0, description="share of the loss; bf16-rounded losses have no spread")
    cold_share: float = Field(0.25, gt=0, description="before the band is trusted only such a jump is a spike")
    drift_rows: int = Field(16, ge=8, description="rows of a block whose medians are compared")
    drift_share: float = Field(0.02, gt=0, description="rise over the lowest block, as a share of the loss")
    drift_nats: float = Field(0.04, gt=0, description="and at least so much: below the 0.1 nats that count as damage")
    immediate_steps: int = Field(25, ge=1, description="non-finite before these: immediate_nan")
    nan_after_load_steps: int = Field(10, ge=1, description="non-finite so soon after a restore")
    skipped_streak: int = Field(
        3, ge=1, description="skipped updates in a row that are an incident, of whatever reason"
    )
    skipped_share: float = Field(0.01, gt=0, description="or this share of the last 1,000 steps")
    clip_block_steps: int = Field(250, ge=16, description="steps of a block whose clipped share and norm are compared")
    clip_share: float = Field(0.5, gt=0, le=1, description="clipped in a block, and twice that of the lowest one")
    clip_norm_factor: float = Field(3.0, gt=1, description="and so much more norm; BERT's grew by 2.5, harmlessly")
    plateau_share: float = Field(0.002, gt=0, description="improvement of the last quarter below this is a plateau")
    plateau_noisy_share: float = Field(0.01, ge=0, description="or below this, where noise hides any improvement")
    plateau_dead: float = Field(0.5, gt=0, le=1, description="or so many dead or saturated units in a layer group")
    initial_share: float = Field(0.2, gt=0, description="of ln(vocabulary): the first loss of a fresh model is so near")
    low_share: float = Field(0.2, gt=0, lt=1, description="below the trend within 200 steps")
    low_wait_steps: int = Field(200, ge=1, description="for an evaluation that says whether it is real")
    shard_sigma: float = Field(6.0, gt=0, description="a shard's excess over its own kind")
    shard_nats: float = Field(0.7, gt=0, description="and at least so much")
    shard_reads: int = Field(3, ge=2, description="batches at least that must show it")
    shard_alpha: float = Field(0.005, gt=0, lt=1, description="chance per run that any innocent shard is convicted")
    repeated_window_steps: int = Field(2500, ge=1, description="in which spikes are counted against those before")
    repeated_spikes: int = Field(3, ge=2, description="at least so many, and twice those of the window before")
    planned_change_steps: int = Field(200, ge=0, description="after a planned change a jump is a level shift")
    validation_rise: float = Field(0.02, gt=0, description="nats above the best, in three evaluations running")
    ratio_factor: float = Field(4.0, gt=1, description="update ratio over LR, against its own band")
    activation_factor: float = Field(5.0, gt=1, description="activation RMS against its own band")
    throughput_share: float = Field(0.7, gt=0, lt=1, description="of its own median is a drop")
    notice_streak: int = Field(5, ge=1, description="records in a row outside a band before a notice")
    discontinuity_share: float = Field(0.004, gt=0, description="mean difference of re-run losses, share of the loss")
    discontinuity_steps: int = Field(20, ge=1, description="re-run steps that are compared")
    lr_tolerance: float = Field(1e-3, gt=0, description="relative, between the LR applied and the LR planned")
