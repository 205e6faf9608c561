"""Options of `LLM(...)` by the names of other tools: the same table as that of the flags, in Python."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any

from ingle.habits.flags import SECRETS, VALUES, Habit, elsewhere, habits, refusal
from ingle.habits.near import nearest
from ingle.habits.turned import TURNED


def translated(model: str, options: Mapping[str, Any], own: Set[str]) -> tuple[str, dict[str, Any], list[str]]:
    """The model and our own options, and what is to be said of the rest.

    Raises `ValueError` for options that cannot be had: all of them in one line.
    """
    found = {name: value for name, value in options.items() if name in own}
    notices: list[str] = []
    objections: list[str] = []
    for name, value in options.items():
        if name in own:
            continue
        habit = _habit(name)
        if habit is None or (habit.kind == "same" and _option(habit.says) not in own):
            objections.append(_unknown(name, own))
        elif value is None or (value is False and not habit.takes and habit.kind != "same"):
            continue
        elif habit.kind == "same":
            _take_same(found, habit, value)
        elif habit.kind == "turned":
            model = _take_turned(name, value, model, found, notices, objections)
        elif habit.kind in ("refused", "refused here"):
            if str(value).lower() not in habit.harmless:
                objections.append(f"{_shown(name, value)}: {habit.says}")
        else:
            notices.append(f"{_shown(name, value)} changes nothing here: {habit.says}")
    objections += [f"give {name}={found.pop(name)!r} to LLM itself" for name in sorted(found.keys() - own)]
    for name, value in found.items():
        if value is not None and (answer := refusal(_flag(name), value)) is not None:
            objections.append(f"{_shown(name, value)}: {answer}")
        if isinstance(value, str):
            found[name] = VALUES.get(_flag(name), {}).get(value.lower(), value)
    if objections:
        several = f"{len(objections)} options cannot be had here: " if len(objections) > 1 else ""
        raise ValueError(several + "; ".join(objections))
    return model, found, notices


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _option(flag: str) -> str:
    return flag.partition("=")[0].removeprefix("--no-").removeprefix("--").replace("-", "_")


def _habit(name: str) -> Habit | None:
    return habits().get(_flag(name)) or elsewhere().get(_flag(name))


def _shown(name: str, value: Any) -> str:
    return name if _flag(name) in SECRETS else f"{name}={value!r:.80}"


def _unknown(name: str, own: Set[str]) -> str:
    near = nearest(_flag(name), {_flag(each): each for each in own})
    return f"there is no option {name}" + (f"; did you mean {near}?" if near is not None else "")


def _take_same(found: dict[str, Any], habit: Habit, value: Any) -> None:
    if "=" in habit.says:
        if value:
            found[_option(habit.says)] = habit.says.endswith("=true")
    else:
        found[_option(habit.says)] = not value if habit.says.startswith("--no-") else value


def _take_turned(
    name: str, value: Any, model: str, found: dict[str, Any], notices: list[str], objections: list[str]
) -> str:
    """Returns the model, which some name otherwise."""
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    turned = TURNED[_flag(name)][1](text, model)
    if turned.refusal:
        objections.append(f"{_shown(name, value)}: {turned.refusal}")
    if turned.environment is not None:
        variable, wanted = turned.environment
        setting = variable if _flag(name) in SECRETS else f"{variable}={wanted}"
        notices.append(f"{_shown(name, value)} changes nothing here: set {setting} before")
    elif turned.notice:
        notices.append(f"{_shown(name, value)} {turned.notice}")
    for words, into in ((turned.implied, {} if "rope_scaling" in found else found), (turned.words, found)):
        into.update({_option(words[i]): _literal(words[i + 1]) for i in range(0, len(words), 2)})
    return turned.model or model


def _literal(word: str) -> Any:
    """A word of a command line as the value that it stands for; JSON stays text."""
    try:
        value = json.loads(word)
    except ValueError:
        return word
    return word if isinstance(value, dict | list) else value
