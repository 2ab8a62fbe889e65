"""What people write, read strictly (nothing twice), and one line for what is wrong in a record."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cadx.types import Config

_NO_YAML = (yaml.YAMLError, ValueError, AttributeError)
"""What PyYAML raises: the last two of bytes that are no text, and of dates and numbers that are none."""


class _Loader(yaml.CSafeLoader):
    """YAML's own rule, which PyYAML does not keep: the keys of a mapping are unique. Else the later one won, unsaid."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Called once for a node as it is written; again, where it was merged into another, with those it had merged.
        checked: set[int] = self.__dict__.setdefault("_checked", set())
        if id(node) not in checked:
            checked.add(id(node))
            seen: set[tuple[str, str]] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                    said = f"{key.value!r} stands twice"
                    raise yaml.constructor.ConstructorError(None, None, said, key.start_mark)
                seen.add((key.tag, str(key.value)))
        super().flatten_mapping(node)


def read_yaml(file: Path) -> Any:
    """What a YAML file holds.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: one line: if it is no YAML, or names a key twice.
    """
    return parse_yaml(file.read_bytes(), str(file))


def parse_yaml(text: str | bytes, where: str) -> Any:
    """What a YAML text holds.

    Args:
        text: one document.
        where: what the text is called in an error.

    Raises:
        ValueError: one line: if it is no YAML, or names a key twice.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (it is a safe loader)
    except _NO_YAML as error:
        said = " ".join(str(error).split())
        for stream in ('in "<byte string>", ', 'in "<unicode string>", '):
            said = said.replace(stream, "")
        raise ValueError(f"{where}: not YAML: {said}") from None


def parse_json(text: str, where: str) -> Any:
    """What a JSON text holds.

    Args:
        text: one value.
        where: what the text is called in an error.

    Raises:
        ValueError: one line: if it is no JSON, or names a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    [(name, times)] = Counter(name for name, _ in pairs).most_common(1) or [("", 0)]
    if times > 1:
        raise ValueError(f"{name!r} stands twice")
    return dict(pairs)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error about a name that is not `known`: the nearest one, else none.

    >>> did_you_mean("epoch", ["epochs", "seed"])
    "; did you mean 'epochs'?"
    """
    near = get_close_matches(name, [other for other in known if other != name], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def explain(error: ValidationError, where: str, given: Any) -> str:
    """One line for a failed validation: each field, what is wrong there, and the nearest known name.

    Args:
        error: what pydantic says.
        where: what `given` is called.
        given: what was validated. Pydantic names the branches of a union as if they were fields; what the record
            itself does not hold is left out.
    """
    problems: dict[tuple[int | str, ...], list[str]] = {}
    items = error.errors(include_url=False, include_input=False)
    missing = [item["loc"] for item in items if item["type"] == "missing"]
    places = [_place(item["loc"], item["type"], given) for item in items]
    for item, (place, held) in zip(items, places, strict=True):
        if item["type"] == "union_tag_not_found":
            place, said = (*place, item["ctx"]["discriminator"].strip("'")), "field required"
        elif item["type"] == "union_tag_invalid":
            place = (*place, item["ctx"]["discriminator"].strip("'"))
            tags = item["ctx"]["expected_tags"]
            near = did_you_mean(str(item["ctx"]["tag"]), tags.replace("'", "").split(", "))
            said = f"input should be one of {tags}{near}"
        elif item["type"] == "extra_forbidden":
            *here, name = item["loc"]
            asked = [str(other[-1]) for other in missing if list(other[:-1]) == here]
            near = did_you_mean(str(name), asked) or did_you_mean(str(name), _field_names(error, item["loc"]))
            said = f"unknown parameter{near}"
        elif item["type"] in ("model_type", "model_attributes_type"):
            said = "input should be a mapping"
        elif (
            item["type"] == "literal_error"
            and isinstance(held, Mapping)
            and any(len(other) > len(place) and other[: len(place)] == place for other, _ in places)
        ):
            continue  # the other branch of the union, a record, says what is wrong in it
        else:
            message = item["msg"].removeprefix("Value error, ")
            said = f"{message[:1].lower()}{message[1:]}"
        problems.setdefault(place, []).append(said)
    return "; ".join(
        f"{'.'.join(map(str, (where, *place)))}: {_either(said)}" for place, said in problems.items()
    )


def _place(loc: Sequence[int | str], kind: str, given: Any) -> tuple[tuple[int | str, ...], Any]:
    """Where in the record something is wrong, without the names of unions' branches; and what stands there."""
    place: list[int | str] = []
    held = given
    for depth, part in enumerate(loc):
        is_named = kind in ("missing", "extra_forbidden") and depth == len(loc) - 1
        inside = (isinstance(held, Mapping) and part in held) or (
            isinstance(held, list | tuple) and isinstance(part, int) and part < len(held)
        )
        if inside or is_named:
            place.append(part)
        if inside:
            held = held[part]
    return tuple(place), held


def _either(said: Sequence[str]) -> str:
    """What several branches of a union ask for at one place, in one sentence."""
    should = "input should be "
    first, *others = dict.fromkeys(said)
    return " or ".join([first, *(other.removeprefix(should) for other in others)])


def _field_names(error: ValidationError, loc: Sequence[int | str]) -> list[str]:
    # pydantic's error does not carry the class, only its title; every Config knows its subclasses.
    names: set[str] = set()
    pending: list[type[Config]] = [Config]
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        if cls.__name__ == error.title or len(loc) > 1:
            names.update(cls.model_fields)
    return sorted(names)
