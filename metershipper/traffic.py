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

    share: int  # of 100 entries
    via: str  # how it names itself in the response
    release: tuple[int, int]
    kinds: str = "plain"  # what passes through it, as often as it is named
    container: str = ""  # where it writes AI usage; nothing: flat under `ai`


KONGS: Final = (
    Kong(12, "kong/2.8.3", (2, 8)),
    Kong(13, "kong/3.4.2", (3, 4)),
    Kong(20, "1.1 kong/3.9.1", (3, 9)),
    Kong(8, "kong/3.6.1", (3, 6), "chat"),
    Kong(9, "kong/3.7.1", (3, 7), "chat " * 11 + "failed", "ai-proxy"),
    Kong(10, "1.1 kong/3.8.0", (3, 8), "chat", "ai-proxy"),
    Kong(16, "1.1 kong/3.9.1", (3, 9), "chat chat chat stream stream stream hit transformed failed", "proxy"),
    Kong(12, "1.1 kong/3.12.0.0-enterprise-edition", (3, 12), "chat stream stream hit embedding failed", "proxy"),
)
DECK: Final = [(kong, kong.kinds.split()) for kong in KONGS for _ in range(kong.share)]
# By kind: the status the client got, and what each try upstream answered (none when Kong answered by itself).
SUCCESS: Final = (200, [200])
OUTCOMES: Final[dict[str, list[tuple[int, list[int]]]]] = {
    "plain": [SUCCESS] * 30 + [(201, [201]), (404, [404]), (500, [500]), (429, []), (200, [502, 200])],
    "failed": [(429, [429]), (502, [502, 502]), (400, [400])],
    "hit": [(200, [])],
}
SINCE: Final = {"upstream_status": (3, 3), "source": (3, 6), "workspace": (3, 7), "workspace_name": (3, 7)}
CONSUMERS: Final = ("acme", "globex", "initech")
MODELS: Final = (  # provider, the model asked for, the model that answered
    ("openai", "gpt-4o-mini", "gpt-4o-mini-2024-07-18"),
    ("azure", "gpt-4o", "gpt-4o-2024-11-20"),
    ("anthropic", "claude-sonnet-4-5", "claude-sonnet-4-5-20250929"),
)
EMBEDDING: Final = ("openai", "text-embedding-3-small", "text-embedding-3-small")
APIS: Final = (  # name, upstream host, port, what follows the route's path in a request; the last one is the AI route
    ("orders", "orders.shop.internal", 8443, ("", "/70412", "/70412/lines")),
    ("catalog", "catalog.shop.internal", 8443, ("/items", "/items/gr%C3%BCn", "/categories")),
    ("llm", "models.ai-platform.internal", 443, ("/v1/chat/completions",)),
)
QUERIES: Final[tuple[tuple[str, Entry], ...]] = (
    ("", {}),
    ("?q=caf%C3%A9%20noir&since=", {"q": "café noir", "since": ""}),
    ("?page=2&expand", {"page": "2", "expand": True}),
    ("?tag=new&tag=sale&tag", {"tag": ["new", "sale", True]}),
)
AGENTS: Final = ("okhttp/4.12.0", 'Mozilla/5.0 (X11; Linux x86_64) "Storefront" Chrome/126.0.0.0 Safari/537.36')
AI_AGENTS: Final = ("OpenAI/Python 1.58.1", "LangChain.js/0.3.19 (node v22.11.0)", "Vercel-AI-SDK/4.1.2")
DEPARTMENTS: Final = ("research", "sales", "support", "finance") * 5 + (["research", "shared"],)  # sent twice: an array
SERVICE: Final = {"protocol": "https", "path": "/", "retries": 5, "connect_timeout": 60000, "read_timeout": 60000}
ROUTE: Final = {"protocols": ["http", "https"], "path_handling": "v0", "https_redirect_status_code": 426}
ROUTING: Final = {"strip_path": True, "preserve_host": False, "request_buffering": True, "response_buffering": True}
TLS: Final = {"version": "TLSv1.3", "cipher": "TLS_AES_256_GCM_SHA384", "client_verify": "NONE"}
ACCEPT: Final = {"accept": "application/json", "accept-encoding": "gzip, deflate, br", "connection": "keep-alive"}
SENT: Final = {"connection": "close", "x-ratelimit-remaining-minute": "5871", "vary": "Origin, Accept-Encoding"}
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
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not math.isfinite(value):
        raise ValueError("lua-cjson refuses NaN and infinity")
    return f"{value:.14g}" if isinstance(value, float) or abs(value) >= 10**14 else str(value)


class Traffic:
    """An endless, reproducible stream of entries: the same seed and start give the same bytes."""

    def __init__(self, seed: int, *, started_at_ms: int) -> None:
        self.truth = Truth()
        self._rng = random.Random(seed)
        self._now_ms = started_at_ms
        self._since = started_at_ms // 1000 - 90 * 86_400  # when the gateway's entities were created
        self._workspace, self._proxy_id, self._transformer_id = self._uuid(), self._uuid(), self._uuid()
        self._consumers = [(self._entity(username=who, custom_id=f"crm-{who}"), self._uuid()) for who in CONSUMERS]
        self._apis = [(*self._api(name, host, port), tails) for name, host, port, tails in APIS]

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
        kong, kinds = rng.choice(DECK)
        kind = rng.choice(kinds)
        calls = [] if kind == "plain" else self._calls(kind)
        entry = self._entry(kong, kind, calls)
        if rng.random() > 0.04:
            consumer, credential_id = rng.choice(self._consumers)
            entry |= {"consumer": dict(consumer), "authenticated_entity": {"id": credential_id}}
        self._count(entry, calls)
        keys = rng.sample(list(entry), len(entry))  # Lua tables have no order
        return kong, {key: entry[key] for key in keys if kong.release >= SINCE.get(key, kong.release)}

    def _count(self, entry: Entry, calls: list[_Call]) -> None:
        truth = self.truth
        truth.entries += 1
        if "consumer" not in entry:
            truth.anonymous += 1
            return
        subject = entry["consumer"]["username"]
        truth.events += 1
        truth.api_requests[subject] += 1
        for call in calls:
            if entry["response"]["status"] >= 400 and call.completion == 0:
                truth.failed_ai_calls += 1
                continue
            asked = call.response_model if call.request_model == "UNSPECIFIED" else call.request_model
            truth.tokens[subject, asked, "request"] += call.prompt
            truth.events += 1
            if call.completion > 0:
                truth.tokens[subject, call.response_model, "response"] += call.completion
                truth.events += 1

    def _calls(self, kind: str) -> list[_Call]:
        rng = self._rng
        # Kong estimates a prompt before it calls, for every provider but the last: those may fail with tokens.
        models = [EMBEDDING] if kind == "embedding" else MODELS[:-1] if kind == "failed" else MODELS
        provider, asked, answered = rng.choice(models)
        prompt, completion = 8 + int(rng.random() ** 2 * 4000), 1 + int(rng.random() ** 2 * 1500)
        if kind in ("embedding", "failed"):
            answered, completion = asked, 0
        calls = [_Call(provider, asked, answered, prompt, completion, self._proxy_id, 150 + rng.getrandbits(12))]
        if kind == "transformed":
            # That plugin asks a model of its own first, which its configuration need not name.
            tokens = 20 + rng.getrandbits(8), 5 + rng.getrandbits(7)
            calls.append(_Call("openai", "UNSPECIFIED", MODELS[0][2], *tokens, self._transformer_id, 240))
        return calls

    def _entry(self, kong: Kong, kind: str, calls: list[_Call]) -> Entry:
        rng, release = self._rng, kong.release
        status, tries = rng.choice(OUTCOMES.get(kind, [SUCCESS]))
        service, route, tails = self._apis[-1] if calls else rng.choice(self._apis[:-1])
        kong_ms, proxy_ms = 1 + rng.getrandbits(3), sum(call.latency_ms for call in calls) or rng.getrandbits(8)
        total_ms = (kong_ms + proxy_ms * bool(tries)) / 1000 * 1000  # Kong has seconds, and multiplies
        request = self._request("/v1/embeddings" if kind == "embedding" else rng.choice(tails), route, calls)
        headers = self._response_headers(kong, kind, kong_ms)
        entry: Entry = {
            "request": request,
            "response": {"status": status, "size": 400 + rng.getrandbits(13), "headers": headers},
            "latencies": {"request": total_ms, "kong": kong_ms, "proxy": proxy_ms if tries else -1},
            "tries": [_try(self._now_ms, service["port"], answer, release) for answer in tries],
            "service": dict(service),
            "route": dict(route),
            "client_ip": f"10.31.{rng.getrandbits(4)}.{1 + rng.getrandbits(7)}",
            "started_at": self._now_ms,
            "upstream_uri": request["uri"] if tries else "",
            "upstream_status": ", ".join(map(str, tries)),
            "source": "upstream" if tries else "exit",
            "workspace": self._workspace,
            "workspace_name": "default",
        }
        if release >= (3, 5):
            # Four words of a 31-bit generator, as in Kong: the top bit of each is clear.
            request["id"] = headers["x-kong-request-id"] = "".join([f"{rng.getrandbits(31):08x}" for _ in range(4)])
        if release >= (3, 7):
            entry["latencies"]["receive"] = len(calls)
        if calls:
            headers |= AI_SENT | {"x-kong-llm-model": f"{calls[0].provider}/{calls[0].request_model}"}
            parts = [_container(call, kind, release) for call in calls]
            entry["ai"] = {kong.container: parts[0]} if kong.container else parts[0]
            if kind == "transformed":
                entry["ai"]["ai-request-transformer"] = parts[1]
        return entry

    def _request(self, tail: str, route: Entry, calls: list[_Call]) -> Entry:
        rng = self._rng
        host = "ai.api.example-shop.test" if calls else "api.example-shop.test"
        arguments, query = QUERIES[0] if rng.random() < 0.5 else rng.choice(QUERIES)
        uri = route["paths"][0] + tail + arguments
        method = "POST" if calls else rng.choice(("GET", "GET", "POST", "DELETE"))
        headers: Entry = ACCEPT | {"host": host, "user-agent": rng.choice(AI_AGENTS if calls else AGENTS)}
        headers |= {"x-department": rng.choice(DEPARTMENTS), "x-tenant": f"tenant-{1 + rng.getrandbits(3)}"}
        headers["x-forwarded-for"] = f"203.0.113.{1 + rng.getrandbits(7)}"
        if method == "POST":
            headers |= {"content-type": "application/json", "content-length": str(60 + rng.getrandbits(12))}
        if calls or rng.random() < 0.5:
            trace = f"00-{rng.getrandbits(128):032x}-{rng.getrandbits(64):016x}-01"
            headers |= {"authorization": "REDACTED", "traceparent": trace}
        request = {"method": method, "uri": uri, "url": f"https://{host}:443{uri}", "headers": headers}
        return request | {"querystring": dict(query), "size": 300 + rng.getrandbits(12), "tls": dict(TLS)}

    def _response_headers(self, kong: Kong, kind: str, kong_ms: int) -> Entry:
        media_type = "text/event-stream" if kind == "stream" else "application/json; charset=utf-8"
        headers = SENT | {"content-type": media_type, "date": formatdate(self._now_ms // 1000, usegmt=True)}
        return headers | {"via": kong.via, "x-kong-proxy-latency": str(kong_ms)}

    def _api(self, name: str, host: str, port: int) -> tuple[Entry, Entry]:
        service = SERVICE | self._entity(name=f"{name}-service", host=host, port=port, enabled=True)
        route = ROUTE | ROUTING | self._entity(name=f"{name}-route", paths=[f"/{name}"], service={"id": service["id"]})
        return service, route

    def _entity(self, **fields: Any) -> Entry:
        dates = {"created_at": self._since, "updated_at": self._since}
        return {"id": self._uuid(), "tags": ["team:platform", "managed-by:deck"]} | dates | fields

    def _uuid(self) -> str:
        return str(UUID(int=self._rng.getrandbits(128), version=4))


def _container(call: _Call, kind: str, release: tuple[int, int]) -> Entry:
    """What one AI plugin reports, in its release's words."""
    s = "" if release == (3, 7) else "s"  # 3.7 counted in the singular
    usage: Entry = {f"prompt_token{s}": call.prompt, f"completion_token{s}": call.completion}
    usage["total_tokens"] = call.prompt + call.completion
    meta: Entry = {"request_model": call.request_model, "response_model": call.response_model}
    meta["provider_name"] = call.provider
    part = {"meta": meta, "usage": usage}
    if release >= (3, 7):
        meta["plugin_id"] = call.plugin_id
    if release < (3, 8):
        return part
    usage["cost"] = usage["total_tokens"] * 1.5e-07
    if kind == "hit":
        part["cache"] = {"cache_status": "Hit", "fetch_latency": 12, "embeddings_model": EMBEDDING[1]}
    else:  # an answer from the cache takes the model no time
        meta["llm_latency"] = call.latency_ms
        usage["time_per_token"] = call.latency_ms / max(call.completion, 1)
    if release == (3, 8) or call.request_model == "UNSPECIFIED":
        part["cache"] = {}
    if release >= (3, 12):
        usage["prompt_tokens_details"] = {"cached_tokens": call.prompt // 4, "audio_tokens": 0}
        usage["completion_tokens_details"] = {"reasoning_tokens": 0, "audio_tokens": 0} if call.completion else {}
        usage["time_to_first_token"] = call.latency_ms // 3
        meta["request_mode"] = "stream" if kind == "stream" else "oneshot"
    return part


def _try(now: int, port: int, answer: int, release: tuple[int, int]) -> Entry:
    attempt: Entry = {"ip": f"10.8.0.{answer % 7}", "port": port, "balancer_start": now, "balancer_latency": 0}
    if answer == 502:
        attempt |= {"state": "failed", "code": answer}
    if release >= (3, 6):  # nanoseconds need 19 digits, of which Lua's JSON keeps 14
        attempt |= {"balancer_start_ns": now * 1e6, "balancer_latency_ns": 13568}
    return attempt
