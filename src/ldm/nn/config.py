"""Reading the `config.json` files that diffusers and transformers write."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T", int, str)

KINDS = {int: "one whole number", float: "one number", bool: "true or false", str: "one text"}
LARGEST = 2**31
"""No option of a network is as large; nor is NaN or infinity less."""

# Options of the other libraries that Stable Diffusion 1.x and 2.x leave switched off, with the values that do so.
UNET_OFF: dict[str, tuple[Any, ...]] = {
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "num_attention_heads": (None,),  # diffusers refuses it as well: `attention_head_dim` is the number of heads
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "projection_class_embeddings_input_dim": (None,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
AUTOENCODER_OFF: dict[str, tuple[Any, ...]] = {"latents_mean": (None,), "latents_std": (None,)}
CLIP_OFF: dict[str, tuple[Any, ...]] = {"attention_dropout": (0.0,), "dropout": (0.0,)}

# Keys that do not change the network. This one says how an addition embedding would be built, were there one.
UNET_INERT = ("addition_embed_type_num_heads",)
# What transformers 4.x and 5.x write beside the options: bookkeeping, initialisation, settings for generating text.
CLIP_INERT = tuple(
    """
    architectures auto_map dtype finetuning_task id2label label2id model_type name_or_path problem_type
    projection_dim task_specific_params tokenizer_class torch_dtype transformers_version use_bfloat16
    initializer_factor initializer_range
    bos_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id pad_token_id sep_token_id
    output_attentions output_hidden_states return_dict tf_legacy_loss torchscript chunk_size_feed_forward
    add_cross_attention cross_attention_hidden_size is_decoder is_encoder_decoder pruned_heads tie_encoder_decoder
    tie_word_embeddings
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty length_penalty max_length min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_scores prefix remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    """.split()  # noqa: SIM905 a word list reads better than sixty quoted strings
)


def plain_options(scope: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a constructor's `locals()` into a plain, JSON-ready dict of its options (sequences become lists)."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

    return {name: plain(value) for name, value in scope.items() if name not in ("self", "__class__")}


def read_config(
    config: Mapping[str, Any],
    cls: type,
    off: Mapping[str, tuple[Any, ...]] | None = None,
    inert: Collection[str] = (),
) -> dict[str, Any]:
    """Pick the options of `cls` out of a parsed `config.json`, refusing whatever would change the network unseen.

    Args:
        config: the parsed file. Keys that start with "_" are bookkeeping and are skipped.
        cls: the network; its options are the parameters of its constructor.
        off: options of the other library that `cls` does not have, each with the values that leave it switched off.
        inert: keys that do not change the network and are skipped.

    Returns:
        Keyword arguments for `cls`.

    Raises:
        ValueError: an option of `off` has another value, or a key is unknown; all of them are named.
    """
    off = off or {}
    options = inspect.signature(cls).parameters
    problems = []
    for name, value in config.items():
        if name in options or name in inert or name.startswith("_"):
            continue
        if name not in off:
            problems.append(f"option {name}={value!r} in config.json is not known")
        elif value not in off[name]:
            allowed = " or ".join(repr(choice) for choice in off[name])
            problems.append(f"option {name}={value!r} in config.json is not supported (only {allowed})")
    chosen = {name: value for name, value in config.items() if name in options}
    hints = get_type_hints(vars(cls)["__init__"])
    for name, value in chosen.items():
        if not fits(value, hints[name]):
            problems.append(f"option {name}={value!r} is not supported (only {KINDS.get(hints[name], 'a list')})")
    if problems:
        raise ValueError(f"{cls.__name__}: {'; '.join(problems)}")
    return chosen


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value out of JSON is of an option's type.

    >>> fits(8, int | Sequence[int]), fits([8, None], Sequence[int]), fits(float("nan"), float), fits(True, int)
    (True, False, False, False)
    """
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if kind is Sequence:
        return isinstance(value, list | tuple) and all(fits(each, parts[0]) for each in value)
    if kind is Mapping:
        return isinstance(value, Mapping)
    if hint in (int, float):
        kinds = int if hint is int else int | float
        return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < LARGEST
    return isinstance(value, hint)


def per_level(cls: str, name: str, value: T | Sequence[T], num_levels: int) -> list[T]:
    """Spread an option over the levels of a network: one value for all, or one for each.

    Raises:
        ValueError: `value` is a sequence of another length than `num_levels`.

    >>> per_level("UNet", "attention_head_dim", 8, 3)
    [8, 8, 8]
    """
    values = [value] * num_levels if isinstance(value, (int, str)) else list(value)
    if len(values) != num_levels:
        raise ValueError(
            f"{cls}: {name}={value} has {len(values)} entries, but block_out_channels has {num_levels} levels; "
            "give one for each level"
        )
    return values


def choose(cls: str, name: str, value: Any, choices: Collection[Any]) -> Any:
    """Return `value` if it is one of `choices`.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(
            f"{cls}: option {name}={value!r} is not supported (choose from {', '.join(map(str, choices))})"
        )
    return value
