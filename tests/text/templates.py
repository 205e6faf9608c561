"""Chat templates in the styles of real model families, written for these tests, and conversations to render."""

from __future__ import annotations

from typing import Any

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'assistant') %}
{% set role = 'model' %}
{% else %}
{% set role = message['role'] %}
{% endif %}
{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}
{% endfor %}
{% if add_generation_prompt %}
{{'<start_of_turn>model
'}}{% endif %}
"""

WHITESPACE = """
  {% if true %}
    kept
  {% endif %}  tail
\t{# a comment #}
{%+ if true %} plus {% endif +%}
x {{- " y " -}} z
{% for message in messages -%}

  {{ message.role }}

{%- endfor %}
{% raw %}{{ raw }}{% endraw %}"""

MODERN = """{%- macro show(value) -%}<{{ value }}>{%- endmacro -%}
{%- for message in messages -%}
  {%- if message.role == 'skip' -%}{%- continue -%}{%- endif -%}
  {%- if message.role == 'tool' -%}{%- break -%}{%- endif -%}
  {{- show(message.role) -}}
  {%- if message.content is string -%}{{ message.content }}
  {%- else -%}{%- for part in message.content -%}{{ part['text'] }}|{%- endfor -%}{%- endif -%}
  {%- if message.tool_calls -%}{%- for call in message.tool_calls -%}
    {{ call.function | tojson }}{{ call.function.arguments | items | list }}
  {%- endfor -%}{%- endif -%}
  {%- if message.reasoning_content is defined -%}[{{ message.reasoning_content }}/{{ message.thinking }}]{%- endif -%}
  {%- if message.role == 'assistant' -%}
    {%- generation -%}{% set scoped = 'lost' %}{{ message.content }}{{ eos_token }}{%- endgeneration -%}{{ scoped }}
  {%- endif -%}
{%- endfor -%}
{{ documents is defined }} {{ documents is none }} {{ tools is none }} {{ enable_thinking | default('unset') }}
{{ dict(a=1) | tojson }} {{ {'z': 'é<>&', 'a': [1, 2.5, none]} | tojson(sort_keys=true, separators=(',', ':')) }}
{{ "  x ".strip() ~ 'a,b'.split(',')[1] ~ messages | length ~ (messages | map(attribute='role') | join('+')) }}
{{ unknown_name }}{{ pad_token }}{{ bos_token }}"""

TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "whitespace": WHITESPACE,
    "modern": MODERN,
}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi"}],
    "turns": [
        {"role": "user", "content": "  你好 😀 \n"},
        {"role": "assistant", "content": "\n<b>&amp;</b> \"quoted\" 'x' "},
        {"role": "user", "content": "{{ 7 * 7 }}{% raw %}"},
    ],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "1+1?"}],
    "two users": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "nulls": [
        {"role": "user", "content": "a", "name": None},
        {"role": "assistant", "content": "", "tool_calls": None, "reasoning": "because"},
    ],
    "calls": [
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
        {"role": "skip", "content": "no"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"b": 1, "a": "é"}}}],
        },
        {"role": "tool", "content": "42"},
    ],
}

TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {"type": "object"}}}]
