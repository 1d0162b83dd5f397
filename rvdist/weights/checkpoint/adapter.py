"""A LoRA adapter as peft writes it, opened as the difference it makes: Δ = scale · B · A for each module it adapts, and
for its bias where B has one; with DoRA's magnitudes; and weights that were trained themselves: biases,
`modules_to_save`, and rows of embeddings.

Source: peft's tuners/lora/layer.py (`get_delta_weight`), tuners/lora/model.py (`_create_and_replace`: scale),
tuners/tuners_utils.py (`_get_learnable_bias_state_dict`), tuners/trainable_tokens/layer.py (`merge`) and
utils/save_and_load.py (names). Whatever makes an adapter
more than these is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from rvdist.core.errors import BadInput
from rvdist.weights.checkpoint.difference import Dense, Difference, Dora, Form, LowRank, Rows, Whole, stamp_beside
from rvdist.weights.checkpoint.directory import Checkpoint, read_json
from rvdist.weights.checkpoint.header import TensorSpec
from rvdist.weights.checkpoint.patterns import first_matches
from rvdist.weights.checkpoint.tied import is_head

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.(lora_[AB](?=\.weight$)|lora_embedding_[AB]$)(?:\.weight)?")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector")
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")
EMBEDDING = re.compile(r"(?:.+\.)?(?:embed_tokens|wte|embed_in|word_embeddings|lm_head|embed_out)\.weight")
_BIAS = re.compile(r"(.+)\.lora_B\.bias")
_TWICE = re.compile(r"(.+)\.(?:modules_to_save|original_module)\.(weight|bias)")
_BESIDE_TOKENS = re.compile(r"(.+)\.token_adapter\.base_layer\.weight")
_RELEASE = re.compile(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})(?:\.post\d+)?")  # no .dev, which may be either side of a change
_FLOATS = ("F16", "BF16", "F32")
_MORE_THAN_PRODUCTS = (
    "use_qalora", "layer_replication",
    "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config", "megatron_config",
)  # fmt: skip
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")  # every other way changes the base's own weights
_BIASES = ("none", "all", "lora_only")
_WAY_OUT = "merge it into its base with peft's merge_and_unload and use the result as vector.plus"


def as_adapter(checkpoint: Checkpoint) -> Difference:
    """The adapter whose weight file is open as `checkpoint`. Raises BadInput."""
    if not (checkpoint.path / CONFIG).exists():
        raise BadInput(f"{checkpoint.path}: has {WEIGHTS} but no {CONFIG}, which has its scale; copy it there")
    config = read_json(checkpoint.path / CONFIG)
    _require_plain(checkpoint, config)
    factors: dict[str, dict[str, TensorSpec]] = {}
    biases: dict[str, TensorSpec] = {}
    magnitudes: dict[str, TensorSpec] = {}
    tokens: dict[str, TensorSpec] = {}
    beside: dict[str, TensorSpec] = {}  # the matrices of such tokens, where peft stores them whole
    others: dict[str, TensorSpec] = {}
    for name, spec in checkpoint.tensors.items():
        if not name.startswith(PREFIX):
            _refuse(checkpoint, f"tensor {name} does not begin with {PREFIX} as peft's do", "save it with peft")
        own = name.removeprefix(PREFIX)
        if factor := _FACTOR.fullmatch(own):
            factors.setdefault(factor[1], {})[factor[2]] = spec
        elif config.get("lora_bias") and (bias := _BIAS.fullmatch(own)):
            biases[bias[1]] = spec
        elif config.get("use_dora") and (magnitude := _MAGNITUDE.fullmatch(own)):
            magnitudes[magnitude[1]] = spec
        elif config.get("trainable_token_indices") and (of_tokens := _TOKENS.fullmatch(own)):
            tokens[of_tokens[1]] = spec
        elif config.get("trainable_token_indices") and (matrix_of := _BESIDE_TOKENS.fullmatch(own)):
            beside[matrix_of[1]] = spec
        else:
            others[own] = spec
    tensors: dict[str, TensorSpec] = {}
    forms: dict[str, Form] = {}
    parameters = _parameters(checkpoint, config, factors)
    keys = {module: parameters.get(module, module) for module in factors}  # what patterns are matched with
    ranks = _numbers(checkpoint, config, "r", "rank_pattern", list(keys.values()))
    alphas = _numbers(checkpoint, config, "lora_alpha", "alpha_pattern", list(keys.values()))
    for module, pair in factors.items():
        key, of_parameter = keys[module], module in parameters
        form = _product(checkpoint, config, module, pair, ranks[key], alphas[key], of_parameter)
        rows, columns = form.left.shape[0], form.right.shape[1]
        matrix = (columns, rows) if form.transposed else (rows, columns)
        shape = (form.count, *matrix) if form.count > 1 else matrix
        if config.get("use_dora"):
            form = _dora(checkpoint, module, form, magnitudes.pop(module, None))
        name = key if of_parameter else f"{module}.weight"
        if name in tensors:
            _refuse(checkpoint, f"two pairs of factors change {name}", "download or copy it again")
        tensors[name] = TensorSpec(name, "F32", shape, form.left.file, form.left.offset)
        forms[name] = form
        if own_bias := biases.pop(module, None):
            _require(checkpoint, own_bias, (rows,))
            name = f"{module}.bias"
            tensors[name] = replace(own_bias, name=name, dtype="F32")
            forms[name] = Dense(own_bias, form.scale)
    for spec in (*biases.values(), *magnitudes.values()):
        _refuse(checkpoint, f"tensor {spec.name} stands there without factors", "download or copy it again")
    for own, spec in others.items():
        if (twice := _TWICE.fullmatch(own)) and f"{twice[1]}.{twice[2]}" in others:
            continue  # of a resized embedding that was trained itself peft stores all that it holds beside what counts
        trained = _trained(own, config)
        if trained is None and own.removesuffix(".base_layer.weight") in factors:
            continue  # beside an adapted embedding peft stores the embedding itself, which the adapter leaves alone
        if trained is None:
            _refuse(checkpoint, f"tensor {spec.name} is no factor of a product, and {CONFIG} does not say what it is")
        if trained in tensors:
            reason = f"tensor {spec.name} was trained itself, and others in it change {trained} too"
            _refuse(checkpoint, reason, "save it with peft")
        _require(checkpoint, spec, spec.shape)
        tensors[trained] = replace(spec, name=trained)
        forms[trained] = Whole(spec)
    for module, some in _rows(checkpoint, config.get("trainable_token_indices"), tokens).items():
        if (name := f"{module}.weight") in tensors:
            reason = f"tensor {some.values.name} was trained itself, and others in it change {name} too"
            _refuse(checkpoint, reason, "save it with peft")
        tensors[name] = replace(some.values, name=name, shape=(some.rows[-1] + 1, some.values.shape[1]))
        forms[name] = some
        if stored := beside.pop(module, None):
            tensors[name], forms[name] = _whole(checkpoint, name, stored, some)
    for spec in beside.values():
        _refuse(checkpoint, f"tensor {spec.name} stands there without rows of tokens", "download or copy it again")
    base = config.get("base_model_name_or_path")
    stamps = checkpoint.stamps | {CONFIG: stamp_beside(checkpoint, CONFIG)}
    trained_on = base if isinstance(base, str) else None
    found = _RELEASE.fullmatch(str(config.get("peft_version")))
    release = tuple(map(int, found.groups())) if found else None
    return Difference(
        checkpoint.path, tensors, checkpoint.metadata, stamps, checkpoint.hub, "adapter", forms, trained_on, release
    )


def _require_plain(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        _refuse(checkpoint, f"{CONFIG} has peft_type={kind!r}, and only LORA is known")
    for key in _MORE_THAN_PRODUCTS:
        if config.get(key):
            _refuse(checkpoint, f"{CONFIG} has {key}={config[key]!r}, which is more than the product of two factors")
    if (biases := config.get("bias", "none")) not in _BIASES:
        _refuse(checkpoint, f"{CONFIG} has bias={biases!r}, and only {', '.join(_BIASES)} are known")
    if config.get("use_dora") and config.get("lora_bias"):
        _refuse(checkpoint, f"{CONFIG} has use_dora and lora_bias, which peft has not together")
    for key in ("modules_to_save", "target_parameters"):
        if not _is_list_of_names(config.get(key)):
            _refuse(checkpoint, f"{CONFIG} has a damaged {key} (it is no list of names)", "download or copy it again")
    for name in config.get("target_parameters") or ():
        if "." not in name:
            _refuse(checkpoint, f"{CONFIG} has target_parameters with {name!r}, which does not name its module")
    for key in ("use_dora", "lora_bias", "fan_in_fan_out"):
        if config.get("target_parameters") and config.get(key):
            _refuse(checkpoint, f"{CONFIG} has target_parameters and {key}, which peft has not together")
    if (initial := config.get("init_lora_weights")) not in _INITIAL:
        _refuse(
            checkpoint,
            f"{CONFIG} has init_lora_weights={initial!r}: training began by changing the base's own weights",
            "save it with peft's path_initial_model_for_weight_conversion",
        )


def _is_list_of_names(said: object) -> bool:
    return said is None or (isinstance(said, list) and all(isinstance(name, str) and name for name in said))


def _parameters(
    checkpoint: Checkpoint, config: Mapping[str, Any], factors: Mapping[str, Mapping[str, TensorSpec]]
) -> dict[str, str]:
    """The parameters that pairs of factors change, by what the pairs are called, which tells only the module: of two in
    one module, the last has the module's own name, and the first stands one `base_layer` deeper."""
    targets = config.get("target_parameters") or []
    pairs: dict[str, list[str]] = {}
    for name in sorted(factors, key=len):  # the outermost first
        pairs.setdefault(re.sub(r"(\.base_layer)+$", "", name), []).append(name)
    found: dict[str, str] = {}
    for module, own in pairs.items():
        named = {t.rpartition(".")[2] for t in targets if f".{module}.".endswith(f".{t.rpartition('.')[0]}.")}
        if not named and own == [module]:
            continue
        if named == {"gate_up_proj", "down_proj"} and len(own) == 2:
            ordered = ["down_proj", "gate_up_proj"]  # as the modules of experts have them, the last first
            down, both = ([factors[name].get(part) for part in ("lora_A", "lora_B")] for name in own)
            if all(spec and len(spec.shape) == 2 for spec in (*down, *both)):
                (into, out), (hidden, twice) = ((a.shape[1], b.shape[0]) for a, b in (down, both) if a and b)
                if (twice, hidden) not in ((2 * into, out), (into, 2 * out)):  # [in, out], or as older pefts have it
                    reason = f"the factors of {module} do not fit its down_proj and gate_up_proj, in this order"
                    _refuse(checkpoint, reason)
        elif len(named) == len(own) == 1:
            ordered = list(named)
        else:
            reason = f"{CONFIG} does not tell which of {', '.join(sorted(named)) or 'no parameters'} the factors of "
            _refuse(checkpoint, f"{reason}{module} change")
        found |= {name: f"{module}.{parameter}" for name, parameter in zip(own, ordered, strict=True)}
    return found


def _rows(checkpoint: Checkpoint, said: object, tokens: Mapping[str, TensorSpec]) -> dict[str, Rows]:
    """Which rows of which modules were trained: a list is of the one that has any, a map is by ends of names."""
    if not said:
        return {}
    given = said if isinstance(said, Mapping) else dict.fromkeys(tokens, said)
    found = {}
    for module, spec in tokens.items():
        of_module = [rows for name, rows in given.items() if isinstance(name, str) and module.endswith(name)]
        rows = of_module[0] if len(of_module) == 1 else None
        if not isinstance(rows, list) or not all(type(row) is int and 0 <= row < 1 << 31 for row in rows):
            _refuse(checkpoint, f"{CONFIG} does not tell by its trainable_token_indices which rows {spec.name} has")
        if len(spec.shape) != 2 or spec.shape[0] != len(rows) or len({*rows}) < len(rows) or not rows:
            reason = f"tensor {spec.name} has shape {list(spec.shape)} for {len({*rows})} different rows"
            _refuse(checkpoint, reason, "download or copy it again")
        _require(checkpoint, spec, spec.shape)
        places = sorted(range(len(rows)), key=rows.__getitem__)
        found[module] = Rows(spec, tuple(rows[place] for place in places), tuple(places))
    copied = {is_head(f"{module}.weight") for module in tokens} == {True, False}  # a tied embedding, stored twice
    if not tokens or (not isinstance(said, Mapping) and len(tokens) > 1 + copied):
        _refuse(checkpoint, f"{CONFIG} has trainable_token_indices, and {len(tokens)} tensors are of trained tokens")
    return found


def _whole(checkpoint: Checkpoint, name: str, matrix: TensorSpec, some: Rows) -> tuple[TensorSpec, Whole]:
    """A matrix that is stored beside the rows of it that were trained, with them."""
    width, most = some.values.shape[1], some.rows[-1]
    _require(checkpoint, matrix, matrix.shape)
    if len(matrix.shape) != 2 or matrix.shape[1] != width or matrix.shape[0] <= most:
        reason = f"tensor {matrix.name} has shape {list(matrix.shape)}, and a row {most} of {width} was trained"
        _refuse(checkpoint, reason, "download or copy it again")
    dtype = matrix.dtype if some.values.dtype == matrix.dtype else "F32"  # the wider, or wider than both
    return replace(matrix, name=name, dtype=dtype), Whole(matrix, some)


def _trained(own: str, config: Mapping[str, Any]) -> str | None:
    """What the model calls a tensor that was trained itself; None where the config does not say that any was."""
    name = own.replace(".base_layer.", ".")
    parents = [name[:at] for at, character in enumerate(name) if character == "."]
    if own == name and any(parent.endswith(tuple(config.get("modules_to_save") or ())) for parent in parents):
        return name
    if own == name and config.get("ensure_weight_tying") and config.get("modules_to_save") and is_head(name):
        return name  # stored beside the embedding that it is
    if own == name and EMBEDDING.fullmatch(name):
        return name  # peft stores both whole where rows were added before training, and puts them in place again
    return name if config.get("bias", "none") != "none" and name.endswith(".bias") else None


def _require(checkpoint: Checkpoint, spec: TensorSpec, shape: tuple[int, ...]) -> None:
    """Raises BadInput unless a tensor has a dtype of floats, and this shape."""
    if spec.dtype not in _FLOATS:
        _refuse(checkpoint, f"tensor {spec.name} is stored as {spec.dtype}", f"store it as one of {', '.join(_FLOATS)}")
    if spec.shape != shape:
        reason = f"tensor {spec.name} has shape {list(spec.shape)} where {list(shape)} belongs"
        _refuse(checkpoint, reason, "download or copy it again")


def _product(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    module: str,
    pair: Mapping[str, TensorSpec],
    rank: float,
    alpha: float,
    of_parameter: bool,
) -> LowRank:
    embedding = any(name.startswith("lora_embedding") for name in pair)
    expected = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if pair.keys() != set(expected):
        _refuse(checkpoint, f"module {module} has {' and '.join(sorted(pair))} where {' and '.join(expected)} belong")
    right, left = (pair[name] for name in expected)
    for spec in (right, left):
        if len(spec.shape) != 2:
            _refuse(checkpoint, f"tensor {spec.name} has {len(spec.shape)} dimensions, and only matrices are known")
        _require(checkpoint, spec, spec.shape)
    count = max(1, int(right.shape[0] / rank)) if of_parameter and rank >= 1 else 1  # of matrices that a parameter has
    if not left.shape[1] == right.shape[0] == rank * count or rank < 1 or rank % 1:
        _refuse(
            checkpoint,
            f"the factors of {module} have shapes {list(left.shape)} and {list(right.shape)}, and {CONFIG} has "
            f"rank {rank:g}",
            "download or copy it again",
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    transposed = None if count > 1 else embedding or bool(config.get("fan_in_fan_out"))
    return LowRank(left, right, scale, transposed, count)


def _dora(checkpoint: Checkpoint, module: str, form: LowRank, magnitude: TensorSpec | None) -> Dora:
    """The product as DoRA has it: a length for each output, whichever way the weight lies."""
    if magnitude is None:
        _refuse(checkpoint, f"{CONFIG} has use_dora, and module {module} no lora_magnitude_vector", "save it with peft")
    outputs = (form.left.shape[0],)
    _require(checkpoint, magnitude, outputs)
    return Dora(form.left, form.right, form.scale, form.transposed, magnitude=magnitude)


def _numbers(
    checkpoint: Checkpoint, config: Mapping[str, Any], key: str, patterns: str, modules: Sequence[str]
) -> dict[str, float]:
    """The config's `key` for each module: that of the first pattern that matches the end of its name, if any does."""
    own = config.get(patterns) or {}
    if not isinstance(own, Mapping):
        _refuse(checkpoint, f"{CONFIG} has a damaged {patterns} (it is no map)", "download or copy it again")
    try:
        first = first_matches(list(own), modules)
    except ValueError as error:
        _refuse(checkpoint, f"{CONFIG} has a damaged {patterns} ({error})", "download or copy it again")
    values = list(own.values())
    numbers = {}
    for module, k in zip(modules, first, strict=True):
        value = own.get(module, config.get(key)) if k is None else values[k]
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            reason = f"{CONFIG} has {key}={value!r} for {module}, which is no number"
            _refuse(checkpoint, reason, "download or copy it again")
        numbers[module] = value
    return numbers


def _refuse(checkpoint: Checkpoint, reason: str, way_out: str = _WAY_OUT) -> NoReturn:
    raise BadInput(f"{checkpoint.path}: cannot be used as an adapter, since {reason}; {way_out}")
