"""The typed schema of every config: unknown keys, ranges and combinations are checked before anything is loaded.

Hydra composes YAML, `check` turns it into one of the frozen classes below or raises `UserError` naming the key.
Options of the networks carry no defaults here: what YAML leaves out takes the default of the class in `ldm.nn`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic import NonNegativeFloat as Fraction0
from pydantic import NonNegativeInt as Count0

from ldm.cli import CONF_DIR, nearest
from ldm.errors import UserError
from ldm.files import WEIGHT_SUFFIXES, load_yaml

Stage = Literal["autoencoder", "clip", "diffusion"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Probability = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # torch's generators take 64 bits; `seed + i` must fit too
Sampler = Literal["ddim", "ddpm", "euler", "euler_a", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "unipc"]
Spacing = Literal["leading", "linspace", "trailing", "karras", "exponential"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    def options(self) -> dict[str, Any]:
        """Return the options that the config states, for a constructor that holds the defaults of the others."""
        return {key: value for key, value in self.model_dump().items() if value is not None}


class Target(BaseModel):
    """Something that the user plugs in by dotted path; the other keys are its arguments."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)
    target: str = Field(alias="_target_", min_length=1)

    def node(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True)


# ------------------------------------------------------------------------------------------------------------- data


class Wording(Section):
    """How captions become prompts: `{caption}`, and any other column of the row, put into a template."""

    caption_template: str
    caption_prefix: str
    caption_suffix: str


class HubSection(Wording):
    kind: Literal["hub"]
    path: str = Field(min_length=1)
    subset: str | None
    split: str
    revision: str | None
    image_column: str
    caption_column: str | Annotated[list[str], Field(min_length=1)]
    streaming: bool


class FolderSection(Wording):
    kind: Literal["folder"]
    path: str = Field(min_length=1)
    caption_column: str


class ShardsSection(Wording):
    kind: Literal["shards"]
    path: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)]
    caption_key: str = Field(min_length=1)
    streaming: bool


class CustomSection(Section):
    kind: Literal["custom"]
    source: Target


def _not_streamed(value: bool) -> bool:
    if value:
        raise ValueError("a mix must know its pictures beforehand, it cannot stream: leave streaming=false")
    return value


class Weighted(Section):
    """One of several sources; `weight` is its share of the training samples, relative to the others'."""

    weight: PositiveFloat = 1.0


class HubPart(HubSection, Weighted):
    _no_stream = field_validator("streaming")(_not_streamed)


class FolderPart(FolderSection, Weighted):
    pass


class ShardsPart(ShardsSection, Weighted):
    _no_stream = field_validator("streaming")(_not_streamed)


class CustomPart(CustomSection, Weighted):
    pass


Channel = Annotated[int, Field(ge=0, le=255)]


class DataBase(Section):
    """How pictures are cut and fed, wherever they come from."""

    resolution: PositiveInt
    batch_size: PositiveInt
    num_workers: Count0
    cache: bool | Literal["build"]
    cache_on_device: bool
    cache_dtype: Literal["fp32", "bf16", "fp16"]
    num_val: PositiveInt
    max_bad: Probability
    buckets: bool
    crop: Literal["centre", "random"]
    flip: bool
    variants: Annotated[int, Field(ge=2)]
    background: tuple[Channel, Channel, Channel]

    @model_validator(mode="after")
    def _streams_are_not_indexed(self) -> Self:
        if not getattr(self, "streaming", False):
            return self
        if self.buckets:
            raise ValueError("streaming=true meets pictures as they come, and buckets=true must know all sizes before")
        if self.cache:
            raise ValueError("streaming=true is for sets that are not kept: it needs cache=false")
        return self

    @model_validator(mode="after")
    def _cache_is_there(self) -> Self:
        if self.cache_on_device and not self.cache:
            raise ValueError("cache_on_device=true needs a cache: leave cache=true")
        return self


class ShapesData(DataBase):
    kind: Literal["shapes"]
    objects: Literal[1, 2]
    num_train: PositiveInt
    seed: Seed


class HubData(DataBase, HubSection):
    pass


class FolderData(DataBase, FolderSection):
    pass


class ShardsData(DataBase, ShardsSection):
    pass


class CustomData(DataBase, CustomSection):
    pass


def _kind(value: Any) -> Any:
    return value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)


Part = Annotated[
    Annotated[HubPart, Tag("hub")]
    | Annotated[FolderPart, Tag("folder")]
    | Annotated[ShardsPart, Tag("shards")]
    | Annotated[CustomPart, Tag("custom")],
    Discriminator(_kind),
]


class MixData(DataBase):
    kind: Literal["mix"]
    sources: dict[str, Part]

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.sources:
            raise ValueError("mix has no sources: add each as +source@data.sources.<name>=folder (or hub, or shards)")
        return self


Data = Annotated[
    Annotated[ShapesData, Tag("shapes")]
    | Annotated[HubData, Tag("hub")]
    | Annotated[FolderData, Tag("folder")]
    | Annotated[ShardsData, Tag("shards")]
    | Annotated[MixData, Tag("mix")]
    | Annotated[CustomData, Tag("custom")],
    Discriminator(_kind),
]
KINDS = ("shapes", "hub", "folder", "shards", "mix", "custom")

# --------------------------------------------------------------------------------------------------------- networks

Widths = Annotated[list[PositiveInt], Field(min_length=1)]


class VAE(Section):
    """`pretrained` is taken as it is; with `autoencoder` in stages it is what that stage goes on from."""

    pretrained: str | None = None
    in_channels: Literal[1, 3, 4] | None = None
    block_out_channels: Widths | None = None
    layers_per_block: PositiveInt | None = None
    latent_channels: PositiveInt | None = None
    norm_num_groups: PositiveInt | None = None
    mid_block_add_attention: bool | None = None
    use_quant_conv: bool | None = None
    use_post_quant_conv: bool | None = None


class Tower(Section):
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    hidden_act: Literal["gelu", "quick_gelu"] | None = None


class VisionTower(Tower):
    patch_size: PositiveInt


class TextEncoder(Section):
    pretrained: str | None = None
    projection_dim: PositiveInt | None = None
    vocab_size: Annotated[int, Field(ge=515)] | None = None
    max_length: Annotated[int, Field(ge=4)] | None = None
    text: Tower | None = None
    vision: VisionTower | None = None


class UNet(Section):
    pretrained: str | None = None
    in_channels: PositiveInt | None = None
    out_channels: PositiveInt | None = None
    block_out_channels: Widths | None = None
    layers_per_block: PositiveInt | None = None
    down_block_types: list[Literal["DownBlock2D", "CrossAttnDownBlock2D"]] | None = None
    up_block_types: list[Literal["UpBlock2D", "CrossAttnUpBlock2D"]] | None = None
    attention_head_dim: PositiveInt | list[PositiveInt] | None = None
    transformer_layers_per_block: PositiveInt | list[PositiveInt] | None = None
    cross_attention_dim: PositiveInt | None = None
    use_linear_projection: bool | None = None
    norm_num_groups: PositiveInt | None = None
    upcast_attention: bool | None = None
    dropout: Probability | None = None
    train: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    gradient_checkpointing: bool | None = None

    def options(self) -> dict[str, Any]:
        """Return those of the network, without how it is trained."""
        of_training = ("train", "gradient_checkpointing")
        return {key: value for key, value in super().options().items() if key not in of_training}

    @model_validator(mode="after")
    def _rest_is_trained(self) -> Self:
        if self.train and not self.pretrained:
            raise ValueError(f"train={self.train} would leave the rest at random: it needs unet.pretrained=…")
        return self


# --------------------------------------------------------------------------------------------------------- training


class Optim(Section):
    target: str = Field(alias="_target_", min_length=1)
    lr: PositiveFloat
    weight_decay: Fraction0
    arguments: dict[str, Any]
    schedule: Literal["constant", "linear", "cosine", "wsd"]
    warmup_steps: Count0
    decay_share: Annotated[float, Field(gt=0, le=1)]
    clip_norm: PositiveFloat | None

    @property
    def averages(self) -> bool:
        """Whether the optimizer keeps an average of the weights by itself."""
        return self.target.startswith("schedulefree.")

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.averages and self.target != "schedulefree.AdamWScheduleFree":
            raise ValueError(f"of schedulefree we know AdamWScheduleFree (optim=schedule_free), not {self.target}")
        if self.averages and self.schedule != "constant":
            raise ValueError(f"schedule={self.schedule}: a schedule-free optimizer does without, leave it constant")
        return self


class PerceptualLoss(Section):
    """LPIPS; `weights` is a file with the backbone's weights, None takes torch hub's cache."""

    weight: PositiveFloat
    net: Literal["vgg", "alex", "squeeze"]
    weights: str | None


class AdversarialLoss(Section):
    """A patch discriminator that sees reconstructions from the VAE's optimizer step `start` on."""

    weight: PositiveFloat
    start: Count0
    channels: PositiveInt
    num_layers: PositiveInt
    lr: PositiveFloat
    adaptive: bool


class AutoencoderStage(Section):
    """With `vae.pretrained` the stage goes on from those weights; `train` says with all of them or the decoder's."""

    max_steps: PositiveInt
    batch_size: PositiveInt
    precision: Precision | None
    train: Literal["all", "decoder"]
    l1: Fraction0
    l2: Fraction0
    kl_weight: Fraction0
    learned_logvar: bool
    perceptual: PerceptualLoss | None = None
    discriminator: AdversarialLoss | None = None
    rfid: bool | Annotated[str, Field(min_length=1)]
    ema_decay: Decay
    optim: Optim

    @model_validator(mode="after")
    def _has_an_error(self) -> Self:
        if not (self.l1 or self.l2):
            raise ValueError("l1=0 with l2=0 leaves no error of pixels: give one of them a weight")
        return self


class ClipStage(Section):
    max_steps: PositiveInt
    batch_size: Annotated[int, Field(ge=2)]
    optim: Optim


class PosthocEMA(Section):
    """Averages of some lengths, kept every so many steps, to put others together from after training."""

    lengths: Annotated[list[Annotated[float, Field(gt=0, le=0.288)]], Field(min_length=1)]
    every: PositiveInt

    @model_validator(mode="after")
    def _once(self) -> Self:
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"lengths={self.lengths} names a length twice")
        return self


class Diffusion(Section):
    prediction_type: PredictionType
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
    beta_start: PositiveFloat
    beta_end: Annotated[float, Field(gt=0, lt=1)]
    num_train_timesteps: Annotated[int, Field(ge=2)]
    zero_terminal_snr: bool
    weighting: Literal["uniform", "min_snr", "soft_min_snr", "p2", "debiased"]
    snr_gamma: PositiveFloat
    p2_gamma: Fraction0
    p2_k: PositiveFloat
    loss: Literal["l2", "huber"]
    huber_c: PositiveFloat
    offset_noise: Fraction0
    input_perturbation: Fraction0
    timesteps: Literal["uniform", "logit_normal"]
    timesteps_mean: float
    timesteps_std: PositiveFloat
    stratified: bool
    caption_dropout: Probability
    ema_decay: Decay
    posthoc_ema: PosthocEMA | None

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start={self.beta_start} is above beta_end={self.beta_end}")
        return self

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.prediction_type == "epsilon" and self.zero_terminal_snr:
            raise ValueError(
                "zero_terminal_snr=true ends in pure noise, which says nothing of the picture that prediction_type="
                "epsilon would find behind it: take diffusion=v or x0, or zero_terminal_snr=false"
            )
        if self.weighting != "uniform" and self.zero_terminal_snr:
            raise ValueError(
                f"weighting={self.weighting} weighs timesteps by their signal-to-noise ratio, which "
                "zero_terminal_snr=true makes zero at the first step of sampling: it would never be trained; take "
                "weighting=uniform"
            )
        if self.prediction_type != "flow_prediction":
            return self
        if self.zero_terminal_snr:
            raise ValueError(
                "zero_terminal_snr=true rescales betas, and a flow has none: it ends in pure noise by itself; leave it "
                "out"
            )
        if self.weighting != "uniform":
            raise ValueError(
                f"weighting={self.weighting} is made for noise schedules with betas; a flow weighs its times by how "
                "often it draws them (timesteps=logit_normal, timesteps_mean, timesteps_std): take weighting=uniform, "
                "or diffusion=v"
            )
        return self


class Trainer(Section):
    accelerator: Literal["cpu", "gpu", "auto"]
    devices: PositiveInt | Literal["auto"]
    num_nodes: PositiveInt | Literal["auto"]
    strategy: str
    precision: Precision
    compile: bool
    max_steps: PositiveInt
    accumulate_grad_batches: PositiveInt
    val_every: PositiveInt
    val_batches: PositiveInt
    checkpoint_every: PositiveInt
    timeout_minutes: PositiveFloat
    max_skipped: Count0
    overfit_batches: Count0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.accelerator == "cpu" and self.precision == "16-mixed":
            raise ValueError("fp16 does not train on a CPU: use trainer.precision=32-true or bf16-mixed")
        return self


class Sampling(Section):
    sampler: Sampler
    steps: PositiveInt
    guidance_scale: Fraction0


Metric = Literal[
    "prompt_accuracy", "fid", "kid", "clip_score", "clip_frechet", "cmmd", "memorization", "retrieval", "reconstruction"
]
DRAWING: tuple[Metric, ...] = get_args(Metric)[:7]  # those that look at pictures drawn for the purpose


class Drawn(Section):
    """How pictures are drawn and compared to be measured."""

    metrics: list[Metric]
    num_prompts: PositiveInt
    num_train: PositiveInt | None
    real: Literal["val", "train"]
    seed: Seed
    steps: PositiveInt | Annotated[list[PositiveInt], Field(min_length=1)] | None
    sampler: Sampler | None
    guidance_scale: Fraction0 | Annotated[list[Fraction0], Field(min_length=1)] | None
    batch_size: PositiveInt
    clip: Annotated[str, Field(min_length=1)] | None
    inception: Annotated[str, Field(min_length=1)] | None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name in ("metrics", "steps", "guidance_scale"):
            value = getattr(self, name)
            if isinstance(value, list) and len(set(value)) < len(value):
                raise ValueError(f"{name}={value} names something twice")
        compared = [metric for metric in ("fid", "kid", "clip_frechet", "cmmd") if metric in self.metrics]
        if compared and self.num_prompts < 2:
            raise ValueError(f"num_prompts={self.num_prompts}: {compared[0]} compares how pictures vary, it needs two")
        return self


class Evaluation(Drawn):
    """Metrics in the course of training the U-Net."""

    every: PositiveInt
    weights: Annotated[list[Literal["ema", "raw"]], Field(min_length=1)]

    @field_validator("metrics")
    @classmethod
    def _about_drawings(cls, value: list[Metric]) -> list[Metric]:
        if others := [metric for metric in value if metric not in DRAWING]:
            raise ValueError(f"{others[0]} does not change as the U-Net learns: ask evaluate.py for it afterwards")
        return value


class TrainConfig(Section):
    name: str = Field(min_length=1)
    output_dir: str = Field(min_length=1)
    run_dir: str = Field(min_length=1)
    stages: Annotated[list[Stage], Field(min_length=1)]
    seed: Seed
    resume: Literal["auto", "never"]
    doctor: bool
    data: Data
    vae: VAE
    text_encoder: TextEncoder
    unet: UNet
    diffusion: Diffusion
    autoencoder: AutoencoderStage
    clip: ClipStage
    optim: Optim
    trainer: Trainer
    logger: dict[str, Target]
    callbacks: dict[str, Target]
    sampling: Sampling
    evaluation: Evaluation
    optimized_metric: str | None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(set(self.stages)) < len(self.stages):
            raise ValueError(f"stages={self.stages} names a stage twice")
        if "/" in self.name or self.name in (".", ".."):
            raise ValueError(f"name={self.name!r} must be one folder name; output_dir= says where it lies")
        if self.name in ("stages", "cache"):
            raise ValueError(f"name={self.name!r} is where runs keep what they share: take another name")
        if self.trainer.accelerator == "cpu" and self.autoencoder.precision == "16-mixed":
            raise ValueError("fp16 does not train on a CPU: use autoencoder.precision=32-true or bf16-mixed")
        if self.sampling.steps > self.diffusion.num_train_timesteps:
            raise ValueError(
                f"sampling.steps={self.sampling.steps} is more than "
                f"diffusion.num_train_timesteps={self.diffusion.num_train_timesteps}"
            )
        if "clip" in self.stages and self.text_encoder.pretrained:
            raise ValueError(
                f"stage 'clip' would train what text_encoder.pretrained={self.text_encoder.pretrained} loads: take one "
                "of the two out"
            )
        blocks = {"optim": self.optim, "autoencoder.optim": self.autoencoder.optim, "clip.optim": self.clip.optim}
        for name, optim in blocks.items():
            precision = self.autoencoder.precision if name == "autoencoder.optim" else None
            if (precision or self.trainer.precision) == "16-mixed" and optim.clip_norm and optim.arguments.get("fused"):
                raise ValueError(
                    f"fp16 scales gradients, which a fused optimizer undoes inside its step, after they were clipped: "
                    f"set {name}.arguments.fused=false, or use bf16-mixed"
                )
        for name in ("autoencoder.optim", "clip.optim"):
            if blocks[name].averages:
                raise ValueError(f"{name}._target_={blocks[name].target} is for the U-Net alone: take adamw")
        if self.trainer.strategy == "fsdp" and not self.optim.target.startswith("torch.optim."):
            raise ValueError(
                f"trainer.strategy=fsdp cuts up what torch's own optimizers keep, not {self.optim.target}: "
                "take optim=adamw"
            )
        if self.optim.averages and (self.diffusion.ema_decay or self.diffusion.posthoc_ema):
            raise ValueError(
                "a schedule-free optimizer averages the weights by itself: set diffusion.ema_decay=0 and "
                "diffusion.posthoc_ema=null, or take optim=adamw"
            )
        if "autoencoder" in self.stages:
            self._check_autoencoder()
        self._check_size()
        self._check_width()
        self._check_inpainting()
        self._check_evaluation()
        return self

    def _check_evaluation(self) -> None:
        metrics, stages = set(self.evaluation.metrics), self.stages
        if "prompt_accuracy" in metrics and not isinstance(self.data, ShapesData):
            raise ValueError(
                f"evaluation.metrics: prompt_accuracy reads pictures of the built-in shapes, not of "
                f"data={self.data.kind}: take clip_score"
            )
        wanted = self.optimized_metric
        if wanted is not None:
            stage, _, name = wanted.partition("/")
            of_drawings = [metric for metric in DRAWING if name.startswith(metric)]
            if stage not in stages or not name or (of_drawings and not metrics & set(of_drawings)):
                raise ValueError(
                    f"optimized_metric={wanted} will not be in metrics.csv: "
                    + (
                        f"ask for it with evaluation.metrics=[{of_drawings[0]}]"
                        if of_drawings and stage in stages
                        else f"it begins with one of the stages, as in {stages[-1]}/val_loss"
                    )
                )
        looking = metrics & {"clip_score", "clip_frechet", "cmmd", "memorization"}
        if "diffusion" in stages and looking and not self.evaluation.clip and self.text_encoder.pretrained:
            raise ValueError(
                f"evaluation.metrics: {min(looking)} looks with a CLIP, and this run trains none: name one with "
                "evaluation.clip=<folder or hub id>, such as openai/clip-vit-large-patch14"
            )

    def _check_inpainting(self) -> None:
        seen, channels = self.unet.in_channels, self.vae.latent_channels or 4
        if seen == 2 * channels + 1 and self.data.cache and "diffusion" in self.stages:
            raise ValueError(
                f"unet.in_channels={seen} is a U-Net for inpainting: it learns from masked pictures, and the cache "
                "keeps none; take data.cache=false"
            )

    @property
    def frozen_vae(self) -> str | None:
        """The pretrained VAE that is taken as it is; None where the VAE is the result of its stage."""
        return None if "autoencoder" in self.stages else self.vae.pretrained

    def _check_autoencoder(self) -> None:
        stage, resolution = self.autoencoder, self.data.resolution
        if stage.train == "decoder" and not self.vae.pretrained:
            raise ValueError(
                "autoencoder.train=decoder leaves the encoder as it is, and there is none yet: name one by "
                "+vae.pretrained=<folder or hub id>, or set autoencoder.train=all"
            )
        if stage.discriminator:
            if (stage.precision or self.trainer.precision) == "16-mixed":
                raise ValueError(
                    "the gradients that autoencoder.discriminator compares are too small for fp16: set "
                    "autoencoder.precision=bf16-mixed or 32-true"
                )
            if resolution >> stage.discriminator.num_layers < 3:  # at any number of them
                raise ValueError(
                    f"autoencoder.discriminator.num_layers={stage.discriminator.num_layers} leaves nothing of "
                    f"data.resolution={resolution}: take fewer layers"
                )
        if stage.rfid:
            seen = min(self.data.num_val, self.trainer.val_batches * stage.batch_size)
            if self.vae.in_channels == 4:
                raise ValueError("Inception sees RGB, and vae.in_channels=4 has alpha: set autoencoder.rfid=false")
            if seen < 2:
                raise ValueError(
                    f"autoencoder.rfid compares how pictures vary, and validation sees {seen}: raise data.num_val, "
                    "trainer.val_batches or autoencoder.batch_size"
                )
        if stage.perceptual:
            least = {"vgg": 16, "alex": 31, "squeeze": 17}[stage.perceptual.net]
            if resolution < least:
                raise ValueError(
                    f"autoencoder.perceptual.net={stage.perceptual.net} needs pictures of at least {least} px, and "
                    f"data.resolution={resolution}: take another net, or autoencoder.perceptual=null"
                )
            if self.vae.in_channels == 4:
                raise ValueError(
                    "autoencoder.perceptual compares RGB, and vae.in_channels=4 has alpha: set "
                    "autoencoder.perceptual=null"
                )

    def _check_size(self) -> None:
        if self.vae.block_out_channels is None or self.unet.block_out_channels is None:
            return  # pretrained: known once the weights' config is read
        vae_factor = 2 ** (len(self.vae.block_out_channels) - 1)
        factor = vae_factor * 2 ** (len(self.unet.block_out_channels) - 1)
        if self.data.resolution % factor:
            below = self.data.resolution // factor * factor
            fitting = " or ".join(str(size) for size in (below, below + factor) if size)
            raise ValueError(
                f"data.resolution={self.data.resolution} cannot be halved as often as the VAE ({vae_factor}×) and the "
                f"U-Net ({factor // vae_factor}×) do: take a multiple of {factor}, such as {fitting}"
            )
        if self.text_encoder.vision and self.data.resolution % self.text_encoder.vision.patch_size:
            raise ValueError(
                f"data.resolution={self.data.resolution} is not a multiple of "
                f"text_encoder.vision.patch_size={self.text_encoder.vision.patch_size}"
            )

    def _check_width(self) -> None:
        text, width = self.text_encoder.text, self.unet.cross_attention_dim
        if text and width and text.hidden_size != width:
            raise ValueError(
                f"unet.cross_attention_dim={width} does not fit text_encoder.text.hidden_size={text.hidden_size}: "
                "leave the first out, it follows the second"
            )


# ------------------------------------------------------------------------------------------------- the other scripts


class MixedModel(Section):
    """A model may have parts from elsewhere."""

    vae: str | None
    text_encoder: str | None
    unet: str | None
    tokenizer: str | None
    prediction_type: PredictionType | None
    variant: str | None


class SampleConfig(MixedModel):
    ckpt: str = Field(min_length=1)
    prompt: str | None
    prompt_file: str | None
    from_image: str | None
    negative_prompt: str
    num_images: Annotated[int, Field(ge=1, le=1_000_000)]
    seed: Seed | Annotated[list[Seed], Field(min_length=1)]
    steps: PositiveInt | None
    sampler: Sampler | None
    spacing: Spacing | None
    eta: Probability
    guidance_scale: Fraction0 | None
    guidance_rescale: Probability
    guidance_interval: tuple[Fraction0, PositiveFloat | None] | None
    clip_skip: Count0
    height: Annotated[int, Field(ge=1, le=16384)] | None
    width: Annotated[int, Field(ge=1, le=16384)] | None
    init_image: str | None
    strength: Annotated[float, Field(gt=0, le=1)] | None
    mask: str | None
    mask_blur: Count0
    outpaint: str | None
    batch_size: PositiveInt
    vae_tile: PositiveInt | None
    out: str = Field(min_length=1)
    device: str
    dtype: Literal["fp32", "bf16", "fp16"]

    @field_validator("init_image", "mask", "outpaint", "vae", "text_encoder", "unet", "tokenizer", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value  # `mask=` takes out what from_image= brings

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError("give either prompt='what to draw' or prompt_file=prompts.txt (one prompt a line)")
        if isinstance(self.seed, list) and self.num_images != 1:
            raise ValueError(f"seed={self.seed} draws a picture for each seed: leave num_images out")
        if self.init_image is None:
            needed = ("mask", "mask_blur", "outpaint", "strength")
            if alone := [name for name in needed if getattr(self, name)]:
                raise ValueError(f"{alone[0]}= belongs to init_image=, the picture to draw upon")
        return self


class EvaluateConfig(Drawn):
    ckpt: str = Field(min_length=1)
    metrics: Annotated[list[Metric], Field(min_length=1)]
    out: str | None
    device: str
    dtype: Literal["fp32", "bf16", "fp16"]

    @model_validator(mode="after")
    def _used(self) -> Self:
        drawing = [metric for metric in self.metrics if metric in DRAWING]
        swept = [name for name in ("steps", "guidance_scale") if isinstance(getattr(self, name), list)]
        if swept and not drawing:
            raise ValueError(
                f"{swept[0]}=[…] compares how pictures are drawn, and {' and '.join(self.metrics)} draw none: "
                f"add one of {', '.join(DRAWING)}"
            )
        if self.inception is not None and not {"fid", "kid", "reconstruction"} & set(self.metrics):
            raise ValueError("inception= is what fid, kid and reconstruction look with; metrics= names none of them")
        return self


class ConvertConfig(MixedModel):
    src: str = Field(min_length=1)
    dst: str = Field(min_length=1)
    format: Literal["diffusers", "single_file"] | None
    dtype: Literal["fp32", "bf16", "fp16"] | None
    ema: Annotated[float, Field(gt=0, le=0.288)] | None
    overwrite: bool

    @model_validator(mode="after")
    def _one_unet(self) -> Self:
        if self.ema is not None and self.unet is not None:
            raise ValueError(f"ema={self.ema:g} makes a U-Net, and unet={self.unet} brings another: leave one out")
        return self

    @model_validator(mode="after")
    def _one_format(self) -> Self:
        is_file = self.dst.endswith(".safetensors")
        suffix = Path(self.dst).suffix
        if suffix.lower() in WEIGHT_SUFFIXES and not is_file:
            raise ValueError(f"files are written as safetensors: let dst={self.dst} end in .safetensors")
        if self.format == "single_file" and not is_file:
            raise ValueError(f"format=single_file writes safetensors: dst={self.dst} must end in .safetensors")
        if self.format == "diffusers" and is_file:
            raise ValueError(f"format=diffusers writes a folder, and dst={self.dst} has the name of a file")
        return self


SCHEMAS: dict[str, type[Section]] = {
    "train": TrainConfig, "sample": SampleConfig, "evaluate": EvaluateConfig, "convert": ConvertConfig,
}  # fmt: skip


S = TypeVar("S", bound=Section)


def check(schema: type[S], config: Mapping[str, Any]) -> S:
    """Turn composed, resolved YAML into the typed config.

    Raises:
        UserError: an unknown key (with the nearest real one), a wrong type, a value out of range, or a combination
            that cannot work; every fault on a line of its own.
    """
    for key, text in _texts(config):
        if re.search("[\ud800-\udfff]", key + text):  # how Python passes stray bytes on
            raise UserError(f"{key.encode(errors='backslashreplace').decode()}: {text!r} is not valid UTF-8")
    try:
        return schema.model_validate(config)
    except ValidationError as error:
        faults: dict[str, list[Any]] = {}  # a value that may be of several types has a fault for each
        for fault in error.errors():
            faults.setdefault(_key(fault["loc"]), []).append(fault)
        lines = [_describe(schema, key, found) for key, found in faults.items()]
        raise UserError("\n  ".join(["the config has faults:", *lines]) if len(lines) > 1 else lines[0]) from None


def _texts(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Give each text of a config with its dotted key."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _texts(value, key)
    else:
        yield key, values if isinstance(values, str) else ""


def load_run_config(run_dir: Path) -> TrainConfig | None:
    """Read the config that a run directory was trained with; None where there is none. It is data: nothing is run.

    Keys that are younger than the run get today's defaults, which leave things as they were.

    Raises:
        UserError: the file is damaged, or of another version.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        return None
    values = load_yaml(path)
    try:
        return check(TrainConfig, _with_younger_keys(values))
    except UserError as error:
        raise UserError(f"{path}, which another release of ldm or a person wrote: {error}") from None


def _with_younger_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add what a run's config does not have yet; networks keep theirs, whose defaults are in `ldm.nn`."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    kind = values["data"].get("kind") if isinstance(values.get("data"), Mapping) else None
    own = kind in KINDS and kind != "custom"
    running = GlobalHydra.instance().hydra  # of the script that asks; it knows one config at a time
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            composed = compose("train", [f"data={kind}"] if own else [])
    finally:
        GlobalHydra.instance().hydra = running
    defaults: Any = OmegaConf.to_container(composed)
    if not own:
        defaults["data"] = {key: value for key, value in defaults["data"].items() if key in DataBase.model_fields}
    filled = {**{key: value for key, value in defaults.items() if key != "run_dir"}, **values}
    for name in ("data", "diffusion", "autoencoder", "clip", "optim", "trainer", "sampling", "evaluation"):
        if isinstance(values.get(name), Mapping):
            filled[name] = {**defaults[name], **values[name]}
            for part in defaults[name]:
                if isinstance(defaults[name][part], Mapping) and isinstance(values[name].get(part), Mapping):
                    filled[name][part] = {**defaults[name][part], **values[name][part]}
    return filled


def _key(loc: Sequence[int | str]) -> str:
    """Return the dotted key of a fault, without what pydantic adds to tell the types in a union apart."""
    places = (1, 4) if loc[:1] == ("data",) else ()  # data.<kind>.…, data.mix.sources.<name>.<kind>.…
    parts = [str(part) for i, part in enumerate(loc) if not (i in places and part in KINDS)]
    return ".".join(part for part in parts if not re.match(r"constrained-|list\[|literal\[", part))


def _describe(schema: type[Section], key: str, faults: Sequence[Any]) -> str:
    fault = faults[0]
    value, kind = fault["input"], fault["type"]
    if kind == "extra_forbidden":
        return f"unknown config key '{key}'{nearest(key, _keys(schema))}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        kinds = [name for name in KINDS if key == "data" or name not in ("shapes", "mix")]
        group = "data" if key == "data" else f"+source@{key}"
        return f"{key}.kind must be one of {', '.join(kinds)}; {group}=folder and its like set all that belongs to it"
    if kind == "missing" or value is None:
        return f"config key '{key}' is missing: give it as {key}=…"
    message = ", or ".join(each["msg"].removeprefix("Value error, ") for each in faults)
    if not key:
        return message
    return f"{key}: {message}" + ("" if isinstance(value, Mapping | BaseModel) else f", not {value!r}")


def known_keys(config_name: str) -> list[str]:
    """Return the dotted keys that a script's config may hold."""
    return list(_keys(SCHEMAS[config_name]))


def _keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        key = prefix + (field.alias or name)
        yield key
        for part in _sections(field.annotation):
            yield from _keys(part, f"{key}.")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not dict:  # its keys are free
        for argument in get_args(annotation):
            yield from _sections(argument)
