"""What is measured: a model, pictures drawn with it, the real pictures of its run. Each is made once, for all metrics.

N pictures, C channels, H W pixels, D width of a feature.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.config import EvaluateConfig, ShapesData, TrainConfig, load_run_config
from ldm.data.images import Pixels, to_pixels
from ldm.data.shapes import Scene
from ldm.errors import UserError
from ldm.evaluation.features import ClipFeatures, InceptionFeatures
from ldm.evaluation.real import RealPictures, open_real, to_rgb
from ldm.files import load_json
from ldm.pipeline import LatentDiffusionPipeline, find_device

CHUNK = 256  # pictures that are looked at together

Progress = Callable[[str, int, str], AbstractContextManager[Callable[..., Any]]]
"""progress(label, total, unit) gives a function to call when one more is done, or `count` more; see `ldm.progress`."""


@contextmanager
def silent(label: str, total: int, unit: str) -> Iterator[Callable[..., Any]]:
    yield lambda count=1: None


class Setting(NamedTuple):
    """How pictures are drawn, of what a call compares."""

    steps: int
    guidance_scale: float


class Subject:
    """A model folder and all that metrics ask of it.

    Args:
        config: what is asked for.
        folder: the model's.
        run_dir: that its config lies in, if there is one.
        out: the file that results go to; pictures go beside it.
        progress: shows long work.
        say: tells where pictures went, and what is to be known of a figure.
        run: the config of the run, where it is at hand.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        folder: Path,
        run_dir: Path,
        out: Path,
        progress: Progress = silent,
        say: Callable[[str], None] = print,
        run: TrainConfig | None = None,
    ) -> None:
        self.config, self.folder, self.run_dir, self.out = config, folder, run_dir, out
        self.progress, self.say, self._given = progress, say, run
        self._drawn: dict[tuple[Setting, str], Pixels] = {}
        self._features: dict[Any, Tensor] = {}
        self.ceiling: dict[str, float] | None = None  # of prompt_accuracy: no U-Net changes it

    # -------------------------------------------------------------------------------------------------- the model

    @cached_property
    def pipeline(self) -> LatentDiffusionPipeline:
        return LatentDiffusionPipeline.from_pretrained(
            self.config.ckpt, dtype=self.config.dtype, device=self.config.device
        )

    def draw_with(self, pipeline: LatentDiffusionPipeline, out: Path) -> None:
        """Take this model from now on, one in training, and let pictures go beside `out`.

        What was found of the real pictures is kept.
        """
        self.pipeline, self.channels, self.out = pipeline, pipeline.vae.config["in_channels"], out
        self._drawn.clear()
        self._features = {key: found for key, found in self._features.items() if not isinstance(key[1], Setting)}

    @cached_property
    def settings(self) -> list[Setting]:
        """What the call compares: every number of steps with every guidance scale."""
        defaults, told = self.pipeline.settings, {}
        for name in Setting._fields:
            value = getattr(self.config, name)
            told[name] = value if isinstance(value, list) else [defaults[name] if value is None else value]
        return [Setting(int(steps), float(scale)) for steps in told["steps"] for scale in told["guidance_scale"]]

    def options(self, setting: Setting) -> dict[str, Any]:
        """Return how `pipeline.generate` is asked; an inpainting U-Net draws all of a white picture."""
        ground: dict[str, Any] = {}
        if self.pipeline.sees_mask:
            white = np.full((self.pipeline.default_size,) * 2, 255, np.uint8)
            ground = {"init_image": white, "mask": white}
        return {"sampler": self.config.sampler, **setting._asdict(), **ground}

    def check_settings(self, settings: Sequence[Setting]) -> None:
        """Raise a UserError where a setting does not fit the model, before any picture is drawn."""
        for setting in settings:
            self.pipeline.generate((), (), **self.options(setting))

    def file(self, what: str, setting: Setting | None = None) -> Path:
        """Name a PNG beside the results; of one setting of several it says which."""
        one_of = setting is not None and len(self.settings) > 1
        suffix = f"-steps{setting.steps}-guidance{setting.guidance_scale:g}" if one_of and setting else ""
        return self.out.with_name(f"{self.out.stem}-{what}{suffix}.png")

    # ------------------------------------------------------------------------------------------- what is asked for

    def scenes(self, split: str) -> list[tuple[str, Scene]]:
        """Return held-out scenes of the built-in world, each with a caption that says all of it."""
        from ldm.data import shapes

        data = self.run_config("held-out scenes").data
        assert isinstance(data, ShapesData)
        if split not in self._scenes:
            asked = shapes.prompts(split, self.config.num_prompts, objects=data.objects, seed=data.seed)
            self._scenes[split] = asked
        return self._scenes[split]

    @cached_property
    def _scenes(self) -> dict[str, list[tuple[str, Scene]]]:
        return {}

    def prompts(self, split: str = "val") -> list[str]:
        """Return a prompt for each picture: captions of the held-out pictures, again and again where they are few.

        Prompt i belongs to held-out picture i modulo their number.
        """
        if isinstance(self.run_config("held-out captions").data, ShapesData):
            return [text for text, _ in self.scenes(split)]
        captions, num = self.real("val").captions, len(self.real("val"))
        return [captions[i % num][i // num % len(captions[i % num])] for i in range(self.config.num_prompts)]

    def drawn(self, setting: Setting, split: str = "val") -> Pixels:
        """Return a picture of each prompt, (N, H, W, C) uint8: picture i is drawn from `seed + i`."""
        if (setting, split) not in self._drawn:
            prompts, seed = self.prompts(split), self.config.seed
            self.check_settings([setting])
            label = f"drawing {split}, {setting.steps} steps, guidance {setting.guidance_scale:g}"
            with self.progress(label, len(prompts), "pictures") as advance:
                images = self.pipeline.generate(
                    prompts,
                    range(seed, seed + len(prompts)),
                    batch_size=self.config.batch_size,
                    **self.options(setting),
                )
                for i, image in enumerate(images):
                    pixels = to_pixels(image)
                    if i == 0:
                        pictures = self._memory((len(prompts), *pixels.shape))
                    pictures[i] = pixels
                    advance()
            self._drawn[setting, split] = pictures
        return self._drawn[setting, split]

    def _memory(self, shape: tuple[int, ...]) -> Pixels:
        """Return room for pictures, in a file without a name that goes with this process."""
        with tempfile.TemporaryFile(dir=self.out.parent) as file:
            return np.memmap(file, np.uint8, "w+", shape=shape)

    def drawn_rgb(self, setting: Setting, indices: Any = slice(None)) -> Pixels:
        """Return pictures drawn of held-out prompts as a person sees them, (N, H, W, 3) uint8."""
        return to_rgb(np.asarray(self.drawn(setting)[indices]), self.background)

    # ------------------------------------------------------------------------------------------- the real pictures

    def run_config(self, wanted: str) -> TrainConfig:
        """Return the config of the run that trained the model; raise a UserError that says what wanted it."""
        if self.run is None:
            raise UserError(
                f"{wanted} are those of the run that trained the model, and {self.config.ckpt} has no config.yaml "
                "beside it: evaluate a run directory of train.py"
            )
        return self.run

    @cached_property
    def run(self) -> TrainConfig | None:
        """The config of the run that trained the model; None where it is not known."""
        return self._given or load_run_config(self.run_dir)

    @property
    def background(self) -> tuple[int, int, int]:
        return self.run_config("real pictures").data.background

    @cached_property
    def channels(self) -> int:
        """C of the pictures that the VAE sees."""
        return load_json(self.folder / "vae" / "config.json").get("in_channels", 3)

    def real(self, split: str) -> RealPictures:
        """Return the pictures of a split: "train", "val" (whose captions are the prompts), "fresh"; see `open_real`."""
        return self._real[split]

    @cached_property
    def _real(self) -> dict[str, RealPictures]:
        data = self.run_config("real pictures").data
        cache = next((root / "cache" / "indexes" for root in self._roots if (root / "cache").is_dir()), None)
        return open_real(data, self.channels, cache, self.config.num_prompts)

    @property
    def _roots(self) -> list[Path]:
        """Where the run's `output_dir` may lie: as it was told, or above the run directory."""
        told = [] if self.run is None else [Path(self.run.output_dir)]
        return [*told, *self.run_dir.absolute().parents[:2]]

    def some(self, split: str, num: int | None) -> NDArray[np.int64]:
        """Choose so many pictures of a split, evenly spaced; None takes all."""
        total = len(self.real(split))
        return np.linspace(0, total - 1, min(num or total, total)).astype(np.int64)

    # ------------------------------------------------------------------------------------------------ what looks

    @cached_property
    def clip(self) -> ClipFeatures:
        """The CLIP that was named, or the one whose text tower the model listens to."""
        if (source := self.clip_source) is None:
            raise UserError(
                f"there is no CLIP to look with: {self.config.ckpt} has none of its own training beside it; name one "
                "with clip=<folder or hub id>, such as clip=openai/clip-vit-large-patch14"
            )
        return ClipFeatures(source, self.device)

    @property
    def clip_source(self) -> str | None:
        """Where the CLIP is that there is to look with; None where none was named, and the run trained none."""
        if self.config.clip is not None:
            return self.config.clip
        marker = self.folder / ".text_encoder"  # names the stage's result that the text encoder is
        name = Path(marker.read_text(encoding="utf-8").strip()).name if marker.is_file() else ""
        places = [root / "stages" / name for root in self._roots if name]
        return next((str(place) for place in places if place.is_dir()), None)

    @cached_property
    def inception(self) -> InceptionFeatures:
        return InceptionFeatures(self.config.inception, self.device)

    @cached_property
    def device(self) -> torch.device:
        return find_device(self.config.device)

    def drawn_features(self, eye: str, setting: Setting) -> Tensor:
        """Return (N, D) features of the pictures of a setting; `eye` is "clip" or "inception"."""
        num = len(self.drawn(setting))  # drawn before they are looked at, so that progress tells the two apart
        return self._look(eye, setting, num, lambda i: self.drawn_rgb(setting, i))

    def real_features(self, eye: str, split: str, num: int | None = None) -> Tensor:
        """Return (N, D) features of real pictures, those that `some` chooses."""
        chosen = self.some(split, num)
        real = self.real(split)
        return self._look(eye, (id(real), len(chosen)), len(chosen), lambda i: real.rgb(chosen[i]))

    def _look(self, eye: str, key: Any, num: int, pictures: Callable[[slice], Pixels]) -> Tensor:
        if (eye, key) not in self._features:
            look = getattr(self, eye).images
            found = []
            with self.progress(f"looking with {eye}", num, "pictures") as advance:
                for begin in range(0, num, CHUNK):
                    found.append(look(pictures(slice(begin, min(begin + CHUNK, num)))))
                    advance(len(found[-1]))
            self._features[eye, key] = torch.cat(found)
        return self._features[eye, key]
