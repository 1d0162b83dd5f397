"""The tokens of a checkpoint, from its tokenizer.json, and a tokenizer made of several.

Ids go as the `tokenizers` library gives them: a new token gets the next after all others. What the library or
transformers would number otherwise than the file says is refused. Loads neither.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rvdist.core.errors import BadInput
from rvdist.weights.checkpoint.directory import parse_object, read_small

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
_SPECIAL_MAP, _ADDED = "special_tokens_map.json", "added_tokens.json"  # transformers reads these too
_BYTES, _SMALL = 48 << 20, 4 << 20  # of what has a vocabulary, of other files; the largest have 33 and 1.2 MB
_VALUES = 3 << 20  # of JSON: tokens, and two of each merge; the largest have 1.4 million
_MOST = 1 << 20  # tokens, or merges; the largest tokenizers have 0.9 million
_LAST = 1 << 24  # of ids
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SAVE_AGAIN = "load it with transformers' AutoTokenizer and save it again (save_pretrained)"


@dataclass(frozen=True)
class Added:
    """A token beside the model's own: how a text is searched for it."""

    content: str
    flags: tuple[bool, ...] = (False, False, False, True, False)  # as in _FLAGS

    def to_json(self, number: int) -> dict[str, Any]:
        """As tokenizer.json has it."""
        return {"id": number, "content": self.content, **dict(zip(_FLAGS, self.flags, strict=True))}


@dataclass(frozen=True)
class Tokens:
    """token → id, in the order of ids; those of them that are added, in that order; how many the model part has.
    `where` is the directory, `digest` that of the files; `limit` is that from which on ids were left out, and `gone`
    what had these."""

    where: Path
    ids: dict[str, int] = field(repr=False)
    added: tuple[Added, ...] = field(repr=False)
    own: int
    kind: str
    digest: str
    limit: int | None = None
    gone: dict[str, int] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Built:
    """A tokenizer: that of `where`, whose files have this `digest`, without the tokens that have ids from `limit` on,
    and with `added` ones. `ids` has all its tokens."""

    where: Path
    digest: str
    ids: dict[str, int] = field(repr=False)
    limit: int | None = None
    added: tuple[Added, ...] = field(default=(), repr=False)

    def files(self) -> dict[str, str]:
        """What is to be written otherwise than it stands there. Raises BadInput where that has changed."""
        content, config, _, digest = _read(self.where)
        if digest != self.digest:
            raise BadInput(f"{self.where / FILE}: changed while it was being read; run again when it is at rest")
        if self.limit is None and not self.added:
            return {}
        if self.limit is not None:
            _strip(self.where, content, self.limit)
        entries = {one["content"]: one for one in content.get("added_tokens") or []}
        entries |= {one.content: one.to_json(self.ids[one.content]) for one in self.added}
        content["added_tokens"] = sorted(entries.values(), key=lambda one: int(one["id"]))
        written = {FILE: json.dumps(content, ensure_ascii=False, indent=2) + "\n"}
        if isinstance(listed := config.get("added_tokens_decoder"), dict):
            of_ids = {self.ids[one.content]: one.to_json(0) for one in self.added}
            new = {str(number): {k: v for k, v in entry.items() if k != "id"} for number, entry in of_ids.items()}
            kept = {number: one for number, one in listed.items() if self.limit is None or int(number) < self.limit}
            config = config | {"added_tokens_decoder": kept | new}
            written[CONFIG] = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        return written


def has_tokens(where: Path) -> bool:
    """Whether a directory has a tokenizer.json."""
    return (where / FILE).exists()


def read_object(path: Path) -> dict[str, Any]:
    """What a file of a tokenizer holds, which is not parsed where it has more than tokenizers have. Raises BadInput."""
    return _parse(path, _take(path))


def read_tokens(where: Path) -> Tokens:
    """The tokens of the tokenizer in a directory. Raises BadInput."""
    path = where / FILE
    if not has_tokens(where):
        raise BadInput(
            f"{where}: has no {FILE}, and its rows are to be found by token; {_SAVE_AGAIN}, or copy the target's there "
            "if it is the same"
        )
    content, config, legacy, digest = _read(where)
    model = content.get("model")
    ids = _of_model(path, content)
    if isinstance(listed := model.get("vocab") if isinstance(model, dict) else None, list) and len(ids) < len(listed):
        raise BadInput(f"{path}: its vocab has a token twice, so that it has no one id; take the model's own")
    own, added = len(ids), dict[str, Added]()
    merges = model.get("merges") if isinstance(model, dict) else None
    for count, what in ((own, "tokens"), (len(merges) if isinstance(merges, list) else 0, "merges")):
        if count > _MOST:
            raise BadInput(f"{path}: has {count:,} {what}, more than the {_MOST:,} that are read; take the model's own")
    for one in _added_entries(path, content):
        token, number = one["content"], one.get("id")
        if token in added or ids.get(token, number) != number:
            raise BadInput(f"{path}: gives token {token!r} two ids; {_SAVE_AGAIN}")
        ids[token] = number
        special = one.get("special") is True
        usual = {"normalized": not special, "special": special}
        added[token] = Added(token, tuple(bool(one.get(flag, usual.get(flag, False))) for flag in _FLAGS))
    _require_ids(path, ids)
    for file, said in ((CONFIG, config), *legacy.items()):
        for token, entry, number in _named(where / file, said):
            if number is not None and token in ids and str(ids[token]) != number:
                raise BadInput(
                    f"{where / file}: gives token {token!r} the id {number}, {FILE} {ids[token]}; {_SAVE_AGAIN}"
                )
            if token not in (added if file == _ADDED else ids):
                raise BadInput(f"{where / file}: names token {token!r}, which {FILE} lacks; {_SAVE_AGAIN}")
            added.setdefault(token, entry)
    ids = dict(sorted(ids.items(), key=lambda pair: int(pair[1])))
    kind = model.get("type") if isinstance(model, dict) else None
    in_order = tuple(sorted(added.values(), key=lambda one: ids[one.content]))
    return Tokens(where, ids, in_order, own, str(kind), digest)


def token_ids(where: Path) -> dict[str, int] | None:
    """token → id of a directory's tokenizer.json, or of its vocab.json, with added tokens; None where there is neither.
    Raises BadInput for ids that are no numbers."""
    if (path := where / FILE).exists():
        content = read_object(path)
        ids = _of_model(path, content) | {one["content"]: one.get("id") for one in _added_entries(path, content)}
    elif (path := where / "vocab.json").exists():
        ids = read_object(path) | (read_object(where / _ADDED) if (where / _ADDED).exists() else {})
    else:
        return None
    for token, number in ids.items():
        _require_id(path, token, number)
    return ids


def _of_model(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of the model's own tokens, whatever they are. Raises BadInput."""
    model = content.get("model")
    listed = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(listed, dict):
        return dict(listed)
    if not isinstance(listed, list):
        raise BadInput(f"{path}: has no vocab; take the model's own")
    if not all(isinstance(one, list) and one and isinstance(one[0], str) for one in listed):  # Unigram's
        raise BadInput(f"{path}: its vocab has an entry that is no [token, score]; take the model's own")
    return {one[0]: number for number, one in enumerate(listed)}


def _added_entries(path: Path, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The added tokens, each with its content. Raises BadInput."""
    entries = content.get("added_tokens") or []
    if not isinstance(entries, list):
        raise BadInput(f"{path}: its added_tokens are no list; take the model's own")
    for one in entries:
        if not isinstance(one, dict) or not isinstance(one.get("content"), str) or not one["content"]:
            raise BadInput(f"{path}: its added_tokens have an entry without content; take the model's own")
    return entries


def strip(tokens: Tokens, limit: int) -> Tokens:
    """The same without what has ids from `limit` on: rows that the model has not got. Raises BadInput."""
    gone = {token: number for token, number in tokens.ids.items() if number >= limit}
    if not gone:
        return tokens
    if tokens.kind != "BPE":
        raise BadInput(
            f"{tokens.where / FILE}: has token {min(gone)!r} with id {tokens.ids[min(gone)]}, and the model has {limit}"
            f" rows; only of BPE can tokens be left out, and this is {tokens.kind}"
        )
    added = tuple(one for one in tokens.added if one.content not in gone)
    ids = {token: number for token, number in tokens.ids.items() if token not in gone}
    content, _, _, _ = _read(tokens.where)
    _strip(tokens.where, content, limit)
    return Tokens(tokens.where, ids, added, len(content["model"]["vocab"]), tokens.kind, tokens.digest, limit, gone)


def build(base: Tokens, new: Iterable[Added]) -> Built:
    """The tokenizer of `base` with `new` tokens, in order; one that it has keeps its id. Raises BadInput for ids that
    leave out a number."""
    ids, own = dict(base.ids), {one.content: one for one in base.added}
    last = max((ids[token] for token in own), default=-1)
    added: dict[str, Added] = {}
    taken = set(ids.values())
    for one in new:
        if own.get(one.content) == one or added.get(one.content) == one or not one.content:
            continue
        if one.content not in ids:
            ids[one.content] = last + 1 if last >= base.own or not base.own else base.own
            if ids[one.content] in taken:
                raise BadInput(
                    f"{base.where / FILE}: has {base.own} tokens, one of them with the id {ids[one.content]} that a "
                    f"new one would get; {_SAVE_AGAIN}"
                )
            taken.add(ids[one.content])
        last = max(last, ids[one.content])
        added[one.content] = one
    if len(ids) > _MOST:
        raise BadInput(f"{base.where / FILE}: would have {len(ids):,} tokens, more than the {_MOST:,} that are written")
    _require_dense(base.where, ids)
    if base.gone:
        _, config, legacy, _ = _read(base.where)
        for file, said in ((CONFIG, config), *legacy.items()):
            _require_known(base.where / file, said, ids)
    return Built(base.where, base.digest, ids, base.limit, tuple(added.values()))


def unite(tokenizers: Sequence[tuple[Tokens, int]]) -> list[Added]:
    """What the first tokenizer gets to be the union of all: the plain tokens of the others, each by its id, then all
    that are added, of those with ids below the rows of their model. Of settings that differ the first count."""
    plain: dict[str, None] = {}
    added: dict[str, Added] = {}
    for tokens, rows in tokenizers:
        beside = {one.content: one for one in tokens.added}
        plain |= {token: None for token, number in tokens.ids.items() if number < rows and token not in beside}
        for token, one in beside.items():
            if tokens.ids[token] < rows:
                added.setdefault(token, one)
    known = tokenizers[0][0].ids
    return [Added(token) for token in plain if token not in added and token not in known] + list(added.values())


def _read(where: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]], str]:
    """tokenizer.json, tokenizer_config.json, what else names tokens, as the latter does, by file; a digest of all."""
    held = {name: _take(where / name) for name in (FILE, CONFIG, _SPECIAL_MAP, _ADDED) if (where / name).exists()}
    made_of = hashlib.blake2b(digest_size=16)
    for name, text in held.items():
        made_of.update(f"{name} {len(text)} ".encode() + text)
    parsed = {name: _parse(where / name, text) for name, text in held.items()}
    content, config = parsed.pop(FILE), parsed.pop(CONFIG, {})
    legacy = {} if "added_tokens_decoder" in config else parsed
    if _ADDED in legacy:
        listed = {str(number): {"content": token} for token, number in legacy[_ADDED].items()}
        if len(listed) < len(legacy[_ADDED]):
            raise BadInput(f"{where / _ADDED}: gives two tokens one id; {_SAVE_AGAIN}")
        legacy[_ADDED] = {"added_tokens_decoder": listed}
    return content, config, legacy, made_of.hexdigest()


def _take(path: Path) -> bytes:
    return read_small(path, _BYTES if path.name in (FILE, "vocab.json") else _SMALL)


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    if (count := content.count(b",")) > _VALUES:
        raise BadInput(
            f"{path}: has {count:,} values, more than the {_VALUES:,} that tokenizers have; take the model's own"
        )
    return parse_object(path, content)


def _strip(where: Path, content: dict[str, Any], limit: int) -> None:
    """Takes out of a BPE what has ids from `limit` on, and the merges with such a part."""
    model = content["model"]
    gone = {token for token, number in model["vocab"].items() if number >= limit}
    gone |= {one["content"] for one in content.get("added_tokens") or [] if one["id"] >= limit}
    content["added_tokens"] = [one for one in content.get("added_tokens") or [] if one["id"] < limit]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if token not in gone}
    listed = model.get("merges") or []
    pairs: list[Any] = [None] if not isinstance(listed, list) else listed
    pairs = [one.split(" ") if isinstance(one, str) else one for one in pairs]
    if not all(isinstance(pair, list) and [type(part) for part in pair] == [str, str] for pair in pairs):
        raise BadInput(f"{where / FILE}: its merges are no pairs of tokens; take the model's own")
    model["merges"] = [pair for pair in pairs if gone.isdisjoint([*pair, "".join(pair)])]


def _require_ids(path: Path, ids: Mapping[str, Any]) -> None:
    owner: dict[int, str] = {}
    for token, number in ids.items():
        _require_id(path, token, number)
        if owner.setdefault(number, token) != token:
            raise BadInput(
                f"{path}: tokens {owner[number]!r} and {token!r} both have id {number}; take the model's own"
            )


def _require_id(path: Path, token: str, number: object) -> None:
    if type(number) is not int or not 0 <= number < _LAST:
        raise BadInput(f"{path}: token {token!r} has id {number!r}, which is no row of a model; take the model's own")


def _require_known(path: Path, config: Mapping[str, Any], ids: Mapping[str, int]) -> None:
    """Raises BadInput for a special token that is none of these."""
    for token, _, number in _named(path, config):
        if number is None and token not in ids:
            raise BadInput(
                f"{path}: names token {token!r}, for which the model has no row; add it by tokenizer.tokens, such as "
                f"tokenizer={{source: …, tokens: {{{token!r}: {{source: {{kind: zero}}}}}}}}"
            )


def _require_dense(where: Path, ids: Mapping[str, int]) -> None:
    if ids and max(ids.values()) >= len(ids):
        taken = set(ids.values())
        hole = next(number for number in range(len(ids)) if number not in taken)
        raise BadInput(
            f"{where / FILE}: has {len(ids):,} tokens and none of id {hole}, though there are higher ones; rows are "
            f"counted by tokens, so {_SAVE_AGAIN} with a token for each id"
        )


def _named(path: Path, config: Mapping[str, Any]) -> Iterable[tuple[str, Added, str | None]]:
    """Tokens of which tokenizer_config.json speaks, with their ids where it says: transformers adds them where they are
    not added already."""
    decoder = config.get("added_tokens_decoder") or {}
    more = [config.get(key) or [] for key in ("additional_special_tokens", "extra_special_tokens")]
    if not isinstance(decoder, dict) or not all(isinstance(one, dict | list) for one in more):
        raise BadInput(f"{path}: its special tokens are no list; {_SAVE_AGAIN}")
    named: list[tuple[Any, str | None]] = [(given, number) for number, given in decoder.items()]
    named += [(config.get(key), None) for key in _SPECIAL]
    named += [(token, None) for one in more for token in (one.values() if isinstance(one, dict) else one)]
    for given, number in named:
        if given is None:
            continue
        token = given.get("content") if isinstance(given, dict) else given
        if not isinstance(token, str):
            raise BadInput(f"{path}: has a special token {given!r}, which is no text; {_SAVE_AGAIN}")
        flags = given if isinstance(given, dict) else {}
        yield token, Added(token, tuple(bool(flags.get(flag, flag == "special")) for flag in _FLAGS)), number
