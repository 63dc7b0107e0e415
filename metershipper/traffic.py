"""Kong-like access log entries, with the truth about what they must bill.

Owns: a deterministic generator of entries in the shapes Kong has written from 2.8 to 3.12, their encoding as Kong's
file-log plugin encodes them, and the running account of what a correct reader bills for them.
Never: reads a clock, a file or the network, and never imports the mapper: the truth is worked out from what was
generated, so that it can be held against what the mapper says.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from email.utils import formatdate
from json.encoder import encode_basestring
from typing import Any, Final, NamedTuple
from uuid import UUID

Entry = dict[str, Any]


class Kong(NamedTuple):
    """One generation of gateway: its release decides which keys it writes."""

    version: str
    release: tuple[int, int]
    container: str | None = None  # where AI usage goes: "" is flat under `ai`; None is a gateway that proxies no AI


KONGS: Final = {  # of 100 entries, how many
    Kong("2.8.3", (2, 8)): 12,
    Kong("3.4.2", (3, 4)): 13,
    Kong("3.9.1", (3, 9)): 20,
    Kong("3.6.1", (3, 6), ""): 8,
    Kong("3.7.1", (3, 7), "ai-proxy"): 9,
    Kong("3.8.0", (3, 8), "ai-proxy"): 10,
    Kong("3.9.1", (3, 9), "proxy"): 16,
    Kong("3.12.0.0-enterprise-edition", (3, 12), "proxy"): 12,
}
DECK: Final = [kong for kong, share in KONGS.items() for _ in range(share)]
CONSUMERS: Final = (  # username, custom_id, tags
    ("acme", "crm-10041", ["plan:gold", "region:eu"]),
    ("globex", "crm-10207", ["plan:silver"]),
    ("initech", "crm-10388", ["plan:gold", "region:us"]),
    ("umbrella", "crm-10415", ["plan:trial"]),
    ("hooli", "crm-10550", ["plan:platinum", "region:us"]),
)
MODELS: Final = (  # provider, the model asked for, the model that answered
    ("openai", "gpt-4o-mini", "gpt-4o-mini-2024-07-18"),
    ("azure", "gpt-4o", "gpt-4o-2024-11-20"),
    ("mistral", "mistral-small-latest", "mistral-small-2506"),
    ("anthropic", "claude-sonnet-4-5", "claude-sonnet-4-5-20250929"),
)
EMBEDDING: Final = ("openai", "text-embedding-3-small", "text-embedding-3-small")
APIS: Final = (  # name, upstream host, port, what follows the route's path in a request; the last one is the AI route
    ("orders", "orders.shop.internal", 8080, ("", "/70412", "/70412/lines")),
    ("catalog", "catalog.shop.internal", 8080, ("/items", "/items/gr%C3%BCn", "/categories")),
    ("search", "search.shop.internal", 9200, ("/v2", "/v2/suggest")),
    ("llm", "models.ai-platform.internal", 443, ("/v1/chat/completions",)),
)
QUERIES: Final[tuple[tuple[str, Entry], ...]] = (
    ("", {}),
    ("?page=2&limit=50", {"page": "2", "limit": "50"}),
    ("?q=caf%C3%A9%20noir&since=", {"q": "café noir", "since": ""}),
    ("?expand", {"expand": True}),
    ("?tag=new&tag=sale&tag", {"tag": ["new", "sale", True]}),
)
# The status the client got, and what each try upstream answered: none when Kong answered by itself.
OUTCOMES: Final = ((201, [201]), (404, [404]), (500, [500]), (429, []), (200, [502, 200]))
AI_FAILURES: Final = ((429, [429]), (502, [502, 502]), (400, [400]))
AGENTS: Final = ("okhttp/4.12.0", 'Mozilla/5.0 (X11; Linux x86_64) "Storefront" Chrome/126.0.0.0 Safari/537.36')
AI_AGENTS: Final = ("OpenAI/Python 1.58.1", "LangChain.js/0.3.19 (node v22.11.0)", "Vercel-AI-SDK/4.1.2")
DEPARTMENTS: Final = ("research", "sales", "support", "finance")
TIMES: Final = {"connect_timeout": 60000, "read_timeout": 60000, "write_timeout": 60000, "retries": 5, "enabled": True}
BUFFERS: Final = {"request_buffering": True, "response_buffering": True, "strip_path": True, "preserve_host": False}
MATCHING: Final = {"path_handling": "v0", "regex_priority": 0, "https_redirect_status_code": 426, "tags": []}
TLS: Final = {"version": "TLSv1.3", "cipher": "TLS_AES_256_GCM_SHA384", "client_verify": "NONE"}
ACCEPT: Final = {"accept": "application/json", "accept-encoding": "gzip, deflate, br", "connection": "keep-alive"}
SENT: Final = {"connection": "close", "x-ratelimit-limit-minute": "6000", "vary": "Origin, Accept-Encoding"}
AI_SENT: Final = {"strict-transport-security": "max-age=31536000", "set-cookie": ["__lb=n4; Path=/", "__s=0; HttpOnly"]}


@dataclass(slots=True)
class Truth:
    """What the entries so far must bill, when the subject is the consumer's username and both meters are on."""

    entries: int = 0
    events: int = 0  # one per entry with a consumer, plus one per AI call and direction with tokens that are billed
    api_requests: Counter[str] = field(default_factory=Counter)  # by subject
    tokens: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # subject, model, "request" | "response"
    anonymous: int = 0  # entries without a consumer: nothing of them is billed
    failed_ai_calls: int = 0  # of known consumers: status >= 400, tokens only estimated; only the request is billed


class _Call(NamedTuple):
    """One AI call, as one container of the entry reports it."""

    kind: str  # chat | stream | hit | embedding | failed
    provider: str
    request_model: str
    response_model: str
    prompt: int
    completion: int
    plugin_id: str
    latency_ms: int


def cjson(value: Any, *, escape_slash: bool = False) -> str:
    """Encode as lua-cjson does: no whitespace, numbers with 14 digits, text raw except for control characters."""
    text = _encode(value).replace("\x7f", "\\u007f")
    return text.replace("/", "\\/") if escape_slash else text  # a "/" can only be inside a string


def _encode(value: Any) -> str:
    if isinstance(value, str):
        return encode_basestring(value)
    if isinstance(value, dict):
        return "{" + ",".join([f"{encode_basestring(key)}:{_encode(item)}" for key, item in value.items()]) + "}"
    if isinstance(value, list):
        return "[" + ",".join([_encode(item) for item in value]) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if not math.isfinite(value):
        raise ValueError("lua-cjson refuses NaN and infinity")
    return f"{value:.14g}" if isinstance(value, float) or abs(value) >= 10**14 else str(value)


class Traffic:
    """An endless, reproducible stream of entries: the same seed and start give the same bytes."""

    def __init__(self, seed: int, *, started_at_ms: int) -> None:
        self.truth = Truth()
        self._rng = random.Random(seed)
        self._now_ms = started_at_ms
        since = started_at_ms // 1000 - 90 * 86_400  # when the gateway's entities were created
        self._workspace, self._proxy_id, self._transformer_id = self._uuid(), self._uuid(), self._uuid()
        self._consumers = [
            {"id": self._uuid(), "username": name, "custom_id": custom_id, "created_at": since, "tags": tags}
            for name, custom_id, tags in CONSUMERS
        ]
        self._credentials = [self._uuid() for _ in CONSUMERS]
        self._apis = [(*self._entities(*api[:3], since), api[3]) for api in APIS]

    def entry(self) -> Entry:
        """The next entry; the truth then includes it."""
        return self._next()[1]

    def line(self) -> bytes:
        """The next entry as file-log writes it; the truth then includes it."""
        kong, entry = self._next()
        return cjson(entry, escape_slash=kong.release < (3, 0)).encode() + b"\n"

    def _next(self) -> tuple[Kong, Entry]:
        rng = self._rng
        self._now_ms += 1 + int(rng.random() * 40)
        kong = rng.choice(DECK)
        calls = [] if kong.container is None else self._calls(kong.release)
        status, tries = self._outcome(calls)
        entry = self._entry(kong, calls, status, tries)
        known = rng.random() >= 0.04
        if known:
            number = int(rng.random() * len(CONSUMERS))
            entry["consumer"] = dict(self._consumers[number])
            entry["authenticated_entity"] = {"id": self._credentials[number]}
        self._count(entry["consumer"]["username"] if known else None, status, calls)
        keys = list(entry)
        rng.shuffle(keys)  # Lua tables have no order
        return kong, {key: entry[key] for key in keys}

    def _count(self, subject: str | None, status: int, calls: list[_Call]) -> None:
        truth = self.truth
        truth.entries += 1
        if subject is None:
            truth.anonymous += 1
            return
        truth.events += 1
        truth.api_requests[subject] += 1
        for call in calls:
            if status >= 400 and call.completion == 0:
                truth.failed_ai_calls += 1
                continue
            asked = call.response_model if call.request_model == "UNSPECIFIED" else call.request_model
            truth.tokens[subject, asked, "request"] += call.prompt
            truth.events += 1
            if call.completion > 0:
                truth.tokens[subject, call.response_model, "response"] += call.completion
                truth.events += 1

    def _calls(self, release: tuple[int, int]) -> list[_Call]:
        rng = self._rng
        kind = self._kind(release)
        # Kong estimates the prompts of all providers but the last before it calls them.
        provider, asked, answered = (
            EMBEDDING if kind == "embedding" else rng.choice(MODELS[: 3 if kind == "failed" else 4])
        )
        tokens = 8 + int(rng.random() ** 2 * 4000), 1 + int(rng.random() ** 2 * 1500)
        calls = [_Call(kind, provider, asked, answered, *tokens, self._proxy_id, 150 + rng.getrandbits(12))]
        if kind == "failed":
            calls[0] = calls[0]._replace(response_model=asked, completion=0)
        elif kind == "embedding":
            calls[0] = calls[0]._replace(completion=0)
        elif release == (3, 9) and kind == "chat" and rng.random() < 0.2:
            # A transformer plugin asks a model of its own first, which its configuration need not name.
            tokens = 20 + rng.getrandbits(8), 5 + rng.getrandbits(7)
            calls.append(_Call(kind, "openai", "UNSPECIFIED", MODELS[0][2], *tokens, self._transformer_id, 240))
        return calls

    def _kind(self, release: tuple[int, int]) -> str:
        dice = self._rng.random()
        if dice < 0.08 and (release == (3, 7) or release >= (3, 9)):  # the releases that log estimates
            return "failed"
        if dice < 0.16 and release >= (3, 9):
            return "hit"
        if dice < 0.26 and release >= (3, 11):
            return "embedding"
        return "stream" if dice < 0.5 and release >= (3, 9) else "chat"

    def _outcome(self, calls: list[_Call]) -> tuple[int, list[int]]:
        if calls and calls[0].kind == "failed":
            return self._rng.choice(AI_FAILURES)
        if calls:
            return 200, [] if calls[0].kind == "hit" else [200]
        return (200, [200]) if self._rng.random() < 0.86 else self._rng.choice(OUTCOMES)

    def _entry(self, kong: Kong, calls: list[_Call], status: int, tries: list[int]) -> Entry:
        rng, release = self._rng, kong.release
        service, route, tails = self._apis[-1] if calls else rng.choice(self._apis[:-1])
        kong_ms, proxy_ms = 1 + rng.getrandbits(3), sum(call.latency_ms for call in calls) or rng.getrandbits(8)
        request = self._request(route["paths"][0] + rng.choice(tails), calls)
        entry: Entry = {
            "request": request,
            "response": {
                "status": status,
                "size": 400 + rng.getrandbits(13),
                "headers": self._sent(kong, calls, kong_ms),
            },
            "latencies": {"request": (kong_ms + proxy_ms) / 1000 * 1000, "kong": kong_ms, "proxy": proxy_ms},
            "tries": [self._try(service["port"], answer, release) for answer in tries],
            "service": dict(service),
            "route": dict(route),
            "client_ip": f"10.31.{rng.getrandbits(4)}.{1 + rng.getrandbits(7)}",
            "started_at": self._now_ms,
            "upstream_uri": request["uri"] if tries else "",
        }
        if not tries:
            entry["latencies"] |= {"request": kong_ms, "proxy": -1}
        if release >= (3, 3):
            entry["upstream_status"] = ", ".join(map(str, tries))
        if release >= (3, 5):
            # Four words of a 31-bit generator, as in Kong: the top bit of each is clear.
            request["id"] = "".join([f"{rng.getrandbits(31):08x}" for _ in range(4)])
            entry["response"]["headers"]["x-kong-request-id"] = request["id"]
        if release >= (3, 6):
            entry["source"] = "upstream" if tries else "exit"
        if release >= (3, 7):
            entry["latencies"]["receive"] = len(calls)
            entry |= {"workspace": self._workspace, "workspace_name": "default"}
        if calls:
            parts = [_container(call, release) for call in calls]
            entry["ai"] = {kong.container: parts[0]} if kong.container else parts[0]
            entry["ai"] |= {"ai-request-transformer": part for part in parts[1:]}
        return entry

    def _try(self, port: int, answer: int, release: tuple[int, int]) -> Entry:
        attempt = {
            "ip": f"10.8.0.{answer % 7}",
            "port": port,
            "balancer_latency": 0,
            "balancer_start": self._now_ms + 1,
        }
        if answer >= 502:
            attempt |= {"state": "failed", "code": answer}
        if release >= (3, 6):  # nanoseconds need 19 digits, of which Lua's JSON keeps 14
            attempt |= {"balancer_start_ns": float((self._now_ms + 1) * 10**6), "balancer_latency_ns": 13568}
        return attempt

    def _request(self, path: str, calls: list[_Call]) -> Entry:
        rng = self._rng
        host = "ai.api.example-shop.test" if calls else "api.example-shop.test"
        tail, query = QUERIES[0] if rng.random() < 0.5 else rng.choice(QUERIES)
        method = "POST" if calls else rng.choice(("GET", "GET", "POST", "DELETE"))
        department = rng.choice(DEPARTMENTS)
        headers: Entry = ACCEPT | {"host": host, "user-agent": rng.choice(AI_AGENTS if calls else AGENTS)}
        headers["x-forwarded-for"] = f"203.0.113.{1 + rng.getrandbits(7)}"
        headers["x-department"] = [department, "shared"] if rng.random() < 0.05 else department  # sent twice: an array
        headers["x-tenant"] = f"tenant-{1 + rng.getrandbits(3)}"
        if method == "POST":
            headers |= {"content-type": "application/json", "content-length": str(60 + rng.getrandbits(12))}
        if calls or rng.random() < 0.5:
            headers["authorization"] = "REDACTED"
        if calls:
            headers["traceparent"] = f"00-{rng.getrandbits(128):032x}-{rng.getrandbits(64):016x}-01"
        request = {"method": method, "uri": path + tail, "url": f"https://{host}:443{path}{tail}", "headers": headers}
        return request | {"querystring": dict(query), "size": 300 + rng.getrandbits(12), "tls": dict(TLS)}

    def _sent(self, kong: Kong, calls: list[_Call], kong_ms: int) -> Entry:
        """The headers of the response."""
        headers: Entry = SENT | {"date": formatdate(self._now_ms // 1000, usegmt=True), "server": "istio-envoy"}
        headers["via"] = f"1.1 kong/{kong.version}" if kong.release >= (3, 8) else f"kong/{kong.version}"
        headers["x-kong-proxy-latency"] = str(kong_ms)
        headers["x-ratelimit-remaining-minute"] = str(5999 - self._rng.getrandbits(11))
        headers["content-type"] = "application/json; charset=utf-8"
        if calls:
            headers |= AI_SENT | {"x-kong-llm-model": f"{calls[0].provider}/{calls[0].request_model}"}
            if calls[0].kind == "stream":
                headers["content-type"] = "text/event-stream"
        return headers

    def _uuid(self) -> str:
        return str(UUID(int=self._rng.getrandbits(128), version=4))

    def _entities(self, name: str, host: str, port: int, since: int) -> tuple[Entry, Entry]:
        common = {"ws_id": self._workspace, "created_at": since, "updated_at": since + 86_400}
        service: Entry = TIMES | common | {"id": self._uuid(), "name": f"{name}-service", "host": host, "port": port}
        service |= {
            "protocol": "https" if port == 443 else "http",
            "path": "/",
            "tags": ["team:platform", f"api:{name}"],
        }
        route: Entry = (
            BUFFERS | MATCHING | common | {"id": self._uuid(), "name": f"{name}-route", "paths": [f"/{name}"]}
        )
        return service, route | {"protocols": ["http", "https"], "service": {"id": service["id"]}}


def _container(call: _Call, release: tuple[int, int]) -> Entry:
    """What one AI plugin reports, in its release's words."""
    total, per_token = call.prompt + call.completion, call.latency_ms / max(call.completion, 1)
    meta: Entry = {"request_model": call.request_model, "response_model": call.response_model}
    meta["provider_name"] = call.provider
    usage: Entry = {"prompt_tokens": call.prompt, "completion_tokens": call.completion, "total_tokens": total}
    if release >= (3, 7):
        meta["plugin_id"] = call.plugin_id
    if release == (3, 7):
        usage = {"prompt_token": call.prompt, "completion_token": call.completion, "total_tokens": total}
    if release < (3, 8):
        return {"meta": meta, "usage": usage}
    usage["cost"] = total * 1.5e-07
    if call.kind != "hit":  # an answer from the cache took the model no time
        usage["time_per_token"] = per_token
        meta["llm_latency"] = call.latency_ms
    if release >= (3, 11):
        usage["prompt_tokens_details"] = {"cached_tokens": call.prompt // 4, "audio_tokens": 0}
        usage["completion_tokens_details"] = {"reasoning_tokens": 0, "audio_tokens": 0} if call.completion else {}
    if release >= (3, 12):
        meta["request_mode"] = "stream" if call.kind == "stream" else "oneshot"
        usage["time_to_first_token"] = call.latency_ms // 3
    part = {"meta": meta, "usage": usage}
    if call.kind == "hit":
        hit = {"cache_status": "Hit", "fetch_latency": 12, "embeddings_latency": 42}
        part["cache"] = hit | {"embeddings_provider": "openai", "embeddings_model": EMBEDDING[1]}
    elif release == (3, 8) or call.request_model == "UNSPECIFIED":
        part["cache"] = {}
    return part
