"""The formats in which models write thoughts and calls of tools: a table, read by one parser.

Sources: the chat templates that models are published with, and what their model cards say beside. The names are those
under which vLLM knows their parsers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Json:
    """Objects of a name and arguments, one or a list: `{"name": "f", "arguments": {}}`."""


@dataclass(frozen=True)
class NamedJson:
    """The name, then the arguments alone as a JSON object."""

    header: str
    """A pattern of what stands before that object, with the group `name` and maybe `id`."""


@dataclass(frozen=True)
class Tagged:
    """The name, then each argument between tags, as plain text."""

    name_end: str
    """After the name; without any it ends before `key` or `close`."""
    key: str
    """Before an argument's name."""
    key_end: str
    value: str
    """Between that and its value, beside white space."""
    value_end: str
    close: str


@dataclass(frozen=True)
class Pythonic:
    """Python's calls in a list: `[f(a=1), g()]`."""


@dataclass(frozen=True)
class Lax:
    """`call:f{a:1,b:"x"}`: keys are bare, and texts stand between `quote`s."""

    quote: str
    close: str


Body = Json | NamedJson | Tagged | Pythonic | Lax


@dataclass(frozen=True)
class ToolFormat:
    name: str
    opens: tuple[str, ...]
    """What begins a call anywhere in an answer."""
    body: Body
    closes: tuple[str, ...] = ()
    """What may follow a call."""
    starts: tuple[str, ...] = ()
    """What begins a call where an answer begins with it, if a tool of that name was given."""
    dropped: tuple[str, ...] = ()
    """What stands around calls."""
    others: tuple[str, ...] = ()
    """Other names."""
    ends_thought: bool = False
    """Whether a call in thoughts is one, and the end of them."""
    short_ids: bool = False
    """Whether ids have nine letters and digits."""
    tokens: tuple[str, ...] = ()
    """Special tokens beside `opens`, `closes` and `dropped` that the parser needs to see."""

    @property
    def marks(self) -> tuple[str, ...]:
        return (*self.opens, *self.closes, *self.dropped, *self.tokens)


@dataclass(frozen=True)
class ReasoningFormat:
    name: str
    open: str
    close: str
    others: tuple[str, ...] = ()
    anywhere: bool = False
    """Thoughts may begin after other text, not only where the answer begins."""
    channels: bool = False
    """Every part of an answer has a header: OpenAI's Harmony. `open` and `close` are those of the thoughts."""

    def begun_by(self, prompt: str, last: Mapping[str, Any] | None = None) -> bool:
        """Whether an answer to this prompt begins within thoughts; of an answer in parts with headers, within one.

        `last` is the message that the answer continues, if it does: the prompt ends with its text.
        """
        if self.channels:
            return prompt.rstrip().endswith("<|start|>assistant")
        if last is None:
            return prompt.rstrip().endswith(self.open)
        said = last.get("content")
        text = said if isinstance(said, str) and prompt.endswith(said) else ""
        if prompt[: len(prompt) - len(text)].rstrip().endswith(self.open):
            return self.close not in text
        return text.rfind(self.open) > text.rfind(self.close)

    @property
    def header(self) -> str:
        """What stands before an answer without thoughts."""
        return "<|channel|>final<|message|>" if self.channels else ""

    @property
    def ending(self) -> str:
        """What ends thoughts that become too long, so that the answer follows."""
        end = f"<|end|><|start|>assistant{self.header}" if self.channels else f"\n{self.close}\n\n"
        return ENOUGH + end

    @property
    def marks(self) -> tuple[str, ...]:
        return HARMONY if self.channels else (self.open, self.close)


ENOUGH = "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
"""In the words that Qwen trained its models on."""
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|return|>", "<|call|>")

_INVOKE = Tagged('">', '<parameter name="', '">', "", "</parameter>", "</invoke>")
_FUNCTION = Tagged(">", "<parameter=", ">", "", "</parameter>", "</function>")

TOOL_FORMATS: tuple[ToolFormat, ...] = (
    ToolFormat(
        "hermes", ("<tool_call>",), Json(), ("</tool_call>",), others=("qwen", "qwen2", "qwen3", "longcat", "internlm")
    ),
    ToolFormat(
        "qwen3_coder",
        ("<function=",),
        _FUNCTION,
        dropped=("<tool_call>", "</tool_call>"),
        others=("qwen3_xml", "qwen3coder", "step3p5", "nemotron_v3"),
        ends_thought=True,
    ),
    ToolFormat("seed_oss", ("<function=",), _FUNCTION, dropped=("<seed:tool_call>", "</seed:tool_call>")),
    ToolFormat(
        "llama3_json",
        ("<|python_tag|>",),
        Json(),
        starts=("{",),
        others=("llama3", "llama4_json", "llama"),
        dropped=("<|eom_id|>",),
    ),
    ToolFormat("functionary_v3", ("<function=",), NamedJson(r"(?P<name>[^<>\s]+)>\s*"), ("</function>",)),
    ToolFormat(
        "pythonic",
        ("<|python_start|>",),
        Pythonic(),
        ("<|python_end|>",),
        starts=("[",),
        others=("llama4_pythonic", "olmo3"),
    ),
    ToolFormat("lfm2", ("<|tool_call_start|>",), Pythonic(), ("<|tool_call_end|>",)),
    ToolFormat(
        "mistral",
        ("[TOOL_CALLS]",),
        NamedJson(r"\s*(?P<name>[^\[\]{}\s]+)(\[CALL_ID\](?P<id>[^\[\]{}\s]+))?(\[ARGS\])?\s*"),
        tokens=("[ARGS]", "[CALL_ID]"),
        short_ids=True,
    ),
    ToolFormat(
        "deepseek_v3",
        ("<｜tool▁call▁begin｜>",),
        NamedJson(r"(function)?<｜tool▁sep｜>(?P<name>[^<>{}\s]+)\s*(```json)?\s*"),
        ("```", "<｜tool▁call▁end｜>"),
        dropped=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        tokens=("<｜tool▁sep｜>",),
        others=("deepseek_r1",),
    ),
    ToolFormat(
        "deepseek_v31",
        ("<｜tool▁call▁begin｜>",),
        NamedJson(r"\s*(?P<name>[^<>{}\s]+)<｜tool▁sep｜>\s*"),
        ("<｜tool▁call▁end｜>",),
        dropped=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        tokens=("<｜tool▁sep｜>",),
    ),
    ToolFormat(
        "deepseek_v32",
        ('<｜DSML｜invoke name="',),
        Tagged('">', '<｜DSML｜parameter name="', ">", "", "</｜DSML｜parameter>", "</｜DSML｜invoke>"),
        dropped=(
            *("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
            *("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"),
        ),
        tokens=("｜DSML｜",),
        others=("deepseek_v4",),
    ),
    ToolFormat(
        "kimi_k2",
        ("<|tool_call_begin|>",),
        NamedJson(r"\s*(?P<id>(functions\.)?(?P<name>[^<>{}\s]+?):\d+)\s*<\|tool_call_argument_begin\|>\s*"),
        ("<|tool_call_end|>",),
        dropped=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        tokens=("<|tool_call_argument_begin|>",),
        ends_thought=True,
    ),
    ToolFormat(
        "glm45",
        ("<tool_call>",),
        Tagged("", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>"),
        others=("glm4", "glm47", "glm4_moe"),
        tokens=("</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    ToolFormat(
        "minimax_m2", ('<invoke name="',), _INVOKE, dropped=("<minimax:tool_call>", "</minimax:tool_call>"),
        others=("minimax",),
    ),
    ToolFormat("gemma4", ("<|tool_call>",), Lax('<|"|>', "<tool_call|>"), tokens=("<tool_call|>", '<|"|>')),
    ToolFormat(
        "functiongemma",
        ("<start_function_call>",),
        Lax("<escape>", "<end_function_call>"),
        tokens=("<end_function_call>", "<escape>"),
        others=("gemma",),
    ),
    ToolFormat("phi4_mini_json", ("functools", "<|tool_call|>"), Json(), ("<|/tool_call|>",), others=("phi4",)),
    ToolFormat("granite", ("<|tool_call|>",), Json(), others=("granite-20b-fc",)),
    ToolFormat("nemotron_json", ("<TOOLCALL>",), Json(), ("</TOOLCALL>",)),
    ToolFormat("apriel", ("<tool_calls>",), Json(), ("</tool_calls>",), others=("minimax_m1", "xlam", "jamba")),
    ToolFormat("json", (), Json(), starts=("[", "{")),
    ToolFormat("openai", (), NamedJson(""), others=("gpt_oss", "openai_gptoss", "harmony")),
)  # fmt: skip

REASONING_FORMATS: tuple[ReasoningFormat, ...] = (
    ReasoningFormat(
        "think",
        "<think>",
        "</think>",
        others=(
            *("deepseek_r1", "deepseek_v3", "deepseek_v31", "qwen3", "qwq", "glm45", "kimi_k2", "minimax_m2", "step3"),
            *("step3p5", "nemotron_v3", "ernie45", "holo2", "hunyuan_a13b", "olmo3", "basic"),
        ),
    ),
    ReasoningFormat("mistral", "[THINK]", "[/THINK]", others=("magistral",)),
    ReasoningFormat("seed_oss", "<seed:think>", "</seed:think>"),
    ReasoningFormat("gemma4", "<|channel>thought", "<channel|>", anywhere=True),
    ReasoningFormat("cohere", "<|START_THINKING|>", "<|END_THINKING|>"),
    ReasoningFormat("granite", "Here is my thought process:", "Here is my response:"),
    ReasoningFormat("apriel", "Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
    ReasoningFormat(
        "openai_gptoss",
        "<|channel|>analysis<|message|>",
        "<|end|>",
        channels=True,
        others=("openai", "gpt_oss", "harmony"),
    ),
)


def _named(formats: tuple[ToolFormat, ...] | tuple[ReasoningFormat, ...]) -> Iterator[tuple[str, str]]:
    for each in formats:
        yield from ((name, each.name) for name in (each.name, *each.others))


TOOL_NAMES: Mapping[str, str] = dict(_named(TOOL_FORMATS))
"""Every name under which a format may be asked for, and the format's own."""
REASONING_NAMES: Mapping[str, str] = dict(_named(REASONING_FORMATS))


def tool_format(name: str) -> ToolFormat:
    return next(each for each in TOOL_FORMATS if each.name == TOOL_NAMES[name])


def reasoning_format(name: str) -> ReasoningFormat:
    return next(each for each in REASONING_FORMATS if each.name == REASONING_NAMES[name])
