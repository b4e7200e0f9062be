"""How a model is told of tools and how its calls are read: templates, grammars, parsers."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from support.checkpoints import EOS_TOKEN_ID, write_tokenizer
from support.tools import MESSAGES, SCHEMAS, STRICT, TOOLS, check_calls

from ellm.router.openai.chat_parser import ChatParser, Parsing
from ellm.router.openai.chat_template import ChatTemplate
from ellm.router.openai.messages import plain_messages
from ellm.router.openai.schema import ChatRequest, parse
from ellm.router.openai.tool_calls import HERMES, LLAMA3, ToolFormat
from ellm.router.openai.tools import format_of, spelled_out, tool_use, tools_grammar
from ellm.router.tokenizer import Tokenizer
from ellm.worker.api.errors import InvalidRequest

CALLED = {
    "role": "assistant", "content": None,
    "tool_calls": [{"id": "call_1", "type": "function",
                    "function": {"name": "clock", "arguments": '{"utc": true}'}}],
}  # fmt: skip
TOLD = {"role": "tool", "tool_call_id": "call_1", "content": "noon"}


def test_a_template_that_knows_tools_gets_them() -> None:
    source = (
        "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}{{ m.role }}:"
        "{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
        "<tool_call>{{ c.function.arguments.utc }}</tool_call>{% endfor %};{% endfor %}"
    )
    template = ChatTemplate(source, {})
    assert template.knows_tools
    messages = plain_messages([*MESSAGES, CALLED, TOLD], 10)
    assert template.render(messages, tools=TOOLS) == (
        "[weather][clock]user:Weather?;assistant:<tool_call>True</tool_call>;tool:noon;"
    )
    assert template.render(messages).startswith("user")


def test_any_other_template_reads_of_them_in_the_messages() -> None:
    use = tool_use(parse(ChatRequest, {"messages": MESSAGES, "tools": TOOLS}))
    messages = plain_messages([{"role": "system", "content": "Be kind."}, *MESSAGES, CALLED, TOLD], 10)
    system, user, called, told = spelled_out(messages, use)
    assert system["content"].startswith("Be kind.\n\n# Tools")
    assert '"name":"weather"' in system["content"]
    assert user == MESSAGES[0]
    call = '<tool_call>\n{"name": "clock", "arguments": {"utc": true}}\n</tool_call>'
    assert called == {"role": "assistant", "content": call}
    assert told == {"role": "user", "content": "<tool_response>\nnoon\n</tool_response>"}
    assert spelled_out(messages, None)[0] == messages[0]


def test_the_template_tells_the_format() -> None:
    assert format_of(None) is HERMES
    assert format_of("no such thing") is HERMES
    assert format_of("{{ tools }} <tool_call>") is HERMES
    assert format_of("{{ tools }} <|python_tag|>") is LLAMA3
    with pytest.raises(InvalidRequest, match="not known"):
        format_of("{{ tools }} [TOOL_CALLS]")
    use = tool_use(parse(ChatRequest, {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required"}))
    assert use is not None
    assert '"{\\"name\\": \\"clock\\", \\"parameters\\": "' in tools_grammar(use, LLAMA3)


@pytest.mark.parametrize("form", [HERMES, LLAMA3], ids=lambda form: form.name)
def test_what_the_grammar_lets_through_the_parser_reads(tmp_path: Path, form: ToolFormat) -> None:
    """Random walks through the grammar of calls that must be made."""
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    tokens = LLTokenizer(tokenizer.definition(), n_vocab=tokenizer.vocab_size, eos_token=EOS_TOKEN_ID)
    use = tool_use(parse(ChatRequest, {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required"}))
    assert use is not None
    grammar, counts = tools_grammar(use, form), set()
    for seed in range(12):
        rng, ids = random.Random(seed), list[int]()
        matcher = LLMatcher(tokens, grammar, log_level=0)
        while EOS_TOKEN_ID not in ids:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            ids.append(int(rng.choice(np.flatnonzero(bits))))
            assert matcher.consume_token(ids[-1]), matcher.get_error()
        text = tokenizer.decode(ids)
        parser = ChatParser(Parsing(form))
        for i in range(0, len(text), 7):
            parser.feed(text[i : i + 7])
        parser.finish()
        message = parser.message()
        assert message["content"] is None, text
        check_calls(message["tool_calls"], set(SCHEMAS))
        counts.add(len(message["tool_calls"]))
    assert len(counts) > 1


def let_through(tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    """All of the text, and then its end."""
    tokens = LLTokenizer(tokenizer.definition(), n_vocab=tokenizer.vocab_size, eos_token=EOS_TOKEN_ID)
    matcher = LLMatcher(tokens, grammar, log_level=0)
    ids = tokenizer.encode(text, False)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("form", [HERMES, LLAMA3], ids=lambda form: form.name)
def test_a_strict_function_is_called_by_its_schema_or_not_at_all(
    tmp_path: Path, form: ToolFormat, parallel: bool
) -> None:
    """Under `auto`: text is free, until a call begins."""
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    body = {"messages": MESSAGES, "tools": STRICT, "parallel_tool_calls": parallel}
    use = tool_use(parse(ChatRequest, body))
    assert use is not None
    assert use.mixed
    grammar = tools_grammar(use, form)

    def call(arguments: str, name: str = "clock") -> str:
        return f'{form.begin}{{"name": "{name}", "{form.arguments}": {arguments}}}{form.end}'

    good = call('{"utc":true}')
    text = "Well <b>, a\n\nb {c}"
    for said in ("", text, "<", good, call('{"place":"x","days":3}', "weather")):
        assert let_through(tokenizer, grammar, said), said
    for said in (call('{"utc":1}'), call("{}"), call('{"utc":true}', "other"), call('{"utc":true,"a":1}')):
        assert not let_through(tokenizer, grammar, said), said
    several = good + form.between + call('{"utc":false}')
    assert let_through(tokenizer, grammar, several) == parallel
    assert let_through(tokenizer, grammar, text + good)  # of Llama 3's that is all text
    if form is LLAMA3:
        assert not let_through(tokenizer, grammar, '  {"utc":true}')
        assert not let_through(tokenizer, grammar, "<|python_tag|>{}")
    parser = ChatParser(Parsing(form))
    parser.feed(several)
    parser.finish()
    assert [made["function"]["arguments"] for made in parser.message()["tool_calls"]] == [
        '{"utc":true}', '{"utc":false}'
    ]  # fmt: skip


def test_functions_that_are_not_strict_leave_the_model_free() -> None:
    for more, enforced in (
        ({}, False),
        ({"tools": STRICT}, True),
        ({"tools": [TOOLS[0], STRICT[1]]}, True),
        ({"parallel_tool_calls": False}, True),
        ({"tool_choice": "required"}, True),
    ):
        use = tool_use(parse(ChatRequest, {"messages": MESSAGES, "tools": TOOLS, **more}))
        assert use is not None
        assert use.enforced == enforced, more
