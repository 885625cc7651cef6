"""The admin API against its own OpenAPI document: it is valid, and every operation answers as it says."""

import json
import os
import urllib.error
import urllib.request

from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

ADMIN, TOKEN = os.environ["ADMIN"], os.environ["ADMIN_TOKEN"]


def ask(method, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(ADMIN + path, data=data, method=method)
    request.add_header("authorization", f"Bearer {TOKEN}")
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.headers["content-type"], answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["content-type"], error.read()


status, _, body = ask("GET", "/admin/openapi.json")
assert status == 200, body
document = json.loads(body)
validate(document)

schemas = document["components"]["schemas"]


def check(schema, value):
    Draft202012Validator({**schema, "components": {"schemas": schemas}}).validate(value)


# What is asked of each operation: what stands in its path, its query, its body.
RULE = {"limit": 5, "of": "requests", "per": "day", "by": ["key"], "only": {"tag": "blue"}, "zone": "Europe/Berlin"}
EDIT = {"tags": ["blue"], "scopes": ["inference"], "metadata": {"a": "b"}, "from": ["10.0.0.0/8"], "usd_per_day": 1}
SAY = {
    "CreateKey": ("", "", {"name": "made", "tenant": "acme", **EDIT}),
    "ShowKey": ("quickstart", "", None),
    "EditKey": ("made", "", {**EDIT, "user": None, "models": ["nothing"]}),
    "RotateKey": ("made", "", {"grace": "1h"}),
    "EnableKey": ("made", "", None),
    "DisableKey": ("made", "", None),
    "RevokeKey": ("made", "", None),
    "ShowTenant": ("acme", "", None),
    "PutTenant": ("acme", "", {"name": "Acme", "tags": ["blue"]}),
    "EnableTenant": ("acme", "", None),
    "DisableTenant": ("acme", "", None),
    "ShowRule": ("r", "", None),
    "PutRule": ("made", "", RULE),
    "DeleteRule": ("made", "", None),
    "Limits": ("", "?key=quickstart&route=assistant&model=glimmer-1&ip=127.0.0.1&user=u", None),
    "Spend": ("", "?by=key,day&since=24h&zone=Europe/Berlin", None),
    "Steps": ("", "?model=glimmer-1&last=3", None),
}
# What others need comes before them, and what ends a thing at the end.
ORDER = ["CreateKey", "PutRule"]
LAST = ["RevokeKey", "DeleteRule"]

operations = {}
for path, methods in document["paths"].items():
    for method, operation in methods.items():
        assert operation["operationId"] not in operations, operation["operationId"]
        operations[operation["operationId"]] = (method.upper(), path, operation)


def rank(name):
    return ORDER.index(name) if name in ORDER else 50 + LAST.index(name) if name in LAST else 10


done = 0
for name in sorted(operations, key=rank):
    method, path, operation = operations[name]
    inside, query, body = SAY.get(name, ("", "", None))
    takes = operation.get("requestBody")
    if takes and body is not None:
        check(takes["content"]["application/json"]["schema"], body)
    filled = path.replace("{id}", inside).replace("{name}", inside)
    status, kind, answer = ask(method, filled + query, body)
    if name == "Request":
        # None is among the last: an error as it is documented.
        status, kind, answer = ask(method, path.replace("{id}", "nothing"))
        assert status == 404, answer
        check(operation["responses"]["404"]["content"]["application/json"]["schema"], json.loads(answer))
        done += 1
        continue
    (expected,) = [code for code in operation["responses"] if code < "300"]
    assert str(status) == expected, (name, status, answer)
    (content,) = operation["responses"][expected]["content"].items()
    assert kind.split(";")[0] == content[0], (name, kind)
    if content[0] == "application/json":
        check(content[1]["schema"], json.loads(answer))
    # What nobody knows is refused, and so is what is none of the documented bodies.
    if takes:
        status, _, answer = ask(method, filled, {"nobody-knows": 1})
        assert status == 400, (name, status, answer)
        check(operation["responses"]["400"]["content"]["application/json"]["schema"], json.loads(answer))
    done += 1
print(f"{done} operations are as they are documented")
