from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from runtime.errors import BadRequest
from runtime.text.chat import ChatTemplate, load_chat_template
from tests.runtime.frontdoor.model_folder import CHAT_TEMPLATE, write_model
from workers.errors import CheckpointError

MESSAGES = [{"role": "system", "content": "be <kind>"}, {"role": "user", "content": "hi & bye"}, {"role": "assistant", "content": "é"}]
TEMPLATES = {
    "plain": CHAT_TEMPLATE,
    "blocks": """{%- for message in messages %}
    {%- if message.role == 'system' %}
[SYS]{{ message.content }}
    {% elif loop.last %}
last {{ message.content | trim }}{{ eos_token }}
    {%- else %}
{{ message.role }}: {{ message['content'] }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}go{% endif %}
""",
    "tools": "{% if tools is not none %}{{ tools | tojson }}{{ tools | tojson(indent=2) }}{% endif %}{{ documents }}{{ messages|tojson }}",
    "controls": "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "<f>", "description": "naïve & co"}}]


DOCUMENTS: list[Any] = [{"title": "a <title>", "text": "naïve"}]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(("tools", "documents"), [(None, None), (TOOLS, None), (None, DOCUMENTS), (TOOLS, DOCUMENTS)])
def test_renders_as_transformers_does(tmp_path: Path, name: str, tools: list[Any] | None, documents: list[Any] | None) -> None:
    folder = write_model(tmp_path)
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder))
    ours = load_chat_template(folder)
    assert ours is not None
    wanted = theirs.apply_chat_template(MESSAGES, tools=tools, documents=documents, add_generation_prompt=True, tokenize=False)
    assert ours.render(MESSAGES, tools, documents) == wanted
    assert wanted


def test_today_is_known() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render([]) == datetime.datetime.now().strftime("%Y")


def test_where_a_template_is_found(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    assert load_chat_template(tmp_path) is None
    config.write_text(json.dumps({"bos_token": {"content": "<b>"}, "chat_template": "string {{ bos_token }}"}))
    assert _rendered(tmp_path) == "string <b>"
    entries = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    config.write_text(json.dumps({"chat_template": entries}))
    assert _rendered(tmp_path) == "default"
    config.write_text(json.dumps({"chat_template": entries[:1]}))
    assert load_chat_template(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("file")
    assert _rendered(tmp_path) == "file"


def _rendered(folder: Path) -> str:
    template = load_chat_template(folder)
    assert template is not None
    return template.render([])


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[9].content.strip() }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_a_bad_request(source: str) -> None:
    with pytest.raises(BadRequest, match=r"^messages: "):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


def test_a_broken_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate("{% if %}", {})
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load_chat_template(tmp_path)
