"""Templates render as transformers renders them; what they refuse or stumble over is the client's error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ellm.router.openai.chat_template import ChatTemplate
from ellm.router.openai.messages import plain_messages
from ellm.worker.api.errors import ConfigError, InvalidRequest

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>&'\"  "},
    {"role": "assistant", "content": "Hello, 你好"},
    {"role": "user", "content": "And?"},
]
# The constructs that real templates use, one or two each.
TEMPLATES = {
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{%- set date = strftime_now('%d %b %Y') %}{{- bos_token }}{{- 'Today: ' + date + '\\n' }}"
        "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] "
        "+ '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
        "{%- endif %}"
    ),
    "qwen": (
        "{%- if tools %}\n    {{- 'tools' }}\n{%- else %}\n    {%- if messages[0].role == 'system' %}\n"
        "        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n    {%- endif %}\n"
        "{%- endif %}\n{%- set ns = namespace(last=messages|length - 1) %}\n"
        "{%- for message in messages[::-1] %}\n    {%- if message.role == 'user' %}\n"
        "        {%- set ns.last = loop.index0 %}\n        {%- break %}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- for message in messages %}\n    {%- if message.role == 'system' %}\n        {%- continue %}\n"
        "    {%- endif %}\n    {{- '<|im_start|>' + message.role + '\\n' "
        "+ message.content + '<|im_end|>' }}\n"
        "{%- endfor %}\n{{- ns.last }}\n{%- if enable_thinking is defined and not enable_thinking %}no\n"
        "{%- endif %}\n"
    ),
    "blocks": (
        "{% for m in messages %}\n    {% if m.role == 'assistant' %}\n  {% generation %}\n{{ m.content }}\n"
        "  {% endgeneration %}\n    {% else %}\n{{ m.role }}: {{ m.content | tojson }}\n    {% endif %}\n"
        "{% endfor %}\n{{ messages | tojson(indent=2) }}\n"
    ),
    "macros": (
        "{% macro turn(m, i=0) %}[{{ i }}:{{ m['role'] | upper }}] {{ m['content'] }}{% endmacro %}"
        "{% for m in messages %}{{ turn(m, loop.index) }}{{ '\\n' if not loop.last }}{% endfor %}"
        "{{ dict(a=1)['a'] }}{{ missing }}{{ missing is defined }}"
    ),
}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("generate", [True, False])
def test_templates_render_as_transformers_does(name: str, generate: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = TEMPLATES[name]
    expected, _ = render_jinja_template(
        [CHAT], chat_template=source, add_generation_prompt=generate, enable_thinking=False, **TOKENS
    )
    template = ChatTemplate(source, TOKENS)
    assert template.render(CHAT, add_generation_prompt=generate, enable_thinking=False) == expected[0]


def test_a_refusal_is_told_to_the_client() -> None:
    template = ChatTemplate(TEMPLATES["llama2"], TOKENS)
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        template.render([CHAT[1], CHAT[1]])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].nothing.more }}",
        "{{ messages[0]['content'] + 5 }}",
        "{{ messages[99]['role'] | trim + 'x' }}{{ 1 // 0 }}",
        "{{ messages.append({}) }}",
        "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ (''|attr('__class__')).__mro__ }}{{ lipsum.__globals__['os'] }}",
        "{% include 'x' %}",
        "{{ range(99999999) | list }}",
    ],
)
def test_what_a_template_stumbles_over_shows_no_internals(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(source, {}).render(CHAT)
    assert "chat template" in caught.value.message
    assert "jinja" not in caught.value.message.lower()


def test_a_template_that_does_not_parse_is_refused_at_start() -> None:
    with pytest.raises(ConfigError, match="chat template"):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize("where", ["chat_template.jinja", "chat_template.json", "config", "named"])
def test_it_is_found_where_checkpoints_have_it(tmp_path: Path, where: str) -> None:
    source = "{{ bos_token }}{{ messages[0].content }}"
    config: dict[str, Any] = {"bos_token": {"content": "<b>"}}
    if where == "chat_template.jinja":
        (tmp_path / where).write_text(source)
    elif where == "chat_template.json":
        (tmp_path / where).write_text(json.dumps({"chat_template": source}))
    elif where == "config":
        config["chat_template"] = source
    else:
        config["chat_template"] = [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": source},
        ]
    template = ChatTemplate.load(tmp_path, config)
    assert template is not None
    assert template.render(CHAT) == "<b>Be brief."


def test_none_is_none(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path, {}) is None


def test_special_tokens_may_stand_in_their_own_file(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</x>"}}))
    template = ChatTemplate.load(tmp_path, {"chat_template": "{{ eos_token }}"})
    assert template is not None
    assert template.render(CHAT) == "</x>"


def test_the_final_message_is_left_open() -> None:
    template = ChatTemplate(TEMPLATES["llama3"], TOKENS)
    text = template.render(CHAT[:3], add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("Hello, 你好")


def test_developers_are_the_system_where_a_template_knows_none() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, CHAT[1]]
    template = ChatTemplate("{% for m in messages %}{{ m.role }},{% endfor %}", {})
    assert template.render(messages) == "system,user,"
    knowing = ChatTemplate("{% for m in messages %}{{ m.role }},{% endfor %}{# developer #}", {})
    assert knowing.render(messages) == "developer,user,"


def test_parts_become_one_text() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert plain_messages(messages, 10) == [{"role": "user", "content": "a\nb"}]
    function = {"name": "f", "arguments": '{"a": 1}'}
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}]}]
    (call,) = plain_messages(calls, 10)[0]["tool_calls"]
    assert call == {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
