"""Writes cases.json: chat templates with what the templates of well-known families do (the words are our own), talks, and what
transformers makes of each pair; null where it refuses.

    pip install transformers==5.23.0 jinja2==3.1.6
    python make.py
"""

import json
import pathlib

from transformers.utils.chat_template_utils import render_jinja_template

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

FAMILIES = {
    # Dates, a system part that may be missing, block `set`, tools that nobody gave.
    "llama-3": """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("a day: %%") %}
    {%- else %}
        {%- set date_string = "some day" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "You may call: " }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- "It is " + date_string + " (" ~ strftime_now("%d %b %Y") | length ~ " letters)\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("One call at a time.") }}
        {%- endif %}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    # A `namespace` that a reversed loop writes into, thoughts that are cut off, neighbours in a loop, tools as JSON.
    "qwen-3": """{%- set tools = [{'type': 'function', 'function': {'name': 'look_up', 'description': 'Finds <b>, "é" & 한국어', 'parameters': {'type': 'object', 'properties': {'limit': {'type': 'integer', 'default': 3, 'maximum': 2.5}, 'deep': {'type': 'boolean', 'default': false, 'enum': [true, none]}}, 'required': []}}}] if 'tool' in messages | map(attribute='role') | list else none %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
        {{- "\\n" ~ tool.function | tojson(indent=2) }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {{- tool_call.arguments | tojson }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    # Roles that must alternate, an `elif` by type, a renamed role, what the system says in front of the first user.
    "gemma-3": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Turns must go user, assistant, user, assistant") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {{ item['text'] | trim }}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("What is this content?") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
""",
    # `[INST]`, filters over attributes, a count of users and assistants, an error that is put together.
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}

{#- Whose turn it is; what tools say does not count. #}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("It is not the turn of " + message["role"] + "!") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {{- ", " if not loop.last else "]" }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {%- set content = message.content %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ", " }}
        {%- if not message.tool_call_id is defined or message.tool_call_id|length != 9 %}
            {{- raise_exception("An id has nine letters.") }}
        {%- endif %}
    {%- else %}
        {{- raise_exception("Only users, assistants and systems may speak, not " ~ message["role"]) }}
    {%- endif %}
{%- endfor %}
""",
    # White space is whatever the blocks leave of it.
    "phi-3": """{% for message in messages %}
{% if message['role'] == 'system' and message['content'] %}{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'user' %}{{'<|user|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>
' + message['content'] + '<|end|>
'}}{% endif %}
{% endfor %}
    {% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}

""",
    # Documents, a dictionary by number, a sentence that depends on what is there.
    "granite": """{%- if messages and messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = "Today is " ~ strftime_now('a %%') ~ "." %}
    {%- if tools and documents %}
        {%- set system_message = system_message + " With tools and documents." %}
    {%- elif tools %}
        {%- set system_message = system_message + " With tools." %}
    {%- elif documents %}
        {%- set system_message = system_message + " With documents." %}
    {%- else %}
        {%- set system_message = system_message + " With nothing." %}
    {%- endif %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}
{%- if messages | length > 3 %}{% set documents = [{'doc_id': 1, 'title': '', 'text': 'One.\\nTwo.'}, {'text': 'Drei "ß"'}] %}{% endif %}
{%- if documents %}
    {%- for document in documents %}
        {{- '<|start_of_role|>document ' + (document | tojson) + '<|end_of_role|>\\n' }}
        {{- document['title'] if document['title'] else 'Document ' ~ loop.index }}
        {{- ': ' + document['text'] }}
        {%- if not loop.last %}
            {{- '\\n\\n' }}
        {%- endif %}
    {%- endfor %}
{%- endif %}
{%- for message in loop_messages %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant' }}
            {%- if controls %}
                {{- ' ' + controls | tojson()}}
            {%- endif %}
        {{- '<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}""",
    # What the model is trained to say stands in blocks of its own; macros, `call`-less, with defaults.
    "smollm-3": """{#- Defaults -#}
{%- set reasoning_mode = "/think" -%}
{%- macro turn(role, content='nothing', end="<|im_end|>\\n") -%}
    <|im_start|>{{ role }}{{ "\\n" ~ content }}{{ end }}
{%- endmacro -%}
{%- if messages[0].role == "system" -%}
    {%- if "/no_think" in messages[0].content -%}
        {%- set reasoning_mode = "/no_think" -%}
    {%- endif -%}
    {%- set custom = messages[0].content.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{{- turn("system", "Mode: " ~ reasoning_mode ~ "\\n" ~ (custom | default("none said"))) -}}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- if message.role == "user" -%}
        {{- turn(message.role, content) -}}
    {%- elif message.role == "assistant" -%}
        {%- generation -%}
        {%- if reasoning_mode == "/think" -%}
            {{ turn("assistant", content.lstrip("\\n")) }}
        {%- else -%}
            {{ turn("assistant", "<think>\\n\\n</think>\\n" + content.lstrip("\\n")) }}
        {%- endif -%}
        {%- endgeneration -%}
    {%- elif message.role == "tool" -%}
        {{- turn(role="user", content=content) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if reasoning_mode == "/think" -%}
        {{ "<|im_start|>assistant\\n" }}
    {%- else -%}
        {{ "<|im_start|>assistant\\n" + "<think>\\n\\n</think>\\n" }}
    {%- endif -%}
{%- endif -%}
""",
    # A loop that is left early, `loop` by its neighbours, old-style [INST] with <<SYS>>.
    "llama-2": """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Users and assistants take turns') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
}

# One expression each, for every talk; `first` and `last` are the contents of the first and last message.
EXPRESSIONS = [
    "messages | map(attribute='role') | join('-')", "messages | rejectattr('role', 'eq', 'user') | list | length",
    "(messages | selectattr('role', 'in', ['system', 'assistant']) | first).content", "(messages | last).content[:7]", "messages[-1:][0].role",
    "messages[1:-1] | length", "messages[::2] | map(attribute='content') | join('|')", "last[::-1]", "last[-3:]", "first.split()", "first.split(' ', 1) | last",
    "last.splitlines() | length", "last | trim | length", "last.strip() | tojson", "last.lstrip() | tojson", "last.rstrip('.!?') | tojson",
    "last | upper", "last.title()", "last | capitalize", "last.lower()", "last | replace('a', 'A') | tojson", "last.find('a')", "last.count('e')", "last.isdigit()",
    "last | tojson", "messages | tojson(indent=2)", "messages | tojson(separators=(',', ':'))", "{'b': 1, 'a': [1.5, 2e20, -0.0, 0.25], 'c': {}} | tojson", "{'b': 1, 'a': 2} | tojson(sort_keys=true)", "last | tojson(ensure_ascii=false)", "last | tojson(ensure_ascii=true)", "last | tojson(4)",
    "{'b': 1, 'a': 2} | dictsort", "{'b': 1}.items() | list", "{'b': 1}.keys() | list | join", "{'a': 1}.get('b', 'no')", "messages[0].get('role')", "messages[0].get('tool_calls')",
    "messages[0]", "[1, 'a', none, true, 1.0]", "none", "true ~ 1.50 ~ 3", "(7 // 2, 7 % 3, 2 ** 5, 7 / 2)", "'%s is %d' | format('x', 3)", "'%05.1f' % 2.25", "'{} of {}'.format(1, 'x')", "'a' 'b'",
    "(messages is sequence, messages is mapping, messages[0] is mapping, last is string, last is iterable)", "(1 is number, 1 is integer, 1.5 is float, true is boolean, true is number, none is none, nothing is undefined)",
    "'x' if last else 'empty'", "last or 'empty'", "nothing | default('d') ~ ('' | default('e', true)) ~ ('' | default('f'))", "nothing", "nothing.more", "nothing['more']", "messages[99]", "messages[99].role", "messages[0].none.at_all",
    "('' in last, 'a' in last, 'user' in messages[0].values(), 'role' in messages[0])", "last is not none and last | length > 3", "not last is defined", "1 if false", "[3, 1, 2] | sort | join(',')", "['b', 'A', 'c'] | sort | join",
    "[1, 2, 3] | sum", "[1, 2, 3] | max", "[1, [2, 3]] | tojson", "['a', 'b', 'a'] | unique | list | join", "range(3) | list", "range(6, 0, -2) | list | join(' ')", "[1, 2, 3, 4] | batch(2) | list | tojson",
    "messages | groupby('role') | length", "messages | selectattr('content') | list | length", "messages | selectattr('tool_calls', 'defined') | list | length", "(1, 2)", "(1, 2) | tojson", "1 + last", "last + 1", "last ~ 1", "last * 2", "1 < 2 < 3", "('a' < 'b', [1] + [2], 'a' in ['a'])",
    "'a,b,,c'.split(',')", "'  x '.strip() + 'y'.join(['1', '2'])", "'xyx'.strip('x')", "'a\\tb\\\\n' | tojson", "'<&\\'\">' | tojson", "'<&>' | e", "'<&>' | escape | length", "'x' | indent(2)", "'a\\nb' | indent(2, true)", "last | string | int(0)", "'12' | int + 1", "'1.5' | float", "3.7 | round | int", "3 | abs", "messages | list | length", "messages | count", "last | wordcount", "'abc' | first ~ ('abc' | last)", "'abc' | list | join('.')",
    "strftime_now('%%')", "raise_exception('no: ' ~ last | length)", "bos_token ~ eos_token ~ pad_token ~ unk_token", "(add_generation_prompt, tools, documents)", "last.startswith(('a', 'H'))", "last.removeprefix('Hello')", "last.partition(' ')[0]", "last.encode()", "last.__class__", "messages.append(1)", "messages.copy() | length", "last.zfill(3)", "'ß'.upper() ~ 'İ'.lower() | length",
    "'\\x1c a \\u00a0'.strip() | tojson", "'\\x1c\\u200b a \\u3000' | trim | tojson", "'a\\x0bb\\u2028c'.splitlines() | length", "'a\\u00a0b\\x1cc'.split() | length", "cycler('a', 'b').next()", "dict(a=1, b='x') | tojson", "namespace(a=1).a", "namespace(a=1).b is defined", "joiner(',')() ~ 'x'",
    "messages | map('length') | list", "messages | map('upper') | list | length", "['a', 'b'] | map('upper') | join", "'a-b' | replace('-', '') | center(5)", "'a b' | urlencode", "[[1, 'a'], [2, 'b']] | map('last') | join", "('a' is in 'abc', 'a' is in ['b'])", "(5 is divisibleby 5, 4 is even, 3 is odd)", "'x' is sameas 'x'", "('A' is upper, 'a' is lower)", "(1 == 1.0, '1' == 1, true == 1)", "([] == (), {} == [])", "(0.1 + 0.2, 1e3, 10 ** 3, 1_000, 2 ** 0.5, 10 ** 20)",
]

# Statements that no expression shows.
STATEMENTS = {
    "breaks": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.index }}/{{ loop.length }} {{ loop.revindex0 }} {{ m.role }};{% endfor %}",
    "neighbours": "{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined else '-' }}>{{ m.role }}>{{ loop.nextitem.role if loop.nextitem is defined else '-' }} {{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}\n{% endfor %}",
    "filtered loop": "{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{% else %}none{% endfor %}",
    "empty loop": "{% for m in [] %}x{% else %}else{% endfor %}{% for k, v in {'a': 1, 'b': [2]}.items() %}{{ k }}={{ v }};{% endfor %}{% for k in {'a': 1} %}{{ k }}{% endfor %}",
    "scopes": "{% set x = 1 %}{% for m in messages %}{% set x = x + 1 %}{{ x }}{% endfor %}{{ x }}{% if true %}{% set x = 9 %}{% endif %}{{ x }}{% with y = 5 %}{{ y }}{% set x = 7 %}{% endwith %}{{ x }}{{ y }}",
    "set block": "{% set x %}a{{ messages | length }}{% endset %}{{ x }}{{ x | length }}{% set a, b = 1, 2 %}{{ a + b }}",
    "filter block": "{% filter upper %}loud {{ messages[0].role }}{% endfilter %}",
    "macro": "{% macro f(x, y=2, z=none) %}{{ x }}{{ y }}{{ z }}{% endmacro %}{{ f(1) }}{{ f(1, z=3) }}{{ f('a', 'b') | upper }}",
    "call": "{% macro box(t) %}[{{ t }}:{{ caller() }}]{% endmacro %}{% call box('a') %}in{{ messages | length }}{% endcall %}",
    "recursive macro": "{% macro f(n) %}{% if n > 0 %}{{ n }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(5) }}",
    "recursive loop": "{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}@{{ loop.depth }}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}\n  {% if m.role == 'assistant' %}\n    {% generation %}\n{{ m.content }}{% set z = 1 %}\n    {% endgeneration %}\n  {%- else -%}\n  {{ m.role }}\n  {% endif %}\n{% endfor %}{{ z }}",
    "generation trimmed": "a {%- generation -%} b {%- endgeneration %} c {%+ generation %} d {% endgeneration -%} e {{ 'a {% generation %} b' }}",
    "raw": "{% raw %}{{ not this }} {% nor that %}{% endraw %}{# nor this {% if %} #}x",
    "white space": "  {% if true %}\n  a\n  {%- if true %}\n  b\n  {% endif -%}\n\n  c\n{% endif %}\n  {{ 1 }}\n{# note #}\n d {{- 2 -}} \n e {%+ if true %} f {%+ endif %}\n\n\n",
    "no newline": "a\n\n", "crlf": "a\r\nb\r\n{% if true %}\r\nc{% endif %}\r\n",
    "sets attribute": "{% set ns = namespace(x=[]) %}{% for m in messages %}{% set ns.x = ns.x + [m.role] %}{% endfor %}{{ ns.x | join(',') }}",
    "sets item": "{% set m = messages[0] %}{% set m.role = 'x' %}{{ m.role }}",
    "unknown filter": "{{ messages | nothing }}", "unknown test": "{{ messages is nothing }}", "unknown tag": "{% nothing %}", "unclosed": "{% if true %}x", "unknown function": "{{ nothing() }}", "included": "{% include 'x' %}", "imported": "{% import 'x' as y %}",
    "do": "{% do messages.append(1) %}x", "line": "# for m in messages\nx\n## y", "unpack": "{% for a, b in [[1, 2], [3, 4]] %}{{ a }}{{ b }}{% endfor %}", "bad unpack": "{% for a, b in [[1, 2, 3]] %}{{ a }}{% endfor %}",
    "number keys": "{% set d = {1: 'a', 'k': 'b'} %}{{ d[1] }}{{ d.k }}{{ d['k'] }}{{ d.x }}", "chained": "{{ messages[0].content.strip().split(' ')[0].lower().replace('h', 'j') | trim | upper }}",
    "zero": "{{ 1 / 0 }}", "negative index": "{{ messages[-1].role }}{{ 'abc'[-1] }}{{ [1, 2][-3] }}",
    "alternation": "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant', 'tool'] %}{{ raise_exception('Unknown role: ' + m.role) }}{% endif %}{{ loop.index is odd }}{% endfor %}",
}

turn = lambda role, content: {"role": role, "content": content}
TALKS = [
    [turn("user", "Hello there!")],
    [turn("system", "Be brief. /no_think"), turn("user", "What is 7 // 2?")],
    [turn("user", "a"), turn("assistant", "b"), turn("user", "c")],
    [turn("system", " \n spaced out \t"), turn("user", "\n\n  Hi  \n"), turn("assistant", "\n ok \n"), turn("user", " ")],
    [turn("user", ""), turn("assistant", ""), turn("user", "")],
    [turn("user", "naïve café — “quotes” 'n' \"more\" <b>&amp;</b> \\n {{ not }} {% this %}"), turn("assistant", "한국어 日本語 😀👩‍👩‍👧 e\u0301 \u00a0 \u2028 \ufeff")],
    [turn("user", "Think."), turn("assistant", "<think>\nFirst,\n\nthen.\n</think>\n\nDone."), turn("user", "Again?"), turn("assistant", "<think>Hm</think>No")],
    [turn("user", "look it up"), turn("assistant", "<tool_call>{}</tool_call>"), turn("tool", "{\"found\": [1, 2.50]}"), turn("tool", "none"), turn("assistant", "There are two.")],
    [turn("system", "one"), turn("system", "two"), turn("user", "three"), turn("user", "four")],
    [turn("assistant", "I begin."), turn("user", "Why?")],
    [turn("king", "I am of no known role")],
    [turn("user", "tab\there\r\nand \u0000 \u0007 \u007f \u001c controls \u001f")],
    [turn("user", "a" * 50 + "\n" + "b " * 50), turn("assistant", "1 22 333"), turn("user", "Z.")],
]
LETS = "{% set first = messages[0].content %}{% set last = messages[-1].content %}"


def render(template, talk):
    try:
        rendered, _ = render_jinja_template([talk], chat_template=template, add_generation_prompt=True, **SPECIAL)
        return rendered[0]
    except Exception:
        return None


def main():
    templates = FAMILIES | STATEMENTS | {text: LETS + "{{ " + text + " }}" for text in EXPRESSIONS}
    cases = [{"name": name, "text": text, "rendered": [render(text, talk) for talk in TALKS]} for name, text in templates.items()]
    for case in cases:
        # What is the same for all talks is written once.
        if len(set(case["rendered"])) == 1:
            case["rendered"] = case["rendered"][:1]
    whole = {"special": SPECIAL, "talks": TALKS, "cases": cases}
    text = json.dumps(whole, ensure_ascii=False, indent=0)
    pathlib.Path(__file__).with_name("cases.json").write_text(text + "\n")


main()
