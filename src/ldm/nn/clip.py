"""CLIP (Radford et al., arXiv:2103.00020): a text tower and a vision tower that meet in one space.

Shape letters: B batch, L tokens, D width of a tower, H W pixels, P width of the common space.

Parameter names and options are those of transformers' `CLIPModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.nn.attention import attend
from ldm.nn.config import CLIP_INERT, CLIP_OFF, choose, plain_options, read_config


def quick_gelu(x: Tensor) -> Tensor:
    """Approximate GELU as x · sigmoid(1.702 x), the activation of OpenAI's CLIP (arXiv:1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class SelfAttention(nn.Module):
    """Multi-head self-attention over (B, L, D) tokens."""

    def __init__(self, dim: int, num_heads: int, is_causal: bool) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"CLIP: num_attention_heads={num_heads} does not divide hidden_size={dim}")
        self.num_heads, self.is_causal = num_heads, is_causal
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.num_heads, self.is_causal))


class MLP(nn.Module):
    """Two-layer perceptron on each token."""

    def __init__(self, dim: int, hidden_dim: int, hidden_act: str) -> None:
        super().__init__()
        self.act = ACTIVATIONS[hidden_act]
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(
        self, dim: int, hidden_dim: int, num_heads: int, hidden_act: str, layer_norm_eps: float, is_causal: bool
    ) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(dim, layer_norm_eps)
        self.self_attn = SelfAttention(dim, num_heads, is_causal)
        self.layer_norm2 = nn.LayerNorm(dim, layer_norm_eps)
        self.mlp = MLP(dim, hidden_dim, hidden_act)

    def init_weights(self, num_layers: int) -> None:
        """Initialise as OpenAI's CLIP: what ends a residual branch shrinks by 1 / √(2 layers) (GPT-2, §2.3)."""
        attn, mlp, std = self.self_attn, self.mlp, self.self_attn.q_proj.in_features**-0.5
        branch_std = std * (2 * num_layers) ** -0.5
        for linear in (attn.q_proj, attn.k_proj, attn.v_proj):
            nn.init.normal_(linear.weight, std=std)
        nn.init.normal_(attn.out_proj.weight, std=branch_std)
        nn.init.normal_(mlp.fc1.weight, std=std * 0.5**0.5)
        nn.init.normal_(mlp.fc2.weight, std=branch_std)
        for linear in (attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj, mlp.fc1, mlp.fc2):
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """A stack of layers; arguments as of `EncoderLayer`."""

    def __init__(self, num_layers: int, dim: int, **options: Any) -> None:
        super().__init__()
        layers = [EncoderLayer(dim, **options) for _ in range(num_layers)]
        for layer in layers:
            layer.init_weights(num_layers)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, skip_last: int = 0) -> Tensor:
        for layer in self.layers[: len(self.layers) - skip_last]:
            x = layer(x)
        return x


class TextEmbeddings(nn.Module):
    """Token plus position embedding: (B, L) ids to (B, L, D)."""

    def __init__(self, vocab_size: int, max_position_embeddings: int, dim: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.position_embedding = nn.Embedding(max_position_embeddings, dim)
        # Not CLIP's 0.02 and 0.01: in a short training the words that the contrastive loss asks for first would outgrow
        # all others by orders of magnitude, and a U-Net that reads the hidden states could not tell those apart.
        nn.init.normal_(self.token_embedding.weight, std=1.0)
        nn.init.normal_(self.position_embedding.weight, std=0.5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class TextTower(nn.Module):
    """The text tower: a causal transformer over tokens, `CLIPTextModel` in transformers.

    Args:
        vocab_size: number of token ids.
        hidden_size: D.
        intermediate_size: hidden width of the perceptrons.
        num_hidden_layers: transformer layers.
        num_attention_heads: heads, divides D.
        max_position_embeddings: greatest L.
        hidden_act: "quick_gelu" (OpenAI) or "gelu" (OpenCLIP).
        layer_norm_eps: epsilon of the LayerNorms.
        eos_token_id: the end-of-text id, whose first position is pooled. 2, the wrong value in older files, stands
            for the position of the greatest id, which in CLIP's vocabulary is the end of text.

    Raises:
        ValueError: an option has a value that is not supported.
    """

    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 512,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        eos_token_id: int = 49407,
    ) -> None:
        config = plain_options(locals())
        super().__init__()
        self.config: dict[str, Any] = config
        choose("TextTower", "hidden_act", hidden_act, ACTIVATIONS)
        self.embeddings = TextEmbeddings(vocab_size, max_position_embeddings, hidden_size)
        self.encoder = Encoder(
            num_hidden_layers,
            hidden_size,
            hidden_dim=intermediate_size,
            num_heads=num_attention_heads,
            hidden_act=hidden_act,
            layer_norm_eps=layer_norm_eps,
            is_causal=True,
        )
        self.final_layer_norm = nn.LayerNorm(hidden_size, layer_norm_eps)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the tower that the `config.json` of a transformers `CLIPTextModel` describes, with fresh weights.

        Raises:
            ValueError: the file asks for something this tower does not have; the option is named.
        """
        return cls(**read_config(config, cls, CLIP_OFF, CLIP_INERT))

    def forward(self, input_ids: Tensor, skip_last: int = 0) -> tuple[Tensor, Tensor]:
        """Read token ids.

        There is no padding mask: the causal one already keeps padding from being seen by what stands before it, and
        Stable Diffusion was trained to read the states of padding too.

        Args:
            input_ids: (B, L) int64, L at most `max_position_embeddings`, each row with an end of text.
            skip_last: leave out this many of the last layers ("clip skip"); 1 gives the penultimate states.

        Returns:
            (B, L, D) states after the final LayerNorm, and (B, D), of them the one at the end of the text.

        Raises:
            ValueError: L is too great, or `skip_last` leaves no layer.
        """
        length, limit = input_ids.shape[1], self.config["max_position_embeddings"]
        if length > limit:
            raise ValueError(f"TextTower: {length} tokens, but max_position_embeddings={limit}; truncate the ids")
        if not 0 <= skip_last < self.config["num_hidden_layers"]:
            num_layers = self.config["num_hidden_layers"]
            raise ValueError(
                f"TextTower: skip_last={skip_last} must be in [0, {num_layers}), there are {num_layers} layers"
            )
        hidden = self.final_layer_norm(self.encoder(self.embeddings(input_ids), skip_last))
        eos_token_id = self.config["eos_token_id"]
        is_end = input_ids if eos_token_id == 2 else (input_ids == eos_token_id).int()
        return hidden, hidden[torch.arange(len(hidden), device=hidden.device), is_end.argmax(dim=1)]


class VisionEmbeddings(nn.Module):
    """Class token and embedded patches plus position embedding: (B, 3, H, W) to (B, 1 + number of patches, D)."""

    def __init__(self, image_size: int, patch_size: int, num_channels: int, dim: int) -> None:
        super().__init__()
        std = dim**-0.5
        self.class_embedding = nn.Parameter(std * torch.randn(dim))
        self.patch_embedding = nn.Conv2d(num_channels, dim, patch_size, stride=patch_size, bias=False)
        self.position_embedding = nn.Embedding((image_size // patch_size) ** 2 + 1, dim)
        nn.init.normal_(self.position_embedding.weight, std=std)

    def forward(self, image: Tensor) -> Tensor:
        patches = rearrange(self.patch_embedding(image), "b d h w -> b (h w) d")
        tokens = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
        return tokens + self.position_embedding.weight


class VisionTower(nn.Module):
    """The vision tower: a transformer over patches (ViT), `CLIPVisionModel` in transformers.

    Args:
        hidden_size: D.
        intermediate_size: hidden width of the perceptrons.
        num_hidden_layers: transformer layers.
        num_attention_heads: heads, divides D.
        num_channels: channels of the image.
        image_size: H and W.
        patch_size: height and width of a patch.
        hidden_act: "quick_gelu" (OpenAI) or "gelu" (OpenCLIP).
        layer_norm_eps: epsilon of the LayerNorms.

    Raises:
        ValueError: an option has a value that is not supported.
    """

    def __init__(
        self,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_channels: int = 3,
        image_size: int = 224,
        patch_size: int = 32,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
    ) -> None:
        config = plain_options(locals())
        super().__init__()
        self.config: dict[str, Any] = config
        choose("VisionTower", "hidden_act", hidden_act, ACTIVATIONS)
        self.embeddings = VisionEmbeddings(image_size, patch_size, num_channels, hidden_size)
        self.pre_layrnorm = nn.LayerNorm(hidden_size, layer_norm_eps)  # spelt so in every published checkpoint
        self.encoder = Encoder(
            num_hidden_layers,
            hidden_size,
            hidden_dim=intermediate_size,
            num_heads=num_attention_heads,
            hidden_act=hidden_act,
            layer_norm_eps=layer_norm_eps,
            is_causal=False,
        )
        self.post_layernorm = nn.LayerNorm(hidden_size, layer_norm_eps)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the tower that the `config.json` of a transformers `CLIPVisionModel` describes, with fresh weights.

        Raises:
            ValueError: the file asks for something this tower does not have; the option is named.
        """
        return cls(**read_config(config, cls, CLIP_OFF, CLIP_INERT))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Look at images.

        Args:
            image: (B, num_channels, image_size, image_size), normalised as in this model's training.

        Returns:
            (B, 1 + number of patches, D) states, and (B, D), the class token after the last LayerNorm.

        Raises:
            ValueError: the image is not of `image_size`.
        """
        size = self.config["image_size"]
        if tuple(image.shape[-2:]) != (size, size):
            height, width = image.shape[-2:]
            raise ValueError(f"VisionTower: images are {height}x{width}, but image_size={size}; resize them")
        hidden = self.encoder(self.pre_layrnorm(self.embeddings(image)))
        return hidden, self.post_layernorm(hidden[:, 0])


class CLIP(nn.Module):
    """Both towers, projected to a common space of width P; `CLIPModel` in transformers.

    Args:
        text_config: options of `TextTower`, or what transformers writes for it.
        vision_config: options of `VisionTower`, or what transformers writes for it.
        projection_dim: P.
        logit_scale_init_value: logarithm of the inverse temperature at the start, log(1/0.07) (§2.5).

    Raises:
        ValueError: an option has a value that is not supported.
    """

    def __init__(
        self,
        text_config: Mapping[str, Any] | None = None,
        vision_config: Mapping[str, Any] | None = None,
        projection_dim: int = 512,
        logit_scale_init_value: float = 2.6592,
    ) -> None:
        super().__init__()
        self.text_model = TextTower.from_config(text_config or {})
        self.vision_model = VisionTower.from_config(vision_config or {})
        text_dim, vision_dim = self.text_model.config["hidden_size"], self.vision_model.config["hidden_size"]
        self.text_projection = nn.Linear(text_dim, projection_dim, bias=False)
        self.visual_projection = nn.Linear(vision_dim, projection_dim, bias=False)
        nn.init.normal_(self.text_projection.weight, std=text_dim**-0.5)
        nn.init.normal_(self.visual_projection.weight, std=vision_dim**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale_init_value)))
        self.config: dict[str, Any] = {
            "text_config": self.text_model.config,
            "vision_config": self.vision_model.config,
            "projection_dim": projection_dim,
            "logit_scale_init_value": logit_scale_init_value,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the model that the `config.json` of a transformers `CLIPModel` describes, with fresh weights.

        Raises:
            ValueError: the file asks for something this model does not have; the option is named.
        """
        config = dict(config)
        # Older files give the towers' options twice; transformers lets the second set win.
        for name in ("text_config", "vision_config"):
            config[name] = {**(config.get(name) or {}), **(config.pop(f"{name}_dict", None) or {})}
        return cls(**read_config(config, cls, CLIP_OFF, CLIP_INERT))

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Map token ids (B, L) to embeddings (B, P), not normalised."""
        return self.text_projection(self.text_model(input_ids)[1])

    def encode_image(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to embeddings (B, P), not normalised."""
        return self.visual_projection(self.vision_model(image)[1])

    def forward(self, input_ids: Tensor, image: Tensor) -> Tensor:
        """Compare each image with each text: cosine similarity times the inverse temperature (Fig. 3).

        Args:
            input_ids: (B, L) int64.
            image: (B, 3, H, W).

        Returns:
            (B, B) logits, a row for each image and a column for each text.
        """
        return self.compare(self.encode_text(input_ids), self.encode_image(image))

    def compare(self, text: Tensor, image: Tensor) -> Tensor:
        """Return the logits (B, B) of embeddings (B, P), which need not be normalised."""
        return self.logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
