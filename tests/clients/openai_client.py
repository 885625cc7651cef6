"""What a user of the official client does: ask, stream, make mistakes, be limited. Run by tests/clients.rs."""

import json
import os
import time
from array import array

import openai

client = openai.OpenAI(max_retries=0, timeout=30)
question = [{"role": "user", "content": "What is Glassgate?"}]
checks = 0


def check(what: str, holds: bool) -> None:
    global checks
    assert holds, what
    checks += 1


check("models are listed, the route first", client.models.list().data[0].id == "assistant")

whole = client.chat.completions.create(model="assistant", messages=question, temperature=0)
check("an answer has text and usage", "Glassgate" in whole.choices[0].message.content and whole.usage.completion_tokens > 3)

pieces, usage = [], None
stream = client.chat.completions.create(
    model="assistant", messages=question, temperature=0, stream=True, stream_options={"include_usage": True}
)
for chunk in stream:
    usage = chunk.usage or usage
    pieces += [choice.delta.content or "" for choice in chunk.choices]
check("a stream has the same text and usage", "".join(pieces) == whole.choices[0].message.content)
check("usage comes once, at the end", usage.total_tokens == whole.usage.total_tokens)

several = client.chat.completions.create(model="assistant", messages=question, n=3, max_tokens=4, temperature=1.2, seed=3)
check("several answers come in order", [choice.index for choice in several.choices] == [0, 1, 2])

text = client.completions.create(model="assistant", prompt=["Count: 1 2", "Red"], max_tokens=4, temperature=0)
check("a text completion answers each prompt", len(text.choices) == 2 and text.usage.completion_tokens > 0)

told = client.chat.completions.create(model="assistant", messages=question, temperature=0, logprobs=True, top_logprobs=2)
places = told.choices[0].logprobs.content
joined = b"".join(bytes(place.bytes) for place in places).decode()
check("every token is told with its probability", joined == told.choices[0].message.content and all(len(p.top_logprobs) == 2 for p in places))

lists = client.completions.create(model="assistant", prompt="Count: 1 2 3", max_tokens=4, temperature=0, logprobs=1)
check("a text completion tells its tokens in lists", "".join(lists.choices[0].logprobs.tokens) == lists.choices[0].text)

schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"], "additionalProperties": False}
form = {"type": "json_schema", "json_schema": {"name": "digit", "strict": True, "schema": schema}}
formed = client.chat.completions.create(model="assistant", messages=question, temperature=1.5, seed=1, response_format=form)
check("an answer keeps to its schema", json.loads(formed.choices[0].message.content)["n"] in range(10))

forced = client.chat.completions.create(model="assistant", messages=question, temperature=0, max_tokens=3, logit_bias={"300": 100}, logprobs=True)
check("a bias forces a token", len({place.token for place in forced.choices[0].logprobs.content}) == 1)
flexible = client.chat.completions.create(model="remote", messages=question, service_tier="flex")
check("an answer tells how it was served", flexible.service_tier == "flex")
chunks = list(client.chat.completions.create(model="remote", messages=question, service_tier="priority", stream=True))
check("a stream tells it at its end", chunks[-1].service_tier == "priority")
# The client asks for base64 and makes numbers of it, unless it is told otherwise.
vectors = client.embeddings.create(model="tiny", input=["hello world", "the quick brown fox"])
numbers = client.embeddings.create(model="tiny", input="hello world", encoding_format="float")
check("embeddings come in order and are counted", [e.index for e in vectors.data] == [0, 1] and vectors.usage.prompt_tokens == vectors.usage.total_tokens == 10)
check("a vector is the same in both formats", array("f", numbers.data[0].embedding) == array("f", vectors.data[0].embedding) and len(numbers.data[0].embedding) == 32)

try:
    client.chat.completions.create(model="gpt-5", messages=question)
except openai.NotFoundError as error:
    check("an unknown model is a NotFoundError that says what there is", error.code == "model_not_found" and "assistant" in error.message)

try:
    client.chat.completions.create(model="assistant", messages=question, temperature=1.9, n=99)
except openai.BadRequestError as error:
    check("an unsupported parameter is named", error.param == "n")

try:
    openai.OpenAI(api_key="gg-wrong", max_retries=0).models.list()
except openai.AuthenticationError as error:
    check("a wrong key is an AuthenticationError", error.status_code == 401 and error.request_id is not None)

limited = openai.OpenAI(api_key=os.environ["LIMITED_KEY"], max_retries=0)
deadline = time.monotonic() + 5
while True:
    try:
        limited.chat.completions.create(model="assistant", messages=question, max_tokens=1)
    except openai.AuthenticationError:
        assert time.monotonic() < deadline, "the new key was never seen"
    except openai.RateLimitError as error:
        check("a limit says when to return", int(error.response.headers["retry-after"]) > 0)
        break

# With retries on, as users have it, the client waits as long as it is told and then gets its answer.
patient = openai.OpenAI(api_key=os.environ["PATIENT_KEY"], max_retries=2)
began = time.monotonic()
while patient.chat.completions.with_raw_response.create(model="assistant", messages=question, max_tokens=1).retries_taken == 0:
    assert time.monotonic() - began < 30, "the limit was never reached"
check("a limited client retries and is answered", True)

# A spent budget is final for today: the client must not try again, however often it would.
broke = openai.OpenAI(api_key=os.environ["BROKE_KEY"], max_retries=5)
try:
    broke.chat.completions.create(model="assistant", messages=question, max_tokens=1)
except openai.RateLimitError as error:
    check("a spent budget is told as insufficient_quota", error.code == "insufficient_quota")

print(f"{checks} checks passed")
